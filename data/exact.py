"""exact: a world small enough to enumerate, so that the optimal policy can be computed, and each
method's distance to it.

    x          one of four prompts, strings of the symbols a, b, c
    y          one of 40 outcomes, the strings of at most three symbols: 1 + 3 + 9 that end with the
               end token, and 27 of full length, which have none (exact:1, at most one symbol: 4)
    r(x, y)    the reward, fixed draws from N(0, 1)
    d(y|x)     the distribution of the demonstrations, 0.8 softmax(N(0, 1)) + 0.2 uniform
    π*(y|x)    ∝ π_ref(y|x) exp(r(x, y) / β); every report has β = 0.5, `world_beta`

A pair is two different demonstrations, labelled by Bradley–Terry from r. All draws are from tables:
`pairs` (x, chosen, rejected) and `labels` (x, y, label) hold the probability of every row that can
be drawn, and the optimum of each loss is computed from them.
"""

import base64
import random
from functools import cached_property
from itertools import product

import numpy as np
import torch

from data.error import UserError
from data.toy import Labelled, Toy

SYMBOLS = "abc"


class Exact(Toy):
    """The world as tables over prompts and outcomes: r, d, beats, pairs, labels."""

    bound = None
    world_beta = 0.5
    # no prompt is the beginning of another, so every text has only one reading
    contexts = ("a", "bb", "bca", "cab")

    def __init__(self, longest=3):
        self.name = "exact" if longest == 3 else f"exact:{longest}"
        self.max_new_tokens = longest
        tokens = [base64.b64encode(s.encode()).decode() for s in SYMBOLS]
        vocab = "".join(f"{token} {rank}\n" for rank, token in enumerate(tokens))
        self.tokenizer = {"name": self.name, "vocab": vocab, "longest": longest}
        self.cells = {}  # what is drawn -> (cumulative probabilities, rows)
        self.outcomes = ["".join(y) for n in range(longest + 1) for y in product(SYMBOLS, repeat=n)]
        rng = random.Random(f"the world of {self.name}")
        shape = 2, len(self.contexts), len(self.outcomes)
        draws = np.array([rng.gauss(0, 1) for _ in range(np.prod(shape))])
        self.r, logits = draws.reshape(shape)  # (4, 40) each
        weight = np.exp(logits)
        self.d = 0.8 * weight / weight.sum(1, keepdims=True) + 0.2 / len(self.outcomes)  # (4, 40)

    @cached_property
    def _splits(self):
        both = [(x, {}) for x in self.contexts]
        return {"train": both, "test": both}

    @property
    def rows(self):
        """(prompt, outcome) of every cell of a (4, 40) table, in its order"""
        return list(product(self.contexts, self.outcomes))

    @cached_property
    def beats(self):
        """(4, 40, 40): P(y beats y') = σ(r(x, y) - r(x, y'))"""
        return 1 / (1 + np.exp(self.r[:, None, :] - self.r[:, :, None]))

    @cached_property
    def pairs(self):
        """(4, 40, 40): probability of the row (x, chosen, rejected)"""
        first, second = self.d[:, :, None], self.d[:, None, :]
        shown = first * second / (1 - first)  # the second is drawn until it differs
        shown *= 1 - np.eye(len(self.outcomes))
        return (shown + shown.transpose(0, 2, 1)) * self.beats / len(self.contexts)

    @cached_property
    def labels(self):
        """(4, 40, 2): probability of the row (x, y, False) and of (x, y, True)"""
        p = np.einsum("xyz,xz->xy", self.beats, self.d)
        return self.d[:, :, None] * np.stack([1 - p, p], 2) / len(self.contexts)

    def demonstrations(self, n, seed, split="train"):
        table = self.d / len(self.contexts)
        return self._pick(n, seed, split, "demonstrations", table, self.outcomes)

    def preferences(self, n, seed, split="train"):
        return self._pick(n, seed, split, "preferences", self.pairs, self.outcomes, self.outcomes)

    def feedback(self, n, seed, split="train"):
        rows = self._pick(n, seed, split, "feedback", self.labels, self.outcomes, (False, True))
        return [Labelled(*row) for row in rows]

    def _pick(self, n, seed, split, what, table, *axes):
        """-> n rows drawn from a table of probabilities over the prompts and `axes`"""
        if what not in self.cells:
            self.cells[what] = table.cumsum()[:-1], list(product(self.contexts, *axes))
        cdf, rows = self.cells[what]
        rng = np.random.default_rng(self._rng(what, seed, split).getrandbits(64))
        return [rows[i] for i in np.searchsorted(cdf, rng.random(n), side="right").tolist()]

    def reward(self, prompt, completion, ended=True):
        """-> r(x, y). A response of full length has no end token, so `ended` is not read."""
        try:
            return float(self.r[self.contexts.index(prompt), self.outcomes.index(completion)])
        except ValueError:
            raise UserError(
                f"exact knows the prompts {', '.join(self.contexts)} and up to "
                f"{self.max_new_tokens} of the symbols {SYMBOLS}, not {prompt!r} with "
                f"{completion!r}"
            ) from None

    def longest(self, max_new_tokens, block_size):
        if max_new_tokens not in (0, self.max_new_tokens):
            own = f"the responses of {self.name} have a length of their own"
            raise UserError(f"--max-new-tokens {max_new_tokens}: {own}; leave it out")
        return self.max_new_tokens


def star(log_ref, r, beta):
    """log π*, π* ∝ π_ref exp(r/β). log_ref, r: (…, Y). Returns the same shape."""
    return (log_ref + r / beta).log_softmax(-1)


def kl(log_p, log_q):
    """KL(p‖q) in nats, (…, Y) each -> (…). An outcome of probability 0 in p adds 0."""
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1)


def tv(log_p, log_q):
    """Total variation distance, half the sum of |p - q|: (…, Y) each -> (…)."""
    return (log_p.exp() - log_q.exp()).abs().sum(-1) / 2

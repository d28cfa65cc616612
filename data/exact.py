"""exact: a world small enough to enumerate, so that the optimal policy is computed and each method's distance to it known.

    x          one of four prompts, strings of the symbols a, b, c
    y          every string of at most three symbols: 1 + 3 + 9 that end with the end token, and 27 of full length, which
               carry none: 40 outcomes (exact:1, at most one symbol: 4)
    r(x, y)    the reward, fixed draws from N(0, 1)
    d(y|x)     the distribution of the demonstrations, 0.8 softmax(N(0, 1)) + 0.2 uniform
    π*(y|x)    ∝ π_ref(y|x) exp(r(x, y) / β) with β = 0.5, `world_beta`, in every report

Pairs are two different demonstrations, labelled by Bradley–Terry from r. All draws are from tables: `pairs` (x, chosen,
rejected) and `labels` (x, y, label) hold the whole population, which the losses' own optima are computed from.
"""
import base64
import random
from functools import cached_property
from itertools import product

import numpy as np

from data.error import DataError
from data.toy import Toy

SYMBOLS = "abc"


class Exact(Toy):
    bound = None
    world_beta = 0.5
    contexts = ("a", "bb", "bca", "cab")  # the prompts: none is the beginning of another, so no text has two readings

    def __init__(self, longest=3):
        self.name, self.max_new_tokens = "exact" if longest == 3 else f"exact:{longest}", longest
        vocab = "".join(f"{base64.b64encode(s.encode()).decode()} {rank}\n" for rank, s in enumerate(SYMBOLS))
        self.tokenizer = {"name": self.name, "vocab": vocab, "longest": longest}
        self.cells = {}  # what is drawn -> (cumulative probabilities, rows)
        self.outcomes = ["".join(y) for n in range(longest + 1) for y in product(SYMBOLS, repeat=n)]
        rng = random.Random(f"the world of {self.name}")
        draws = np.array([[[rng.gauss(0, 1) for _ in self.outcomes] for _ in self.contexts] for _ in range(2)])
        self.r, weight = draws[0], np.exp(draws[1])  # (4, 40)
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
        shown = self.d[:, :, None] * self.d[:, None, :] / (1 - self.d[:, :, None])  # the second is drawn until it differs
        shown *= 1 - np.eye(len(self.outcomes))
        return (shown + shown.transpose(0, 2, 1)) * self.beats / len(self.contexts)

    @cached_property
    def labels(self):
        """(4, 40, 2): probability of the row (x, y, False) and of (x, y, True)"""
        p = np.einsum("xyz,xz->xy", self.beats, self.d)
        return self.d[:, :, None] * np.stack([1 - p, p], 2) / len(self.contexts)

    def demonstrations(self, n, seed, split="train"):
        return self._pick(self.d / len(self.contexts), (self.contexts, self.outcomes), "demonstrations", n, seed, split)

    def preferences(self, n, seed, split="train", graded=False):
        rows = self._pick(self.pairs, (self.contexts, self.outcomes, self.outcomes), "preferences", n, seed, split)
        return [(*row, 0.0, 1.0) for row in rows] if graded else rows

    def feedback(self, n, seed, split="train"):
        return self._pick(self.labels, (self.contexts, self.outcomes, (False, True)), "feedback", n, seed, split)

    def _pick(self, table, names, *draw):
        """n rows drawn from a table of probabilities, whose axes stand for `names`"""
        what, n, seed, split = draw
        if what not in self.cells:
            self.cells[what] = (table.cumsum(), list(product(*names)))
        cdf, rows = self.cells[what]
        uniform = np.random.default_rng(self._rng(what, seed, split).getrandbits(64)).random(n)
        return [rows[i] for i in np.searchsorted(cdf[:-1], uniform, side="right").tolist()]

    def reward(self, prompt, completion, ended=True):
        """r(x, y); a response of full length has no end token, so `ended` is not asked for."""
        try:
            return float(self.r[self.contexts.index(prompt), self.outcomes.index(completion)])
        except ValueError:
            raise DataError(f"exact knows the prompts {', '.join(self.contexts)} and up to {self.max_new_tokens} of the symbols "
                            f"{SYMBOLS}, not {prompt!r} with {completion!r}") from None  # fmt: skip

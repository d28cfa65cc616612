"""What the built-in tasks share: prompts in two splits, examples with the gold reward's labels."""

import hashlib
import math
import random
from collections import namedtuple
from functools import cached_property

# What `feedback` draws: an answer, and whether it is desirable.
Labelled = namedtuple("Labelled", "prompt completion label")

# What `graded` draws: a pair, by how much chosen should win, and the probability that it is better.
Graded = namedtuple("Graded", "prompt chosen rejected margin p", defaults=(0.0, 1.0))


class Task:
    """What a built-in task and a file have in common; each may override it."""

    size = 0  # rows of a fixed training set; 0: fresh ones every step, None: all of a file
    outcomes = None  # every possible response, if they are few enough to enumerate
    tokenizer = None  # the `meta` of its own vocabulary; None: the committed one
    unpaired = False  # whether the rows of a file are labelled answers, not pairs
    template = None

    def longest(self, max_new_tokens, block_size):
        """-> how many tokens are sampled at most: --max-new-tokens, or the task's own number"""
        return max_new_tokens or min(self.max_new_tokens, block_size // 2)

    def columns(self):
        """-> the names of what the rows hold beside a prompt"""
        return list(self.prompts(1, 0)[0][1])

    def lacks(self, column):
        """-> the place of a row that lacks one of its columns; "" if every row has it"""
        return ""

    def correct(self, prompt, completion, ended=True, **columns):
        """Whether the response counts as right, if a method needs to know."""
        return self.reward(prompt, completion, ended, **columns) > 0


class Toy(Task):
    """A subclass names its prompts (`all_prompts`), writes answers (`respond`) and judges them
    (`reward`, `correct`).

    Every draw is a function of (task, split, seed) alone. Labels are drawn from the gold reward r
    by Bradley–Terry, P(a beats b) = σ(r(a) - r(b)), so some are "wrong", as people's are.
    """

    kind = property(lambda self: self.name.partition(":")[0])
    test_share = 0.25
    has_reward = True

    @cached_property
    def _splits(self):
        splits = {"train": [], "test": [], "skills": [], "rest": []}
        # skills and rest are parts of train, a third and two thirds of it (rlaif.py)
        cut = (1 + 2 * self.test_share) / 3
        for row in self.all_prompts():
            share = hash_share(row[0])
            if share < self.test_share:
                splits["test"].append(row)
            else:
                splits["train"].append(row)
                splits["skills" if share < cut else "rest"].append(row)
        return splits

    def prompts(self, n, seed, split="train"):
        """-> n of (prompt, columns), all if n is None. No prompt comes twice before all have come
        once. The columns go to `reward` by name."""
        rows = self._splits[split]
        rng = self._rng("prompts", seed, split)
        n = n or len(rows)
        return [row for _ in range(-(-n // len(rows))) for row in rng.sample(rows, len(rows))][:n]

    def demonstrations(self, n, seed, split="train"):
        """-> n of (prompt, completion)"""
        rng = self._rng("demonstrations", seed, split)
        return [(x, self.respond(rng, x, columns)) for x, columns in self._draw(rng, n, split)]

    def preferences(self, n, seed, split="train"):
        """-> n of (prompt, chosen, rejected), two different answers to each prompt"""
        rng = self._rng("preferences", seed, split)
        out = []
        for prompt, columns in self._draw(rng, n, split):
            a, b = self.compare(rng, prompt, columns)
            p = self.preferred(prompt, a, b, columns)
            out.append((prompt, a, b) if rng.random() < p else (prompt, b, a))
        return out

    def graded(self, n, seed, split="train"):
        """-> n pairs, as Graded"""
        return [Graded(*row) for row in self.preferences(n, seed, split)]

    def feedback(self, n, seed, split="train"):
        """-> n Labelled answers. A label is True with the probability that the answer beats a fresh
        demonstration"""
        rng = self._rng("feedback", seed, split)
        out = []
        for prompt, columns in self._draw(rng, n, split):
            completion = rng.choice(self.compare(rng, prompt, columns))
            other = self.respond(rng, prompt, columns)
            p = self.preferred(prompt, completion, other, columns)
            out.append(Labelled(prompt, completion, rng.random() < p))
        return out

    def compare(self, rng, prompt, columns):
        """-> two different answers, as a person would see them"""
        a = b = self.respond(rng, prompt, columns)
        while a == b:
            b = self.respond(rng, prompt, columns)
        return a, b

    def preferred(self, prompt, a, b, columns):
        """-> the probability that a label says a rather than b"""
        reward_a, reward_b = (self.reward(prompt, y, **columns) for y in (a, b))
        return 1 / (1 + math.exp(reward_b - reward_a))

    def _draw(self, rng, n, split):
        return [rng.choice(self._splits[split]) for _ in range(n)]

    def _rng(self, what, seed, split):
        return random.Random(f"{self.name} {what} {split} {seed}")


def hash_share(text):
    """-> a number in [0, 1) that depends on the text alone: it decides the prompt's split"""
    digest = hashlib.sha256(text.encode("utf-8", "replace")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64

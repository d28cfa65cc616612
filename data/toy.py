"""What the built-in tasks share: prompts in two disjoint splits, and examples drawn from a seed with the gold reward's labels."""
import hashlib
import math
import random
from functools import cached_property


class Toy:
    """A subclass names its prompts (`all_prompts`), writes answers (`respond`) and judges them (`reward`, `correct`).

    Every draw is a function of (task, split, seed) alone. Labels are drawn from the gold reward r by Bradley–Terry,
    P(a beats b) = σ(r(a) - r(b)), so some are "wrong", as people's are.
    """

    test_share = 0.25
    has_reward = True
    tokenizer = None  # the committed one
    unpaired = False  # of a file: rows with a label
    template = None
    notes = ()

    @cached_property
    def _splits(self):
        splits = {"train": [], "test": [], "skills": [], "rest": []}  # the last two are parts of train, a third and two (rlaif.py)
        for prompt, columns in self.all_prompts():
            share = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:8], "big") / 2**64
            splits["test" if share < self.test_share else "train"].append((prompt, columns))
            if share >= self.test_share:
                splits["skills" if share < (1 + 2 * self.test_share) / 3 else "rest"].append((prompt, columns))
        return splits

    def prompts(self, n, seed, split="train"):
        """-> n of (prompt, columns), None for all: all different while they last. The columns go to `reward` by name."""
        rows, rng = self._splits[split], self._rng("prompts", seed, split)
        n = n or len(rows)
        return [row for _ in range(-(-n // len(rows))) for row in rng.sample(rows, len(rows))][:n]

    def demonstrations(self, n, seed, split="train"):
        """-> n of (prompt, completion)"""
        rng = self._rng("demonstrations", seed, split)
        return [(prompt, self.respond(rng, prompt, columns)) for prompt, columns in self._draw(rng, n, split)]

    def preferences(self, n, seed, split="train", graded=False):
        """-> n of (prompt, chosen, rejected), two different answers to each prompt; `graded` adds a margin of 0 and p = 1"""
        rng, out = self._rng("preferences", seed, split), []
        for prompt, columns in self._draw(rng, n, split):
            a, b = self.compare(rng, prompt, columns)
            p = self.preferred(prompt, a, b, columns)
            out.append((prompt, a, b) if rng.random() < p else (prompt, b, a))
        return [(*row, 0.0, 1.0) for row in out] if graded else out

    def feedback(self, n, seed, split="train"):
        """-> n of (prompt, completion, label), label True with the probability that it beats a fresh demonstration"""
        rng, out = self._rng("feedback", seed, split), []
        for prompt, columns in self._draw(rng, n, split):
            completion, other = rng.choice(self.compare(rng, prompt, columns)), self.respond(rng, prompt, columns)
            out.append((prompt, completion, rng.random() < self.preferred(prompt, completion, other, columns)))
        return out

    def compare(self, rng, prompt, columns):
        """Two different answers, as a person would be shown."""
        a = b = self.respond(rng, prompt, columns)
        while a == b:
            b = self.respond(rng, prompt, columns)
        return a, b

    def correct(self, prompt, completion, ended=True, **columns):
        """Whether the response counts as right, where a method needs to know."""
        return self.reward(prompt, completion, ended, **columns) > 0

    def preferred(self, prompt, a, b, columns):
        """-> the probability that a label says a rather than b"""
        return 1 / (1 + math.exp(self.reward(prompt, b, **columns) - self.reward(prompt, a, **columns)))

    def _draw(self, rng, n, split):
        return [rng.choice(self._splits[split]) for _ in range(n)]

    def _rng(self, what, seed, split):
        return random.Random(f"{self.name} {what} {split} {seed}")

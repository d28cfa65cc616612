"""arithmetic:N: sums of two N-digit numbers, checked by exact match.

The prompt is "47+85=", the completion "132", the reward 1 or 0. In 40 % of the demonstrations one
digit is wrong, as in people's answers. A model that imitates them gives about 60 % right answers;
it can learn the others only from the verifier.
"""

from itertools import product

from data.toy import Toy

WRONG = 0.4


class Arithmetic(Toy):
    bound = 1.0

    def __init__(self, digits):
        self.name = f"arithmetic:{digits}"
        self.digits = digits
        self.max_new_tokens = digits + 4

    def all_prompts(self):
        numbers = range(10 ** (self.digits - 1) if self.digits > 1 else 0, 10**self.digits)
        if self.digits <= 2:
            pairs = product(numbers, repeat=2)
        else:  # too many to list, so a fixed set of 10,000
            rng = self._rng("sums", 0, "all")
            pairs = sorted({(rng.choice(numbers), rng.choice(numbers)) for _ in range(10_000)})
        return [(f"{a}+{b}=", {"answer": str(a + b)}) for a, b in pairs]

    def respond(self, rng, prompt, columns):
        right = columns["answer"]
        return self._miss(rng, right) if rng.random() < WRONG else right

    def compare(self, rng, prompt, columns):
        """The sum, and the sum with one digit wrong; either may come first."""
        right = columns["answer"]
        return rng.sample((right, self._miss(rng, right)), 2)

    def _miss(self, rng, right):
        i = rng.randrange(len(right))
        return right[:i] + rng.choice("0123456789".replace(right[i], "")) + right[i + 1 :]

    def reward(self, prompt, completion, ended=True, answer=None):
        a, b = prompt.rstrip("=").split("+")
        return float(ended and completion.strip() == (answer or str(int(a) + int(b))))

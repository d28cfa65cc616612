"""arithmetic:N: sums of two N-digit numbers, checked by exact match. Prompt "47+85=", completion "132", reward 1 or 0.

Of the demonstrations 40 % have one digit wrong, as people's answers may: who imitates them samples about 60 % right answers,
and what is left to gain is to be had from the verifier.
"""
from data.toy import Toy

WRONG = 0.4


class Arithmetic(Toy):
    bound = 1.0

    def __init__(self, digits):
        self.name, self.digits, self.max_new_tokens = f"arithmetic:{digits}", digits, digits + 4

    def all_prompts(self):
        low, high = 10 ** (self.digits - 1) if self.digits > 1 else 0, 10**self.digits
        if self.digits <= 2:
            pairs = [(a, b) for a in range(low, high) for b in range(low, high)]
        else:  # too many to list: 10,000 fixed ones
            rng = self._rng("sums", 0, "all")
            pairs = sorted({(rng.randrange(low, high), rng.randrange(low, high)) for _ in range(10_000)})
        return [(f"{a}+{b}=", {"answer": str(a + b)}) for a, b in pairs]

    def respond(self, rng, prompt, columns):
        return self._miss(rng, columns["answer"]) if rng.random() < WRONG else columns["answer"]

    def compare(self, rng, prompt, columns):
        """The sum, and the sum with one digit wrong; either may come first."""
        return rng.sample((columns["answer"], self._miss(rng, columns["answer"])), 2)

    def _miss(self, rng, right):
        i = rng.randrange(len(right))
        return right[:i] + rng.choice([d for d in "0123456789" if d != right[i]]) + right[i + 1 :]

    def reward(self, prompt, completion, ended=True, answer=None):
        return float(self.correct(prompt, completion, ended, answer))

    def correct(self, prompt, completion, ended=True, answer=None):
        a, b = prompt.rstrip("=").split("+")
        return ended and completion.strip() == (answer or str(int(a) + int(b)))

"""tokens:P+C: random digits, prompts of P tokens and responses of C with their end token.

Every sequence has the same length, and there is nothing to learn: the task is there to predict
memory, and to compare memory and time. A digit is one token of the committed vocabulary. The reward
is the share of even digits; a response is correct if it is more than half.
"""

from data.error import UserError
from data.toy import Toy

DIGITS = bytes(ord("0") + i % 10 for i in range(256))


class Tokens(Toy):
    bound = 1.0

    def __init__(self, prompt, response):
        self.name = f"tokens:{prompt}+{response}"
        if prompt < 1 or response < 2:
            raise UserError(
                f"--task {self.name}: a prompt has at least one token, a response two, its end "
                "token among them"
            )
        self.prompt = prompt
        self.max_new_tokens = response

    def all_prompts(self):
        rng = self._rng("prompts", 0, "all")
        return [(self._digits(rng, self.prompt), {}) for _ in range(4096)]

    def respond(self, rng, prompt, columns):
        return self._digits(rng, self.max_new_tokens - 1)

    def reward(self, prompt, completion, ended=True):
        return sum(ord(c) % 2 == 0 for c in completion) / max(1, len(completion))

    def correct(self, prompt, completion, ended=True):
        return self.reward(prompt, completion) > 0.5

    def _digits(self, rng, n):
        return rng.randbytes(n).translate(DIGITS).decode()

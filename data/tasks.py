import os

from data.arithmetic import Arithmetic
from data.error import DataError
from data.exact import Exact
from data.jsonl import Jsonl
from data.reviews import Reviews
from data.tokens import Tokens


def task(name, eval_file="", strict=False):
    """-> the task of that name: "reviews", "arithmetic:2" (digits), "exact", "exact:1", "tokens:32+96" (random ones, of
    prompt and response), or the path of a JSONL file, which the other arguments are for.

    demonstrations(n, seed) -> [(prompt, completion)]          preferences(n, seed) -> [(prompt, chosen, rejected)]
    feedback(n, seed) -> [(prompt, completion, label)]         prompts(n, seed) -> [(prompt, columns)]
    reward(prompt, completion, ended, **columns) -> float      correct(…) -> bool
    each of the first four with split="train" | "test", whose prompts are disjoint. All of it is text, never tensors.
    """
    kind, _, digits = name.partition(":")
    if os.path.isfile(name) or name.endswith((".jsonl", ".jsonl.gz")) or "/" in name:
        return Jsonl(name, eval_file, strict)
    if eval_file:
        raise DataError(f"--eval-file goes with a JSONL file as the task; {name} has test prompts of its own")
    if name == "reviews":
        return Reviews()
    if kind == "arithmetic":
        if not digits.isdecimal() or not 1 <= int(digits) <= 9:
            raise DataError(f"--task {name}: give the digits, from arithmetic:1 to arithmetic:9")
        return Arithmetic(int(digits))
    if name in ("exact", "exact:1"):
        return Exact(int(digits or 3))
    if kind == "tokens":
        sizes = digits.split("+")
        if len(sizes) != 2 or not all(n.isdecimal() for n in sizes):
            raise DataError(f"--task {name}: give the tokens of a prompt and of a response, such as tokens:32+96")
        return Tokens(*map(int, sizes))
    raise DataError(f"--task {name}: no such task; there are reviews, arithmetic:N, exact, exact:1, tokens:P+C, and the path of "
                    "a .jsonl or .jsonl.gz file")  # fmt: skip

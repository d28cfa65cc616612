"""Tasks by their names. The file of a task is imported only if the task is used."""

import os

from data.error import UserError

BUILT_IN = ("reviews", "arithmetic", "exact", "tokens", "compare")  # folders of out/ that are taken


def kind(name):
    """-> "file", or what stands before the colon of a task's name"""
    is_file = name.endswith((".jsonl", ".jsonl.gz")) or "/" in name or os.path.isfile(name)
    return "file" if is_file else name.partition(":")[0]


def task(name, eval_file="", strict=False, turns="last"):
    """-> the task of that name: "reviews", "arithmetic:2" (digits), "exact", "exact:1",
    "tokens:32+96" (random prompts and responses of so many tokens), or the path of a JSONL file.
    The other arguments are for a file only.

    demonstrations(n, seed) -> [(prompt, completion)]
    preferences(n, seed)    -> [(prompt, chosen, rejected)]
    graded(n, seed)         -> [(prompt, chosen, rejected, margin, p)]
    feedback(n, seed)       -> [(prompt, completion, label)]
    prompts(n, seed)        -> [(prompt, columns)]
    reward(prompt, completion, ended, **columns) -> float      correct(…) -> bool

    Each of the first five takes split="train" or "test"; the two have no prompt in common. All of
    them give text, never tensors.
    """
    what, _, digits = name.partition(":")
    if kind(name) == "file":
        from data.jsonl import Jsonl

        return Jsonl(name, eval_file, strict, turns)
    if turns != "last":
        raise UserError(f"--turns goes with a JSONL file of messages; {name} has none")
    if eval_file:
        raise UserError(f"--eval-file goes with a JSONL file; {name} has test prompts of its own")
    if name == "reviews":
        from data.reviews import Reviews

        return Reviews()
    if what == "arithmetic":
        if not digits.isdecimal() or not 1 <= int(digits) <= 9:
            raise UserError(f"--task {name}: give the digits, from arithmetic:1 to arithmetic:9")
        from data.arithmetic import Arithmetic

        return Arithmetic(int(digits))
    if name in ("exact", "exact:1"):
        from data.exact import Exact

        return Exact(int(digits or 3))
    if what == "tokens":
        sizes = digits.split("+")
        if len(sizes) != 2 or not all(n.isdecimal() for n in sizes):
            raise UserError(f"--task {name}: give the tokens of prompt and response: tokens:32+96")
        from data.tokens import Tokens

        return Tokens(*map(int, sizes))
    known = "reviews, arithmetic:N, exact, exact:1, tokens:P+C, and the path of a .jsonl file"
    raise UserError(f"--task {name}: no such task; there are {known}")

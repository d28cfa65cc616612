"""A task from a JSONL file (.gz too), in the shapes that TRL documents:

    {"prompt", "completion"}     {"prompt", "chosen", "rejected"}     {"prompt", "completion", "label"}     {"prompt", …}

Each is a string or a message list [{"role", "content"}]; where chosen and rejected share their beginning, "prompt" may be
left out. A single user message stands as its bare content, as a string does; a longer chat is rendered by TEMPLATE.
5 % of the prompts, by a hash, are the test split. A bad line stops the run with file:line; rows that are well formed but
useless (an empty answer, chosen equal to rejected) are dropped and counted in `notes`, or refused where `strict`.
"""
import gzip
import hashlib
import json
import os
import random
import zlib

from data.error import DataError

TEMPLATE = {"system": "System: {}\n\n", "user": "User: {}\n\n", "assistant": "Assistant: {}\n\n", "answer": "Assistant:"}
TEST_SHARE = 0.05


class Jsonl:
    """The same methods as a built-in task; `n` may be None for all rows, in the file's order. `template` may be a checkpoint's own."""

    max_new_tokens = 256
    bound = tokenizer = None

    def __init__(self, path, eval_file="", strict=False):
        self.name, self.strict, self.template, self.notes = path, strict, TEMPLATE, []
        self.lines = {"train": [(path, *line) for line in read(path)]}
        if eval_file:
            self.lines["test"] = [(eval_file, *line) for line in read(eval_file)]
        else:
            self._split(path)
        test = self.lines["test"][0][2]
        self.unpaired = "label" in test and "chosen" not in test
        answers = [row.get("answer") for lines in self.lines.values() for _, _, row in lines]
        self.has_reward = all(isinstance(x, str | int | float) and not isinstance(x, bool) for x in answers)

    def _split(self, path):
        """Moves the test prompts out of train: those whose hash is low, or the lowest if none is."""
        prompts = [self._prompt(*line)[0] for line in self.lines["train"]]
        share = {p: int.from_bytes(hashlib.sha256(p.encode("utf-8", "replace")).digest()[:8], "big") / 2**64 for p in prompts}
        if len(share) < 2:
            raise DataError(f"{path} has one prompt only, and one must be held out: add rows, or name others with --eval-file")
        limit = max(TEST_SHARE, min(share.values()))
        test = {p for p in share if share[p] <= limit}
        if len(test) == len(share):
            test.remove(max(share, key=share.get))
        lines = self.lines["train"]
        self.lines = {"train": [line for line, p in zip(lines, prompts) if p not in test],
                      "test": [line for line, p in zip(lines, prompts) if p in test]}  # fmt: skip

    # ---- the rows as text

    def prompts(self, n, seed, split="train"):
        """-> (prompt, the row's other columns) of each different prompt; a `completion` column is called `reference` there"""
        rows = {}
        for where in self.lines[split]:
            columns = {k: v for k, v in where[2].items() if k not in ("prompt", "completion", "ended")}
            if "completion" in where[2]:
                columns.setdefault("reference", self._answer(*where, "completion").strip())
            rows.setdefault(self._prompt(*where)[0], columns)
        return _some(list(rows.items()), n, seed)

    def demonstrations(self, n, seed, split="train"):
        """-> (prompt, completion); of a preference file the chosen answers, of a feedback file the desirable ones"""
        first = self.lines[split][0][2]
        chosen = "completion" not in first and "chosen" in first
        if chosen:
            self._note("a preference file: its chosen answers are the demonstrations")
        elif isinstance(first.get("label"), bool):
            self._note("a feedback file: its desirable answers are the demonstrations")
        rows = []
        for where in self.lines[split]:
            prompt, row = self._prompt(*where)
            if row.get("label") is False and not chosen:
                continue
            rows.append((prompt, self._answer(*where[:2], row, "chosen" if chosen else "completion")))
        return _some(self._useful(rows, split), n, seed)

    def preferences(self, n, seed, split="train", graded=False):
        """-> (prompt, chosen, rejected); `graded` adds the columns `margin` (0 where there is none) and `p` (1), the probability that
        chosen is better"""
        rows = []
        for where in self.lines[split]:
            prompt, row = self._prompt(*where)
            grades = (_number(*where[:2], row, "margin", 0.0), _number(*where[:2], row, "p", 1.0)) if graded else ()
            rows.append((prompt, *(self._answer(*where[:2], row, key) for key in ("chosen", "rejected")), *grades))
        return _some(self._useful(rows, split), n, seed)

    def feedback(self, n, seed, split="train"):
        """-> (prompt, completion, label); a file of pairs is split into 2n examples"""
        first, rows = self.lines[split][0][2], []
        if "chosen" in first and "rejected" in first:
            pairs = self.preferences(n and max(1, n // 2), seed, split)
            self._note(f"a file of pairs: {len(pairs)} pairs are split into {2 * len(pairs)} examples ({split} split)")
            return [(x, y, label) for x, w, l in pairs for y, label in ((w, True), (l, False))]
        for path, number, row in self.lines[split]:
            if not isinstance(row.get("label"), bool):
                raise DataError(f"{path}:{number}: " + ('"label" must be true or false' if "label" in row else _missing(row, "label")))
            rows.append((self._prompt(path, number, row)[0], self._answer(path, number, row, "completion"), row["label"]))
        return _some(self._useful(rows, split), n, seed)

    def reward(self, prompt, completion, ended=True, answer=None, **columns):
        """1 where the completion is the row's `answer`, else 0; only where every row has one (`has_reward`)."""
        return float(self.correct(prompt, completion, ended, answer))

    def correct(self, prompt, completion, ended=True, answer=None, **columns):
        return ended and completion.strip() == str(answer).strip()

    # ---- one row

    def _prompt(self, path, number, row):
        """-> (the prompt as text, the row with the shared beginning of chosen and rejected taken off)"""
        if "prompt" not in row:
            row = _implicit(path, number, row)
        prompt = row["prompt"]
        if isinstance(prompt, list):
            chat = _messages(path, number, "prompt", prompt)
            bare = len(chat) == 1 and chat[0][0] == "user"
            prompt = chat[0][1] if bare else "".join(self.template[role].format(text) for role, text in chat) + self.template["answer"]
        if not isinstance(prompt, str):
            raise DataError(f'{path}:{number}: "prompt" must be a string or a list of messages, not {_kind(prompt)}')
        if not prompt.strip():
            raise DataError(f"{path}:{number}: the prompt is empty; a model needs at least one token to answer to")
        return prompt, row

    def _answer(self, path, number, row, key):
        if key not in row:
            raise DataError(f"{path}:{number}: {_missing(row, key)}")
        value = row[key]
        if isinstance(value, list):
            chat = _messages(path, number, key, value)
            if len(chat) != 1 or chat[0][0] != "assistant":
                raise DataError(f'{path}:{number}: "{key}" must be one assistant message, not {len(chat)} of {[role for role, _ in chat]}')
            long = isinstance(row["prompt"], list) and (len(row["prompt"]) > 1 or row["prompt"][0]["role"] != "user")
            return " " + chat[0][1] if long and chat[0][1] else chat[0][1]
        if not isinstance(value, str):
            raise DataError(f'{path}:{number}: "{key}" must be a string or a list of messages, not {_kind(value)}')
        return value

    def _useful(self, rows, split):
        empty = [row for row in rows if not all(text.strip() for text in row[:3] if isinstance(text, str))]
        same = [row for row in rows if len(row) > 2 and row[1] == row[2] and row not in empty]
        kept = [row for row in rows if row not in empty and row not in same] if empty or same else rows
        if empty or same:
            words = f"{len(empty)} rows with an empty answer and {len(same)} whose two answers are equal"
            if self.strict:
                raise DataError(f"{self.name}: {words} in the {split} split; mend them, or leave --strict out to drop them")
            self._note(f"dropped {words} ({split} split)")
        if not kept:
            raise DataError(f"{self.name}: no usable row is left in the {split} split")
        return kept

    def _note(self, text):
        if text not in self.notes:
            self.notes.append(text)


def read(path):
    """-> [(line number, row)]; raises DataError with file:line at the first line that is no JSON object."""
    if os.path.isdir(path):
        raise DataError(f"{path} is a directory; give the JSONL file in it")
    rows, number = [], 0
    try:
        with gzip.open(path, "rb") if path.endswith(".gz") else open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    rows.append((number, json.loads(line.decode())))
                    json.dumps(rows[-1][1], ensure_ascii=False).encode()  # half an emoji, "\\ud83d", is JSON but no text
                    if not isinstance(rows[-1][1], dict):
                        raise DataError(f"{path}:{number}: a row must be a JSON object, not {_kind(rows[-1][1])}")
    except UnicodeError:
        raise DataError(f"{path}:{number}: not UTF-8 text; a task file is JSONL, one object a line") from None
    except (ValueError, RecursionError) as e:
        raise DataError(f"{path}:{number}: not JSON ({str(e).splitlines()[0]})") from None
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (OSError, EOFError, zlib.error) as e:
        raise DataError(f"{path}: cannot be read after line {number} ({type(e).__name__}: {e})") from None
    if not rows:
        raise DataError(f"{path} is empty")
    return rows


def texts(path):
    """Every string in the file, message contents too: what a vocabulary is trained on."""
    def strings(value):
        if isinstance(value, str):
            yield value
        elif isinstance(value, (list, dict)):
            for part in [v for k, v in value.items() if k != "role"] if isinstance(value, dict) else value:
                yield from strings(part)

    for _, row in read(path):
        yield from strings(row)


def _messages(path, number, key, value):
    """A message list -> [(role, content)]"""
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise DataError(f'{path}:{number}: "{key}" must be a list of {{"role", "content"}} with string contents')
        if message.get("role") not in ("system", "user", "assistant"):
            raise DataError(f'{path}:{number}: "{key}" has the role {message.get("role")!r}; known are system, user, assistant')
    if not value:
        raise DataError(f'{path}:{number}: "{key}" has no message')
    return [(message["role"], message["content"]) for message in value]


def _implicit(path, number, row):
    """Takes the beginning that chosen and rejected share as the prompt, whole messages or whole words."""
    if "chosen" not in row or "rejected" not in row:
        raise DataError(f"{path}:{number}: {_missing(row, 'prompt')}")
    a, b = row["chosen"], row["rejected"]
    if type(a) is not type(b) or not isinstance(a, (str, list)):
        raise DataError(f'{path}:{number}: "chosen" and "rejected" must both be strings or both lists of messages')
    n = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
    if isinstance(a, str):
        n = max(a.rfind(" ", 0, n), a.rfind("\n", 0, n), 0)
    elif n == min(len(a), len(b)):
        n = max(0, n - 1)  # equal to the last message: the pair is useless, but well formed
    if n == 0:
        raise DataError(f'{path}:{number}: no column "prompt", and chosen and rejected share no beginning to take for it')
    return {**row, "prompt": a[:n], "chosen": a[n:], "rejected": b[n:]}


def _number(path, number, row, key, default):
    x = row.get(key, default)
    if isinstance(x, bool) or not isinstance(x, (int, float)) or not -1e30 < x < 1e30 or key == "p" and not 0 <= x <= 1:
        raise DataError(f'{path}:{number}: "{key}" must be a number{" in [0, 1]" * (key == "p")}, not {json.dumps(x)}')
    return float(x)


def _missing(row, key):
    scripts = {"label": "kto.py", "chosen": "dpo.py, simpo.py or orpo.py", "completion": "sft.py", "prompt": "ppo.py, grpo.py or dapo.py"}
    script = next((script for column, script in scripts.items() if column in row and column != key), "")
    hint = f"; {script} can read such rows" if script and not (key == "rejected" and "chosen" in row) else ""
    return f'no column "{key}" (it has {", ".join(map(str, row)) or "none"}){hint}'


def _kind(value):
    return "null" if value is None else {dict: "an object", list: "a list", bool: "a boolean", str: "a string"}.get(type(value), "a number")


def _some(rows, n, seed):
    return rows if n is None or n >= len(rows) else random.Random(seed).sample(rows, n)

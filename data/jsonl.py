"""A task from a JSONL file (.gz too), in the shapes that TRL documents:

    {"prompt", "completion"}               {"prompt", "chosen", "rejected"}
    {"prompt", "completion", "label"}      {"prompt", …}

Each is a string or a message list [{"role", "content"}]. Where chosen and rejected share their
beginning, "prompt" may be left out. A single user message stands as its bare content, as a string
does; a longer chat is rendered by TEMPLATE. 5 % of the prompts, by a hash, are the test split. A
bad line stops the run with file:line. Rows that are well formed but useless (an empty answer,
chosen equal to rejected) are dropped and counted in `notes`, or refused where `strict`.
"""

import gzip
import json
import os
import random
import zlib

from data.batch import say
from data.error import UserError
from data.toy import Task, hash_share

TEMPLATE = {
    "system": "System: {}\n\n",
    "user": "User: {}\n\n",
    "assistant": "Assistant: {}\n\n",
    "answer": "Assistant:",
}
TEST_SHARE = 0.05
KINDS = {dict: "an object", list: "a list", bool: "a boolean", str: "a string", type(None): "null"}


class Jsonl(Task):
    """The same methods as a built-in task; n may be None for all rows, in the file's order.
    `template` may be a checkpoint's own."""

    kind = "file"
    size = None
    max_new_tokens = 256
    bound = None
    template = TEMPLATE

    def __init__(self, path, eval_file="", strict=False):
        self.name, self.strict = path, strict
        self.notes = []  # what was said about the rows
        self.lines = {"train": read(path)}  # split -> [("path:number", row)]
        if eval_file:
            self.lines["test"] = read(eval_file)
        else:
            self._split(path)
        test = self.lines["test"][0][1]
        self.unpaired = "label" in test and "chosen" not in test
        answers = [row.get("answer") for lines in self.lines.values() for _, row in lines]
        self.has_reward = all(type(answer) in (str, int, float) for answer in answers)

    def _split(self, path):
        """Moves the test prompts out of train: those of a low hash, or of the lowest."""
        lines = self.lines["train"]
        prompts = [self._prompt(*line)[0] for line in lines]
        share = {prompt: hash_share(prompt) for prompt in prompts}
        if len(share) < 2:
            raise UserError(
                f"{path} has one prompt only, and one must be held out: add rows, or name others "
                "with --eval-file"
            )
        limit = max(TEST_SHARE, min(share.values()))
        test = {prompt for prompt in share if share[prompt] <= limit}
        if len(test) == len(share):
            test.remove(max(share, key=share.get))
        self.lines = {"train": [], "test": []}
        for line, prompt in zip(lines, prompts):
            self.lines["test" if prompt in test else "train"].append(line)

    # ---- the rows as text

    def prompts(self, n, seed, split="train"):
        """-> (prompt, the row's other columns) of each different prompt; a `completion` column is
        called `reference` there"""
        rows = {}
        for place, row in self.lines[split]:
            columns = {k: v for k, v in row.items() if k not in ("prompt", "completion", "ended")}
            prompt, row = self._prompt(place, row)
            if "completion" in row:
                columns.setdefault("reference", self._answer(place, row, "completion").strip())
            rows.setdefault(prompt, columns)
        return _some(list(rows.items()), n, seed)

    def demonstrations(self, n, seed, split="train"):
        """-> (prompt, completion); of a preference file the chosen answers, of a feedback file the
        desirable ones"""
        first = self.lines[split][0][1]
        chosen = "completion" not in first and "chosen" in first
        if chosen:
            self._note("a preference file: its chosen answers are the demonstrations")
        elif isinstance(first.get("label"), bool):
            self._note("a feedback file: its desirable answers are the demonstrations")
        rows = []
        for place, row in self.lines[split]:
            prompt, row = self._prompt(place, row)
            if chosen or row.get("label") is not False:
                answer = self._answer(place, row, "chosen" if chosen else "completion")
                rows.append((prompt, answer))
        return _some(self._useful(rows, split), n, seed)

    def preferences(self, n, seed, split="train"):
        """-> (prompt, chosen, rejected)"""
        return self._pairs(n, seed, split)

    def graded(self, n, seed, split="train"):
        """-> (prompt, chosen, rejected, margin, p): margin is 0 where the row has none, and p, the
        probability that chosen is better, is 1"""
        return self._pairs(n, seed, split, margin=0.0, p=1.0)

    def _pairs(self, n, seed, split, **defaults):
        """-> (prompt, chosen, rejected, a number for each of the columns in `defaults`)"""
        rows = []
        for place, row in self.lines[split]:
            prompt, row = self._prompt(place, row)
            numbers = [_number(place, row, *column) for column in defaults.items()]
            answers = [self._answer(place, row, key) for key in ("chosen", "rejected")]
            rows.append((prompt, *answers, *numbers))
        return _some(self._useful(rows, split), n, seed)

    def feedback(self, n, seed, split="train"):
        """-> (prompt, completion, label); a file of pairs is split into 2n examples"""
        first = self.lines[split][0][1]
        if "chosen" in first and "rejected" in first:
            pairs = self.preferences(n and max(1, n // 2), seed, split)
            count = f"{len(pairs)} pairs are split into {2 * len(pairs)} examples"
            self._note(f"a file of pairs: {count} ({split} split)")
            return [(x, y, label) for x, w, l in pairs for y, label in ((w, True), (l, False))]
        rows = []
        for place, row in self.lines[split]:
            if "label" not in row:
                raise UserError(f"{place}: {_missing(row, 'label')}")
            if not isinstance(row["label"], bool):
                raise UserError(f'{place}: "label" must be true or false')
            prompt, row = self._prompt(place, row)
            rows.append((prompt, self._answer(place, row, "completion"), row["label"]))
        return _some(self._useful(rows, split), n, seed)

    def reward(self, prompt, completion, ended=True, answer=None, **columns):
        """1 where the completion is the row's `answer`, else 0. Only where every row has one
        (`has_reward`)."""
        return float(ended and completion.strip() == str(answer).strip())

    # ---- one row

    def _prompt(self, place, row):
        """-> (the prompt as text, the row without the shared beginning of chosen and rejected)"""
        if "prompt" not in row:
            row = _implicit(place, row)
        prompt = row["prompt"]
        if isinstance(prompt, list):
            chat = _messages(place, "prompt", prompt)
            prompt = chat[0][1]
            if _is_dialogue(row):
                turns = [self.template[role].format(text) for role, text in chat]
                prompt = "".join(turns) + self.template["answer"]
        if not _text(place, "prompt", prompt).strip():
            raise UserError(
                f"{place}: the prompt is empty; a model needs at least one token to answer to"
            )
        return prompt, row

    def _answer(self, place, row, key):
        """-> the text of a column of a row that _prompt has read"""
        if key not in row:
            raise UserError(f"{place}: {_missing(row, key)}")
        if not isinstance(row[key], list):
            return _text(place, key, row[key])
        chat = _messages(place, key, row[key])
        roles = [role for role, _ in chat]
        if roles != ["assistant"]:
            raise UserError(
                f'{place}: "{key}" must be one assistant message, not {len(chat)} of {roles}'
            )
        text = chat[0][1]
        return " " + text if text and _is_dialogue(row) else text

    def _useful(self, rows, split):
        full = [row for row in rows if all(x.strip() for x in row[:3] if isinstance(x, str))]
        kept = [row for row in full if len(row) < 3 or row[1] != row[2]]
        if len(kept) < len(rows):
            empty = f"{len(rows) - len(full)} rows with an empty answer"
            words = f"{empty} and {len(full) - len(kept)} whose two answers are equal"
            if self.strict:
                remedy = "mend them, or leave --strict out to drop them"
                raise UserError(f"{self.name}: {words} in the {split} split; {remedy}")
            self._note(f"dropped {words} ({split} split)")
        if not kept:
            raise UserError(f"{self.name}: no usable row is left in the {split} split")
        return kept

    def _note(self, text):
        if text not in self.notes:
            self.notes.append(text)
            say(text)


def read(path):
    """-> [("path:number", row)]; raises UserError with file:line at the first line that is no JSON
    object"""
    if os.path.isdir(path):
        raise UserError(f"{path} is a directory; give the JSONL file in it")
    rows = []
    number = 0
    try:
        with gzip.open(path, "rb") if path.endswith(".gz") else open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    rows.append(_parse(f"{path}:{number}", line))
    except UnicodeError:
        remedy = "a task file is JSONL, one object a line"
        raise UserError(f"{path}:{number}: not UTF-8 text; {remedy}") from None
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path}:{number}: not JSON ({str(e).splitlines()[0]})") from None
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, EOFError, zlib.error) as e:
        why = f"{type(e).__name__}: {e}"
        raise UserError(f"{path}: cannot be read after line {number} ({why})") from None
    if not rows:
        raise UserError(f"{path} is empty")
    return rows


def _parse(place, line):
    row = json.loads(line.decode())
    json.dumps(row, ensure_ascii=False).encode()  # half an emoji, "\ud83d", is JSON but no text
    if not isinstance(row, dict):
        raise UserError(f"{place}: a row must be a JSON object, not {_kind(row)}")
    return place, row


def texts(path):
    """Every string in the file, message contents too: what a vocabulary is trained on."""
    for _, row in read(path):
        yield from _strings(row)


def _strings(value):
    if isinstance(value, dict):
        value = [part for key, part in value.items() if key != "role"]
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for part in value:
            yield from _strings(part)


def _text(place, key, value):
    if not isinstance(value, str):
        kinds = "a string or a list of messages"
        raise UserError(f'{place}: "{key}" must be {kinds}, not {_kind(value)}')
    return value


def _messages(place, key, value):
    """A message list -> [(role, content)]"""
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            shape = 'a list of {"role", "content"} with string contents'
            raise UserError(f'{place}: "{key}" must be {shape}')
        if message.get("role") not in ("system", "user", "assistant"):
            raise UserError(
                f'{place}: "{key}" has the role {message.get("role")!r}; '
                "known are system, user, assistant"
            )
    if not value:
        raise UserError(f'{place}: "{key}" has no message')
    return [(message["role"], message["content"]) for message in value]


def _is_dialogue(row):
    """Whether the prompt is a chat that the template renders: not a single message of a user's"""
    prompt = row["prompt"]
    return isinstance(prompt, list) and [message["role"] for message in prompt] != ["user"]


def _implicit(place, row):
    """Takes the beginning that chosen and rejected share as the prompt, whole messages or whole
    words."""
    if "chosen" not in row or "rejected" not in row:
        raise UserError(f"{place}: {_missing(row, 'prompt')}")
    a, b = row["chosen"], row["rejected"]
    if type(a) is not type(b) or not isinstance(a, str | list):
        both = '"chosen" and "rejected" must both be'
        raise UserError(f"{place}: {both} strings or both lists of messages")
    n = [*(x == y for x, y in zip(a, b)), False].index(False)
    if isinstance(a, str):
        n = max(a.rfind(" ", 0, n), a.rfind("\n", 0, n), 0)
    elif n == min(len(a), len(b)):
        n = max(0, n - 1)  # equal to the last message: the pair is useless, but well formed
    if n == 0:
        raise UserError(
            f'{place}: no column "prompt", and chosen and rejected share no beginning to take '
            "for it"
        )
    return {**row, "prompt": a[:n], "chosen": a[n:], "rejected": b[n:]}


def _number(place, row, key, default):
    x = row.get(key, default)
    known = type(x) in (int, float) and -1e30 < x < 1e30
    if not known or key == "p" and not 0 <= x <= 1:
        bounds = " in [0, 1]" if key == "p" else ""
        raise UserError(f'{place}: "{key}" must be a number{bounds}, not {json.dumps(x)}')
    return float(x)


def _missing(row, key):
    scripts = {
        "label": "kto.py",
        "chosen": "dpo.py, simpo.py or orpo.py",
        "completion": "sft.py",
        "prompt": "ppo.py, grpo.py or dapo.py",
    }
    able = [script for column, script in scripts.items() if column in row and column != key]
    half = key == "rejected" and "chosen" in row  # of a pair: no script reads that
    hint = f"; {able[0]} can read such rows" if able and not half else ""
    return f'no column "{key}" (it has {", ".join(row) or "none"}){hint}'


def _kind(value):
    return KINDS.get(type(value), "a number")


def _some(rows, n, seed):
    return rows if n is None or n >= len(rows) else random.Random(seed).sample(rows, n)

"""A task from a JSONL file (.gz too), in the shapes that TRL documents:

    {"prompt", "completion"}               {"prompt", "chosen", "rejected"}
    {"prompt", "completion", "label"}      {"prompt", …}               {"messages"}

Each is a string or a message list [{"role", "content"}]. Where chosen and rejected share their
beginning, "prompt" may be left out, or stand in both of them once more. Of "messages" the last is
the completion and the rest the prompt. A single user message stands as its bare content, as a
string does; a longer chat is rendered by TEMPLATE, or by the checkpoint's own template. 5 % of the
prompts, by a hash, are the test split. A bad line stops the run with file:line. Rows that are well
formed but useless (an empty answer, chosen equal to rejected) are dropped and counted, or refused
if `strict`.
"""

import codecs
import gzip
import json
import math
import os
import random
import zlib
from collections import Counter
from decimal import Decimal
from functools import partial

from data.batch import Drawn
from data.chat import TEMPLATE, Chat
from data.error import UserError, say
from data.toy import Task, hash_share

TEST_SHARE = 0.05
KINDS = {dict: "an object", list: "a list", bool: "a boolean", str: "a string", type(None): "null"}
TURN = "\n\nAssistant:"  # where an answer begins in a transcript, as in HH
WHY = ("empty", "equal", "equal once cut", "undesirable", "not drawn")  # rows are dropped
REMEDIES = {  # columns of other shapes, and what to do about them
    "text": 'split each text into "prompt" and "completion"',
    "conversations": 'write them as "messages", a list of {"role", "content"}',
    "conversation": 'write it as "messages", a list of {"role", "content"}',
    "instruction": 'rename it to "prompt", and the answer to "completion"',
    "question": 'rename it to "prompt"',
    "input": 'rename it to "prompt"',
}


class Jsonl(Task):
    """The same methods as a built-in task; n may be None for all rows, in the file's order.
    `template` may be a checkpoint's own."""

    kind = "file"
    size = None
    max_new_tokens = 256
    bound = None
    template = TEMPLATE

    def __init__(self, path, eval_file="", strict=False):
        self.name, self.eval_file, self.strict = path, eval_file, strict
        self.notes = []  # what was said about the rows
        self.lines = {"train": read(path)}  # split -> [("path:number", row)]
        if eval_file:
            self.lines["test"] = read(eval_file)
            self._note_shared()
        else:
            self._split(path)
        test = self.lines["test"][0][1]
        self.unpaired = "label" in test and "chosen" not in test
        self.has_reward = not self.lacks("answer", str, int, float)

    def _note_shared(self):
        train, test = ({self._prompt(*x)[0] for x in self.lines[k]} for k in ("train", "test"))
        if shared := len(train & test):
            what = f"warning: {shared} of the {len(test)} prompts of {self.eval_file}"
            self._note(f"{what} are prompts of {self.name} too: they are trained on")

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

    def columns(self):
        rows = self.prompts(None, 0) + self.prompts(None, 0, split="test")
        return list({name: 0 for _, columns in rows for name in columns})

    def lacks(self, column, *types):
        """-> the place of the first row, of any split, that has no such column, or one of another
        type; "" if every row has it"""
        for lines in self.lines.values():
            for place, row in lines:
                name = "completion" if column == "reference" and column not in row else column
                if name not in row or types and type(row[name]) not in types:
                    return place
        return ""

    # ---- the rows as text

    def prompts(self, n, seed, split="train"):
        """-> (prompt, the row's other columns) of each row; a `completion` column is called
        `reference` there"""
        rows = []
        for place, row in self.lines[split]:
            columns = {k: v for k, v in row.items() if k not in ("prompt", "completion", "ended")}
            prompt, row = self._prompt(place, row)
            if "completion" in row:
                columns.setdefault("reference", self._answer(place, row, "completion").strip())
            rows.append((prompt, columns))
        return self._drawn(rows, n, seed, split, self.prompts)

    def demonstrations(self, n, seed, split="train"):
        """-> (prompt, completion); of a preference file the chosen answers, of a feedback file the
        desirable ones"""
        place, first = self.lines[split][0]
        chosen = "completion" not in first and "chosen" in first
        labels = "label" in first and not chosen
        if chosen:
            self._note("a preference file: its chosen answers are the demonstrations")
        elif labels:
            self._note("a feedback file: its desirable answers are the demonstrations")
        rows, lost = [], Counter()
        for where, row in self.lines[split]:
            prompt, row = self._prompt(where, row)
            answer = self._answer(where, row, "chosen" if chosen else "completion")
            if not chosen and ("label" in row) != labels:
                a, b = (where, place) if labels else (place, where)
                raise UserError(f'{a}: no column "label", which {b} has; label all rows, or none')
            if labels and not row["label"]:
                lost["undesirable"] += 1
            else:
                rows.append((prompt, answer))
        return self._useful(rows, n, seed, split, self.demonstrations, lost)

    def preferences(self, n, seed, split="train"):
        """-> (prompt, chosen, rejected)"""
        return self._useful(self._pairs(split), n, seed, split, self.preferences)

    def graded(self, n, seed, split="train"):
        """-> (prompt, chosen, rejected, margin, p): margin is 0 if the row has none, and p, the
        probability that chosen is better, is 1"""
        pairs = self._pairs(split, margin=0.0, p=1.0)
        return self._useful(pairs, n, seed, split, self.graded)

    def _pairs(self, split, **defaults):
        """-> (prompt, chosen, rejected, a number for each of the columns in `defaults`)"""
        rows = []
        for place, row in self.lines[split]:
            prompt, row = self._prompt(place, row)
            numbers = [_number(place, row, *column) for column in defaults.items()]
            answers = [self._answer(place, row, key) for key in ("chosen", "rejected")]
            rows.append((prompt, *answers, *numbers))
        return rows

    def feedback(self, n, seed, split="train"):
        """-> (prompt, completion, label); a file of pairs is split into 2n examples"""
        first = self.lines[split][0][1]
        if "chosen" in first and "rejected" in first:
            half = n and max(1, n // 2)
            pairs = self._useful(self._pairs(split), half, seed, split, self.feedback)
            count = f"{len(pairs)} pairs are split into {2 * len(pairs)} examples"
            self._note(f"a file of pairs: {count} ({split} split)")
            pairs[:] = [(x, y, label) for x, w, l in pairs for y, label in ((w, True), (l, False))]
            return pairs
        rows = []
        for place, row in self.lines[split]:
            if "label" not in row:
                raise UserError(f"{place}: {_missing(row, 'label')}")
            prompt, row = self._prompt(place, row)
            rows.append((prompt, self._answer(place, row, "completion"), row["label"]))
        return self._useful(rows, n, seed, split, self.feedback)

    def reward(self, prompt, completion, ended=True, answer=None, **columns):
        """1 if the completion is the row's `answer`, else 0. Only if every row has one
        (`has_reward`). Spaces around it do not count. An answer that is a number is compared as a
        number: 5, 5.0 and 5e0 are one answer, however the file or the completion spells it."""
        text = completion.strip()
        if isinstance(answer, str):
            return float(ended and text == answer.strip())
        try:
            number = float(text) if isinstance(answer, float) else Decimal(text)
            return float(ended and number == answer)
        except (ValueError, ArithmeticError):
            return 0.0

    # ---- one row

    def _prompt(self, place, row):
        """-> (the prompt as text, the row with answers that do not repeat it)"""
        row = _without_prompt(place, row)
        prompt = row["prompt"]
        if isinstance(prompt, list):
            chat = _messages(place, "prompt", prompt)
            prompt = chat[0][1]
            if _is_dialogue(row):
                turns = [self.template[role].format(text) for role, text in chat]
                prompt = "".join(turns) + self.template["answer"]
            if _goes_on(row):
                text = chat[-1][1]
                opened = self.template["assistant"].partition("{}")[0]
                prompt = "".join(turns[:-1]) + opened + text
            prompt = Chat(prompt, chat)
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
                f'{place}: "{key}" must be one assistant message, or the prompt\'s messages and '
                f"then one, not {len(chat)} of {_short(', '.join(roles))}"
            )
        text = chat[0][1]
        joined = text and _is_dialogue(row) and not _goes_on(row)
        return self.template.get("before", " ") + text if joined else text

    # ---- which rows are read

    def _useful(self, rows, n, seed, split, draw, lost=()):
        """-> the rows without those that teach nothing, n of them if n is not None. draw: the
        method that read them, lost: how many it left out, by the reason"""
        lost = Counter(lost)
        kept = []
        for row in rows:
            if not all(x.strip() for x in row[:3] if isinstance(x, str)):
                lost["empty"] += 1
            elif len(row) > 2 and row[1] == row[2]:
                lost["equal"] += 1
            else:
                kept.append(row)
        if self.strict and (lost["empty"] or lost["equal"]):
            empty = f"{lost['empty']} rows with an empty answer"
            words = f"{empty} and {lost['equal']} whose two answers are equal"
            remedy = "mend them, or leave --strict out to drop them"
            raise UserError(f"{self.name}: {words} in the {split} split; {remedy}")
        if not kept:
            raise UserError(f"{self.name}: no usable row is left in the {split} split")
        return self._drawn(kept, n, seed, split, draw, lost)

    def _drawn(self, rows, n, seed, split, draw, lost=()):
        """-> n of the rows, all if n is None, which can tell what became of the others"""
        lost = Counter(lost)
        if n is not None and n < len(rows):
            lost["not drawn"] = len(rows) - n
            rows = random.Random(seed).sample(rows, n)
        account = partial(self._account, draw, lost, len(rows)) if split == "train" else None
        return Drawn(rows, account, lost)

    def _account(self, draw, lost, used, cut, equal):
        """What became of each row of the file: used rows were read to train on, of which `cut` were
        cut, `equal` of them so far that their answers became equal"""
        held_out = draw(None, 0, split="test")
        held = len(self.lines["test"]) - sum(held_out.lost.values())
        lost["equal once cut"] = equal
        train = f"{used - equal:,} train" + (f" ({cut - equal:,} of them cut)" if cut else "")
        held_words = f"{held:,} held out ({len({row[0] for row in held_out}):,} prompts)"
        files = [(self.name, "train", [train], lost)]
        if self.eval_file:
            files.append((self.eval_file, "test", [held_words], held_out.lost))
        else:
            files = [(self.name, "", [train, held_words], lost + held_out.lost)]
        lines = []
        for name, split, words, dropped in files:
            total = sum(len(rows) for key, rows in self.lines.items() if split in ("", key))
            if n := sum(dropped.values()):
                why = ", ".join(
                    f"{dropped[reason]:,} {reason}" for reason in WHY if dropped[reason]
                )
                words.append(f"{n:,} dropped ({why})")
            lines.append(f"{name}: {total:,} rows: {', '.join(words)}")
        if used - equal < held or 1 in (used - equal, held):
            few = f"{used - equal:,} to train on, {held:,} held out"
            lines.append(f"warning: {few}; add rows, or name others with --eval-file")
        return "\n".join(lines)

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
                line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
                if line.strip():
                    rows.append(_parse(f"{path}:{number}", line))
    except UnicodeError:
        remedy = "a task file is JSONL, one object per line"
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
    row = json.loads(line.decode(), parse_constant=_refuse, parse_float=_finite)
    json.dumps(row, ensure_ascii=False).encode()  # half an emoji, "\ud83d", is JSON but no text
    if not isinstance(row, dict):
        raise UserError(f"{place}: a row must be a JSON object, not {_kind(row)}")
    if "messages" in row and "prompt" not in row:
        row = _last_turn(place, row)
    if "label" in row and "completion" in row:  # elsewhere a column of the user's own
        x = row["label"]
        if type(x) not in (bool, int, float) or x not in (0, 1):
            raise UserError(f'{place}: "label" must be true or false, not {_short(json.dumps(x))}')
        row["label"] = bool(x)
    return place, row


def _refuse(name):
    raise ValueError(f"{name} is no number of JSON")


def _finite(text):
    x = float(text)
    return x if math.isfinite(x) else _refuse(text)


def _last_turn(place, row):
    """{"messages"} -> {"prompt", "completion"}: the last turn, if it is the assistant's"""
    chat = row.pop("messages")
    if not isinstance(chat, list):
        raise UserError(f'{place}: "messages" must be a list of messages, not {_kind(chat)}')
    roles = [role for role, _ in _messages(place, "messages", chat)]
    if roles[-1] != "assistant":
        return row | {"prompt": chat}
    if len(roles) == 1:
        raise UserError(f'{place}: "messages" begins with the answer; a prompt must come first')
    return row | {"prompt": chat[:-1], "completion": chat[-1:]}


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
                f'{place}: "{key}" has the role {_short(repr(message.get("role")))}; '
                "known are system, user, assistant"
            )
    if not value:
        raise UserError(f'{place}: "{key}" has no message')
    return [(message["role"], message["content"]) for message in value]


def _is_dialogue(row):
    """Whether the prompt is a chat that the template renders: not a single message of a user's"""
    prompt = row["prompt"]
    return isinstance(prompt, list) and [message["role"] for message in prompt] != ["user"]


def _goes_on(row):
    """Whether the prompt ends in a turn of the assistant's, which the answer goes on with"""
    return isinstance(row["prompt"], list) and row["prompt"][-1]["role"] == "assistant"


def _without_prompt(place, row):
    """-> the row with a prompt, and with answers that do not repeat it: chosen and rejected may be
    whole chats, beside a prompt (UltraFeedback) or without one (HH)"""
    if "prompt" not in row:
        row = _implicit(place, row)
    answers = {key: row[key] for key in ("completion", "chosen", "rejected") if key in row}
    whole = {key: x for key, x in answers.items() if isinstance(x, list) and len(x) > 1}
    if not whole:
        return row
    chats = {key: _messages(place, key, x) for key, x in whole.items()}
    heads = [chat[:-1] for chat in chats.values()]
    prompt, head = row["prompt"], heads[0]
    if isinstance(prompt, list):
        begins = head[: len(prompt)] == _messages(place, "prompt", prompt)
    else:
        begins = ("user", prompt) in head
    if not begins or len(whole) < len(answers) or any(x != head for x in heads):
        keys = " and ".join(f'"{key}"' for key in answers)
        raise UserError(f"{place}: {keys} must be one message, or the whole chat with its prompt")
    begin = next(iter(whole.values()))[:-1]
    return {**row, "prompt": begin, **{key: x[-1:] for key, x in whole.items()}}


def _implicit(place, row):
    """Takes the beginning that chosen and rejected share as the prompt: whole messages, all up to
    the last "Assistant:" of a transcript, or whole words."""
    if "chosen" not in row or "rejected" not in row:
        raise UserError(f"{place}: {_missing(row, 'prompt')}")
    a, b = row["chosen"], row["rejected"]
    if type(a) is not type(b) or not isinstance(a, str | list):
        both = '"chosen" and "rejected" must both be'
        raise UserError(f"{place}: {both} strings or both lists of messages")
    n = [*(x == y for x, y in zip(a, b)), False].index(False)
    if isinstance(a, str):
        turn = a.rfind(TURN, 0, n)
        n = turn + len(TURN) if turn >= 0 else max(a.rfind(" ", 0, n), a.rfind("\n", 0, n), 0)
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
        raise UserError(f'{place}: "{key}" must be a number{bounds}, not {_short(json.dumps(x))}')
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
    if not able:
        hint = next((f"; {REMEDIES[name]}" for name in row if name in REMEDIES), "")
    return f'no column "{key}" (it has {_short(", ".join(row)) or "none"}){hint}'


def _kind(value):
    return KINDS.get(type(value), "a number")


def _short(text):
    return text if len(text) < 80 else text[:80] + " …"

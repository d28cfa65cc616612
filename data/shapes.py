"""Reads the rows of a JSONL file, refuses a bad one with file:line, and converts each to one shape:
a prompt, and answers that do not repeat it."""

import codecs
import gzip
import json
import math
import os
import zlib
from functools import partial

from data.chat import Chat
from data.error import UserError, refuse_pointer
from data.messages import (
    ANSWERS,
    COLUMNS,
    Turns,
    column_of,
    join_parts,
    kind_of,
    messages_of,
    shorten,
)

TURN = "\n\nAssistant:"  # where an answer begins in a transcript, as in HH
FRAME = ".to_json({out!r}, orient='records', lines=True)"
PARQUET = "a Parquet file; write it as JSONL: pandas.read_parquet({path!r})" + FRAME
OTHERS = {  # the beginning of a file of another kind, or the end of its name -> how to convert it
    "PAR1": PARQUET,
    ".parquet": PARQUET,
    ".csv": "a CSV file; write it as JSONL: pandas.read_csv({path!r}, dtype=str)" + FRAME,
    ".tsv": "a TSV file; write it as JSONL: pandas.read_table({path!r}, dtype=str)" + FRAME,
    "[": "a JSON array; write one object per line: jq -c '.[]' {path} > {out}",
    "{": "JSON, but not one object per line; write it so: jq -c . {path} > {out}",
    "\x1f\x8b": "compressed; give it a name that ends with .jsonl.gz",
}
REMEDIES = {  # columns of other shapes, and what to do about them
    "text": 'split each text into "prompt" and "completion"',
    "conversations": 'write them as "messages", a list of {"role", "content"}',
    "conversation": 'write it as "messages", a list of {"role", "content"}',
    "instruction": 'rename it to "prompt", and the answer to "completion"',
    "question": 'rename it to "prompt"',
    "input": 'rename it to "prompt"',
}


def read(path):
    """-> [("path:number", row)]; raises UserError with file:line at the first line that is no JSON
    object"""
    if os.path.isdir(path):
        raise UserError(f"{path} is a directory; give the JSONL file in it")
    refuse_pointer(path)
    rows = []
    number = 0
    try:
        with gzip.open(path, "rb") if path.endswith(".gz") else open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
                if line.strip():
                    if not rows:
                        _refuse_other(path, line)
                    rows.append(_parse(f"{path}:{number}", line))
    except UnicodeError:
        remedy = "a task file is JSONL, one object per line"
        raise UserError(f"{path}:{number}: not UTF-8 text; {remedy}") from None
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path}:{number}: not JSON ({str(e).splitlines()[0]})") from None
    except FileNotFoundError:
        from data.near import missing

        raise UserError(missing(path)) from None
    except (OSError, EOFError, zlib.error) as e:
        why = f"{type(e).__name__}: {e}"
        raise UserError(f"{path}: cannot be read after line {number} ({why})") from None
    if not rows:
        raise UserError(f"{path} is empty")
    return rows


def _refuse_other(path, line):
    """Refuses a file whose first line shows that it is no JSONL, but of another kind."""
    begin = line.strip().decode("latin-1")
    if begin.startswith("{") and begin != "{":
        return
    stem = path.removesuffix(".gz")
    for sign, words in OTHERS.items():
        if begin.startswith(sign) or stem.lower().endswith(sign):
            out = f"{os.path.splitext(stem)[0]}.new.jsonl"
            raise UserError(f"{path} is {words.format(path=path, out=out)}")


def _parse(place, line):
    once = partial(_once, place)
    row = json.loads(
        line.decode(), parse_constant=_refuse, parse_float=_finite, object_pairs_hook=once
    )
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        why = "half a character, such as \\ud83d, is not text"
        raise UserError(f"{place}: {why}; write the whole character") from None
    if not isinstance(row, dict):
        raise UserError(f"{place}: a row must be a JSON object, not {kind_of(row)}")
    for key in ("messages", "prompt", *ANSWERS):
        for message in row[key] if isinstance(row.get(key), list) else ():
            join_parts(place, key, message)
    if "messages" in row and "prompt" not in row:
        row = _last_turn(place, row)
    if "label" in row and "completion" in row:  # in other rows it is the user's own column
        x = row["label"]
        if type(x) not in (bool, int, float) or x not in (0, 1):
            raise UserError(f'{place}: "label" must be true or false, not {shorten(json.dumps(x))}')
        row["label"] = bool(x)
    return place, row


def _once(place, pairs):
    """The pairs of a JSON object -> dict; a key that occurs twice would lose its first value."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        words = f'the key "{shorten(twice)}" occurs twice in one object'
        raise UserError(f"{place}: {words}; rename one of them, or remove it")
    return found


def _refuse(name):
    raise ValueError(f"{shorten(name)} is not a finite number")


def _finite(text):
    x = float(text)
    return x if math.isfinite(x) else _refuse(text)


def _last_turn(place, row):
    """{"messages"} -> {"prompt", "completion"}: the last turn, if it is the assistant's"""
    chat = row.pop("messages")
    if not isinstance(chat, list):
        raise UserError(f'{place}: "messages" must be a list of messages, not {kind_of(chat)}')
    roles = [message.role for message in messages_of(place, "messages", chat)]
    if "completion" in row:
        both = '"messages" and "completion" both hold an answer'
        raise UserError(f"{place}: {both}; leave one of them out")
    if roles[-1] != "assistant":
        return row | {"prompt": chat}
    if len(roles) == 1:
        raise UserError(f'{place}: "messages" begins with the answer; a prompt must come first')
    return row | {"prompt": Turns(chat[:-1]), "completion": chat[-1:]}


def texts(path):
    """Yields every string in the file, message contents too, to train a vocabulary on."""
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


def prompt_of(place, row, template):
    """-> (the prompt as text, the row with answers that do not repeat it)"""
    row = _split_prompt(place, row)
    prompt, chat = row["prompt"], ()
    conversation = getattr(prompt, "conversation", ())
    if isinstance(prompt, list):
        chat = messages_of(place, "prompt", prompt)
        prompt = chat[0].text
        if _is_dialogue(row):
            turns = [template[message.role].format(message.text) for message in chat]
            prompt = "".join(turns) + template["answer"]
        if _goes_on(row):
            opened = template["assistant"].partition("{}")[0]
            prompt = "".join(turns[:-1]) + opened + chat[-1].text
    if not _text(place, "prompt", prompt).strip():
        raise UserError(
            f"{place}: the prompt is empty; a model needs at least one token to answer to"
        )
    prompt = Chat(prompt, chat, place)
    if columns := {name: column_of(place, name, row[name]) for name in COLUMNS if row.get(name)}:
        prompt.columns = json.dumps(columns, ensure_ascii=False)
    if conversation:
        prompt.conversation = tuple(messages_of(place, "messages", conversation))
    return prompt, row


def answer_of(place, row, key, template):
    """-> the text of a column of a row that `prompt_of` has returned"""
    if key not in row:
        raise UserError(f"{place}: {missing(row, key)}")
    if not isinstance(row[key], list):
        return _text(place, key, row[key])
    chat = messages_of(place, key, row[key])
    roles = [message.role for message in chat]
    if roles != ["assistant"]:
        raise UserError(
            f'{place}: "{key}" must be one assistant message, or the prompt\'s messages and '
            f"then one, not {len(chat)} of {shorten(', '.join(roles))}"
        )
    text = chat[0].text
    joined = text and _is_dialogue(row) and not _goes_on(row)
    text = template.get("before", " ") + text if joined else text
    return Chat(text, chat) if chat[0].more else text


def _text(place, key, value):
    if not isinstance(value, str):
        kinds = "a string or a list of messages"
        raise UserError(f'{place}: "{key}" must be {kinds}, not {kind_of(value)}')
    return value


def _is_dialogue(row):
    """Whether the template renders the prompt: a chat, but not a single message of the user"""
    prompt = row["prompt"]
    return isinstance(prompt, list) and [message["role"] for message in prompt] != ["user"]


def _goes_on(row):
    """Whether the prompt ends with a turn of the assistant, which the answer continues"""
    return isinstance(row["prompt"], list) and row["prompt"][-1]["role"] == "assistant"


def _split_prompt(place, row):
    """-> the row with a prompt, and with answers that do not repeat it: chosen and rejected may be
    whole chats, beside a prompt (UltraFeedback) or without one (HH)"""
    if "prompt" not in row:
        row = _implicit(place, row)
    answers = {key: row[key] for key in ANSWERS if key in row}
    with_prompt = {key: x for key, x in answers.items() if isinstance(x, list) and len(x) > 1}
    if not with_prompt:
        return row
    chats = {key: messages_of(place, key, x) for key, x in with_prompt.items()}
    heads = [chat[:-1] for chat in chats.values()]
    prompt, head = row["prompt"], heads[0]
    if isinstance(prompt, list):
        begins = head[: len(prompt)] == messages_of(place, "prompt", prompt)
    else:
        begins = ("user", prompt) in [message[:2] for message in head]
    if not begins or len(with_prompt) < len(answers) or any(x != head for x in heads):
        keys = " and ".join(f'"{key}"' for key in answers)
        raise UserError(f"{place}: {keys} must be one message, or the whole chat with its prompt")
    begin = next(iter(with_prompt.values()))[:-1]
    return {**row, "prompt": begin, **{key: x[-1:] for key, x in with_prompt.items()}}


def _implicit(place, row):
    """Takes the beginning that chosen and rejected share as the prompt: whole messages, all up to
    the last "Assistant:" of a transcript, or whole words."""
    if "chosen" not in row or "rejected" not in row:
        raise UserError(f"{place}: {missing(row, 'prompt')}")
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


def number_of(place, row, key, default):
    """-> a column's number; `default` if the row has none"""
    x = row.get(key, default)
    known = type(x) in (int, float) and -1e30 < x < 1e30
    if not known or key == "p" and not 0 <= x <= 1:
        bounds = " in [0, 1]" if key == "p" else ""
        raise UserError(f'{place}: "{key}" must be a number{bounds}, not {shorten(json.dumps(x))}')
    return float(x)


READERS = [  # the columns that a script needs; those that say most come first
    ({"prompt", "completion", "label"}, "kto.py"),
    ({"chosen", "rejected"}, "dpo.py, simpo.py or orpo.py"),
    ({"prompt", "completion"}, "sft.py"),
    ({"prompt", "chosen"}, "sft.py"),
    ({"prompt"}, "ppo.py, grpo.py or dapo.py"),
]


def missing(row, key):
    able = [x for columns, x in READERS if columns <= row.keys() and key not in columns]
    half = key == "rejected" and "chosen" in row  # of a pair: no script reads that
    hint = f"; {able[0]} can read such rows" if able and not half else ""
    if not able:
        hint = next((f"; {REMEDIES[name]}" for name in row if name in REMEDIES), "")
    return f'no column "{key}" (it has {shorten(", ".join(row)) or "none"}){hint}'

"""The messages of a row, [{"role", "content", …}], and the other columns that a template reads."""

import contextlib
import json

from data.chat import Message
from data.error import UserError

KINDS = {dict: "an object", list: "a list", bool: "a boolean", str: "a string", type(None): "null"}
ANSWERS = ("completion", "chosen", "rejected")
ROLES = ("system", "user", "assistant", "tool")
COLUMNS = ("tools", "documents", "chat_template_kwargs")  # that a chat template reads


def messages_of(place, key, value):
    """A message list -> [Message]. A message that calls tools needs no content."""
    out = []
    for message in value:
        calls = isinstance(message, dict) and message.get("tool_calls")
        if calls and message.get("content") is None:
            message = message | {"content": ""}
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            shape = 'a list of {"role", "content"} with string contents'
            raise UserError(f'{place}: "{key}" must be {shape}')
        more = more_of(message)
        role = message.get("role")
        if role not in ROLES:
            what = f'"{key}" has the role {shorten(repr(role))}'
            raise UserError(f"{place}: {what}; known are {', '.join(ROLES)}")
        more = json.dumps(more, ensure_ascii=False) if more else ""
        out.append(Message(role, message["content"], more))
    if not value:
        raise UserError(f'{place}: "{key}" has no message')
    return out


def more_of(message):
    """-> the other keys of a message beside role and content; one that is null counts as absent"""
    return {k: x for k, x in message.items() if k not in ("role", "content") and x is not None}


def join_parts(place, key, message):
    """Joins the contents of a message that come as parts, [{"type": "text", "text"}, …]."""
    parts = message.get("content") if isinstance(message, dict) else None
    if not isinstance(parts, list):
        return
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else kind_of(part)
        if kind != "text" or not isinstance(part.get("text"), str):
            what = f'"{key}" has a part of the kind {shorten(repr(kind))}'
            raise UserError(f'{place}: {what}; a model here reads {{"type": "text", "text"}} only')
    message["content"] = "".join(part["text"] for part in parts)


class Turns(list):
    """The messages of "messages" before an answer"""

    conversation = ()  # all of "messages", if each of its answers is trained


def turns(row):
    """-> one row per answer of "messages", in their order; [row] if it has no "messages" """
    prompt = row.get("prompt")
    if not isinstance(prompt, Turns):
        return [row]
    chat, rows = [*prompt, *row["completion"]], []
    for i, message in enumerate(chat):
        if i and message["role"] == "assistant":
            before = Turns(chat[:i])
            before.conversation = chat
            rows.append(row | {"prompt": before, "completion": [message]})
    return rows


def column_of(place, name, x):
    """-> the value of a column for a chat template. It may be JSON as text, which `datasets` needs
    if the rows have different tools."""
    kind = dict if name == "chat_template_kwargs" else list
    with contextlib.suppress(ValueError):
        x = json.loads(x) if isinstance(x, str) else x
    if not isinstance(x, kind):
        raise UserError(f'{place}: "{name}" must be {KINDS[kind]}, not {kind_of(x)}')
    return x


def for_template(row):
    """-> {name: a description of it} for all that only a chat template reads: columns, arguments in
    chat_template_kwargs, keys of messages"""
    found = {name: f'the column "{name}"' for name in COLUMNS[:2] if row.get(name)}
    if isinstance(names := row.get("chat_template_kwargs"), dict):
        found |= {name: f'the argument "{name}"' for name in names}
    for column in ("prompt", *ANSWERS):
        messages = row[column] if isinstance(row.get(column), list) else ()
        for message in messages:
            if isinstance(message, dict):
                found |= {key: f'the key "{key}" of a message' for key in more_of(message)}
    return found


def kind_of(value):
    return KINDS.get(type(value), "a number")


def shorten(text):
    return text if len(text) < 80 else text[:80] + " …"

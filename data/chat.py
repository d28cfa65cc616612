"""Messages of a file: how these scripts write a prompt of them as text, and where it stands."""

from typing import NamedTuple

TEMPLATE = {
    "system": "System: {}\n\n",
    "user": "User: {}\n\n",
    "assistant": "Assistant: {}\n\n",
    "tool": "Tool: {}\n\n",
    "answer": "Assistant:",
    "before": " ",  # what stands before an answer
}


class Message(NamedTuple):
    role: str
    text: str
    more: str = ""  # its other keys, such as "tool_calls", as JSON, for a template that reads them


class Chat(str):
    """A prompt of messages, or an answer of one. As a string it is what TEMPLATE makes of them, for
    tokenizers that have no template of their own. place: "path:number" of its row"""

    columns = ""  # "tools" and other columns that a template may read, as JSON
    conversation = ()  # its messages to the last one, if every answer in it is trained

    def __new__(cls, text, messages=(), place=""):
        self = super().__new__(cls, text)
        self.messages, self.place = tuple(Message(*x) for x in messages), place
        return self

    @property
    def facts(self):
        """What its tokens depend on, beside the text"""
        return self.messages, self.columns, self.conversation


def facts(text):
    """-> what the tokens of a prompt or an answer depend on, beside its text"""
    return getattr(text, "facts", ())


def same(a, b):
    """Whether two answers are one"""
    return a == b and facts(a) == facts(b)

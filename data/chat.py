"""Messages of a file: writes a prompt of them as text, and keeps the place of its row."""

from typing import NamedTuple

TEMPLATE = {
    "system": "System: {}\n\n",
    "user": "User: {}\n\n",
    "assistant": "Assistant: {}\n\n",
    "tool": "Tool: {}\n\n",
    "answer": "Assistant:",
    "before": " ",  # between the prompt and an answer
}


class Message(NamedTuple):
    role: str
    text: str
    more: str = ""  # its other keys, such as "tool_calls", as JSON, for a template that reads them


class Chat(str):
    """A prompt of messages, or an answer of one message. As a string it is the text that TEMPLATE
    makes of them, for tokenizers without a template. place: "path:number" of its row"""

    columns = ""  # "tools" and other columns that a template may read, as JSON
    conversation = ()  # its messages to the last one, if every answer in it is trained

    def __new__(cls, text, messages=(), place=""):
        self = super().__new__(cls, text)
        self.messages, self.place = tuple(Message(*x) for x in messages), place
        return self

    @property
    def facts(self):
        """All that its tokens depend on, apart from the text"""
        return self.messages, self.columns, self.conversation


def facts(text):
    """-> all that the tokens of a prompt or an answer depend on, apart from its text"""
    return getattr(text, "facts", ())


def same(a, b):
    """Whether two answers are the same"""
    return a == b and facts(a) == facts(b)

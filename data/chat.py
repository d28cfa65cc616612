"""Prompts of a file: their messages, how these scripts write them as text, and where they stand."""

TEMPLATE = {
    "system": "System: {}\n\n",
    "user": "User: {}\n\n",
    "assistant": "Assistant: {}\n\n",
    "answer": "Assistant:",
    "before": " ",  # what stands before an answer
}


class Chat(str):
    """A prompt of messages, ((role, text), …), or of none. As a string it is what TEMPLATE makes of
    them, for tokenizers that have no template of their own. place: "path:number" of its row"""

    def __new__(cls, text, messages=(), place=""):
        self = super().__new__(cls, text)
        self.messages, self.place = tuple(messages), place
        return self

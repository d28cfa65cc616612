"""Chats: a prompt of several messages, and how these scripts write one as text."""

TEMPLATE = {
    "system": "System: {}\n\n",
    "user": "User: {}\n\n",
    "assistant": "Assistant: {}\n\n",
    "answer": "Assistant:",
    "before": " ",  # what stands before an answer
}


class Chat(str):
    """A prompt of messages, ((role, text), …). As a string it is what TEMPLATE makes of them, for
    tokenizers that have no template of their own."""

    def __new__(cls, text, messages=()):
        self = super().__new__(cls, text)
        self.messages = tuple(messages)
        return self

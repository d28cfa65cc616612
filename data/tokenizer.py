"""The tokenizer: a tiktoken Encoding from a small vocabulary file in this folder, so that nothing
is ever downloaded.

Text is always encoded as ordinary text: one that spells out the end token stays text. There is one
special token, the end of a response, and no padding token.
"""

import base64
import re
from pathlib import Path

import tiktoken

from data.error import UserError, refuse_pointer, user_errors

END = "<|endoftext|>"
BLANK = 500_000  # characters of white space in a row; at twice as many tiktoken panics
DEFAULT = Path(__file__).with_name("vocab.tiktoken")
# Words with the space before them, single digits (so that sums can be learned), signs, white space.
# Python's re reads the pattern too.
PATTERN = r" ?[^\W\d_]+|\d| ?[^\s\w]+|_+|\s+(?!\S)|\s+"


class Tokenizer:
    """encode: text -> ids, without an end token. decode: ids -> text, the end token left out.
    `end_id` ends a response that is trained; any of `ends` ends one that is sampled.

    `meta` is what a checkpoint keeps: the vocabulary itself, or the name by which tiktoken knows
    it. A world of few symbols (`exact`) has its own, with `longest`: a response of so many tokens
    is complete without an end token.
    """

    template = None  # of chats: only those of Hugging Face have one
    remedy = "train it again"  # if a model's logits do not fit

    def __init__(self, meta):
        self.meta = meta
        self.longest = meta.get("longest")
        if "vocab" in meta:
            self.encoding = _build(meta["name"], meta["vocab"], world=self.longest)
        else:
            self.encoding = _named(meta["name"])
        self.end_id = self.encoding.encode_single_token(END)
        self.ends = (self.end_id,)
        self.size = self.encoding.n_vocab

    def encode(self, text):
        if self.longest:
            known = self.decode(range(self.end_id))
            if unknown := "".join(sorted(set(text) - set(known))):
                raise UserError(
                    f"{unknown!r} in {text!r}: the vocabulary of {self.meta['name']} has the "
                    f"symbols {known} only; a checkpoint goes with the task that it was trained on"
                )
        begins = beginning(text)
        if len(text) > BLANK and re.search(rf"\s{{{BLANK}}}", text):
            raise UserError(f"{begins} has {BLANK:,} spaces or new lines in a row; leave them out")
        with user_errors(f"{begins} cannot be encoded", "leave it out"):
            return self.encoding.encode_ordinary(text)

    def prompt(self, text):
        """-> the ids of a prompt, which a response follows"""
        return self.encode(text)

    def cut(self, text, n):
        """-> the last n ids of a prompt"""
        return self.encode(text)[-n:]

    def answer(self, text, prompt=""):
        """-> the ids of a response to a prompt, with its end token"""
        return [*self.encode(text), self.end_id][: self.longest]

    def dialogue(self, turns, n=0):
        """Turns of user and model, joined as they are -> ids up to the model's next turn; only the
        last n of them, unless n is 0"""
        parts = [self.answer(x) if i % 2 else self.encode(x) for i, x in enumerate(turns)]
        return [token for part in parts for token in part][-n:]

    def decode(self, ids):
        return self.encoding.decode([i for i in ids if i != self.end_id])

    def notes(self):
        """-> what is to be said of the answers that were encoded"""
        return ""

    @property
    def vocabulary(self):
        """It is equal for two tokenizers if their ids mean the same."""
        return self.meta

    @property
    def way(self):
        """It is equal for two tokenizers if they make the same ids of the same prompt."""
        return self.meta

    def fits(self, vocab_size):
        """Whether a model with so many logits may have this vocabulary"""
        return self.size == vocab_size

    def with_chat(self, chat, args):
        """-> the tokenizer with other settings of its chat template; this one has none"""
        if chat is not None or args:
            what = "--chat and --template-args are for checkpoints with a chat template"
            raise UserError(f"{what}; this one has none")
        return self


def beginning(text):
    """-> how a message names a text"""
    return f"the text of {len(text):,} characters that begins with {text[:40]!r}"


def tokenizer(name="", own=None):
    """-> Tokenizer: "" for the committed vocabulary, the path of a file that make_vocab.py wrote,
    or a tiktoken name. `own`: the `meta` of a task that has a vocabulary of its own, and takes no
    other."""
    if own:
        if name:
            raise UserError(
                f"--tokenizer {name}: {own['name']} has a vocabulary of its own; leave it out"
            )
        return Tokenizer(own)
    path = Path(name or DEFAULT)
    if not path.exists():
        return Tokenizer({"name": name})
    refuse_pointer(path)
    try:
        return Tokenizer({"name": path.name, "vocab": path.read_text("ascii")})
    except (UnicodeDecodeError, IsADirectoryError):
        raise UserError(
            f"--tokenizer {name} is no vocabulary file; make one with python -m data.make_vocab"
        ) from None


def _build(name, text, world=False):
    """The lines of a vocabulary file, "base64(token) rank", -> Encoding. Only a world of symbols
    may lack some of the 256 bytes."""
    try:
        lines = map(str.split, text.splitlines())
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    except ValueError:
        raise UserError(
            f"{name} is no vocabulary file (a line is not 'base64 rank'); "
            "make one with python -m data.make_vocab"
        ) from None
    complete = world or all(bytes([b]) in ranks for b in range(256))
    if not complete or sorted(ranks.values()) != list(range(len(ranks))):
        raise UserError(
            f"{name}: a vocabulary needs all 256 bytes and ranks 0, 1, 2 …; "
            "make one with python -m data.make_vocab"
        )
    return tiktoken.Encoding(
        name, pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={END: len(ranks)}
    )


def _named(name):
    if name not in tiktoken.list_encoding_names():
        known = ", ".join(tiktoken.list_encoding_names())
        raise UserError(f"--tokenizer {name}: no such file, and tiktoken knows only {known}")
    try:
        encoding = tiktoken.get_encoding(name)
    except Exception as e:  # whatever the download raises
        why = f"tiktoken could not download it ({type(e).__name__})"
        raise UserError(f"--tokenizer {name}: {why}; leave it out for the built-in one") from None
    if END not in encoding.special_tokens_set:
        raise UserError(f"--tokenizer {name} has no {END} token to end a response with")
    return encoding

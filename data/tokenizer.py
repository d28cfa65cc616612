"""The tokenizer: a tiktoken Encoding from a small vocabulary file in this folder, so that nothing is ever downloaded.

Text is always encoded as ordinary text: one that spells out the end token stays text. There is one special token, the
end of a response, and no padding token.
"""
import base64
from pathlib import Path

import tiktoken

from data.error import DataError

END = "<|endoftext|>"
DEFAULT = Path(__file__).with_name("vocab.tiktoken")
# A word with the space before it; single digits, so that sums can be learned; signs; white space. Python's re reads it too.
PATTERN = r" ?[^\W\d_]+|\d| ?[^\s\w]+|_+|\s+(?!\S)|\s+"


class Tokenizer:
    """encode: text -> ids, without an end token. decode: ids -> text, the end token left out. `end_id` ends a response.

    `meta` is what a checkpoint keeps: the vocabulary itself, or the name by which tiktoken knows it.
    """

    def __init__(self, meta):
        self.meta = meta
        if "vocab" in meta:
            self.encoding = _build(meta["name"], meta["vocab"])
        else:
            self.encoding = _named(meta["name"])
        self.end_id = self.encoding.encode_single_token(END)
        self.size = self.encoding.n_vocab

    def encode(self, text):
        return self.encoding.encode_ordinary(text)

    def decode(self, ids):
        return self.encoding.decode([i for i in ids if i != self.end_id])


def tokenizer(name=""):
    """-> Tokenizer: "" for the committed vocabulary, the path of a file that make_vocab.py wrote, or a tiktoken name."""
    path = Path(name) if name else DEFAULT
    if not path.exists():
        return Tokenizer({"name": name})
    try:
        return Tokenizer({"name": path.name, "vocab": path.read_text("ascii")})
    except (UnicodeDecodeError, IsADirectoryError):
        raise DataError(f"--tokenizer {name} is no vocabulary file; make one with python -m data.make_vocab") from None


def _build(name, text):
    """The lines of a vocabulary file, "base64(token) rank", -> Encoding."""
    try:
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in (line.split() for line in text.splitlines())}
    except ValueError:
        raise DataError(f"{name} is no vocabulary file (a line is not 'base64 rank'); make one with python -m data.make_vocab") from None
    if sorted(ranks.values()) != list(range(len(ranks))) or any(bytes([b]) not in ranks for b in range(256)):
        raise DataError(f"{name}: a vocabulary needs all 256 bytes and ranks 0, 1, 2 …; make one with python -m data.make_vocab")
    return tiktoken.Encoding(name, pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={END: len(ranks)})


def _named(name):
    if name not in tiktoken.list_encoding_names():
        known = ", ".join(tiktoken.list_encoding_names())
        raise DataError(f"--tokenizer {name}: no such file, and tiktoken knows only {known}")
    try:
        encoding = tiktoken.get_encoding(name)
    except Exception as e:  # whatever the download raises
        why = f"tiktoken could not download it ({type(e).__name__})"
        raise DataError(f"--tokenizer {name}: {why}; leave it out for the built-in one") from None
    if END not in encoding.special_tokens_set:
        raise DataError(f"--tokenizer {name} has no {END} token to end a response with")
    return encoding

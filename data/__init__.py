"""Tasks as text, the tokenizer, and batches of token ids."""

from data.batch import (
    Batch,
    Batches,
    Prompts,
    Rows,
    encode,
    encode_prompts,
    mismatched,
    pad,
    pad_pairs,
)
from data.chat import TEMPLATE
from data.error import Stopped, UserError, printable, refuse_pointer, say, user_errors
from data.tasks import BUILT_IN, kind, task
from data.tokenizer import Tokenizer, tokenizer
from data.toy import Graded

__all__ = [
    "BUILT_IN",
    "Batch",
    "Batches",
    "Graded",
    "Prompts",
    "Rows",
    "Stopped",
    "TEMPLATE",
    "Tokenizer",
    "UserError",
    "encode",
    "encode_prompts",
    "kind",
    "mismatched",
    "pad",
    "pad_pairs",
    "printable",
    "refuse_pointer",
    "say",
    "task",
    "tokenizer",
    "user_errors",
]

"""Tasks as text, the tokenizer, and batches of token ids."""

from data.batch import (
    Batch,
    Batches,
    Prompts,
    encode,
    encode_prompts,
    mismatched,
    pad,
    pad_pairs,
    say,
)
from data.constitution import (
    Dialogues,
    ask_choice,
    ask_critique,
    ask_revision,
    constitution,
    pad_dialogues,
    spell,
)
from data.error import Stopped, UserError
from data.hf_export import tokenizer_files
from data.jsonl import TEMPLATE
from data.skills import demonstrate
from data.tasks import BUILT_IN, kind, task
from data.tokenizer import Tokenizer, of_checkpoint, tokenizer

__all__ = [
    "BUILT_IN",
    "Batch",
    "Batches",
    "Dialogues",
    "Prompts",
    "Stopped",
    "TEMPLATE",
    "Tokenizer",
    "UserError",
    "ask_choice",
    "ask_critique",
    "ask_revision",
    "constitution",
    "demonstrate",
    "encode",
    "encode_prompts",
    "kind",
    "mismatched",
    "of_checkpoint",
    "pad",
    "pad_dialogues",
    "pad_pairs",
    "say",
    "spell",
    "task",
    "tokenizer",
    "tokenizer_files",
]

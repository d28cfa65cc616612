"""Tasks as text, the tokenizer, and batches of token ids."""
from data.batch import Batch, Batches, encode, encode_prompts, mismatched, pad, sides
from data.error import DataError
from data.jsonl import TEMPLATE
from data.tasks import task
from data.tokenizer import Tokenizer, tokenizer

__all__ = ["Batch", "Batches", "DataError", "TEMPLATE", "Tokenizer", "encode", "encode_prompts", "mismatched", "pad", "sides", "task",
           "tokenizer"]  # fmt: skip

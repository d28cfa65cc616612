"""Tasks as text, the tokenizer, and batches of token ids."""
from data.batch import Batch, Batches, Prompts, encode, encode_prompts, mismatched, pad, sides
from data.enumeration import Enumeration
from data.error import DataError
from data.jsonl import TEMPLATE
from data.rewards import user_reward
from data.tasks import task
from data.tokenizer import Tokenizer, tokenizer

__all__ = ["Batch", "Batches", "DataError", "Enumeration", "Prompts", "TEMPLATE", "Tokenizer", "encode", "encode_prompts", "mismatched",
           "pad", "sides", "task", "tokenizer", "user_reward"]  # fmt: skip

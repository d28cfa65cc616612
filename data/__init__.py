"""Tasks as text, the tokenizer, and batches of token ids."""
from data.batch import Batch, Batches, Prompts, encode, encode_prompts, mismatched, pad, sides
from data.constitution import Dialogues, ask_choice, ask_critique, ask_rating, ask_revision, constitution, pad_dialogues, spell
from data.enumeration import Enumeration
from data.error import DataError
from data.feedback import Pair, Revision, gold_agreement, label_figures, revision_figures, skills_text
from data.jsonl import TEMPLATE
from data.rewards import user_reward
from data.skills import demonstrate
from data.tasks import task
from data.tokenizer import Tokenizer, tokenizer

__all__ = ["Batch", "Batches", "DataError", "Dialogues", "Enumeration", "Pair", "Prompts", "Revision", "TEMPLATE", "Tokenizer",
           "ask_choice", "ask_critique", "ask_rating", "ask_revision", "constitution", "demonstrate", "encode", "encode_prompts",
           "gold_agreement", "label_figures", "mismatched", "pad", "pad_dialogues", "revision_figures", "sides", "skills_text", "spell",
           "task", "tokenizer", "user_reward"]  # fmt: skip

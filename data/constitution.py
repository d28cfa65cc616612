"""A constitution, and what a model is asked under one of its principles (Constitutional AI, arXiv:2212.08073).

A dialogue is a list of texts in turn: what asks, what the model writes, what asks … Each text of the model's ends with the end token.
A question is a dialogue that ends before the model's turn.
"""
from pathlib import Path

import torch

from data.error import DataError

CONSTITUTION = Path(__file__).with_name("constitution.txt")


def constitution(path=""):
    """-> the principles in a text file, one a line; empty lines and lines that begin with # are no principles"""
    try:
        lines = [line.strip() for line in Path(path or CONSTITUTION).read_text("utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as e:
        raise DataError(f"--constitution {path} cannot be read ({type(e).__name__}); give a text file with a principle a line") from None
    principles = [line for line in lines if line and not line.startswith("#")]
    if not principles:
        raise DataError(f"--constitution {path} holds no principle; write one a line")
    return principles


def ask_critique(prompt, answer, principle):
    return [prompt, answer, f"\n{principle}\nCritique:"]


def ask_revision(prompt, answer, principle, critique):
    return [*ask_critique(prompt, answer, principle), critique, "\nRevision:"]


def ask_choice(prompt, a, b, principle):
    """Which of two answers follows the principle better: the next token is A or B."""
    return [f"{prompt}\n{principle}\n(A)", a, "\n(B)", b, "\nBetter: ("]


def ask_rating(prompt, answer, principle):
    """How well an answer follows the principle: the next token is a digit from 1 to 9."""
    return [prompt, answer, f"\n{principle}\nRating: ("]


def spell(dialogue, tokenizer):
    """-> (ids, weight) of a dialogue, as tuples. Of a turn of the model's every token weighs 1 / its tokens, of what asks none."""
    ids, weight = [], []
    for turn, text in enumerate(dialogue):
        part = tokenizer.answer(text) if turn % 2 else tokenizer.encode(text)
        ids, weight = ids + part, weight + [turn % 2 / len(part)] * len(part)
    return tuple(ids), tuple(weight)


def pad_dialogues(rows, device="cpu"):
    """Rows of (ids, weight) -> (ids (B, T) int64, weight (B, T) float32), both padded on the right with 0"""
    longest = max(len(ids) for ids, _ in rows)
    ids, weight = zip(*((ids + (0,) * (longest - len(ids)), weight + (0.0,) * (longest - len(ids))) for ids, weight in rows))
    return torch.tensor(ids, device=device), torch.tensor(weight, device=device)


class Dialogues:
    """batches[step] -> the spelled dialogues of that optimizer step, the shortest first, so that little of a micro-batch is padding.

    draw(n, seed) -> n dialogues: fresh ones at every step. Raises DataError where one of a probe does not fit in block_size tokens."""

    rows = per_epoch = None

    def __init__(self, draw, batch_size, seed, tokenizer, block_size):
        self.draw, self.batch_size, self.seed, self.tokenizer = draw, batch_size, seed, tokenizer
        widest = max(len(spell(dialogue, tokenizer)[0]) for dialogue in draw(1000, seed))
        if widest > block_size:
            raise DataError(f"a dialogue of critique and revision takes up to {widest} tokens, more than the context of {block_size}; "
                            "give a larger --block-size")  # fmt: skip

    def __getitem__(self, step):
        dialogues = self.draw(self.batch_size, f"{self.seed} step {step}")
        return sorted((spell(dialogue, self.tokenizer) for dialogue in dialogues), key=lambda row: len(row[0]))

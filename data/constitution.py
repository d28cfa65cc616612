"""A constitution, and the questions that a model is asked about its principles (Constitutional AI,
arXiv:2212.08073).

A dialogue is a list of texts: what the model is asked, what it writes, what it is asked next, and
so on. Each text that the model writes ends with the end token. A question is a dialogue that stops
before the model's turn.
"""

from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence

from data.error import UserError

CONSTITUTION = Path(__file__).with_name("constitution.txt")


def constitution(path=""):
    """-> the principles in a text file, one per line. Empty lines and lines that begin with # are
    not read."""
    try:
        lines = Path(path or CONSTITUTION).read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        why = f"cannot be read ({type(e).__name__}); give a text file with one principle per line"
        raise UserError(f"--constitution {path} {why}") from None
    principles = [line for line in map(str.strip, lines) if line and line[0] != "#"]
    if not principles:
        raise UserError(f"--constitution {path} holds no principle; write one per line")
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
    """-> (ids, weight) of a dialogue, as tuples. The tokens of each turn of the model share a
    weight of 1 equally; the tokens of other turns have the weight 0."""
    ids = []
    weight = []
    for turn, text in enumerate(dialogue):
        part = tokenizer.answer(text) if turn % 2 else tokenizer.encode(text)
        ids += part
        weight += [turn % 2 / len(part)] * len(part)
    return tuple(ids), tuple(weight)


def pad_dialogues(rows, device="cpu"):
    """Rows of (ids, weight) -> (ids (B, T) int64, weight (B, T) float32), both padded on the right
    with 0"""
    columns = ([torch.tensor(x) for x in column] for column in zip(*rows))
    ids, weight = (pad_sequence(column, batch_first=True).to(device) for column in columns)
    return ids, weight


class Dialogues:
    """batches[step] -> the spelled dialogues of that optimizer step. The shortest come first, so
    that a micro-batch has little padding.

    draw(n, seed) -> n dialogues, fresh ones at every step. Raises UserError if a dialogue of a
    probe does not fit in block_size tokens.
    """

    rows = per_epoch = None

    def __init__(self, draw, batch_size, seed, tokenizer, block_size):
        self.draw, self.batch_size, self.seed, self.tokenizer = draw, batch_size, seed, tokenizer
        widest = max(len(spell(dialogue, tokenizer)[0]) for dialogue in draw(1000, seed))
        if widest > block_size:
            long = f"takes up to {widest} tokens, more than the context of {block_size}"
            what = "a dialogue of critique and revision"
            raise UserError(f"{what} {long}; give a larger --block-size")

    def __getitem__(self, step):
        dialogues = self.draw(self.batch_size, f"{self.seed} step {step}")
        rows = [spell(dialogue, self.tokenizer) for dialogue in dialogues]
        return sorted(rows, key=lambda row: len(row[0]))

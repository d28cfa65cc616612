"""Measures a policy that learns from labels, as KTO does, on held-out labels."""

import torch

from data import say
from training.held_out import HeldOut, share


def label_accuracy(task, compute_loss):
    """Measures the share of pairs (a desirable answer, an undesirable one) whose desirable answer
    has the higher implicit reward. A file of pairs gives these pairs; in a file of single answers
    each desirable one is paired with each undesirable one. compute_loss(policy, ref, batch)"""

    def draw(n, seed, split):
        rows = task.feedback(n, seed, split=split)
        if task.unpaired and len({label for *_, label in rows}) < 2:
            left_out = "accuracy is not reported; --eval-file names other rows"
            say(f"the held-out rows all have the same label: {left_out}")
        return rows

    def score(policy, ref, batch):
        return compute_loss(policy, ref, batch)[1]["rewards"]

    def figures(rewards, rows):
        desirable = torch.tensor([row[2] for row in rows], device=rewards.device)
        chosen, rejected = rewards[desirable], rewards[~desirable]
        if not task.unpaired:  # the rows of a pair follow one another
            return share(chosen > rejected)
        n = min(len(chosen), len(rejected))
        return share(chosen[:, None] > rejected, n) if n else {}

    return HeldOut(draw, score, figures, with_ref=True)

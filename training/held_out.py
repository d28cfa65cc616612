"""Figures of held-out rows by the method's own loss, for tasks whose reward is not known."""

import torch

import data
from data import say


class HeldOut:
    """Held-out rows, and the figures that a method's own loss gives of them. Each script picks
    `nll_per_token`, `pair_accuracy`, or `label_accuracy` of labels.py."""

    def __init__(self, draw, score, figures, pad=data.pad, with_ref=False):
        """draw: a task's function that gives rows. score(policy, ref, batch) -> a number per row or
        pair. figures(these numbers, rows) -> the figures. with_ref: scores need a reference."""
        self.draw, self.score, self.figures = draw, score, figures
        self.pad, self.with_ref = pad, with_ref

    def encode(self, run):
        o = run.o
        rows = self.draw(o.eval_prompts, o.seed, split="test")
        rows, note = data.encode(rows, run.tokenizer, run.block_size, o.truncate)
        say(note and f"held out: {note}")
        return rows

    def measure(self, run, rows, policy, ref):
        if self.with_ref and ref is None:
            return {}
        found = run.scores(rows, lambda x: self.score(policy, ref, self.pad(x, run.device)), 32)
        return self.figures(found, rows)


def nll_per_token(task, compute_loss):
    """Measures the nats per token of demonstrations. compute_loss(policy, batch) -> (losses, sums
    over the tokens of each answer; metrics)"""

    def score(policy, ref, batch):
        return compute_loss(policy, batch)[0]

    def figures(losses, rows):
        return {"nll": losses.sum().item() / sum(len(y) for _, y in rows)}

    return HeldOut(task.demonstrations, score, figures)


def pair_accuracy(task, compute_loss, with_ref=False):
    """Measures the mean loss of pairs, and the share of them whose chosen answer has the higher
    implicit reward. compute_loss(policy, batch), or compute_loss(policy, ref, batch) if with_ref,
    gives the losses and logs the rewards."""

    def score(policy, ref, batch):
        models = (policy, ref) if with_ref else (policy,)
        losses, metrics = compute_loss(*models, batch)
        return torch.stack([losses, metrics["rewards/accuracies"].to(losses)], 1)

    def figures(found, rows):
        losses, right = found.T
        return {"held_out_loss": losses.mean().item()} | share(right > 0)

    return HeldOut(task.preferences, score, figures, data.pad_pairs, with_ref)


def share(found, n=0):
    """(…) bool -> the figures of an accuracy. n: the number of independent ones, if not all are"""
    n, accuracy = n or found.numel(), found.float().mean().item()
    return {"accuracy": accuracy, "accuracy_se": share_error(accuracy, n), "accuracy_n": n}


def share_error(share, n):
    """-> half of the Wilson interval of a share of n, at one standard error. Unlike the usual
    formula it is not 0 for 16 of 16."""
    return (n * share * (1 - share) + 0.25) ** 0.5 / (n + 1)

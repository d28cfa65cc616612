"""Figures of held-out rows: what a method's own loss says of them, if no reward is known."""

import torch

import data
from data import say


class HeldOut:
    """Held-out rows, and what a method's own loss says of them. A script picks `nll_per_token`,
    `pair_accuracy`, or `label_accuracy` of labels.py."""

    def __init__(self, draw, score, figures, pad=data.pad, with_ref=False):
        """draw: a task's function that gives rows; score(policy, ref, batch) -> a number per row or
        pair; figures(these numbers, rows) -> what is measured; with_ref: scores need a reference"""
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
    implicit reward, as compute_loss logs it. That takes (policy, batch), or with_ref
    (policy, ref, batch)."""

    def score(policy, ref, batch):
        models = (policy, ref) if with_ref else (policy,)
        losses, metrics = compute_loss(*models, batch)
        return torch.stack([losses, metrics["rewards/accuracies"].to(losses)], 1)

    def figures(found, rows):
        losses, right = found.T
        return {"held_out_loss": losses.mean().item()} | share(right > 0)

    return HeldOut(task.preferences, score, figures, data.pad_pairs, with_ref)


def share(found, n=0):
    """(…) bool -> the figures of an accuracy. n: how many of them are independent, if not all"""
    n, accuracy = n or found.numel(), found.float().mean().item()
    return {"accuracy": accuracy, "accuracy_se": share_error(accuracy, n), "accuracy_n": n}


def share_error(share, n):
    """-> half of Wilson's interval of a share of n at one standard error: not 0 for 16 of 16"""
    return (n * share * (1 - share) + 0.25) ** 0.5 / (n + 1)

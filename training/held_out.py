"""Figures of held-out rows: what a method's own loss says of them, if no reward is known."""

import torch

import data
from data import say


class HeldOut:
    """Held-out rows, and what a method's own loss says of them. A script picks one of
    `nll_per_token`, `pair_accuracy` and `label_accuracy`."""

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
    """Measures the share of pairs whose chosen answer has the higher implicit reward, as
    compute_loss logs it. That takes (policy, batch), or with_ref (policy, ref, batch)."""

    def score(policy, ref, batch):
        models = (policy, ref) if with_ref else (policy,)
        losses, metrics = compute_loss(*models, batch)
        return metrics["rewards/accuracies"].to(losses)

    def figures(right, rows):
        return share(right > 0)

    return HeldOut(task.preferences, score, figures, data.pad_pairs, with_ref)


def label_accuracy(task, compute_loss):
    """Measures the share of pairs (a desirable answer, an undesirable one) whose desirable answer
    has the higher implicit reward. A file of pairs has these pairs; of a file of single answers
    each desirable one makes a pair with each undesirable one. compute_loss(policy, ref, batch)"""

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


def share(found, n=0):
    """(…) bool -> the figures of an accuracy. n: how many of them are independent, if not all"""
    n, accuracy = n or found.numel(), found.float().mean().item()
    return {"accuracy": accuracy, "accuracy_se": standard_error(accuracy, n), "accuracy_n": n}


def standard_error(accuracy, n):
    return (accuracy * (1 - accuracy) / n) ** 0.5

"""Figures of held-out rows: what a method's own loss says of them, if no reward is known, and how
well a reward model orders pairs."""

import statistics
from functools import partial

import torch

import data
from data import printable, say
from gpt import response_scores


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


# ---- reward models


class RewardEvaluator:
    """Measures a reward model on held-out pairs, and on `exact` on every outcome. The pairs are
    encoded before the training, so that those that do not fit are reported then."""

    def __init__(self, run, task):
        self.run, self.task = run, task
        o, fit = run.o, (run.tokenizer, run.block_size, run.o.truncate)
        self.texts = task.graded(o.eval_prompts, o.seed, split="test")
        self.pairs, note = data.encode(self.texts, *fit)
        say(note and f"held out: {note}")
        self.gold = task.size == 0 and not note  # a cut answer was never judged
        self.demonstrations, _ = data.encode(task.demonstrations(1024, o.seed), *fit)
        self.world = data.encode(task.rows, *fit)[0] if task.outcomes else []

    def scores(self, reward, rows):
        """rows (prompt ids, response ids) -> (len(rows),) scores, on the CPU"""
        pad = partial(data.pad, device=self.run.device, ends=True)
        return self.run.scores(rows, lambda x: response_scores(reward, pad(x)), 512).cpu()

    def center(self, reward):
        """Shifts the scores so that demonstrations average 0. -> what it has subtracted"""
        shift = self.scores(reward, self.demonstrations).mean().item()
        with torch.no_grad():
            reward.head.bias -= shift
        return shift

    def measure(self, reward, n=None):
        """-> the figures of the first n pairs, with gold figures if the task knows its reward"""
        pairs, texts = self.pairs[:n], self.texts[:n]
        score = self.scores(reward, [x[:2] for x in pairs] + [(x[0], x[2]) for x in pairs])
        delta = torch.sub(*score.chunk(2))
        p = torch.tensor([pair[4] for pair in pairs], dtype=score.dtype)
        agreed = torch.where(delta > 0, p, torch.where(delta < 0, 1 - p, 0.0))
        figures = {
            "accuracy": agreed.mean(),
            "accuracy_se": standard_error(agreed.mean(), len(pairs)),
            "margin": delta.mean(),
            "mean_reward": score.mean(),
            "min_reward": score.min(),
            "max_reward": score.max(),
        }
        if self.gold:
            known = [self.task.preferred(*text[:3], {}) for text in texts]
            figures["accuracy_bound"] = statistics.fmean(max(x, 1 - x) for x in known)
            noise = sum(x * (1 - x) for x in known) ** 0.5 / len(known)
            figures["accuracy_bound_se"] = noise
        if self.world:
            figures["rms"] = self._distance(reward)
        elif self.gold:
            rows = [x[:2] for x in texts] + [(x[0], x[2]) for x in texts]
            gold = torch.tensor([self.task.reward(*row) for row in rows], dtype=score.dtype)
            figures["correlation"] = torch.corrcoef(torch.stack([score, gold]))[0, 1]
        return {name: float(x) for name, x in figures.items()} | {"pairs": len(pairs)}

    def _distance(self, reward):
        """-> the rms distance between the scores and r, up to a constant per prompt; an outcome has
        the weight d(y|x), its share of the demonstrations"""
        error = self.scores(reward, self.world).double().view(self.task.r.shape)
        error = error - torch.from_numpy(self.task.r)
        d = torch.from_numpy(self.task.d)
        error = error - (d * error).sum(1, keepdim=True)
        return (d * error**2).sum(1).mean().sqrt()

    def facts(self, figures):
        facts = {"template": self.task.template, "reference": self.run.baseline, "reward": None}
        return facts | {"shift": figures["shift"]}

    def report(self, title, f):
        rows = [
            ("held-out preference accuracy", "accuracy"),
            ("margin, chosen - rejected", "margin"),
            ("score, mean", "mean_reward"),
            ("  least", "min_reward"),
            ("  greatest", "max_reward"),
            ("correlation with the gold reward", "correlation"),
            ("rms distance to r, weighted by d", "rms"),
        ]
        print(f"\n{title}: {f['pairs']} held-out pairs")
        for name, key in rows:
            note = ""
            if key == "accuracy" and "accuracy_bound" in f:
                bound = f"{f['accuracy_bound']:.3f} ± {f['accuracy_bound_se']:.3f}"
                note = f" (the labels' noise allows {bound})"
            if key in f:
                spread = f" ± {f['accuracy_se']:.3f}" if key == "accuracy" else ""
                print(f"{name:<34}{f[key]:>10.3f}{spread}{note}")
        for prompt, *answers in [pair[:3] for pair in self.pairs[:2]]:
            print("\n" + self.run.tokenizer.decode(prompt)[-400:])
            score = self.scores(self.run.models["reward"], [(prompt, y) for y in answers])
            for name, y, x in zip(("chosen", "rejected"), answers, score.tolist()):
                text = printable(self.run.tokenizer.decode(y)).replace("\n", "\n" + " " * 18 + "| ")
                print(f"  {name:>8} {x:6.2f} | {text}")
        print(flush=True)

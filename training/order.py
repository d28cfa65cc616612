"""Measures how well a reward model orders held-out pairs."""

import statistics
from functools import partial

import torch

import data
from data import printable, say
from gpt import response_scores
from training.held_out import share_error


class RewardEvaluator:
    """Measures a reward model on held-out pairs, and for `exact` on every outcome. The pairs are
    encoded before training, so that those that do not fit are reported then."""

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
        """Shifts the scores so that demonstrations average 0. -> the number subtracted"""
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
            "accuracy_se": share_error(agreed.mean(), len(pairs)),
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
        """-> the rms distance between the scores and r, up to a constant per prompt. The weight of
        an outcome is d(y|x), its share of the demonstrations."""
        error = self.scores(reward, self.world).double().view(self.task.r.shape)
        error = error - torch.from_numpy(self.task.r)
        d = torch.from_numpy(self.task.d)
        error = error - (d * error).sum(1, keepdim=True)
        return (d * error**2).sum(1).mean().sqrt()

    def facts(self, figures):
        facts = {"template": self.task.template, "reference": self.run.baseline, "reward": None}
        return facts | {"shift": figures.get("shift", 0.0)}

    def what_next(self, out, record):
        return f"a judge for ppo.py, grpo.py, online_dpo.py: --reward {out}"

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

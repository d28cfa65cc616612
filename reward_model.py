"""Reward model: one number for a response, from preferences (InstructGPT, arXiv:2203.02155).

    P(y_w ≻ y_l | x) = σ(r_θ(x, y_w) - r_θ(x, y_l))                           Bradley–Terry
    Δ    = r_θ(x, y_w) - r_θ(x, y_l)
    L(θ) = - p log σ(Δ - m) - (1-p) log σ(m - Δ)  + η (r_w + r_l)²

    paper         code                      shape
    y_w, y_l      chosen, rejected          token ids, end tokens included
    r_θ(x, y)     reward_w, reward_l        (B,) the scalar head at the last token of the answer
    m             margin                    (B,) column `margin`, 0 without one (arXiv:2307.09288)
    p             p                         (B,) column `p`: probability that chosen is better, or 1
    η             center_rewards            keeps scores near 0 (arXiv:2312.09244)

The trunk starts from the SFT checkpoint, the head's weights at a standard deviation of
1/√(width+1). After the training the scores are shifted so that demonstrations average 0; only
differences were learned, so nothing else changes.

Models in memory: 1 (reward, trained). Data: (prompt, chosen, rejected).
Departures from the paper: 1. single pairs, not all pairs of 4 to 9 ranked answers; 2. a learning
rate for toy models.

    python reward_model.py                      film reviews; trains out/reviews/sft.pt if missing
    python reward_model.py --task exact         how far its scores are from the known reward
    python reward_model.py --task my.jsonl --init out/my/sft.pt

It ends with the accuracy on held-out pairs beside what the labels' noise allows.
"""

import statistics
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

import data
import training
from evaluate import printable, standard_error
from gpt import response_scores
from training import PairOptions, Run, opt, parse


def bradley_terry_loss(reward_w, reward_l, margin=0.0, p=1.0):
    """Negative log-likelihood of a preference. reward_w, reward_l: (B,) scores, whose differences
    are log-odds. margin: () or (B,), by how much w should win. p: () or (B,) in [0, 1], the
    probability that w is preferred. Returns (B,) losses, nats."""
    assert reward_w.shape == reward_l.shape and reward_w.dim() == 1, "two (B,) tensors"
    delta = reward_w - reward_l - margin
    return -p * F.logsigmoid(delta) - (1 - p) * F.logsigmoid(-delta)


@dataclass
class Options(PairOptions):
    center_rewards: float = opt(0.0, "η: weight of (r_w + r_l)² in the loss (TRL: 0.01)", low=0)
    max_new_tokens: int = opt(0, "not read: a reward model samples nothing", high=0)
    reference: str = opt("", "not read: a reward model has none", choices=("",))


PRESETS = {
    "any": dict(steps=300, lr=1e-3, eval_prompts=2048),
    "exact": dict(steps=1000, batch_size=4096, lr=2e-3, lr_schedule="linear"),
}


def compute_loss(reward, batch, o):
    """A micro-batch of B pairs -> (losses, metrics), each (B,): one entry a pair."""
    reward_w, reward_l = response_scores(reward, batch).chunk(2)
    margin, p = (x.to(reward_w) for x in batch.columns)
    losses = bradley_terry_loss(reward_w, reward_l, margin, p)
    losses = losses + o.center_rewards * (reward_w + reward_l) ** 2

    reward_w, reward_l = reward_w.detach(), reward_l.detach()
    return losses, {
        "accuracy": reward_w > reward_l,
        "margin": reward_w - reward_l,
        "mean_reward": (reward_w + reward_l) / 2,
        "min_reward": torch.min(reward_w, reward_l),
        "max_reward": torch.max(reward_w, reward_l),
    }


def scores(reward, rows, run):
    """(prompt ids, response ids) rows -> (len(rows),) scores, on the CPU"""
    batch = partial(data.pad, device=run.device, ends=True)
    return run.scores(rows, lambda x: response_scores(reward, batch(x)), 512).cpu()


class HeldOut:
    """Held-out pairs, encoded before the training so that what does not fit is told then. On
    `exact` also every outcome."""

    def __init__(self, run, task):
        self.run, self.task = run, task
        o, fit = run.o, (run.tokenizer, run.block_size, run.o.truncate)
        self.texts = task.graded(o.eval_prompts, o.seed, split="test")
        self.pairs, note = data.encode(self.texts, *fit)
        data.say(note and f"held out: {note}")
        self.gold = task.size == 0 and not note  # a cut answer was never judged
        self.demonstrations, _ = data.encode(task.demonstrations(1024, o.seed), *fit)
        self.world = data.encode(task.rows, *fit)[0] if task.outcomes else []

    def center(self, reward):
        """Shifts the scores so that demonstrations average 0. -> what was subtracted"""
        shift = scores(reward, self.demonstrations, self.run).mean().item()
        with torch.no_grad():
            reward.head.bias -= shift
        return shift

    def measure(self, reward, n=None):
        """-> the figures of the first n pairs; gold figures where the task knows its reward"""
        pairs, texts = self.pairs[:n], self.texts[:n]
        score = scores(reward, [x[:2] for x in pairs] + [(x[0], x[2]) for x in pairs], self.run)
        delta = torch.sub(*score.chunk(2))
        p = torch.tensor([pair[4] for pair in pairs], dtype=score.dtype)
        agreed = torch.where(delta > 0, p, torch.where(delta < 0, 1 - p, 0.0))
        figures = {
            "accuracy": agreed.mean(),
            "accuracy_se": standard_error(agreed.mean(), len(pairs)),
            "margin": delta.mean(),
            "mean_reward": score.mean(),
        }
        figures |= {"min_reward": score.min(), "max_reward": score.max()}
        if self.gold:
            known = [self.task.preferred(*text[:3], {}) for text in texts]
            figures["accuracy_bound"] = statistics.fmean(max(x, 1 - x) for x in known)
            noise = sum(x * (1 - x) for x in known) ** 0.5 / len(known)
            figures["accuracy_bound_se"] = noise
        if self.world:
            error = scores(reward, self.world, self.run).double().view(self.task.r.shape)
            error = error - torch.from_numpy(self.task.r)
            d = torch.from_numpy(self.task.d)
            error = error - (d * error).sum(1, keepdim=True)  # up to a constant a prompt
            figures["rms"] = (d * error**2).sum(1).mean().sqrt()
        elif self.gold:
            rows = [x[:2] for x in texts] + [(x[0], x[2]) for x in texts]
            gold = torch.tensor([self.task.reward(*row) for row in rows], dtype=score.dtype)
            figures["correlation"] = torch.corrcoef(torch.stack([score, gold]))[0, 1]
        return {name: float(x) for name, x in figures.items()} | {"pairs": len(pairs)}

    def facts(self, figures):
        shift, template = figures["shift"], self.task.template
        return {"template": template, "reference": self.run.init, "shift": shift, "reward": None}

    def report(self, title, f):
        rows = [
            ("held-out preference accuracy", "accuracy"),
            ("margin, chosen - rejected", "margin"),
            ("score, mean", "mean_reward"),
            ("  least", "min_reward"),
            ("  greatest", "max_reward"),
            ("correlation with the gold reward", "correlation"),
            ("rms distance to r, by d(y|x)", "rms"),
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
            score = scores(self.run.models["reward"], [(prompt, y) for y in answers], self.run)
            for name, y, x in zip(("chosen", "rejected"), answers, score.tolist()):
                text = printable(self.run.tokenizer.decode(y)).replace("\n", "\n" + " " * 18 + "| ")
                print(f"  {name:>8} {x:6.2f} | {text}")
        print(flush=True)


def main(argv=None):
    o = parse(Options, argv, PRESETS)
    run = Run("reward_model", o)
    task = data.task(o.task, o.eval_file, o.strict)
    reward, tokenizer = run.load(o.init or run.stage("sft"), task, scalar=True)
    run.hold(reward=reward)

    batches = data.Batches(task.graded, o.pairs or task.size, tokenizer, run.block_size, o)
    held_out = HeldOut(run, task)
    optimizer = run.adamw(reward)

    for step in run.steps(batches, optimizer):
        pairs, extremes = batches[step], []
        weight = 1 / len(pairs)  # a mean over the step's pairs, however the step is cut
        for micro in run.micro_batches(pairs):
            batch = data.pad_pairs(micro, run.device, ends=True)
            with run.autocast():
                losses, metrics = compute_loss(reward, batch, o)
            run.backward((weight * losses).sum(), batch.tokens)
            extremes += [metrics.pop("min_reward").min(), metrics.pop("max_reward").max()]
            run.log(metrics | {"loss": losses}, weight)
        extremes = {"min_reward": run.least(extremes), "max_reward": run.greatest(extremes)}
        run.log(extremes)
        run.update(optimizer)
        run.evaluate(held_out, reward)

    run.finish(held_out, reward, shift=held_out.center(reward))


if __name__ == "__main__":
    training.command(main)

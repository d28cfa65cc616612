"""Reward model: a score for each response, from preferences (InstructGPT, arXiv:2203.02155).

    P(y_w ≻ y_l | x) = σ(r_θ(x, y_w) - r_θ(x, y_l))                           Bradley–Terry
    Δ    = r_θ(x, y_w) - r_θ(x, y_l)
    L(θ) = - p log σ(Δ - m) - (1-p) log σ(m - Δ)  + η (r_w + r_l)²

    paper         code                      shape
    y_w, y_l      chosen, rejected          token ids, end tokens included
    r_θ(x, y)     reward_w, reward_l        (B,) the scalar head at the last token of the answer
    m             margin                    (B,) column `margin`, 0 without one (arXiv:2307.09288)
    p             p                         (B,) column `p`, P(chosen is better), 1 without one
    η             center_rewards            keeps scores near 0 (arXiv:2312.09244)

The trunk starts from the SFT checkpoint; the head's weights are drawn with standard deviation
1/√(width+1). After training the scores are shifted so that demonstrations average 0. Only their
differences were learned, so the shift changes nothing else.

Models in memory: 1 (reward, trained). Data: (prompt, chosen, rejected).
Departures from the paper: 1. each row is a single pair, not all pairs of 4 to 9 ranked answers;
2. the default learning rates suit toy models.

    python reward_model.py                      film reviews; trains out/reviews/sft.pt if missing
    python reward_model.py --task exact         how far its scores are from the known reward
    python reward_model.py --task my.jsonl --init out/my/sft.pt

At its end the script prints the accuracy on held-out pairs, beside the best accuracy that the
noise of the labels allows.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

import data
import training
from gpt import response_scores
from training import PairOptions, Run, opt, parse
from training.distributed import total
from training.order import RewardEvaluator


def bradley_terry_loss(reward_w, reward_l, margin=0.0, p=1.0):
    """Negative log-likelihood of a preference. reward_w, reward_l: (B,) scores, whose difference is
    the log-odds that w is preferred. margin: () or (B,), by how much the score of w should be
    higher. p: () or (B,) in [0, 1], the probability that w is preferred. Returns (B,) losses in
    nats."""
    assert reward_w.shape == reward_l.shape and reward_w.dim() == 1, "two (B,) tensors"
    delta = reward_w - reward_l - margin
    return -p * F.logsigmoid(delta) - (1 - p) * F.logsigmoid(-delta)


@dataclass
class Options(PairOptions):
    center_rewards: float = opt(0.0, "η: weight of (r_w + r_l)² in the loss (paper: 0.01)", low=0)
    max_new_tokens: int = opt(0, "unused: a reward model samples nothing", high=0)
    reference: str = opt("", "unused: a reward model has no reference", choices=("",))
    loss_every: int = opt(0, "unused: --eval-every samples nothing", high=0)
    save: str = opt("whole", "unused: a reward model's head is trained whole", choices=("whole",))


PRESETS = {  # defaults for any task, for a kind of task, for an option's value; the last match wins
    "any": dict(steps=300, lr=1e-3, eval_prompts=2048),
    "exact": dict(steps=1000, batch_size=4096, lr=2e-3, lr_schedule="linear"),
}


def compute_loss(reward, batch, o):
    """A micro-batch of B pairs -> (losses, metrics), each (B,): one entry per pair."""
    reward_w, reward_l = response_scores(reward, batch).chunk(2)
    margin, p = batch.columns["margin"].to(reward_w), batch.columns["p"].to(reward_w)
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


def main(argv=None):
    o = parse(Options, argv, PRESETS)
    run = Run("reward_model", o)
    task = data.task(o.task, o.eval_file, o.strict)
    reward = run.load(o.init or run.stage("sft"), task, scalar=True)
    run.hold(reward=reward)

    batches = run.batches(task.graded, fixed=o.pairs)
    evaluator = RewardEvaluator(run, task)
    optimizer = run.adamw(reward)

    for step in run.steps(batches, optimizer):
        pairs, extremes = batches[step], []
        weight = 1 / len(pairs)  # a mean over the step's pairs, however the step is cut
        for micro in run.micro_batches(pairs):
            batch = data.pad_pairs(micro, run.device, ends=True)
            with run.autocast():
                losses, metrics = compute_loss(reward, batch, o)
            run.backward((weight * losses).sum(), tokens=batch.tokens)
            extremes += [metrics.pop("min_reward").min(), metrics.pop("max_reward").max()]
            run.log(metrics | {"loss": losses}, weight)
        found = torch.stack(extremes)
        run.log({"min_reward": total(found.min(), "MIN"), "max_reward": total(found.max(), "MAX")})
        run.update(optimizer)
        run.evaluate(evaluator, reward)

    run.finish(evaluator, reward, shift=evaluator.center(reward))


if __name__ == "__main__":
    training.command(main)

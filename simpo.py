"""SimPO: Simple Preference Optimization with a Reference-Free Reward (arXiv:2405.14734).

    L(θ) = - log σ( β/|y_w| log π_θ(y_w|x) - β/|y_l| log π_θ(y_l|x) - γ )

    paper                        code                        shape
    y_w, y_l                     chosen, rejected            token ids, end tokens included
    log π_θ(y|x)                 logp_w, logp_l              (B,) sums over response tokens, nats
    |y_w|, |y_l|                 len_w, len_l                (B,) response tokens, end included
    r = β/|y| log π_θ            reward_w, reward_l          (B,) the implicit reward
    β, γ                         beta, gamma                 the option is γ/β, nats per token

Models in memory: 1 (policy, trained). Data: (prompt, chosen, rejected).
Departures from the paper: 1. the default learning rates suit toy models; 2. --sft-weight w adds w
times the negative log-likelihood of the chosen answer, averaged over its tokens. CPO
(arXiv:2401.08417) has that term too, with γ = 0 and with sums instead of means. SimPO with the
term is known as CPO-SimPO: --sft-weight 1.

    python simpo.py --beta 2                    film reviews; trains out/reviews/sft.pt if missing
    python simpo.py --gamma-beta-ratio 0.25
    python simpo.py --task exact                40 outcomes: the distance to the known optimum π*
    python simpo.py --task my.jsonl --init out/my/sft.pt
"""

from dataclasses import dataclass
from functools import partial

import torch.nn.functional as F

import data
import training
from evaluate import Evaluator
from gpt import response_logprobs
from training import PairOptions, Run, opt, parse
from training.held_out import pair_accuracy


def simpo_loss(logp_w, logp_l, len_w, len_l, beta=2.0, gamma=1.0):
    """SimPO, arXiv:2405.14734. logp_*: (B,) log-probs of responses, sums over their tokens, in
    nats. len_*: (B,) response tokens. beta: β > 0. gamma: γ ≥ 0, the margin itself, not its ratio
    to β. Returns (B,) losses; for two equal answers the loss is -log σ(-γ)."""
    assert logp_w.shape == logp_l.shape == len_w.shape == len_l.shape, "four (B,) tensors"
    return -F.logsigmoid(beta * (logp_w / len_w - logp_l / len_l) - gamma)


@dataclass
class Options(PairOptions):
    beta: float = opt(2.0, "β: scale of the mean log-probs (paper: 2 to 2.5, later 10)", above=0)
    gamma_beta_ratio: float = opt(
        0.5, "γ/β: by how many nats per token chosen should lead (paper: 0.1 to 0.8)", low=0
    )
    sft_weight: float = opt(0.0, "weight of the mean NLL of chosen's tokens", low=0)


PRESETS = {  # defaults for any task, for a kind of task, for an option's value; the last match wins
    "any": dict(steps=150, lr=3e-4),
    "exact": dict(
        gamma_beta_ratio=0.25, steps=2000, batch_size=4096, lr=5e-4, lr_schedule="linear"
    ),
}


def compute_loss(policy, batch, o):
    """A micro-batch of B pairs -> (losses, metrics), each (B,): one entry per pair."""
    logp_w, logp_l = response_logprobs(policy, batch).chunk(2)  # (B,)
    len_w, len_l = batch.length.chunk(2)

    gamma = o.gamma_beta_ratio * o.beta
    losses = simpo_loss(logp_w, logp_l, len_w, len_l, o.beta, gamma)
    if o.sft_weight:
        losses = losses - o.sft_weight * logp_w / len_w

    reward_w = (o.beta * logp_w / len_w).detach()
    reward_l = (o.beta * logp_l / len_l).detach()
    return losses, {
        "rewards/chosen": reward_w,
        "rewards/rejected": reward_l,
        "rewards/margins": reward_w - reward_l,
        "rewards/accuracies": reward_w > reward_l,
        "logps/chosen": logp_w.detach(),
        "logps/rejected": logp_l.detach(),
    }


def held_out(task, o):
    return pair_accuracy(task, partial(compute_loss, o=o))


def main(argv=None):
    o = parse(Options, argv, PRESETS)
    run = Run("simpo", o)
    task = data.task(o.task, o.eval_file, o.strict)
    policy = run.load(o.init or run.stage("sft"), task)
    data.say(f"β = {o.beta:g}, γ = {o.gamma_beta_ratio * o.beta:g}")
    run.hold(policy=policy)

    batches = run.batches(task.preferences, fixed=o.pairs)
    evaluator = Evaluator(run, task, held_out=held_out(task, o))
    optimizer = run.adamw(policy)

    for step in run.steps(batches, optimizer):
        pairs = batches[step]
        weight = 1 / len(pairs)  # a mean over the step's pairs, however the step is cut
        for micro in run.micro_batches(pairs):
            batch = data.pad_pairs(micro, run.device)
            with run.autocast():
                losses, metrics = compute_loss(policy, batch, o)
            run.backward((weight * losses).sum(), tokens=batch.tokens)
            run.log(metrics | {"loss": losses}, weight)
        run.update(optimizer)
        run.evaluate(evaluator, policy)

    run.finish(evaluator, policy)


if __name__ == "__main__":
    training.command(main)

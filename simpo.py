"""SimPO: Simple Preference Optimization with a Reference-Free Reward (arXiv:2405.14734).

    L(θ) = - log σ( β/|y_w| log π_θ(y_w|x) - β/|y_l| log π_θ(y_l|x) - γ )

    paper                        code                        shape
    y_w, y_l                     chosen, rejected            responses with their end tokens
    log π_θ(y|x)                 logp_w, logp_l              (B,) sums over response tokens, nats
    |y_w|, |y_l|                 len_w, len_l                (B,) response tokens, end tokens included
    r(x,y) = β/|y| log π_θ       reward_w, reward_l          (B,) the implicit reward: no reference in it
    β, γ                         beta, gamma                 the option is the ratio γ/β, a margin in nats a token

Models in memory: 1 (the policy, trained). Data: (prompt, chosen, rejected).
Departures from the paper: 1. a learning rate for toy models; 2. --sft-weight adds the negative log-likelihood of the chosen
answer, a nat a token.

    python simpo.py --beta 2                                   reviews; makes out/reviews/sft.pt first where it is missing
    python simpo.py --gamma-beta-ratio 0.25
    python simpo.py --task exact                               40 outcomes a prompt: the distance to this loss's own optimum
    python simpo.py --task my.jsonl.gz --init out/my/sft.pt       rows of {"prompt", "chosen", "rejected"}

It ends with the gold reward before and after, the win rate against the starting checkpoint, the KL from it, and two samples of each.
"""
from dataclasses import dataclass

import torch.nn.functional as F

import common
import data
import memory
from common import Count, NonNegative, Positive, Whole
from evaluate import choose_yardstick, context, describe, open_checkpoint, reopen, report
from gpt import CheckpointError, save


def simpo_loss(logp_w, logp_l, len_w, len_l, beta=2.0, gamma=1.0):
    """SimPO, arXiv:2405.14734.
    logp_*: (B,) summed response log-probs in nats, end token included. len_*: (B,) response tokens. beta: β > 0; gamma: γ ≥ 0, the
    margin itself, not its ratio to β. Returns (B,) losses. Raises AssertionError if shapes differ. Equal answers: -log σ(-γ)."""
    assert logp_w.shape == logp_l.shape == len_w.shape == len_l.shape and logp_w.dim() == 1, "four (B,) tensors"
    return -F.logsigmoid(beta * (logp_w / len_w - logp_l / len_l) - gamma)


@dataclass
class Options(common.Options):
    beta: Positive = 2.0  # β: scale of the length-averaged log-probs (the paper: 2 to 2.5, later 10)
    gamma_beta_ratio: NonNegative = 0.5  # γ/β: by how many nats a token chosen should lead (the paper's runs: 0.1 to 0.8)
    sft_weight: NonNegative = 0.0  # weight of the NLL of the chosen answer, a mean over its tokens
    steps: Count = 150  # optimizer steps (default: %(default)s; of a file: one epoch)
    batch_size: Count = 32  # pairs an optimizer step
    pairs: Whole = 0  # size of the fixed set of preference pairs (0: fresh ones every step; of a file: all)
    lr: Positive = 3e-4  # AdamW learning rate at its peak; large models take 3e-7 to 1e-6
    on_exact = dict(gamma_beta_ratio=0.25, steps=2000, batch_size=4096, lr=5e-4, lr_schedule="linear")
    on_predict = dict(batch_size=2)


@common.command(CheckpointError, data.DataError)
def main(argv=None):
    o = common.parse(Options, argv)
    task, fixed = data.task(o.task, o.eval_file, o.strict), o.pairs or (None if common.is_file(o.task) else 0)
    run = common.Run(o, "simpo")
    init = o.init or common.stage("sft.py", o)
    policy, tokenizer, meta = open_checkpoint(init, o, task)
    gamma = o.gamma_beta_ratio * o.beta
    run.say(f"starts from {init}: {describe(meta)}\nβ = {o.beta:g}, γ = {gamma:g}")
    task.template, block_size = meta["template"], context(o, policy)
    batches = data.Batches(task.preferences, fixed, o.batch_size, o.seed, tokenizer, block_size, o.truncate)
    yardstick = choose_yardstick(run, task, tokenizer, block_size, o.max_new_tokens, o.truncate, "logp mean", aim=("simpo", vars(o)))
    for note in filter(None, [*task.notes, batches.note, *yardstick.notes]):
        run.say(note)

    policy = run.prepare(policy)
    policy.checkpoint_activations = o.checkpoint_activations
    optimizer = common.adamw(policy, o)
    run.begin(memory.Ledger(policy=policy), batches, policy=policy, optimizer=optimizer)

    for step in run.steps():
        pairs = batches[step]
        n = run.total(len(pairs))
        for micro in run.micro_batches(pairs):
            batch = data.pad(data.sides(micro), run.device)
            with run.autocast():
                logp = batch.spread(policy.logprobs(batch.ids, batch.mask, index=batch.index).sum(1))  # (2B,)
            size = batch.spread(batch.mask.sum(1))  # (2B,) response tokens, end tokens included
            losses = simpo_loss(*logp.chunk(2), *size.chunk(2), o.beta, gamma)  # (B,)
            if o.sft_weight:
                losses = losses - o.sft_weight * (logp / size).chunk(2)[0]
            loss = losses.sum() / n  # mean over the step's pairs
            loss.backward()

            reward_w, reward_l = (o.beta * logp / size).detach().chunk(2)
            logp_w, logp_l = logp.detach().chunk(2)
            run.tokens += batch.tokens
            run.add({
                "loss": loss, "rewards/chosen": reward_w.sum() / n, "rewards/rejected": reward_l.sum() / n,
                "rewards/margins": (reward_w - reward_l).sum() / n, "rewards/accuracies": (reward_w > reward_l).sum() / n,
                "logps/chosen": logp_w.sum() / n, "logps/rejected": logp_l.sum() / n,
            })  # fmt: skip
        run.update(step, policy, optimizer)
        if o.eval_every and (step + 1) % o.eval_every == 0:
            run.evaluated(step, yardstick.measure(policy, reopen(run, init), n=128)[0])

    final, samples = yardstick.measure(policy, reopen(run, init))
    save(policy, o.out, **run.facts(), tokenizer=tokenizer.meta, template=task.template, reference=init, implicit=yardstick.implicit,
         max_new_tokens=yardstick.max_new_tokens, reward=final.get("reward"))  # fmt: skip
    report(f"simpo on {o.task}", final, samples, task.bound)
    run.finish(final, forward={"policy": 1}, backward={"policy": 1})


if __name__ == "__main__":
    main()

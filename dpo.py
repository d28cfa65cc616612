"""DPO: Direct Preference Optimization (arXiv:2305.18290), with cDPO, robust DPO (arXiv:2403.00409) and IPO (arXiv:2310.12036).

    h(θ) = [log π_θ(y_w|x) - log π_ref(y_w|x)] - [log π_θ(y_l|x) - log π_ref(y_l|x)]

    DPO      L = - log σ(βh)
    cDPO     L = - (1-ε) log σ(βh) - ε log σ(-βh)                        --label-smoothing ε
    robust   L = [- (1-ε) log σ(βh) + ε log σ(-βh)] / (1-2ε)             --loss robust --flip ε
    IPO      L = (h - 1/(2τ))²                                           --loss ipo --tau τ

    paper                        code                        shape
    y_w, y_l                     chosen, rejected            responses with their end tokens
    log π_θ(y|x)                 logp_w, logp_l              (B,) sums over response tokens, nats (IPO: means)
    log π_ref(y|x)               ref_logp_w, ref_logp_l      (B,) the same, under the frozen reference
    r̂(x,y) = β log π_θ/π_ref     reward_w, reward_l          (B,) the implicit reward (IPO: τ in place of β)
    β, ε, τ                      beta, label_smoothing, flip, tau

Models in memory: 2 (the policy, trained; the reference, frozen), or 1 with --precompute-ref. Data: (prompt, chosen, rejected).
Departures from the papers: 1. AdamW with a cosine schedule for RMSprop; 2. a learning rate for toy models; 3. IPO takes h of
log-probs averaged over the response, as its authors' experiments did, and of sums with --ipo-sum; 4. --sft-weight adds
the negative log-likelihood of the chosen answer, a nat a token.

    python dpo.py --beta 0.1                                   reviews; makes out/reviews/sft.pt first where it is missing
    python dpo.py --loss ipo --tau 1
    python dpo.py --task exact                                 40 outcomes a prompt: the distance to the known optimum π*
    python dpo.py --pairs 2000 --epochs 4 --precompute-ref
    python dpo.py --task my.jsonl.gz --init out/my/sft.pt         rows of {"prompt", "chosen", "rejected"}

It ends with the gold reward before and after, the win rate against the reference, KL(π‖π_ref), and two samples of each.
"""
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F

import common
import data
import memory
from common import BelowHalf, Count, NonNegative, Positive, Whole
from evaluate import choose_yardstick, context, describe, open_checkpoint, reopen, report
from gpt import CheckpointError, save


def dpo_loss(logp_w, logp_l, ref_logp_w, ref_logp_l, beta=0.1, label_smoothing=0.0):
    """DPO, Eq. 7 of arXiv:2305.18290; with label_smoothing ε in [0, 0.5) cDPO, whose gradient is 0 at βh = log((1-ε)/ε).
    logp_*, ref_logp_*: (B,) summed response log-probs in nats, end token included. beta: β > 0, 1/nats.
    Returns (B,) losses. Raises AssertionError if shapes differ. At logp = ref_logp the loss is log 2, for every ε."""
    h = log_ratio(logp_w, logp_l, ref_logp_w, ref_logp_l)
    return -(1 - label_smoothing) * F.logsigmoid(beta * h) - label_smoothing * F.logsigmoid(-beta * h)


def robust_dpo_loss(logp_w, logp_l, ref_logp_w, ref_logp_l, beta=0.1, flip=0.1):
    """Robust DPO (arXiv:2403.00409): unbiased for the DPO loss of clean labels, where each is flipped with probability ε.
    Arguments as in dpo_loss; flip: ε in [0, 0.5). Returns (B,) losses, which may be negative. At logp = ref_logp it is log 2."""
    h = log_ratio(logp_w, logp_l, ref_logp_w, ref_logp_l)
    return (-(1 - flip) * F.logsigmoid(beta * h) + flip * F.logsigmoid(-beta * h)) / (1 - 2 * flip)


def ipo_loss(logp_w, logp_l, ref_logp_w, ref_logp_l, tau=0.1):
    """IPO, Eq. 17 of arXiv:2310.12036: (h - 1/(2τ))². logp_*, ref_logp_*: (B,) means over response tokens (or sums: then τ is
    another scale). tau: τ > 0. Returns (B,) losses. The minimum is at h = 1/(2τ); at logp = ref_logp the loss is 1/(4τ²)."""
    return (log_ratio(logp_w, logp_l, ref_logp_w, ref_logp_l) - 1 / (2 * tau)) ** 2


def log_ratio(logp_w, logp_l, ref_logp_w, ref_logp_l):
    """h, (B,): how much further the policy has moved the chosen answers than the rejected ones, in nats."""
    assert logp_w.shape == logp_l.shape == ref_logp_w.shape == ref_logp_l.shape and logp_w.dim() == 1, "four (B,) tensors"
    return (logp_w - ref_logp_w) - (logp_l - ref_logp_l)


READS = {"dpo": {"beta", "label_smoothing"}, "robust": {"beta", "flip"}, "ipo": {"tau", "ipo_sum"}}


@dataclass
class Options(common.Options):
    beta: Positive = 0.1  # β: strength of the KL penalty to π_ref, 1/nats (the paper: 0.1, for TL;DR 0.5)
    loss: Literal["dpo", "robust", "ipo"] = "dpo"  # dpo (with --label-smoothing: cDPO), robust or ipo
    label_smoothing: BelowHalf = 0.0  # ε of cDPO: the share of labels taken to be wrong
    flip: BelowHalf = 0.1  # ε of robust DPO: the probability that a label was flipped
    tau: Positive = 1.0  # τ of IPO: the target of h is 1/(2τ), nats a token (with --ipo-sum: nats a response)
    ipo_sum: bool = False  # IPO on summed log-probs, as its Eq. 17 reads, not on their means over the response
    sft_weight: NonNegative = 0.0  # weight of the NLL of the chosen answer, a mean over its tokens (Llama 3: 0.2)
    precompute_ref: bool = False  # run the reference once over the fixed set, then drop it: one model in memory
    steps: Count = 150  # optimizer steps (default: %(default)s; of a file: one epoch)
    batch_size: Count = 32  # pairs an optimizer step
    pairs: Whole = 0  # size of the fixed set of preference pairs (0: fresh ones every step; of a file: all)
    lr: Positive = 3e-4  # AdamW learning rate at its peak; large models take 5e-7 to 1e-5
    on_exact = dict(beta=0.5, tau=0.3, steps=2000, batch_size=4096, lr=5e-4, lr_schedule="linear")
    on_predict = dict(batch_size=2)


@torch.no_grad()
def with_reference(ref, pairs, run):
    """-> pairs with their reference log-probs: (prompt, chosen, rejected, (ref_logp_w, ref_logp_l))"""
    if run.predict:
        return [(*pair, (0.0, 0.0)) for pair in pairs]
    out = []
    for micro in run.micro_batches(pairs):
        batch = data.pad(data.sides(micro), run.device)
        with run.autocast():
            logp = batch.spread(ref.logprobs(batch.ids, batch.mask, index=batch.index).sum(1))
        out += [(*pair, both) for pair, both in zip(micro, logp.view(2, -1).T.tolist())]
    return out


@common.command(CheckpointError, data.DataError)
def main(argv=None):
    o = common.parse(Options, argv)
    common.refuse_unread(o, "loss", READS)
    task, fixed = data.task(o.task, o.eval_file, o.strict), o.pairs or (None if common.is_file(o.task) else 0)
    run = common.Run(o, "dpo")
    if o.precompute_ref and fixed == 0:
        raise common.UserError("--precompute-ref needs a fixed set: give --pairs N, or a file as the task")
    init = o.init or common.stage("sft.py", o)
    policy, tokenizer, meta = open_checkpoint(init, o, task)
    run.say(f"π_ref is {init}: {describe(meta)}")
    task.template, block_size, mean = meta["template"], context(o, policy), o.loss == "ipo" and not o.ipo_sum
    batches = data.Batches(task.preferences, fixed, o.batch_size, o.seed, tokenizer, block_size, o.truncate)
    implicit = "mean" if mean else "sum"
    yardstick = choose_yardstick(run, task, tokenizer, block_size, o.max_new_tokens, o.truncate, implicit, aim=("dpo", vars(o)))
    for note in filter(None, [*task.notes, batches.note, *yardstick.notes]):
        run.say(note)

    policy = run.prepare(policy)
    policy.checkpoint_activations = o.checkpoint_activations
    ref = run.frozen(policy)
    if o.precompute_ref:
        batches.rows, ref = with_reference(ref, batches.rows, run), None
    optimizer = common.adamw(policy, o)
    loss_fn = {"dpo": partial(dpo_loss, beta=o.beta, label_smoothing=o.label_smoothing),
               "robust": partial(robust_dpo_loss, beta=o.beta, flip=o.flip), "ipo": partial(ipo_loss, tau=o.tau)}[o.loss]  # fmt: skip
    scale = o.tau if o.loss == "ipo" else o.beta  # of the implicit reward, scale · log π/π_ref
    run.begin(memory.Ledger(policy=policy, ref=ref), batches, policy=policy, optimizer=optimizer)

    for step in run.steps():
        pairs = batches[step]
        n = run.total(len(pairs))
        for micro in run.micro_batches(pairs):
            batch = data.pad(data.sides(micro), run.device)
            with run.autocast():
                logp = batch.spread(policy.logprobs(batch.ids, batch.mask, index=batch.index).sum(1))  # (2B,)
                if o.precompute_ref:
                    ref_logp = torch.tensor([row[3] for row in micro], dtype=logp.dtype, device=run.device).T.flatten()
                else:
                    with torch.no_grad():
                        ref_logp = batch.spread(ref.logprobs(batch.ids, batch.mask, index=batch.index).sum(1))
            size = batch.spread(batch.mask.sum(1))  # (2B,) response tokens, end tokens included
            used, ref_used = (logp / size, ref_logp / size) if mean else (logp, ref_logp)
            losses = loss_fn(*used.chunk(2), *ref_used.chunk(2))  # (B,)
            if o.sft_weight:
                losses = losses - o.sft_weight * (logp / size).chunk(2)[0]
            loss = losses.sum() / n  # mean over the step's pairs
            loss.backward()

            reward_w, reward_l = (scale * (used - ref_used)).detach().chunk(2)
            logp_w, logp_l = logp.detach().chunk(2)
            run.tokens += batch.tokens
            run.add({
                "loss": loss, "rewards/chosen": reward_w.sum() / n, "rewards/rejected": reward_l.sum() / n,
                "rewards/margins": (reward_w - reward_l).sum() / n, "rewards/accuracies": (reward_w > reward_l).sum() / n,
                "logps/chosen": logp_w.sum() / n, "logps/rejected": logp_l.sum() / n,
            })  # fmt: skip
        run.update(step, policy, optimizer)
        if o.eval_every and (step + 1) % o.eval_every == 0:
            run.evaluated(step, yardstick.measure(policy, ref or reopen(run, init), n=128)[0])

    final, samples = yardstick.measure(policy, ref or reopen(run, init))
    save(policy, o.out, **run.facts(), tokenizer=tokenizer.meta, template=task.template, reference=init, implicit=yardstick.implicit,
         max_new_tokens=yardstick.max_new_tokens, reward=final.get("reward"))  # fmt: skip
    report(f"dpo on {o.task}", final, samples, task.bound)
    run.finish(final, forward={"policy": 1, "ref": int(not o.precompute_ref)}, backward={"policy": 1})


if __name__ == "__main__":
    main()

"""KTO: Model Alignment as Prospect Theoretic Optimization (arXiv:2402.01306).

    r(x,y) = log π_θ(y|x) - log π_ref(y|x)
    ẑ      = max(0, mean_i r(x_i, y_j(i)))    over mismatched pairs: y_j(i) answers another prompt
    L(θ)   = λ_D (1 - σ(β (r - ẑ)))           if y is desirable
             λ_U (1 - σ(β (ẑ - r)))           if it is not

    paper                        code                        shape
    x, y                         prompt, completion          token ids, end token included
    log π_θ(y|x), log π_ref      logp, ref_logp              (B,) sums over response tokens, nats
    desirable                    desirable                   (B,) bool, the row's label
    z_0, here ẑ                  kl                          () one number for the whole step
    λ_D, λ_U                     w_desirable, w_undesirable  weights of the two classes
    β                            beta                        1/nats

No gradient flows through ẑ. It is measured on the whole batch before the step, so the size of the
micro-batches does not change it. Prompt i is combined with the answer of the next row that has
another prompt. If all rows of the batch have the same prompt, there is no such row, and ẑ is 0.

Models in memory: 2 (policy, trained; ref, frozen). Data: (prompt, completion, label), not in pairs;
a file of n pairs becomes 2n examples.
Departures from the paper: 1. AdamW, with default learning rates that suit toy models; 2. the
authors' code takes as j(i) the next row of a micro-batch, this script the next row of the batch
with another prompt.

    python kto.py --beta 0.1                    film reviews; trains out/reviews/sft.pt if missing
    python kto.py --pairs 2000 --epochs 4       a fixed set of 2,000 examples
    python kto.py --task exact                  40 outcomes: the distance to the known optimum π*
    python kto.py --task my.jsonl --init out/my/sft.pt
"""

from dataclasses import dataclass
from functools import partial

import torch

import data
import training
from data import UserError
from evaluate import Evaluator
from gpt import response_logprobs
from training import PairOptions, Run, opt, parse
from training.labels import label_accuracy


def kto_loss(logp, ref_logp, desirable, kl, beta=0.1, w_desirable=1.0, w_undesirable=1.0):
    """KTO, arXiv:2402.01306. logp, ref_logp: (B,) log-probs of responses, sums over their tokens,
    in nats. desirable: (B,) bool. kl: () the reference point ẑ ≥ 0, nats. beta: β > 0, 1/nats.
    w_*: λ_D, λ_U. Returns (B,) losses in (0, λ); at logp = ref_logp and ẑ = 0 each is λ/2."""
    assert logp.shape == ref_logp.shape == desirable.shape and logp.dim() == 1, "three (B,) tensors"
    a = beta * (logp - ref_logp - kl)
    # 1 - σ(a) = σ(-a)
    return torch.where(desirable, w_desirable * torch.sigmoid(-a), w_undesirable * torch.sigmoid(a))


def kto_kl(logp_mismatched, ref_logp_mismatched):
    """ẑ of the step's mismatched pairs. logp_*, ref_logp_*: (M,) log-probs of answers to other
    prompts, sums over their tokens; M may be 0. Returns a scalar ≥ 0 in nats, without gradient."""
    ratio = (logp_mismatched - ref_logp_mismatched).detach()
    return ratio.sum().div(max(1, len(ratio))).clamp(min=0)


@dataclass
class Options(PairOptions):
    beta: float = opt(0.1, "β: how soon gains and losses saturate, 1/nats", above=0)
    w_desirable: float = opt(1.0, "λ_D: weight of desirable examples", above=0)
    w_undesirable: float = opt(1.0, "λ_U: weight of undesirable examples", above=0)
    batch_size: int = opt(64, "examples per optimizer step", low=2)


PRESETS = {  # defaults for any task, for a kind of task, for an option's value; the last match wins
    "any": dict(steps=150, lr=3e-4),
    "exact": dict(beta=0.5, steps=2000, batch_size=4096, lr=5e-4, lr_schedule="linear"),
}


def compute_loss(policy, ref, batch, o, kl=0.0):
    """A micro-batch of B examples -> (losses, metrics), each (B,): one entry per example."""
    logp = response_logprobs(policy, batch)  # (B,)
    with torch.no_grad():
        ref_logp = response_logprobs(ref, batch)
    desirable = batch.columns["label"].to(logp.device)

    losses = kto_loss(logp, ref_logp, desirable, kl, o.beta, o.w_desirable, o.w_undesirable)
    reward = (o.beta * (logp - ref_logp)).detach()
    return losses, {"rewards": reward, "logps": logp.detach()}


def held_out(task, o):
    return label_accuracy(task, partial(compute_loss, o=o))


def reference_point(policy, ref, rows, run):
    """-> ẑ of the step, measured before the step trains"""

    def both(micro):
        batch = data.pad(micro, run.device)
        return torch.stack([response_logprobs(model, batch) for model in (policy, ref)], 1)

    rows = data.mismatched(rows, run.block_size)
    return kto_kl(*run.scores(rows, both).view(len(rows), 2).T)


def check(rows, batches, o):
    """Refuses rows that all have the same prompt, for which there is no ẑ. Warns of batches with
    one prompt, whose ẑ is 0. Warns also if λ_D n_D / (λ_U n_U) is outside [1, 4/3], the range in
    the paper's first version and in TRL (the paper now says [1, 3/2]). rows: the fixed set, or a
    sample of fresh rows, whose ratio may miss the range by three standard errors."""
    fixed, n, n_D = batches.rows, len(rows), sum(row[2] for row in rows)
    if fixed and all(x == rows[0][0] for x, *_ in rows):
        needs = "but ẑ needs answers to other prompts; add rows, or raise --pairs"
        raise UserError(f"the training rows have one prompt only, {needs}")
    steps = batches.per_epoch or 0
    alone = sum(len({x for x, *_ in batches[step]}) == 1 for step in range(steps))
    if alone:
        hold = f"{alone} of {steps} batches hold one prompt only, and ẑ is 0 there"
        data.say(f"warning: {hold}; a larger --batch-size mixes prompts")
    if n_D in (0, n):
        kind = "desirable" if n_D else "undesirable"
        data.say(f"warning: all {n} examples are {kind}; KTO is meant for both kinds")
        return
    slack = 0 if fixed else 6 / n**0.5
    ratio = o.w_desirable * n_D / (o.w_undesirable * (n - n_D))
    if not 1 - slack <= ratio <= 4 / 3 + slack:
        counts = f"{n_D} desirable and {n - n_D} undesirable examples"
        counts += "" if fixed else " of a sample"
        words = f"make λ_D n_D / (λ_U n_U) = {ratio:.3g}, outside [1, 4/3] (paper, v1)"
        remedy = f"--w-desirable {1.15 * o.w_desirable / ratio:.2g} would balance it"
        data.say(f"warning: {counts} {words}; {remedy}")


def log_classes(run, metrics, is_desirable, n_D, n):
    """Logs the metrics as means over the n_D desirable examples of the step ("chosen") and over
    the others ("rejected"). A class without examples is left out."""
    chosen, rejected = is_desirable / max(1, n_D), (1 - is_desirable) / max(1, n - n_D)
    if n_D:
        run.log({f"{name}/chosen": x for name, x in metrics.items()}, chosen)
    if n > n_D:
        run.log({f"{name}/rejected": x for name, x in metrics.items()}, rejected)
    if 0 < n_D < n:
        run.log({"rewards/margins": metrics["rewards"]}, chosen - rejected)


def main(argv=None):
    o = parse(Options, argv, PRESETS)
    run = Run("kto", o)
    task = data.task(o.task, o.eval_file, o.strict)
    policy = run.load(o.init or run.stage("sft"), task)
    ref = run.reference(policy)
    run.hold(policy=policy, ref=ref)

    batches = run.batches(task.feedback, fixed=o.pairs)
    check(batches.rows or task.feedback(4096, o.seed), batches, o)
    evaluator = Evaluator(run, task, held_out=held_out(task, o))
    optimizer = run.adamw(policy)

    for step in run.steps(batches, optimizer):
        rows = batches[step]
        kl = reference_point(policy, ref, rows, run)
        run.log({"kl": kl})
        desirable = sum(label for _, _, label in rows)  # n_D of the step
        for micro in run.micro_batches(rows):
            batch = data.pad(micro, run.device)
            with run.autocast():
                losses, metrics = compute_loss(policy, ref, batch, o, kl)
            # a mean over all examples of the step: the counts of the classes act as weights
            run.backward((losses / len(rows)).sum(), tokens=batch.tokens)
            run.log({"loss": losses}, 1 / len(rows))
            is_desirable = batch.columns["label"].to(losses)
            log_classes(run, metrics, is_desirable, desirable, len(rows))
        run.update(optimizer)
        run.evaluate(evaluator, policy)

    run.finish(evaluator, policy)


if __name__ == "__main__":
    training.command(main)

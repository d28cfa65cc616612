"""KTO: Model Alignment as Prospect Theoretic Optimization (arXiv:2402.01306).

    r(x,y) = log π_θ(y|x) - log π_ref(y|x)
    ẑ      = max(0, mean_i r(x_i, y_j(i)))    of mismatched pairs: the answer to another prompt
    L(θ)   = λ_D (1 - σ(β (r - ẑ)))           if y is desirable
             λ_U (1 - σ(β (ẑ - r)))           if it is not

    paper                        code                        shape
    x, y                         prompt, completion          token ids, end token included
    log π_θ(y|x), log π_ref      logp, ref_logp              (B,) sums over response tokens, nats
    desirable                    desirable                   (B,) bool, the row's label
    z_0, here ẑ                  kl                          () one for all examples of the step
    λ_D, λ_U                     w_desirable, w_undesirable  weights of the two classes
    β                            beta                        1/nats

ẑ has no gradient. It is measured before the step on the whole batch, so that micro-batches change
nothing. Row i takes the answer of the next row with another prompt; it is left out where the batch
holds no other prompt.

Models in memory: 2 (policy, trained; ref, frozen). Data: (prompt, completion, label), not in pairs;
a file of pairs is split into 2n examples.
Departures from the paper: 1. AdamW with a learning rate for toy models; 2. the authors' code shifts
by one row within a micro-batch; here over the step's batch, and never to an equal prompt.

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


def kto_loss(logp, ref_logp, desirable, kl, beta=0.1, w_desirable=1.0, w_undesirable=1.0):
    """KTO, arXiv:2402.01306. logp, ref_logp: (B,) log-probs of responses, sums over their tokens,
    in nats. desirable: (B,) bool. kl: () the reference point ẑ ≥ 0, nats. beta: β > 0, 1/nats.
    w_*: λ_D, λ_U. Returns (B,) losses, each in (0, λ). At logp = ref_logp and ẑ = 0 it is λ/2."""
    assert logp.shape == ref_logp.shape == desirable.shape and logp.dim() == 1, "three (B,) tensors"
    a = beta * (logp - ref_logp - kl)
    # 1 - σ(a) = σ(-a)
    return torch.where(desirable, w_desirable * torch.sigmoid(-a), w_undesirable * torch.sigmoid(a))


def kto_kl(logp_mismatched, ref_logp_mismatched):
    """ẑ of the whole step's mismatched pairs. logp_*: (M,) log-probs of answers to other prompts,
    sums over their tokens; M may be 0. Returns a scalar ≥ 0 without gradient, nats."""
    ratio = (logp_mismatched - ref_logp_mismatched).detach()
    return ratio.sum().div(max(1, len(ratio))).clamp(min=0)


@dataclass
class Options(PairOptions):
    beta: float = opt(0.1, "β: how soon a gain or a loss saturates, 1/nats", above=0)
    w_desirable: float = opt(1.0, "λ_D: weight of desirable examples", above=0)
    w_undesirable: float = opt(1.0, "λ_U: weight of undesirable ones", above=0)
    batch_size: int = opt(64, "examples an optimizer step", low=2)


PRESETS = {
    "any": dict(steps=150, lr=3e-4),
    "exact": dict(beta=0.5, steps=2000, batch_size=4096, lr=5e-4, lr_schedule="linear"),
}


def compute_loss(policy, ref, batch, o, kl=0.0):
    """A micro-batch of B examples -> (losses, metrics), each (B,): one entry an example."""
    logp = response_logprobs(policy, batch)  # (B,)
    with torch.no_grad():
        ref_logp = response_logprobs(ref, batch)
    desirable = batch.columns[0].to(logp.device)

    losses = kto_loss(logp, ref_logp, desirable, kl, o.beta, o.w_desirable, o.w_undesirable)
    reward = (o.beta * (logp - ref_logp)).detach()
    return losses, {"rewards": reward, "logps": logp.detach()}


def reference_point(policy, ref, rows, run):
    """-> ẑ of the step, before any of it is trained on"""

    def both(micro):
        batch = data.pad(micro, run.device)
        return torch.stack([response_logprobs(model, batch) for model in (policy, ref)], 1)

    rows = data.mismatched(rows, run.block_size)
    return kto_kl(*run.scores(rows, both).view(len(rows), 2).T)


def check(rows, fixed, o):
    """Refuses rows of a single prompt, where there is no ẑ, and warns where λ_D n_D / (λ_U n_U)
    leaves [1, 4/3]. rows: the fixed set, or a sample, which spares three standard errors."""
    if fixed and all(x == rows[0][0] for x, *_ in rows):
        needs = "and ẑ needs an answer to another; add rows, or raise --pairs"
        raise UserError(f"the training rows have one prompt only, {needs}")
    n, desirable = len(rows), sum(row[2] for row in rows)
    if desirable in (0, n):
        kind = "desirable" if desirable else "undesirable"
        data.say(f"warning: all {n} examples are {kind}; KTO is meant for both kinds")
        return
    slack = 0 if fixed else 6 / n**0.5
    ratio = o.w_desirable * desirable / (o.w_undesirable * (n - desirable))
    if not 1 - slack <= ratio <= 4 / 3 + slack:
        counts = f"{desirable} desirable and {n - desirable} undesirable examples"
        counts += "" if fixed else " of a sample"
        remedy = f"--w-desirable {1.15 * o.w_desirable / ratio:.2g} would balance it"
        words = f"make λ_D n_D / (λ_U n_U) = {ratio:.3g}, outside [1, 4/3]"
        data.say(f"warning: {counts} {words}; {remedy}")


def check_batches(batches):
    """Warns where batches of a fixed set hold one prompt alone: nothing is mismatched there, and ẑ
    is 0."""
    n = batches.per_epoch or 0
    alone = sum(len({x for x, *_ in batches[step]}) == 1 for step in range(n))
    if alone:
        remedy = "a larger --batch-size mixes prompts"
        data.say(
            f"warning: {alone} of {n} batches hold one prompt only, and ẑ is 0 there; {remedy}"
        )


def main(argv=None):
    o = parse(Options, argv, PRESETS)
    run = Run("kto", o)
    task = data.task(o.task, o.eval_file, o.strict)
    policy, tokenizer = run.load(o.init or run.stage("sft"), task)
    ref = run.reference(policy)
    run.hold(policy=policy, ref=ref)

    batches = data.Batches(task.feedback, o.pairs or task.size, tokenizer, run.block_size, o)
    check(batches.rows or task.feedback(4096, o.seed), batches.rows, o)
    check_batches(batches)
    held_out = task.feedback, partial(compute_loss, o=o)
    evaluator = Evaluator(run, task, ref, held_out=held_out)
    optimizer = run.adamw(policy)

    for step in run.steps(batches, optimizer):
        rows = batches[step]
        kl = reference_point(policy, ref, rows, run)
        run.log({"kl": kl})
        desirable = sum(label for _, _, label in rows)
        for micro in run.micro_batches(rows):
            batch = data.pad(micro, run.device)
            with run.autocast():
                losses, metrics = compute_loss(policy, ref, batch, o, kl)
            # a mean over all examples of the step: the counts of the classes act as weights
            run.backward((losses / len(rows)).sum(), batch.tokens)
            run.log({"loss": losses}, 1 / len(rows))
            is_desirable = batch.columns[0].to(losses.device)
            sides = (
                ("chosen", is_desirable, desirable),
                ("rejected", ~is_desirable, len(rows) - desirable),
            )
            for name, side, count in sides:
                if count:  # a class may be absent from a step
                    means = {f"{key}/{name}": x for key, x in metrics.items()}
                    run.log(means, side / count)
        if 0 < desirable < len(rows):
            chosen, rejected = run.sums["rewards/chosen"], run.sums["rewards/rejected"]
            run.log({"rewards/margins": chosen - rejected})
        run.update(optimizer)
        run.evaluate(evaluator, policy)

    run.finish(evaluator, policy, forward={"policy": 2, "ref": 2})


if __name__ == "__main__":
    training.command(main)

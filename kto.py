"""KTO: Model Alignment as Prospect Theoretic Optimization (arXiv:2402.01306).

    r(x,y) = log π_θ(y|x) - log π_ref(y|x)
    ẑ      = max(0, mean_i r(x_i, y_j(i)))                   of mismatched pairs: the answer to another prompt; no gradient
    L(θ)   = λ_D (1 - σ(β (r - ẑ)))  if y is desirable,      λ_U (1 - σ(β (ẑ - r)))  if it is not

    paper                        code                        shape
    x, y                         prompt, completion          the response with its end token
    log π_θ(y|x), log π_ref      logp, ref_logp              (B,) sums over response tokens, nats
    desirable                    desirable                   (B,) bool, the row's label
    z_0, here ẑ                  kl                          () one reference point for all examples of the step
    λ_D, λ_U                     w_desirable, w_undesirable  weights of the two classes
    β                            beta

ẑ is measured before the step on the whole batch, so that micro-batches change nothing; row i takes the answer of the next row
with another prompt, and is left out where the batch holds no other prompt.

Models in memory: 2 (the policy, trained; the reference, frozen). Data: (prompt, completion, label), not in pairs; a file of pairs is
split into 2n examples. Departures from the paper: 1. AdamW with a learning rate for toy models; 2. the authors' code shifts by one
row within a micro-batch; here over the step's batch, and never to an equal prompt.

    python kto.py --beta 0.1                                   reviews; makes out/reviews/sft.pt first where it is missing
    python kto.py --pairs 2000 --epochs 4                      a fixed set of 2,000 examples
    python kto.py --task exact                                 40 outcomes a prompt: the distance to this loss's own limit
    python kto.py --task my.jsonl.gz --init out/my/sft.pt         rows of {"prompt", "completion", "label"}

It ends with the gold reward before and after, the win rate against the reference, KL(π‖π_ref), and two samples of each.
"""
from dataclasses import dataclass

import torch

import common
import data
import memory
from common import Count, Positive, Whole
from evaluate import choose_yardstick, context, describe, open_checkpoint, report
from gpt import CheckpointError, save


def kto_loss(logp, ref_logp, desirable, kl, beta=0.1, w_desirable=1.0, w_undesirable=1.0):
    """KTO, arXiv:2402.01306. logp, ref_logp: (B,) summed response log-probs in nats, end token included. desirable: (B,) bool.
    kl: () the reference point ẑ ≥ 0, nats. beta: β > 0, 1/nats. w_*: λ_D, λ_U. Returns (B,) losses, each in (0, λ).
    Raises AssertionError if shapes differ. At logp = ref_logp and ẑ = 0 the loss is λ/2."""
    assert logp.shape == ref_logp.shape == desirable.shape and logp.dim() == 1, "three (B,) tensors"
    gain = beta * (logp - ref_logp - kl)
    return torch.where(desirable, w_desirable * torch.sigmoid(-gain), w_undesirable * torch.sigmoid(gain))  # 1 - σ(a) = σ(-a)


def kto_kl(logp_mismatched, ref_logp_mismatched):
    """ẑ of the whole step's mismatched pairs. logp_*: (M,) summed log-probs of answers to other prompts, M may be 0.
    Returns a scalar ≥ 0 without gradient, nats."""
    ratio = (logp_mismatched - ref_logp_mismatched).detach()
    return ratio.sum().div(max(1, len(ratio))).clamp(min=0)


@dataclass
class Options(common.Options):
    beta: Positive = 0.1  # β: how soon a gain or a loss saturates, 1/nats (the paper: 0.01 to 0.1 after SFT on the same data)
    w_desirable: Positive = 1.0  # λ_D: weight of desirable examples
    w_undesirable: Positive = 1.0  # λ_U: weight of undesirable ones; λ_D n_D / (λ_U n_U) should lie in [1, 4/3]
    steps: Count = 150  # optimizer steps (default: %(default)s; of a file: one epoch)
    batch_size: Count = 64  # examples an optimizer step
    pairs: Whole = 0  # size of the fixed set, in examples (0: fresh ones every step; of a file: all)
    lr: Positive = 3e-4  # AdamW learning rate at its peak; large models take 5e-7 to 5e-6
    on_exact = dict(beta=0.5, steps=2000, batch_size=4096, lr=5e-4, lr_schedule="linear")
    on_predict = dict(batch_size=4)


def imbalance(rows, o, fixed):
    """-> a warning where λ_D n_D / (λ_U n_U) leaves [1, 4/3], or ""; of fresh rows a sample is counted, and three standard errors
    are spared."""
    n, desirable = len(rows), sum(row[2] for row in rows)
    if desirable in (0, n):
        return f"warning: all {n} examples are {'desirable' if desirable else 'undesirable'}; KTO is meant for both kinds"
    slack = 0 if fixed != 0 else 6 / n**0.5
    ratio = o.w_desirable * desirable / (o.w_undesirable * (n - desirable))
    if 1 - slack <= ratio <= 4 / 3 + slack:
        return ""
    sample, fitting = " of a sample" * (fixed == 0), 1.15 * o.w_desirable / ratio
    return (f"warning: {desirable} desirable and {n - desirable} undesirable examples{sample} make λ_D n_D / (λ_U n_U) = {ratio:.3g}, "
            f"outside [1, 4/3]; --w-desirable {fitting:.2g} would balance it")  # fmt: skip


@torch.no_grad()
def reference_point(policy, ref, rows, block_size, run):
    """-> ẑ of the step, before any of it is trained on"""
    logps = [], []
    for micro in run.micro_batches(data.mismatched(rows, block_size)):
        batch = data.pad(micro, run.device)
        with run.autocast():
            for model, out in zip((policy, ref), logps):
                out.append(batch.spread(model.logprobs(batch.ids, batch.mask, index=batch.index).sum(1)))
    return kto_kl(*(torch.cat(out) if out else torch.zeros(0, device=run.device) for out in logps))


@common.command(CheckpointError, data.DataError)
def main(argv=None):
    o = common.parse(Options, argv)
    task, fixed = data.task(o.task, o.eval_file, o.strict), o.pairs or (None if common.is_file(o.task) else 0)
    run = common.Run(o, "kto")
    if o.batch_size == 1:
        raise common.UserError("--batch-size 1: ẑ needs the answer to another prompt, so at least 2 examples a step")
    init = o.init or common.stage("sft.py", o)
    policy, tokenizer, meta = open_checkpoint(init, o, task)
    run.say(f"π_ref is {init}: {describe(meta)}")
    task.template, block_size = meta["template"], context(o, policy)
    batches = data.Batches(task.feedback, fixed, o.batch_size, o.seed, tokenizer, block_size, o.truncate)
    if batches.rows and len({x for x, _, _ in batches.rows}) == 1:
        raise common.UserError("the training rows have one prompt only, and ẑ needs an answer to another; add rows, or raise --pairs")
    yardstick = choose_yardstick(run, task, tokenizer, block_size, o.max_new_tokens, o.truncate, "sum", aim=("kto", vars(o)))
    warning = imbalance(batches.rows or task.feedback(4096, o.seed), o, fixed)
    for note in filter(None, [*task.notes, batches.note, *yardstick.notes, warning]):
        run.say(note)

    policy = run.prepare(policy)
    policy.checkpoint_activations = o.checkpoint_activations
    ref = run.frozen(policy)
    optimizer = common.adamw(policy, o)
    run.begin(memory.Ledger(policy=policy, ref=ref), batches, policy=policy, optimizer=optimizer)

    for step in run.steps():
        rows = batches[step]
        n = run.total(len(rows))
        n_desirable = run.total(sum(label for _, _, label in rows))
        kl = reference_point(policy, ref, rows, block_size, run)
        run.add({"kl": kl})
        for micro in run.micro_batches(rows):
            batch = data.pad([(x, y) for x, y, _ in micro], run.device)
            desirable = torch.tensor([label for _, _, label in micro], device=run.device)
            with run.autocast():
                logp = batch.spread(policy.logprobs(batch.ids, batch.mask, index=batch.index).sum(1))  # (B,)
                with torch.no_grad():
                    ref_logp = batch.spread(ref.logprobs(batch.ids, batch.mask, index=batch.index).sum(1))
            losses = kto_loss(logp, ref_logp, desirable, kl, o.beta, o.w_desirable, o.w_undesirable)  # (B,)
            loss = losses.sum() / n  # mean over all examples of the step: class counts act as weights
            loss.backward()

            logp, reward = logp.detach(), (o.beta * (logp - ref_logp)).detach()
            run.tokens += batch.tokens
            run.add({"loss": loss})
            for name, which, count in (("chosen", desirable, n_desirable), ("rejected", ~desirable, n - n_desirable)):
                if count:  # a class may be absent from a step
                    run.add({f"rewards/{name}": reward[which].sum() / count, f"logps/{name}": logp[which].sum() / count})
        if 0 < n_desirable < n:
            run.add({"rewards/margins": run.sums["rewards/chosen"] - run.sums["rewards/rejected"]})
        run.update(step, policy, optimizer)
        if o.eval_every and (step + 1) % o.eval_every == 0:
            run.evaluated(step, yardstick.measure(policy, ref, n=128)[0])

    final, samples = yardstick.measure(policy, ref)
    save(policy, o.out, **run.facts(), tokenizer=tokenizer.meta, template=task.template, reference=init, implicit=yardstick.implicit,
         max_new_tokens=yardstick.max_new_tokens, reward=final.get("reward"))  # fmt: skip
    report(f"kto on {o.task}", final, samples, task.bound)
    run.finish(final, forward={"policy": 2, "ref": 2}, backward={"policy": 1})


if __name__ == "__main__":
    main()

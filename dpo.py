"""DPO: Direct Preference Optimization (arXiv:2305.18290).

    h(θ) = [log π_θ(y_w|x) - log π_ref(y_w|x)] - [log π_θ(y_l|x) - log π_ref(y_l|x)]
    L(θ) = mean over pairs of - log σ(βh)                                       Eq. 7

    Variants of a pair's loss:
    cDPO     - (1-ε) log σ(βh) - ε log σ(-βh)               --label-smoothing ε
    robust   [- (1-ε) log σ(βh) + ε log σ(-βh)] / (1-2ε)    --loss robust   arXiv:2403.00409
    IPO      (h - 1/(2β))², h of means over tokens          --loss ipo      arXiv:2310.12036
    norm     - log σ(βh), h of means over tokens            --loss norm     arXiv:2411.15124
    APO-zero 1 - σ(r̂_w) + σ(r̂_l)                           --loss apo      arXiv:2408.06266
    R-DPO    - log σ(βh + α(|y_w| - |y_l|))                 --length-penalty α  arXiv:2403.19159

    paper                        code                        shape
    y_w, y_l                     chosen, rejected            token ids, end tokens included
    log π_θ(y|x)                 logp_w, logp_l              (B,) sums over response tokens, nats
    log π_ref(y|x)               ref_logp_w, ref_logp_l      (B,) the same, under the reference
    r̂ = β log π_θ/π_ref          reward_w, reward_l          (B,) implicit rewards (IPO: of means)
    β, ε                         beta, label_smoothing       β is the τ of IPO

Models in memory: 2 (policy, trained; ref, frozen), 1 with --precompute-ref.
Data: (prompt, chosen, rejected).
Departures from the papers: 1. the optimizer is AdamW with a cosine schedule, not RMSprop; 2. the
default learning rates suit toy models; 3. IPO averages log-probs over tokens, as its authors'
experiments did, and --ipo-sum sums them; 4. --sft-weight w adds -w log π_θ(y_w|x) / |y_w| to the
loss. SLiC-HF's hinge loss (arXiv:2305.10425) is not implemented.

    python dpo.py --beta 0.1                    film reviews; trains out/reviews/sft.pt if missing
    python dpo.py --task exact                  40 outcomes: the distance to the known optimum π*
    python dpo.py --pairs 2000 --epochs 4 --precompute-ref
    python dpo.py --task my.jsonl --init out/my/sft.pt
"""

from collections import namedtuple
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

import data
import training
from data import UserError
from evaluate import Evaluator
from gpt import response_logprobs
from training import PairOptions, Run, opt, parse
from training.held_out import pair_accuracy


def dpo_loss(logp_w, logp_l, ref_logp_w, ref_logp_l, beta=0.1, label_smoothing=0.0, longer=0.0):
    """DPO, Eq. 7 of arXiv:2305.18290. With label_smoothing ε in (0, 0.5) it is cDPO, whose gradient
    is 0 at βh = log((1-ε)/ε). logp_*, ref_logp_*: (B,) log-probs of responses, in nats: sums over
    tokens, or means as in Tülu 3 (arXiv:2411.15124). beta: β > 0, in 1/nats. longer: (B,), R-DPO's
    α(|y_w| - |y_l|). Returns (B,) losses; if logp = ref_logp and longer = 0, each is log 2, for any
    ε."""
    x = beta * log_ratio(logp_w, logp_l, ref_logp_w, ref_logp_l) + longer
    return -(1 - label_smoothing) * F.logsigmoid(x) - label_smoothing * F.logsigmoid(-x)


def robust_dpo_loss(logp_w, logp_l, ref_logp_w, ref_logp_l, beta=0.1, flip=0.1):
    """Robust DPO (arXiv:2403.00409). If each label was flipped with probability `flip`, ε in
    [0, 0.5), its mean is the DPO loss under the clean labels. The other arguments are those of
    dpo_loss. Returns (B,) losses, which may be negative; at logp = ref_logp each is log 2."""
    h = log_ratio(logp_w, logp_l, ref_logp_w, ref_logp_l)
    right, wrong = F.logsigmoid(beta * h), F.logsigmoid(-beta * h)
    return (-(1 - flip) * right + flip * wrong) / (1 - 2 * flip)


def ipo_loss(logp_w, logp_l, ref_logp_w, ref_logp_l, tau=0.1):
    """IPO, Eq. 17 of arXiv:2310.12036. logp_*, ref_logp_*: (B,) means over response tokens (or
    sums, which give τ another scale). tau: τ > 0. Returns (B,) losses. A loss is 0, its minimum, at
    h = 1/(2τ), and 1/(4τ²) at logp = ref_logp."""
    return (log_ratio(logp_w, logp_l, ref_logp_w, ref_logp_l) - 1 / (2 * tau)) ** 2


def apo_loss(logp_w, logp_l, ref_logp_w, ref_logp_l, beta=0.1):
    """APO-zero, Eq. 7 of arXiv:2408.06266: each answer has a term of its own. The arguments are
    those of dpo_loss. Returns (B,) losses in (0, 2); at logp = ref_logp each is 1."""
    return (beta * (ref_logp_w - logp_w)).sigmoid() + (beta * (logp_l - ref_logp_l)).sigmoid()


def log_ratio(logp_w, logp_l, ref_logp_w, ref_logp_l):
    """h, (B,): how much more the policy has raised log π of the chosen answer than of the other."""
    assert logp_w.shape == logp_l.shape == ref_logp_w.shape == ref_logp_l.shape, "four (B,) tensors"
    return (logp_w - ref_logp_w) - (logp_l - ref_logp_l)


@dataclass
class Options(PairOptions):
    beta: float = opt(0.1, "β: strength of the KL penalty to π_ref, 1/nats; IPO's τ", above=0)
    loss: str = opt("dpo", "loss of a pair", choices=("dpo", "robust", "ipo", "norm", "apo"))
    label_smoothing: float = opt(
        0.0, "ε: share of labels assumed to be wrong", low=0, below=0.5, only="loss=dpo|robust|norm"
    )
    length_penalty: float = opt(0.0, "α: reward taken off per answer token", low=0, only="loss=dpo")
    ipo_sum: bool = opt(False, "IPO sums log-probs over tokens (Eq. 17)", only="loss=ipo")
    sft_weight: float = opt(0.0, "weight of the mean NLL of chosen's tokens (Llama 3: 0.2)", low=0)
    precompute_ref: bool = opt(False, "run the reference once over a fixed set, then drop it")

    def check(self):
        super().check()
        if self.precompute_ref and self.endless():
            fixed = "give --pairs N, or a file as the task"
            raise UserError(f"--precompute-ref needs a fixed set: {fixed}")


PRESETS = {  # defaults for any task, for a kind of task, for an option's value; the last match wins
    "any": dict(steps=150, lr=3e-4),
    "exact": dict(beta=0.5, steps=2000, batch_size=4096, lr=5e-4, lr_schedule="linear"),
    "loss=robust": dict(label_smoothing=0.1),
    "loss=ipo": dict(beta=1.0),
    "loss=norm": dict(beta=5.0),
    "exact loss=ipo": dict(beta=0.3),
    "exact loss=norm": dict(beta=1.0),
}


# a row under --precompute-ref: a pair, with the reference's log-probs of both answers
ScoredPair = namedtuple("ScoredPair", "prompt chosen rejected ref_logp_w ref_logp_l")


def compute_loss(policy, ref, batch, o):
    """A micro-batch of B pairs -> (losses, metrics), each (B,): one entry per pair."""
    logp_w, logp_l = response_logprobs(policy, batch).chunk(2)  # (B,) twice, chosen first
    len_w, len_l = batch.length.chunk(2)
    with torch.no_grad():
        if ref is None:  # the pairs are ScoredPairs
            ref_logp_w = batch.columns["ref_logp_w"].to(logp_w)
            ref_logp_l = batch.columns["ref_logp_l"].to(logp_w)
        else:
            ref_logp_w, ref_logp_l = response_logprobs(ref, batch).chunk(2)

    sum_w, sum_l = logp_w, logp_l
    if o.loss == "norm" or o.loss == "ipo" and not o.ipo_sum:  # means over tokens
        logp_w, ref_logp_w = logp_w / len_w, ref_logp_w / len_w
        logp_l, ref_logp_l = logp_l / len_l, ref_logp_l / len_l
    logps = logp_w, logp_l, ref_logp_w, ref_logp_l
    if o.loss == "ipo":
        losses = ipo_loss(*logps, tau=o.beta)
    elif o.loss == "robust":
        losses = robust_dpo_loss(*logps, o.beta, flip=o.label_smoothing)
    elif o.loss == "apo":
        losses = apo_loss(*logps, o.beta)
    else:
        losses = dpo_loss(*logps, o.beta, o.label_smoothing, o.length_penalty * (len_w - len_l))
    if o.sft_weight:
        losses = losses - o.sft_weight * sum_w / len_w

    reward_w = o.beta * (logp_w - ref_logp_w).detach()
    reward_l = o.beta * (logp_l - ref_logp_l).detach()
    return losses, {
        "rewards/chosen": reward_w,
        "rewards/rejected": reward_l,
        "rewards/margins": reward_w - reward_l,
        "rewards/accuracies": reward_w > reward_l,
        "logps/chosen": sum_w.detach(),
        "logps/rejected": sum_l.detach(),
    }


def held_out(task, o):
    return pair_accuracy(task, partial(compute_loss, o=o), with_ref=True)


def with_reference(ref, pairs, run):
    """Runs the reference once over the pairs. -> the same pairs as ScoredPairs"""

    def both(micro):
        logps = response_logprobs(ref, data.pad_pairs(micro, run.device))
        return torch.stack(logps.chunk(2), 1)

    size = run.o.micro_batch or run.o.batch_size
    return pairs.with_columns(ScoredPair, run.scores(pairs, both, size).tolist())


def main(argv=None):
    o = parse(Options, argv, PRESETS)
    run = Run("dpo", o)
    task = data.task(o.task, o.eval_file, o.strict)
    policy = run.load(o.init or run.stage("sft"), task)
    ref = run.reference(policy)
    batches = run.batches(task.preferences, fixed=o.pairs)
    if o.precompute_ref:
        batches.rows = with_reference(ref, batches.rows, run)
        ref = None  # only the policy stays in memory
    run.hold(policy=policy, ref=ref)

    evaluator = Evaluator(run, task, held_out=held_out(task, o))
    optimizer = run.adamw(policy)

    for step in run.steps(batches, optimizer):
        pairs = batches[step]
        weight = 1 / len(pairs)  # a mean over the step's pairs, however the step is cut
        for micro in run.micro_batches(pairs):
            batch = data.pad_pairs(micro, run.device)
            with run.autocast():
                losses, metrics = compute_loss(policy, ref, batch, o)
            run.backward((weight * losses).sum(), tokens=batch.tokens)
            run.log(metrics | {"loss": losses}, weight)
        run.update(optimizer)
        run.evaluate(evaluator, policy)

    run.finish(evaluator, policy)


if __name__ == "__main__":
    training.command(main)

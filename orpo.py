"""ORPO: Monolithic Preference Optimization without Reference Model (arXiv:2403.07691).

    ℓ(y)  = log π_θ(y|x) / |y|,   odds(y) = e^ℓ / (1 - e^ℓ)
    L(θ)  = - ℓ(y_w) - λ log σ( log odds(y_w) - log odds(y_l) )

    paper                        code                        shape
    y_w, y_l                     chosen, rejected            token ids, end tokens included
    log π_θ(y|x)                 logp_w, logp_l              (B,) sums over response tokens, nats
    |y_w|, |y_l|                 len_w, len_l                (B,) response tokens, end included
    - ℓ(y_w) = L_SFT             nll                         (B,) of chosen, mean over tokens
    λ                            lam                         λ ℓ is the implicit reward

No term is detached, so the gradient flows through both answers. ORPO does in one stage what SFT
and DPO do in two.

Models in memory: 1 (policy, trained, from random weights or a base model). Data: (prompt, chosen,
rejected).
Departures from the authors' code: 1. the NLL covers the answer and its end token, as the paper's
text says (--prompt-loss adds the prompt, as the code does); 2. the NLL is averaged over the tokens
of each answer, then over pairs; 3. padding counts in no mean; 4. the default learning rates suit
toy models.

    python orpo.py --lam 0.5                    film reviews, from random weights: no SFT stage
    python orpo.py --task exact                 40 outcomes: the distance to the known optimum π*
    python orpo.py --task my.jsonl --init out/my/sft.pt
"""

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

import data
import training
from evaluate import Evaluator
from gpt import token_logprobs
from training import PairOptions, Run, ScratchOptions, opt, parse
from training.checkpoint import find_reference
from training.held_out import pair_accuracy


def odds_ratio_loss(logp_w, logp_l, len_w, len_l):
    """ORPO's odds ratio term, -log σ(log odds_w - log odds_l). logp_*: (B,) log-probs of responses,
    sums over their tokens, in nats. len_*: (B,) response tokens. Returns (B,) losses; if both
    answers have the same ℓ, the loss is log 2."""
    assert logp_w.shape == logp_l.shape == len_w.shape == len_l.shape, "four (B,) tensors"
    return -F.logsigmoid(log_odds(logp_w / len_w) - log_odds(logp_l / len_l))


def log_odds(mean_logp):
    """log p/(1-p) of p = exp(mean_logp), (B,). log(1 - e^ℓ) is computed as log(-expm1(ℓ)), which
    does not round to log 0 near p = 1. Above ℓ = -1e-7, where float32 can hardly tell p from 1, the
    result is constant."""
    mean_logp = mean_logp.clamp(max=-1e-7)
    return mean_logp - torch.log(-torch.expm1(mean_logp))


def orpo_loss(logp_w, logp_l, len_w, len_l, lam=0.1):
    """ORPO, arXiv:2403.07691: the NLL of the chosen answer, averaged over its tokens, plus
    λ · odds_ratio_loss. The first four arguments are those of odds_ratio_loss. lam: λ ≥ 0. Returns
    (B,) losses."""
    return -logp_w / len_w + lam * odds_ratio_loss(logp_w, logp_l, len_w, len_l)


@dataclass
class Options(ScratchOptions, PairOptions):
    lam: float = opt(0.1, "λ: weight of the odds ratio (paper: 0.1 to 0.25)", low=0)
    prompt_loss: bool = opt(False, "count the prompt's tokens in the NLL too")


SMALL = dict(n_layer=2, n_embd=64, block_size=8)
LEARNING = dict(steps=2000, batch_size=4096, lr=2e-3, lr_schedule="linear")

PRESETS = {  # defaults for any task, for a kind of task, for an option's value; the last match wins
    "any": dict(steps=500, lr=4e-3, warmup=50),
    "exact": SMALL | LEARNING | dict(lam=0.25),
}


def compute_loss(policy, batch, o):
    """A micro-batch of B pairs -> (losses, metrics), each (B,): one entry per pair."""
    scored = batch.text if o.prompt_loss else None
    token_logp = token_logprobs(policy, batch, mask=scored)  # (2B, T)
    logp_w, logp_l = (token_logp * batch.unfold(batch.mask)).sum(1).chunk(2)  # (B,)
    len_w, len_l = batch.length.chunk(2)

    losses = orpo_loss(logp_w, logp_l, len_w, len_l, o.lam)
    nll = -logp_w / len_w
    if o.prompt_loss:
        tokens = batch.unfold(batch.text[:, 1:].sum(1))
        with_prompt = -(token_logp.sum(1) / tokens).chunk(2)[0]
        losses, nll = losses - nll + with_prompt, with_prompt

    ratio = log_odds((logp_w / len_w).detach()) - log_odds((logp_l / len_l).detach())
    reward_w = (o.lam * logp_w / len_w).detach()
    reward_l = (o.lam * logp_l / len_l).detach()
    return losses, {
        "nll_loss": nll.detach(),
        "log_odds_ratio": F.logsigmoid(ratio),
        "log_odds_chosen": ratio,
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
    run = Run("orpo", o)
    task = data.task(o.task, o.eval_file, o.strict)
    policy = run.load(o.init, task) if o.init else run.create(task)
    run.hold(policy=policy)

    batches = run.batches(task.preferences, fixed=o.pairs)
    evaluator = Evaluator(run, task, compared_with=find_reference(run), held_out=held_out(task, o))
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

"""ORPO: Monolithic Preference Optimization without Reference Model (arXiv:2403.07691).

    L(θ) = - ℓ_w - λ log σ( log odds(y_w) - log odds(y_l) ),    ℓ = log π_θ(y|x) / |y|,  odds = e^ℓ / (1 - e^ℓ)

    paper                        code                        shape
    y_w, y_l                     chosen, rejected            responses with their end tokens
    log π_θ(y|x)                 logp_w, logp_l              (B,) sums over response tokens, nats
    |y_w|, |y_l|                 len_w, len_l                (B,) response tokens, end tokens included
    - ℓ_w = L_SFT                nll                         (B,) the negative log-likelihood of chosen, a nat a token
    λ                            lam                         weight of the odds ratio; λ ℓ is the implicit reward

Nothing is detached: the gradient goes through both answers. One stage does what SFT and DPO do in two.

Models in memory: 1 (the policy, trained, from random weights or a base model). Data: (prompt, chosen, rejected).
Departures from the authors' code: 1. the NLL is over the answer and its end token, as the paper's text says (--prompt-loss: over the
prompt too, as the code does); 2. the mask holds no padding; 3. a learning rate for toy models.

    python orpo.py --lam 0.5                                   reviews, from random weights: no SFT stage
    python orpo.py --task exact                                40 outcomes a prompt: the distance to this loss's own optimum
    python orpo.py --task my.jsonl.gz --init out/my/sft.pt        rows of {"prompt", "chosen", "rejected"}

It ends with the gold reward beside that of an SFT checkpoint, if there is one, the win rate against it, and two samples of each.
"""
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import common
import data
import memory
from common import Count, NonNegative, Positive, Whole
from evaluate import choose_yardstick, context, find_reference, open_or_make, reopen, report
from gpt import CheckpointError, save


def odds_ratio_loss(logp_w, logp_l, len_w, len_l):
    """ORPO's odds ratio term, -log σ(log odds_w - log odds_l).
    logp_*: (B,) summed response log-probs in nats, end token included. len_*: (B,) response tokens. Returns (B,) losses.
    Raises AssertionError if shapes differ. Answers of equal ℓ: log 2."""
    assert logp_w.shape == logp_l.shape == len_w.shape == len_l.shape and logp_w.dim() == 1, "four (B,) tensors"
    return -F.logsigmoid(log_odds(logp_w / len_w) - log_odds(logp_l / len_l))


def log_odds(mean_logp):
    """log p/(1-p) of p = exp(mean_logp), (B,): log(1 - e^ℓ) as log(-expm1(ℓ)), which near p = 1 does not round to log 0. Above
    ℓ = -1e-7, where float32 cannot tell p from 1, it is constant."""
    mean_logp = mean_logp.clamp(max=-1e-7)
    return mean_logp - torch.log(-torch.expm1(mean_logp))


def orpo_loss(logp_w, logp_l, len_w, len_l, lam=0.1):
    """ORPO, arXiv:2403.07691: the NLL of chosen, a nat a token, + λ · odds_ratio_loss. Arguments as there; lam: λ ≥ 0.
    Returns (B,) losses."""
    return -logp_w / len_w + lam * odds_ratio_loss(logp_w, logp_l, len_w, len_l)


@dataclass
class Options(common.Options):
    init: str = ""  # checkpoint to start from (default: random weights)
    lam: NonNegative = 0.1  # λ: weight of the odds ratio (the paper: 0.1 to 0.25)
    prompt_loss: bool = False  # the NLL over prompt and answer, as in the authors' code, not over the answer
    steps: Count = 500  # optimizer steps (default: %(default)s; of a file: one epoch)
    batch_size: Count = 32  # pairs an optimizer step
    pairs: Whole = 0  # size of the fixed set of preference pairs (0: fresh ones every step; of a file: all)
    lr: Positive = 4e-3  # AdamW learning rate at its peak; large models take 5e-6 to 8e-6
    warmup: Whole = 50  # steps over which the learning rate rises from 0
    n_layer: Count = 4  # blocks, where weights start random
    n_head: Count = 4  # attention heads a block, where weights start random
    n_embd: Count = 128  # width, where weights start random
    block_size: Whole = 0  # longest sequence, prompt and response, in tokens (0: the checkpoint's, or 256 at random weights)
    on_exact = dict(lam=0.25, steps=2000, batch_size=4096, lr=2e-3, lr_schedule="linear", n_layer=2, n_embd=64, block_size=8)
    on_predict = dict(batch_size=2)


@common.command(CheckpointError, data.DataError)
def main(argv=None):
    o = common.parse(Options, argv)
    task, fixed = data.task(o.task, o.eval_file, o.strict), o.pairs or (None if common.is_file(o.task) else 0)
    run = common.Run(o, "orpo")
    policy, tokenizer, task.template = open_or_make(o, task)
    block_size = context(o, policy)
    batches = data.Batches(task.preferences, fixed, o.batch_size, o.seed, tokenizer, block_size, o.truncate)
    yardstick = choose_yardstick(run, task, tokenizer, block_size, o.max_new_tokens, o.truncate, "logp mean", aim=("orpo", vars(o)))
    reference = find_reference(o, run, tokenizer, block_size)
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
            scored, index = (batch.text, None) if o.prompt_loss else (batch.mask, batch.index)
            with run.autocast():
                token_logp = policy.logprobs(batch.ids, scored, index=index)  # (rows, T-1)
            logp = batch.spread((token_logp * batch.mask[:, 1:]).sum(1))  # (2B,)
            size = batch.spread(batch.mask.sum(1))  # (2B,) response tokens, end tokens included
            losses = orpo_loss(*logp.chunk(2), *size.chunk(2), o.lam)  # (B,)
            nll = -(logp / size).chunk(2)[0]
            if o.prompt_loss:
                whole = -batch.spread(token_logp.sum(1) / scored[:, 1:].sum(1)).chunk(2)[0]
                losses, nll = losses - nll + whole, whole
            loss = losses.sum() / n  # mean over the step's pairs
            loss.backward()

            reward_w, reward_l = (o.lam * logp / size).detach().chunk(2)
            odds_w, odds_l = log_odds((logp / size).detach()).chunk(2)
            logp_w, logp_l = logp.detach().chunk(2)
            run.tokens += batch.tokens
            run.add({
                "loss": loss, "nll_loss": nll.sum() / n, "log_odds_ratio": F.logsigmoid(odds_w - odds_l).sum() / n,
                "log_odds_chosen": (odds_w - odds_l).sum() / n,
                "rewards/chosen": reward_w.sum() / n, "rewards/rejected": reward_l.sum() / n,
                "rewards/margins": (reward_w - reward_l).sum() / n, "rewards/accuracies": (reward_w > reward_l).sum() / n,
                "logps/chosen": logp_w.sum() / n, "logps/rejected": logp_l.sum() / n,
            })  # fmt: skip
        run.update(step, policy, optimizer)
        if o.eval_every and (step + 1) % o.eval_every == 0:
            run.evaluated(step, yardstick.measure(policy, reopen(run, reference), n=128)[0])

    final, samples = yardstick.measure(policy, reopen(run, reference))
    save(policy, o.out, **run.facts(), tokenizer=tokenizer.meta, template=task.template, reference=reference, implicit=yardstick.implicit,
         max_new_tokens=yardstick.max_new_tokens, reward=final.get("reward"))  # fmt: skip
    report(f"orpo on {o.task}", final, samples, task.bound)
    run.finish(final, forward={"policy": 1}, backward={"policy": 1})


if __name__ == "__main__":
    main()

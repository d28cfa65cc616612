"""SFT: supervised fine-tuning on demonstrations (InstructGPT, arXiv:2203.02155).

    L(θ) = - Σ_b Σ_t m_bt log π_θ(y_bt | x_b, y_b<t) / Σ_b Σ_t m_bt

    paper        code                       shape
    x, y         prompt and response ids    lists of tokens
    m            batch.mask                 (B, T), True on the response and its end token
    log π_θ      logp                       (B, T), nats per token, 0 off the mask

Both sums run over the whole optimizer step, so every response token has the same weight, however
the batch is cut into micro-batches. All other methods except ORPO and RLAIF start from this model.

Models in memory: 1 (policy, trained). Data: (prompt, completion).
Departures from the paper: 1. there is no dropout; 2. there is no loss on the prompt. Every response
that was not cut ends with one end token.

    python sft.py                               reviews, from random weights, half a minute
    python sft.py --task arithmetic:2           sums of two digits; --task exact: 40 outcomes
    python sft.py --task my.jsonl --block-size 1024 --truncate
    python sft.py --task chats.jsonl --turns all    every answer of a chat, not only the last
    python sft.py --task my.jsonl --init out/reviews/sft.pt
"""

from dataclasses import dataclass
from functools import partial

import data
import training
from evaluate import Evaluator
from gpt import token_logprobs
from training import Run, ScratchOptions, opt, parse
from training.checkpoint import find_reference
from training.held_out import nll_per_token


def nll(logp):
    """Negative log-likelihood. logp: (B, T) token log-probs in nats, 0 for tokens that are not
    trained on. Returns (B,) sums, in nats."""
    return -logp.sum(1)


@dataclass
class Options(ScratchOptions):
    turns: str = opt("last", 'answers of "messages" that are trained on', choices=("last", "all"))


SMALL = dict(n_layer=2, n_embd=64, block_size=8)

PRESETS = {  # defaults for any task, for a kind of task, for an option's value; the last match wins
    "any": dict(steps=500, lr=4e-3, warmup=50),
    "arithmetic": dict(steps=1600, batch_size=64, lr=2e-3),
    "exact": SMALL | dict(steps=1000, batch_size=4096, lr=2e-3, lr_schedule="linear"),
}


def compute_loss(policy, batch, o):
    """A micro-batch of B answers -> (losses (B,), one entry per answer; no metrics)."""
    return nll(token_logprobs(policy, batch)), {}


def held_out(task, o):
    return nll_per_token(task, partial(compute_loss, o=o))


def main(argv=None):
    o = parse(Options, argv, PRESETS)
    run = Run("sft", o)
    task = data.task(o.task, o.eval_file, o.strict, o.turns)
    policy = run.load(o.init, task) if o.init else run.create(task)
    run.hold(policy=policy)

    batches = run.batches(task.demonstrations)
    known = {"compared_with": find_reference(run), "held_out": held_out(task, o)}
    evaluator = Evaluator(run, task, **known, is_reference=True)
    optimizer = run.adamw(policy)

    for step in run.steps(batches, optimizer):
        rows = batches[step]
        weight = 1 / sum(len(y) for _, y in rows)  # a mean over the step's response tokens
        for micro in run.micro_batches(rows):
            batch = data.pad(micro, run.device)
            with run.autocast():
                losses, metrics = compute_loss(policy, batch, o)
            run.backward((weight * losses).sum(), tokens=batch.tokens)
            run.log(metrics | {"loss": losses}, weight)
        run.update(optimizer)
        run.evaluate(evaluator, policy)

    run.finish(evaluator, policy)


if __name__ == "__main__":
    training.command(main)

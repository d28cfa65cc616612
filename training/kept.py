"""Between steps: writes the checkpoints of --keep-every, measures the losses of --loss-every."""

import os

from data import say
from training import checkpoint, distributed
from training.process import interrupts


def between_steps(run, evaluator, policy):
    """Does what is due after this step. -> the figures of the held-out rows, or {}"""
    o, done = run.o, run.step + 1
    if o.keep_every and done % o.keep_every == 0:
        keep(run, evaluator, policy)
    due = o.loss_every and done % o.loss_every == 0
    return evaluator.held_out_figures(policy) if due else {}


def keep(run, evaluator, policy):
    """Writes the current policy, after step 200 to out/dpo-000200.pt. With --keep K, removes all
    but the last K of the checkpoints that this run has written so."""
    o, step = run.o, run.step + 1
    path, old = (name(o.out, n) for n in (step, step - o.keep * o.keep_every))
    again = " again" if distributed.is_first and os.path.exists(path) else ""
    meta = checkpoint.facts(run) | {"steps": step} | evaluator.facts({})
    with interrupts.held(), run.files.writes(path):
        checkpoint.write(run, policy, path, meta)
        if distributed.is_first and 0 < o.keep * o.keep_every < step and os.path.exists(old):
            os.unlink(old)
    say(f"{run.method} step {step}/{o.steps}: {path} is written{again}")


def name(out, step):
    """-> out/dpo-000200.pt for out/dpo.pt"""
    return f"{out.removesuffix('.pt')}-{step:06d}.pt"

"""Ends a run before its last step, if its loss is not finite or no more samples are found."""

import math

from data import Stopped, say

LARGE = 1e6  # the message mentions a reward above this


def give_up(run, loss, norm):
    """Keeps the last good state, and prints what was found and what may help."""
    run.state.keep()
    path = run.files.state_path
    kept = f"the last good state is kept in {path}" if run.files.interrupted() else "no state"
    found = f"the loss is {float(loss)}, the gradient's norm {float(norm)}; {kept}"
    remedy = "start again with a smaller --lr or a longer --warmup"
    if run.scaler.is_enabled() and math.isfinite(loss):
        found += "; no scale of the loss keeps its gradient within float16"
    if run.largest_reward > LARGE:
        found = f"a reward is as large as {run.largest_reward:.3g}, so {found}"
        remedy = "scale the rewards down, and start again"
    raise Stopped(f"step {run.step + 1}: {found}; {remedy}")


def cut_short(run, why):
    """Ends the run after the step before this one. Raises Stopped if there is none."""
    if (step := run.step) == 0:
        raise Stopped(why)
    say(f"{why}. The run ends after step {step} of {run.o.steps}, with what it has learned")
    if step > run.first_step and step % run.o.log_every:
        run.files.record(run.line(*run.figures.line))
    run.o.steps = step

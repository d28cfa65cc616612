"""Shows the progress of a run: as a bar in a terminal or a notebook, as lines in a log file."""

import sys
import time

from tqdm import tqdm

from data import say
from training import distributed

FORMAT = "{desc} {n_fmt}/{total_fmt} |{bar}| {elapsed} < {remaining}{postfix}"


class Bar:
    """Shows the three figures that matter for the run's method: the first three of the names in
    `o.shown` that its steps log."""

    def __init__(self, run):
        self.o, self.method, self.first, self.began = run.o, run.method, run.first_step, time.time()
        moves = sys.stderr.isatty() or "ipykernel" in sys.modules  # a line can be written again
        self.moves = moves and distributed.is_first
        how = {"desc": run.method, "bar_format": FORMAT, "dynamic_ncols": True}
        how |= {"total": run.o.steps, "initial": run.first_step, "disable": not self.moves}
        self.bar = tqdm(**how)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.bar.close()

    def show(self, line, tokens):
        """Shows the figures of a recorded step. tokens: the number trained on so far"""
        o, done = self.o, line["step"]
        names = [name for name in o.shown.split() if name in line][:3]
        text = ", ".join(f"{name.split('/')[-1]} {line[name]:.3g}" for name in names)
        self.bar.set_postfix_str(text, refresh=False)
        tenth = done * 10 // o.steps > (done - o.log_every) * 10 // o.steps or done == o.steps
        if self.moves or o.eval_every or not (tenth or "log_every" in o.given):
            return
        gone = time.time() - self.began
        left = gone / (done - self.first) * (o.steps - done)
        times = f"{tqdm.format_interval(gone)} gone, {tqdm.format_interval(left)} left"
        say(f"{self.method} step {done}/{o.steps}: {text}; {times}, {tokens / gone:,.0f} tokens/s")

    def step(self):
        self.bar.update()

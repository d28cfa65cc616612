"""The figures of a run: what its steps log, how long they take, and how often models are read."""

import contextlib
import statistics
import time
from collections import Counter
from functools import partial

import torch

from training import distributed, memory

SHOWN_EVALUATED = "loss reward score kl kl_star held_out_loss accuracy rms nll".split()


class Figures:
    """Takes what a run logs, and gives the lines of the record."""

    def __init__(self, device):
        self.device = device
        self.now = clock_of(device)
        self.run_began = time.time()  # without the time between an interruption and --resume
        # of this step
        self.step_began = self.updated = self.now()  # `updated`: its last update has ended
        self.seconds = 0.0  # from one to the other
        self.sums = {}  # name -> Σ weight · metric
        self.updates = 0  # optimizer steps
        self.logged_in = {}  # name -> the optimizer steps in which it was logged
        self.clocks = []  # (part, when it began, when it ended)
        self.counts = True  # False: a repeated share of rows (distributed.shares) is not counted
        # of the run so far
        self.tokens = self.sampled = 0  # tokens computed in training, and tokens sampled
        self.tokens_before = 0  # those of earlier processes, if the run was resumed
        self.forward, self.backward = Counter(), Counter()  # role -> responses that passed
        self.reading = set()  # (role, whether with a graph) of the pass under way
        self.read = set()  # the roles that were read in this step so far
        self.in_step = False  # what models read before, after and between steps does not count
        self.times = []  # {part: seconds} of each step that is timed; "step" is the whole
        self.line = ()  # of what the last step's line in the record is made

    # ---- a step

    def begin_step(self):
        self.sums, self.logged_in, self.clocks, self.updates = {}, {}, [], 0
        self.in_step, self.read = True, set()
        self.step_began = self.now()

    @torch.no_grad()
    def log(self, metrics, weight):
        """Adds Σ weight · metric. A figure that is logged in several optimizer steps is averaged
        over them."""
        for name, x in metrics.items():
            x = weight * x
            x = x.sum() if torch.is_tensor(x) else x
            x = x if self.counts else 0.0
            self.sums[name] = self.sums.get(name, 0.0) + x
            self.logged_in.setdefault(name, set()).add(self.updates)

    def end_update(self):
        self.updates += 1
        self.updated = self.now()

    def end_step(self, timed):
        """timed: whether its time counts; counting bytes slows a step down"""
        self.in_step = False
        self.seconds = self.updated - self.step_began
        if timed:
            parts = Counter(step=self.seconds)
            for part, began, ended in self.clocks:
                parts[part] += ended - began
            self.times.append(parts)

    def means(self):
        """-> the step's figures, as numbers"""
        return means(self.sums, self.logged_in)

    @contextlib.contextmanager
    def shared(self):
        """Within this block each process logs its share; at its end the shares are summed."""
        if not distributed.many:
            yield
            return
        (sums, tokens), self.sums, self.tokens = (self.sums, self.tokens), {}, 0
        yield
        found = distributed.total_all(self.sums | {"tokens": self.tokens}, self.device)
        self.sums, self.tokens = sums, tokens + int(found.pop("tokens"))
        for name, x in found.items():
            self.sums[name] = self.sums.get(name, 0.0) + x

    @contextlib.contextmanager
    def clock(self, part):
        began = self.now()
        yield
        self.clocks.append((part, began, self.now()))

    # ---- passes through models

    def drew(self, rollout, model, models):
        """A rollout was sampled from a model, one pass over each response."""
        self.sampled += int(rollout.host.mask.sum())
        role = next(role for role, held in models.items() if held is model)
        self._pass(role, len(rollout))

    def dropped(self, n):
        """n samples of this step are dropped: the passes that drew and judged them do not count."""
        for role in self.read:
            self.forward[role] -= n

    def watch(self, models):
        """Notes from now on which of these models are read: each forward pass looks up the token
        embedding once."""
        for role, model in models.items():
            embedding = next(m for m in model.modules() if isinstance(m, torch.nn.Embedding))
            embedding.register_forward_pre_hook(partial(self._read, role))

    def _read(self, role, module, args):
        self.reading.add((role, torch.is_grad_enabled()))

    @contextlib.contextmanager
    def passing(self, responses):
        """Counts `responses` passes, however they are split, for each model that is read within."""
        self.reading = set()
        yield
        self.counts = True
        for role, graph in self.reading if self.in_step else ():
            self._pass(role, responses)
            self.backward[role] += responses * graph

    def _pass(self, role, responses):
        self.forward[role] += responses
        self.read.add(role)

    def cost(self, models, updates, recompute):
        """-> passes and FLOPs per trained token, and the number of tokens. A rollout counts
        once, however many `updates` train on it."""
        trained = max(self.backward.values(), default=0) / updates or 1
        forward, backward = (
            {role: counts[role] / trained for role in models}
            for counts in (self.forward, self.backward)
        )
        figures = {
            "forward_passes": sum(forward.values()),
            "backward_passes": sum(backward.values()),
            "flops_per_token": memory.flops(models, forward, backward, recompute),
            "trained_tokens": self.tokens,
        }
        return figures | self.sampled_tokens()

    def sampled_tokens(self):
        """-> how many tokens were sampled, if any"""
        return {"sampled_tokens": self.sampled} if self.sampled else {}

    def state_dict(self):
        counts = {"forward": dict(self.forward), "backward": dict(self.backward)}
        return counts | {"tokens": self.tokens, "sampled": self.sampled}

    def load_state_dict(self, state):
        self.tokens, self.sampled = state["tokens"], state["sampled"]
        self.forward, self.backward = Counter(state["forward"]), Counter(state["backward"])

    # ---- the end of a run

    def medians(self, steps, updates):
        """-> the median times of a step and of its parts, and the tokens per second, over the steps
        of this process. The first step, which loads or compiles kernels, counts only for parts that
        no later step has."""
        seconds = {}
        for parts in reversed(self.times):
            for part, x in parts.items():
                if parts is not self.times[0] or part not in seconds:
                    seconds.setdefault(part, []).append(x)
        if not seconds:
            return {}
        tokens_per_step = (self.tokens - self.tokens_before) / updates / steps
        speed = tokens_per_step / statistics.fmean(seconds["step"])
        medians = {f"{part}_ms": 1000 * statistics.median(x) for part, x in seconds.items()}
        return medians | {"tokens_per_s": speed}

    def summary(self, final, peak):
        """-> the last lines of a run. peak: that of the Meter, or None"""
        speed = ""
        if self.times:
            _, *parts = self.times[0]
            parts = ", ".join(f"{part} {final[f'{part}_ms']:.0f}" for part in parts)
            speed = f", {final['step_ms']:.0f} ms per step" + (f" ({parts})" if parts else "")
            speed += f", {final['tokens_per_s']:,.0f} tokens/s"
        lines = [f"time: {final['wall_s']:.0f} s{speed}"]
        if peak:
            lines.append(f"memory at a step's peak: {memory.peak_text(*peak)}")
        return "\n".join(lines)


def clock_of(device):
    """-> a function that gives the time: seconds, or on CUDA a point in the device's queue"""
    if device.type == "cuda":
        from gpu import Moment

        return Moment
    return partial(_now, getattr(torch, device.type).synchronize)  # a CPU waits for nothing


def _now(synchronize):
    synchronize()
    return time.perf_counter()


def means(sums, logged_in):
    """-> a step's figures, as numbers, which are read from the device at once"""
    tensors = {name: x for name, x in sums.items() if torch.is_tensor(x) and not x.is_cpu}
    read = torch.stack([x.float() for x in tensors.values()]).tolist() if tensors else []
    numbers = sums | dict(zip(tensors, read))
    return {name: float(x) / len(logged_in[name]) for name, x in numbers.items()}


def evaluated_text(figures):
    """-> the figures of a step and of its evaluation, as a line to print"""
    shown = {name: figures[name] for name in SHOWN_EVALUATED if name in figures}
    return ", ".join(f"{name} {x:.{4 if name == 'loss' else 3}f}" for name, x in shown.items())

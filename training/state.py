"""The saved state that --resume goes on from: weights, moments, draws, and the run's options."""

import platform
import sys
import time
from dataclasses import asdict
from functools import partial

import torch
from torch.utils._pytree import tree_map_only

from data import say
from training import distributed
from training.files import commit
from training.optimizer import learning_rate
from training.placement import local, put
from training.process import interrupts

# options that do not change the results of a run, except that --shard changes their rounding
FREE = "resume log_every log_to save_every keep_every keep loss_every out name shard".split()


class State:
    """The saved state of a run. A step draws rows, samples and an order before it trains. If it
    fails before any weight has moved, the state before the step can still be saved."""

    def __init__(self, run):
        self.run = run
        self.options = {}  # those that determine the results, once the steps are known
        self.trained = {}  # name -> what the optimizer moves, as objects with state_dict
        self.others = {}  # name -> what else a step moves: data, figures, a script's own objects
        self.before = {}  # states of these, of the generator and the scaler, before this step

    def hold(self, optimizer, others):
        """Sets what is saved from now on."""
        run = self.run
        self.options = self.bits()
        roles = [m["role"] for m in run.ledger if m["trainable"]]
        self.trained = {role: Weights(run.models[role]) for role in roles}
        plain = run.o.optimizer == "adamw"
        self.trained |= {"optimizer": Moments(optimizer) if plain else optimizer}
        if run.scaler.is_enabled():
            self.trained["scaler"] = run.scaler
        self.others = others | {"figures": run.figures}

    def bits(self):
        """-> the options that determine the results of a run to the bit"""
        kept = {name: x for name, x in asdict(self.run.o).items() if name not in FREE}
        return kept | {"device": self.run.device.type}

    def begin(self):
        """Begins the record of a fresh run, and removes the state of an older one."""
        run, o = self.run, self.run.o
        if o.warmup > o.steps:
            last = f"ends at {learning_rate(o.steps - 1, o):.3g}, not {o.lr:g}"
            say(f"--warmup {o.warmup} outlasts the {o.steps} steps: the learning rate {last}")
        if o.eval_every > o.steps:
            few = f"is more than the {o.steps} steps: only their end is evaluated"
            say(f"--eval-every {o.eval_every} {few}")
        if run.files.interrupted():
            say(f"the state that an interrupted run left in {run.files.state_path} is replaced")
        say(run.files.replaces(run.method, self.options))
        run.files.begin(asdict(o))
        run.files.drop_state()
        head = {"method": run.method, "task": o.task, "options": asdict(o), "commit": commit()}
        head |= {"device": str(run.device), "dtype": str(run.dtype)[6:], "models": run.ledger}
        head |= {"processes": distributed.size} | run.files.logger.facts()
        head |= {"launch": sorted(launches)} if (launches := distributed.launches()) else {}
        head["versions"] = {"python": platform.python_version(), "torch": torch.__version__}
        run.files.record(head)

    def begin_step(self):
        self.before = self._others()

    def _others(self):
        states = {name: x.state_dict() for name, x in self.others.items()}
        skipped, generator = self.run.scaler.skipped, self.run.generator.get_state()
        return states | {"skipped": skipped, "generator": generator}

    def save(self, step, others=None):
        """step: the number of steps done. others: `before`, to save it instead of the present"""
        run = self.run
        state = {"step": step, "method": run.method, "options": self.options}
        state |= {"processes": self._processes()}
        state |= {name: x.state_dict() for name, x in self.trained.items()}
        state |= others or self._others()
        with interrupts.held(), run.files.writes(run.files.state_path):
            state = run.placement.state_to_save(state, run.files.state_path)
            run.files.save(state | {"wall": time.time() - run.figures.run_began})

    def keep(self):
        """Saves what was done before this step, if no weight has moved in it."""
        run = self.run
        if run.step == run.first_step or run.figures.updates:
            return
        weights = [p for group in run.optimizer.param_groups for p in group["params"]]
        if not distributed.total(any(not local(p).isfinite().all() for p in weights)):
            self.save(run.step, self.before)
            path = run.files.state_path
            say(f"step {run.step} is saved in {path}; --resume goes on from there")

    def past(self):
        """-> the closing figures of this very run, if it has ended before"""
        run = self.run
        return distributed.of_first(partial(run.files.past, run.method, self.bits()))

    def resume(self):
        """Restores the saved state. -> False, after a note, if there is none. Ends the process if
        the run has finished."""
        run = self.run
        if self.past():
            say(f"--resume: this run has finished; its checkpoint is {run.o.out}")
            sys.exit(0)
        if not distributed.of_first(run.files.interrupted):
            say(f"--resume: there is no {run.files.state_path} yet, so this run starts afresh")
            return False
        state = run.files.load(run.method, self.options)
        for name, x in (self.trained | self.others).items():
            takes_parts = isinstance(x, (Weights, Moments))
            x.load_state_dict(state[name] if takes_parts else self._moved(state[name]))
        run.generator.set_state(state["generator"].cpu())
        run.scaler.skipped = state["skipped"]
        run.figures.run_began = time.time() - state["wall"]
        run.figures.tokens_before = run.figures.tokens
        run.first_step = state["step"]
        run.step = run.first_step - 1
        run.files.begin(asdict(run.o))  # cut back to the saved step
        say(f"resumed after step {run.first_step} of {run.o.steps}")
        if (others := state["processes"]) != self._processes():
            say(f"it was saved by {others} processes: the numbers will differ by rounding")
        return True

    def _moved(self, state):
        """-> the saved state of an object, with its tensors copied from the file to the device"""
        move = partial(torch.Tensor.to, device=self.run.device, copy=True)
        return tree_map_only(torch.Tensor, move, state)

    def _processes(self):
        return f"{distributed.size}{self.run.placement.words}"


class Weights:
    """The trained weights of a model, as they are saved for --resume; with `frozen` all weights"""

    def __init__(self, model, frozen=False):
        self.model, self.frozen = model, frozen

    def state_dict(self):
        named = self.model.named_parameters()
        return {k: p.detach() for k, p in named if p.requires_grad or self.frozen}

    def load_state_dict(self, state):
        """Each process takes its part of the full tensors."""
        parameters = dict(self.model.named_parameters())
        for name, x in state.items():
            put(parameters[name], x)


class Moments:
    """The moments that AdamW keeps of earlier steps"""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    def state_dict(self):
        return self.optimizer.state_dict()

    def load_state_dict(self, state):
        """Each process takes its part of the full tensors, so that its device never holds one."""
        groups = self.optimizer.param_groups
        for i, p in enumerate(p for group in groups for p in group["params"]):
            for name, x in state["state"].get(i, {}).items():
                own = torch.zeros_like(p if x.shape == p.shape else x)  # a step count is not split
                put(own, x)
                state["state"][i][name] = own
        self.optimizer.load_state_dict(state)

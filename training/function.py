"""A user's reward: a function in a file, bound by name, and kept apart from the run."""

import contextlib
import copy
import importlib.util
import inspect
import os
import random
import signal
import sys
import traceback
from functools import partial
from pathlib import Path

import numpy as np
import torch

from data import UserError

OURS = Path(__file__).parent.parent
STATES = (  # what a process has one of, and the user's code has its own: (read, put back)
    (lambda: list(sys.path), lambda path: sys.path.__setitem__(slice(None), path)),
    (os.getcwd, os.chdir),
    (random.getstate, random.setstate),
    (np.random.get_state, np.random.set_state),
    (torch.get_rng_state, torch.set_rng_state),
    (torch.is_grad_enabled, torch.set_grad_enabled),
    (torch.get_default_dtype, torch.set_default_dtype),
)
CHANGED = (  # put back only if it has changed
    (torch.get_num_threads, torch.set_num_threads),
    (torch.get_default_device, torch.set_default_device),
    (torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms),
    (sys.getrecursionlimit, sys.setrecursionlimit),
    (partial(signal.getsignal, signal.SIGINT), partial(signal.signal, signal.SIGINT)),
    (partial(signal.getsignal, signal.SIGTERM), partial(signal.signal, signal.SIGTERM)),
)


class UserReward:
    """reward(prompt, completion, ended, **columns) -> float. The function gets by name what it asks
    for: prompt, completion, ended, and the columns of the row, a copy of its own. Raises UserError
    for a function that is not there, wants what no row has, raises, or returns what is no finite
    number."""

    def __init__(self, name, task):
        path, _, attribute = name.rpartition(":")
        if not path.endswith(".py"):
            form = "give task, rm, the X.pt of a reward model, or a function as FILE.py:function"
            raise UserError(f"--reward {name}: {form}")
        if not os.path.isfile(path):
            raise UserError(f"--reward {name}: {path} is no file; give FILE.py:function")
        self.name, self.apart = name, Apart(path)
        self.function = self._find(path, attribute)
        self.takes = self._parameters(task)
        self.names = {p.name for p in self.takes}

    def _find(self, path, attribute):
        spec = importlib.util.spec_from_file_location("user_reward", path)
        module = sys.modules["user_reward"] = importlib.util.module_from_spec(spec)
        try:
            with self.apart():
                spec.loader.exec_module(module)
        except (Exception, SystemExit) as e:  # whatever stands in the file
            why = f"{type(e).__name__}: {_flat(e)}"
            why = f"{path} cannot be run ({why}); mend it"
            raise UserError(f"--reward {self.name}: {why}") from None
        function = getattr(module, attribute, None)
        if inspect.isclass(function):
            why = f"{attribute!r} is a class; give a function, or an object that can be called"
        elif not callable(function):
            why = f"{path} has no function {attribute!r}"
        else:
            why = _kind(function)
        if why:
            raise UserError(f"--reward {self.name}: {why}")
        return function

    def _parameters(self, task):
        """-> the function's parameters; each without a default must be something that every row
        has"""
        try:
            parameters = inspect.signature(self.function).parameters.values()
        except (ValueError, TypeError):  # some built-in functions have none
            raise UserError(
                f"--reward {self.name}: its parameters cannot be read; wrap it in a function of "
                "(prompt, completion)"
            ) from None
        given, columns = ("prompt", "completion", "ended"), task.columns()
        for p in parameters:
            takes, optional = f"--reward {self.name} takes {p.name!r}", p.default is not p.empty
            if optional or p.name in given or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD):
                continue
            if p.name not in columns:
                there = ", ".join([*given, *columns])
                raise UserError(f"{takes}, which is no column of the rows (there are {there})")
            if place := task.lacks(p.name):
                raise UserError(f"{takes}, which {place} has not; give the parameter a default")
        return list(parameters)

    def __call__(self, prompt, completion, ended=True, **columns):
        values = {**columns, "prompt": prompt, "completion": completion, "ended": ended}
        args, kwargs = self._bind(values)
        try:
            with self.apart():
                x = self.function(*args, **kwargs)
        except (Exception, SystemExit) as e:  # a user's function raises what it likes
            frames = traceback.extract_tb(e.__traceback__)[1:]
            line = next((frame.lineno for frame in frames), "?")
            what = f"raised {type(e).__name__} ({_flat(e)}, line {line})"
            raise self._at(prompt, completion, what, "mend the function") from None
        try:
            if not isinstance(x, str) and abs(float(x)) < 1e38:  # the loss is of float32
                return float(x)
        except (TypeError, ValueError, RuntimeError, OverflowError):
            pass
        if inspect.iscoroutine(x) or inspect.isgenerator(x):
            x.close()
        what = f"returned {_flat(repr(x))}"
        raise self._at(prompt, completion, what, "it must return a finite number")

    def _at(self, prompt, completion, what, remedy):
        place = f"the prompt {_flat(repr(prompt))} and the completion {_flat(repr(completion))}"
        return UserError(f"--reward {self.name} {what} at {place}; {remedy}")

    def _bind(self, values):
        """-> (positional, named) arguments"""
        args, kwargs = [], {}
        for p in self.takes:
            if p.kind is p.POSITIONAL_ONLY:
                args.append(copy.deepcopy(values.get(p.name, p.default)))
            elif p.kind is p.VAR_KEYWORD:
                rest = {name: x for name, x in values.items() if name not in self.names}
                kwargs |= copy.deepcopy(rest)
            elif p.name in values:
                kwargs[p.name] = copy.deepcopy(values[p.name])
        return args, kwargs


class Apart:
    """with apart(): what the user's code does to the process does not reach the run, and what it
    imports it finds beside itself, also where that is called like a module of ours."""

    def __init__(self, path):
        self.folder = Path(path).absolute().parent
        beside = {x.stem for x in self.folder.glob("*.py")}
        beside |= {x.parent.name for x in self.folder.glob("*/*.py")}
        ours = {x.stem for x in OURS.glob("*.py")} | {x.parent.name for x in OURS.glob("*/*.py")}
        self.clashing = set() if self.folder.samefile(OURS) else beside & ours
        self.modules = {}  # of the user's, called like ours
        self.states = None  # of STATES, as the user's code left them

    @contextlib.contextmanager
    def __call__(self):
        same = [(read, put_back, read()) for read, put_back in CHANGED]
        argv, outputs = list(sys.argv), (sys.stdout, sys.stderr)
        ours, states = self._swap(self.modules), read_states()
        if self.states is None:
            sys.path.insert(0, str(self.folder))
        else:
            put_back_states(self.states)
        try:
            yield
        finally:
            self.modules, self.states = self._swap(ours), read_states()
            put_back_states(states)
            sys.argv[:], (sys.stdout, sys.stderr) = argv, outputs
            for read, put_back, state in same:
                if read() != state:
                    put_back(state)

    def _swap(self, modules):
        """Puts modules in place of those whose names clash. -> those"""
        if not self.clashing:
            return {}
        names = [name for name in sys.modules if name.partition(".")[0] in self.clashing]
        taken = {name: sys.modules.pop(name) for name in names}
        sys.modules.update(modules)
        return taken


def read_states():
    return [read() for read, _ in STATES]


def put_back_states(states):
    for (_, put_back), state in zip(STATES, states):
        put_back(state)


def _kind(function):
    """-> why what can be called is no reward all the same, or "" """
    while isinstance(function, partial):
        function = function.func
    code = function if inspect.isroutine(function) else type(function).__call__
    if inspect.iscoroutinefunction(code) or inspect.isasyncgenfunction(code):
        return "it is async, and nobody awaits it; give a plain function"
    if inspect.isgeneratorfunction(code):
        return "it is a generator (it has a yield); a reward must return a number"
    return ""


def _flat(text):
    """On one line, and no longer than one can read"""
    text = " ".join(str(text).split())
    return text if len(text) < 200 else text[:200] + " …"

"""A user's reward: a function in a file, bound by the names of its parameters."""

import contextlib
import copy
import importlib.util
import inspect
import os
import sys
import traceback

import torch

from data import UserError, say


class UserReward:
    """reward(prompt, completion, ended, **columns) -> float. The user's function gets copies of
    those arguments that its parameters name. Raises UserError if the function is missing, names
    something that no row has, raises an error, or returns anything but a finite number."""

    def __init__(self, name, task):
        path, _, attribute = name.rpartition(":")
        if not path.endswith(".py"):
            form = "give task, rm, the X.pt of a reward model, or a function as FILE.py:function"
            raise UserError(f"--reward {name}: {form}")
        if not os.path.isfile(path):
            raise UserError(f"--reward {name}: {path} is no file; give FILE.py:function")
        self.name = name
        self.folder = os.getcwd()  # of the user's code, which may change it
        self.function = self._find(path, attribute)
        self.names, self.takes_all = self._parameters(task)

    def _find(self, path, attribute):
        sys.path.insert(0, os.path.dirname(os.path.abspath(path)))  # as for a script
        spec = importlib.util.spec_from_file_location("user_reward", path)
        module = sys.modules["user_reward"] = importlib.util.module_from_spec(spec)
        try:
            with self._users_code():
                spec.loader.exec_module(module)
        except (Exception, SystemExit) as e:  # whatever stands in the file
            why = f"{path} cannot be run ({type(e).__name__}: {_flat(e)}); mend it"
            raise UserError(f"--reward {self.name}: {why}") from None
        function = getattr(module, attribute, None)
        if not callable(function):
            raise UserError(f"--reward {self.name}: {path} has no function {attribute!r}")
        return function

    def _parameters(self, task):
        """-> (the names of the function's parameters, whether it takes all columns). Each parameter
        without a default must be something that every row has."""
        try:
            parameters = inspect.signature(self.function).parameters.values()
        except (ValueError, TypeError):  # some built-in functions have none
            remedy = "wrap it in a function of (prompt, completion)"
            words = f"its parameters cannot be read; {remedy}"
            raise UserError(f"--reward {self.name}: {words}") from None
        given, columns = ("prompt", "completion", "ended"), task.columns()
        named = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        for p in named:
            takes = f"--reward {self.name} takes {p.name!r}"
            if p.default is not p.empty and p.name not in (*given, *columns):
                say(f"{takes}, which is no column of the rows: it is always {_flat(p.default)}")
            if p.default is not p.empty or p.name in given:
                continue
            if p.name not in columns:
                there = ", ".join([*given, *columns])
                raise UserError(f"{takes}, which is no column of the rows (there are {there})")
            if place := task.lacks(p.name):
                raise UserError(f"{takes}, which {place} lacks; give the parameter a default")
        return {p.name for p in named}, any(p.kind is p.VAR_KEYWORD for p in parameters)

    def __call__(self, prompt, completion, ended=True, **columns):
        values = columns | {"prompt": prompt, "completion": completion, "ended": ended}
        arguments = {k: x for k, x in values.items() if self.takes_all or k in self.names}
        try:
            with self._users_code():
                x = self.function(**copy.deepcopy(arguments))
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
        if inspect.iscoroutine(x):
            x.close()  # or Python warns that nobody awaits it
        what = f"returned {_flat(repr(x))}"
        raise self._at(prompt, completion, what, "it must return a finite number")

    def _at(self, prompt, completion, what, remedy):
        place = f"the prompt {_flat(repr(prompt))} and the completion {_flat(repr(completion))}"
        return UserError(f"--reward {self.name} {what} at {place}; {remedy}")

    @contextlib.contextmanager
    def _users_code(self):
        """The user's code runs within this block, without gradients and in a working folder of its
        own, so that the relative paths of the run keep their meaning."""
        ours = os.getcwd()
        try:
            os.chdir(self.folder)
            with torch.no_grad():
                yield
            self.folder = os.getcwd()
        finally:
            os.chdir(ours)


def _flat(text):
    """-> the text on one line, cut after 200 characters"""
    text = " ".join(str(text).split())
    return text if len(text) < 200 else text[:200] + " …"

"""A user's reward: a function `reward(prompt, completion, **columns) -> float` in a file of theirs, named as FILE.py:function."""
import importlib.util
import inspect
import os
import sys
import traceback

from data.error import DataError


def user_reward(name, columns):
    """-> reward(prompt, completion, ended, **columns) -> float: the user's function, which gets `ended` and the row's columns as far
    as it names them. columns: those of a row. Raises DataError, one line, for a function that is not there, wants a column that is
    not there, raises, or returns something that is no finite number."""
    function, takes = _find(name), None
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (ValueError, TypeError):  # some built-in functions have none
        parameters = []
    kinds, names = [p.kind for p in parameters], [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if len(names) < 2 or {"prompt", "completion"} <= set(names) and names[:2] != ["prompt", "completion"]:
        raise DataError(f"--reward {name}: the function must take (prompt, completion, …), a prompt and one completion of it at a time")
    if inspect.Parameter.VAR_KEYWORD not in kinds:
        takes = [p.name for p in parameters[2:] if p.kind is not p.VAR_POSITIONAL]
        missing = [p.name for p in parameters[2:] if p.name in takes and p.default is p.empty and p.name not in {"ended", *columns}]
        if missing:
            had = ", ".join(columns) or "none"
            raise DataError(f"--reward {name} takes {missing[0]!r}, which is no column of the rows (beside the prompt they have {had})")

    def reward(prompt, completion, ended=True, **columns):
        columns["ended"], place = ended, f"the prompt {prompt!r} and the completion {completion!r}"
        try:
            x = function(prompt, completion, **(columns if takes is None else {k: columns[k] for k in takes if k in columns}))
        except (Exception, SystemExit) as e:  # a user's function raises what it likes
            line = next((frame.lineno for frame in traceback.extract_tb(e.__traceback__)[1:]), "?")
            raise DataError(f"--reward {name} raised {type(e).__name__} ({_flat(e)}, line {line}) at {place}; mend the function") from None
        try:
            if not isinstance(x, str) and abs(float(x)) < 1e38:  # it becomes a float32
                return float(x)
        except (TypeError, ValueError, RuntimeError, OverflowError):
            pass
        raise DataError(f"--reward {name} returned {_flat(repr(x))} at {place}; it must return a finite number")

    return reward


def _flat(text):
    """On one line, and no longer than one can read"""
    text = " ".join(str(text).split())
    return text if len(text) < 200 else text[:200] + " …"


def _find(name):
    """FILE.py:function -> the function"""
    path, _, attribute = name.rpartition(":")
    if not path.endswith(".py"):
        raise DataError(f"--reward {name}: give task, rm, or a function of your own as FILE.py:function")
    if not os.path.isfile(path):
        raise DataError(f"--reward {name}: {path} is no file; give FILE.py:function")
    sys.path.append(os.path.dirname(os.path.abspath(path)))  # for what it may import from beside itself
    spec = importlib.util.spec_from_file_location("user_reward", path)
    module = sys.modules["user_reward"] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as e:  # whatever stands in the file
        raise DataError(f"--reward {name}: {path} cannot be run ({type(e).__name__}: {_flat(e)}); mend it") from None
    function = getattr(module, attribute, None)
    if not callable(function):
        raise DataError(f"--reward {name}: {path} has no function {attribute!r}")
    return function

"""A user's reward: a function `reward(prompt, completion, **columns) -> float` in a file of theirs, named as FILE.py:function."""
import importlib.util
import inspect
import math
import os
import sys

from data.error import DataError


def user_reward(name, columns):
    """-> reward(prompt, completion, ended, **columns) -> float: the user's function, which gets `ended` and the row's columns as far
    as it names them. columns: those of a row. Raises DataError, one line, for a function that is not there, wants a column that is
    not there, raises, or returns something that is no finite number."""
    function, takes = _find(name), None
    parameters = list(inspect.signature(function).parameters.values())
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        takes = [p.name for p in parameters[2:]]
        missing = [p.name for p in parameters[2:] if p.default is p.empty and p.name not in {"ended", *columns}]
        if missing:
            had = ", ".join(columns) or "none"
            raise DataError(f"--reward {name} takes {missing[0]!r}, which is no column of the rows (beside the prompt they have {had})")

    def reward(prompt, completion, ended=True, **columns):
        columns["ended"] = ended
        try:
            x = function(prompt, completion, **(columns if takes is None else {k: columns[k] for k in takes if k in columns}))
        except Exception as e:  # a user's function raises what it likes
            raise DataError(f"--reward {name} raised {type(e).__name__} ({e}) at the prompt {prompt!r}; mend the function") from None
        try:
            if not isinstance(x, str) and math.isfinite(float(x)):
                return float(x)
        except (TypeError, ValueError, RuntimeError):
            pass
        raise DataError(f"--reward {name} returned {x!r} at the prompt {prompt!r}; it must return a finite number")

    return reward


def _find(name):
    """FILE.py:function -> the function"""
    path, _, attribute = name.rpartition(":")
    if not path.endswith(".py"):
        raise DataError(f"--reward {name}: give task, rm, or a function of your own as FILE.py:function")
    if not os.path.isfile(path):
        raise DataError(f"--reward {name}: {path} is no file; give FILE.py:function")
    sys.path.append(os.path.dirname(os.path.abspath(path)))  # for what it may import from beside itself
    spec = importlib.util.spec_from_file_location("user_reward", path)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as e:  # whatever stands in the file
        raise DataError(f"--reward {name}: {path} cannot be run ({type(e).__name__}: {e}); mend it") from None
    function = getattr(module, attribute, None)
    if not callable(function):
        raise DataError(f"--reward {name}: {path} has no function {attribute!r}")
    return function

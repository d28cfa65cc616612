"""Our scripts beside TRL's trainers: peers.py measures the same shapes for analysis.bench, sides.py
runs the same tokens for analysis.parity. Both need trl, transformers and datasets."""

import importlib.util

from data import UserError

OFFLINE = {"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}  # environment of a process


def check(who):
    """Stops if a package is missing. who: what needs it"""
    for name in ("trl", "transformers", "datasets"):
        if importlib.util.find_spec(name) is None:
            remedy = "pip install -r requirements-peers.txt"
            raise UserError(f"{who} needs the package {name}, which is not installed; {remedy}")

"""Everything that a training loop needs and that appears in no equation."""

from training.device import Compute
from training.options import (
    JudgedOptions,
    Options,
    PairOptions,
    RolloutOptions,
    ScratchOptions,
    opt,
    parse,
)
from training.run import Run
from training.sampling import Rollout
from training.shell import command
from training.state import Weights

__all__ = [
    "Compute",
    "JudgedOptions",
    "Options",
    "PairOptions",
    "RolloutOptions",
    "Rollout",
    "Run",
    "Weights",
    "ScratchOptions",
    "command",
    "opt",
    "parse",
]

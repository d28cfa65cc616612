"""--optimizer adamw8bit: bitsandbytes' AdamW, whose moments have 8 bits (arXiv:2110.02861).

Each moment is stored as an index into a table of 256 values, which are multiplied by the largest
moment of its block of 256 neighbours. So each number of a large parameter has 2 + 8/256 bytes of
moments instead of the 8 of float32. A parameter with few numbers keeps its moments in float32.
"""

import importlib.util

import torch

from data import UserError

BLOCK, SMALL = 256, 4096  # numbers of a block; a parameter with fewer numbers is not quantized
SHARD = "--shard splits weights into DTensors, but its kernels read only plain tensors"


def check(o):
    """Refuses what the package cannot do, and a machine without it."""
    refuse(o.shard, SHARD)
    refuse(o.dtype == "float64", "it steps in float32, not in --dtype float64")
    refuse(o.device == "mps", "it has no kernels for --device mps")
    if importlib.util.find_spec("bitsandbytes") is None:
        install = "pip install -r requirements-gpu.txt"
        raise UserError(f"--optimizer adamw8bit needs bitsandbytes: {install}")


def refuse(given, why):
    if given:
        raise UserError(f"--optimizer adamw8bit: {why}; leave one of the two out")


def make(groups, lr, betas):
    """-> the optimizer of these parameters, each group with its weight decay"""
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit(groups, lr=lr, betas=betas, min_8bit_size=SMALL)


def state(p, device):
    """-> the moments of a parameter as tensors of zeros, {name: tensor}"""
    small = p.numel() < SMALL
    kind = {"dtype": torch.float32 if small else torch.uint8, "device": device}
    found = {name: torch.zeros(p.shape, **kind) for name in ("state1", "state2")}
    blocks = 0 if small else -(-p.numel() // BLOCK)
    return found | {name: torch.zeros(blocks, device=device) for name in ("absmax1", "absmax2")}


def size(parameters):
    """-> the bytes of their moments"""
    return sum(x.nbytes for p in parameters for x in state(p, "meta").values())


class Outline(torch.optim.Optimizer):
    """Holds the moments and tables of bitsandbytes' optimizer, and moves nothing. It takes the
    place of that optimizer if tensors have no numbers."""

    def __init__(self, parameters):
        super().__init__(parameters, {})
        self.tables = torch.zeros(2, 256)  # of all parameters

    def step(self):
        for p in self.param_groups[0]["params"]:
            if p not in self.state:
                self.state[p] = state(p, p.device) | {"tables": self.tables}

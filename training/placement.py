"""Where the weights of a model lie. Without --shard each process holds whole models on its device;
with --shard a part of each, as sharding.py says. A run asks its placement, and never which it is.
"""

import torch

from training import distributed


class Whole:
    """Every process holds whole models, and gradients are summed over the processes."""

    mapped = False  # whether a checkpoint's weights stay in its file until they are read
    keeps_casts = True  # whether autocast may keep a weight's cast until its next use
    words = ""  # what follows the number of processes in a saved state

    def __init__(self, device, dtype):
        self.device, self.dtype = device, dtype  # of the weights that are trained

    def place(self, model):
        """Takes a model that was read or made to the device, in the precision of master weights."""
        return model.to(self.device, self.dtype)

    def complete(self, model, source):
        """-> a model that will not change its make any more, with its numbers. source: the model
        that has them, which may be the same"""
        return model

    def frozen(self, p):
        """A parameter -> what a frozen copy of its model has in its place. What is frozen already
        is shared."""
        return p.clone() if p.requires_grad else p

    def gathered(self, model, copy):
        """-> the model with all its weights. copy(model, take): a copy of what `take` makes of the
        weights"""
        return model

    def total_gradients(self, parameters):
        """Sums the gradients over the processes, after the last backward pass of a step."""
        distributed.total_gradients(parameters)

    def model_to_save(self, model):
        """-> a model for a file, whole in the first process"""
        return model

    def state_to_save(self, state):
        """-> a tree of tensors for a file, whole in the first process"""
        return state

    def collect_garbage(self):
        """Frees what nobody holds any more, if Python does not do so at once."""


def choose(shard, device, dtype):
    """-> the placement of a run, with --shard or without"""
    if not shard:
        return Whole(device, dtype)
    from training.sharding import Parts

    return Parts(device, dtype)


def is_part(x):
    """Whether a tensor is split over the processes"""
    return hasattr(x, "full_tensor")


def local(x):
    """-> what this process holds of a tensor"""
    return x.to_local() if is_part(x) else x


def full(x):
    """-> a tensor with all its rows; for those of a part, every process must ask"""
    return x.full_tensor() if is_part(x) else x


@torch.no_grad()
def put(p, tensor):
    """Writes a full tensor, or this process's rows of it, into a tensor on the device."""
    if is_part(p):
        rows = -(-len(tensor) // distributed.size)
        tensor = tensor[rows * distributed.rank : rows * (distributed.rank + 1)]
    local(p).copy_(tensor)

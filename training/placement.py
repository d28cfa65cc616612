"""Places the weights of models. Without --shard each process holds whole models on its device; with
--shard it holds a part of each (sharding.py). A run calls its placement without asking which of the
two it is.
"""

from functools import partial

import torch

from gpt import GPT, ScalarGPT
from training import distributed


class Whole:
    """Every process holds whole models, and gradients are summed over the processes."""

    keeps_casts = True  # whether autocast may keep a weight's cast until its next use
    words = ""  # what follows the number of processes in a saved state

    def __init__(self, device, dtype):
        self.device, self.dtype = device, dtype  # of the weights that are trained

    def place(self, model, low=None):
        """Moves a new model to the device, one tensor after the other, and casts it to the
        precision of master weights. low: that of its linear layers, if they are never trained"""
        found, cast = values(model), linear(model)
        for name, p in model.named_parameters():
            dtype = low if low and name in cast else self.dtype
            x = found.pop(name)().to(self.device, dtype)
            attach(model, name, torch.nn.Parameter(x, p.requires_grad))
        return model

    def complete(self, model, source):
        """-> a model that gets no more layers or adapters, with its weights. source: the model that
        has these weights, which may be the same"""
        return model

    def frozen(self, p):
        """A parameter -> what a frozen copy of its model has in its place. A parameter that is
        frozen itself is shared."""
        return p.clone() if p.requires_grad else p

    def gathered(self, model, copy):
        """-> the model with all its weights. copy(model, take): a copy with the weights take(p)"""
        return model

    def total_gradients(self, parameters):
        """Sums the gradients over the processes, after the last backward pass of a step."""
        distributed.total_gradients(parameters)

    def model_to_save(self, model):
        """-> the model to write to a file, complete in the first process"""
        return model

    def state_to_save(self, state, path):
        """-> a tree of tensors to write to a file, complete in the first process"""
        return state

    def collect_garbage(self):
        """Frees what nobody holds any more, if Python does not do so at once."""


def linear(model):
    """-> the names of all weights of a model's linear layers but a scalar head, which computes in
    float32"""
    layers = [(name, x) for name, x in model.named_modules() if isinstance(x, torch.nn.Linear)]
    return {key for name, x in layers if name != "head" for key, _ in x.named_parameters(name)}


def values(model):
    """-> {name: a function that gives the full tensor} of a model that is in memory, still in its
    files, or in parts, which all processes must then call"""
    return {
        name: getattr(p, "read", partial(full, p.detach())) for name, p in model.named_parameters()
    }


def is_part(x):
    """Whether a tensor is split over the processes"""
    return hasattr(x, "full_tensor")


def local(x):
    """-> what this process holds of a tensor"""
    return x.to_local() if is_part(x) else x


def like(model, adapted=True):
    """-> a model of the same shapes on "meta", without numbers. adapted: with its adapters"""
    with torch.device("meta"):
        new = (ScalarGPT if isinstance(model, ScalarGPT) else GPT)(model.config)
    for name, adapter in adapters(model).items() if adapted else ():
        attach(new, name, adapter.over(new.get_submodule(name)))
    new.checkpoint_activations = model.checkpoint_activations
    return new


def adapters(model):
    """-> {name: LoRA (lora.py)}"""
    return {name: m for name, m in model.named_modules() if hasattr(m, "over")}


def attach(model, name, x):
    """Puts a module or a parameter in its place."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, x)


def full(x):
    """-> a tensor with all its rows. If it is split, every process must call this."""
    return x.full_tensor() if is_part(x) else x


@torch.no_grad()
def put(p, tensor):
    """Writes a full tensor, or this process's rows of it, into a tensor on the device. One that is
    stored in parts (parts.py) writes itself."""
    if hasattr(tensor, "read_into"):
        tensor.read_into(p)
        return
    if is_part(p):
        rows = -(-len(tensor) // distributed.size)
        tensor = tensor[rows * distributed.rank : rows * (distributed.rank + 1)]
    local(p).copy_(tensor)

"""--shard: FSDP2. Each process holds a part of every weight, gradient and moment (PyTorch ≥ 2.8).

A part is some of the rows of a tensor, which torch calls a DTensor. Blocks are gathered one by one
as they are needed, and freed again; what is outside the blocks is gathered around them. A model is
laid out on "meta", where tensors have a shape and no numbers, then each process takes its own rows
of one whole tensor after the other: no process holds a whole model.
"""

import warnings
from functools import partial

import torch
from torch.utils._pytree import tree_map

from gpt import ScalarGPT
from training import distributed, lora


def values(model):
    """-> {name: a function that gives the whole tensor}, of a model in memory, of one that is still
    in its files, and of one whose parts the processes hold: then all of them must ask"""
    found = dict(getattr(model, "unread", {}))
    for name, p in model.named_parameters():
        if not p.is_meta:
            found[name] = partial(full, p.detach())
    for name, module in model.named_children():
        found |= {f"{name}.{key}": f for key, f in getattr(module, "unread", {}).items()}
    return found


def full(x):
    """-> a tensor with all its rows; for those of a part, every process must ask"""
    return x.full_tensor() if is_part(x) else x


def is_part(x):
    return hasattr(x, "full_tensor")


def lay_out(model, dtype):
    """Moves a model to "meta", and keeps in `unread` where its numbers are to be had."""
    found = values(model)
    for module in model.children():
        vars(module).pop("unread", None)
    model.to("meta", dtype)
    model.unread = found
    return model


def shard(model, device):
    """Cuts a model into parts, and reads this process's."""
    found = lay_out(model, None).unread
    cut(model, device.type).to_empty(device=device)
    for name, p in model.named_parameters():
        put(p, found.pop(name)())
    del model.unread
    return model


def cut(model, kind):
    """A model on "meta" -> the same, each tensor of it a part. Gradients are summed over them."""
    # half a second to import, which few runs need
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # none is written
    for unit in (*model.blocks, model):
        fully_shard(unit, mesh=distributed.mesh(kind), reshard_after_forward=True)
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)
    scalar = "values", "values_before", "score"
    for method in scalar if isinstance(model, ScalarGPT) else ("logprobs",):
        register_fsdp_forward_method(model, method)  # the outermost alone: an inner one would free
    return model


@torch.no_grad()
def put(p, tensor):
    """Writes this process's rows of a full tensor into its part."""
    if is_part(p):
        rows = -(-len(tensor) // distributed.size)
        tensor = tensor[rows * distributed.rank : rows * (distributed.rank + 1)]
    local(p).copy_(tensor)


def gathered(model):
    """-> a plain model with the whole weights, on the CPU, in the first process alone"""
    plain = lora.like(model)
    for name, x in model.named_parameters():
        x = gathered_tree(x.detach())
        if distributed.is_first:
            lora.put(plain, name, torch.nn.Parameter(x))
    return plain


def local(x):
    """-> what this process holds of a tensor"""
    return x.to_local() if is_part(x) else x


def gathered_tree(tree):
    """-> a tree of tensors with full ones in the first process, on the CPU. The others send their
    parts, one tensor after the other, and get nothing."""

    def gather(x):
        x = full(x).cpu() if is_part(x) else x
        return x if distributed.is_first else None

    return tree_map(gather, tree)

"""--shard: FSDP2. Each process holds a part of every weight, gradient and moment (PyTorch ≥ 2.8).

A part is some of the rows of a tensor; torch calls a tensor in parts a DTensor. Blocks are gathered
one by one when they are needed, and then freed; weights outside the blocks stay gathered around
them. A model is laid out on "meta", where tensors have a shape but no numbers. Then each process
takes its own rows of one full tensor after another, so that no process holds a whole model.
"""

import gc
import warnings

import torch

from data import UserError
from gpt import ScalarGPT
from training import distributed
from training.placement import Whole, attach, full, like, put, values


class Parts(Whole):
    """Every process holds a part of each model, and the backward pass sums gradients over them."""

    keeps_casts = False  # a cast would outlive the weights that were gathered for it
    words = " --shard"

    def place(self, model, low=None):
        """Moves a model to "meta"; `read` of each parameter gives its tensor."""
        found = values(model)
        for name, p in model.to("meta", self.dtype).named_parameters():
            p.read = found[name]
        return model

    def complete(self, model, source):
        """Cuts a model into parts, and reads those of this process."""
        self.collect_garbage()  # an earlier model may still take room
        found = values(source)
        cut(model.to("meta"), self.device.type).to_empty(device=self.device)
        for name, p in model.named_parameters():
            put(p, found.pop(name)())
        return model

    def frozen(self, p):
        """No weight is shared, because only one model can gather its parts."""
        return torch.empty(p.shape, dtype=p.dtype, device="meta")

    def gathered(self, model, copy):
        return copy(model, full)

    def total_gradients(self, parameters):
        """Does nothing: the backward pass has summed them."""

    def model_to_save(self, model):
        plain = like(model)
        for name, x in model.named_parameters():
            x = full(x.detach())
            if distributed.is_first:
                attach(plain, name, torch.nn.Parameter(x.cpu()))
        return plain

    def state_to_save(self, state, path):
        """Every process writes its parts beside the path of the state."""
        from training import parts

        return parts.write(state, path)

    def collect_garbage(self):
        """A sharded model has reference cycles, and would stay in memory."""
        gc.collect()


def check(processes):
    """Refuses --shard for one process, and with a torch that has no FSDP2 as it is used here."""
    if processes == 1:
        start = "start it with torchrun --nproc-per-node N, N ≥ 2"
        raise UserError(f"--shard cuts models for many processes, but this is one; {start}")
    found = torch.__version__.partition("+")[0]
    if tuple(map(int, found.split(".")[:2])) < (2, 8):
        raise UserError(f"--shard needs torch 2.8 or later, but this is {found}; leave it out")


def cut(model, kind):
    """Makes each tensor of a model on "meta" a part. Gradients are summed over the processes."""
    # half a second to import, and not in every torch
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    # FSDP warns of a view, to which nothing is written
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
    for unit in (*model.blocks, model):
        fully_shard(unit, mesh=distributed.mesh(kind), reshard_after_forward=True)
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)
    scalar = "values", "values_before", "score"
    for method in scalar if isinstance(model, ScalarGPT) else ("read",):
        register_fsdp_forward_method(model, method)  # an inner one would free too early
    return model

"""LoRA (arXiv:2106.09685): the weights W of a linear layer stay, and a product of two low matrices
beside them is trained: y = W x + b + α/r B A x, A (r, in), B (out, r). B starts at 0, so that the
first step's model is the one that it starts from.
"""

import copy
import math

import torch
import torch.nn.functional as F
from torch import nn

from gpt import Linear


class LoRA(Linear):
    """A linear layer that takes over another one's W and b, frozen."""

    def __init__(self, linear, rank, alpha, generator):
        nn.Module.__init__(self)
        n_out, n_in = linear.weight.shape
        device, dtype = (
            linear.weight.device,
            torch.promote_types(linear.weight.dtype, torch.float32),
        )
        self.in_features, self.out_features, self.scale = n_in, n_out, alpha / rank
        self.weight, self.bias = linear.weight, linear.bias
        bound = 1 / math.sqrt(n_in)
        A = torch.empty(rank, n_in, dtype=dtype).uniform_(-bound, bound, generator=generator)
        self.A = nn.Parameter(A.to(device))
        self.B = nn.Parameter(torch.zeros(n_out, rank, device=device, dtype=dtype))

    def forward(self, x):
        low = F.linear(x, self.A.to(x.dtype)) * self.scale
        return F.linear(x, self.weight, self.bias) + F.linear(low, self.B.to(x.dtype))

    __call__ = forward

    def merged(self):
        """-> W + α/r B A, not below float32"""
        return self.weight.to(self.B.dtype) + self.scale * self.B @ self.A

    def plain(self, weight):
        """-> a linear layer with these weights and the same bias"""
        linear = Linear(self.in_features, self.out_features, device="meta")
        linear.weight, linear.bias = weight, self.bias
        return linear


def adapters(model):
    """-> {name: LoRA}"""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRA)}


def adapt(model, rank, alpha, seed, dtype=None):
    """Freezes a model but for a scalar head, and gives every linear layer of its blocks an adapter,
    once. dtype: of the frozen linear layers, where it is not the model's."""
    if adapters(model):
        return
    for name, p in model.named_parameters():
        p.requires_grad_(name.startswith("head."))
    generator = torch.Generator().manual_seed(seed)
    for name, module in list(model.named_modules()):
        if isinstance(module, Linear):
            module.to(dtype or module.weight.dtype)
            if "blocks." in name:
                _put(model, name, LoRA(module, rank, alpha, generator))


def base(model):
    """-> the same model without its adapters: other objects, the very same weights"""
    shared = {id(p): p for p in model.parameters()}
    model = copy.deepcopy(model, shared)
    for name, adapter in adapters(model).items():
        _put(model, name, adapter.plain(adapter.weight))
    return model


def merge(model):
    """Makes a model whole, on the CPU: its adapters become part of its weights. -> what they were,
    {name: tensor}, or {} where there are none"""
    found = adapters(model)
    if not found:
        return {}
    model.to("cpu")
    kept = {}
    for name, adapter in found.items():
        kept |= {f"{name}.A": adapter.A.detach(), f"{name}.B": adapter.B.detach()}
        with torch.no_grad():
            _put(model, name, adapter.plain(nn.Parameter(adapter.merged())))
    model.to(adapter.A.dtype)
    return kept


def _put(model, name, module):
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)

"""LoRA (arXiv:2106.09685): the weights W of a linear layer stay fixed, and a product of two
low-rank matrices is trained beside them: y = W x + b + α/r B A x, A (r, in), B (out, r). B starts
at 0, so that training starts from the unchanged model.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from gpt import Linear
from training.placement import adapters, attach, like


class LoRA(Linear):
    """A linear layer that takes over another one's W and b, frozen."""

    def __init__(self, linear, A, scale):
        nn.Module.__init__(self)
        self.out_features, self.in_features = linear.weight.shape
        self.weight, self.bias, self.scale = linear.weight, linear.bias, scale  # α/r
        self.A = nn.Parameter(A)
        self.B = nn.Parameter(A.new_zeros(self.out_features, len(A)))

    def forward(self, x):
        low = F.linear(x, self.A.to(x.dtype)) * self.scale
        return F.linear(x, self.weight, self.bias) + F.linear(low, self.B.to(x.dtype))

    __call__ = forward

    def over(self, linear):
        """-> the same adapter for another layer, on "meta" and without numbers"""
        return LoRA(linear, self.A.to("meta"), self.scale)

    def merged(self):
        """-> W + α/r B A, at least in float32"""
        return merged_weight(self.weight, self.A, self.B, self.scale)

    def plain(self, weight):
        """-> a linear layer with these weights and the same bias"""
        linear = Linear(self.in_features, self.out_features, device="meta")
        linear.weight, linear.bias = weight, self.bias
        return linear


def merged_weight(W, A, B, scale):
    """-> W + scale B A, in the wider precision of W and B"""
    return W.to(torch.promote_types(W.dtype, B.dtype)) + scale * B @ A


def adapt(model, rank, alpha, seed):
    """Freezes a model except for a scalar head, and gives every linear layer of its blocks an
    adapter, unless the model has adapters already."""
    if adapters(model):
        return
    for name, p in model.named_parameters():
        p.requires_grad_(name.startswith("head."))
    generator = torch.Generator().manual_seed(seed)
    for name, module in list(model.named_modules()):
        if isinstance(module, Linear) and "blocks." in name:
            wide = torch.promote_types(module.weight.dtype, torch.float32)
            bound = 1 / math.sqrt(module.in_features)
            A = torch.empty(rank, module.in_features, dtype=wide)
            A.uniform_(-bound, bound, generator=generator)
            A = A if module.weight.is_meta else A.to(module.weight.device)
            attach(model, name, LoRA(module, A, alpha / rank))


def base(model):
    """-> the same model without its adapters, as new modules that share its weights. A model
    without adapters is returned itself."""
    if not adapters(model):
        return model
    bare = like(model, adapted=False)
    for name, p in model.named_parameters():
        if not name.endswith((".A", ".B")):
            attach(bare, name, p)
    return bare


def merged(model):
    """-> the same model with its adapters merged into new weights of their layers"""
    plain = base(model)
    for name, adapter in adapters(model).items():
        attach(plain, name, adapter.plain(nn.Parameter(adapter.merged(), requires_grad=False)))
    return plain

"""The head computes log-probs of tokens from states, with one table of logits.

    z = h Wᵀ / τ                                      (M, V) logits of M states
    log p(y) = z_y - log Σ_v exp z_v
    ∂ log p(y) / ∂z_v = 1[v = y] - exp z_v / Σ exp z

Autograd would keep a softmax beside the logits, and put their gradient into a third table. Here the
forward pass keeps the logits and one logsumexp per state, and the backward pass turns the logits
into their gradient in place. The table has at most TABLE bytes. The logits of further states are
made in chunks, and the backward pass makes each chunk again. Under autocast the states, weights and
logits have 16 bits, and the softmax is computed in float32, one block of rows at a time.
"""

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

TABLE = {"cpu": 3 * 2**26, "cuda": 3 * 2**30}  # bytes of logits that are kept, at most
CHUNK = {"cpu": 2**26, "cuda": 2**30}  # bytes of logits that are made at once beyond them
BLOCK = {"cpu": 2**19, "cuda": 2**27}  # number of logits that are read at once


def target_logprobs(h, W, target, temperature=1.0, entropy=False):
    """h (M, C) states, W (V, C), target (M,) int64 -> (log-probs of the targets, entropies), each
    (M,), nats. The log-probs are float32 or float64. The entropies have no gradient, and are None
    unless `entropy` asks for them."""
    kind = h.device.type
    low = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    with torch.autocast(kind, enabled=False):
        how = temperature, entropy, low, torch.is_grad_enabled()
        return TargetLogProbs.apply(h, W, target, *how)


class TargetLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, W, target, temperature, entropy, low, graph):
        ctx.dtypes, ctx.temperature = (h.dtype, W.dtype), temperature
        h, W = (h, W) if low is None else (h.to(low), W.to(low))
        wide = torch.promote_types(h.dtype, torch.float32)
        M, size = len(h), len(W) * h.element_size()
        ctx.kept = min(M, of_device(TABLE, h) // size) if graph else 0
        ctx.z, z = None, None
        logp, most, log_sum = (h.new_empty(M, 1, dtype=wide) for _ in range(3))
        H = torch.empty_like(logp) if entropy else None
        for part in parts(M, ctx.kept, of_device(CHUNK, h) // size):
            z = x = None  # a chunk ends before the next one is made
            z = F.linear(h[part], W)
            if part.stop <= ctx.kept:
                ctx.z = z
            for rows, x in blocks(z, part.start):
                x = x.to(wide) / temperature if temperature != 1 else x.to(wide)
                most[rows] = x.amax(1, keepdim=True)
                e = (x - most[rows]).exp_()
                total = e.sum(1, keepdim=True)
                log_sum[rows] = total.log()
                logp[rows] = x.gather(1, target[rows, None]) - most[rows] - log_sum[rows]
                if entropy:  # log Σ exp x - Σ p x, with the largest x at 0
                    mean = e.mul_(x - most[rows]).sum(1, keepdim=True) / total
                    H[rows] = log_sum[rows] - mean
        ctx.save_for_backward(h, W, target, most, log_sum)
        H = H[:, 0] if entropy else None
        if entropy:
            ctx.mark_non_differentiable(H)
        return logp[:, 0], H

    @staticmethod
    @once_differentiable
    def backward(ctx, g, _):
        h, W, target, most, log_sum = ctx.saved_tensors
        kept, ctx.z = ctx.z, None  # a second pass, if there is one, makes its own
        g = (g / ctx.temperature)[:, None]
        dh = torch.empty_like(h) if ctx.needs_input_grad[0] else None
        dW = None
        for part in parts(len(h), ctx.kept, of_device(CHUNK, h) // (len(W) * h.element_size())):
            z = x = block = None
            z, kept = F.linear(h[part], W) if kept is None else kept, None
            for rows, block in blocks(z, part.start):
                x = block.to(g.dtype)  # the block itself, unless it has 16 bits
                if ctx.temperature != 1:
                    x.div_(ctx.temperature)
                x.sub_(most[rows]).sub_(log_sum[rows]).exp_().mul_(-g[rows])
                x.scatter_add_(1, target[rows, None], g[rows])
                if x is not block:
                    block.copy_(x)
            if dh is not None:
                dh[part] = z @ W
            if ctx.needs_input_grad[1]:
                if dW is None:
                    dW = (z.T @ h[part]).to(ctx.dtypes[1])
                elif dW.dtype == z.dtype:
                    dW.addmm_(z.T, h[part])
                else:  # a sum in 16 bits would lose what small chunks add
                    dW += z.T @ h[part]
        dh = None if dh is None else dh.to(ctx.dtypes[0])
        return dh, dW, None, None, None, None, None


def of_device(limit, x):
    return limit["cpu" if x.is_cpu else "cuda"]


def parts(M, kept, rows):
    """Yields slices of M states: first the `kept` states whose logits are one table, and then
    `rows` states at a time. There is one slice even if there are no states."""
    if kept or not M:
        yield slice(0, kept)
    for first in range(kept, M, max(1, rows)):
        yield slice(first, min(first + max(1, rows), M))


def blocks(z, first):
    """z (R, V), the logits of the states from `first` on. Yields (which states, their logits)"""
    rows = max(1, of_device(BLOCK, z) // z.size(1))
    for i in range(0, len(z), rows):
        yield slice(first + i, min(first + i + rows, first + len(z))), z[i : i + rows]

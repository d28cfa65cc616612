"""What only a CUDA device needs. This file is loaded only if there is one.

The CPU puts work into a queue, and the device does it. If the CPU asks for a number that the device
computes, it waits until the queue is empty, and prepares no new work meanwhile. The functions here
avoid such waits and other costs:

    upload     copies many tensors at once, without waiting
    Moment     marks a point in the queue; the time between two is measured without a wait at each
    captured   turns a function into one launch, in place of hundreds
    attention  calls a kernel that does not write the scores to memory
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch.backends.cuda import SDPAParams, can_use_flash_attention
from torch.nn.attention.bias import causal_lower_right
from torch.utils._pytree import tree_flatten, tree_unflatten


def prepare(device):
    """Makes the settings for everything that is computed on a device."""
    torch.cuda.set_device(device.index or 0)  # streams and graphs are those of the current device
    # cuDNN's attention is the first choice in 16 bits on an H100 or later, but it takes 0.1 to 1 s
    # to plan for each new shape, and here nearly every step has a new width
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.set_float32_matmul_precision("highest")  # float32 is float32: no TF32 in its products


def upload(tree, device):
    """A tree of tensors on the CPU -> the same on the device. They travel in one copy, out of
    pinned memory, from which the device reads when the copy's turn in the queue comes."""
    leaves, shape = tree_flatten(tree)
    given = [x for x in leaves if x is not None]
    if not given:
        return tree
    raw = [x.contiguous().flatten().view(torch.uint8) for x in given]
    raw = [F.pad(x, (0, -len(x) % 8)) for x in raw]  # each begins at a multiple of 8 bytes
    there = torch.cat(raw).pin_memory().to(device, non_blocking=True)
    parts = zip(there.split([len(x) for x in raw]), given)
    moved = iter([part[: x.nbytes].view(x.dtype).view(x.shape) for part, x in parts])
    return tree_unflatten([None if x is None else next(moved) for x in leaves], shape)


class Moment:
    """A point in the device's queue. later - earlier is the time in seconds that the device took
    from one to the other; the subtraction waits for the later one."""

    def __init__(self):
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record()

    def __sub__(self, earlier):
        self.event.synchronize()
        return earlier.event.elapsed_time(self.event) / 1000


@cache
def side():
    """-> a stream and a pool of memory for captures, and the graph captured last, which is kept
    because a pool ends with its last graph"""
    return torch.cuda.Stream(), torch.cuda.graph_pool_handle(), []


def captured(step):
    """Captures `step`, a function without arguments, in a CUDA graph. -> a function that runs it
    again on the same memory. `torch.cuda.graph` would first empty the allocator's cache."""
    stream, pool, last = side()
    graph = torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        graph.capture_begin(pool)
        try:
            step()
        finally:
            graph.capture_end()
    torch.cuda.current_stream().wait_stream(stream)
    last[:] = [graph]
    return graph.replay


def attention(q, k, v):
    """Causal attention of the last Tq of Tk tokens, q (R, H, Tq, D), k and v (R, K, Tk, D), by a
    kernel that does not write (Tq, Tk) scores to memory. Flash attention computes only in 16 bits,
    takes no mask as a table, and does not run on every card. The kernel that replaces it cannot
    group heads (K < H), so each of the H heads then gets a copy of its keys and values.
    """
    H, K = q.size(1), k.size(1)
    if K < H and not can_use_flash_attention(SDPAParams(q, k, v, None, 0.0, False, True)):
        k, v = (x.repeat_interleave(H // K, 1) for x in (k, v))
    mask = causal_lower_right(q.size(2), k.size(2))
    return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=k.size(1) < H)

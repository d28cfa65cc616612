"""What only a CUDA device needs. Loaded where there is one.

The CPU prepares work, and the device does it from a queue. Whoever asks for a number of the device
waits until the queue is empty, and meanwhile no new work is prepared. So:

    upload     many tensors in one copy, for which nobody waits
    Moment     a point in the queue: what lies between two is timed, without waiting at each
    captured   a function as one launch, in place of hundreds
    attention  by a kernel that writes no scores
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch.backends.cuda import SDPAParams, can_use_flash_attention
from torch.nn.attention.bias import causal_lower_right
from torch.utils._pytree import tree_flatten, tree_unflatten


def prepare(device):
    """Sets what holds for all that is computed on a device."""
    torch.cuda.set_device(device.index or 0)  # streams and graphs are those of the current device
    # on an H100 or later the first choice in 16 bits. It makes a plan for each new shape, in 0.1 to
    # 1 s, and here nearly every step has a new width
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.set_float32_matmul_precision("highest")  # float32 is float32: no TF32 in its products


def upload(tree, device):
    """A tree of tensors on the CPU -> the same on the device. They travel in one copy, out of
    pinned memory, from which the device fetches it when it gets there."""
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
    """A point in the device's queue. later - earlier: the seconds in which the device got from one
    to the other; this waits for the later one."""

    def __init__(self):
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record()

    def __sub__(self, earlier):
        self.event.synchronize()
        return earlier.event.elapsed_time(self.event) / 1000


@cache
def side():
    """-> a stream and a pool of memory for captures, and the graph captured last: a pool ends with
    its last graph"""
    return torch.cuda.Stream(), torch.cuda.graph_pool_handle(), []


def captured(step):
    """-> a function without arguments as a CUDA graph, which computes it on the same memory. The
    `torch.cuda.graph` of torch would first empty the allocator's cache."""
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
    kernel that does not write (Tq, Tk) scores to memory. A mask in a table excludes flash
    attention, and what takes its place takes no groups of heads (K < H): then each of the H heads
    gets a copy of its keys and values. Flash attention computes in 16 bits, and not on every card.
    """
    H, K = q.size(1), k.size(1)
    if K < H and not can_use_flash_attention(SDPAParams(q, k, v, None, 0.0, False, True)):
        k, v = (x.repeat_interleave(H // K, 1) for x in (k, v))
    mask = causal_lower_right(q.size(2), k.size(2))
    return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=k.size(1) < H)

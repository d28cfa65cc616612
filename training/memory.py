"""Measures what a training step holds in memory: models, and the bytes of all tensors at its peak.

    ledger     the models that a script holds, by role, as text; `records` as plain facts
    Tracker    while it is on, it counts every tensor storage from its creation to its end
    track      turns on a Tracker that knows weights, gradients and AdamW's moments
    Meter      the bytes of one step of a run

A tracker counts the bytes of live storages, each of them once, however many views it has. A CUDA
device also needs memory for its context (about 0.5 GB), for workspaces of libraries, and for
rounding. The categories are:

    weights       parameters of all models
    casts         their copies in bfloat16, which autocast makes
    gradients     .grad of the parameters
    optimizer     AdamW's two moments
    logits        what has the vocabulary as its last axis: logits, softmax and their gradients
    sampling      all that sampling makes, such as the KV cache, uniforms and next-token
                  distributions, and all that judging the samples makes
    gathered      with --shard: full weights while they are needed, gradients while they are summed
    activations   the rest: what the backward pass keeps and makes, log-probs, the batch

If there are many processes, each counts only what it holds itself.
"""

import weakref
from collections import Counter
from contextlib import contextmanager

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gpt import GPT
from training.placement import local

aten = torch.ops.aten
PRODUCTS = aten.mm.default, aten.addmm.default, aten.linear.default, aten.bmm.default


def records(models, optimizer="adamw"):
    """{role: model} -> a plain record for each: role, trainable, the number of parameters and of
    trained ones, bytes, their parts. Weights that an earlier model shares are counted there. The
    bytes of a sharded model are those of this process. optimizer: the value of --optimizer"""
    out, counted = [], set()
    for role, model in models.items():
        parameters = list(model.parameters())
        own = [p for p in parameters if id(p) not in counted]
        counted |= {id(p) for p in own}
        trained = [p for p in parameters if p.requires_grad]
        size = _bytes(trained)
        parts = {
            "weight_bytes": _bytes(own),
            "gradient_bytes": size,
            "optimizer_bytes": 2 * size if optimizer == "adamw" else _eight_bits(trained),
        }
        facts = {"role": role, "trainable": bool(trained)}
        facts["parameters"] = sum(p.numel() for p in parameters)
        facts["trained_parameters"] = sum(p.numel() for p in trained)
        out.append(facts | {"bytes": sum(parts.values())} | parts)
    return out


def _bytes(parameters):
    return sum(local(p).numel() * p.element_size() for p in parameters)


def _eight_bits(parameters):
    from training import adamw8bit

    return adamw8bit.size(parameters)


def ledger(records):
    """-> the records as lines to read"""
    lines = [f"models held: {len(records)}"]
    for m in records:
        unit, name = size_unit(m["bytes"])
        kind = "trained" if m["trainable"] else "frozen"
        if not m["weight_bytes"]:
            lines.append(f"  {m['role']:<8} shared   the policy's weights, without its adapters")
            continue
        size = f"{m['parameters'] / 1e6:,.2f} M parameters, {m['bytes'] / unit:.1f} {name}"
        if 0 < m["trained_parameters"] < m["parameters"]:
            kind = "adapters"
            frozen = m["parameters"] - m["trained_parameters"]
            part = f"{m['trained_parameters'] / 1e6:,.2f} M of adapters trained"
            size = f"{frozen / 1e6:,.2f} M frozen, {part}, {m['bytes'] / unit:.1f} {name}"
        line = f"  {m['role']:<8} {kind:<8} {size}"
        if m["trainable"]:
            keys = ("weight_bytes", "gradient_bytes", "optimizer_bytes")
            weights, gradients, moments = (f"{m[key] / unit:.1f}" for key in keys)
            line += f" (weights {weights}, gradients {gradients}, AdamW {moments})"
        lines.append(line)
    return "\n".join(lines)


def size_unit(size):
    """Bytes -> (the unit to show them in, its name)"""
    return (2**30, "GiB") if size >= 2**30 else (1e6, "MB")


def peak_text(parts, most):
    """Bytes by category, at the peak and at the maximum of each category -> the sum, the parts, and
    the categories that are larger at another time, as text"""
    total = sum(parts.values())
    unit, symbol = size_unit(total)

    def shown(sizes):
        large = {name: x / unit for name, x in sizes.items() if x / unit >= 0.05}
        return ", ".join(f"{name} {x:.1f}" for name, x in large.items())

    inner = shown({name: x for name, x in parts.items() if name != "all"})
    names = ("logits", "sampling")
    other = shown({name: most[name] for name in names if most.get(name, 0) > parts.get(name, 0)})
    text = f"{total / unit:.1f} {symbol}"
    text += f" ({inner})" if inner else ""
    return text + (f"; at other times {other}" if other else "")


def flops(models, forward, backward, recompute=False):
    """FLOPs per token, without attention: 2N for each forward pass and 4N for each backward pass,
    6N with the recomputation of --checkpoint-activations. forward, backward: role -> passes. N: the
    weights that multiply every token. For frozen weights the backward pass takes 2N less."""
    total = 0
    for role, model in models.items():
        N = model.matmul_parameters()
        matrices = [p for p in model.parameters() if p.dim() == 2]
        trained = sum(p.numel() for p in matrices if p.requires_grad)
        trained = N if all(p.requires_grad for p in matrices) else trained
        back = (4 if recompute else 2) * N + 2 * trained
        total += 2 * N * forward[role] + back * backward[role]
    return total


@contextmanager
def track(models, optimizer):
    """Counts what happens within this block, beginning with weights and moments. -> the Tracker"""
    languages = [model for model in models.values() if isinstance(model, GPT)]
    tracker = Tracker(languages)
    hooks = []
    for model in models.values():
        for p in model.parameters():
            tracker.own(p, "weights")
            if p.requires_grad:
                count = p.register_post_accumulate_grad_hook
                hooks.append(count(lambda p: tracker.own(p.grad, "gradients")))
    for state in optimizer.state.values():
        for x in filter(torch.is_tensor, state.values()):
            tracker.own(x, "optimizer")
    hooks.append(optimizer.register_step_pre_hook(lambda *_: tracker.during("optimizer")))
    hooks.append(optimizer.register_step_post_hook(lambda *_: tracker.during(None)))
    try:
        with tracker:
            yield tracker
    finally:
        for hook in hooks:
            hook.remove()


class Tracker(TorchDispatchMode):
    """`total`: bytes of the live storages. `peak`: the largest total so far. `parts`: the peak by
    category. `most`: the largest size of each category so far."""

    def __init__(self, languages=()):
        super().__init__()
        self.languages = languages  # models with logits
        self.live = {}  # storage -> [bytes, category, a weak reference to it]
        self.heads = set()  # the storages of copies of the vocabulary's weights
        self.now = Counter()
        self.total = 0
        self.phase = None
        self.start()

    def start(self):
        """Starts a new peak, at the storages that are live now."""
        self.peak = self.total
        self.parts = dict(self.now)
        self.most = dict(self.now)

    def during(self, phase):
        """Counts new storages in this category from now on; None: in that of their kind."""
        self.phase = phase

    def own(self, tensor, category, head=False):
        """Counts a tensor, or moves one that is counted already to another category."""
        storage = local(tensor).untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self.live:
            self.now[self.live[key][1]] -= size
        else:
            self.total += size
            weakref.finalize(storage, _end, weakref.ref(self), key)
        self.live[key] = [size, category, weakref.ref(storage)]
        self.now[category] += size
        if head:
            self.heads.add(key)
        self._look(category)

    def _look(self, category):
        self.most[category] = max(self.now[category], self.most.get(category, 0))
        if self.total > self.peak:
            self.peak = self.total
            self.parts = dict(self.now)

    def _resized(self):
        """Counts storages that have a new size: FSDP2 empties and refills those of full weights."""
        for entry in list(self.live.values()):
            storage = entry[2]()
            more = storage.nbytes() - entry[0] if storage is not None else 0
            if more:
                entry[0] += more
                self.total += more
                self.now[entry[1]] += more
                self._look(entry[1])

    def _end(self, key):
        size, category, _ = self.live.pop(key)
        self.total -= size
        self.now[category] -= size
        self.heads.discard(key)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [local(x) for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        given = [(x, x.untyped_storage()._cdata) for x in tensors]
        if func.namespace in ("fsdp", "c10d"):
            self._gathered(func, given)
        old = {key for _, key in given}
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.device.type != "meta":
                key = local(x).untyped_storage()._cdata
                if key not in self.live and key not in old:
                    self.own(x, *self._kind(func, given, x))
        return out

    def _gathered(self, func, given):
        """Counts what FSDP2 makes beside the graph: full weights, and the sums of gradients."""
        self._resized()
        summed = "reduce_scatter" in func.name()
        for i, (x, key) in enumerate(given):
            if key not in self.live or self.live[key][1] == "activations":
                self.own(x, "gradients" if summed and i == 0 else "gathered")

    def _heads(self):
        """-> the storages of the vocabulary's weights, which change under FSDP2"""
        now = [local(model.head).untyped_storage()._cdata for model in self.languages]
        return self.heads.union(now)

    def _kind(self, func, given, out):
        """-> the category of the tensors that `func` has made, and whether they are a copy of the
        vocabulary's weights"""
        kinds = [self.live[key][1] if key in self.live else "" for _, key in given]
        if func is aten._to_copy.default and kinds[0] in ("weights", "gathered"):
            return self.phase or "casts", given[0][1] in self._heads()
        size = out.size(-1) if func in PRODUCTS else 0
        logits = any(size == model.config.vocab_size for model in self.languages)
        logits = logits and any(key in self._heads() for _, key in given)
        for (x, _), kind in zip(given, kinds):
            logits = logits or kind == "logits" and x.shape == out.shape
        return self.phase or ("logits" if logits else "activations"), False


def _end(tracker, key):
    """Called when a storage has ended. A finalizer keeps no tracker alive, and so no models."""
    if tracker():
        tracker()._end(key)


class Meter:
    """Measures the bytes of one step: on a CPU those of its tensors (compiled code hides them), on
    a GPU those that its allocator gave out. `peak`: once known, (bytes by category at the peak, the
    most of each category)"""

    def __init__(self, device, compiled):
        self.device, self.compiled = device, compiled
        self.tracker = self.peak = None

    @contextmanager
    def measure(self, models, optimizer, on):
        """on: whether this step is measured"""
        if on and self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            yield
            self.peak = {"all": self.allocated}, {}
        elif on and self.device.type == "cpu" and not self.compiled:
            with track(models, optimizer) as self.tracker:
                yield
            self.tracker = None
        else:
            yield

    @contextmanager
    def during(self, phase):
        """Counts storages made within this block in a category; None: in that of their kind."""
        if self.tracker:
            self.tracker.during(phase)
        yield
        if self.tracker:
            self.tracker.during(None)

    def figures(self):
        """-> the figures of the peak, for the record"""
        if not self.peak:
            return {}
        parts, most = self.peak
        return {"peak_bytes": sum(parts.values()), "peak": parts, "peak_most": most}

    def read(self):
        """Reads the peak right after the optimizer's step, so that an evaluation does not count."""
        if self.tracker:
            self.peak = self.tracker.parts, dict(self.tracker.most)
        elif self.device.type == "cuda":
            self.allocated = torch.cuda.max_memory_allocated(self.device)

"""What a training step holds in memory: the models, the bytes at the peak, and the same bytes predicted without allocating them.

    Ledger     the models that a script holds, by role: parameters, bytes of weights, gradients and AdamW's moments
    Tracker    while it is on, every tensor storage is counted from its making to its end, and the greatest sum is kept
    a shadow   a Tracker under which the models' weights are fake: a step runs as it is written, and has sizes but no numbers

What a tracker counts is the bytes of live storages, each once however many views it has. On a CUDA device add the context (about
0.5 GB), the workspaces of its libraries and rounding. Categories, of the peak:

    weights       parameters of all models
    casts         their copies in bfloat16, which autocast makes
    gradients     .grad of the parameters
    optimizer     AdamW's two moments
    logits        what has the vocabulary as its last axis: logits, softmax and their gradients
    sampling      all that sampling makes: the KV cache, the uniforms, the next-token distributions; and what judges the samples
    activations   the rest: what the backward pass keeps and makes, log-probs, the batch
"""
import weakref
from collections import Counter, defaultdict
from contextlib import contextmanager, nullcontext

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten


class Ledger:
    """The models held, role=model; None is left out. One is trained if its parameters require a gradient."""

    def __init__(self, **models):
        self.models = {role: model for role, model in models.items() if model is not None}

    def records(self):
        """-> a plain record for each model: role, trainable, parameters, bytes, and its parts"""
        out = []
        for role, model in self.models.items():
            parameters = list(model.parameters())
            trainable, size = parameters[0].requires_grad, sum(p.numel() * p.element_size() for p in parameters)
            parts = {"weight_bytes": size, "gradient_bytes": size * trainable, "optimizer_bytes": 2 * size * trainable}
            n = sum(p.numel() for p in parameters)
            out.append({"role": role, "trainable": trainable, "parameters": n, "bytes": sum(parts.values()), **parts})
        return out

    def text(self):
        """-> the ledger as lines to read"""
        lines = [f"models held: {len(self.models)}"]
        for m in self.records():
            unit, name = _unit(m["bytes"])
            weights, gradients, moments, size = (m[f"{part}bytes"] / unit for part in ("weight_", "gradient_", "optimizer_", ""))
            line = f"  {m['role']:<8} {'trained' if m['trainable'] else 'frozen':<8} {m['parameters'] / 1e6:,.2f} M parameters"
            parts = f" (weights {weights:.1f}, gradients {gradients:.1f}, AdamW {moments:.1f})" * m["trainable"]
            lines.append(f"{line}, {size:.1f} {name}{parts}")
        return "\n".join(lines)

    @staticmethod
    def peak_text(parts, most):
        """Bytes by category, at the peak and the most of each -> as text: the sum, the parts above zero, what is large at another time"""
        total = sum(parts.values())
        unit, symbol = _unit(total)
        inner = [f"{name} {size / unit:.1f}" for name, size in parts.items() if size / unit >= 0.05 and name != "all"]
        more = {name: most[name] for name in ("logits", "sampling") if most.get(name, 0) > parts.get(name, 0)}
        other = [f"{name} {size / unit:.1f}" for name, size in more.items() if size / unit >= 0.05]
        text = f"{total / unit:.1f} {symbol}" + f" ({', '.join(inner)})" * bool(inner)
        return text + f"; at other times {', '.join(other)}" * bool(other)

    @staticmethod
    def peak_figures(name, found):
        """-> the record's figures of a (peak, most) pair, {} for None"""
        return {f"{name}_bytes": sum(found[0].values()), name: found[0], f"{name}_most": found[1]} if found else {}

    def flops(self, forward, backward, recompute=False):
        """FLOPs a token, without attention: 2N for each forward pass and 4N for each backward pass, 6N with the recomputation of
        --checkpoint-activations. forward, backward: role -> passes; N: the weights that multiply every token."""
        return sum((2 * forward[role] + (4 + 2 * recompute) * backward[role]) * model.matmul_parameters()
                   for role, model in self.models.items())  # fmt: skip

    @contextmanager
    def tracked(self, optimizer, shadow=False):
        """-> the Tracker that counts what happens inside, from weights and moments that are there, or in their shadow."""
        with _fake_weights(self.models.values(), optimizer) if shadow else nullcontext() as fake:
            vocabulary = {model.config.vocab_size for model in self.models.values()}
            tracker, hooks = Tracker(vocabulary, fake), []
            for model in self.models.values():
                for name, p in model.named_parameters():
                    tracker.own(p, "weights", head=name.endswith("wte.weight"))
                    if p.requires_grad:
                        hooks.append(p.register_post_accumulate_grad_hook(lambda p: tracker.own(p.grad, "gradients")))
            for state in optimizer.state.values():
                for x in state.values():
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
    """`total`: bytes of the storages that are live; `peak`: the greatest that it was, and `parts`, that peak by category; `most`: the
    greatest that each category was by itself."""

    def __init__(self, vocabulary=(), fake=None):
        super().__init__()
        self.vocabulary, self.fake = vocabulary, fake
        self.live, self.heads, self.now = {}, set(), Counter()  # storage -> [bytes, category]; those of the vocabulary's weights
        self.total, self.phase = 0, None
        self.start()

    def start(self):
        """Begins anew with the peak, from what is live."""
        self.peak, self.parts, self.most = self.total, dict(self.now), dict(self.now)

    def during(self, phase):
        """What is made from now on has this category; None: what its making says."""
        self.phase = phase

    def own(self, tensor, category, head=False):
        """Counts a tensor, or moves one that is counted already to another category."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self.live:
            self.now[self.live[key][1]] -= size
        else:
            self.total += size
            weakref.finalize(storage, self._end, key)
        self.live[key] = [size, category]
        self.now[category] += size
        if head:
            self.heads.add(key)
        if self.now[category] > self.most.get(category, 0):
            self.most[category] = self.now[category]
        if self.total > self.peak:
            self.peak, self.parts = self.total, dict(self.now)

    def _end(self, key):
        size, category = self.live.pop(key)
        self.total -= size
        self.now[category] -= size
        self.heads.discard(key)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.prim.device.default:
            return torch.device("cpu")  # a fake tensor's, asked for at every turn
        out = self._shadow(func, types, args, kwargs or {}) if self.fake else func(*args, **(kwargs or {}))
        given = [(x, x.untyped_storage()._cdata) for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        old = {key for _, key in given}
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and (key := x.untyped_storage()._cdata) not in self.live and key not in old:
                self.own(x, *self._kind(func, given, x))
        return out

    def _kind(self, func, given, out):
        """-> the category of what `func` has made of the tensors given, and whether it is a copy of the vocabulary's weights"""
        kinds = [self.live[key][1] if key in self.live else "" for _, key in given]
        heads = [key in self.heads for _, key in given]
        if func is aten._to_copy.default and kinds[0] == "weights":
            return self.phase or "casts", heads[0]
        product = any(heads) and func in (aten.mm.default, aten.addmm.default, aten.linear.default, aten.bmm.default)
        logits = product and out.size(-1) in self.vocabulary
        logits = logits or any(kind == "logits" and x.shape == out.shape for (x, _), kind in zip(given, kinds))
        return self.phase or ("logits" if logits else "activations"), False

    def _shadow(self, func, types, args, kwargs):
        """`func` where weights are fake: whole numbers and masks stay real, so that shapes may depend on them; what has been computed
        from weights is fake, a number read from it is 1, and a place that it names is the first."""
        from torch._subclasses.fake_tensor import FakeTensor

        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        if not any(isinstance(x, FakeTensor) for x in tensors):
            if tensors or not _makes_floats(func, args, kwargs):
                return func(*args, **kwargs)
        elif func is aten._local_scalar_dense.default:
            return torch.ones((), dtype=args[0].dtype).item()
        elif func in (aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._unsafe_index.Tensor):
            places = []
            for x in args[1]:  # a mask selects what it marks
                unknown = isinstance(x, FakeTensor)
                mask = isinstance(x, torch.Tensor) and x.dtype == torch.bool and not unknown
                places += x.nonzero().unbind(1) if mask else [torch.zeros(x.shape, dtype=x.dtype) if unknown else x]
            args = (args[0], places, *args[2:])
            if func in (aten.index.Tensor, aten._unsafe_index.Tensor) and not isinstance(args[0], FakeTensor):
                return func(*args)
        return self.fake.__torch_dispatch__(func, types, args, kwargs)


def _unit(size):
    """Bytes -> (the unit to tell them in, its name)"""
    return (2**30, "GiB") if size >= 2**30 else (1e6, "MB")


def _makes_floats(func, args, kwargs):
    """Whether an operation without tensors, such as zeros or arange, makes floating-point numbers."""
    if kwargs.get("dtype") is not None:
        return kwargs["dtype"].is_floating_point
    name = func._schema.name.removeprefix("aten::")
    if name.startswith(("arange", "full", "scalar_tensor", "randint", "randperm")):
        return any(isinstance(x, float) for x in tree_leaves(args))
    return True


@contextmanager
def _fake_weights(models, optimizer):
    """Within it, the models' parameters are fake ones on the CPU, the optimizer's too, which has made no step; afterwards all is as it
    was. Fake tensors of a CUDA device would need one."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    fake, places, twins = FakeTensorMode(allow_non_fake_inputs=True), [], {}
    for module in {m for model in models for m in model.modules()}:
        for name, p in module._parameters.items():
            if p is not None:
                with fake:
                    twin = torch.empty(p.shape, dtype=p.dtype)
                twins[id(p)] = torch.nn.Parameter(twin, requires_grad=p.requires_grad)
                places.append((module._parameters, name, p))
    groups, state = [(group, group["params"], group["fused"]) for group in optimizer.param_groups], optimizer.state
    try:
        for parameters, name, p in places:
            parameters[name] = twins[id(p)]
        for group, parameters, _ in groups:
            group |= {"params": [twins[id(p)] for p in parameters], "fused": True}
        optimizer.state = defaultdict(dict)
        yield fake
    finally:
        for parameters, name, p in places:
            parameters[name] = p
        for group, parameters, fused in groups:
            group |= {"params": parameters, "fused": fused}
        optimizer.state = state

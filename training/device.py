"""The device and the precision in which a script computes: --device and --dtype."""

import json
from functools import partial

import torch

import data
import gpt
from data import UserError
from training import checkpoint, distributed, sampling
from training.placement import Whole, adapters, attach, full, like, linear


class Compute:
    """A device and a precision, and how models are moved, cast and run there."""

    largest_reward = 0.0  # the largest absolute value that a judge has given
    compile = False  # whether models are compiled
    micro_tokens = 0  # the most tokens of a forward pass; 0: any

    def __init__(self, o):
        self.o = o
        self.device, self.dtype = choose_device(o.device, o.dtype)
        self.pure = o.dtype == "bfloat16-pure"  # the weights themselves are bfloat16
        wide = torch.promote_types(self.dtype, torch.float32)
        self.weights = torch.bfloat16 if self.pure else wide
        # autocast's precision, in which linear layers compute; None: that of the weights
        self.low = self.dtype if self.dtype.itemsize == 2 and not self.pure else None
        self.placement = Whole(self.device, self.weights)  # of the models

    def place(self, model, frozen=False):
        """Moves a model, and casts it to the precision of its master weights. The linear layers of
        a frozen model are cast to the compute precision at once."""
        return self.placement.place(model.requires_grad_(not frozen), self.low if frozen else None)

    def adapt(self, model):
        """-> the model. With --lora its weights are frozen, and its new adapters are trained."""
        o = self.o
        if o.lora:
            from training import lora

            lora.adapt(model, o.lora, o.lora_alpha, o.seed)
            if hasattr(model, "given"):
                model.given.start(model)
        return model

    def complete(self, model, source=None):
        """-> the model with the weights of `source`, or with its own. With --compile its blocks are
        compiled."""
        if self.compile:
            for block in model.blocks:
                block.compile(dynamic=True)
        return self.placement.complete(model, source or model)

    def autocast(self):
        kept = self.placement.keeps_casts
        return torch.autocast(
            self.device.type, self.low, enabled=self.low is not None, cache_enabled=kept
        )

    def freeze(self, model):
        """-> a frozen copy. Its linear weights have the compute precision, so that it agrees with
        the original to the bit; a scalar head stays in float32, in which it computes."""
        return self.complete(self._copy(model, self.placement.frozen), model)

    @torch.no_grad()
    def _copy(self, model, take):
        """-> a frozen copy with the weights take(p). Weights that neither `take` nor a cast changes
        are shared."""
        copy, low = like(model), linear(model) if self.low else ()
        for name, p in model.named_parameters():
            x = take(p)
            x = x.to(self.low) if name in low else x
            x = x if x is p else torch.nn.Parameter(x, requires_grad=False)
            attach(copy, name, x)
        return copy.eval()

    def gathered(self, model):
        """-> the model with all its weights. If this process has only parts of them, it is a frozen
        copy."""
        return self.placement.gathered(model, self._copy)

    def to_sample(self, model):
        """-> the model in the compute precision, with all its weights. In float32 its adapters are
        merged; bfloat16 would round them. Under autocast it is a copy that is cast once instead of
        at every token: the embedding stays in float32, the linear layers and the head are cast."""
        if not self.low:
            model = self.gathered(model)
            if self.pure or not adapters(model):
                return model
            from training import lora

            return lora.merged(model)
        model = self._copy(model, full)
        head = gpt.Linear(*reversed(model.head.shape), bias=False, device="meta")
        head.weight = torch.nn.Parameter(model.head.to(self.dtype), requires_grad=False)
        model.lm_head = head
        return model

    def reference(self, policy):
        """-> π_ref, frozen: a copy of the policy at the start, without new adapters, or the
        checkpoint of --reference. With --lora no weight of the policy is held twice. Adapters that
        the policy starts from are part of π_ref."""
        if self.o.reference:
            return self.freeze(self.place(self.other_reference(), frozen=True))
        if self.o.lora and not hasattr(policy, "given"):
            from training import lora

            policy = lora.base(policy)
        return self.freeze(policy)

    def other_reference(self):
        """-> the model that --reference names. Raises UserError if it does not fit the policy"""
        path = self.o.reference
        ref, tokenizer, _ = checkpoint.load(path, mapped=True)
        if tokenizer.vocabulary != self.tokenizer.vocabulary:
            raise UserError(
                f"--reference {path} has another vocabulary than the policy; give one with the same"
            )
        if ref.config.block_size < self.block_size:
            words = f"has a context of {ref.config.block_size}, but the run needs"
            raise UserError(f"--reference {path} {words} {self.block_size}; set --block-size")
        return ref

    def sample(self, model, questions, longest, group=1, temperature=1.0, generator=None):
        """-> a Rollout of `group` responses to each question. questions: rows (ids, …)"""
        ids, ends = [row[0] for row in questions], self.tokenizer.ends
        with self.autocast():
            model = self.to_sample(model)

            def draw(part, uniform=None):
                how = temperature, generator, group, uniform
                return sampling.sample(model, ids[part], longest, ends, *how)

            if distributed.many:
                from training import ranks

                return ranks.sample(draw, len(ids), group, longest, generator, self.device)
            return draw(slice(None))

    @torch.no_grad()
    def scores(self, rows, f, size=0):
        """-> f of all rows, (len(rows), …), without a graph. Each process computes its share,
        `size` rows at a time (0: all). f maps n rows to (n, …)."""
        take, limits = self.cutter(rows, size)

        def score(part):
            with self.autocast():
                return f(take(part))

        return distributed.shared(len(rows), score, *limits)

    def cutter(self, rows, size=0, lengths=None):
        """-> (a function that takes a part of the rows; the limits of the parts, for
        `distributed.shares`). lengths: the tokens of each row, if they are not rows of ids"""
        if not self.micro_tokens:
            return rows.__getitem__, (size,)
        from training import cut

        lengths = cut.lengths(rows) if lengths is None else lengths
        return partial(cut.taken, rows), (size, lengths, self.micro_tokens)

    def with_chat(self, tokenizer):
        """-> the tokenizer, whose chat template has the settings of --chat and --template-args"""
        o, args = self.o, {}
        for text in o.template_args:
            name, equals, value = text.partition("=")
            if not equals:
                raise UserError(f"--template-args {text}: give name=value")
            try:
                args[name] = json.loads(value)
            except ValueError:
                args[name] = value
        tokenizer = tokenizer.with_chat(o.chat if "chat" in o.given else None, args)
        if tokenizer.template:
            plain = "is one user message (--no-chat keeps it bare)"
            plain = plain if tokenizer.chat else "stays bare"
            data.say(f"chats are rendered by the checkpoint's template; a plain prompt {plain}")
        return tokenizer

    def open(self, path):
        """-> a frozen language model, for an evaluation"""
        return self.freeze(self.place(checkpoint.load(path, mapped=True)[0], frozen=True))


def choose_placement(shard, device, dtype):
    """--shard -> the placement of the run's weights"""
    if not shard:
        return Whole(device, dtype)
    from training.sharding import Parts

    return Parts(device, dtype)


def choose_device(name, dtype):
    """--device, --dtype -> (device, compute dtype)"""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if distributed.many and name != "cpu":
        if name != "cuda":
            raise UserError(
                f"--device {name}: each of many processes takes a GPU of its own; give cuda"
            )
        name = f"cuda:{distributed.local}"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
        if device.type == "cuda":
            import gpu

            gpu.prepare(device)
    except (RuntimeError, AssertionError, NotImplementedError):
        remedy = "start fewer processes" if distributed.many else "give --device cpu"
        raise UserError(f"--device {name} is not on this machine; {remedy}") from None
    if device.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"--device {name}: give cpu, cuda, cuda:N or mps")
    if device.type == "mps" and dtype not in ("auto", "float32"):
        raise UserError(f"--dtype {dtype}: on mps these scripts run in float32 only")
    if dtype == "auto":
        cuda = device.type == "cuda"
        modern = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
        dtype = "bfloat16" if modern else "float32"
    return device, getattr(torch, dtype.removesuffix("-pure"))

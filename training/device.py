"""Where and how precisely a script computes: --device and --dtype of its options."""

import copy

import torch

import gpt
from data import UserError
from training import checkpoint


class Compute:
    """A device and a precision, and what they mean for a model."""

    largest_reward = 0.0  # that a judge has given, without its sign

    def __init__(self, o):
        self.o = o
        self.device, self.dtype = choose_device(o.device, o.dtype)
        self.pure = o.dtype == "bfloat16-pure"  # the weights themselves are bfloat16
        wide = torch.promote_types(self.dtype, torch.float32)
        self.weights = torch.bfloat16 if self.pure else wide
        self.mixed = self.dtype == torch.bfloat16 and not self.pure  # autocast

    def prepare(self, model):
        """The one place where a model is moved and cast: to float32 master weights."""
        return model.to(self.device, self.weights)

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.mixed)

    def freeze(self, model):
        """-> a frozen copy. Its linear weights have the compute precision, so that it agrees with
        the original to the bit; a scalar head, which reads in float32, stays."""
        model = copy.deepcopy(model).requires_grad_(False).eval()
        for name, module in model.named_modules():
            if self.mixed and isinstance(module, torch.nn.Linear) and name != "head":
                module.to(torch.bfloat16)
        return model

    def sample(self, model, questions, longest, group=1, temperature=1.0, generator=None):
        """-> a Rollout of `group` responses to each question, a row that begins with its ids"""
        ids, end = [row[0] for row in questions], self.tokenizer.end_id
        with self.autocast():
            return gpt.sample(model, ids, longest, end, temperature, generator, group)

    def open(self, path):
        """-> a frozen language model, for an evaluation"""
        return self.freeze(self.prepare(checkpoint.load(path)[0]))


def choose_device(name, dtype):
    """--device, --dtype -> (device, compute dtype)"""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise UserError(f"--device {name} is not on this machine; --device cpu always is") from None
    if device.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"--device {name}: give cpu, cuda, cuda:N or mps")
    if device.type == "mps" and dtype not in ("auto", "float32"):
        raise UserError(f"--dtype {dtype}: on mps these scripts run in float32 only")
    if dtype == "auto":
        cuda = device.type == "cuda"
        modern = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
        dtype = "bfloat16" if modern else "float32"
    return device, getattr(torch, dtype.removesuffix("-pure"))

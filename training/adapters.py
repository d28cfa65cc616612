"""Adapters in files: writes what a run with --lora trains, and puts adapters on their model.

A whole checkpoint has the adapters merged into its weights. With --save adapters it has only the
adapters, and names the model that they belong on. A folder of PEFT is read in the same way.
"""

import os
from dataclasses import asdict
from functools import partial

import torch

import gpt
from data import UserError
from hf import peft
from training import distributed, lora
from training.placement import adapters, attach, full, like, values


def holds(path):
    """Whether a path is a file of --save adapters"""
    try:
        file = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return file["nanopo"] == "adapters"
    except Exception:  # whatever the file is, it holds no adapters
        return False


class Adapters:
    """The adapters in a file or folder. `base`: the path of the model that they belong on. `rank`.
    `scale`: α/r. `tensors`: {layer.A: (rank, in), layer.B: (out, rank)}; a layer that joins several
    of PEFT's may have a higher rank. `meta`: what the file says of the run that made them"""

    def __init__(self, path):
        self.path, self.meta = path, {}
        if os.path.isdir(path):
            facts = peft.read_facts(path)
            self.base = peft.base_of(path, facts)
            self.read = partial(peft.read, path, facts)
            return
        file = torch.load(path, map_location="cpu", weights_only=True)
        self.meta, facts = file["meta"], file["meta"]["lora"]
        folder = os.path.dirname(os.path.realpath(path))
        self.base = os.path.relpath(os.path.join(folder, self.meta["folder"], facts["start"]))
        if not os.path.exists(self.base):
            raise UserError(f"{path} holds adapters of {self.base}, which is missing")
        found = facts["rank"], facts["alpha"] / facts["rank"], file["model"]
        self.read = lambda config: found

    def on(self, model, meta, mapped):
        """Merges the adapters into a model, in float32 at least. mapped: each weight is merged when
        it is read. -> (the model, the meta of its checkpoint)"""
        self.rank, self.scale, self.tensors = self.read(model.config)
        self.reads = {
            f"{layer}.weight": values(model)[f"{layer}.weight"]
            for layer in {name.rpartition(".")[0] for name in self.tensors}
        }
        for name, read in self.reads.items():
            p = model.get_parameter(name)
            self._check(name, p)
            merged = partial(self._merged, name.removesuffix(".weight"), read)
            if mapped:
                p.read = merged
            else:
                p.data = merged().to(p.dtype)
        model.given = self
        facts = {"rank": self.rank, "alpha": self.scale * self.rank, "start": self.base}
        own = self.meta or {"method": f"adapters of rank {self.rank} on {meta['method']}"}
        return model, meta | own | {"lora": facts | {"tensors": self.tensors}}

    def _check(self, name, p):
        """Refuses adapters that do not have the shape of the weight."""
        layer = name.removesuffix(".weight")
        found = len(self.tensors[f"{layer}.B"]), self.tensors[f"{layer}.A"].size(1)
        if found != p.shape:
            shapes = f"{name} has the shape {found} in {self.path}, and {tuple(p.shape)}"
            raise UserError(f"{shapes} in {self.base}; the adapters belong on another model")

    def _merged(self, layer, read):
        """-> W + α/r B A"""
        A, B = (self.tensors[f"{layer}.{name}"] for name in "AB")
        return lora.merged_weight(read(), A, B, self.scale)

    def keep(self, model, o):
        """Leaves the adapters out of the model's weights, because a run with --lora trains them."""
        own = self.scale * self.rank
        if o.lora != self.rank:
            has = f"{self.path} has adapters of rank {self.rank}"
            raise UserError(f"--lora {o.lora}: {has}; give --lora {self.rank}")
        if "lora_alpha" in o.given and o.lora_alpha != own:
            has = f"{self.path} has adapters scaled by {own:g}/r"
            raise UserError(f"--lora-alpha {o.lora_alpha:g}: {has}; leave it out")
        o.lora_alpha = own
        for name, read in self.reads.items():
            model.get_parameter(name).read = read

    def start(self, model):
        """Copies these adapters into a model's new ones. One that is missing here starts at 0."""
        for layer, adapter in adapters(model).items():
            if f"{layer}.A" in self.tensors:
                for name in "AB":
                    p, x = getattr(adapter, name), self.tensors[f"{layer}.{name}"]
                    setattr(adapter, name, torch.nn.Parameter(x.to(p.device, p.dtype)))


def write(run, policy, path, meta):
    """Writes the checkpoint of a policy with adapters, without changing the policy. The tensors are
    merged one after the other, in the precision of the file that the run started from."""
    o, given = run.o, getattr(policy, "given", None)
    layers = adapters(policy)
    own = {f"{layer}.{x}": getattr(layers[layer], x) for layer in layers for x in "AB"}
    tensors = {name: full(p.detach()).cpu() for name, p in own.items()}
    facts = {"rank": o.lora, "alpha": o.lora_alpha, "start": given.base if given else run.start}
    if o.save == "adapters":
        if distributed.is_first:
            file = {"nanopo": "adapters", "config": asdict(policy.config), "model": tensors}
            gpt.write(file | {"meta": meta | {"lora": facts}}, path)
        return
    plain, trunk = like(policy, adapted=False), getattr(policy, "trunk", policy)
    for name, read in values(policy).items():
        if name in own:
            continue
        x, (layer, _, kind) = read(), name.rpartition(".")
        if kind == "weight" and layer in layers:
            A, B = (full(getattr(layers[layer], letter)) for letter in "AB")
            x = lora.merged_weight(x, A, B, layers[layer].scale)
        if distributed.is_first:
            dtype = trunk.dtypes.get(name.removeprefix("trunk."), x.dtype)
            attach(plain, name, torch.nn.Parameter(x.to("cpu", dtype)))
    if distributed.is_first:
        gpt.save(plain, path, **meta, lora=facts | {"tensors": tensors})

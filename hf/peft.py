"""Folders of PEFT: adapter_config.json and adapter_model.safetensors, as save_pretrained() writes.

PEFT has an adapter for each of q, k and v, and for each of gate and up. Here q, k and v are one
layer, and so are gate and up. The adapter of such a layer joins those of PEFT: its A has their A
one below the other, its B has one block for each.
"""

import contextlib
import hashlib
import math
import os
import re

import torch

from data import UserError
from hf import hub, weights

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
UNREAD = {  # settings that change what is computed or trained, and their only supported values
    "peft_type": ("LORA",),
    "task_type": ("CAUSAL_LM", None),
    "bias": ("none",),
    "use_dora": (False, None),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None, []),
    "target_parameters": (None, []),
    "lora_bias": (False, None),
}


def holds(path):
    """Whether a path is a folder with PEFT's adapters"""
    return os.path.isfile(os.path.join(path, CONFIG))


def read_facts(folder):
    """-> adapter_config.json. Raises UserError if it has a setting that is not supported here."""
    facts = weights.read_json(folder, CONFIG)
    for name, values in UNREAD.items():
        if facts.get(name, values[0]) not in values:
            found = f"has {name} {str(facts[name])[:40]!r}, which is not supported"
            merge = "merge the adapters into their base with merge_and_unload()"
            raise weights.refused(folder, f"{found}; {merge}")
    r, base = facts.get("r"), facts.get("base_model_name_or_path")
    if type(r) is not int or r < 1 or type(facts.get("lora_alpha")) not in (int, float):
        raise weights.refused(folder, f"has an {CONFIG} without r and lora_alpha")
    if type(base) is not str or not base:
        raise weights.refused(folder, f"has an {CONFIG} without base_model_name_or_path")
    return facts


def base_of(folder, facts):
    """-> the path of the model that the adapters belong on"""
    named = facts["base_model_name_or_path"]
    beside = os.path.join(os.path.dirname(os.path.abspath(folder)), named)
    for path in (named, beside):
        if os.path.exists(path):
            return path
    fetch = f"hf download {named} --local-dir {named}"
    raise weights.refused(
        folder, f"holds adapters of {named}, which is no path here; fetch it: {fetch}"
    )


def digest(folder, of):
    """-> the digest of the adapters and of their base. of: a function that gives a path's digest"""
    paths = [os.path.join(folder, name) for name in (CONFIG, WEIGHTS)]
    with contextlib.suppress(UserError):  # the function that reads it reports what is wrong
        paths.append(base_of(folder, read_facts(folder)))
    return hashlib.sha256(" ".join(map(of, paths)).encode()).hexdigest()


def read(folder, facts, config):
    """-> (rank, α/r, {name.A or name.B: tensor}) of the adapters, on a model of that config. If a
    layer has another scale, its B is multiplied to make up for it."""
    tensors, found = load(folder), {}
    scale = facts["lora_alpha"] / facts["r"]
    for layer in range(config.n_layer):
        for name in ("attention.qkv", "attention.proj", "up", "down"):
            name = f"blocks.{layer}.{name}"
            parts = [
                part.removesuffix(".weight") for part in weights.theirs(f"{name}.weight", config)
            ]
            pairs = [taken(tensors, part) for part in parts]
            if any(pairs):
                sizes = weights.cuts(f"{name}.weight", config) if len(parts) > 1 else [0]
                scales = [scale_of(facts, part, pair) / scale for part, pair in zip(parts, pairs)]
                A, B = joined(pairs, scales, sizes)
                found |= {f"{name}.A": A, f"{name}.B": B}
    if tensors:
        merge = "merge the adapters into their base with merge_and_unload()"
        raise weights.refused(folder, f"adapts {min(tensors)}, which gets no adapter here; {merge}")
    return facts["r"], scale, found


def load(folder):
    """-> {name without PEFT's own parts: tensor}"""
    path = os.path.join(folder, WEIGHTS)
    if not os.path.isfile(path):
        raise weights.refused(folder, f"has no {WEIGHTS}; save it as safetensors")
    try:
        from safetensors.torch import load_file
    except ImportError:
        raise UserError(f"{folder} needs the package safetensors: {hub.INSTALL}") from None
    try:
        found = load_file(path)
    except Exception as e:  # a SafetensorError, whatever is wrong with the file
        why = str(e).partition("\n")[0] or type(e).__name__
        raise UserError(f"{path} is not a complete safetensors file ({why})") from None
    return {name.removeprefix("base_model.model."): x for name, x in found.items()}


def taken(tensors, part):
    """Takes a layer's adapter out of `tensors`. -> (A, B), or None if it has none"""
    names = f"{part}.lora_A.weight", f"{part}.lora_B.weight"
    if not all(name in tensors for name in names):
        return None
    return tuple(tensors.pop(name) for name in names)


def scale_of(facts, part, pair):
    """-> the factor of B A in the layer `part`"""
    r = len(pair[0]) if pair else facts["r"]
    alpha = facts["lora_alpha"]
    for pattern, x in (facts.get("alpha_pattern") or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", part):
            alpha = x
    return alpha / (math.sqrt(r) if facts.get("use_rslora") else r)


def joined(pairs, scales, sizes):
    """Joins the adapters of layers that are one layer here. pairs: (A, B) or None for each of them;
    scales; sizes: their numbers of rows. -> (A, B) of the joint layer, in float32"""
    A = [pair[0].float() for pair in pairs if pair]
    B = [scale * pair[1].float() if pair else None for pair, scale in zip(pairs, scales)]
    if len(A) == len(pairs) and all(torch.equal(x, A[0]) for x in A):
        return A[0], torch.cat(B)
    blocks = [torch.zeros(n, 0) if x is None else x for x, n in zip(B, sizes)]
    return torch.cat(A), torch.block_diag(*blocks)

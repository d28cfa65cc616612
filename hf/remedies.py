"""Recognises folders that hold no model which these scripts can read, and says how to mend them."""

import os
from pathlib import Path

from data import UserError

OTHERS = {  # files in place of model.safetensors -> what to do about them
    "*-of-*.safetensors": "it has shards; fetch their model.safetensors.index.json too",
    "*.safetensors": "rename {} to that, if it is the whole model",
    "*.bin": "pickled weights are never loaded, as they can run code; save it as safetensors",
    "*.pt*": "pickled weights are never loaded, as they can run code; save it as safetensors",
    "*.gguf": "{} is for llama.cpp; fetch the original model",
}
PREFIXES = {  # of the names of weights -> who puts them there, and the model within
    "module.": ("DistributedDataParallel", "model.module"),
    "_orig_mod.": ("torch.compile", "model._orig_mod"),
    "_fsdp_wrapped_module.": ("FSDP", "its full state_dict()"),
    "base_model.model.": ("PEFT", "model.merge_and_unload()"),
}


def no_weights(folder):
    """-> what to do about a folder without model.safetensors"""
    for pattern, remedy in OTHERS.items():
        if found := sorted(Path(folder).glob(pattern)):
            return remedy.format(found[0].name)
    return "save it as safetensors"


def refuse_part(path):
    """Refuses one of the files of a folder."""
    if path.endswith((".safetensors", ".json", ".bin", ".gguf")):
        folder = os.path.dirname(path) or "."
        raise UserError(f"{path} is one file of a checkpoint; give its folder, {folder}")


def wrapped(names):
    """-> what to do about weights whose names begin with that of a wrapper; "" if none does"""
    for name in names:
        for prefix, (wrapper, model) in PREFIXES.items():
            if name.startswith(prefix):
                return f"has {name}, as {wrapper} names weights; save {model} in its place"
    return ""


def inner(folder):
    """-> the first folder in it with a config.json, for a message; "" if there is none"""
    found = [x for way in ("*", "snapshots/*") for x in Path(folder).glob(f"{way}/config.json")]
    return f"{min(found).parent}, " if found else ""

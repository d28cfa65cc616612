"""Writes a checkpoint as a Hugging Face folder, from which transformers computes the same logits.

    python export.py out/reviews/dpo.pt --to folder          a toy model, as a GPT-2
    python export.py out/gsm8k/dpo.pt --to folder --dtype bfloat16
    python export.py out/gsm8k/dpo.pt --to folder --adapter  only the adapters of --lora, for PEFT

AutoModelForCausalLM reads a language model, AutoModelForSequenceClassification a reward model, and
AutoTokenizer their vocabulary. The script prints what transformers cannot represent.
"""

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

import training
from data import UserError
from gpt import ScalarGPT
from hf import hub, weights
from hf.vocabulary import tokenizer_files
from training import checkpoint, opt, parse

DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")


@dataclass
class Options:
    checkpoint: str = opt(..., "the .pt file of a language or a reward model", hub="model")
    to: str = opt("", "folder to write, new or empty (default: beside the checkpoint)")
    dtype: str = opt("auto", "precision of the weights (auto: as they are)", choices=DTYPES)
    adapter: bool = opt(False, "write only the adapters of --lora, in PEFT's format")


def merged(model, tokenizer, meta, dtype):
    """-> (config.json, tensors, other files, what transformers cannot represent) of a model.
    dtype: that of the weights in the folder; None keeps theirs"""
    head = "head.weight" if isinstance(model, ScalarGPT) else "wte.weight"
    dtype = dtype or model.state_dict()[head].dtype
    files = dict(tokenizer.meta.get("files", {}))
    known, unseen = json.loads(files.get("config.json", "{}")), []
    config = weights.write_config(model, known, dtype)
    if not files:
        files = tokenizer_files(tokenizer, model.config.block_size)
        config |= {"bos_token_id": tokenizer.end_id}
        unseen.append("no chat template: prompts and answers are plain text, one after the other")
    generation = json.loads(files.get("generation_config.json", "{}"))
    files["generation_config.json"] = json.dumps(generation | {"eos_token_id": [*tokenizer.ends]})
    config.setdefault("eos_token_id", tokenizer.end_id)
    if tokenizer.longest:
        unseen.append(f"a response of {tokenizer.longest} tokens is complete without an end token")
    if tokenizer.template:
        if arguments := tokenizer.meta["args"]:
            unseen.append(f"apply_chat_template was called with {json.dumps(arguments)}")
        if not tokenizer.chat:
            unseen.append("plain prompts were not rendered by the chat template (--no-chat)")
    if isinstance(model, ScalarGPT):
        config["pad_token_id"] = pad = pad_token(tokenizer, model.config.vocab_size)
        unseen.append(f"pad batches with token {pad}, which ends no response")
        if bias := model.head.bias.item():
            unseen.append(f"every score is {bias:.4f} higher here (score_bias in config.json)")
    return config, weights.tensors_of(model, dtype), files, unseen


def pad_token(tokenizer, vocab_size):
    """-> a token that the model has, and that ends no response. transformers reads a score at the
    last token that is not pad_token_id; if that were the end token, it would read the score one
    token too early."""
    if tokenizer.template is None and not tokenizer.meta.get("files"):
        return 0
    pad = tokenizer.controls.get(tokenizer.named.get("pad_token"))
    able = {i for i in tokenizer.controls.values() if i < vocab_size} - {*tokenizer.ends}
    return pad if pad in able else min(able, default=0)


def adapters(model, meta, path, dtype):
    """-> for PEFT: (adapter_config.json, tensors, no other files, a line that names their base)"""
    if "lora" not in meta or isinstance(model, ScalarGPT):
        what = "holds no adapters of a policy, which --lora trains; leave --adapter out"
        raise UserError(f"{path} {what}")
    facts, config, tensors, ranks = meta["lora"], model.config, {}, {}
    base = hub.id_of(facts["start"]) or facts["start"]
    for name, x in facts["tensors"].items():
        name, _, letter = name.rpartition(".")
        rank = len(facts["tensors"][f"{name}.A"])
        parts = weights.theirs(f"{name}.weight", config)
        if letter == "A" or len(parts) == 1:
            cut = [x] * len(parts)
        else:
            cut = x.split(weights.cuts(f"{name}.weight", config))
        for part, y in zip(parts, cut):
            part = part.removesuffix(".weight")
            full = f"base_model.model.{part}.lora_{letter}.weight"
            tensors[full] = weights.cast(full, y, dtype or y.dtype).clone()
            ranks[part] = rank
    others = {part: rank for part, rank in ranks.items() if rank != facts["rank"]}
    scale = facts["alpha"] / facts["rank"]
    said = {
        **dict(peft_type="LORA", task_type="CAUSAL_LM", base_model_name_or_path=base),
        **dict(r=facts["rank"], lora_alpha=facts["alpha"], lora_dropout=0.0, bias="none"),
        **dict(target_modules=sorted({part.rpartition(".")[2] for part in ranks})),
        **dict(rank_pattern=others, alpha_pattern={x: scale * r for x, r in others.items()}),
        **dict(fan_in_fan_out=not config.llama),
        **dict(inference_mode=True, modules_to_save=None),
    }
    return said, tensors, {}, [f"the adapters fit {base} and no other weights"]


def write(folder, config_name, config, tensors, weights_name, files):
    """Writes the folder with all its files, or not at all."""
    half = Path(f"{folder}.{os.getpid()}.tmp")
    try:
        half.mkdir(parents=True)
        for name, text in files.items():
            (half / name).write_text(text, "utf-8")
        (half / config_name).write_text(json.dumps(config, indent=2), "utf-8")
        weights.save_tensors(tensors, half / weights_name)
        os.replace(half, folder)
    finally:
        shutil.rmtree(half, ignore_errors=True)


def main(argv=None):
    o = parse(Options, argv)
    folder = Path(o.to or o.checkpoint.removesuffix(".pt"))
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--to {folder} exists and is not empty; give a new or an empty folder")
    model, tokenizer, meta = checkpoint.load_any(o.checkpoint)
    dtype = None if o.dtype == "auto" else getattr(torch, o.dtype)
    if o.adapter:
        config, tensors, files, unseen = adapters(model, meta, o.checkpoint, dtype)
        names = "adapter_config.json", "adapter_model.safetensors"
    else:
        config, tensors, files, unseen = merged(model, tokenizer, meta, dtype)
        names = "config.json", "model.safetensors"
    write(folder, names[0], config, tensors, names[1], files)
    size = sum(x.numel() for x in tensors.values())
    kind = next(iter(tensors.values())).dtype
    print(f"{folder}: {size / 1e6:,.2f} M numbers in {str(kind).removeprefix('torch.')}")
    for text in unseen:
        print(f"  not in the folder: {text}")
    if o.adapter:
        load = f'peft.PeftModel.from_pretrained(model, "{folder}")'
    else:
        load = f'transformers.{config["architectures"][0]}.from_pretrained("{folder}")'
    print(f"  load it: {load}")


if __name__ == "__main__":
    training.command(main, torchrun=False)

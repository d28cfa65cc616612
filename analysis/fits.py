"""Finds the setting of each method that fits a card: python compare.py --predict FOLDER --card 24

The settings are tried in this order. First come those that change no number: recomputed
activations, smaller micro-batches. Then come moments of 8 bits, bfloat16 weights, and at last
adapters. If the models of a setting do not fit, it is skipped without a prediction of its step.
"""

import time
from typing import NamedTuple

from analysis import predict, tables
from analysis.rows import EVERY
from training import Compute, memory

RANK = 16  # of the adapters, if --lora names no other


class Setting(NamedTuple):
    words: str
    checkpointed: bool
    small: bool  # whether a micro-batch is one sequence, or one pair
    dtype: str = "bfloat16"
    lora: bool = False
    optimizer: str = "adamw"


EIGHT = {"optimizer": "adamw8bit"}
PURE = {"dtype": "bfloat16-pure"}
SETTINGS = (
    Setting("full", False, False),
    Setting("full, checkpointed", True, False),
    Setting("full, checkpointed, small micro-batches", True, True),
    Setting("full, 8-bit moments", True, True, **EIGHT),
    Setting("full, bfloat16 weights", True, True, **PURE),
    Setting("full, bfloat16 weights, 8-bit moments", True, True, **PURE, **EIGHT),
    Setting("adapters", False, False, lora=True),
    Setting("adapters, checkpointed", True, False, lora=True),
    Setting("adapters, checkpointed, small micro-batches", True, True, lora=True),
    Setting("adapters, bfloat16 weights", True, True, **PURE, lora=True),
)


def strongest(row, o, task, config):
    """-> (the first setting of a row that fits o.card GB, its entry from predict.ask, its command),
    or None"""
    smallest = 2 if EVERY[row].pairs else 1
    for setting in SETTINGS:
        micro = smallest if setting.small else 0
        lora = (o.lora or RANK) if setting.lora else 0
        how = setting.checkpointed, setting.dtype, o.batch_size, micro, lora
        argv = predict.arguments(row, *how)
        least = 0 if lora else held(row, argv, task, config, setting.optimizer)
        if not predict.fits_on(o.card, least):
            continue
        entry = predict.ask(row, task, config, *how, optimizer=setting.optimizer)
        if predict.fits_on(o.card, entry["predicted_bytes"]):
            return setting, entry, command(row, o, argv, setting)
    return None


def held(row, argv, task, config, optimizer):
    """-> the bytes of only the models of a row: weights, gradients and moments"""
    options = predict.options(row, "--task", task, *argv)
    models = predict.outlines(EVERY[row].models.split(), options, config, Compute(options))
    return sum(m["bytes"] for m in memory.records(models, optimizer))


def command(row, o, argv, setting):
    """-> the command to type"""
    start = o.predict if o.predict not in ("own", *predict.SIZES) else "FOLDER"
    words = ["python", f"{EVERY[row].script}.py", "--init", start]
    words += ["--task", "ROWS.jsonl"] if row != "rlaif" else []
    words += EVERY[row].arguments.split()
    words += [x for x in map(str, argv) if x != "--no-checkpoint-activations"]
    words += ["--optimizer", setting.optimizer] if setting.optimizer != "adamw" else []
    return " ".join(words)


def table_of(o):
    """Makes the predictions that the table needs. -> (the table, its entries as plain facts)"""
    task, config = predict.settings(o)
    lines, found = [], []
    for row in o.methods:
        start = time.time()
        best = strongest(row, o, task, config)
        print(f"{row:<24} {time.time() - start:5.0f} s", flush=True)
        line = {"method": row, "setting": "none", "GiB": "", "command": ""}
        if best:
            setting, entry, text = best
            size = entry["predicted_bytes"] / 2**30
            line |= {"setting": setting.words, "GiB": f"{size:.1f}", "command": text}
            found.append(entry | {"setting": setting.words, "command": text})
        lines.append(line)
    return tables.table(lines), found

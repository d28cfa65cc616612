"""What compare.py --predict prints and writes: the memory of a step, or what fits a card."""

import os
import re
import time

from analysis import fits, plots, predict, tables
from analysis.output import publish, writes


def name(o):
    """-> the name of the folder that the options ask for. Refuses a size that is none"""
    predict.settings(o)
    path = re.sub(r"[^\w.]+", "-", os.path.relpath(o.predict)).strip("-.")
    name = f"predict-{path}" + (f"-lora-{o.lora}" if o.lora else "")
    name += f"-{o.optimizer}" * (o.optimizer != "adamw")
    name += f"-card-{o.card}" * (o.card > 0)
    return name + (f"-ranks-{o.ranks}" if o.ranks > 1 else "") + ("-shard" if o.shard else "")


def write(o, folder):
    """Predicts, prints a table and writes it. -> [], as nothing has failed"""
    return write_fits(o, folder) if o.card else write_peaks(o, folder)


def write_peaks(o, folder):
    """Prints the table of --predict, and writes README.md, compare.json and a picture"""
    writes(folder, "README.md", "compare.json", "memory.png")
    found, (task, config) = [], predict.settings(o)
    how = o.batch_size, o.micro_batch, o.lora, o.ranks, o.shard, o.optimizer
    for row in o.methods:
        start = time.time()
        for setting in predict.SETTINGS:
            found.append(predict.ask(row, task, config, *setting, *how))
        print(f"{row:<24} {time.time() - start:5.0f} s", flush=True)
    table, short, symbol = tables.predictions(found)
    text = (
        f"Predicted memory of a step at its peak, {symbol}: --predict {o.predict}, {task}, "
        f"{f'--lora {o.lora}, ' if o.lora else ''}{moments(o)}{ranks(o)}"
        f"{o.batch_size} sequences per step (a pair is two), {o.micro_batch or o.batch_size} per "
        "forward pass. In each cell: float32 weights with bfloat16 autocast / bfloat16 weights and "
        "moments. Logits and sampling are shown at their own maximum, which may be at another time "
        "than the peak, so the cells of a row need not add up. A step fits on a card if it leaves "
        f"{predict.SPARE:g} GiB free.\n\n{table}"
    )
    record = {"command": o.line, "predict": o.predict, "task": task, "methods": found}
    shown = text.replace(table, f"{short}\n\nREADME.md has the other columns.")
    publish(folder, record, text, plots.draw_prediction(found, symbol, folder), shown=shown)
    return []


def moments(o):
    """-> the optimizer, as text, unless it is the default"""
    return f"--optimizer {o.optimizer}, " if o.optimizer != "adamw" else ""


def write_fits(o, folder):
    """Prints the table of --card, and writes README.md and compare.json"""
    writes(folder, "README.md", "compare.json")
    table, found = fits.table_of(o)
    text = (
        f"The strongest setting of each method that fits {o.card} GB: --predict {o.predict}, "
        f"{o.batch_size} sequences per step (a pair is two). A step fits if its predicted peak "
        f"leaves {predict.SPARE:g} GiB free.\n\n{table}"
    )
    publish(folder, {"command": o.line, "predict": o.predict, "methods": found}, text, [])
    return []


def ranks(o):
    """-> the number of processes and how they hold the models, as text"""
    shard = "--shard, " if o.shard else ""
    return f"of each of --ranks {o.ranks}, {shard}" if o.ranks > 1 else ""

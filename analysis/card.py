"""Measures nanoPO on a GPU, as soon as there is one.

    python -m analysis.card                          everything, into out/card; prints the tables
    python -m analysis.card --only 124m kernels      some of the parts
    python -m analysis.card --small --device cpu     a dry run with tiny sizes, without a GPU

    scripts     every script in several precisions: its losses beside the CPU's, exit code, time
    waits       how often and where the host waits for the GPU in the second step
    sampling    tokens per second, step by step and by a captured graph
    124m        SFT and DPO of GPT-2's smallest size, beside a plain padded loop and beside TRL
    memory      bytes at the peak, beside the predicted bytes
    kernels     where the time of a DPO step goes, and which kernel attends

Each part runs in a process of its own with a time limit. If a row fails, its process ends with a
message, and the next process goes on with the rest. The measurements stay in --out, so the same
command measures only what is missing, and prints all of it.
Time: at most 10 minutes, the sum of the limits. This is an estimate for one card of 80 GB, made
without one: about 130 short runs at 1 to 2 s each, 11 compilations at 10 s, and some 40 figures of
a 124M model, each of which takes less than 5 s at a third of the card's rate.
"""

import json
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

import training
from analysis import bench, processor
from analysis.card_parts import gpt2, kernels, memory, sampling, scripts, waits
from analysis.tables import parsed, table
from data import Stopped, UserError, say
from training import locks, opt, parse
from training.device import choose_device

PARTS = {  # -> (what measures, limit in seconds, what its table shows)
    "scripts": (scripts, 240, "Exit code; largest difference of a loss to the CPU's; ms per step"),
    "waits": (waits, 60, "How often the host waits in the second step, as far as torch warns"),
    "sampling": (sampling, 60, "Sampling, tokens per second in bfloat16"),
    "124m": (gpt2, 120, "Steps in bfloat16. MFU counts what a padded loop computes"),
    "memory": (memory, 80, "MB at the peak of a step"),
    "kernels": (kernels, 40, "Where a step of DPO spends its time"),
}


@dataclass
class Options:
    only: tuple = opt((), "which parts (default: all)")
    out: str = opt("out/card", "folder of the measurements")
    device: str = opt("auto", "cpu, cuda, cuda:1")
    small: bool = opt(False, "tiny sizes: a dry run")
    again: bool = opt(False, "measure these parts anew")
    worker: bool = opt(False, "one part, in this process: the card starts its processes with it")

    def check(self):
        if wrong := set(self.only) - set(PARTS):
            raise UserError(f"--only {min(wrong)}: no such part; give some of {', '.join(PARTS)}")

    def begin(self):
        """Sets the device and the sizes."""
        self.place = choose_device(self.device, "float32")[0]
        self.cuda = self.place.type == "cuda"
        name = torch.cuda.get_device_name(self.place) if self.cuda else f"{processor()}, one thread"
        self.about = f"{name}, torch {torch.__version__}{', tiny sizes' * self.small}"
        self.folder = Path(self.out).resolve() / re.sub(r"\W+", "-", self.about)
        self.config = (1000, 512, 2, 2, 64) if self.small else (50257, 1024, 12, 12, 768)
        self.pairs, self.prompt, self.response = (4, 8, 24) if self.small else (16, 128, 384)
        return self


# ---- all of them, in turn


def work(o, part):
    """Measures the rows of a part that its file lacks, and adds each to the file."""
    file = o.folder / f"{part}.jsonl"
    there = {tuple(line["row"]) for line in parsed(file) if "row" in line}
    for row, column, measure in PARTS[part][0](o):
        if (row, column) not in there:
            add(file, begun=[row, column])
            add(file, row=[row, column], cells=measure())


def add(file, **line):
    with open(file, "a") as f:
        f.write(json.dumps(line) + "\n")


def complete(o, part):
    """Measures the missing rows of a part, in one process after the other until none fails or the
    time is over. -> the lines of its file"""
    file, limit, start = o.folder / f"{part}.jsonl", PARTS[part][1], time.time()
    lines = parsed(file) if file.exists() and not o.again else []
    if lines and "seconds" in lines[-1]:
        return lines
    file.write_text("")
    for line in lines:
        if "cells" in line:
            add(file, **line)
    command = [sys.executable, "-m", "analysis.card", "--worker", "--only", part]
    command += ["--device", str(o.place), "--out", o.folder.parent, *["--small"] * o.small]
    while (left := limit + start - time.time()) > 0:
        try:
            done = bench.process(command, o.folder / "runs", left)
            if not done.returncode:
                break
            why = f"failed, exit code {done.returncode}: {bench.last_line(done)}"
        except subprocess.TimeoutExpired:
            why = f"failed: the part's {limit:g} s were over"
        begun = [{}, *parsed(file)][-1].get("begun")
        add(file, row=begun or [part, "failed"], failed=why)
        if not begun:
            break
    if all("failed" not in line for line in parsed(file)):
        add(file, seconds=round(time.time() - start))
    return parsed(file)


def rows_of(lines):
    """The lines of a part's file -> the rows of its table"""
    rows = {}
    for line in [line for line in lines if "row" in line]:
        row, column = line["row"]
        cells = line.get("cells") or {column: line["failed"]}
        rows.setdefault(row, {"": row}).update({k: shown(x) for k, x in cells.items()})
    return rows.values()


def shown(x):
    """-> a figure with three digits, as a cell"""
    if isinstance(x, float):
        x = f"{x:,.0f}" if abs(x) >= 100 else f"{x:.3g}"
    return str(x).replace("|", "¦")


def main(argv=None):
    o = parse(Options, argv).begin()
    if o.worker:
        return work(o, *o.only)
    (o.folder / "runs").mkdir(parents=True, exist_ok=True)
    locks.take_or_refuse(o.folder / "card")
    say(f"{o.about}.")
    failed = []
    for part in o.only or PARTS:
        lines = complete(o, part)
        say(f"\n{PARTS[part][2]}:\n\n{table(rows_of(lines))}")
        failed += [part] * any("failed" in line for line in lines)
    if failed:
        raise Stopped(f"failed: {', '.join(failed)}; the same command tries these again")


if __name__ == "__main__":
    training.command(main, torchrun=False)

"""Compares the methods by reward, KL, memory and time, from one SFT checkpoint and equal budgets.

    python compare.py                           every method on reviews, into out/compare/reviews
    python compare.py --seeds 5 --sweep 3       five seeds; three at other values of β, λ
    python compare.py --methods dpo simpo --task exact
    python compare.py --methods dpo-few dpo iterative_dpo online_dpo --course
    python compare.py --quick                   a smoke pass of all methods, under four minutes
    python compare.py --task tokens:128+128     sequences of one length: only memory and time
    python compare.py --predict 7b              memory of a 7B model's step, on any machine
    python compare.py --predict FOLDER --lora 16     the same for a Hugging Face checkpoint
    python compare.py --predict 7b --optimizer adamw8bit     with moments of 8 bits
    python compare.py --records out/reviews/*.jsonl  the curves of earlier runs

The budget is the number of response sequences that a run trains on. A pair is two sequences, and a
sequence that is trained on twice counts twice. Each run is a process of its own, with the command
line of its script. If a run with the same command exists, it is kept, so an interrupted comparison
goes on where it stopped. The table has a row for each run that failed, and the exit code is then 1.
One page, report.html, has everything: pictures, curves, and the answers of all methods side by
side.
"""

import contextlib
import difflib
import json
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import data
import training
from analysis import answers, plots, predicted, processor, report, tables
from analysis.output import publish, write, writes
from analysis.rows import EVERY, ROWS, budget, plan
from data import Stopped, UserError
from training import adamw8bit, checkpoint, locks, opt, parse, sharding
from training.files import digest
from training.options import DTYPES, OPTIMIZERS, flag
from training.process import interrupts

HERE = Path(__file__).parent
LOCK = threading.Lock()


@dataclass
class Options:
    task: str = opt("reviews", "reviews, arithmetic:N, exact, tokens:P+C, or a file with --init")
    methods: tuple = opt((), f"rows of the table, of {' '.join(EVERY)} (default: {' '.join(ROWS)})")
    seeds: int = opt(1, "runs per row, from one SFT checkpoint", low=1, only="predict=")
    budget: int = opt(0, "sequences trained on per run (0: the task's)", low=0, only="predict=")
    sweep: int = opt(0, "seeds at a third of β (λ) and at three times it", low=0, only="predict=")
    course: bool = opt(False, "evaluate every run twenty times", only="predict=")
    quick: bool = opt(False, "a smoke pass: short stages, a small budget", only="predict=")
    init: str = opt(
        "", "SFT checkpoint to start from (default: made first)", only="predict=", hub="model"
    )
    jobs: int = opt(1, "runs at a time; they slow each other down", low=1, only="predict=")
    device: str = opt("auto", "cpu, cuda, cuda:1, mps", only="predict=")
    dtype: str = opt("auto", "precision of the runs", choices=DTYPES, only="predict=")
    seed: int = opt(0, "the first of the seeds", low=0, below=2**62, only="predict=")
    out: str = opt("", "folder (default: out/compare/<task>)")
    records: tuple = opt((), "run nothing: draw the curves of these .jsonl records")
    n_layer: int = opt(0, "blocks of the model (default: the task's)", low=1)
    n_head: int = opt(0, "its attention heads per block (default: the task's)", low=1)
    n_embd: int = opt(0, "its width (default: the task's)", low=1)
    predict: str = opt(
        "", "train nothing: a step's memory for a model own, 1b, 7b or a folder", hub="config"
    )
    lora: int = opt(0, "rank of trained adapters, with --predict (0: none)", low=0)
    optimizer: str = opt("adamw", "of the step, with --predict", choices=OPTIMIZERS)
    card: int = opt(0, "GB: the strongest settings that fit, with --predict", low=1)
    ranks: int = opt(1, "processes, each with its own step, with --predict", low=1)
    shard: bool = opt(False, "each process holds a part of the models, with --predict")
    vocab_size: int = opt(0, "vocabulary of the model, with --predict (default: the size's)", low=1)
    batch_size: int = opt(4, "sequences per step, with --predict; a pair is two", low=1)
    micro_batch: int = opt(0, "sequences per forward pass, with --predict (0: all)", low=0)
    seq_len: int = opt(0, "tokens per sequence (default: 2048; own: the task's)", low=4)

    def check(self):
        if not self.predict:
            report.template()  # a missing package is noticed before anything runs
        if self.records:
            self.check_records()
        sizes = {"vocab_size", "batch_size", "micro_batch", "seq_len"}
        unread = self.given & {*sizes, "lora", "optimizer", "card", "ranks", "shard"}
        if unread and not self.predict:
            with_it = "is read with --predict only; give that too, or leave it out"
            raise UserError(f"{flag(min(unread))} {with_it}")
        for row in self.methods:
            if row not in EVERY:
                near = difflib.get_close_matches(row, EVERY, 2) or EVERY
                raise UserError(f"--methods {row}: no such row; there is {', '.join(near)}")
        if self.card and (chosen := self.given & {"micro_batch", "optimizer", "ranks", "shard"}):
            words = "--card finds what fits one card, its micro-batches too"
            raise UserError(f"{words}; leave {flag(min(chosen))} out")
        if self.shard and self.ranks == 1:
            raise UserError("--shard splits models over processes; give --ranks N too")
        if self.shard:
            sharding.check(self.ranks)
            adamw8bit.refuse(self.optimizer == "adamw8bit", adamw8bit.SHARD)
        if "rlaif" in self.methods and self.task != "reviews" and not self.predict:
            words = f"rlaif learns its skills on reviews only, not on {self.task}"
            raise UserError(f"--methods {words}; leave it out")
        if self.init and not os.path.exists(self.init):
            raise UserError(f"--init {self.init}: no such file; leave it out to make one")
        if data.kind(self.task) == "file" and not self.init and not self.predict:
            words = "the SFT checkpoint that all methods start from"
            raise UserError(f"--init is needed with a file as the task: {words}")
        if self.out and os.path.exists(self.out) and not os.path.isdir(self.out):
            raise UserError(f"--out {self.out} is a file; give a folder")

    def check_records(self):
        if others := self.given - {"records", "out"}:
            words = "--records only draws, and runs nothing"
            raise UserError(f"{words}; leave {flag(min(others))} out")
        runs = map(tables.run_of, self.records)  # refuses a wrong one before writing
        self.runs = dict(zip(tables.short(self.records), runs))


def rows_of(o):
    """-> the rows that the options ask for, each once"""
    rows = o.methods or [row for row in ROWS if row != "rlaif" or o.task == "reviews"]
    if o.predict and not o.methods:
        rows = [row for row in EVERY if not EVERY[row].like]
    return [row for row in dict.fromkeys(rows) if row != "sft" or not o.init]


# ---- the runs


def child(command, threads=0):
    """Runs a script. -> (its exit code, the last line of its errors). Ctrl-C reaches the script
    too, and SIGTERM is passed on to it, so that it can save before it ends."""
    env = os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, HERE / command[0], *command[1:]], env=env, **pipes)
    errors = passed_on = None
    while errors is None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            errors = process.communicate(timeout=0.5)[1].decode(errors="replace")
        if interrupts.signal == signal.SIGTERM and not passed_on and errors is None:
            process.terminate()
            passed_on = True
    errors = errors.strip().splitlines()
    if process.returncode in (130, -signal.SIGINT):
        raise KeyboardInterrupt
    return process.returncode, (errors or ["killed"])[-1]


def identity(command):
    """-> the command with each file that it reads replaced by a digest of its content, and --out by
    its last name, so that a folder may be moved"""
    words = list(map(str, command))
    for i, option in enumerate(words[:-1], 1):
        if option in ("--task", "--init", "--reward", "--teacher"):
            words[i] = digest(words[i]) or words[i]
        elif option == "--out":
            words[i] = os.path.basename(words[i])
    return words


def run(folder, done, threads, item):
    """Runs an item, unless an earlier comparison has finished it. done: name -> the identity of the
    command that made it, as in commands.json. Returns (exit code, what went wrong)."""
    why = "an earlier comparison was killed, but its run goes on; waiting until that ends"
    locks.wait_until_free(folder / f"{item.name}.pt", why)
    made = identity(item.command)
    weights, record, state = (folder / f"{item.name}{x}" for x in (".pt", ".jsonl", ".state"))
    with LOCK:
        if done.get(item.name) != made:  # the files there are another run's
            record.unlink(missing_ok=True)
            state.unlink(missing_ok=True)
            done[item.name] = made
            write(folder / "commands.json", json.dumps({"compare.py": done}, indent=1))
    if tables.read(folder, item.name) and weights.exists():
        return 0, ""
    start = time.time()
    resume = ["--resume"] if state.exists() else []
    code, error = child([*item.command, *resume], threads)
    error = f"exit code {code}: {error}" if code else ""
    said = f"   failed, {error}" if error else ""
    print(f"{item.name:<24} {time.time() - start:5.0f} s{said}", flush=True)
    return code, error


def run_all(o, folder):
    """-> (name -> what went wrong, the stages and runs)"""
    stages, runs = plan(o, folder)
    for item in stages + runs:
        writes(folder, *(f"{item.name}{x}" for x in (".pt", ".jsonl", ".state")))
    try:
        done = json.loads((folder / "commands.json").read_text())["compare.py"]
    except (OSError, ValueError):
        done = {}
    threads = max(1, os.cpu_count() // o.jobs) if o.jobs > 1 else 0
    errors = {item.name: "its reward model failed" for item in runs}
    missing = set()
    with ThreadPoolExecutor(o.jobs) as pool:
        for item in stages:
            code, errors[item.name] = pool.submit(run, folder, done, 0, item).result()
            if code and item.row == "sft":
                kind = UserError if code == 2 else Stopped
                raise kind(f"{item.name}, from which all rows start: {errors[item.name]}")
            if code:
                missing.add(str(folder / f"{item.name}.pt"))
        begun = [item for item in runs if not missing & set(item.command)]
        for item, (_, error) in zip(begun, pool.map(partial(run, folder, done, threads), begun)):
            errors[item.name] = error
    return errors, stages + runs


# ---- tables, pictures and reports


def compare(o, folder):
    """Makes the runs that are missing, prints the tables, and writes README.md, compare.json,
    report.html and the pictures. -> the names of the runs that failed"""
    start = time.time()
    writes(folder, "README.md", "compare.json", "commands.json", "report.html")
    writes(folder, *(f"{name}.png" for name in plots.NAMES))
    errors, items = run_all(o, folder)

    lines = tables.summary(o, folder, items, errors)
    machine = f"{processor()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    seconds = round(time.time() - start)
    record = {"command": o.line, "task": o.task, "machine": machine, "seconds": seconds}
    record |= {"seeds": o.seeds, "budget": o.budget or budget(o.task, o.quick)}
    text = "\n\n".join([f"{machine}; {seconds} s.", *tables.tables(lines)])
    said = side_by_side(o, folder, items)
    pictures = plots.draw(o.task, lines, folder, said)
    curves = tables.curves(folder, items)
    write(folder / "report.html", report.comparison(record, lines, pictures, curves, said))
    record |= {"methods": lines, "answers": said}
    publish(folder, record, text, pictures, ["report.html"])
    return [name for name, error in errors.items() if error]


def side_by_side(o, folder, items):
    """-> the answers of each row's first seed, and of the model that all rows start from"""
    if data.kind(o.task) == "tokens":  # random digits, nothing to read
        return []
    begun = o.init or str(folder / f"sft-{o.seed}.pt")
    ended = [
        (item.row, str(folder / f"{item.name}.pt"))
        for item in items
        if item.name == f"{item.row}-{o.seed}" and item.row not in ("sft", "reward_model")
        if tables.read(folder, item.name)
    ]
    return answers.side_by_side([("reference", begun), *ended], o)


def draw_records(o, folder):
    """Draws the curves of --records into curves.png, and into curves.html with a table"""
    writes(folder, "curves.html", "curves.png")
    rows = tables.records(o.runs)
    steps = {name: steps for name, (_, steps, _) in o.runs.items()}
    pictures = plots.draw_records(steps, folder)
    write(folder / "curves.html", report.records(rows, pictures))
    names = ", ".join(["curves.html", *(path.name for path in pictures)])
    print(f"\n{tables.table(rows)}\n\n{folder}/{names}")
    return []


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    o = parse(Options, argv)
    o.line = " ".join(["python compare.py", *argv])
    o.methods = rows_of(o)
    if o.quick and "jobs" not in o.given:
        o.jobs = 2
    name = checkpoint.default_folder(o.task)
    if o.predict:
        name = predicted.name(o)
    if o.records:
        name = "records"
    folder = Path(o.out or f"out/compare/{name}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        locks.take_or_refuse(folder / "compare")
    except OSError as e:
        why = f"cannot be written ({e.strerror}); give another folder"
        raise UserError(f"--out {folder} {why}") from None
    try:
        do = draw_records if o.records else predicted.write if o.predict else compare
        failed = do(o, folder)
    except KeyboardInterrupt:
        print("\nrun the same command again to go on where this one stopped", file=sys.stderr)
        raise
    if failed:
        raise Stopped(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    training.command(main, torchrun=False)

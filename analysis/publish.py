"""Makes the figures of the pages again, and says which of them are older than the code.

    python -m analysis.publish --check             which places today's code has not printed
    python -m analysis.publish                     runs what is missing, and writes the pages
    python -m analysis.publish --only questions    the sources whose names begin so

A place is a block of a page below a line <!-- from: NAME -->: printed text, or a table. Each NAME
is a Source: a command, what is kept of its result, and how the block is made from that. A run that
has ended is kept as docs/runs/NAME.json, so that a call that was interrupted goes on where it
stopped, and a reader sees on which machine, with which torch and from which commit a figure was
made. Weights stay under out/publish.

The digest of a run is that of the syntax of all sources that its command may import, without
comments, docstrings and help texts. A run with another digest than today's is made again.
"""

import argparse
import ast
import functools
import hashlib
import json
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

import training
from analysis import output, processor, tables
from analysis.break_it import BUGS
from analysis.questions import QUESTIONS
from data import Stopped, UserError
from training.files import commit

ROOT = Path(__file__).parent.parent
RUNS = ROOT / "docs/runs"
MARK = re.compile(r"^<!-- from: (\S+) -->\n+", re.M)
ENDS = ".py", "/__init__.py"
DOCUMENTED = ast.Module, ast.FunctionDef, ast.ClassDef
BLOCK = re.compile(r"```\n[\s\S]*?^```\n|(\|.*\n)+", re.M)  # printed text, or a table


class Source(NamedTuple):
    command: tuple  # the words after "python"
    group: str  # runs of one group share checkpoints, and are made one after the other
    take: object  # a function: what the command prints, its folder -> the result that is kept
    block: object  # a function: the result -> the block on the page


# ---- from what is printed


def text_of(said, folder):
    return said


def fenced(said):
    return f"```\n{said.strip(chr(10))}\n```\n"


def figures_of(said):
    """-> the table of analysis.break_it, without the lines of code above it"""
    return fenced(said[said.index(f"{'':<24}{'healthy':>10}") :].partition("\n\n")[0])


# ---- from predictions of memory


def written(said, folder):
    """-> the rows of the compare.json that a comparison says it has written"""
    path = re.search(r"^(\S+)/README\.md, ", said, re.M)[1]
    return json.loads((folder / path / "compare.json").read_text("utf-8"))["methods"]


def peaks(said, folder):
    """-> [method, dtype, GiB, card] of each prediction with activations checkpointed"""
    return [
        [x["method"], x["dtype"], round(x["predicted_bytes"] / 2**30, 1), x["card"]]
        for x in written(said, folder)
        if x["checkpoint_activations"]
    ]


def both_precisions(note, mixed, found):
    """-> the table of `peaks`, pure bf16 first. note: behind a method's name; mixed: the other
    precision's name"""
    rows = {}
    for method, dtype, size, card in found:
        rows.setdefault(method, {})[dtype] = [f"{size:.1f}", card.replace("no card", "none")]
    head = ["method", "7B, GiB: pure bf16", "fits", f"7B, GiB: {mixed}", "fits"]
    cells = [
        [TITLES[method] + note, *sizes["bfloat16-pure"], *sizes["bfloat16"]]
        for method, sizes in rows.items()
    ]
    return markdown([head, *cells])


def settings(said, folder):
    return [
        [x["method"], x["setting"], x["predicted_bytes"] / 2**30] for x in written(said, folder)
    ]


def fitting(found):
    cells = [[method, words, f"{size:.1f}"] for method, words, size in found]
    return markdown([["method", "setting", "GiB"], *cells])


def markdown(rows):
    return "".join(line.replace(" --- ", "---") + "\n" for line in tables.markdown(rows))


TITLES = {"dpo": "DPO", "simpo": "SimPO", "ppo": "PPO"}
PREDICT = "compare.py --predict 7b --methods dpo simpo"


def predicted(more, take, block):
    return Source(tuple(f"{PREDICT} {more}".split()), "memory", take, block)


# ---- all of them

SOURCES = {
    "memory/adapters": predicted(
        "ppo --lora 16", peaks, partial(both_precisions, ", LoRA", "bf16 autocast")
    ),
    "memory/adamw8bit": predicted(
        "ppo --optimizer adamw8bit", peaks, partial(both_precisions, "", "float32 + autocast")
    ),
    "memory/card": predicted("--card 24", settings, fitting),
}
SOURCES |= {
    f"questions/{name}": Source(("-m", "analysis.questions", name), "questions", text_of, fenced)
    for name in QUESTIONS
}
SOURCES |= {
    f"break-it/{name}": Source(("-m", "analysis.break_it", name), "break-it", text_of, figures_of)
    for name in BUGS
}


# ---- what a command runs


@functools.cache
def tree(path):
    """-> the syntax of a source, without its docstrings and the help texts of its options"""
    found = ast.parse(path.read_text("utf-8"))
    for x in ast.walk(found):
        if isinstance(x, DOCUMENTED) and ast.get_docstring(x, clean=False):
            x.body = x.body[1:]
        if isinstance(x, ast.Call) and getattr(x.func, "id", "") == "opt":
            x.args = x.args[:1]
    return found


def imported(path):
    """-> the sources of ours that a source imports, at its top or inside a function"""
    names = set()
    for x in ast.walk(tree(path)):
        if isinstance(x, ast.Import):
            names |= {alias.name for alias in x.names}
        elif isinstance(x, ast.ImportFrom):
            names |= {x.module, *(f"{x.module}.{alias.name}" for alias in x.names)}
    names |= {name.partition(".")[0] for name in names}
    files = [ROOT / f"{name.replace('.', '/')}{end}" for name in names for end in ENDS]
    return {file for file in files if file.exists()}


def named(path):
    """-> the scripts that a source names in a string, such as "dpo.py --task exact" """
    constants = [x.value for x in ast.walk(tree(path)) if isinstance(x, ast.Constant)]
    words = {x.partition(" ")[0].removesuffix(".py") for x in constants if isinstance(x, str)}
    files = {ROOT / f"{word}.py" for word in words if word.isidentifier()}
    return {file for file in files if file.exists()}


@functools.cache
def digest(command):
    """-> the digest of the sources that a command may import"""
    first = f"{command[1].replace('.', '/')}.py" if command[0] == "-m" else command[0]
    todo, seen = [ROOT / first], set()
    while todo:
        path = todo.pop()
        if path not in seen:
            seen.add(path)
            todo += imported(path) | named(path)
    text = "".join(f"{path.relative_to(ROOT)} {ast.dump(tree(path))}\n" for path in sorted(seen))
    return hashlib.sha256(text.encode()).hexdigest()


# ---- places and runs


def pages():
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def places(text):
    """Yields (name, begin, end) of the blocks of a page that come from a source"""
    for mark in MARK.finditer(text):
        block = BLOCK.match(text, mark.end())
        if not block:
            raise UserError(f"<!-- from: {mark[1]} --> has no block below it")
        yield mark[1], block.start(), block.end()


def kept(name):
    """-> the run that is kept of a source, or None"""
    path = RUNS / f"{name}.json"
    return json.loads(path.read_text("utf-8")) if path.exists() else None


def block_of(name):
    """-> the block of a source as its kept run prints it; None if there is no run"""
    run = kept(name)
    return run and SOURCES[name].block(run["result"])


def is_old(name):
    """Whether a source has no run, or one of other code than today's"""
    run = kept(name)
    return not run or run["digest"] != digest(SOURCES[name].command)


def make(name):
    """Runs a source and keeps what it printed. -> what went wrong, or "" """
    source = SOURCES[name]
    key = digest(source.command)
    folder = Path(f"out/publish/{source.group}-{key[:8]}")
    folder.mkdir(parents=True, exist_ok=True)
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    first = [] if source.command[0] == "-m" else [ROOT / source.command[0]]
    begun, command = time.time(), [sys.executable, *first, *source.command[len(first) :]]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["no words"])[-1]
    run = {"command": " ".join(["python", *source.command]), "seconds": round(time.time() - begun)}
    run |= {"machine": processor(), "torch": torch.__version__, "commit": commit(), "digest": key}
    path = RUNS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    run["result"] = source.take(done.stdout, folder)
    text = json.dumps(run, indent=1, ensure_ascii=False)
    output.write(path, text + "\n")
    return ""


def write(names):
    """Writes the kept runs of the named sources into the pages."""
    for page in pages():
        text = page.read_text("utf-8")
        for name, begin, end in reversed(list(places(text))):
            if name in names and (block := block_of(name)):
                text = text[:begin] + block + text[end:]
        if text != page.read_text("utf-8"):
            output.write(page, text)


# ---- the command


def options(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--check", action="store_true", help="run nothing: list what is older than the code")
    add("--only", default="", metavar="NAME", help="the sources whose names begin so")
    add("--jobs", type=int, default=2, help="groups of runs at a time, each on one thread (2)")
    o = parser.parse_args(argv)
    o.names = [name for name in SOURCES if name.startswith(o.only)]
    if not o.names:
        groups = ", ".join(sorted({source.group for source in SOURCES.values()}))
        raise UserError(f"--only {o.only}: no source begins so; there are those of {groups}")
    if o.jobs < 1:
        raise UserError(f"--jobs: must be at least 1, not {o.jobs}")
    return o


def check(names):
    old = [name for name in names if is_old(name)]
    for name in old:
        run = kept(name)
        why = f"printed by other code ({run['commit'][:7]})" if run else "not printed yet"
        print(f"{name:<32} {why}")
    print(f"{len(names) - len(old)} of {len(names)} sources are printed by the code of today")
    if old:
        raise Stopped(f"{len(old)} are not: python -m analysis.publish prints them")


def main(argv=None):
    o = options(argv)
    names = o.names
    if o.check:
        return check(names)
    old = [name for name in names if is_old(name)]
    groups = {}
    for name in old:
        groups.setdefault(SOURCES[name].group, []).append(name)
    failed = {}
    with tqdm(total=len(old), unit="run", disable=not old) as bar:

        def run(group):
            for name in group:
                bar.set_postfix_str(name)
                failed[name] = make(name)
                bar.update()

        with ThreadPoolExecutor(o.jobs) as pool:
            list(pool.map(run, groups.values()))
    write(names)
    failed = {name: why for name, why in failed.items() if why}
    print(f"{len(old) - len(failed)} runs made, {len(names) - len(old)} were there")
    if failed:
        raise Stopped("; ".join(f"{name}: {why}" for name, why in failed.items()))


if __name__ == "__main__":
    training.command(main, torchrun=False)

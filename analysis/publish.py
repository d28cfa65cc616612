"""Makes the figures of the pages again, and says which of them are older than the code.

    python -m analysis.publish --check             which places today's code has not printed
    python -m analysis.publish                     runs what is missing, and writes the pages
    python -m analysis.publish --only questions    the sources whose names begin so

A place is a block of a page below a line <!-- from: NAME -->: printed text, or a table. PLACES in
analysis/places.py says from which sources a block is made and how, and PICTURES does so for the
pictures of docs/figures. SOURCES in analysis/sources.py has the commands, and what is kept of each.

A run that has ended is kept as docs/runs/SOURCE.json, so that a call that was interrupted goes on
where it stopped, and a reader sees on which machine, with which torch and from which commit a
figure was made. Weights stay under out/publish. A run is made again if the code that its command
uses has changed: see analysis/digest.py.
"""

import argparse
import hashlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from tqdm import tqdm

import training
from analysis import output, processor
from analysis.digest import ROOT
from analysis.places import PICTURES, PLACES
from analysis.sources import SOURCES
from data import Stopped, UserError
from training.files import commit

RUNS = ROOT / "docs/runs"
FIGURES = ROOT / "docs/figures"
MARK = re.compile(r"^<!-- from: (\S+) -->\n+", re.M)
BLOCK = re.compile(r"```\n[\s\S]*?^```\n|(\|.*\n)+", re.M)  # printed text, or a table


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


def results(names):
    """-> what is kept of each source; None if one has no run"""
    runs = list(map(kept, names))
    return [run["result"] for run in runs] if all(runs) else None


def block_of(name):
    """-> the block of a place as the kept runs of its sources print it; None if one has none"""
    place = PLACES[name]
    found = results(place.sources)
    return found and place.block(*found)


def is_old(name):
    """Whether a source has no run, or one of other code than today's"""
    run = kept(name)
    return not run or run["digest"] != SOURCES[name].digest


def lacks(source):
    """-> what a source cannot run without, as text, or "" """
    package, _, file = source.needs.partition(": ")
    if package and not importlib.util.find_spec(package):
        return f"needs the package {package}: pip install -r {file}"
    return ""


def make(name, done=lambda: None):
    """Runs a source and keeps what it gives. done: called after each command. -> what went wrong,
    or "" """
    source, printed = SOURCES[name], []
    folder = folder_of(source.group)
    folder.mkdir(parents=True, exist_ok=True)
    begun = time.time()
    if why := lacks(source) or (source.prepare and source.prepare(folder)):
        return why
    for command in source.commands:
        said = "" if has_ended(command, folder) else run(command, folder, source.threads)
        if isinstance(said, Stopped):
            return str(said)
        printed.append(said)
        done()
    commands = [f"python {command}" for command in source.commands]
    result = source.take(printed, folder)
    seconds = round(time.time() - begun)
    if isinstance(result, dict):  # a comparison may have found runs that had ended
        seconds = result.pop("seconds", seconds)
    found = {"commands": commands, "seconds": seconds, "threads": source.threads}
    found |= {"machine": processor(), "torch": torch.__version__, "commit": commit()}
    path = RUNS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    found |= {"digest": source.digest, "result": result}
    output.write(path, json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    return ""


def folder_of(group):
    """-> the folder of the checkpoints that the sources of a group share; another one if any of
    their code has changed"""
    digests = sorted(source.digest for source in SOURCES.values() if source.group == group)
    key = hashlib.sha256("".join(digests).encode()).hexdigest()
    return Path(f"out/publish/{group}-{key[:8]}")


def has_ended(command, folder):
    """Whether an earlier call has made the run of a command with --name"""
    found = re.search(r"(\w+)\.py .*--name (\S+)$", command)
    paths = folder.glob(f"out/*/{found[1]}-{found[2]}.jsonl") if found else []
    return any('{"final"' in path.read_text() for path in paths)


def run(command, folder, threads):
    """-> what a command prints; if it fails, a Stopped with the last line of its errors"""
    scripts = {path.name for path in ROOT.glob("*.py")}
    words = [str(ROOT / word) if word in scripts else word for word in command.split()]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads)}
    words = [sys.executable, *words]
    ended = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True)
    if ended.returncode:
        return Stopped((ended.stderr.strip().splitlines() or ["no words"])[-1])
    return ended.stdout


def write(names):
    """Writes the blocks and draws the pictures that are made from the named sources."""
    for page in pages():
        text = page.read_text("utf-8")
        for name, begin, end in reversed(list(places(text))):
            if names & {*PLACES[name].sources} and (block := block_of(name)):
                text = text[:begin] + block + text[end:]
        if text != page.read_text("utf-8"):
            output.write(page, text)
    for name, picture in PICTURES.items():
        found = results(picture.sources)
        if found and not is_drawn(name):
            picture.draw(FIGURES / f"{name}.png", picture.key(found), *found)


def is_drawn(name):
    """Whether a picture is that of the kept runs, by today's plots.py"""
    picture, path = PICTURES[name], FIGURES / f"{name}.png"
    found = results(picture.sources)
    return found and path.exists() and picture.key(found).encode() in path.read_bytes()


# ---- the command


def options(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--check", action="store_true", help="run nothing: list what is older than the code")
    add("--only", default="", metavar="NAME", help="the sources whose names begin so")
    add("--jobs", type=int, default=2, help="groups of runs at a time (2); timed runs run alone")
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
    chosen = {name: picture for name, picture in PICTURES.items() if {*picture.sources} & {*names}}
    undrawn = [name for name in chosen if not is_drawn(name)]
    if undrawn:
        print(f"drawn from other runs, or by other code: {', '.join(undrawn)}")
    if old or undrawn:
        words = f"{len(old)} sources and {len(undrawn)} pictures are not"
        raise Stopped(f"{words}: python -m analysis.publish makes them")


def make_all(names, jobs):
    """Makes the named sources, those that are timed one after the other, alone. -> name -> what
    went wrong"""
    failed, groups = {}, {}
    for name in names:
        source = SOURCES[name]
        groups.setdefault((source.alone, source.group), []).append(name)
    count = sum(len(SOURCES[name].commands) for name in names)
    with tqdm(total=count, unit="run", disable=not names) as bar:

        def one_after_the_other(group):
            for name in group:
                bar.set_postfix_str(name)
                failed[name] = make(name, bar.update)

        for alone in (False, True):
            with ThreadPoolExecutor(1 if alone else jobs) as pool:
                todo = [group for (apart, _), group in groups.items() if apart == alone]
                list(pool.map(one_after_the_other, todo))
    return {name: why for name, why in failed.items() if why}


def main(argv=None):
    o = options(argv)
    if o.check:
        return check(o.names)
    old = [name for name in o.names if is_old(name)]
    failed = make_all(old, o.jobs)
    write({*o.names})
    print(f"{len(old) - len(failed)} sources made, {len(o.names) - len(old)} were there")
    if failed:
        raise Stopped("; ".join(f"{name}: {why}" for name, why in failed.items()))


if __name__ == "__main__":
    training.command(main, torchrun=False)

"""Small experiments for analysis.questions: runs scripts, keeps the runs under out/questions, and
reads figures from them."""

import contextlib
import importlib
import io
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import torch

import data
from analysis.tables import read
from training import checkpoint

FOLDER = Path("out/questions")
SEEDS = (0, 1, 2)
STARTS = {  # task -> what trains the checkpoint that its runs start from
    "exact": "sft.py --task exact --steps 300 --batch-size 512",
    "reviews": "sft.py --steps 250",
}
TOLD = []  # the commands of a question, as the reader types them


def run(command, seed=0, **paths):
    """Runs a command such as "dpo.py --task exact" with a seed, from the task's start, unless its
    record exists. paths: checkpoints that replace those in the command; reward=… replaces that of
    --reward rm. -> the run's path, its options, the figures of its steps, of its evaluations, and
    of its end"""
    script, *argv = command.split()
    if script not in ("sft.py", "orpo.py"):
        argv += ["--init", start("exact" if "exact" in argv else "reviews")]
    if command not in TOLD:
        TOLD.append(command)
    name = re.sub(r"[^\w.]+", "-", f"{command} {seed}")
    path = FOLDER / f"{name}.pt"
    if not (path.exists() and read(FOLDER, name)):
        print(f"seed {seed}: {command}", file=sys.stderr, flush=True)
        argv += ["--seed", seed, "--out", path, "--device", "cpu", "--dtype", "float32"]
        for option, other in paths.items():  # a later option wins
            argv += [f"--{option}", other]
        with contextlib.redirect_stdout(io.StringIO()):
            importlib.import_module(script.removesuffix(".py")).main([str(x) for x in argv])
    first, lines, final = read(FOLDER, name)
    steps = [line for line in lines if "eval" not in line]
    evals = [line["eval"] for line in lines if "eval" in line]
    found = dict(path=path, options=first["options"], steps=steps, evals=evals, final=final)
    return SimpleNamespace(**found)


def start(task):
    """-> the checkpoint from which a task's runs start"""
    return run(STARTS[task]).path


def rows_read(done):
    """-> the rows that a run trained on"""
    return done.options["steps"] * done.options["batch_size"]


# ---- the world of 40 responses per prompt


class World:
    """exact as tables over 4 prompts and 40 responses: the known reward, π_ref, checkpoints"""

    def __init__(self):
        self.task = data.task("exact")
        tables = self.task.r, self.task.pairs, self.task.labels
        self.r, self.pairs, self.labels = map(torch.from_numpy, tables)
        self.demonstrated = torch.from_numpy(self.task.d).log()
        self.reference = start("exact")
        _, tokenizer, _ = checkpoint.load(self.reference)
        self.batch = data.pad(data.encode(self.task.rows, tokenizer, 8)[0])
        self.log_ref = self.log_probs(self.reference)

    def open(self, path):
        return checkpoint.load(path)[0].double()

    def log_probs(self, path):
        """-> log π(y|x) of a checkpoint, (4, 40), float64"""
        with torch.no_grad():
            return self.table(self.open(path))

    def table(self, model):
        """-> the same table for a model, with its gradient"""
        x = self.batch
        return model.logprobs(x.ids, x.mask, packed=x.packed).sum(1).view(self.r.shape)

    def expected(self, log_p):
        """-> E[r], a mean over prompts"""
        return (log_p.exp() * self.r).sum(1).mean().item()


# ---- tables as text


def show(rows):
    """Dicts of cells by column -> a table, as text"""
    head = list(dict.fromkeys(name for row in rows for name in row))
    cells = [head, *([cell(row.get(name, "")) for name in head] for row in rows)]
    width = [max(map(len, column)) for column in zip(*cells)]
    return "\n".join("  ".join(map(str.rjust, row, width)).rstrip() for row in cells)


def cell(x):
    if not isinstance(x, float):
        return str(x)
    digits = 0 if abs(x) >= 100 else 2 if abs(x) >= 1 else 3
    return f"{round(x, digits) + 0.0:.{digits}f}"  # + 0.0 turns -0 into 0


def verdicts(claims):
    """{claim: a bool per seed} -> a line per claim"""
    words = {name: " ".join("yes" if x else "no" for x in found) for name, found in claims.items()}
    width = max([0, *map(len, words.values())])
    return "\n".join(f"{word:<{width}}  {claim}" for claim, word in words.items())


def each(f, *tables):
    """-> [whether f holds] for each row of a table, or for each tuple of rows of several tables"""
    return [bool(f(*rows)) for rows in zip(*tables)]

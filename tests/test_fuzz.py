"""Thousands of broken files, command lines and interruptions: each run either ends as it should or
prints one readable line."""

import copy
import importlib
import json
import random
import shutil
import subprocess
import sys
import time
from dataclasses import fields

import pytest
from conftest import ROOT
from house import METHODS

import data
from training import parse
from training.options import flag

pytestmark = pytest.mark.slow

USER, ANSWER = {"role": "user", "content": "Q?"}, {"role": "assistant", "content": "A."}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
TOOL = {"role": "tool", "content": "4"}
ROWS = [
    {"prompt": "p", "completion": "c"},
    {"prompt": "p", "completion": "c", "label": True},
    {"prompt": "p", "chosen": "a", "rejected": "b", "margin": 1.5, "p": 0.5},
    {"prompt": [USER], "chosen": [USER, ANSWER], "rejected": [USER, ANSWER | {"content": "B"}]},
    {"chosen": "\n\nHuman: Q\n\nAssistant: A", "rejected": "\n\nHuman: Q\n\nAssistant: B"},
    {"messages": [USER, ANSWER]},
    {"messages": [USER, ANSWER, CALL, TOOL, USER, ANSWER], "tools": [{"name": "f"}]},
    {"prompt": [USER], "completion": [CALL], "chat_template_kwargs": {"x": 1}, "documents": [1]},
    {"prompt": "p", "answer": 5, "keys": ["a", {"b": None}]},
]
VALUES = [
    None,
    True,
    False,
    0,
    1,
    -1,
    0.5,
    10**400,
    1e308,
    "",
    " ",
    "\x00",
    "\u2028\x1b[31m",
    "é" * 99,
]
VALUES += [
    [],
    {},
    [[]],
    [None],
    [{}],
    [USER],
    [ANSWER, USER],
    [{"role": "tool", "content": "x"}],
    [CALL],
]
VALUES += ["a " * 500, " " * 5000, "a" * 5000, "\n" * 3000, "💥", [USER, ANSWER, ANSWER], "\ufeff"]
BYTES = [b"", b"\xff", b"\xef\xbb\xbf", b"\x00", b"\n", b"{", b"}", b'"', b"\\", b"\\ud83d", b"NaN"]
BYTES += [b"-Infinity", b"1e999", b"[" * 3000, b"\r", b",", b":", b"\xe2\x80", b"1" * 5000]


def mutated(rng):
    """-> a line, and the row it was"""
    row = copy.deepcopy(rng.choice(ROWS))
    base = copy.deepcopy(row)
    for _ in range(rng.randrange(3)):
        kind, key = rng.randrange(4), rng.choice([*row, "prompt", "label", "answer", "text"])
        if kind == 0:
            row.pop(key, None)
        elif kind == 1 and isinstance(row.get(key), list) and row[key]:
            row[key][rng.randrange(len(row[key]))] = rng.choice(VALUES)
        else:
            row[key] = copy.deepcopy(rng.choice(VALUES))
    line = json.dumps(row, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
    for _ in range(rng.choice([0, 0, 1, 2])):
        at = rng.randrange(len(line) + 1)
        line = line[:at] + rng.choice(BYTES) + line[at + rng.randrange(3) :]
    return line, base


def test_ten_thousand_broken_lines(tmp_path):
    """A line among good ones of its shape, through what every script reads of a file."""
    rng, path, tokenizer = random.Random(0), tmp_path / "a.jsonl", data.tokenizer()
    refused = read = 0
    for _ in range(10_000):
        line, row = mutated(rng)
        others = [json.dumps(row | {"i": i}).replace("Q", f"Q{i}").encode() for i in range(6)]
        if "prompt" in row and isinstance(row["prompt"], str):
            others = [x.replace(b'"p"', b'"p%d"' % i, 1) for i, x in enumerate(others)]
        others.insert(rng.randrange(7), line)
        path.write_bytes(b"\n".join(others))
        try:
            task = data.task(str(path), turns=rng.choice(("last", "all")))
            task.template = data.TEMPLATE | {"reads": rng.choice(([], ["tool_calls", "x"]))}
            for draw in ("demonstrations", "preferences", "graded", "feedback", "prompts"):
                try:
                    rows = getattr(task, draw)(None, 0)
                    if draw == "prompts":
                        data.encode_prompts(rows, tokenizer, 64, truncate=True)
                        rewards = [task.reward(x, "c", **columns) for x, columns in rows]
                        assert set(rewards) <= {0.0, 1.0}
                    else:
                        data.encode(rows, tokenizer, 64, truncate=True)
                    read += 1
                except data.UserError as e:
                    assert len(str(e).splitlines()) == 1 and len(str(e)) < 1000, str(e)
                    refused += 1
        except data.UserError as e:
            assert len(str(e).splitlines()) == 1 and len(str(e)) < 1000, str(e)
            refused += 1
    assert refused > 5000 and read > 5000, (refused, read)


WORDS = [
    "1",
    "0",
    "-1",
    "3",
    "0.5",
    "nan",
    "inf",
    "1e400",
    "",
    " ",
    "x",
    "é",
    "-",
    "--",
    "cosine",
    "exact",
]
WORDS += [
    "reviews",
    "a.jsonl",
    "tokens:3",
    "arithmetic:99",
    "rm",
    "x.pt",
    "f.py:g",
    "99999999999999999999",
]


@pytest.mark.parametrize("script", METHODS)
def test_three_hundred_command_lines(script, tmp_path, monkeypatch, capsys):
    """Each is read, or refused in one line."""
    monkeypatch.chdir(tmp_path)
    module, rng = importlib.import_module(script), random.Random(script)
    names = [flag(f.name) for f in fields(module.Options)] + ["--bogus", "--tau", "--no-truncate"]
    outcomes = {"read": 0, "refused": 0}
    for _ in range(300):
        argv = []
        for name in rng.sample(names, rng.randrange(1, 5)):
            field = next((f for f in fields(module.Options) if flag(f.name) == name), None)
            choices = list(field.metadata.get("choices") or []) if field else []
            argv += [name] + ([rng.choice(WORDS + choices)] if rng.random() < 0.8 else [])
        try:
            parse(module.Options, argv, module.PRESETS)
            outcomes["read"] += 1
        except data.UserError as e:
            assert e.code == 2 and len(str(e).splitlines()) == 1, argv
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 5, outcomes


def test_ten_kills_of_a_comparison(tmp_path):
    """kill -9 of compare.py at ten random moments; what it had started goes on, and the next one
    waits for it. In the end: the checkpoints of a comparison left alone, nothing beside them."""
    size = "--n-layer 1 --n-head 2 --n-embd 16 --device cpu --task tokens:8+8".split()
    command = [sys.executable, str(ROOT / "compare.py"), "--methods", "sft", "dpo", "ppo", *size]

    def compare(folder):
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        return subprocess.Popen([*command, "--out", folder], cwd=tmp_path, **pipes)

    began = time.time()
    assert compare("whole").wait() == 0
    wall, rng, kills = time.time() - began, random.Random(0), 0
    while kills < 10:
        process, began = compare("cut"), time.time()
        try:
            assert process.wait(rng.uniform(0.2, 1.0) * wall) == 0
            wall = time.time() - began  # the machine is less busy than it was
            shutil.rmtree(tmp_path / "cut")  # it got through: once more from the start
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
    assert compare("cut").wait() == 0
    kept, cut = ({x.name: x for x in (tmp_path / f).iterdir()} for f in ("whole", "cut"))
    assert kept.keys() == cut.keys()
    for name, path in cut.items():
        if name.endswith(".jsonl"):
            assert all(json.loads(line) for line in path.read_text().splitlines())
    from gpt import load

    for name in ("sft-0.pt", "dpo-0.pt", "reward_model-0.pt", "ppo-0.pt"):
        a, b = (load(x[name])[0].state_dict() for x in (kept, cut))
        assert all((a[key] == b[key]).all() for key in a), name

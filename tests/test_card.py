"""The measurements of analysis/card.py on a GPU: what each part measures, that a part may fail
alone, and that finished parts are not measured again."""

import json
import os
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import fake_cuda
import pytest
import torch
from conftest import ROOT, main

from analysis import bench, card, card_parts
from analysis.rows import METHODS
from training import parse

pytestmark = pytest.mark.machine

SMALL = ["--small", "--device", "cpu", "--out", "card"]


@pytest.fixture
def o(tmp_path, monkeypatch):
    """The options of a dry run; the current folder is that of a part's process"""
    monkeypatch.chdir(tmp_path)
    return parse(card.Options, SMALL).begin()


def rows(part):
    """-> {(row, column): the cells}, all of it measured"""
    return {(row, column): measure() for row, column, measure in part}


def here(monkeypatch):
    """The card's processes are this one. -> the parts for which one was started"""
    started = []

    def process(command, folder, limit=None):
        started.append(command[command.index("--only") + 1])
        with monkeypatch.context() as m:
            m.chdir(folder)
            try:
                main("analysis.card", *command[3:])
            except Exception as e:
                return SimpleNamespace(returncode=1, stderr=f"Traceback\n{type(e).__name__}: {e}")
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(bench, "process", process)
    return started


def table_of(text):
    """Markdown -> {row: {column: cell}}"""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    head, _, *body = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {cells[0]: dict(zip(head[1:], cells[1:])) for cells in body}


# ---- the command


def test_a_failed_row_costs_itself_and_what_is_done_is_not_run_again(o, monkeypatch, capsys):
    """Two of three rows are measured although the second fails; the next call measures it alone,
    and after that nothing."""
    measured, broken = [], [True]

    def measure(x):
        measured.append(x)
        if x == 2 and broken:
            raise RuntimeError("no such kernel")
        return {"ms": 1234.5 * x}

    def part(o):
        for x in (1, 2, 3):
            yield f"row {x}", "ms", lambda x=x: measure(x)

    for name, f in {"waits": part, "memory": lambda o: [("a", "b", lambda: {"b": 1})]}.items():
        monkeypatch.setitem(card.PARTS, name, (f, 60, f"Of {name}"))
    started = here(monkeypatch)
    assert main("analysis.card", *SMALL, "--only", "waits", "memory") == 1
    said = capsys.readouterr()
    found = table_of(said.out.split("Of waits")[1].split("Of memory")[0])
    assert found["row 1"] == {"ms": "1,234"} and found["row 3"] == {"ms": "3,704"}
    assert found["row 2"] == {"ms": "failed, exit code 1: RuntimeError: no such kernel"}
    assert measured == [1, 2, 3] and started == ["waits", "waits", "memory"]
    assert "failed: waits;" in said.err

    broken.clear()
    assert main("analysis.card", *SMALL, "--only", "waits", "memory") == 0
    assert measured == [1, 2, 3, 2] and started[3:] == ["waits"]
    assert table_of(capsys.readouterr().out.split("Of memory")[0])["row 2"] == {"ms": "2,469"}
    assert main("analysis.card", *SMALL, "--only", "waits") == 0
    assert len(measured) == 4 and len(started) == 4
    assert main("analysis.card", *SMALL, "--only", "waits", "--again") == 0
    assert measured[4:] == [1, 2, 3]


def test_a_part_whose_time_is_over_says_so(o, monkeypatch, capsys):
    """A process of its own, which is ended while it still loads torch."""
    monkeypatch.setitem(card.PARTS, "kernels", (None, 0.1, "Of kernels"))
    assert main("analysis.card", *SMALL, "--only", "kernels") == 1
    assert "failed: the part's 0.1 s were over" in capsys.readouterr().out


def test_limits_are_ten_minutes():
    assert sum(limit for _, limit, _ in card.PARTS.values()) == 600


def test_wrong_options(capsys):
    for argv, words in ((["--only", "x"], "no such part"), (["--device", "cuda:9"], "not on this")):
        assert main("analysis.card", *SMALL, *argv) == 2
        assert words in capsys.readouterr().err


# ---- the parts, on a CPU


@pytest.mark.slow
def test_scripts_beside_the_cpu(o, monkeypatch):
    """The second of four losses is off by half of the largest."""
    monkeypatch.setattr(card_parts, "make_starts", lambda: None)
    found = {(row, setting): f for row, setting, f in card_parts.scripts(o)}
    assert len(found) == 12 * 4
    plain, devices = card_parts.ran, []

    def off(name, arguments, path, device):
        first, steps, final = plain(name, arguments, path, device)
        devices.append(str(device))
        off_by = 0.5 * max(x["loss"] for x in steps) * (len(devices) == 2)
        return first, [x | {"loss": x["loss"] + off_by * (x["step"] == 2)} for x in steps], final

    monkeypatch.setattr(card_parts, "ran", off)
    assert re.fullmatch(r"0; 0\.5; \d+", found["sft", "float32"]()["float32"])


def test_waits_and_graphs_are_of_cuda_only(o, monkeypatch):
    monkeypatch.setattr(card_parts, "make_starts", lambda: None)
    found = rows(card_parts.waits(o))
    assert len(found) == 12 and all(x == {"waits": "CUDA only"} for x in found.values())
    found = {(row, column): f for row, column, f in card_parts.sampling(o)}
    assert len(found) == 12
    assert found["toy, a batch of 8", "graph"]() == {"graph": "CUDA only"}
    assert found["toy, a batch of 8", "step by step"]()["step by step"] > 8


@pytest.mark.slow
def test_steps_beside_a_plain_loop(o):
    found = {row: f for row, _, f in card_parts.gpt2(o)}
    ours, plain = found["dpo"](), found["dpo, plain loop"]()
    rate = found["the peak of MFU"]()["TFLOP/s"]
    job = card_parts.job_of(o, "dpo", o.prompt, o.response)
    for x in (ours, plain):
        assert x["MFU"] == pytest.approx(bench.floor(job, 1e12 * rate) / x["ms"])
        assert x["tokens/s"] == pytest.approx(1000 * 8 * (8 + 24) / x["ms"])
    assert found["dpo, cuDNN attends"]() == {"ms": "CUDA only"}
    assert found["AdamW alone"]()["ms"] < plain["ms"]
    assert len([row for row in found if "new shapes" in row]) == 2


@pytest.mark.slow
def test_memory_is_that_of_the_prediction(o):
    found = rows(x for x in card_parts.memory(o) if x[0].startswith("dpo"))
    for cells in found.values():
        assert cells["measured"] > 1 and cells["measured / predicted"] == pytest.approx(1, abs=0.02)
    assert found["dpo --lora 8", "measured"]["measured"] < found["dpo", "measured"]["measured"]


def test_kernels_are_named(o):
    found = rows(card_parts.kernels(o))
    shares = [x["share"] for x in found.values() if "share" in x]
    assert len(shares) == 12 and shares == sorted(shares, reverse=True) and 0.5 < sum(shares) <= 1
    assert any("aten::" in row and "mm`" in row for row, _ in found)
    [(column, name)] = found.pop(list(found)[-1]).items()
    assert "flash" in name and "CUDA only" in column


# ---- on the emulated device


@pytest.fixture
def emulated(o):
    if not shutil.which(fake_cuda.COMPILER) or torch.version.cuda:
        pytest.skip("the emulation needs a C++ compiler and a CPU build of torch")
    fake_cuda.install()
    return parse(card.Options, [*SMALL, "--device", "cuda"]).begin()


@pytest.mark.cuda
def test_scripts_and_waits_of_a_device(emulated):
    """The losses are the CPU's but for rounding, and torch's warnings are counted."""
    scripts = {(row, setting): f for row, setting, f in card_parts.scripts(emulated)}
    waits = {row: f for row, _, f in card_parts.waits(emulated)}
    for name in ("dpo", "grpo"):
        code, apart, ms = scripts[name, "float32"]()["float32"].split("; ")
        assert code == "0" and float(apart) < 1e-4 and float(ms) > 0
    assert waits["dpo"]()["waits"] == 2
    found = waits["grpo"]()
    assert 3 <= found["waits"] <= 10 and "sampling.py" in str(found["where"])


@pytest.mark.cuda
def test_what_only_a_device_has(emulated):
    steps = {row: f for row, _, f in card_parts.gpt2(emulated)}
    assert steps["dpo, cuDNN attends"]()["MFU"] > 0 < steps["dpo, plain loop"]()["MFU"]
    draws = {(row, column): f for row, column, f in card_parts.sampling(emulated)}
    assert draws["toy, a batch of 8", "graph"]()["graph"] > 8
    memory = {row: f for row, _, f in card_parts.memory(emulated)}
    assert memory["dpo"]()["measured / predicted"] == pytest.approx(1, abs=0.1)


@pytest.mark.cuda
def test_each_process_of_the_card_is_emulated(emulated, tmp_path):
    emulation = {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "FAKE_CUDA": "1"}
    done = card_of(tmp_path, "--device", "cuda", "--only", "kernels", **emulation)
    assert done.returncode == 0, done.stdout + done.stderr
    found = table_of(done.stdout)
    assert "a CUDA device that is not there" in done.stdout and len(found) == 13
    assert "by math" in found["attention"].values()


# ---- all of it


def card_of(folder, *more, **env):
    command = [sys.executable, "-m", "analysis.card", *SMALL, *more]
    env = os.environ | {"PYTHONPATH": str(ROOT)} | env
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)


@pytest.mark.slow
def test_the_card_on_a_cpu(tmp_path):
    for _ in range(6):  # a slow machine takes more than a card's limits, and goes on
        done = card_of(tmp_path)
        if done.returncode == 0:
            break
    assert done.returncode == 0, done.stdout + done.stderr
    found = {}
    for path in tmp_path.glob("card/*/*.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        found[path.stem] = {tuple(x["row"]): x["cells"] for x in lines if "cells" in x}
    assert set(found) == set(card.PARTS) and len(found["scripts"]) == 4 * len(METHODS)
    for (_, setting), cells in found["scripts"].items():
        code, apart, ms = cells[setting].split("; ")
        assert code == "0" and float(apart) < 1e-4 and float(ms) > 0

"""Interrupted runs: --resume gives the same bits, nothing is half written, no line stands twice."""
import hashlib
import json
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, TINY, TRAIN, killed, main, run

import common

SCRIPTS = ["sft", "dpo", "reward_model", "simpo", "orpo", "kto", "online_dpo", "ppo", "grpo", "dapo"]
SHORT = ["--steps", "40", "--batch-size", "4", "--log-every", "1", "--save-every", "3", "--device", "cpu"]


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def step_lines(path):
    """Whole JSON lines only, each step once, one header and one final line. -> the step lines"""
    record = [json.loads(line) for line in path.read_text().splitlines()]
    steps = [line["step"] for line in record if "step" in line]
    assert steps == sorted(set(steps)) and "options" in record[0] and "final" in record[-1] and len(record) == len(steps) + 2
    return [line for line in record if "step" in line]


ROLLOUTS = ["--init", "ends.pt", "--reward", "judge.py:odd", "--group", "4", "--updates", "2", "--minibatches", "2"]


def options_of(script):
    """What makes a run of this script small."""
    small = ["--n-layer", "1", "--n-embd", "16"] if script in ("sft", "orpo") else ["--pairs", "10"]
    if script == "ppo":  # with its four models
        return ["--init", "ends.pt", "--reward-model", "judge.pt", "--group", "4", "--minibatches", "2"]
    if script == "online_dpo":  # the second of two rounds has the steps 2 and 3 of three: a state after step 2 holds its pairs
        return ["--init", "ends.pt", "--reward", "judge.py:odd", "--rounds", "2", "--ref-update", "per-round", "--samples-per-prompt", "3"]
    return ROLLOUTS if script in ("grpo", "dapo") else small


@pytest.mark.parametrize("script", SCRIPTS)
def test_resume_gives_the_same_bits(script, ends, monkeypatch, capsys):
    tiny = ends
    monkeypatch.chdir(tiny)
    tiny_run, small = TRAIN if script == "reward_model" else TINY, options_of(script)
    assert main(script, *tiny_run, *small, "--out", "whole/x.pt") == 0
    saved = common.Run._save

    def save_and_die(self, step):
        saved(self, step)
        self.write({"step": step + 1, "line": "after the saved state"})
        raise common.Stopped("killed")

    monkeypatch.setattr(common.Run, "_save", save_and_die)
    assert main(script, *tiny_run, *small, "--save-every", 2, "--out", "cut/x.pt") == 1
    monkeypatch.setattr(common.Run, "_save", saved)
    shutil.copy(tiny / "cut/x.state", tiny / "state")
    assert main(script, *tiny_run, *small, "--out", "cut/x.pt", "--resume", "--lr", "0.5") == 2
    assert "--resume: the interrupted run had --lr" in capsys.readouterr().err
    assert main(script, *tiny_run, *small, "--out", "cut/x.pt", "--resume") == 0
    assert "resumed after step 2 of 3" in capsys.readouterr().out
    assert digest(tiny / "cut/x.pt") == digest(tiny / "whole/x.pt")
    a, b = step_lines(tiny / "cut/x.jsonl"), step_lines(tiny / "whole/x.jsonl")
    assert a == b and len(a) == 3
    assert main(script, *tiny_run, *small, "--out", "cut/x.pt", "--resume") == 0
    assert "this run has finished" in capsys.readouterr().out
    before = digest(tiny / "cut/x.pt"), digest(tiny / "cut/x.jsonl")
    assert main(script, *tiny_run, *small, "--out", "cut/x.pt", "--resume", "--lr", "0.5") == 2
    assert "cut/x.pt is a finished run with --lr" in capsys.readouterr().err
    assert main("sft" if script == "dpo" else "dpo", *TINY, "--out", "cut/x.pt", "--resume") == 2
    assert f"cut/x.pt is a finished run of {script}.py" in capsys.readouterr().err
    assert before == (digest(tiny / "cut/x.pt"), digest(tiny / "cut/x.jsonl"))
    monkeypatch.setattr(common, "_digest", lambda *_: "another checkpoint")
    shutil.copy(tiny / "state", tiny / "cut/x.state")
    assert main(script, *tiny_run, *small, "--out", "cut/x.pt", "--resume") == 2
    assert "has changed" in capsys.readouterr().err
    (tiny / "cut/x.state").unlink()
    assert main(script, *tiny_run, *small, "--out", f"fresh/{script}.pt", "--resume") == 0
    assert "starts afresh" in capsys.readouterr().out


@pytest.mark.parametrize("script", ["ppo", "grpo", "dapo"])
def test_resume_from_the_middle_of_a_rollout(script, ends, monkeypatch):
    """Killed between two optimizer steps of the third rollout, after new responses were drawn: the same bits as without."""
    monkeypatch.chdir(ends)
    args = [*TINY, *ROLLOUTS, "--save-every", 1]
    assert main(script, *args, "--out", "whole/y.pt") == 0
    killed(2 * 4 + 3, script, [*args, "--out", "cut/y.pt"], monkeypatch)
    assert torch.load("cut/y.state", weights_only=True)["step"] == 2
    assert main(script, *args, "--out", "cut/y.pt", "--resume") == 0
    assert digest(ends / "cut/y.pt") == digest(ends / "whole/y.pt")
    assert step_lines(ends / "cut/y.jsonl") == step_lines(ends / "whole/y.jsonl")


def test_resume_from_the_middle_of_a_round(ends, monkeypatch, capsys):
    """Killed in the second step of a round, after the round's pairs were drawn; and in its first, whose state is that before the draw."""
    monkeypatch.chdir(ends)
    args = [*TINY, *options_of("online_dpo"), "--steps", 6, "--warmup", 0, "--save-every", 1]
    assert main("online_dpo", *args, "--out", "whole/z.pt") == 0
    for at in (5, 4):
        killed(at, "online_dpo", [*args, "--out", f"cut{at}/z.pt"], monkeypatch)
        state = torch.load(f"cut{at}/z.state", weights_only=True)
        assert state["step"] == at - 1 and state["round"]["first"] == (3 if at == 5 else 0)
        assert main("online_dpo", *args, "--out", f"cut{at}/z.pt", "--resume") == 0
        assert digest(ends / f"cut{at}/z.pt") == digest(ends / "whole/z.pt")
        assert step_lines(ends / f"cut{at}/z.jsonl") == step_lines(ends / "whole/z.jsonl")


def test_ctrl_c_saves_and_tells_how_to_go_on(tiny):
    args = ["--steps", "100000", "--batch-size", "4", "--save-every", "100000", "--out", "ctrl/dpo.pt", "--device", "cpu"]
    command, pipe = [sys.executable, str(ROOT / "dpo.py"), *args], subprocess.PIPE
    process = subprocess.Popen(command, cwd=tiny, stdout=pipe, stderr=pipe, text=True)
    deadline = time.time() + 60
    while not (tiny / "ctrl/dpo.jsonl").exists() or len((tiny / "ctrl/dpo.jsonl").read_text().splitlines()) < 2:
        assert time.time() < deadline and process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and (tiny / "ctrl/dpo.state").exists()
    assert said.strip().splitlines()[-1].endswith(" ".join(["python", *command[1:]]) + " --resume")


def test_a_stage_ends_with_its_parent(tmp_path):
    """dpo.py is killed while sft.py, which it started, runs: sft.py is gone within seconds."""
    parent = subprocess.Popen([sys.executable, ROOT / "dpo.py", "--device", "cpu"], cwd=tmp_path, stdout=subprocess.DEVNULL)
    deadline = time.time() + 60
    while not (record := tmp_path / "out/reviews/sft.jsonl").exists() or len(record.read_text().splitlines()) < 2:
        assert time.time() < deadline
        time.sleep(0.1)
    parent.kill()
    parent.wait()
    time.sleep(2)
    size = record.stat().st_size
    time.sleep(3)
    assert record.stat().st_size == size


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_ten_kills(script, ends, tmp_path):
    """kill -9 at ten random moments, each followed by --resume: the checkpoint is that of a run left alone, bit for bit."""
    shutil.copytree(ends / "out", tmp_path / "out")
    for name in ("ends.pt", "judge.py", "judge.pt"):
        shutil.copy(ends / name, tmp_path)
    args = [*SHORT, *options_of(script)]
    args += ["--max-new-tokens", "4"] * (script != "reward_model")
    start = time.time()
    run(f"{script}.py", *args, "--out", "whole/x.pt", cwd=tmp_path)
    wall, rng, killed = time.time() - start, random.Random(0), 0
    while killed < 10:
        process = subprocess.Popen([sys.executable, ROOT / f"{script}.py", *args, "--out", "cut/x.pt", "--resume"], cwd=tmp_path,
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
        time.sleep(rng.uniform(0.5, 1.0) * wall)
        if process.poll() is None:
            process.kill()
            killed += 1
        process.wait()
        if (tmp_path / "cut/x.pt").exists() and not (tmp_path / "cut/x.state").exists():
            assert digest(tmp_path / "cut/x.pt") == digest(tmp_path / "whole/x.pt")
            shutil.rmtree(tmp_path / "cut")  # it got through: once more from the start
    run(f"{script}.py", *args, "--out", "cut/x.pt", "--resume", cwd=tmp_path)
    assert digest(tmp_path / "cut/x.pt") == digest(tmp_path / "whole/x.pt")
    assert step_lines(tmp_path / "cut/x.jsonl") == step_lines(tmp_path / "whole/x.jsonl")
    assert sorted(p.name for p in (tmp_path / "cut").iterdir()) == ["x.jsonl", "x.pt"]

"""Checkpoints that a run keeps on its way (--keep-every), and held-out losses without samples."""

from pathlib import Path

import pytest
import torch
from conftest import TINY, TRAIN, few_prompts, killed, lines, main

from gpt import load
from training import sampling

pytestmark = pytest.mark.machine

STEPS = [*TINY, "--steps", 6, "--keep-every", 2]


@pytest.fixture(autouse=True)
def here(tiny, tmp_path, monkeypatch):
    """In a folder of its own, beside an SFT checkpoint in sft.pt"""
    few_prompts(monkeypatch, 8)
    (tmp_path / "sft.pt").write_bytes((tiny / "out/reviews/sft.pt").read_bytes())
    monkeypatch.chdir(tmp_path)


def files():
    return sorted(path.name for path in Path("o").glob("*.pt"))


def test_a_run_keeps_whole_checkpoints(capsys):
    """The last of them is the checkpoint at the end; each is evaluated and trained on as any is."""
    args = [*STEPS, "--init", "sft.pt", "--out", "o/dpo.pt"]
    assert main("dpo", *args) == 0
    assert files() == ["dpo-000002.pt", "dpo-000004.pt", "dpo-000006.pt", "dpo.pt"]
    assert "dpo step 2/6: o/dpo-000002.pt is written" in capsys.readouterr().out
    (early, meta), (last, _), (end, _) = (load(f"o/dpo{x}.pt") for x in ("-000002", "-000006", ""))
    assert meta["steps"] == 2 and not torch.equal(early.wte.weight, end.wte.weight)
    assert torch.equal(last.wte.weight, end.wte.weight)
    assert main("dpo", *TINY, "--steps", 2, "--init", "sft.pt", "--out", "o/two.pt") == 0
    assert torch.equal(load("o/two.pt")[0].wte.weight, early.wte.weight)
    assert main("evaluate", "o/dpo-000002.pt", "--eval-prompts", 4, "--device", "cpu") == 0
    assert main("export", "o/dpo-000002.pt", "--to", "folder") == 0


def test_the_last_ones_alone_are_kept(monkeypatch):
    """Those of other runs stay. A resumed run counts those that it kept before."""
    Path("o").mkdir()
    Path("o/dpo-000001.pt").write_bytes(Path("sft.pt").read_bytes())
    args = [*STEPS, "--keep-every", 1, "--keep", 2, "--save-every", 1, "--init", "sft.pt"]
    killed(4, "dpo", [*args, "--out", "o/a.pt"], monkeypatch)
    assert files() == ["a-000002.pt", "a-000003.pt", "dpo-000001.pt"]
    assert main("dpo", *args, "--out", "o/a.pt", "--resume") == 0
    assert files() == ["a-000005.pt", "a-000006.pt", "a.pt", "dpo-000001.pt"]


def test_a_run_does_not_write_over_what_it_reads(capsys):
    Path("o").mkdir()
    Path("o/dpo-000002.pt").write_bytes(Path("sft.pt").read_bytes())
    args = ["--init", "o/dpo-000002.pt", "--out", "o/dpo.pt"]
    assert main("dpo", *STEPS, *args) == 2
    assert "would overwrite o/dpo-000002.pt, which this run reads" in capsys.readouterr().err
    assert main("dpo", *TINY, "--steps", 1, *args) == 0


@pytest.mark.parametrize("script", ["sft", "reward_model", "grpo"])
def test_every_kind_of_policy_is_kept(script):
    args = [*(TRAIN if script == "reward_model" else TINY), "--steps", 2, "--keep-every", 1]
    more = ["--batch-size", 2, "--group", 2] if script == "grpo" else []
    more += ["--init", "sft.pt", "--lora", 2, "--out", "o/x.pt"]
    assert main(script, *args, *more) == 0
    (model, meta), (end, _) = load("o/x-000002.pt"), load("o/x.pt")
    theirs = dict(end.named_parameters())
    assert meta["lora"]["rank"] == 2
    for name, p in model.named_parameters():
        assert torch.equal(p, theirs[name]) or name == "head.bias"  # which is centred at the end


@pytest.mark.parametrize(
    "script, key", [("sft", "nll"), ("dpo", "held_out_loss"), ("kto", "accuracy")]
)
def test_a_held_out_loss_needs_no_samples(script, key, monkeypatch):
    drawn, sample = [], sampling.sample
    monkeypatch.setattr(sampling, "sample", lambda *x, **y: drawn.append(1) or sample(*x, **y))
    args = [*TINY, "--steps", 4, "--init", "sft.pt", "--out", "o/x.pt", "--loss-every", 2]
    assert main(script, *args) == 0
    record = lines(Path("o/x.jsonl"))
    found = [x["eval"] for x in record if "eval" in x]
    assert len(found) == 2 and all(key in x and "reward" not in x for x in found)
    if script == "dpo":
        assert 0 < found[1]["held_out_loss"] < 2
    assert len(drawn) <= 4  # at the end alone: two models' answers, and those that are shown


def test_a_held_out_loss_by_hand():
    """Before the first step of note π is π_ref: -log σ(0) = log 2, and no pair is ordered."""
    args = [*TINY, "--steps", 1, "--lr", 1e-30, "--init", "sft.pt", "--out", "o/x.pt"]
    assert main("dpo", *args, "--loss-every", 1) == 0
    (found,) = [x["eval"] for x in lines(Path("o/x.jsonl")) if "eval" in x]
    assert found["held_out_loss"] == pytest.approx(0.6931472, abs=1e-6)


@pytest.mark.parametrize("script", ["grpo", "reward_model"])
def test_what_has_no_held_out_loss_refuses_it(script, capsys):
    assert main(script, "--loss-every", 1) == 2
    assert "at most 0" in capsys.readouterr().err

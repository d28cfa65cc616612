"""The search of analysis/fits.py: it finds the strongest setting that fits a card, and the command
that trains with it."""

import json
from types import SimpleNamespace

import pytest
from conftest import main

from analysis import fits, predict
from gpt import GPTConfig

pytestmark = pytest.mark.machine

CONFIG, TASK = GPTConfig(512, 64, 3, 4, 128), "tokens:24+24"


def predictions(monkeypatch):
    """-> the list of settings that are predicted from now on"""
    seen, ask = [], predict.ask
    monkeypatch.setattr(predict, "ask", lambda *x, **y: seen.append((x, y)) or ask(*x, **y))
    return seen


def options(size):
    """-> the options of compare.py, with a card on which a step of so many bytes just fits"""
    return SimpleNamespace(
        predict="own", card=size / 2**30 + predict.SPARE, batch_size=4, lora=0, given=set()
    )


@pytest.mark.slow
def test_the_first_setting_that_fits_is_taken(monkeypatch):
    """A card one byte too small for a setting gets the next one; of settings whose models alone
    are too large nothing is predicted."""
    full = predict.ask("dpo", TASK, CONFIG, False, "bfloat16", 4)["predicted_bytes"]
    setting, entry, command = fits.strongest("dpo", options(full), TASK, CONFIG)
    assert setting.words == "full" and entry["predicted_bytes"] == full
    assert command == (
        "python dpo.py --init FOLDER --task ROWS.jsonl "
        "--batch-size 2 --micro-batch 2 --dtype bfloat16"
    )
    setting, entry, _ = fits.strongest("dpo", options(full - 1), TASK, CONFIG)
    assert setting.words.startswith("full, checkpointed") and entry["predicted_bytes"] < full
    argv = predict.arguments("dpo", False, "bfloat16", 4)
    held = fits.held("dpo", argv, TASK, CONFIG, "adamw")
    seen = predictions(monkeypatch)
    setting, entry, command = fits.strongest("dpo", options(held // 3), TASK, CONFIG)
    assert setting.lora and "--lora 16" in command and entry["predicted_bytes"] <= held // 3
    assert all(arguments[7] == 16 for arguments, _ in seen)  # no full setting was predicted
    assert fits.strongest("dpo", options(1000), TASK, CONFIG) is None


@pytest.mark.slow
def test_a_stronger_setting_holds_more_or_computes_more():
    """Each setting needs less than the one before it of the same kind; but at this size a smaller
    micro-batch spares no more than its casts take."""
    sizes = []
    for setting in fits.SETTINGS:
        if setting.words == "full, checkpointed, small micro-batches":
            continue
        how = setting.checkpointed, setting.dtype, 4, 2 * setting.small, 16 * setting.lora
        found = predict.ask("simpo", TASK, CONFIG, *how, optimizer=setting.optimizer)
        sizes.append((setting.lora, found["predicted_bytes"]))
    for (kind, size), (after, less) in zip(sizes, sizes[1:]):
        assert kind != after or less <= size


@pytest.mark.parametrize("row", ["sft", "ppo", "grpo", "dpo-precomputed", "reward_model"])
def test_the_command_is_one_that_its_script_reads(row):
    _, _, command = fits.strongest(row, options(2**40), TASK, CONFIG)
    _, script, *argv = command.replace("--init FOLDER ", "").replace("ROWS.jsonl", TASK).split()
    o = predict.options(row, *argv)
    assert script.startswith(row.partition("-")[0]) and o.dtype == "bfloat16"
    assert getattr(o, "precompute_ref", False) == (row == "dpo-precomputed")


def test_the_table(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    sizes = ["--n-layer", 2, "--n-head", 2, "--n-embd", 32, "--seq-len", 16]
    args = ["--predict", "own", "--card", 24, "--methods", "dpo", "sft", *sizes]
    assert main("compare", *args) == 0
    said = capsys.readouterr().out
    assert "| dpo    | full    | 0.0 | python dpo.py --init FOLDER --task ROWS.jsonl" in said
    record = json.loads((tmp_path / "out/compare/predict-own-card-24/compare.json").read_text())
    assert [x["setting"] for x in record["methods"]] == ["full", "full"]


def test_wrong_options_are_told(capsys):
    assert main("compare", "--card", 24) == 2
    assert "--card is read with --predict only" in capsys.readouterr().err
    assert main("compare", "--predict", "own", "--card", 24, "--micro-batch", 2) == 2
    assert "--card finds what fits one card, its micro-batches too" in capsys.readouterr().err

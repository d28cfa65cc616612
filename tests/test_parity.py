"""The comparison with TRL in analysis/parity.py: how it judges, what its page says, and which
mistakes it sees."""

import importlib
import importlib.util
import re

import pytest
import torch
from conftest import ROOT, main

from analysis import parity
from analysis.against_trl import sides
from analysis.mistakes import MISTAKES, Mistake
from training import parse

PAGE = ROOT / "docs/parity.md"
TRL = importlib.util.find_spec("trl") is not None
needs_trl = pytest.mark.skipif(not TRL, reason="pip install -r requirements-peers.txt")


def cells(text):
    """-> {first cell: the other cells} of the Markdown tables in a text"""
    rows = [
        re.split(r" *\| *", line.strip("| \n")) for line in text.splitlines() if line[:1] == "|"
    ]
    return {row[0]: row[1:] for row in rows if not row[0].startswith("---")}


# ---- without TRL


@pytest.mark.parametrize("row", parity.COMPARISONS, ids=lambda row: row.name)
def test_every_comparison_is_of_a_script_and_a_trainer(row):
    """Its options are the script's, its settings have a value, its departure is explained."""
    name, *argv = row.ours.split()
    script = importlib.import_module(name)
    judge = ["--reward", "rm"] if name == "ppo" else []
    assert parse(script.Options, ["--task", "x.jsonl", *judge, *argv], script.PRESETS)
    settings = dict(map(sides.setting, row.theirs.split()[1:]))
    assert all(value != "" for value in settings.values())
    assert not row.departs or row.departs in parity.DEPARTURES
    assert set(row.needs.split()) <= {*"margin twins ragged backwards gradient sampler".split()}
    assert row.theirs.split()[0] != "derivation" or name == "ppo"


def test_names_are_unique_and_no_departure_is_left_over():
    names = [row.name for row in parity.COMPARISONS]
    assert len(set(names)) == len(names) > 40
    assert {row.departs for row in parity.COMPARISONS} - {""} == set(parity.DEPARTURES)


nan, small, large = float("nan"), parity.SMALL, parity.LARGE
JUDGED = [  # loss, gradient -> agrees, departs; None: neither
    (small / 2, small / 2, True, False),
    (small * 2, 0.0, False, False),
    (0.0, small * 2, False, False),
    (large * 2, 0.0, False, True),
    (0.0, large * 2, False, True),
    (nan, 0.0, False, False),
    (0.0, nan, False, False),
]


@pytest.mark.parametrize("loss, gradient, agrees, departs", JUDGED)
def test_the_verdict_by_hand(loss, gradient, agrees, departs):
    same, other = parity.Comparison("a", "", ""), parity.Comparison("b", "", "", "ρ k3")
    wrong = [k for k, x in (("loss", loss), ("gradient", gradient)) if not x < small]
    verdict = "agree" if agrees else f"DIFFERS: {', '.join(wrong)}"
    assert parity.judge(same, loss, gradient, {}) == (verdict, agrees)
    words = "ρ k3" if departs else "NO LONGER: ρ k3"
    assert parity.judge(other, loss, gradient, {"kl": 1.0}) == (words, departs)
    only = parity.Comparison("c", "", "", "", "gradient")
    assert parity.judge(only, 1.0, gradient, {"loss": 1.0})[1] == (gradient < small)


def test_the_verdict_on_figures_by_hand():
    """Each must agree, but those that TRL defines otherwise; and these must not agree."""
    row = parity.Comparison("a", "", "GRPO loss_type=grpo")
    assert row.other() == {"reward_std"}
    apart = {"kl": small / 2, "entropy": 0.0, "reward_std": 1.0}
    assert parity.judge(row, 0.0, 0.0, apart) == ("agree", True)
    assert list(parity.gone({row: (0.0, 0.0, apart)})) == []
    for value in (small * 2, nan):
        assert parity.judge(row, 0.0, 0.0, apart | {"kl": value}) == ("DIFFERS: kl", False)
    alike = {row: (0.0, 0.0, apart | {"reward_std": 0.0})}
    assert list(parity.gone(alike)) == ["reward_std of GRPO"]
    assert parity.Comparison("b", "", "OnlineDPO loss_type=ipo").other() == {"kl"}


def test_figures_are_means_under_our_names():
    steps = sides.Steps()
    steps.logged([{"step": 1, "kl": 2.0, "text": "no"}, {"learning_rate": 0.1, "kl": 4}])
    assert steps.figures == {"kl": 3.0, "lr": 0.1}


def test_how_far_gradients_are_apart_by_hand():
    a, b = {"x": torch.tensor([3.0]), "y": torch.tensor([5.0])}, {"x": torch.tensor([3.0])}
    assert parity.apart(a, b | {"y": torch.tensor([4.0])}) == pytest.approx(1 / 5)
    with pytest.raises(AssertionError, match="the same weights"):
        parity.apart(a, b)


def test_torch_says_what_a_step_is_made_of():
    """Two micro-batches, then a step: the loss is their sum, the gradient as the step finds it."""
    w = torch.tensor([2.0], requires_grad=True)
    steps, optimizer = sides.Steps(), torch.optim.SGD([w], lr=1.0)
    steps.watch(optimizer, lambda: w.grad.clone())
    with steps.watching_losses():
        (3 * w).sum().backward()
        (w**2).sum().backward()
        optimizer.step()
    assert steps == [(10.0, torch.tensor([7.0]))] and w.item() == -5


def test_settings_are_read():
    assert sides.setting("batch=4") == ("per_device_train_batch_size", 4)
    assert sides.setting("loss_type=sigmoid,sft") == ("loss_type", ["sigmoid", "sft"])
    assert sides.setting("loss_weights=1.8,-0.8") == ("loss_weights", [1.8, -0.8])
    assert sides.setting("use_bias_correction_kl=False") == ("use_bias_correction_kl", False)


def test_the_page_has_every_comparison_and_departure():
    page = cells(PAGE.read_text())
    for row in parity.COMPARISONS:
        ours, theirs, *_, verdict = page[row.name]
        assert (ours, theirs) == (f"`{row.ours}`", f"`{row.theirs}`")
        assert verdict == (row.departs or "agree")
    for name, words in parity.DEPARTURES.items():
        assert page[name] == list(words)


@pytest.mark.skipif(TRL, reason="TRL is here")
@pytest.mark.parametrize("command", [["analysis.parity"], ["analysis.bench", "--peers"]])
def test_it_asks_for_its_package(command, capsys):
    assert main(*command) == 2
    said = capsys.readouterr().err
    assert "needs the package trl" in said and "requirements-peers.txt" in said
    assert said.count("\n") == 1


def test_a_name_that_is_not_there_is_told(capsys):
    assert main("analysis.parity", "--only", "TRPO") == 2
    assert "--only TRPO: no comparison has it in its name" in capsys.readouterr().err


# ---- with TRL


@pytest.fixture(scope="module")
def kept():
    """What TRL's side has found, which no mistake on our side changes"""
    return {}


@pytest.fixture(autouse=True)
def once(kept, monkeypatch):
    """TRL's side is run once for the same settings, rows and responses."""
    theirs = sides.theirs

    def remembered(command, rows, folder, steps, rollout=None):
        key = command, repr(rows), steps, repr(rollout and rollout.ids.tolist())
        if key not in kept:
            kept[key] = theirs(command, rows, folder, steps, rollout)
        return kept[key]

    monkeypatch.setattr(sides, "theirs", remembered)


def magnitude(said, bound):
    """A figure as the table has it -> a number; below the bound of rounding it is 0"""
    x = float(said or 0)
    return 0.0 if x <= bound else x


@needs_trl
@pytest.mark.docs
def test_the_page_is_what_the_command_prints(capsys):
    """Its rows and verdicts; differences within a factor of 2, rounding below its bound."""
    assert main("analysis.parity") == 0
    said, page = capsys.readouterr().out, PAGE.read_text()
    printed, found = cells(said), cells(page)
    assert printed.keys() <= found.keys()
    assert said.strip().splitlines()[-1] in page
    for name, row in printed.items():
        if len(row) != 7 or name == "comparison":  # of the tables below
            assert found[name] == row
            continue
        assert [*found[name][:2], *found[name][5:]] == [*row[:2], *row[5:]]
        for was, now in zip(found[name][2:5], row[2:5]):
            was, now = magnitude(was, parity.SMALL), magnitude(now, parity.SMALL)
            assert was == now or was / 2 <= now <= was * 2, name


@needs_trl
@pytest.mark.docs
@pytest.mark.parametrize("name", [name for name, mistake in MISTAKES.items() if mistake.parity])
def test_a_mistake_is_seen(name, capsys):
    """The comparisons that look there fail, and the command with them."""
    with MISTAKES[name].planted():
        assert main("analysis.parity", "--only", MISTAKES[name].parity) == 1
    said = capsys.readouterr()
    assert "are not as expected" in said.err and "DIFFERS" in said.out


MEANS = '"logps/chosen": (logp_w / len_w).detach()'  # which TRL logs
GONE = [  # a mistake after which the sides agree | comparisons | what is said
    (
        MISTAKES["dpo-smoothing-ignored"],  # as TRL's `sigmoid` ignores it
        "cDPO",
        "2 of 2 are not as expected: cDPO; cDPO of two losses",
    ),
    (
        Mistake("simpo.compute_loss", '"logps/chosen": logp_w.detach()', MEANS, ""),
        "SimPO",
        "no longer defined otherwise: logps/chosen of CPO",
    ),
]


@needs_trl
@pytest.mark.docs
@pytest.mark.parametrize("mistake, only, words", GONE)
def test_a_departure_that_is_gone_is_seen(mistake, only, words, capsys):
    with mistake.planted():
        assert main("analysis.parity", "--only", only) == 1
    assert words in capsys.readouterr().err

"""analysis/parity.py: how it judges, what its page says, and the mistakes that it sees."""

import importlib
import importlib.util
import re
import sys
import types
from pathlib import Path

import pytest
import torch
from conftest import ROOT, main

import data
from analysis import parity, sides
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
    assert parse(script.Options, ["--task", "x.jsonl", *argv], script.PRESETS)
    settings = dict(map(sides.setting, row.theirs.split()[1:]))
    assert all(value != "" for value in settings.values())
    assert not row.departs or row.departs in parity.DEPARTURES
    assert set(row.needs.split()) <= {"margin", "twins", "ragged", "backwards", "gradient"}


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
    assert parity.judge(same, loss, gradient) == ("agree" if agrees else "DIFFERS", agrees)
    words = "ρ k3" if departs else "NO LONGER: ρ k3"
    assert parity.judge(other, loss, gradient) == (words, departs)
    only = parity.Comparison("c", "", "", "", "gradient")
    assert parity.judge(only, 1.0, gradient)[1] == (gradient < small)


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
        ours, theirs, _, _, verdict = page[row.name]
        assert (ours, theirs) == (f"`{row.ours}`", f"`{row.theirs}`")
        assert verdict == (row.departs or "agree")
    for name, words in parity.DEPARTURES.items():
        assert page[name] == list(words)


@pytest.mark.skipif(TRL, reason="TRL is here")
def test_it_asks_for_its_package(capsys):
    assert main("analysis.parity") == 2
    said = capsys.readouterr().err
    assert "needs the package trl" in said and "requirements-peers.txt" in said
    assert said.count("\n") == 1


def test_a_name_that_is_not_there_is_told(capsys):
    assert main("analysis.parity", "--only", "PPO") == 2
    assert "--only PPO: no comparison has it in its name" in capsys.readouterr().err


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
        if name in parity.DEPARTURES or name in ("comparison", "departure"):
            assert found[name] == row
            continue
        assert [*found[name][:2], found[name][4]] == [*row[:2], row[4]]
        for was, now in zip(found[name][2:4], row[2:4]):
            was, now = magnitude(was, parity.SMALL), magnitude(now, parity.SMALL)
            assert was == now or was / 2 <= now <= was * 2, name


PLANTED = {  # a mistake -> the file, a line's words, what stands there instead, who sees it
    "a mean over answers": (
        *("sft.py", "1 / sum(len(y) for _, y in rows)", "1 / len(rows) / len(rows[0][1])"),
        "SFT",
    ),
    "micro-batches that count alone": (
        *("dpo.py", "run.backward((weight * losses).sum(),", "run.backward(losses.mean(),"),
        "2 epochs",
    ),
    "a reference that is exchanged": (
        "dpo.py",
        "view(2, -1).T",
        "view(2, -1).flip(0).T",
        "2 epochs",
    ),
    "an end token that is not trained": (
        *("data/batch.py", "text & (column >= start)", "(column < stop - 1) & (column >= start)"),
        "DPO",
    ),
    "a score before the end": (
        *("data/batch.py", "column == stop - 1 if ends", "column == stop - 2 if ends"),
        "reward model",
    ),
    "no margin": (
        "reward_model.py",
        "reward_w - reward_l - margin",
        "reward_w - reward_l",
        "margin",
    ),
    "scores that are centred apart": (
        *("reward_model.py", "(reward_w + reward_l) ** 2", "(reward_w**2 + reward_l**2)"),
        "centring",
    ),
    "no reference": (
        *("dpo.py", "(logp_w - ref_logp_w) - (logp_l - ref_logp_l)", "logp_w - logp_l"),
        "DPO",
    ),
    "the labels of cDPO": (
        *("dpo.py", "-(1 - label_smoothing) * right", "-right"),
        "cDPO",
    ),
    "robust without its factor": ("dpo.py", " / (1 - 2 * flip)", "", "robust"),
    "IPO of sums": ("dpo.py", 'o.loss == "ipo" and not o.ipo_sum', "False", "IPO"),
    "IPO with another target": ("dpo.py", "1 / (2 * tau)", "1 / tau", "IPO"),
    "the NLL of a sum": ("dpo.py", "o.sft_weight * logp_w / len_w", "o.sft_weight * logp_w", "NLL"),
    "no margin γ": ("simpo.py", "/ len_l) - gamma)", "/ len_l))", "SimPO"),
    "SimPO of sums": (
        *("simpo.py", "(logp_w / len_w - logp_l / len_l)", "(logp_w - logp_l)"),
        "SimPO",
    ),
    "probabilities for odds": (
        *("orpo.py", "mean_logp - torch.log(-torch.expm1(mean_logp))", "mean_logp"),
        "ORPO",
    ),
    "two NLLs": ("orpo.py", "losses - nll + whole", "losses + whole", "ORPO + prompt"),
    "KTO without β": ("kto.py", "a = beta * (", "a = (", "KTO"),
    "KTO without ẑ": ("kto.py", "(logp - ref_logp - kl)", "(logp - ref_logp)", "KTO"),
    "λ's exchanged": (
        *(
            "kto.py",
            "w_desirable * torch.sigmoid(-a), w_und",
            "w_undesirable * torch.sigmoid(-a), w_und",
        ),
        "λ_D",
    ),
    "the biased std": (
        "grpo.py",
        "reward.std(1, keepdim",
        "reward.std(1, correction=0, keepdim",
        "GRPO",
    ),
    "no temperature": (
        "grpo.py",
        "batch, o.temperature, entropy",
        "batch, 1.0, entropy",
        "temperature",
    ),
    "one ε": ("grpo.py", "1 + (eps if eps_high is None else eps_high)", "1 + eps", "ε_high"),
    "the greater of the two": ("grpo.py", "-torch.min(ratio", "-torch.max(ratio", "clip"),
    "k1 for k3": ("grpo.py", "return x.expm1() - x", "return -x", "k3"),
    "a plain sum of log-ratios": (
        *("grpo.py", " / mask.sum(1, keepdim=True)", ""),
        "GSPO",
    ),
    "a weight of its own for a micro-batch": (
        *(
            "grpo.py",
            "= token_weight(batch, minibatch, prompts",
            "= token_weight(batch, batch, prompts",
        ),
        "GRPO, micro-batches",
    ),
    "k3 without ρ": ("grpo.py", '(ratio if kl == "k3-ratio" else 1)', "1", "GRPO, ρ k3"),
    "a token mean of responses": (
        *(
            "grpo.py",
            "batch.mask / minibatch.length.sum().clamp(min=1)",
            "batch.mask / len(batch.mask)",
        ),
        "token mean",
    ),
    "a ratio to the wrong policy": (
        *("grpo.py", "logp.detach() if batch.old_logp is None", "logp.detach() if True"),
        "GRPO, clip",
    ),
    "a sum over responses": (
        "grpo.py",
        "batch.mask / (S * longest)",
        "batch.mask / longest",
        "Dr.",
    ),
    "a mean with oneself": ("grpo.py", "adv * G / (G - 1)", "adv", "RLOO"),
    "no KL in the reward": ("grpo.py", "reward - o.beta * (", "reward - 0 * (", "RLOO"),
    "DAPO with one ε": ("dapo.py", "1 + eps_high", "1 + eps_low", "DAPO"),
    "no R_len": ("dapo.py", "score = reward + R_len", "score = reward", "overlong reward"),
    "truncated responses": (
        *("dapo.py", "rollout.mask & rollout.finished[:, None]", "rollout.mask"),
        "overlong filter",
    ),
    "the worse answer": ("online_dpo.py", "return best, worst", "return worst, best", "online"),
    "a step without decay": (
        *("training/run.py", "decay = self.o.weight_decay", "decay = 0.0"),
        "decay",
    ),
}


def plant(file, right, wrong, monkeypatch):
    """Puts a module with the mistake in the place of the one in the file."""
    text = (ROOT / file).read_text()
    assert text.count(right) == 1, f"{file} has it {text.count(right)} times: {right}"
    name = file.removesuffix(".py").replace("/", ".")
    module = types.ModuleType(name)
    module.__file__ = str(ROOT / file)
    monkeypatch.setitem(sys.modules, name, module)
    exec(compile(text.replace(right, wrong), file, "exec"), vars(module))
    return module


@needs_trl
@pytest.mark.docs
@pytest.mark.parametrize("mistake", PLANTED)
def test_a_mistake_is_seen(mistake, monkeypatch, capsys):
    """The comparisons that look there fail, and the command with them."""
    file, right, wrong, word = PLANTED[mistake]
    module = plant(file, right, wrong, monkeypatch)
    for name in ("pad", "pad_pairs") if Path(file).parent.name == "data" else ():
        monkeypatch.setattr(data, name, getattr(module, name))
    if file == "training/run.py":
        monkeypatch.setattr(parity.sides.Run, "adamw", module.Run.adamw)
    assert main("analysis.parity", "--only", word) == 1
    said = capsys.readouterr()
    assert "are not as expected" in said.err and "DIFFERS" in said.out


@needs_trl
@pytest.mark.docs
def test_a_departure_that_is_gone_is_seen(monkeypatch, capsys):
    """cDPO that reads its ε as little as TRL's `sigmoid` does"""
    wrong = "losses = dpo_loss(*logps, o.beta)"
    plant("dpo.py", "losses = dpo_loss(*logps, o.beta, o.label_smoothing)", wrong, monkeypatch)
    assert main("analysis.parity", "--only", "cDPO") == 1
    said = capsys.readouterr()
    assert cells(said.out)["cDPO"][-1] == "NO LONGER: label smoothing"
    assert "2 of 2 are not as expected: cDPO; cDPO of two losses" in said.err

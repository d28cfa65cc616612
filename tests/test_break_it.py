"""The bugs of analysis/break_it.py and docs/break-it.md: each one moves the figures as the page
says, and the test that the page names catches it."""

import contextlib
import inspect
import os
import re
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pkgutil import resolve_name

import pytest
import torch
from conftest import ROOT

import data
import dpo
import ppo
import training
from analysis import break_it
from analysis.break_it import BUGS
from gpt import GPT, load, token_logprobs

PAGE = (ROOT / "docs/break-it.md").read_text()
PARTS = {part.split("`")[1]: part for part in PAGE.split("\n## ")[1:] if part.startswith("`")}
ALONE = os.environ | {"OMP_NUM_THREADS": "1"}
ROW = re.compile(r"^(\S+) +(-?\d+\.\d{4}) +(-?\d+\.\d{4})(?:  ← symptom: it (\w+))?$", re.M)
NEAR, SHARE = 0.03, 0.25  # the noise that the page states


def table(text):
    """What the command printed -> {figure: (healthy, broken)}"""
    return {key: (float(a), float(b)) for key, a, b, _ in ROW.findall(text)}


def tells(bug, figures):
    """Whether the figure that tells goes the way it should, by a quarter and more"""
    key, how = bug.symptom.split()
    low, high = figures[key] if how == "rises" else figures[key][::-1]
    return high - low > max(0.01, SHARE * high)


def refused(capsys, *argv):
    """-> the line that a mistake is printed in"""
    with pytest.raises(SystemExit) as e:
        training.command(break_it.main, list(argv), torchrun=False)
    said = capsys.readouterr()
    assert e.value.code == 2 and not said.out
    (line,) = said.err.splitlines()
    return line


@pytest.mark.parametrize("argv", [[], ["kl"], ["--seed", "1"]])
def test_a_mistake_lists_the_names_in_one_line(argv, capsys):
    assert ", ".join(BUGS) in refused(capsys, *argv)


@pytest.mark.parametrize("path", ["curves", "nowhere/x.png"])
def test_a_picture_that_cannot_be_drawn_is_refused_at_once(path, capsys):
    assert f"--plot {path}: give FILE.png" in refused(capsys, "mean_for_sum", "--plot", path)


@pytest.mark.parametrize("name", BUGS)
def test_an_entry_is_whole(name):
    """A few lines, a script's command, figures, and a test that exists. What is put in is taken out
    again."""
    bug = BUGS[name]
    assert len(inspect.getsource(bug.patch).splitlines()) <= 6
    script, *argv = bug.command.split()
    module = import_module(script)
    assert training.parse(module.Options, argv, module.PRESETS)
    assert bug.symptom.split()[0] in bug.shown.split()
    assert bug.symptom.split()[1] in ("rises", "falls")
    file, test = bug.test.split("::")
    assert f"\ndef {test.partition('[')[0]}(" in (ROOT / "tests" / file).read_text()
    before = [resolve_name(place) for place in bug.places.split()]
    with bug.planted():
        broken = [resolve_name(place) for place in bug.places.split()]
    assert all(wrong is not right for wrong, right in zip(broken, before))
    assert [resolve_name(place) for place in bug.places.split()] == before


def test_the_lines_get_what_stood_there():
    """One bug by hand: what is asked for at a temperature is answered at 1."""
    assert ppo.token_logprobs is token_logprobs
    with BUGS["sampling_temperature"].planted():
        seen = []
        model = type("", (), {"logprobs": lambda self, *args: seen.append(args) or args[0]})()
        batch = type("", (), {"ids": 1, "mask": 2, "packed": 3, "unfold": lambda self, x: x})()
        ppo.token_logprobs(model, batch, 0.7)
    assert seen == [(1, 2, 1.0, False, 3)] and ppo.token_logprobs is token_logprobs


def test_the_masks_by_hand():
    """Of the prompt 1 2 and the answer 3 4 the two masks are 2 3 4 and 3."""
    rows = [((1, 2), (3, 4)), ((5,), (6,))]
    found = []
    for name in ("prompt_in_mask", "end_out_of_mask"):
        with BUGS[name].planted():
            batch, both = data.pad(rows), data.pad_pairs([((1, 2), (3, 4), (4, 4))])
        assert batch.packed.places.numel() == batch.mask.sum()
        found.append([ids[mask].tolist() for ids, mask in zip(batch.ids, batch.mask)])
        assert both.mask.sum() == (6 if name == "prompt_in_mask" else 2)
    assert found == [[[2, 3, 4], [6]], [[3], []]]


def test_in_dpo_the_prompt_cancels(tiny):
    """With the prompt in both sums each loss is what it was, and the sums are not."""
    policy, meta = load(tiny / "out/reviews/sft.pt")
    tokenizer = data.Tokenizer(meta["tokenizer"])
    pairs, _ = data.encode(data.task("reviews").preferences(4, 0), tokenizer, 256)
    o, ref, found = training.parse(dpo.Options, []), GPT(policy.config, seed=1), []
    for place in (contextlib.nullcontext(), BUGS["prompt_in_mask"].planted()):
        with place:
            found.append(dpo.compute_loss(policy, ref, data.pad_pairs(pairs), o))
    (right, metrics), (wrong, others) = found
    torch.testing.assert_close(right, wrong, rtol=0, atol=1e-4)
    assert (others["logps/chosen"] < metrics["logps/chosen"] - 1).all()


def test_the_command_in_small(tmp_path, monkeypatch, capsys):
    """Two steps: it prints the lines, the figures of both runs, and the test."""
    bug = BUGS["mean_for_sum"]
    short = bug.command.replace("--steps 120", "--steps 2").replace("1024", "8")
    monkeypatch.setitem(BUGS, "mean_for_sum", bug._replace(command=short))
    monkeypatch.setattr(break_it, "SFT_STEPS", 2)
    monkeypatch.chdir(tmp_path)
    break_it.main(["mean_for_sum", "--out", "a b", "--plot", "x.png"])
    said = capsys.readouterr().out
    assert inspect.getsource(bug.patch) in said and f"caught by tests/{bug.test}" in said
    figures = table(said)
    assert list(figures) == bug.shown.split()
    assert figures["final_kl"][0] != figures["final_kl"][1]
    assert find_spec("matplotlib") is None or (tmp_path / "x.png").stat().st_size > 1000
    files = {path.name for path in (tmp_path / "a b").iterdir()}
    assert files >= {"sft.pt", "mean_for_sum.jsonl", "mean_for_sum-healthy.jsonl"}


# ---- the page


def test_the_page_has_all_ten_in_order():
    assert list(PARTS) == list(BUGS)
    rows = re.findall(
        r"^\| \[`(\w+)`\]\(#(\w+)\) \| (.*?) \| `(.*?)` (\w+) \| `(\w+)` \|$", PAGE, re.M
    )
    assert [row[0] for row in rows] == list(BUGS)
    for name, place, what, key, how, test in rows:
        bug = BUGS[name]
        assert place == name and what == bug.what and f"{key} {how}" == bug.symptom
        assert test == bug.test.split("::")[1].partition("[")[0]


@pytest.mark.parametrize("name", BUGS)
def test_the_page_shows_the_lines_and_the_command(name):
    bug, part = BUGS[name], PARTS[name]
    assert f"```python\n{inspect.getsource(bug.patch)}```" in part
    assert f"`python -m analysis.break_it {name}`" in part
    figures = table(part)
    assert list(figures) == bug.shown.split() and tells(bug, figures)
    assert [row[0] for row in ROW.findall(part) if row[3]] == [bug.symptom.split()[0]]
    assert f"`tests/{bug.test}`" in part


@pytest.mark.docs
@pytest.mark.parametrize("name", BUGS)
def test_the_page_s_figures_are_printed_again(name, tmp_path_factory):
    """The figure that tells goes the way that the page says, and all figures are the page's within
    its noise."""
    folder = tmp_path_factory.getbasetemp()
    command = [sys.executable, "-m", "analysis.break_it", name, "--out", folder / "break_it"]
    done = subprocess.run(command, cwd=ROOT, env=ALONE, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found, printed = table(done.stdout), table(PARTS[name])
    assert tells(BUGS[name], found)
    for key, pair in printed.items():
        assert found[key] == pytest.approx(pair, abs=NEAR, rel=SHARE), key


def detached_advantage(right, policy, critic, batch, o):
    values = critic.values_before(batch.ids, batch.mask, batch.packed).detach()
    batch.adv = (batch.returns - values) * batch.mask
    return right(policy, critic, batch, o)


@pytest.mark.docs
def test_it_is_the_gradient_of_the_value_that_harms(tmp_path_factory):
    """The same lines with .detach() end as near to π* as the healthy run, and the value loss stays
    small."""
    torch.set_num_threads(1)
    folder = str(tmp_path_factory.getbasetemp() / "break_it")
    o = training.parse(break_it.Options, ["attached_advantage", "--out", folder])
    bug = BUGS["attached_advantage"]._replace(patch=detached_advantage)
    _, found = break_it.measured(bug, o, broken=True)
    for key in ("loss/value_avg", "final_kl_star"):
        healthy, broken = table(PARTS["attached_advantage"])[key]
        assert found[key] < (healthy + broken) / 2, key

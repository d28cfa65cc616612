"""The progress of a run on the screen (training/bar.py): a bar in a terminal, lines in a log
file."""

import io
import sys
from types import SimpleNamespace

import pytest

import dpo
import grpo
from training import parse
from training.bar import Bar

LINE = {"loss": 0.51, "rewards/accuracies": 0.8, "rewards/margins": 1.25, "kl": 3.0, "lr": 1e-3}


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


def run(*argv, method=dpo, first=0):
    o = parse(method.Options, ["--steps", "40", *argv], method.PRESETS)
    return SimpleNamespace(o=o, method=method.__name__, first_step=first)


def lines(run, tokens=1000):
    """Shows the steps whose figures are recorded."""
    with Bar(run) as bar:
        for done in range(run.first_step + 1, run.o.steps + 1):
            if done % run.o.log_every == 0 or done == run.o.steps:
                bar.show(LINE | {"step": done}, tokens * done)
            bar.step()


@pytest.mark.parametrize("columns", [80, 120])
def test_a_terminal_has_a_bar_and_three_figures(columns, monkeypatch):
    monkeypatch.setattr(sys, "stderr", screen := Terminal())
    monkeypatch.setattr("tqdm.std._screen_shape_wrapper", lambda: lambda _: (columns, 40))
    lines(run())
    last = [x for x in screen.getvalue().split("\r") if x.startswith("dpo")][-1].rstrip()
    assert last.startswith("dpo 40/40 |█████") and "| 00:00 < 00:00, " in last
    assert last.endswith("loss 0.51, accuracies 0.8, margins 1.25")
    assert len(last) == columns


def test_a_log_file_has_a_line_each_tenth_with_its_times_and_its_speed(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr("training.bar.time.time", lambda: now[0])
    monkeypatch.setattr(Bar, "step", lambda bar: now.__setitem__(0, now[0] + 2))
    lines(run("--steps", "100"))
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 10 and said[4] == (
        "dpo step 50/100: loss 0.51, accuracies 0.8, margins 1.25; 01:38 gone, 01:38 left, "
        "510 tokens/s"
    )


@pytest.mark.parametrize(
    "argv, n", [("", 10), ("--log-every 5", 20), ("--log-every 100", 1), ("--eval-every 50", 0)]
)
def test_log_every_counts_in_a_log_file(argv, n, capsys):
    lines(run("--steps", "100", *argv.split()))
    assert len(capsys.readouterr().out.splitlines()) == n


def test_each_method_shows_its_own_figures(capsys):
    figures = {"loss": 0.1, "reward": 2.0, "kl": 1.0, "entropy": 0.7, "lr": 1e-3, "step": 40}
    with Bar(run(method=grpo)) as bar:
        bar.show(figures, 40)
    assert "reward 2, kl 1, entropy 0.7;" in capsys.readouterr().out

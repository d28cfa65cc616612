"""The questions of docs/questions.md: they are those of analysis.questions, and their commands
print the output on the page."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, main

from analysis import experiment
from analysis.experiment import cell, show, verdicts
from analysis.questions import QUESTIONS

PAGE = (ROOT / "docs/questions.md").read_text()
NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?(?![\w.])")


def sections():
    """-> {name: (question, answer, what was printed)} of the page"""
    found = {}
    for section in PAGE.split("\n## ")[1:]:
        head, command, _, printed, _ = section.split("```")
        title, answer = head.split("\n", 1)
        name = re.fullmatch(r"\npython -m analysis\.questions ([\w-]+)\n", command)[1]
        found[name] = title, answer.strip(), printed.strip("\n")
    return found


def test_the_page_has_every_question_in_order():
    assert list(sections()) == list(QUESTIONS)
    for name, (title, answer, printed) in sections().items():
        assert title == QUESTIONS[name].__doc__, "the heading is the function's docstring"
        assert title.endswith("?") and len(answer.splitlines()) <= 8 and len(answer) <= 600, name
        assert re.search(r"^(yes ?)+ ", printed, re.M), "the claims stand at the end"
        assert not re.search(r"^(yes |no )*no ", printed, re.M), "and hold"
        lines = printed.splitlines()
        assert len(lines) <= 26, name
        assert max(len(x) for x in lines if not x.startswith("ran: ")) <= 110, name


@pytest.mark.parametrize("argv", [[], ["nothing"], ["cancels", "memory"]])
def test_a_wrong_name_is_one_line_with_the_names(argv, capsys):
    assert main("analysis.questions", *argv) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1
    assert all(name in said.err for name in QUESTIONS)


def test_a_claim_that_fails_is_told_and_is_an_error(monkeypatch, capsys):
    rows, claims = (
        [{"seed": 0, "x": 1.5}],
        {"one holds": [True, True], "one does not": [True, False]},
    )
    monkeypatch.setitem(QUESTIONS, "cancels", lambda: (rows, claims))
    assert main("analysis.questions", "cancels") == 1
    said = capsys.readouterr()
    assert "yes yes  one holds\nyes no   one does not" in said.out
    assert said.err == "questions.py: cancels: a claim does not hold\n"


def test_cells_and_columns():
    assert [cell(x) for x in (0.0626, 1.255, 225.61, -1e-9, 3, "a")] == [
        *("0.063", "1.25", "226", "0.000", "3", "a")
    ]
    assert show([{"a": 1, "b": 0.5}, {"b": 12.0}]) == "a      b\n1  0.500\n   12.00"
    assert verdicts({}) == ""


def test_a_run_is_kept_and_its_command_told(tmp_path, monkeypatch):
    """A second time nothing is trained; another seed is another run."""
    calls = []

    def trained(argv):
        calls.append(argv)
        path = Path(argv[argv.index("--out") + 1])
        lines = [
            {"options": {}},
            {"step": 1},
            {"step": 1, "eval": {"kl": 0.5}},
            {"final": {"x": 1}},
        ]
        path.touch()
        path.with_suffix(".jsonl").write_text("\n".join(map(json.dumps, lines)))

    monkeypatch.setattr(experiment, "FOLDER", tmp_path)
    monkeypatch.setattr(experiment, "TOLD", [])
    monkeypatch.setattr("dpo.main", trained)
    monkeypatch.setattr("sft.main", trained)
    for seed in (0, 0, 1):
        done = experiment.run("dpo.py --task exact --beta 2", seed)
        assert (done.steps, done.evals, done.final) == ([{"step": 1}], [{"kl": 0.5}], {"x": 1})
    start, first, second = calls
    assert experiment.TOLD == [experiment.STARTS["exact"], "dpo.py --task exact --beta 2"]
    assert "--init" not in start and first[first.index("--init") + 1].startswith(str(tmp_path))
    assert first[first.index("--seed") + 1] == "0" and second[second.index("--seed") + 1] == "1"


@pytest.mark.parametrize("name", ["critic", "group-std", "response-mean"])
def test_arithmetic_by_hand_is_printed_as_the_page_has_it(name, capsys):
    assert main("analysis.questions", name) == 0
    assert capsys.readouterr().out.strip("\n") == sections()[name][2]


FREE = {  # rows of policies that nothing holds
    "one-network": "itself, detached",
    "few-pairs": "64 fixed",
    "verifier": "DPO",
}


def same(said, shown, free=None):
    """Whether two outputs have the same words, and numbers as near as the page says: within a third
    or 0.2, in rows that begin with `free` within a factor of two."""
    said, shown = said.strip("\n").splitlines(), shown.strip("\n").splitlines()
    return len(said) == len(shown) and all(
        words(a) == words(b) and near(a, b, 1.0 if free and b.lstrip().startswith(free) else 1 / 3)
        for a, b in zip(said, shown)
    )


def words(line):
    return NUMBER.sub("0", line).split()


def near(said, shown, share):
    both = zip(map(float, NUMBER.findall(said)), map(float, NUMBER.findall(shown)))
    return all(abs(a - b) <= max(0.2, share * min(abs(a), abs(b))) for a, b in both)


def test_what_counts_as_the_same():
    assert same("x  1.00 yes", "x 1.2 yes") and same("a 0.05", "a 0.24") and same("s 160", "s 200")
    assert not same("x 1.0 yes", "x 1.0 no") and not same("x 1", "x 1.4") and not same("x 1", "y 1")
    assert (
        not same("x 1", "x 1\nx 1")
        and same("  b 1.9", "b 1.0", "b")
        and not same("b 3", "b 1", "b")
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where all questions share their runs"""
    return tmp_path_factory.mktemp("questions")


@pytest.mark.docs
@pytest.mark.parametrize("name", sections())
def test_the_commands_print_what_the_page_has(name, folder):
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "analysis.questions", name]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    _, _, printed = sections()[name]
    if name == "memory":  # bytes are exact
        assert done.stdout.strip("\n") == printed
    if name == "hacking":  # a reward model of 64 pairs is another one on each machine
        assert [*map(words, done.stdout.splitlines())] == [*map(words, printed.splitlines())]
        return
    assert same(done.stdout, printed, FREE.get(name)), done.stdout

"""Every mistake of analysis/mistakes.txt and every bug of analysis/break_it.py can be put in, and
the test that it names fails under it."""

import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

import kto
from analysis.break_it import BUGS
from analysis.mistakes import MISTAKES, Mistake, read
from kto import kto_kl

ALL = BUGS | MISTAKES
ALONE = os.environ | {"OMP_NUM_THREADS": "1"}


def test_every_mistake_has_its_place_and_its_test():
    """Its place is a function whose source has the text once, and the edit changes its code."""
    for name, mistake in MISTAKES.items():
        assert mistake.code, name
    for name, mistake in ALL.items():
        file, test = mistake.test.split("::")
        assert f"\ndef {test.partition('[')[0]}(" in (ROOT / "tests" / file).read_text(), name
    assert not set(BUGS) & set(MISTAKES)


def test_a_mistake_whose_place_is_gone_is_an_error():
    for place, right in (("kto.gone", "x"), ("kto.kto_kl", "gone"), ("kto.kto_kl", "ratio")):
        with pytest.raises((AttributeError, AssertionError)):
            assert Mistake(place, right, "y", "").code
    with pytest.raises(AssertionError, match="changes no code"):
        assert Mistake("kto.kto_loss", "beta=0.1", "beta=0.2", "").code  # a default is no code


def test_a_mistake_is_put_in_for_all_who_hold_the_function_and_taken_out_again():
    text = "x: kto.kto_kl\n- ratio.sum()\n+ (-ratio).sum()\ntest_steps.py::test_kto\nparity KTO"
    mistake = read(f"# a heading\n\n{text}\n")["x"]
    assert mistake[3:] == ("test_steps.py::test_kto", "KTO")
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([0.0, 0.0])
    assert kto_kl(a, b) == kto.kto_kl(a, b) == 1.5
    with mistake.planted():
        assert kto_kl(a, b) == kto.kto_kl(a, b) == 0.0
    assert kto_kl(a, b) == kto.kto_kl(a, b) == 1.5


# ---- each is seen


def outcome(tests, *more):
    """Runs tests of the repository. -> the finished process"""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *more, *tests]
    return subprocess.run(command, cwd=ROOT, env=ALONE, capture_output=True, text=True)


@pytest.fixture(scope="module")
def all_pass():
    """The tests pass while no mistake is in place."""
    tests = {f"tests/{mistake.test.partition('[')[0]}" for mistake in ALL.values()}
    done = outcome(sorted(tests))
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_it_is_seen(name, all_pass):
    """By an assertion, and not because something is no longer defined"""
    done = outcome([f"tests/{ALL[name].test}"], "-p", "analysis.break_it", "--break-it", name)
    failed = re.search(
        r"^FAILED tests/\S+.* - (assert |AssertionError|Failed: DID)", done.stdout, re.M
    )
    assert done.returncode == 1 and failed, done.stdout + done.stderr

"""Every mistake of analysis/mistakes.txt and every bug of analysis/break_it.py can be planted, and
then the test that it names fails."""

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
from analysis.plugin import ALL
from kto import kto_kl

ALONE = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "300"}


def test_every_mistake_has_its_place_and_its_test():
    """Its place is a function whose source has the text once, and the edit changes its code."""
    for name, mistake in MISTAKES.items():
        assert mistake.code, name
    for name, mistake in ALL.items():
        file, test = mistake.test.split("::")
        text, (function, _, parameters) = (ROOT / "tests" / file).read_text(), test.partition("[")
        assert f"\ndef {function}(" in text, name
        assert parameters.rstrip("]") in text or name in BUGS, name
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


def outcome(name, tests):
    """Runs tests of the repository with a mistake in place. -> what pytest prints"""
    how = ["-n0", "-p", "no:cacheprovider", "-p", "analysis.plugin", "--break-it", name, "--tb=no"]
    how += ["-m", "not slow and not docs and not cuda"]
    command = [sys.executable, "-m", "pytest", *how, *tests]
    done = subprocess.run(command, cwd=ROOT, env=ALONE, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def seen():
    """The mistakes that are seen if one is put in after the other in one process, after the tests
    were collected"""
    said = outcome("every", sorted({f"tests/{x.test.partition('::')[0]}" for x in ALL.values()}))
    assert "fails without a mistake" not in said, said
    return set(re.findall(r"^seen: (\S+) by", said, re.M))


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_it_is_seen(name, seen):
    """By an assertion, or by one of our own refusals, and not because something is no longer
    defined. What acts while modules are imported, or within a fixture of many tests, is put in
    alone."""
    if name not in seen:
        said = outcome(name, [f"tests/{ALL[name].test.partition('[')[0]}"])
        why = r"(assert |AssertionError|Failed: DID|data\.error\.UserError)"
        assert re.search(rf"^(FAILED|ERROR) tests/.* - {why}", said, re.M), said

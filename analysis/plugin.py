"""A pytest plugin that runs tests with a bug of break_it.py or a mistake of mistakes.txt in place.

    python -m pytest -p analysis.plugin --break-it wrong_kl_sign tests/test_losses.py
    python -m pytest -n0 -p analysis.plugin --break-it every tests/test_steps.py

With `every`, in one process, each test runs once under every mistake that names it, and then
without a mistake.
"""

import contextlib
from pathlib import Path

import pytest

from analysis.break_it import BUGS
from analysis.mistakes import MISTAKES
from data import UserError

ALL = BUGS | MISTAKES
SEEN = AssertionError, pytest.fail.Exception, UserError  # raised by a test that catches a mistake


def pytest_addoption(parser):
    names = [*ALL, "every"]
    parser.addoption("--break-it", choices=names, help="run the tests with this mistake in place")


def pytest_configure(config):
    name = config.getoption("break_it")
    if name == "every":
        config.pluginmanager.register(Every())
    elif name:
        stack = contextlib.ExitStack()
        stack.enter_context(ALL[name].planted())
        config.add_cleanup(stack.close)


class Every:
    """Prints which mistakes are caught, by which test, and which tests fail without a mistake."""

    def __init__(self):
        self.seen, self.unwell = {}, []

    def pytest_generate_tests(self, metafunc):
        test = f"{Path(metafunc.module.__file__).name}::{metafunc.function.__name__}"
        names = [name for name, x in ALL.items() if x.test.partition("[")[0] == test]
        metafunc.parametrize("planted_mistake", [*names, "none"] if names else [], indirect=True)

    def pytest_collection_modifyitems(self, items):
        items[:] = filter(self.wanted, items)

    def wanted(self, item):
        """Whether mistakes name the item's test with its parameters"""
        name = item.callspec.params.get("planted_mistake")
        test = ALL[name].test if name in ALL else ""
        return name in (*ALL, "none") and test.partition("[")[2].rstrip("]") in item.name

    @pytest.fixture(autouse=True)
    def planted_mistake(self, request):
        with ALL[request.param].planted() if request.param in ALL else contextlib.nullcontext():
            yield

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):
        report = yield
        name = item.callspec.params["planted_mistake"]
        if report.failed and name == "none":
            self.unwell.append(item.nodeid)
        elif report.failed and isinstance(call.excinfo.value, SEEN):
            self.seen.setdefault(name, item.nodeid)
        return report

    def pytest_terminal_summary(self, terminalreporter):
        for name, test in self.seen.items():
            terminalreporter.write_line(f"seen: {name} by {test}")
        for test in self.unwell:
            terminalreporter.write_line(f"fails without a mistake: {test}")

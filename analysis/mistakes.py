"""Small mistakes that the tests catch: each edits one function, and names a test that then fails.

mistakes.txt lists them, as stanzas with an empty line between them:

    kto-kl-sign: kto.kto_kl                             its name, and the function that it edits
    - logp_mismatched - ref_logp_mismatched             text of that function
    + ref_logp_mismatched - logp_mismatched             the text that replaces it
    test_steps.py::test_kto                             a test in tests/ that fails under it
    parity KTO                                          comparisons of analysis.parity that differ

    python -m analysis.mistakes                         all of them, each with its test
    python -m pytest -p analysis.plugin --break-it kto-kl-sign tests/test_steps.py

While a mistake is in place, the function object runs its edited source, so that every reference to
the function has the mistake. If a function is gone, or does not contain the text exactly once,
reading the mistake's code is an error: no mistake goes stale unnoticed.
"""

import contextlib
import inspect
from pathlib import Path
from pkgutil import resolve_name
from types import CodeType
from typing import NamedTuple


class Mistake(NamedTuple):
    place: str  # the dotted name of a function, or of a property
    right: str
    wrong: str
    test: str
    parity: str = ""

    @property
    def function(self):
        """The function at the place, without its decorators"""
        found = resolve_name(self.place)
        found = getattr(found, "fget", getattr(found, "func", found))  # of a property, a cached one
        return inspect.unwrap(found)

    @property
    def code(self):
        """The function's code with the mistake in it"""
        function = self.function
        path, own = inspect.getsourcefile(function), inspect.getsource(function)
        text, n = Path(path).read_text(), own.count(self.right)
        assert n == 1, f"{self.place} has {self.right!r} {n} times, not once"
        assert text.count(own) == 1, f"{path} has the source of {self.place} more than once"
        code = compile(text.replace(own, own.replace(self.right, self.wrong)), path, "exec")
        for name in function.__qualname__.split("."):
            (code,) = [x for x in code.co_consts if isinstance(x, CodeType) and x.co_name == name]
        assert code != function.__code__, f"{self.place}: the edit changes no code"
        return code

    @contextlib.contextmanager
    def planted(self):
        """Puts the mistake in place for the body of a with statement."""
        function, healthy = self.function, self.function.__code__
        function.__code__ = self.code
        try:
            yield
        finally:
            function.__code__ = healthy


def read(text):
    """The text of mistakes.txt -> {name: Mistake}"""
    found = {}
    for stanza in text.split("\n\n"):
        lines = [line for line in stanza.splitlines() if line and line[0] != "#"]
        if not lines:
            continue
        head, minus, plus, test, *parity = lines
        name, place = head.split(": ")
        assert name not in found and (minus[0], plus[0]) == ("-", "+"), name
        words = [line.removeprefix("parity ") for line in parity]
        found[name] = Mistake(place, minus[2:], plus[2:], test, *words)
    return found


MISTAKES = read(Path(__file__).with_name("mistakes.txt").read_text())


def main():
    wide = max(map(len, MISTAKES))
    for name, mistake in MISTAKES.items():
        print(f"{name:<{wide}}  {mistake.place}\n  - {mistake.right}\n  + {mistake.wrong}")
        print(f"  tests/{mistake.test}\n")
    print(f"{len(MISTAKES)} mistakes in {len({x.place for x in MISTAKES.values()})} functions")


if __name__ == "__main__":
    main()

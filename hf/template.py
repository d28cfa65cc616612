"""The chat template of a Hugging Face checkpoint: a Jinja program that renders messages as text.

It is a stranger's program. It runs in Jinja's sandbox, where it reaches nothing but its messages,
and within limits of steps and of output. Jinja comes with torch.
"""

import contextlib
import json
import sys
import time
from datetime import datetime

from data import UserError, user_errors

STEPS, SECONDS, CHARACTERS, REPEATS = 1_000_000, 10, 10_000_000, 100_000  # of one rendering
GIVEN = {"messages", "add_generation_prompt", "tools", "documents"}  # no argument of a user's
DAY = datetime(2024, 7, 26)  # Llama's own if there is no clock: runs do not differ by the day
MARK = "\ufdd1"  # a code point that is no character: no text has it


class Template:
    """A compiled template. arguments: what it knows beside the messages: bos_token, and what
    --template-args says. Raises UserError, with `name`, wherever it fails."""

    def __init__(self, source, name, arguments):
        self.name, self.arguments = name, dict(arguments)
        with user_errors(f"the chat template of {name} cannot be read"):
            from jinja2.meta import find_undeclared_variables

            environment = _environment()
            self.template = environment.from_string(source)
            self.reads = find_undeclared_variables(environment.parse(source)) - GIVEN

    def render(self, messages, generation_prompt):
        """-> the text of a conversation, with what opens the answer if one is asked for"""
        rows = [{"role": role, "content": text} for role, text in messages]
        given = {"tools": None, "documents": None} | self.arguments
        given |= {"messages": rows, "add_generation_prompt": generation_prompt}
        pieces, length = [], 0
        what = f"the chat template of {self.name} cannot render a conversation"
        with user_errors(what), _limited():
            for piece in self.template.generate(**given):
                pieces.append(piece)
                length += len(piece)
                if length > CHARACTERS:
                    raise ValueError(f"more than {CHARACTERS:,} characters")
        return "".join(pieces)

    def prompt(self, messages):
        """-> the text that an answer follows. An answer that the messages begin is not closed."""
        if messages[-1][0] != "assistant":
            return self.render(messages, True)
        *before, (role, text) = messages
        before, mark, _ = self.render([*before, (role, text + MARK)], False).rpartition(MARK)
        if not mark:
            raise UserError(f"the chat template of {self.name} drops an answer that goes on")
        return before


def _environment():
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

    class Generation(Extension):
        """{% generation %} … {% endgeneration %} marks the answer, for others."""

        tags = {"generation"}

        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(["name:endgeneration"], drop_needle=True)

    class Environment(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(["+", "*", "**"])

        def call_binop(self, context, operator, left, right):
            large = any(size(x) > CHARACTERS for x in (left, right))
            repeats = operator == "*" and isinstance(left, int) != isinstance(right, int)
            if repeats:
                large = any(isinstance(x, int) and x > REPEATS for x in (left, right))
            if operator == "**" or large:
                raise SecurityError(f"{operator} of that size")
            return super().call_binop(context, operator, left, right)

        def call(self, context, function, *args, **kwargs):
            numbers = [x for x in (*args, *kwargs.values()) if isinstance(x, int)]
            if any(abs(x) > REPEATS for x in numbers):
                raise SecurityError("a call with a number of that size")
            return super().call(context, function, *args, **kwargs)

    def size(x):
        return x.bit_length() if isinstance(x, int) else len(x) if hasattr(x, "__len__") else 0

    def raise_exception(message):
        raise ValueError(message)

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        more = {"indent": indent, "separators": separators, "sort_keys": sort_keys}
        return json.dumps(x, ensure_ascii=ensure_ascii, **more)

    environment = Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = tojson
    for name in ("center", "slice", "batch", "wordwrap", "format", "indent"):  # of any width
        del environment.filters[name]
    del environment.globals["lipsum"]
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": DAY.strftime}
    return environment


@contextlib.contextmanager
def _limited():
    """Within it so many lines may run, and for so long: loops are what could go on for ever."""
    left, before, end = STEPS, sys.gettrace(), time.monotonic() + SECONDS

    def step(frame, event, arg):
        nonlocal left
        left -= 1
        if left < 0:
            raise ValueError(f"more than {STEPS:,} steps")
        if left % 16 == 0 and time.monotonic() > end:
            raise ValueError(f"more than {SECONDS} seconds")
        return step

    sys.settrace(step)
    try:
        yield
    finally:
        sys.settrace(before)

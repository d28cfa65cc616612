"""The chat template of a Hugging Face checkpoint: a Jinja program that renders messages as text.

It is a stranger's program. It runs in Jinja's immutable sandbox, where it reaches no file and no
code, and cannot change its messages. Its time and memory are not limited. Jinja comes with torch.
"""

import json
from datetime import datetime

from data import UserError, user_errors

GIVEN = {"messages", "add_generation_prompt", "tools", "documents"}  # not by --template-args
DAY = datetime(2024, 7, 26)  # Llama's default, for every run: none depends on the day
MARK = "\ufdd1"  # a code point that is no character: no text has it


class Template:
    """A compiled template. arguments: what it may read beside the messages, such as bos_token and
    those of --template-args. If it fails, a UserError says `name`."""

    def __init__(self, source, name, arguments):
        self.name, self.arguments = name, dict(arguments)
        with user_errors(f"the chat template of {name} cannot be read"):
            from jinja2.meta import find_undeclared_variables

            environment = _environment()
            self.template = environment.from_string(source)
            self.reads = find_undeclared_variables(environment.parse(source)) - GIVEN

    def render(self, messages, generation_prompt):
        """-> the text of a conversation. generation_prompt: with an opened answer"""
        rows = [{"role": role, "content": text} for role, text in messages]
        given = {"tools": None, "documents": None} | self.arguments
        given |= {"messages": rows, "add_generation_prompt": generation_prompt}
        what = f"the chat template of {self.name} cannot render a conversation"
        with user_errors(what, "change it, or leave it out"):
            return self.template.render(given)

    def prompt(self, messages):
        """-> the text that an answer follows. An answer in the last message stays open."""
        if messages[-1][0] != "assistant":
            return self.render(messages, True)
        *before, (role, text) = messages
        before, mark, _ = self.render([*before, (role, text + MARK)], False).rpartition(MARK)
        if not mark:
            raise UserError(f"the chat template of {self.name} drops an answer that goes on")
        return before


def _environment():
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} … {% endgeneration %} marks the answer; nothing here reads the mark."""

        tags = {"generation"}

        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(["name:endgeneration"], drop_needle=True)

    def raise_exception(message):
        raise ValueError(message)

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        more = {"indent": indent, "separators": separators, "sort_keys": sort_keys}
        return json.dumps(x, ensure_ascii=ensure_ascii, **more)

    extensions = [Generation, "jinja2.ext.loopcontrols"]
    blocks = {"trim_blocks": True, "lstrip_blocks": True}
    environment = ImmutableSandboxedEnvironment(extensions=extensions, **blocks)
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": DAY.strftime}
    return environment

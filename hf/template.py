"""The chat template of a Hugging Face checkpoint: a Jinja program that renders messages as text.

The program may come from anybody. It runs in the immutable sandbox of Jinja, where it can reach no
file and no code, and cannot change its messages. But its time and memory are not limited. Jinja
comes with torch.
"""

import json
import re
from datetime import datetime
from functools import lru_cache
from itertools import starmap

from data import UserError, user_errors
from data.chat import Message

GIVEN = {"messages", "add_generation_prompt", "tools", "documents"}  # not by --template-args
DAY = datetime(2024, 7, 26)  # Llama's default, used always, so that no run depends on the day
MARK, OPEN, CLOSE = "\ufdd1\ufdd3\ufdd4"  # code points that are no characters, so no text has them
MARKED = re.compile(r"\{%[-+]?\s*generation\b")


class Template:
    """A compiled template. arguments: what it may read beside the messages, such as bos_token and
    those of --template-args. If it fails, a UserError with `name` is raised."""

    def __init__(self, source, name, arguments):
        self.name, self.arguments = name, dict(arguments)
        with user_errors(f"the chat template of {name} cannot be read"):
            from jinja2.meta import find_undeclared_variables

            self.environment = _environment()
            self.template = self.environment.from_string(source)
            tree = self.environment.parse(source)
            self.reads = find_undeclared_variables(tree) - GIVEN
            self.names = names(tree)
        self.marks = MARKED.search(source) is not None
        self.prompt = lru_cache(64)(self.prompt)
        self.marked = lru_cache(64)(self.marked)

    def render(self, messages, generation_prompt, columns=""):
        """-> the text of a conversation. generation_prompt: whether it ends with the beginning of
        an answer. columns: the other columns of the row that a template may read, as JSON"""
        rows = [json.loads(x.more or "{}") | x._asdict() for x in starmap(Message, messages)]
        for row in rows:
            row["content"] = row.pop("text")
            row.pop("more")
        columns = json.loads(columns or "{}")
        given = {"tools": None, "documents": None} | self.arguments
        given |= columns.pop("chat_template_kwargs", {}) | columns
        given |= {"messages": rows, "add_generation_prompt": generation_prompt}
        what = f"the chat template of {self.name} cannot render a conversation"
        with user_errors(what, "change it, or leave it out"):
            return self.template.render(given)

    def prompt(self, messages, columns=""):
        """-> the text before an answer. If the last message is an answer, it stays open."""
        if messages[-1][0] != "assistant":
            return self.render(messages, True, columns)
        *before, (role, text, *more) = messages
        opened = [*before, (role, text + MARK, *more)]
        before, mark, _ = self.render(opened, False, columns).rpartition(MARK)
        if not mark:
            raise UserError(f"the chat template of {self.name} drops an answer that goes on")
        return before

    def marked(self, messages, columns=""):
        """-> the text of a conversation in parts, of which every second is in {% generation %}"""
        self.environment.marks = OPEN, CLOSE
        try:
            return re.split(f"[{OPEN}{CLOSE}]", self.render(messages, False, columns))
        finally:
            self.environment.marks = "", ""


def names(tree):
    """-> all names, of variables, attributes and keys, that a template has"""
    from jinja2 import nodes

    found = {x.name for x in tree.find_all(nodes.Name)} | {
        x.attr for x in tree.find_all(nodes.Getattr)
    }
    texts = [x.value for x in tree.find_all(nodes.Const) if isinstance(x.value, str)]
    return sorted(found.union(texts))


def _environment():
    from jinja2 import nodes
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} … {% endgeneration %} encloses the text that the model says."""

        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            call = self.call_method("said")
            return nodes.CallBlock(call, [], [], body).set_lineno(line)

        def said(self, caller):
            opening, closing = self.environment.marks
            return f"{opening}{caller()}{closing}"

    def raise_exception(message):
        raise ValueError(message)

    def tojson(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        more = {"indent": indent, "separators": separators, "sort_keys": sort_keys}
        return json.dumps(x, ensure_ascii=ensure_ascii, **more)

    extensions = [Generation, "jinja2.ext.loopcontrols"]
    blocks = {"trim_blocks": True, "lstrip_blocks": True}
    environment = ImmutableSandboxedEnvironment(extensions=extensions, **blocks)
    environment.marks = "", ""
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": DAY.strftime}
    return environment

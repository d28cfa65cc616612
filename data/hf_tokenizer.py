"""The tokenizer of a Hugging Face checkpoint, by the package `tokenizers`, and how its chat
template joins a prompt and an answer.

A prompt of messages is rendered by the template, and its control tokens are read there. A control
token that a message spells stays text. A plain string is one user message, where `chat` is on.
"""

import json
import re
from functools import cached_property

from data.chat import MARK, Chat, Template
from data.error import UserError
from data.tokenizer import Tokenizer

NAMED = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")
GUARDS = [chr(i) for i in range(0xFDD2, 0xFDF0)]  # code points that are no characters


class HFTokenizer(Tokenizer):
    """As Tokenizer. `meta` holds the texts of the checkpoint's files, whether a plain string is a
    user message (`chat`), and the template's arguments (`args`)."""

    longest = None

    def __init__(self, meta):
        self.meta, self.name, files = meta, meta["name"], meta["files"]
        try:
            import tokenizers
        except ImportError:
            needs = "needs the package tokenizers: pip install -r requirements-hf.txt"
            raise UserError(f"the vocabulary of {self.name} {needs}") from None
        try:
            self.hf = tokenizers.Tokenizer.from_str(files["tokenizer.json"])
        except Exception as e:  # whatever it raises
            why = str(e).partition("\n")[0]
            raise UserError(f"tokenizer.json of {self.name} cannot be read ({why})") from None
        self.hf.no_padding()
        self.hf.no_truncation()
        self.size = max(self.hf.get_vocab().values(), default=-1) + 1
        self.settings = self._json("tokenizer_config.json")
        added = self.hf.get_added_tokens_decoder().items()
        self.controls = {token.content: i for i, token in added if token.special}
        self.named = {name: x for name in NAMED if (x := self._named(name))}
        source = files.get("chat_template.jinja") or self._template()
        self.template = None
        if source:
            self.template = Template(source, self.name, self.named | meta["args"])
        self.chat = bool(source) and meta["chat"]
        self.end_id = self._end()

    def _json(self, name):
        try:
            found = json.loads(self.meta["files"].get(name, "{}"))
        except ValueError as e:
            raise UserError(f"{name} of {self.name} is no JSON ({e})") from None
        return found if isinstance(found, dict) else {}

    def _named(self, name):
        for found in (self.settings, self._json("special_tokens_map.json")):
            token = found.get(name)
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str):
                return token
        return ""

    def _template(self):
        found = self.settings.get("chat_template") or ""
        if isinstance(found, list):  # several, by their names
            named = {x.get("name"): x.get("template") for x in found if isinstance(x, dict)}
            found = named.get("default") or ""
        return found

    def _end(self):
        """-> the id that ends an answer: what the template writes behind one, else eos_token"""
        if self.template:
            try:
                said = self.template.render([("user", "1"), ("assistant", MARK)], False)
            except UserError:  # a template that asks for more: its prompts may still work
                said = ""
            _, found, after = said.rpartition(MARK)
            if found and (token := self._split.search(after)):
                return self.controls[token[0]]
        end = self.hf.token_to_id(self.named.get("eos_token", ""))
        for name in ("generation_config.json", "config.json"):
            named = self._json(name).get("eos_token_id")
            named = named[0] if isinstance(named, list) and named else named
            end = named if end is None else end
        if type(end) is not int or not 0 <= end < self.size:
            raise UserError(f"{self.name} names no end token: give its config.json an eos_token_id")
        return end

    @cached_property
    def _split(self):
        names = sorted(self.controls, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, names)) or "(?!)")

    @cached_property
    def begin(self):
        """The ids that the tokenizer puts before a text: the beginning of a sequence"""
        bare, whole = self._ids("1"), self.hf.encode("1").ids
        n = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)
        bos = self.hf.token_to_id(self.named.get("bos_token", ""))
        if not n and self.settings.get("add_bos_token") is True and bos is not None:
            return [bos]
        return whole[:n]

    @property
    def vocabulary(self):
        return self.meta["files"]["tokenizer.json"]

    def told(self, chat, args):
        """-> the same vocabulary with other settings of its template; None: as they are"""
        if (chat is not None or args) and not self.template:
            raise UserError(f"--chat, --template-args: {self.name} has no chat template")
        chat = self.meta["chat"] if chat is None else chat
        if chat == self.meta["chat"] and not args:
            return self
        return HFTokenizer(self.meta | {"chat": chat, "args": self.meta["args"] | args})

    def fits(self, vocab_size):
        return self.size <= vocab_size  # which may be padded

    # ---- text to ids

    def _ids(self, text, control=False):
        self.hf.encode_special_tokens = not control
        try:
            return self.hf.encode(text, add_special_tokens=False).ids
        except Exception as e:
            begins = f"the text of {len(text):,} characters that begins with {text[:40]!r}"
            why = str(e).partition("\n")[0]
            raise UserError(f"{begins} cannot be encoded ({why}); leave it out") from None

    def encode(self, text):
        return self._ids(str(text))

    def messages(self, prompt):
        """-> ((role, text), …), or None for what stays a bare string"""
        if not self.template:
            return None
        bare = (("user", str(prompt)),) if self.chat else None
        return getattr(prompt, "messages", bare)

    def prompt(self, prompt):
        messages = self.messages(prompt)
        return self.begin + self.encode(prompt) if messages is None else self._render(messages)

    def _render(self, messages):
        texts = "".join(text for _, text in messages)
        if not self._split.search(texts):
            return self._ids(self.template.prompt(messages), control=True)
        guard = next(c for c in GUARDS if c not in texts)

        def hide(token):
            return token[0][0] + guard + token[0][1:]

        guarded = [(role, self._split.sub(hide, text)) for role, text in messages]
        said, ids, start = self.template.prompt(guarded), [], 0
        for token in [*self._split.finditer(said), None]:
            piece = said[start : token.start() if token else None].replace(guard, "")
            ids += self.encode(piece) if piece else []
            ids += [self.controls[token[0]]] if token else []
            start = token.end() if token else 0
        return ids

    def cut(self, prompt, n):
        """The template's own tokens stay, and of each message at least one: where n is less than
        that, what comes back is longer."""
        messages, ids = self.messages(prompt), self.prompt(prompt)
        if messages is None:
            return self.begin + self.encode(prompt)[-max(1, n - len(self.begin)) :]
        messages = list(messages)
        for i, (role, text) in enumerate(messages):
            tokens, drop = self.encode(text), 0
            while len(ids) > n and drop < len(tokens) - 1:
                drop = min(len(tokens) - 1, drop + len(ids) - n)
                messages[i] = role, self.decode(tokens[drop:]).lstrip("\ufffd")
                ids = self._render(messages)
        return ids

    def dialogue(self, turns):
        """Turns of user and model -> ids, up to where the model's next turn begins"""
        if not self.template:
            return super().dialogue(turns)
        roles = ("user", "assistant")
        return self.prompt(Chat("", [(roles[i % 2], text) for i, text in enumerate(turns)]))

    # ---- ids to text

    def decode(self, ids):
        return self.hf.decode([i for i in ids if i != self.end_id], skip_special_tokens=False)

"""The tokenizer of a Hugging Face checkpoint, by the package `tokenizers`, and how its chat
template joins a prompt and an answer.

The template renders a prompt of messages. Control tokens that the template writes are read as such;
one that a message spells stays text. A plain string is one user message if `chat` is on.
"""

import json
import re
from functools import cached_property

from data import Tokenizer, UserError, user_errors
from data.chat import Chat
from data.tokenizer import beginning
from hf.template import MARK, Template

NAMED = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")
GUARD, PRIVATE = "\ufdd2", 0xF0000  # no character, and the first for private use


class HFTokenizer(Tokenizer):
    """As Tokenizer. `meta` holds the texts of the checkpoint's files, whether a plain string is a
    user message (`chat`), and the template's arguments (`args`)."""

    longest = None
    remedy = "resize its embedding to that (resize_token_embeddings), or take the new tokens out"

    def __init__(self, meta):
        self.meta, self.name, files = meta, meta["name"], meta["files"]
        self.settings = self._json("tokenizer_config.json")
        self.named = {name: x for name in NAMED if (x := self._named(name))}
        self.source = files.get("chat_template.jinja") or self._template()
        self.template, opens = None, ""
        if self.source:
            self.template = Template(self.source, self.name, self.named)
            opens = self._try([("user", "1")], True)
            known = self.template.reads
            if unknown := sorted(set(meta["args"]) - known):
                has = ", ".join(sorted(known - set(self.named))) or "none"
                words = f"the chat template of {self.name} has no argument {unknown[0]}"
                raise UserError(f"{words}; it has {has}")
            self.template.arguments |= meta["args"]
        self.chat = bool(self.source) and meta["chat"]
        self.hf, self.controls = self._read(files["tokenizer.json"], opens)
        self.size = max(self.hf.get_vocab().values(), default=-1) + 1
        self.end_id = self._end()

    def _read(self, text, opens):
        """-> (the tokenizer, {control token: id}). A token that opens a chat is one of them even if
        the file does not call it special, so that no message can spell it."""
        try:
            import tokenizers
        except ImportError:
            needs = "needs the package tokenizers: pip install -r requirements-hf.txt"
            raise UserError(f"the vocabulary of {self.name} {needs}") from None
        with user_errors(f"tokenizer.json of {self.name} cannot be read", "save it again"):
            facts = json.loads(text)
            controls = {}
            for token in facts.get("added_tokens") or []:
                if token["special"] or token["content"] in opens:
                    token |= {"special": True, "normalized": False}
                    controls[token["content"]] = token["id"]
            made = tokenizers.Tokenizer.from_str(json.dumps(facts))
            made.no_padding()
            made.no_truncation()
            made.encode("1")
        return made, controls

    def _try(self, messages, generation_prompt):
        """-> what the template writes; "" if it fails, as it may still work on a user's prompts"""
        try:
            return self.template.render(messages, generation_prompt)
        except UserError:
            return ""

    def _json(self, name):
        return json.loads(self.meta["files"].get(name, "{}"))  # an object: see hf/weights.py

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
            found = [x for x in found if isinstance(x, dict) and x.get("name") == "default"]
            found = found[0].get("template") or "" if found else ""
        return found

    def _end(self):
        """-> the id that ends an answer: what the template writes after one, else eos_token"""
        if self.template:
            said = self._try([("user", "1"), ("assistant", MARK)], False)
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
        bare, full = self._ids("1"), self.hf.encode("1").ids
        n = next((i for i in range(len(full)) if full[i : i + len(bare)] == bare), 0)
        bos = self.hf.token_to_id(self.named.get("bos_token", ""))
        if not n and self.settings.get("add_bos_token") is True and bos is not None:
            return [bos]
        return full[:n]

    @property
    def vocabulary(self):
        return self.meta["files"]["tokenizer.json"]

    def with_chat(self, chat, args):
        """-> the tokenizer with other settings of its template. chat: None leaves it as it is"""
        if (chat is not None or args) and not self.template:
            raise UserError(f"--chat, --template-args: {self.name} has no chat template")
        chat = self.meta["chat"] if chat is None else chat
        if chat == self.meta["chat"] and not args:
            return self
        return HFTokenizer(self.meta | {"chat": chat, "args": self.meta["args"] | args})

    @property
    def way(self):
        return self.vocabulary, self.source, self.chat, self.meta["args"]

    def fits(self, vocab_size):
        """The logits may be padded. A token has none only if nothing writes it: a control token
        that is not in the template, and neither begins nor ends a text."""
        if self.size <= vocab_size:
            return True
        written = {self.hf.id_to_token(i) for i in (*self.begin, self.end_id)}
        if self.template:
            written |= {x for name, x in self.named.items() if name in self.template.reads}
        beyond = {token for token, i in self.hf.get_vocab().items() if i >= vocab_size}
        in_template = any(token in self.source for token in beyond)
        return beyond <= self.controls.keys() - written and not in_template

    # ---- text to ids

    def _ids(self, text, control=False):
        self.hf.encode_special_tokens = not control
        with user_errors(f"{beginning(text)} cannot be encoded", "leave it out"):
            return self.hf.encode(text, add_special_tokens=False).ids

    def encode(self, text):
        return self._ids(str(text))

    def messages(self, prompt):
        """-> ((role, text), …), or None if the prompt stays a bare string"""
        if not self.template:
            return None
        bare = (("user", str(prompt)),) if self.chat else None
        return getattr(prompt, "messages", ()) or bare

    def prompt(self, prompt):
        messages = self.messages(prompt)
        return self.begin + self.encode(prompt) if messages is None else self._render(messages)

    def _render(self, messages):
        """-> the ids of a conversation. While the template runs, a private code point stands for
        each control token that a message spells; it is text again when its piece is encoded."""
        hidden = {}

        def hide(token):
            code = chr(PRIVATE + len(hidden))
            hidden[GUARD + code] = token[0]
            return GUARD + code

        if GUARD in "".join(text for _, text in messages):
            raise UserError(f"a message has the code point {GUARD!r}, which is no character")
        messages = [(role, self._split.sub(hide, text)) for role, text in messages]
        said = self.template.prompt(messages)
        if not hidden:
            return self._ids(said, control=True)
        ids, before = [], ""
        ends = [*self._split.finditer(said), None]
        starts = [0, *(token.end() for token in ends[:-1])]
        for start, token in zip(starts, ends):
            piece = said[start : token.start() if token else None]
            if GUARD in piece:
                for code, text in hidden.items():
                    piece = piece.replace(code, text)
                ids += self.encode(piece)
            elif piece:  # after its control token, as some vocabularies mark a text's beginning
                ids += self._ids(before + piece, control=True)[bool(before) :]
            if token:
                ids.append(self.controls[token[0]])
                before = token[0]
        return ids

    def cut(self, prompt, n):
        """As Tokenizer.cut, but the template's tokens stay, and at least one of each message. If
        these are more than n, so is the result."""
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

    def dialogue(self, turns, n=0):
        if not self.template:
            return super().dialogue(turns, n)
        roles = ("user", "assistant")
        chat = Chat("", [(roles[i % 2], text) for i, text in enumerate(turns)])
        return self.cut(chat, n) if n else self.prompt(chat)

    # ---- ids to text

    def decode(self, ids):
        return self.hf.decode([i for i in ids if i != self.end_id], skip_special_tokens=False)

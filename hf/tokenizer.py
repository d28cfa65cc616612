"""The tokenizer of a Hugging Face checkpoint, by the package `tokenizers`, and how its chat
template joins a prompt and an answer.

The template renders a prompt of messages, and then the same messages with their answer. The text
after the prompt there is the answer. Control tokens that the template writes are read as such, but
one that a message spells stays text. If `chat` is on, a plain string is one user message.
"""

import json
import re
from functools import cached_property

from data import Tokenizer, UserError, user_errors
from data.chat import Chat, Message
from data.tokenizer import beginning
from hf import added
from hf.template import MARK, Template

GUARD, PRIVATE = "\ufdd2", 0xF0000  # no character, and the first for private use
SYSTEM, ANSWERED = ("system", "1"), [("user", "1"), ("assistant", MARK)]


class HFTokenizer(Tokenizer):
    """Like Tokenizer. `meta` holds the texts of the checkpoint's files, whether a plain string is a
    user message (`chat`), and the arguments of the template (`args`)."""

    longest = None
    remedy = "resize its embedding to that (resize_token_embeddings), or take the new tokens out"

    def __init__(self, meta):
        self.meta, self.name, files = meta, meta["name"], meta["files"]
        self.settings = self._json("tokenizer_config.json")
        facts = [self.settings, self._json("special_tokens_map.json")]
        self.named = added.roles(facts)
        self.source = files.get("chat_template.jinja") or self._template()
        self.template, self.reads = None, []
        if self.source:
            self.template = Template(self.source, self.name, self.named)
            self.reads = self.template.names
            known = self.template.reads
            if unknown := sorted(set(meta["args"]) - known):
                has = ", ".join(sorted(known - set(self.named))) or "none"
                words = f"the chat template of {self.name} has no argument {unknown[0]}"
                raise UserError(f"{words}; it has {has}")
            self.template.arguments |= meta["args"]
        self.chat = bool(self.source) and meta["chat"]
        self._read(files["tokenizer.json"], added.named(facts))
        self.size = max(self.hf.get_vocab().values(), default=-1) + 1
        self.ends = self._ends()
        self.end_id, self.silent = self.ends[0], {*self.ends, *self.controls.values()}
        self.answers = self.apart = 0  # how many were encoded, and do not go on from their prompts

    def _read(self, text, special):
        """Sets these attributes. hf: the tokenizer. controls: {control token: id}. written: the
        token that the template writes after an answer, or None. tail: the text after that token.
        word: the same token if any text can spell it. special: control tokens of other files"""
        try:
            import tokenizers
        except ImportError:
            needs = "needs the package tokenizers: pip install -r requirements-hf.txt"
            raise UserError(f"the vocabulary of {self.name} {needs}") from None
        answered = self._try(ANSWERED, False)
        said = [answered, self._try(ANSWERED[:1], True), self._try([SYSTEM, *ANSWERED], False)]
        with user_errors(f"tokenizer.json of {self.name} cannot be read", "save it again"):
            ids = added.ids(self.settings, self._json("added_tokens.json"))
            facts = json.loads(text)
            tokens = added.complete(facts, special, ids)
            written, self.tail = first_of(tokens, answered.rpartition(MARK)[2])
            if written:
                tokens[written] |= {"special": True, "normalized": False}
            self.hf = tokenizers.Tokenizer.from_str(json.dumps(facts))
            self.hf.no_padding()
            self.hf.no_truncation()
            self.hf.encode_special_tokens = True
            self.controls = {
                x: token["id"]
                for x, token in tokens.items()
                if token["special"] and (x == written or not self._is_word(x, token["id"]))
            }
        added.refuse_others(self.hf, facts, ids, self.name)
        added.refuse_unknown(self.hf, "".join(said), special | tokens.keys(), self.name)
        self.written = self.controls.get(written)
        self.word = self.written if written and self._is_word(written, self.written) else None

    def _is_word(self, token, i):
        """Whether a text that spells the token is read as the token, as if "!" were the padding"""
        return self.hf.encode(token, add_special_tokens=False).ids == [i]

    def _try(self, messages, generation_prompt):
        """-> the text that the template writes; "" if it fails, because it may still work on the
        user's prompts"""
        try:
            return self.template.render(messages, generation_prompt) if self.template else ""
        except UserError:
            return ""

    def _json(self, name):
        return json.loads(self.meta["files"].get(name, "{}"))  # an object: see hf/weights.py

    def _template(self):
        found = self.settings.get("chat_template") or ""
        if isinstance(found, list):  # several, by their names
            found = [x for x in found if isinstance(x, dict) and x.get("name") == "default"]
            found = found[0].get("template") or "" if found else ""
        return found

    def _ends(self):
        """-> the ids that end an answer. The first one ends the answers that are trained on. It is
        the token that the template writes after an answer or, if prompts stay bare, the one that
        the checkpoint's own files name."""
        own = []
        for name in ("generation_config.json", "config.json"):
            said = self._json(name).get("eos_token_id")
            own += said if isinstance(said, list) else [said]
        own.append(self.hf.token_to_id(self.named.get("eos_token", "")))
        ends = [self.written, *own] if self.chat else [*own, self.written]
        ends = [i for i in dict.fromkeys(ends) if type(i) is int and 0 <= i < self.size]
        if not ends:
            raise UserError(f"{self.name} names no end token: give its config.json an eos_token_id")
        return tuple(ends)

    @cached_property
    def _split(self):
        return any_of(self.controls)

    @cached_property
    def begin(self):
        """The ids that the tokenizer puts before a text, to begin a sequence"""
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
        """Whether a model of that vocabulary fits. Its logits may be padded. A token may lack a
        logit only if nothing writes it: a control token that is not in the template, and neither
        begins nor ends a text."""
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
        ids = self._ids(str(text))
        if self.word in ids:
            words = f"{beginning(text)} spells {self.hf.id_to_token(self.word)}, which this"
            raise UserError(f"{words} vocabulary cannot tell from its control token; leave it out")
        return ids

    def messages(self, prompt):
        """-> [Message], or None if the prompt stays a bare string"""
        if not self.template:
            return None
        bare = [Message("user", str(prompt))] if self.chat else None
        return list(getattr(prompt, "messages", ())) or bare

    def prompt(self, prompt):
        messages = self.messages(prompt)
        if messages is None:
            return self.begin + self.encode(prompt)
        turn = self._turn(prompt)
        return self._spell(*turn[0]) if turn else self._rendered(messages, prompt)

    def _rendered(self, messages, prompt=""):
        messages, columns, hidden = self._hide(messages, prompt)
        return self._spell(self.template.prompt(messages, columns), hidden)

    def answer(self, text, prompt=""):
        """-> the text of an answer as the template writes it after its prompt. If the rendering
        does not begin with the prompt, only the content of the answer follows the prompt. After a
        bare prompt, or none, the answer is bare."""
        messages = self.messages(prompt) if prompt else None
        if messages is None:
            return [*self.encode(text), self.end_id]
        self.answers += 1
        if turn := self._turn(prompt):
            return self._spell(*turn[1])
        (answer,) = getattr(text, "messages", ()) or [Message("assistant", str(text))]
        (*messages, answer), columns, hidden = self._hide([*messages, answer], prompt)
        before, text = self.template.prompt(tuple(messages), columns), answer.text
        if messages[-1].role == "assistant":
            answer = answer._replace(text=messages.pop().text + text)
        said = self.template.render([*messages, answer], False, columns)
        if said.startswith(before):
            said = said[len(before) :].removesuffix(self.tail)
        else:
            self.apart += 1
            said = text
        ids = self._spell(said, hidden)
        return ids if ids and ids[-1] == self.written else [*ids, self.end_id]

    def _turn(self, prompt):
        """-> for a conversation whose answers are all trained on: the text before an answer, and
        the answer, each with what is hidden in it. None if the template does not mark answers"""
        conversation = getattr(prompt, "conversation", ())
        if not conversation or not self.template.marks:
            return None
        messages, columns, hidden = self._hide(conversation, prompt)
        parts = self.template.marked(messages, columns)
        if len(parts) // 2 != sum(message.role == "assistant" for message in conversation):
            return None
        n = 2 * sum(message.role == "assistant" for message in prompt.messages) + 1
        return ("".join(parts[:n]), hidden), (parts[n], hidden)

    def notes(self):
        apart, answers, self.apart, self.answers = self.apart, self.answers, 0, 0
        words = f"the chat template of {self.name} writes {apart} of {answers} conversations so"
        how = "that they do not begin with the prompt: there only the answer's content follows it"
        return f"warning: {words} {how}" if apart else ""

    def _hide(self, messages, prompt):
        """-> (messages, the columns for the template, {code: text}). While the template runs, a
        private code point replaces each control token that the messages spell."""
        hidden, columns = {}, getattr(prompt, "columns", "")

        def hide(token):
            code = chr(PRIVATE + len(hidden))
            hidden[GUARD + code] = token[0]
            return GUARD + code

        parts = [columns, *(part for message in messages for part in message[1:])]
        if GUARD in "".join(parts):
            raise UserError(f"a message has the code point {GUARD!r}, which is no character")
        columns, *parts = [self._split.sub(hide, part) for part in parts]
        texts = zip(messages, parts[::2], parts[1::2])
        return tuple(Message(x.role, text, more) for x, text, more in texts), columns, hidden

    def _spell(self, said, hidden):
        """-> the ids of the text that the template wrote. Hidden tokens are put back as text before
        their piece is encoded."""
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
        """Like Tokenizer.cut, but the template's tokens stay, and at least one of each message. If
        these are more than n, the result is longer than n."""
        messages, ids = self.messages(prompt), self.prompt(prompt)
        if messages is None:
            return self.begin + self.encode(prompt)[-max(1, n - len(self.begin)) :]
        for i, message in enumerate(messages):
            tokens, drop = self.encode(message.text), 0
            while len(ids) > n and drop < len(tokens) - 1:
                drop = min(len(tokens) - 1, drop + len(ids) - n)
                kept = self.hf.decode(tokens[drop:], skip_special_tokens=False)
                messages[i] = message._replace(text=kept.lstrip("\ufffd"))
                ids = self._rendered(messages, prompt)
        return ids

    def dialogue(self, turns, n=0):
        if not self.template:
            return super().dialogue(turns, n)
        roles = ("user", "assistant")
        chat = Chat("", [(roles[i % 2], text) for i, text in enumerate(turns)])
        return self.cut(chat, n) if n else self.prompt(chat)

    # ---- ids to text

    def decode(self, ids):
        """Without control tokens"""
        ids = [i for i in ids if i not in self.silent]
        return self.hf.decode(ids, skip_special_tokens=False)


def any_of(tokens):
    """-> a pattern that finds each of the tokens, the longest if several begin alike"""
    names = sorted(tokens, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, names)) or "(?!)")


def first_of(tokens, text):
    """-> (the token that comes first in a text, or None; the text after it)"""
    found = any_of(tokens).search(text)
    return (found[0], text[found.end() :]) if found else (None, text)

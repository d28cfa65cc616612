"""Talks with one or several checkpoints: each of them answers every line that you type.

    python chat.py SmolLM2                         a Hugging Face folder, by its chat template
    python chat.py SmolLM2 out/my_pairs/dpo.pt     two models answer each line
    python chat.py out/reviews/dpo.pt              no template: each line is a prompt of its own
    echo "A drama, The Last Road:" | python chat.py out/reviews/dpo.pt     one answer, then the end

/undo takes back the last turn, /reset all turns. Ctrl-C stops an answer, Ctrl-D ends the program.
"""

import contextlib
import signal
import sys
from dataclasses import dataclass

import torch

import training
from data import UserError, printable, user_errors
from data.chat import Chat, Message
from training import Compute, checkpoint, opt, parse
from training.reader import Reader, drawn_from


@dataclass
class Options:
    checkpoints: tuple = opt(..., "language models: .pt, folder, or id of a hub", hub="model")
    system: str = opt("", "system message, for a chat template", text=True)
    temperature: float = opt(0.3, "of the samples (0: always the likeliest token)", low=0)
    top_p: float = opt(0.95, "draw from the likeliest tokens of this share", above=0, high=1)
    max_new_tokens: int = opt(512, "longest answer, in tokens", low=1)
    seed: int = opt(0, "seed of the samples", low=0)
    device: str = opt("auto", "cpu, cuda, cuda:1, mps")
    dtype: str = opt("auto", "precision", choices=training.options.DTYPES)


class Speaker:
    """A checkpoint and its conversation, `messages`."""

    def __init__(self, path, o, compute):
        self.path, self.o, self.compute = path, o, compute
        model, self.tokenizer, meta = checkpoint.load(path, mapped=True)
        self.about = f"{path}: {checkpoint.describe(meta)}"
        self.has_turns = self.tokenizer.template and self.tokenizer.chat
        if o.system and not self.has_turns:
            raise UserError(f"--system: {path} has no chat template; leave it out")
        with compute.autocast():
            model = compute.to_sample(compute.freeze(compute.place(model, frozen=True)))
        self.reader, self.longest = Reader(model), model.config.block_size
        self.messages = [Message("system", o.system)] if o.system else []
        self.generator = torch.Generator().manual_seed(o.seed)

    def answer(self, line, show):
        """Answers a line. show: called with each piece of text once its characters are complete. If
        an answer is stopped, its beginning stays in the conversation."""
        self.messages.append(Message("user", line))
        ids = self.tokenizer.prompt(Chat("", self.messages) if self.has_turns else line)
        most = min(self.o.max_new_tokens, self.longest - len(ids))
        if most < 1:
            raise UserError(f"{len(ids)} tokens are too many for {self.path}; say less, or /undo")
        drawn, shown, ended = [], 0, False
        try:
            while len(drawn) < most and not ended:
                drawn.append(self.draw(ids + drawn))
                ended = drawn[-1] in self.tokenizer.ends or len(drawn) == self.tokenizer.longest
                text = printable(self.tokenizer.decode(drawn).rstrip("\ufffd"))
                show(text[shown:])  # a character is "\ufffd" until its last token has come
                shown = max(shown, len(text))
        finally:
            text = self.tokenizer.decode(drawn)
            self.messages.append(Message("assistant", text))
            show(printable(text)[shown:] + "\n")
        if not ended:
            print(f"(cut at {most} tokens)", file=sys.stderr)

    def draw(self, ids):
        with self.compute.autocast(), torch.inference_mode():
            logits = self.reader.read(ids)
        return drawn_from(logits, self.o.temperature, self.o.top_p, self.generator)


def talk(speakers, line, stops=()):
    """Each of the speakers answers a line. stops: exceptions that end an answer only, not the
    program"""
    for speaker in speakers:
        if len(speakers) > 1:
            print(f"\n{speaker.path}:")
        with contextlib.suppress(*stops):
            speaker.answer(line, lambda text: print(text, end="", flush=True))


def converse(speakers):
    """Answers the lines of a terminal, one after the other."""
    keys = "/undo and /reset take turns back, Ctrl-C stops an answer, an empty line ends"
    print(*(speaker.about for speaker in speakers), keys, sep="\n")
    with contextlib.suppress(ImportError):  # not on every system
        import readline  # noqa: F401
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    turns, line = 0, "?"
    while line.strip():
        try:
            line = input("\n> ")
            if line in ("/undo", "/reset"):
                turns = max(0, turns - 1) if line == "/undo" else 0
            elif line.strip():
                talk(speakers, line, stops=[KeyboardInterrupt])
                turns += 1
        except (KeyboardInterrupt, UserError) as e:
            print(e)
        except EOFError:
            return print()
        for speaker in speakers:
            del speaker.messages[bool(speaker.o.system) + 2 * turns :]


def main(argv=None):
    o = parse(Options, argv)
    compute = Compute(o)
    speakers = [Speaker(path, o, compute) for path in o.checkpoints]
    if sys.stdin.isatty():
        return converse(speakers)
    with user_errors("the prompt on the pipe cannot be read"):
        line = sys.stdin.read().strip()
    if not line:
        raise UserError("the prompt on the pipe is empty; write one, or run this in a terminal")
    talk(speakers, line)


if __name__ == "__main__":
    training.command(main, torchrun=False)

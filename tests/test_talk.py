"""The chat of chat.py: each token is read once, answers are drawn as the options say, and commands
in a terminal and prompts on a pipe work."""

import contextlib
import io
import os
import pty
import select
import signal
import sys
import time

import pytest
import torch
from conftest import ROOT, main
from folders import CHATML, GOLDEN, folder

import chat
import gpt
from data import UserError
from training import Compute, checkpoint, parse
from training.process import interrupts
from training.reader import Reader, drawn_from

DROPS = CHATML.replace("{{ m.content }}", "{{ m.content if m.role != 'assistant' else 'x' }}")


def speaker(path, *argv):
    o = parse(chat.Options, [str(path), "--device", "cpu", "--max-new-tokens", "6", *argv])
    return chat.Speaker(o.checkpoints[0], o, Compute(o))


def read_by(reader, monkeypatch):
    """-> a list that gets the number of tokens that the reader reads in each pass"""
    seen, attend = [], reader.attend

    def count(layer, qkv, *more):
        seen.extend([len(qkv)] if layer == 0 else [])
        return attend(layer, qkv, *more)

    monkeypatch.setattr(reader, "attend", count)
    return seen


# ---- a text that grows is read once


@pytest.mark.parametrize("family", GOLDEN)
def test_a_growing_text_has_the_logits_of_the_whole_text(family, tmp_path, monkeypatch):
    """Two beginnings, a token more, a rewritten middle, and the same text again; with a cache that
    has room for one token more at a time."""
    monkeypatch.setattr("training.reader.MORE", 1)
    model = checkpoint.load(folder(tmp_path, family))[0].double()
    reader, texts = Reader(model), [[1, 2, 3, 4], [1, 2, 3, 4, 5], [1, 2, 9, 4, 5, 6, 7]]
    seen = read_by(reader, monkeypatch)
    for ids in (*texts, texts[-1], [8], texts[0]):
        with torch.inference_mode():
            found = reader.read(ids)
        torch.testing.assert_close(found, model(torch.tensor([ids]))[0, -1])
    assert seen == [4, 1, 5, 1, 1, 4]


def test_a_pass_that_was_stopped_leaves_nothing_behind(tmp_path):
    """Ctrl-C comes in the second layer, when the first has new keys already."""
    model = checkpoint.load(folder(tmp_path))[0].double()
    reader, attend = Reader(model), Reader.attend

    def stopped(layer, *more):
        if layer == 1:
            raise KeyboardInterrupt
        return attend(reader, layer, *more)

    with torch.inference_mode():
        reader.read([1, 2, 3, 4, 5])
        reader.attend = stopped
        with pytest.raises(KeyboardInterrupt):
            reader.read([1, 2, 6, 7])
        del reader.attend
        found = reader.read([1, 2, 3, 4, 5])
    torch.testing.assert_close(found, model(torch.tensor([[1, 2, 3, 4, 5]]))[0, -1])


@pytest.mark.parametrize("template, kept", [(CHATML, True), (DROPS, False)])
def test_the_second_turn_reads_what_is_new(template, kept, tmp_path, monkeypatch):
    """Also if the template rewrites the first answer: what stands before it is not read again.
    Greedy answers are those of a model that reads the conversation for the first time."""
    path = folder(tmp_path, template=template, max_position_embeddings=256)
    one = speaker(path, "--temperature", "0", "--system", "he")
    seen = read_by(one.reader, monkeypatch)
    one.answer("the day", print)
    drawn = len(seen)
    begin = len(one.tokenizer.prompt(chat.Chat("", one.messages[:2])))
    assert seen == [begin, *[1] * (drawn - 1)]
    one.answer("hi", print)
    ids = one.tokenizer.prompt(chat.Chat("", one.messages[:-1]))
    common = begin + (drawn - 1 if kept else 0)
    assert 0 < seen[drawn] == len(ids) - common < begin
    fresh = speaker(path, "--temperature", "0", "--system", "he")
    fresh.messages += one.messages[1:3]
    fresh.answer("hi", print)
    assert fresh.messages == one.messages and one.messages[-1].text


# ---- what is drawn and shown


def test_draws_are_from_the_likeliest_tokens():
    p, generator = torch.tensor([0.2, 0.5, 0.3]), torch.Generator().manual_seed(0)

    def share(temperature, top_p):
        found = [drawn_from(p.log(), temperature, top_p, generator) for _ in range(400)]
        return torch.tensor(found).bincount(minlength=3) / 400

    assert drawn_from(p.log(), 0, 0.1, generator) == 1
    assert share(1, 0.5).tolist() == share(1, 0.1).tolist() == [0, 1, 0]
    torch.testing.assert_close(share(1, 0.51), torch.tensor([0, 5, 3]) / 8, atol=0.09, rtol=0)
    torch.testing.assert_close(share(1, 1), p, atol=0.09, rtol=0)
    squared = p**2 / (p**2).sum()
    torch.testing.assert_close(share(0.5, 1), squared, atol=0.09, rtol=0)


def test_a_character_waits_for_its_last_token(tiny, monkeypatch):
    """One of two and one of four bytes, each byte a token; control characters and half a character
    at the end are shown as signs."""
    one, shown = speaker(tiny / "out/reviews/sft.pt"), []
    byte = [one.tokenizer.encoding.encode_single_token(bytes([i])) for i in range(256)]
    answer = iter([byte[i] for i in " né🎬\x1bx".encode() + "é".encode()[:1]])
    monkeypatch.setattr(one, "draw", lambda ids: next(answer))
    one.o.max_new_tokens = 11
    one.answer("the", shown.append)
    assert shown == ["", "n", "", "é", "", "", "", "🎬", "·", "x", "", "\ufffd\n"]
    assert one.messages[-1].text == " né🎬\x1bx\ufffd"


def test_an_answer_ends_at_its_end_token_or_is_cut_aloud(tiny, capsys, monkeypatch):
    one, shown = speaker(tiny / "out/reviews/sft.pt"), []
    answer = iter([*one.tokenizer.encode("the plot"), one.tokenizer.end_id])
    monkeypatch.setattr(one, "draw", lambda ids: next(answer))
    one.answer("the", shown.append)
    assert "".join(shown) == "the plot\n" and not capsys.readouterr().err
    monkeypatch.undo()
    one.draw = lambda ids: 7
    one.answer("the", shown.append)
    assert capsys.readouterr().err == "(cut at 6 tokens)\n"


def test_a_conversation_that_does_not_fit_is_refused(tmp_path):
    one = speaker(folder(tmp_path))
    one.longest = len(one.tokenizer.prompt("abc")) + 1
    one.answer("abc", print)  # one token is left for the answer
    with pytest.raises(UserError, match=f"tokens are too many for {tmp_path}; say less, or /undo"):
        one.answer("a", print)


# ---- the command


def piped(monkeypatch, text):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text), "utf-8"))


def test_a_prompt_on_a_pipe_has_one_answer_of_each(ends, tmp_path, monkeypatch, capsys):
    """A toy model reads the plain text, one of Hugging Face the chat; both greedily."""
    monkeypatch.chdir(ends)
    folder(tmp_path / "x")
    greedy = ["--temperature", 0, "--max-new-tokens", 4, "--device", "cpu"]
    piped(monkeypatch, b"the day\n")
    assert main("chat", "ends.pt", tmp_path / "x", *greedy) == 0
    expected = []
    for path in ("ends.pt", tmp_path / "x"):
        model, tokenizer, _ = checkpoint.load(path)
        ids, drawn = tokenizer.prompt("the day"), []
        while len(drawn) < 4 and not {*drawn} & {*tokenizer.ends}:
            drawn.append(int(model(torch.tensor([ids + drawn]))[0, -1].argmax()))
        expected.append(f"\n{path}:\n{tokenizer.decode(drawn).strip()}\n")
    assert capsys.readouterr().out == "".join(expected)


MISTAKES = [
    ("none.pt", b"a", "none.pt: no such file"),
    ("judge.pt", b"a", "judge.pt is a reward model; give a language model"),
    ("ends.pt", b" \n", "the prompt on the pipe is empty"),
    ("ends.pt", b"\xff", "the prompt on the pipe cannot be read ("),
    ("ends.pt", b"a" * 9000, "9000 tokens are too many for ends.pt; say less"),
    ("ends.pt --system x", b"a", "--system: ends.pt has no chat template; leave it out"),
    ("ends.pt --top-p 0", b"a", "argument --top-p: must be more than 0, not 0"),
    ("", b"a", "the following arguments are required: checkpoints"),
]


@pytest.mark.parametrize("command, prompt, words", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(command, prompt, words, ends, monkeypatch, capsys):
    monkeypatch.chdir(ends)
    piped(monkeypatch, prompt)
    assert main("chat", *command.split(), *["--device", "cpu"] * bool(command)) == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and f"chat.py: {words}" in said.err and not said.out


class Terminal:
    """chat.py in a process, with a terminal of its own"""

    def __init__(self, *argv):
        self.process, self.fd = pty.fork()
        if not self.process:  # another program, since a copy of this one lacks its threads
            command = [sys.executable, ROOT / "chat.py", *argv]
            os.execve(sys.executable, list(map(str, command)), os.environ | {"TERM": "dumb"})

    def type(self, text):
        os.write(self.fd, text)

    def until(self, words):
        """-> what is shown up to these words"""
        said, end = "", time.time() + 60
        while words not in said:
            assert select.select([self.fd], [], [], end - time.time())[0], said
            said += os.read(self.fd, 4096).decode(errors="replace")
        return said.replace("\r", "")

    def prompt(self):
        """-> what is shown up to a prompt after which nothing comes; a model may write one too"""
        said = self.until("\n> ")
        while select.select([self.fd], [], [], 0.5)[0] or not said.endswith("\n> "):
            said += os.read(self.fd, 4096).decode(errors="replace").replace("\r", "")
        return said

    def code(self):
        """-> the exit code, once it has ended"""
        return os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1])


@pytest.mark.machine
def test_a_conversation_in_a_terminal(ends, tmp_path):
    """With a model that never ends an answer. Ctrl-C stops the answer, and at the prompt only the
    line; Ctrl-D ends the program."""
    model, meta = gpt.load(ends / "ends.pt")
    model = gpt.GPT(gpt.GPTConfig(model.config.vocab_size, 10**6, 1, 1, 4))
    with torch.no_grad():
        model.norm.bias += 1.0
        model.wte.weight[-1] -= 100.0
    gpt.save(model, tmp_path / "endless.pt", **meta)
    how = ["--max-new-tokens", 10**6, "--temperature", 1, "--device", "cpu"]
    terminal = Terminal(tmp_path / "endless.pt", *how)
    try:
        said = terminal.prompt()
        assert "endless.pt: sft on reviews, 3 steps" in said and "an empty line ends" in said
        terminal.type(b"A drama:\n")
        terminal.until("A drama:")
        time.sleep(0.3)
        terminal.type(b"\x03")
        assert len(terminal.prompt()) > 20
        terminal.type(b"half a line")
        terminal.until("half a line")
        terminal.type(b"\x03")
        assert len(terminal.prompt()) < 10
        terminal.type(b"\x04")
        assert terminal.code() == 0
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(terminal.process, signal.SIGKILL)


def test_turns_are_taken_back(tmp_path, monkeypatch):
    """Line by line, how many turns two models have before it; one refuses a turn, so that neither
    keeps it."""
    lines = {"a": 0, "b": 1, "/undo": 2, "c": 1, "too long": 2, "/reset": 2, "/undo ": 0, "": 1}
    typed, seen = iter(lines), []
    speakers = []
    for name, context in (("x", 400), ("y", 200)):
        path = folder(tmp_path / name, max_position_embeddings=context)
        speakers.append(speaker(path, "--system", "s"))

    def read(prompt):
        seen.append([len(one.messages) - 1 for one in speakers])
        return next(typed).replace("too long", "a" * 300)

    monkeypatch.setattr("builtins.input", read)
    with interrupts.caught():
        chat.converse(speakers)
    assert seen == [[2 * n, 2 * n] for n in lines.values()]
    assert all(one.messages[1].text == "/undo " for one in speakers)


def test_the_end_of_the_input_ends_a_conversation(tmp_path, monkeypatch):
    typed = iter([KeyboardInterrupt, EOFError])
    monkeypatch.setattr("builtins.input", lambda prompt: (_ for _ in ()).throw(next(typed)()))
    with interrupts.caught():
        chat.converse([speaker(folder(tmp_path))])
    assert not list(typed)


def test_an_answer_that_is_stopped_stays_as_far_as_it_came(tmp_path, monkeypatch):
    """And the other model still answers."""
    one, other = speaker(folder(tmp_path)), speaker(tmp_path)
    (token,) = one.tokenizer.encode("the")[:1]
    draws, typed = iter([token, token]), iter(["a", ""])

    def draw(ids):
        for drawn in draws:
            return drawn
        raise KeyboardInterrupt

    monkeypatch.setattr(one, "draw", draw)
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed))
    with interrupts.caught():
        chat.converse([one, other])
    assert one.messages[1].text == 2 * one.tokenizer.decode([token])
    assert [x.role for x in other.messages] == ["user", "assistant"] and other.messages[1].text

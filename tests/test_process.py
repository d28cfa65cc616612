"""Events outside the code of a run: closed streams, signals, other runs, full disks, moved
folders."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from importlib import metadata

import pytest
import torch
from conftest import ROOT, TINY, files_in, killed, lines, main

import gpt
from data.make_vocab import main as make_vocab
from training import checkpoint, locks
from training.files import Files, commit, from_checkpoint
from training.process import interrupts, streams

pytestmark = pytest.mark.machine

INIT = ["--init", "ends.pt", "--device", "cpu"]


@pytest.fixture
def shop(ends, tmp_path, monkeypatch):
    """A folder of its own with a checkpoint and a reward."""
    for name in ("ends.pt", "judge.py"):
        shutil.copy(ends / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def begun(*args, **more):
    """A process of these scripts that has begun"""
    command = [sys.executable, ROOT / args[0], *map(str, args[1:])]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **more)


# ---- streams


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "how, code",
    [("| head -1", 1), pytest.param("2>&-", 0, marks=SLOW), pytest.param(">&-", 0, marks=SLOW)],
)
def test_a_run_ends_quietly_if_its_reader_has_left_and_needs_no_streams(how, code, shop):
    """In ASCII, at a width of 40, without a terminal."""
    env = os.environ | {"PYTHONIOENCODING": "ascii", "COLUMNS": "40"}
    command = f"{sys.executable} {ROOT}/dpo.py {' '.join(INIT + TINY)} --out x/dpo.pt"
    script = f"{command} {how}; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], env=env, capture_output=True)
    assert done.returncode == code and not done.stderr, done
    if not code:
        assert (shop / "x/dpo.pt").exists() and "final" in lines(shop / "x/dpo.jsonl")[-1]


def test_what_an_encoding_cannot_show_is_replaced(tmp_path, monkeypatch):
    with open(tmp_path / "said", "w", encoding="cp1252") as file:
        monkeypatch.setattr(sys, "stdout", file)
        with streams():
            print("KL(π‖π_ref)")
    assert (tmp_path / "said").read_text("cp1252") == "KL(???_ref)\n"


def test_prompts_are_printed_without_control_characters(shop, call):
    said = call("evaluate", "ends.pt", "--prompt", "A\x1b[31m", *INIT[2:], cwd=shop)
    assert "\x1b" not in said and "A·[31m" in said


# ---- signals


@pytest.mark.parametrize(
    "number", [pytest.param(signal.SIGTERM, marks=pytest.mark.slow), signal.SIGINT]
)
def test_signals_however_often_promise_only_what_is_true(number, shop):
    """Three in a row: where a state is named, it is whole."""
    args = [*INIT, "--steps", 100000, "--batch-size", 4, "--log-every", 1, "--out", "c/x.pt"]
    process = begun("dpo.py", *args, "--save-every", 10**6, cwd=shop)
    deadline = time.time() + 60
    while not (shop / "c/x.jsonl").exists() or len(lines(shop / "c/x.jsonl")) < 2:
        assert time.time() < deadline and process.poll() is None
        time.sleep(0.1)
    for _ in range(1 if number == signal.SIGTERM else 3):
        process.send_signal(number)
        time.sleep(0.01)
    said = process.communicate(timeout=60)[1].decode()
    assert process.returncode == 130 and "Traceback" not in said
    assert "interrupted" in said.splitlines()[-1]
    again = shlex.join(["python", str(ROOT / "dpo.py"), *map(str, args), "--save-every", "1000000"])
    named = said.rstrip().endswith(f"in c/x.state: {again} --resume")
    assert named or number == signal.SIGINT
    if named:
        assert torch.load(shop / "c/x.state", weights_only=True)["step"] > 0
    assert files_in(shop / "c") == ["x.jsonl"] + ["x.state"] * named


def test_a_save_that_has_begun_is_finished():
    done, before = [], {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    with interrupts.caught(), interrupts.patient(), interrupts.held():
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
        done.append("saved")
    assert before == {n: signal.getsignal(n) for n in before}
    with pytest.raises(KeyboardInterrupt), interrupts.caught(), interrupts.held():
        os.kill(os.getpid(), signal.SIGINT)
        done.append("saved")
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    with pytest.raises(KeyboardInterrupt), interrupts.caught():
        os.kill(os.getpid(), signal.SIGTERM)
        done.append("never")
    assert done == ["saved", "saved"]
    for number, handler in before.items():
        signal.signal(number, handler)


# ---- other runs

HOLD = """
import sys; sys.path.insert(0, sys.argv[1])
from training import locks
print(locks.take(sys.argv[2]), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def other(tmp_path):
    """other(out): a process that writes there; killed at the end"""
    processes = []

    def other(out):
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        command = [sys.executable, "-c", HOLD, str(ROOT), str(out)]
        processes.append(subprocess.Popen(command, **pipes))
        assert processes[-1].stdout.readline() == b"True\n"
        return processes[-1]

    yield other
    for process in processes:
        process.kill()
        process.communicate()


def test_two_runs_do_not_write_one_checkpoint(shop, other, capsys):
    """The second is refused; a run that was killed or has finished holds no lock."""
    (shop / "x").mkdir()
    args = [*INIT, *TINY, "--out", "x/dpo.pt"]
    first = other("x/dpo.pt")
    (shop / "link.pt").symlink_to(shop / "x/dpo.pt")
    for out in ("x/dpo.pt", "link.pt"):
        assert main("dpo", *args, "--out", out) == 2
        assert "another run is writing there" in capsys.readouterr().err
    assert main("dpo", *args, "--out", "x/simpo.pt") == 0  # beside it there is room
    first.kill()
    first.communicate()
    (shop / "x/dpo.pt.123.tmp").write_text("half")
    assert main("dpo", *args) == 0
    assert files_in(shop / "x") == ["dpo.jsonl", "dpo.pt", "simpo.jsonl", "simpo.pt"]
    assert locks.path_of("x/dpo.pt") not in locks.HELD


@pytest.mark.parametrize("name", ["x.pt", "x.jsonl", "x.state", "x.lock"])
def test_what_no_script_wrote_is_not_replaced(name, shop, capsys):
    """Not even if nothing says that the run reads it. An empty file is nobody's."""
    mine = shop / "a" / name
    mine.parent.mkdir()
    mine.write_text('{"method": "mine", "prompt": "p", "completion": "nanopo"}\n')
    before = mine.read_bytes()
    args = [*INIT, *TINY, "--out", "a/x.pt"]
    assert main("dpo", *args) == 2
    said = capsys.readouterr().err
    assert said.startswith("dpo.py: --out a/x.pt would overwrite ") and f"a/{name}, which" in said
    assert mine.read_bytes() == before and os.listdir("a") == [name]
    mine.write_text("")
    assert main("dpo", *args) == 0


def test_a_run_says_which_checkpoint_it_replaces(shop, capsys):
    args = [*INIT, *TINY, "--out", "a/x.pt"]
    for more, said in {"0.3": "", "0.4": "a run with --beta 0.3, of 20", "0.40": ""}.items():
        assert main("dpo", *args, "--beta", more) == 0
        out, _, training = capsys.readouterr().out.partition("dpo step")
        assert training and ("replaces a/x.pt: " + said in out if said else "replaces" not in out)
    assert main("simpo", *args) == 0
    assert "replaces a/x.pt: a run of dpo.py, of 20" in capsys.readouterr().out


def test_an_evaluation_that_never_comes_is_said(shop, capsys):
    for every, said in ((3, False), (4, True)):
        assert main("dpo", *INIT, *TINY, "--out", "a/x.pt", "--eval-every", every) == 0
        words = "--eval-every 4 is more than the 3 steps: only their end is evaluated"
        assert (words in capsys.readouterr().out) == said


def test_a_name_keeps_two_runs_of_a_method(shop, capsys):
    for name in ("a", "b"):
        assert main("dpo", *INIT, *TINY, "--name", name) == 0
    assert "replaces" not in capsys.readouterr().out
    both = {f"dpo-{name}.{end}" for name in "ab" for end in ("pt", "jsonl")}
    assert both <= set(files_in(shop / "out/reviews"))


def test_torch_brings_along_what_is_not_in_requirements():
    names = {re.split(r"[^\w-]", line)[0] for line in metadata.requires("torch")}
    assert {"filelock", "jinja2"} <= names


def test_without_filelock_nothing_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "filelock", None)
    assert main("sft", "--steps", 1, "--out", "a/x.pt") == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert "the package filelock" in said and "pip install filelock" in said
    assert not files_in(tmp_path / "a")


def test_a_missing_stage_is_made_once(shop, other, capsys):
    """The second run waits for it, says so, and goes on with it."""
    (shop / "out/reviews").mkdir(parents=True)
    first = other("out/reviews/sft.pt")
    second = begun("dpo.py", *TINY, cwd=shop, text=True)
    said = iter(second.stdout.readline, "")
    assert any("another run is writing out/reviews/sft.pt: this one waits" in x for x in said)
    shutil.copy(shop / "ends.pt", shop / "out/reviews/sft.pt")
    first.kill()
    assert any("starts from out/reviews/sft.pt" in line for line in said)
    assert second.wait(60) == 0


# ---- disks


def test_a_link_is_written_through(shop, call):
    (shop / "big").mkdir()
    for end in ("pt", "jsonl"):
        (shop / f"dpo.{end}").symlink_to(shop / f"big/dpo.{end}")
    call("dpo", *INIT, *TINY, "--out", "dpo.pt", cwd=shop)
    assert (shop / "dpo.pt").is_symlink() and (shop / "big/dpo.pt").is_file()
    assert "final" in lines(shop / "big/dpo.jsonl")[-1]


@pytest.mark.parametrize("at", ["x.pt", "x.state", "x.jsonl"])
def test_a_full_disk_is_one_line_and_the_last_state_is_whole(at, shop, monkeypatch, capsys):
    """Where the checkpoint, the second state or a line of the record does not fit."""
    args = [*INIT, *TINY, "--save-every", 1, "--out", "c/x.pt"]
    assert main("dpo", *args, "--out", "whole/x.pt") == 0
    replace, calls = os.replace, []

    def full(source, target):
        calls.append(1)
        if target.endswith(at) and len(calls) > 1:
            raise OSError(28, "No space left on device")
        replace(source, target)

    def short(self, line):
        if len(self.lines) > 2:
            with self.writes(self.record_path):
                raise OSError(28, "No space left on device")
        record(self, line)

    record = Files.record
    with monkeypatch.context() as m:
        if at == "x.jsonl":
            m.setattr(Files, "record", short)
        else:
            m.setattr(os, "replace", full)
        assert main("dpo", *args) == 1
    said = capsys.readouterr().err
    assert re.search(rf"c/{at} cannot be written \(No space left on device\); c/x.state", said)
    assert said.count("\n") == 1 and files_in(shop / "c") == ["x.jsonl", "x.state"]
    assert main("dpo", *args, "--resume") == 0
    assert (shop / "c/x.pt").read_bytes() == (shop / "whole/x.pt").read_bytes()


def test_torch_hides_no_cause(tmp_path):
    """A file-size limit, which torch answers with a RuntimeError of its own."""
    code = f"""
import resource, sys; sys.path.insert(0, {str(ROOT)!r})
import torch, gpt
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
try: gpt.write({{"x": torch.zeros(10**5)}}, "x.pt")
except OSError as e: print(e.strerror)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stdout == "File too large\n" and not list(tmp_path.iterdir()), done.stderr


def test_every_output_path_is_checked_before_the_work(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a_file").write_text("")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}')
    with pytest.raises(SystemExit, match="2"):
        make_vocab(["rows.jsonl", "--out", "a_file/v.tiktoken"])
    assert "cannot be written (Not a directory)" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        make_vocab(["rows.jsonl", "--out", "rows.jsonl"])
    assert "would overwrite" in capsys.readouterr().err
    assert main("compare", "--out", "a_file/x", "--methods", "dpo") == 2
    assert "--out a_file/x cannot be written (Not a directory)" in capsys.readouterr().err
    assert sorted(x.name for x in tmp_path.iterdir()) == ["a_file", "rows.jsonl"]


# ---- folders


def test_no_two_data_sets_share_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = "reviews reviews.jsonl my/reviews.jsonl other/reviews.jsonl q.jsonl q.jsonl.gz ./my/q"
    names += " ../q.jsonl exact:1 exact-1.jsonl compare.jsonl tokens:8+8 tokens-8+8.jsonl"
    folders = [checkpoint.default_folder(name) for name in names.split()]
    assert len(set(folders)) == len(folders) and folders[:3] == [
        "reviews",
        "reviews.jsonl",
        "my/reviews",
    ]
    assert not any(".." in name.split("/") for name in folders)
    assert checkpoint.default_folder(str(tmp_path / "my/q.jsonl")) == "my/q"


def test_a_moved_folder_goes_on(shop, monkeypatch, capsys):
    """What is read is compared by its content, wherever it lies now."""
    rows = [{"prompt": f"q{i}", "answer": str(i)} for i in range(60)]
    (shop / "a").mkdir()
    for name in ("ends.pt", "judge.py"):
        shutil.move(shop / name, shop / "a" / name)
    (shop / "a/q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def args(folder):
        given = {"--task": "q.jsonl", "--init": "ends.pt", "--reward": "judge.py:odd"}
        given = {option: f"{folder}/{name}" for option, name in given.items()}
        given["--out"] = f"{folder}/out/x.pt"
        return [x for pair in given.items() for x in pair] + [*TINY, "--group", 4]

    assert main("grpo", *args("a"), "--out", "whole/x.pt") == 0
    killed(3, "grpo", [*args("a"), "--save-every", 1], monkeypatch)
    shutil.move(shop / "a", shop / "b")
    with open(shop / "b/judge.py", "a") as file:
        file.write("# mended")  # of a reward the name counts
    assert main("grpo", *args(shop / "b"), "--resume", "--reward", "b/judge.py:constant") == 2
    assert "interrupted run that read another b/judge.py" in capsys.readouterr().err
    assert main("grpo", *args(shop / "b"), "--resume") == 0
    assert "resumed after step 2" in capsys.readouterr().out
    a, b = (gpt.load(path)[0].state_dict() for path in ("b/out/x.pt", "whole/x.pt"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    (shop / "b/q.jsonl").write_text(json.dumps(rows[0]) + "\n" + json.dumps(rows[1]))
    assert main("grpo", *args("b"), "--resume") == 2
    assert "belongs to a finished run that read another b/q.jsonl" in capsys.readouterr().err


def test_a_checkpoint_is_evaluated_from_another_folder(shop, call, monkeypatch, capsys):
    """Its task, its reference and its reward are what they were where it was trained; one that is
    gone is asked for by name."""
    rows = [{"prompt": f"q{i}"} for i in range(60)]
    (shop / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = [*INIT, *TINY, "--group", 4, "--task", "q.jsonl", "--reward", "judge.py:odd"]
    call("grpo", *args, cwd=shop)
    final = lines(shop / "out/q/grpo.jsonl")[-1]["final"]
    elsewhere = shop / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "ends.pt").write_text("another")
    said = call("evaluate", "../out/q/grpo.pt", *INIT[2:], cwd=elsewhere)
    assert re.search(rf"^reward +{final['ref_reward']:.2f} +{final['reward']:.2f}", said, re.M)
    assert f"{final['kl']:.2f} ±" in said
    (shop / "q.jsonl").unlink()
    assert main("evaluate", "../out/q/grpo.pt", *INIT[2:]) == 2
    assert "is missing; give it with --task" in capsys.readouterr().err
    assert from_checkpoint(str(shop / "out/q/x.pt")) == os.path.join("..", "..", "elsewhere")


def test_the_commit_is_of_these_scripts_or_none(tmp_path, monkeypatch):
    """Copied into somebody else's repository they have none."""
    monkeypatch.setenv("GIT_DIR", str(tmp_path))
    ours = commit()
    shutil.copytree(ROOT / "training", tmp_path / "copy/training")
    git = ["git", "-c", "user.name=x", "-c", "user.email=x", "-C", str(tmp_path)]
    monkeypatch.delenv("GIT_DIR")
    for command in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "x"]):
        subprocess.run([*git, *command], check=True)
    monkeypatch.setattr("training.files.__file__", str(tmp_path / "copy/training/files.py"))
    assert commit() == ""
    assert not ours or re.fullmatch(r"[0-9a-f]{40}", ours)


def test_an_os_error_is_one_line(shop, monkeypatch, capsys):
    def fail(*_, **models):
        raise OSError(5, "Input/output error", "somewhere")

    monkeypatch.setattr("dpo.Run.hold", fail)
    assert main("dpo", *INIT, *TINY, "--out", "x/dpo.pt") == 1
    assert capsys.readouterr().err == "dpo.py: somewhere: Input/output error\n"
    assert locks.path_of("x/dpo.pt") not in locks.HELD

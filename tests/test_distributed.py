"""Runs of many processes: weights and figures are the same for any number of processes."""

import hashlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial

import many
import pytest
import torch
from conftest import BITSANDBYTES, EIGHT, ROOT, killed, lines, main
from test_methods import SCRIPTS, arguments
from test_predict import write as write_endless

import compare
import data
import dpo
import training
from analysis import predict
from data import UserError
from gpt import GPTConfig, load
from training import Run, distributed
from training.cut import by_tokens
from training.optimizer import Scaler
from training.sampling import sample, uniforms

pytestmark = pytest.mark.machine

TINY = "--steps 2 --batch-size 4 --log-every 1 --warmup 1 --device cpu --eval-prompts 6".split()
SHORT = [*TINY, "--init", "ends.pt"]
WIDE = [*SHORT, "--max-new-tokens", 6, "--dtype", "float64"]
ROLLOUT = ["--group", 4, "--reward", "judge.py:odd"]
UNEVEN = "--pairs 13 --batch-size 8 --micro-batch 2 --precompute-ref".split()
BITS = {  # in float32, of two micro-batches a step: a + b is b + a
    "sft": ["sft", *SHORT, "--micro-batch", 2],
    "dpo": ["dpo", *SHORT, "--micro-batch", 2],
    "grpo": ["grpo:rollout.pt", *SHORT, *ROLLOUT, "--micro-batch", 8, "--beta", 0.1],
}
if BITSANDBYTES:
    BITS["dpo-8bit"] = [*BITS["dpo"], *EIGHT]
CLOSE = {  # in float64, beside the cases of test_methods.py
    "grpo-sampling": ["grpo", *WIDE, *ROLLOUT, "--minibatches", 2, "--updates", 2],
    "ppo": ["ppo", *WIDE, "--reward", "judge.pt", "--minibatches", 2],
    "online": ["online_dpo", *WIDE, "--reward", "judge.pt", "--samples-per-prompt", 4],
    "lora": ["dpo", *WIDE, "--lora", 2],
    "file": ["dpo", *WIDE, "--task", "pairs.jsonl"],
    "uneven": ["dpo", *WIDE, *UNEVEN],
}
OLD = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 8)
has_shard = pytest.mark.skipif(OLD, reason="--shard needs torch 2.8")
SHARDED = () if OLD else ("uneven", "ppo", "lora")  # which run once more with --shard
WAYS = [[], pytest.param(["--shard"], marks=has_shard)]


def start(folder, *args, n=2, **more):
    """Starts torchrun with n processes, each on one thread."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(n)]
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": folder}
    env = os.environ | {"OMP_NUM_THREADS": "1"} | more
    return subprocess.Popen([*command, *map(str, args)], env=env, **how)


def torchrun(folder, *args, code=0, **more):
    """-> what a whole torchrun prints, which ends with this code"""
    process = start(folder, *args, **more)
    said = "".join(process.communicate())
    assert process.returncode == code, said
    return said


def write_cases(folder, cases):
    listed = [[script, *map(str, args), "--out", name] for name, (script, *args) in cases.items()]
    (folder / "cases.json").write_text(json.dumps(listed))


@pytest.fixture(scope="module")
def both(ends, tmp_path_factory):
    """A folder with what the cases write in two processes, and in one"""
    folder = tmp_path_factory.mktemp("many")
    for name in ("ends.pt", "judge.pt", "judge.py"):
        (folder / name).write_bytes((ends / name).read_bytes())
    write_pairs(folder / "pairs.jsonl", 30)
    sharded = {f"{name}-shard": [*CLOSE[name], "--shard"] for name in SHARDED}
    write_cases(folder, BITS | CLOSE | sharded)
    store_rollout(folder)
    (folder / "tmp").mkdir()
    torchrun(folder, ROOT / "tests/many.py", "cases.json", TMPDIR=str(folder / "tmp"))
    with pytest.MonkeyPatch.context() as m:
        m.chdir(folder)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        write_cases(folder, BITS | CLOSE)
        many.main(["cases.json"])
        torch.set_num_threads(threads)
    return folder


def write_pairs(path, n):
    rows = [
        {"prompt": f"{i} + {i} =", "chosen": f"{2 * i}", "rejected": f"{i}"} for i in range(1, n)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def store_rollout(folder):
    model, meta = load(folder / "ends.pt")
    prompts = [[1, 2, 3], [4, 5], [6, 7, 8, 9], [3]]
    ends, uniform = (model.config.vocab_size - 1,), uniforms(16, 6)
    rollout = sample(model, prompts, 6, ends, group=4, uniform=uniform)
    torch.save(vars(rollout), folder / "rollout.pt")


def weights(path):
    return torch.load(path, weights_only=True)["model"]


def distance(one, two):
    """-> how far the weights of two checkpoints are apart, at most"""
    one, two = weights(one), weights(two)
    return max((one[key] - two[key]).abs().max() for key in one)


@pytest.mark.parametrize("name", BITS)
def test_two_processes_give_the_bits_of_one(name, both):
    assert distance(both / f"{name}-1.pt", both / f"{name}-2.pt") == 0


@pytest.mark.parametrize("name", [*CLOSE, *(f"{name}-shard" for name in SHARDED)])
def test_two_processes_give_the_weights_of_one(name, both):
    one = both / f"{name.removesuffix('-shard')}-1.pt"
    assert distance(one, both / f"{name}-2.pt") <= 1e-11


def test_the_file_of_encoded_rows_is_gone(both):
    """One process encodes a file of a task, and the other maps what it wrote."""
    assert (both / "file-2.pt").exists() and not list((both / "tmp").rglob("*.rows"))


def test_rows_are_read_back_from_their_file(tmp_path):
    """With a token id of four bytes"""
    rows = data.Rows([((1, 2), (3,), 0.5), ((70_000,), (5, 6, 7), 1.5)])
    rows.save(tmp_path / "x.rows")
    assert list(data.Rows.mapped(tmp_path / "x.rows")) == list(rows)


def test_the_uneven_batch_has_a_stand_in(monkeypatch):
    """Five rows two at a time are three parts, dealt to two processes: the second has one part of
    its own and the first part in its second turn, which counts for nothing."""
    monkeypatch.setattr(distributed, "size", 2)
    dealt = []
    for rank in range(2):
        monkeypatch.setattr(distributed, "rank", rank)
        dealt.append([(part.start, part.stop, own) for part, own in distributed.shares(5, 2)])
    assert dealt == [[(0, 2, True), (4, 5, True)], [(2, 4, True), (0, 2, False)]]
    for most in (0, 64):  # no process takes the rows of another
        assert [(x.start, x.stop) for x, _ in distributed.shares(5, most)] == [(3, 5)]
    assert distributed.mine(5) == slice(2, 5) and distributed.mine(1) == slice(0, 1)


def test_rows_of_like_length_are_cut_by_their_tokens(monkeypatch):
    """By hand. A row longer than the limit is alone; two processes make equally many passes."""
    length = torch.tensor([5, 9, 4, 30, 8])
    parts = [part.tolist() for part in by_tokens(length, 9, 17)]
    assert parts == [[0, 2, 4], [1], [3]]
    assert [part.tolist() for part in by_tokens(length, 2, 17)] == [[0, 2], [1, 4], [3]]
    monkeypatch.setattr(distributed, "size", 2)
    dealt = []
    for rank in range(2):
        monkeypatch.setattr(distributed, "rank", rank)
        shares = distributed.shares(5, 0, length, 17)
        dealt.append([(part.tolist(), own) for part, own in shares])
    assert dealt == [[([0, 2, 4], True), ([3], True)], [([1], True), ([0, 2, 4], False)]]
    assert next(distributed.shares(5, 0, length, 99))[0] == slice(3, 5)  # no part has more


def test_a_stand_in_counts_for_nothing(shop):
    """Neither in the gradient nor in the tokens nor in the figures; what counts adds up."""
    run = Run("dpo", training.parse(dpo.Options, ["--device", "cpu"], dpo.PRESETS))
    figures, x = run.figures, torch.tensor(2.0, requires_grad=True)
    for figures.counts, tokens in ((True, 5), (False, 9), (True, 7)):
        run.backward(3 * x, tokens)
        run.log({"loss": torch.tensor([1.0, 2.0])}, 0.5)
    assert x.grad == 6 and figures.tokens == 12 and figures.sums["loss"] == 3.0


@has_shard
def test_a_rank_holds_half(both):
    """The ledger and the measured peak of --shard are those of one process of two: of every tensor
    it has the half, the larger one where a number is odd, and a gathered block is there too."""
    replica, part = (lines(both / f"ppo{x}-2.jsonl")[-1]["final"] for x in ("", "-shard"))
    for a, b in zip(replica["models"], part["models"]):
        assert a["parameters"] == b["parameters"] and 0.5 * a["bytes"] <= b["bytes"]
        assert b["bytes"] <= 0.52 * a["bytes"]
    assert part["peak"]["weights"] == sum(m["weight_bytes"] for m in part["models"])
    moments = sum(m["optimizer_bytes"] for m in part["models"])
    assert 0 <= part["peak"]["optimizer"] - moments < 1000  # and a count of steps for each tensor
    assert part["peak"]["gathered"] > 0 and part["peak_bytes"] < replica["peak_bytes"]


TIMES = ("_ms", "_s", "_bytes", "peak", "peak_most", "models")


@pytest.mark.parametrize("name", CLOSE)
def test_two_processes_record_the_figures_of_one(name, both):
    one, two = (lines(both / f"{name}-{n}.jsonl")[1:] for n in (1, 2))
    assert len(one) == len(two)
    for a, b in zip(one, two):
        a, b = a.get("final", a), b.get("final", b)
        assert a.keys() == b.keys()
        if "trained_tokens" in a:  # a prompt that two processes have is computed in both
            assert a["trained_tokens"] <= b["trained_tokens"] < 1.3 * a["trained_tokens"]
        for key in a.keys() - {"trained_tokens"}:
            if not key.endswith(TIMES):
                assert a[key] == pytest.approx(b[key], abs=1e-10, rel=1e-10), key


# ---- precision, and what one process refuses

LAST = ["--log-every", 1, "--eval-prompts", 4, "--device", "cpu", "--init", "ends.pt"]


@pytest.fixture
def shop(both, tmp_path, monkeypatch):
    """A folder of its own with ends.pt and judge.py"""
    for name in ("ends.pt", "judge.pt", "judge.py"):
        (tmp_path / name).write_bytes((both / name).read_bytes())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_float16_backs_off_trains_and_resumes(shop, monkeypatch):
    """From a scale of 2^40 gradients are not finite: the steps are skipped, the weights stay, and
    the scale halves until they fit. A run that is interrupted then goes on with that scale."""
    monkeypatch.setattr("training.run.Scaler", partial(Scaler, init_scale=2.0**40))
    args = ["--dtype", "float16", "--batch-size", 4, "--micro-batch", 2, *LAST]
    assert main("dpo", *args, "--steps", 40, "--out", "a.pt") == 0
    first, *steps, last = lines(shop / "a.jsonl")
    skipped = [line["skipped"] for line in steps]
    assert skipped[0] == 1 and 5 < skipped[-1] < 30 and first["dtype"] == "float16"
    assert steps[-1]["scale"] == 2.0 ** (40 - skipped[-1])
    assert [line["loss"] for line in steps[: skipped[-1]]] == pytest.approx(
        [0.693147] * skipped[-1], abs=1e-4
    )  # no weight has moved, whatever the pairs
    assert all(("grad_norm" in b) == (a == b["skipped"]) for a, b in zip([0, *skipped], steps))
    assert steps[-1]["loss"] != pytest.approx(0.693147, abs=1e-4)

    again = [*args, "--steps", 40, "--out", "b.pt", "--save-every", 21]
    killed(23, "dpo", again, monkeypatch)
    assert main("dpo", *again, "--resume") == 0
    assert lines(shop / "b.jsonl")[1:-1] == steps
    assert distance("a.pt", "b.pt") == 0


def test_a_late_skip_halves_the_scale_and_starts_the_count_anew(shop, monkeypatch):
    """The third gradient's norm is infinite: that step is left out. The scale, 2^16, is halved, and
    doubles only after as many good steps as ever."""
    clip, calls = torch.nn.utils.clip_grad_norm_, []

    def large(*args):
        calls.append(clip(*args))
        return calls[-1] + (math.inf if len(calls) == 3 else 0)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", large)
    how = ["--steps", 5, "--save-every", 3, "--batch-size", 4, "--out", "a.pt"]
    killed(4, "dpo", ["--dtype", "float16", *LAST, *how], monkeypatch)
    state = torch.load("a.state", weights_only=True)
    assert state["skipped"] == 1 and state["scaler"]["scale"] == 2.0**15
    assert state["scaler"]["_growth_tracker"] == 0


def test_float16_is_close_to_float32(shop):
    for dtype in ("float16", "float32"):
        how = ["--reward", "judge.py:odd", "--max-new-tokens", 6, "--minibatches", 2, "--lora", 2]
        assert (
            main("grpo", "--dtype", dtype, *how, *LAST, "--steps", 2, "--out", f"{dtype}.pt") == 0
        )
    half, full = (lines(shop / f"{dtype}.jsonl")[1:-1] for dtype in ("float16", "float32"))
    assert half[0]["skipped"] == 0 and half[0]["scale"] == 65536
    assert half[0]["entropy"] == pytest.approx(full[0]["entropy"], rel=1e-3)
    assert half[0]["grad_norm"] == pytest.approx(full[0]["grad_norm"], rel=0.02)  # not scaled


@pytest.mark.parametrize(
    "args, words",
    [
        (["--shard"], "but this is one; start it with torchrun --nproc-per-node N, N ≥ 2"),
        (["--compile"], "--compile needs a C++ compiler"),
    ],
)
def test_refused(args, words, shop, capsys, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert main("dpo", *LAST, *args) == 2
    assert words in capsys.readouterr().err


def test_shard_asks_for_torch_2_8(shop, capsys, monkeypatch):
    monkeypatch.setattr(distributed, "size", 2)
    monkeypatch.setattr(torch, "__version__", "2.7.1+cu126")
    for options, argv in ((dpo.Options, []), (compare.Options, "--predict 7b --ranks 2".split())):
        with pytest.raises(UserError, match="needs torch 2.8 or later"):
            training.parse(options, [*argv, "--shard"])


@has_shard
@pytest.mark.parametrize("row", ["dpo", "grpo"])
def test_a_prediction_of_ranks(row, shop):
    """What a rank holds of each model falls with their number; without --shard nothing does, and
    each holds the responses of all."""
    config = GPTConfig(640, 64, 2, 2, 64)
    o = predict.options(row, "--batch-size", 2, "--task", "tokens:8+8", "--dtype", "float32")
    one, eight = (predict.predict(row, o, config, n, n > 1) for n in (1, 8))
    replicas = predict.predict(row, o, config, 8)
    more = {name: x - one["predicted"][name] for name, x in replicas["predicted"].items()}
    assert row == "grpo" or not any(more.values())
    assert all(x == 0 or name in ("sampling", "activations") for name, x in more.items())
    for a, b in zip(one["models"], eight["models"]):
        assert b["bytes"] == pytest.approx(a["bytes"] / 8, rel=0.02)
    assert eight["predicted"]["weights"] == sum(m["weight_bytes"] for m in eight["models"])
    assert eight["predicted"]["gathered"] > 0


# ---- slow: everything once more, and what goes wrong

MORE = CLOSE | {script: [script, *arguments(script)] for script in SCRIPTS}
MORE |= {
    "file-prompts": ["grpo", *WIDE, "--task", "pairs.jsonl", *ROLLOUT],
    "lora-ppo": ["ppo", *WIDE, "--reward", "judge.py:odd", "--lora", 2, "--minibatches", 2],
}
SKILLS = "--skill-steps 30 --skill-lr 0.03 --n-layer 1 --n-head 2 --n-embd 16".split()
RLAIF = (
    "--sl-steps 3 --pm-steps 3 --steps 3 --batch-size 4 --answers 24 --comparisons 24 "
    "--max-new-tokens 16 --log-every 1 --warmup 1 --device cpu --dtype float64 --eval-prompts 16"
).split()


@pytest.mark.slow
@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize("shard", WAYS)
def test_every_script(n, shard, shop):
    assert main("rlaif", *SKILLS, *RLAIF, "--out", "skilled.pt") == 0
    cases = MORE | {
        "rlaif": ["rlaif", *RLAIF, "--init", "skilled-skills.pt"],
        "distill": [*MORE["distill"], "--teacher", "skilled-skills.pt"],
    }
    write_pairs(shop / "pairs.jsonl", 30)
    write_cases(shop, {k: [*args, *shard] for k, args in cases.items()})
    torchrun(shop, ROOT / "tests/many.py", "cases.json", n=n)
    write_cases(shop, cases)
    torch.set_num_threads(1)
    many.main(["cases.json"])
    for name in cases:
        assert distance(f"{name}-1.pt", f"{name}-{n}.pt") <= 1e-11, name


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


LONG = [ROOT / "dpo.py", *LAST, "--batch-size", 8, "--steps", 300, "--save-every", 20]


def worker(parent, rank):
    """-> the process number of a rank of a torchrun"""
    for entry in os.listdir("/proc"):
        try:
            with open(f"/proc/{entry}/environ") as file:
                mine = f"\0RANK={rank}\0" in "\0" + file.read()
            with open(f"/proc/{entry}/stat") as file:
                if mine and int(file.read().rpartition(")")[2].split()[1]) == parent:
                    return int(entry)
        except (OSError, ValueError, IndexError):
            continue
    raise AssertionError(f"no rank {rank}")


def until(path, process):
    """Waits for a file of a run."""
    while not path.exists():
        assert process.poll() is None, "".join(process.communicate())
        time.sleep(0.05)


def copy_state(path, folder):
    """Copies a state, and its folder of parts, if it has one."""
    folder.mkdir(exist_ok=True)
    for part in path.parent.glob(f"{path.name}*"):
        (shutil.copytree if part.is_dir() else shutil.copy)(part, folder / part.name)


STEPS = [*WIDE, "--steps", 5, "--save-every", 1]
POINTS = {  # where a process is killed while it saves -> the step that the state then has
    "parts.dcp.save": 1,  # the parts are not written
    "files.gpt.write": 1,  # they are, but the file does not name them
    "parts.shutil.rmtree": 2,  # the new state stands beside the old parts
}
KILL = """
import os, runpy, signal, sys
from training import distributed, files, parts
module, _, name = sys.argv[1].rpartition(".")
times, rank, place = int(sys.argv[2]), int(sys.argv[3]), eval(module)
do, calls = getattr(place, name), []
def deadly(*args, **more):
    calls.append(1)
    if len(calls) == times and distributed.rank == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    return do(*args, **more)
setattr(place, name, deadly)
sys.argv = sys.argv[4:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture
def cut_run(shop):
    """A state of two processes with --shard after step 2, and whole.pt of a run left alone"""
    (shop / "kill.py").write_text(KILL)
    torchrun(shop, ROOT / "dpo.py", *STEPS, "--shard", "--out", "whole.pt")
    command = [shop / "kill.py", "files.gpt.write", 3, 0, ROOT / "dpo.py", *STEPS]
    torchrun(shop, *command, "--shard", "--out", "cut.pt", code=1, PYTHONPATH=str(ROOT))
    return shop


@pytest.mark.slow
@has_shard
def test_a_state_in_parts_is_resumed_by_any_number(cut_run):
    """By two, four and one process, with --shard and without: to the weights of a run left alone,
    as near as processes come to each other in float64."""
    copy_state(cut_run / "cut.state", cut_run / "kept")
    state = torch.load("cut.state", weights_only=True)
    assert state["step"] == 2 and all(type(x) is tuple for x in state["policy"].values())
    args = [ROOT / "dpo.py", *STEPS, "--out", "cut.pt", "--resume"]
    for n, shard in ((2, ["--shard"]), (4, ["--shard"]), (2, []), (1, [])):
        for path in cut_run.glob("cut.*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        copy_state(cut_run / "kept/cut.state", cut_run)
        said = torchrun(cut_run, *args, *shard, n=n)
        assert "resumed after step 2 of 5" in said and ("rounding" in said) == (n != 2 or not shard)
        assert distance("cut.pt", "whole.pt") < 1e-12
        assert not list(cut_run.glob("cut.state*"))


@pytest.mark.slow
@has_shard
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("point", POINTS)
def test_a_state_in_parts_is_whole_or_absent(point, rank, cut_run):
    """Killed at any point of its second save, by whichever process: the state is the first or the
    second, it is gone on with, and no part of another stays."""
    if rank and point != "parts.dcp.save":
        pytest.skip("the first process alone is there")
    for path in cut_run.glob("cut.*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    run = [ROOT / "dpo.py", *STEPS, "--shard", "--out", "cut.pt"]
    times = 1 if point == "parts.shutil.rmtree" else 2
    command = [cut_run / "kill.py", point, times, rank, *run]
    torchrun(cut_run, *command, code=1, PYTHONPATH=str(ROOT))
    assert torch.load("cut.state", weights_only=True)["step"] == POINTS[point]
    said = torchrun(cut_run, *run, "--resume")
    assert f"resumed after step {POINTS[point]} of 5" in said
    assert digest(cut_run / "cut.pt") == digest(cut_run / "whole.pt")
    assert not list(cut_run.glob("cut.state*"))


@pytest.mark.slow
@has_shard
def test_a_first_save_that_is_killed_leaves_no_state(cut_run):
    command = [cut_run / "kill.py", "files.gpt.write", 1, 0, ROOT / "dpo.py", *STEPS, "--shard"]
    torchrun(cut_run, *command, "--out", "new.pt", code=1, PYTHONPATH=str(ROOT))
    assert list(cut_run.glob("new.state.parts-*")) and not (cut_run / "new.state").exists()
    said = torchrun(cut_run, *command[4:], "--out", "new.pt", "--resume")
    assert "there is no new.state yet" in said and not list(cut_run.glob("new.state*"))
    assert digest(cut_run / "new.pt") == digest(cut_run / "whole.pt")


@pytest.mark.slow
@pytest.mark.parametrize("shard", WAYS)
def test_a_rank_is_killed(shard, shop):
    """All end within seconds; the state is whole. Two processes go on to the bits of a run left
    alone, one to its weights but for rounding."""
    torchrun(shop, *LONG, *shard, "--out", "whole.pt")
    process = start(shop, *LONG, *shard, "--out", "cut.pt")
    until(shop / "cut.state", process)
    os.kill(worker(process.pid, 1), signal.SIGKILL)
    began = time.time()
    said = "".join(process.communicate())
    assert process.returncode == 1 and time.time() - began < 10
    assert "dpo.py: rank 0: another process has ended; --resume goes on" in said
    copy_state(shop / "cut.state", shop / "kept")
    said = torchrun(shop, *LONG, *shard, "--out", "cut.pt", "--resume")
    assert "resumed after step" in said and "rounding" not in said
    assert digest(shop / "cut.pt") == digest(shop / "whole.pt")
    assert lines(shop / "cut.jsonl")[1:-1] == lines(shop / "whole.jsonl")[1:-1]
    assert not list(shop.glob("*.tmp")) and not list(shop.glob("cut.state*"))

    (shop / "cut.pt").unlink()
    copy_state(shop / "kept/cut.state", shop)
    said, words = many_to_one(shop, "--out", "cut.pt", "--resume"), " ".join(["2", *shard])
    assert f"it was saved by {words} processes: the numbers will differ by rounding" in said
    assert distance("cut.pt", "whole.pt") < 1e-2


@pytest.mark.slow
def test_torchrun_starts_again(shop):
    """A restart goes on from what this launch has saved: to the bits of a run left alone."""
    (shop / "mine.py").write_text(
        "import os\n"
        "def one(prompt, completion):\n"
        "    if os.environ['RANK'] == '1' and os.path.exists('cut.state'):\n"
        "        if os.environ['TORCHELASTIC_RESTART_COUNT'] == '0':\n"
        "            os._exit(9)\n"
        "    return len(completion) % 3\n"
    )
    args = [ROOT / "grpo.py", *LAST, "--steps", 5, "--save-every", 2, "--batch-size", 2]
    args += ["--group", 2, "--max-new-tokens", 3, "--reward", "mine.py:one"]
    torchrun(shop, *args, "--out", "whole.pt")
    said = torchrun(shop, "--max-restarts", 1, *args, "--out", "cut.pt")
    assert "resumed after step 2 of 5" in said and "begins anew" not in said
    assert digest(shop / "cut.pt") == digest(shop / "whole.pt")


def many_to_one(folder, *args):
    command = [sys.executable, *map(str, LONG), *args]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_torchrun_is_interrupted(number, shop):
    """The step is finished and saved; the hint begins with torchrun, and works."""
    torchrun(shop, *LONG, "--out", "whole.pt")
    process = start(shop, *LONG, "--out", "cut.pt")
    until(shop / "cut.state", process)
    process.send_signal(number)
    said = "".join(process.communicate())
    assert process.returncode == 1
    hint = re.search(
        r"this goes on from step \d+, in cut.state: torchrun (.* --resume)$", said, re.M
    )
    assert said.count("dpo.py: interrupted") == 1 and hint
    words = hint[1].split()
    assert words[:2] == ["--nproc-per-node", "2"]
    torchrun(shop, *words[2:])
    assert digest(shop / "cut.pt") == digest(shop / "whole.pt")


@pytest.mark.slow
def test_a_reward_raises_on_rank_1(shop):
    """It is said by that rank alone; all end within ten seconds, and nothing is lost that was done
    before."""
    (shop / "mine.py").write_text(
        "import os\ncalls = []\n"
        "def one(prompt, completion):\n    calls.append(1)\n"
        "    if os.environ.get('RANK') == '1' and len(calls) > 40:\n"
        "        raise ValueError('no')\n"
        "    return len(completion) % 3\n"
    )
    args = [ROOT / "grpo.py", *LAST, "--steps", 9, "--batch-size", 4, "--group", 4]
    args += ["--max-new-tokens", 6, "--reward", "mine.py:one"]
    began = time.time()
    said = torchrun(shop, *args, "--out", "x.pt", code=1)
    assert time.time() - began < 20
    assert [x for x in said.splitlines() if x.startswith("grpo.py: ")] == [
        x for x in said.splitlines() if x.startswith("grpo.py: rank 1: --reward mine.py:one raised")
    ]
    kept = re.search(r"step (\d) is saved in x.state; --resume goes on from there", said)
    assert kept and (shop / "x.state").exists()
    (shop / "mine.py").write_text((shop / "mine.py").read_text().replace("> 40", "> 4000"))
    assert f"resumed after step {kept[1]} of 9" in torchrun(
        shop, *args, "--out", "x.pt", "--resume"
    )


LIVE = """
import gc, sys
sys.path.insert(0, sys.argv.pop(1))
import gpt, training, importlib
from training import Run
script, update = importlib.import_module(sys.argv.pop(1)), Run.update
def counted(self, *rest):
    update(self, *rest)
    print("live", sum(isinstance(x, gpt.GPT) for x in gc.get_objects()))
Run.update = counted
training.command(script.main)
"""


@has_shard
@pytest.mark.slow
@pytest.mark.parametrize("args", [["simpo", "--eval-every", 1], ["dpo", "--precompute-ref"]])
def test_no_model_stays_that_nobody_holds(args, shop):
    """The references of evaluations, and the one whose log-probs are there."""
    (shop / "live.py").write_text(LIVE)
    args = [*args, *LAST, "--steps", 5, "--batch-size", 4, "--pairs", 16, "--shard"]
    said = torchrun(shop, "live.py", ROOT, *args)
    assert re.findall(r"^live (\d+)$", said, re.M) == ["1"] * 5


@pytest.mark.slow
def test_a_mistake_is_said_once(shop):
    write_pairs(shop / "long.jsonl", 30)
    with open(shop / "long.jsonl", "a") as file:  # met by the process that encodes it
        file.write(json.dumps({"prompt": "1 " * 999, "chosen": "2", "rejected": "3"}) + "\n")
    tasks = [["--task", "none.jsonl"], ["--task", "long.jsonl"]]
    for args in (["--beta", "x"], ["--init", "none.pt"], *tasks):
        said = torchrun(shop, ROOT / "dpo.py", *LAST, *args, code=1)
        assert len([x for x in said.splitlines() if x.startswith("dpo.py: ")]) == 1, said
        assert "rank 1:" not in said


@pytest.mark.slow
@pytest.mark.parametrize("shard", WAYS)
def test_fifteen_clean_exits(shard, shop):
    for _ in range(15):
        torchrun(shop, ROOT / "dpo.py", *LAST, "--steps", 2, "--batch-size", 4, *shard)


@has_shard
@pytest.mark.slow
@pytest.mark.parametrize("row", ["dpo", "ppo"])
def test_the_predicted_bytes_of_a_rank_are_measured(row, shop):
    """Of a policy that never draws the end token: each response is predicted as long as can be."""
    task = ["--task", "tokens:24+24", "--device", "cpu", "--dtype", "float32"]
    small = ["--n-layer", 2, "--n-embd", 64, "--n-head", 2, "--steps", 2, "--block-size", 48]
    assert main("sft", *task, *small, "--batch-size", 4, "--out", "sft.pt") == 0
    model, meta = load("sft.pt")
    write_endless(shop, model, meta)
    judge = ["--minibatches", 1, "--updates", 1, "--reward", "endless-judge.pt"]
    how = [*task, *(judge if row == "ppo" else [])]
    args = [*how, "--init", "endless.pt", "--steps", 3, "--out", "x.pt"]
    torchrun(shop, ROOT / f"{row}.py", *args, "--batch-size", 16, "--shard")
    measured = lines(shop / "x.jsonl")[-1]["final"]
    o = predict.options(row, *how, "--batch-size", 8)
    found = predict.predict(row, o, model.config, 2, True)
    assert found["models"] == measured["models"]
    assert found["predicted_bytes"] == pytest.approx(measured["peak_bytes"], rel=0.03)


COMPILED = {
    "dpo": ["dpo"],
    "dpo-checkpointed": ["dpo", "--checkpoint-activations"],
    "dpo-lora": ["dpo", "--lora", 2],
    "grpo": ["grpo", *ROLLOUT, "--max-new-tokens", 6],
}


def recompiled(said):
    """-> the step after which the last recompilation came, before the training ended"""
    training = said.partition("test prompts")[0].rpartition("step 8/8")[0]
    return len(re.findall(r"step \d/8:", training.rpartition("[__recompiles]")[0]))


@pytest.mark.slow
@pytest.mark.parametrize("name", [*COMPILED, pytest.param("dpo-shard", marks=has_shard)])
def test_compiled_blocks(name, shop):
    """The losses are those of eager; nothing is compiled anew after the third step."""
    script, *args = COMPILED[name.removesuffix("-shard")]
    args = [*args, *LAST, "--steps", 8, "--batch-size", 4, "--micro-batch", 2]
    assert main(script, *args, "--out", "eager.pt") == 0
    run = partial(torchrun, n=2) if "shard" in name else partial(torchrun, n=1)
    shard = ["--shard"] if "shard" in name else []
    compiled = [ROOT / f"{script}.py", *args, "--compile", *shard, "--out", "c.pt"]
    said = run(shop, *compiled, TORCH_LOGS="recompiles")
    eager, found = lines(shop / "eager.jsonl")[1:-1], lines(shop / "c.jsonl")[1:-1]
    for a, b in zip(eager, found, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
    assert recompiled(said) <= 3
    assert weights(shop / "c.pt").keys() == weights(shop / "eager.pt").keys()
    (shop / "c.pt").unlink()
    process = start(shop, *compiled, "--save-every", 2, n=2 if shard else 1)
    until(shop / "c.state", process)
    process.send_signal(signal.SIGINT)
    process.communicate()
    run(shop, *compiled, "--save-every", 2, "--resume")
    for a, b in zip(eager, lines(shop / "c.jsonl")[1:-1], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)


@pytest.mark.slow
def test_evaluate(both):
    """The same figures and samples from one process, two, and three."""
    args = [ROOT / "evaluate.py", "dpo-1.pt", "--reward", "judge.pt", "--eval-prompts", 7]
    said = [start(both, *args, n=n).communicate()[0] for n in (1, 2, 3)]
    assert "KL(π‖π_ref)" in said[0] and said[0] == said[1] == said[2]

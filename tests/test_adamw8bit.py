"""The optimizer of --optimizer adamw8bit: the options that it refuses, its bytes counted by hand
and, if bitsandbytes is installed, that it agrees with AdamW, and that a run with it is clipped,
scaled and resumed like any other."""

import importlib.util
import json
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import EIGHT, ROOT, TRAIN, few_prompts, lines, main, needs_bitsandbytes
from house import METHODS
from test_run import SMALL, same_run

from data import Stopped
from gpt import GPT, GPTConfig, load
from training import adamw8bit, distributed, memory
from training.optimizer import Scaler, adamw, step_if
from training.state import State

CPU = torch.device("cpu")


@pytest.fixture
def shop(ends, monkeypatch):
    """The folder of `ends`, which becomes the current one"""
    monkeypatch.chdir(ends)
    few_prompts(monkeypatch, 6)
    return ends


# ---- what is refused


@pytest.mark.parametrize("script", ["dpo", "rlaif"])
def test_a_missing_package_is_one_line(script, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(script, *EIGHT) == 2
    needs = "--optimizer adamw8bit needs bitsandbytes: pip install -r requirements-gpu.txt\n"
    assert capsys.readouterr() == ("", f"{script}.py: {needs}")
    assert not list(tmp_path.iterdir())
    assert "\nbitsandbytes==" in (ROOT / "requirements-gpu.txt").read_text()


@pytest.mark.parametrize(
    "script, more, why",
    [
        ("dpo", ["--shard"], "--shard splits weights into DTensors"),
        ("dpo", ["--dtype", "float64"], "it steps in float32, not in --dtype float64"),
        ("dpo", ["--device", "mps"], "it has no kernels for --device mps"),
        ("compare", ["--predict", "7b", "--shard", "--ranks", 2], "--shard splits weights into"),
    ],
)
def test_what_it_cannot_do_is_one_line(script, more, why, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(distributed, "size", 2)
    monkeypatch.setattr("torch.__version__", "2.8.0")  # the least that has --shard
    assert main(script, *EIGHT, *more) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"{script}.py: --optimizer adamw8bit: {why}")
    assert said.endswith("; leave one of the two out\n") and said.count("\n") == 1
    assert not list(tmp_path.iterdir())


# ---- bytes


def test_bytes_by_hand():
    """4,096 numbers are 16 blocks, 5,000 are 20; with 4,095 both moments are float32. The weights'
    precision does not matter."""
    for n, size in ((4095, 8 * 4095), (4096, 2 * 4096 + 8 * 16), (5000, 2 * 5000 + 8 * 20)):
        for dtype in (torch.float32, torch.bfloat16):
            assert adamw8bit.size([torch.empty(n, dtype=dtype)]) == size
    assert adamw8bit.size([torch.empty(70, 70), torch.empty(8)]) == 2 * 4900 + 8 * 20 + 64


@pytest.mark.parametrize("pure", [False, True])
def test_the_ledger_by_hand(pure):
    """One block, 32 wide, 300 tokens of vocabulary, 8 places: the embedding has 9,600 numbers, the
    two matrices of the MLP 4,096 each; all else is smaller."""
    model = GPT(GPTConfig(300, 8, 1, 1, 32)).to(torch.bfloat16 if pure else torch.float32)
    n = 300 * 32 + 8 * 32 + 12 * 32**2 + 13 * 32 + 2 * 32
    large = 300 * 32 + 2 * 4 * 32**2
    moments = 2 * large + 8 * (38 + 2 * 16) + 8 * (n - large)
    (record,) = memory.records({"policy": model}, "adamw8bit")
    assert record["parameters"] == n and record["optimizer_bytes"] == moments
    assert record["bytes"] == (4 if pure else 8) * n + moments
    assert f"AdamW {moments / 1e6:.1f})" in memory.ledger([record])


def test_an_outline_has_these_bytes():
    weights = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((70, 70), (64, 64), (8,))]
    before = [p.clone() for p in weights]
    optimizer = adamw8bit.Outline(weights)
    for _ in range(2):
        optimizer.step()
        held = {id(x): x.nbytes for state in optimizer.state.values() for x in state.values()}
        assert sum(held.values()) == adamw8bit.size(weights) + 2 * 256 * 4
    assert all(torch.equal(*pair) for pair in zip(weights, before))


def test_compare_predicts_it(tmp_path, monkeypatch, capsys):
    """Without the package: 8 bits for each moment of float32 weights, and a little more"""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    small = ["--methods", "sft", "--n-layer", 1, "--seq-len", 8]
    assert main("compare", "--predict", "own", *small, *EIGHT) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "--predict own, tokens:4+4, --optimizer adamw8bit, 4 sequences per step" in said
    found = json.loads((tmp_path / "out/compare/predict-own-adamw8bit/compare.json").read_text())
    for held in [x["models"][0] for x in found["methods"] if x["dtype"] == "bfloat16"]:
        assert 0.5 < held["optimizer_bytes"] / held["gradient_bytes"] < 0.55
    assert main("compare", *EIGHT) == 2
    assert "--optimizer is read with --predict only" in capsys.readouterr().err


# ---- the step


class OnCuda:
    """A bool as a tensor on a CUDA device has it"""

    is_cuda = True

    def __init__(self, x):
        self.x = x

    def __bool__(self):
        return self.x

    def __invert__(self):
        return torch.tensor(not self.x)


def test_only_a_fused_step_looks_itself():
    """On CUDA: torch's fused AdamW is called with what it looks at; any other only if the gradient
    is finite."""
    p = torch.nn.Parameter(torch.ones(1))
    for fused, calls in ((True, [0.0, 1.0]), (False, [None])):
        optimizer, seen = torch.optim.AdamW([p], fused=fused), []
        optimizer.step = lambda o=optimizer, s=seen: s.append(getattr(o, "found_inf", None))
        assert step_if(OnCuda(True), optimizer) and not step_if(OnCuda(False), optimizer)
        assert seen == calls


def both_optimizers(shapes, dtype, steps=5, decay=0.5):
    """-> the weights of two models after the same steps, with 8 bits and with float32 moments"""
    generator, found = torch.Generator().manual_seed(0), []
    starts = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    gradients = [[torch.randn(x.shape, generator=generator) for x in starts] for _ in range(steps)]
    for name in ("adamw8bit", "adamw"):
        model = torch.nn.ParameterList(x.clone() for x in starts)
        o = SimpleNamespace(optimizer=name, weight_decay=decay, lr=0.01)
        optimizer = adamw([model], o, CPU)
        for step in gradients:
            for p, g in zip(model, step):
                p.grad = g.to(dtype)
            optimizer.step()
        found.append([p.detach().float() for p in model])
    return found


@needs_bitsandbytes
def test_it_is_adamw():
    """With betas (0.9, 0.95) and weight decay on matrices alone: to rounding with float32 moments,
    within a few hundredths of the way that a weight has gone with 8 bits."""
    shapes = [(8, 8), (8,), (70, 70), (5000,)]
    own, torchs = both_optimizers(shapes, torch.float32)
    for a, b in zip(own[:2], torchs[:2]):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    for a, b in zip(own[2:], torchs[2:]):
        assert 0 < (a - b).abs().mean() < 0.03 * 0.05  # five steps of 0.01
    plain, _ = both_optimizers(shapes, torch.float32, decay=0.0)
    assert [torch.equal(*pair) for pair in zip(own, plain)] == [False, True, False, True]


@needs_bitsandbytes
def test_a_parameter_of_bfloat16_has_the_same_moments():
    own, torchs = both_optimizers([(8, 8), (70, 70)], torch.bfloat16)
    for a, b in zip(own, torchs):
        assert (a - b).abs().mean() < 0.01  # a weight near 1 has steps of 1/128


@needs_bitsandbytes
def test_the_gradient_is_clipped_before_it(shop):
    """A norm far below ε makes steps far below the learning rate."""
    start = load("ends.pt")[0].state_dict()
    moved = []
    for clip in (1.0, 1e-9):
        how = ["--init", "ends.pt", "--grad-clip", clip, "--lr", 1e-3, "--out", "clip/x.pt"]
        assert main("dpo", *TRAIN, *EIGHT, *how) == 0
        end = load("clip/x.pt")[0].state_dict()
        moved.append(max((end[name] - x).abs().max().item() for name, x in start.items()))
    assert moved[0] > 1e-3 and moved[1] < 1e-4


@needs_bitsandbytes
def test_float16_leaves_steps_out(shop, monkeypatch):
    """From a scale at which no gradient is finite: no weight moves until the scale has fallen."""
    monkeypatch.setattr("training.run.Scaler", partial(Scaler, init_scale=2.0**40))
    how = ["--init", "ends.pt", "--dtype", "float16", "--steps", 40, "--out", "half/x.pt"]
    assert main("dpo", *TRAIN, *EIGHT, *how) == 0
    steps = lines(shop / "half/x.jsonl")[1:-1]
    skipped = steps[-1]["skipped"]
    assert 5 < skipped < 30
    losses = [line["loss"] for line in steps]
    assert losses[:skipped] == pytest.approx([0.693147] * skipped, abs=1e-4)
    assert losses[-1] != pytest.approx(0.693147, abs=1e-4)


# ---- a run


def resumed(script, more, shop, monkeypatch):
    """Runs a script as a whole, and once more with an interruption. -> the saved moments"""
    args = [*TRAIN, *SMALL.get(script, ()), *more, "--save-every", 2]
    assert main(script, *args, *EIGHT, "--out", "whole/x.pt") == 0
    save = State.save

    def save_and_die(self, *rest):
        save(self, *rest)
        raise Stopped("killed")

    with monkeypatch.context() as m:
        m.setattr(State, "save", save_and_die)
        assert main(script, *args, *EIGHT, "--out", "cut/x.pt") == 1
    state = torch.load("cut/x.state", weights_only=True)
    assert main(script, *args, "--out", "cut/x.pt", "--resume") == 2
    assert main(script, *args, *EIGHT, "--out", "cut/x.pt", "--resume") == 0
    same_run(shop / "cut/x.pt", shop / "whole/x.pt")
    return state["optimizer"]["state"]


@needs_bitsandbytes
@pytest.mark.parametrize(
    "script, more",
    [
        ("dpo", []),
        ("dpo", ["--dtype", "bfloat16-pure"]),
        ("dpo", ["--lora", 2, "--lr", 1e-2]),
        ("dpo", ["--dtype", "float16"]),
        ("ppo", []),
    ],
)
def test_resume_gives_the_same_bits(script, more, shop, monkeypatch, capsys):
    moments = resumed(script, more, shop, monkeypatch)
    out, err = capsys.readouterr()
    assert "belongs to an interrupted run with --optimizer adamw8bit; start without" in err
    assert "resumed after step 2 of 3" in out
    kinds = {x.dtype for one in moments.values() for x in tensors(one) if x.numel() > 1}
    assert kinds == {torch.float32} if "--lora" in more else {torch.float32, torch.uint8}


def tensors(tree):
    return [x for x in torch.utils._pytree.tree_leaves(tree) if torch.is_tensor(x)]


@needs_bitsandbytes
@pytest.mark.slow
@pytest.mark.parametrize("script", [x for x in METHODS if x not in ("dpo", "ppo", "rlaif")])
def test_every_script_trains_and_resumes_with_it(script, shop, monkeypatch):
    assert resumed(script, [], shop, monkeypatch)

"""Adapters of --lora: computed by hand, without a second copy of the reference, saved, merged and
trained further."""

import math
from pathlib import Path

import pytest
import torch
from conftest import BATCH, ENDS, TINY, TRAIN, few_prompts, killed, lines, main
from house import METHODS

from evaluate import Evaluator
from gpt import GPT, GPTConfig, Linear, ScalarGPT, load
from training import Compute, Run, lora, memory, parse
from training.options import Options


@pytest.fixture(autouse=True)
def here(ends, monkeypatch):
    """In the folder `ends`; the figures at the end of a run are not looked at."""
    few_prompts(monkeypatch, 8)
    monkeypatch.chdir(ends)


CONFIG = GPTConfig(11, 16, 2, 2, 8)
DPO = [*TINY, *ENDS, "--lora", 2, "--lora-alpha", 4]
MORE = {
    "ppo": ["--reward", "judge.pt"],
    "grpo": BATCH,
    "dapo": BATCH,
    "distill": [*BATCH[:4], "--teacher", "out/reviews/sft.pt"],
    "online_dpo": ["--reward", "judge.py:odd"],
}


def adapted(rank=2, alpha=4.0):
    """-> a float64 model whose adapters are no longer 0"""
    model = GPT(CONFIG).double()
    lora.adapt(model, rank, alpha, 0)
    with torch.no_grad():
        for adapter in lora.adapters(model).values():
            adapter.B += torch.linspace(-1, 1, adapter.B.numel()).view_as(adapter.B)
    return model


IDS = torch.arange(24).view(2, 12) % 11


def test_a_layer_by_hand():
    """A = (1, 2), B = (3, 4), α/r = 2, x = (1, -1): A x = -1, y = W x + b - 2 (3, 4). Of the sum of
    y: ∂/∂B = 2 A x (1, 1) = (-2, -2); ∂/∂A = 2 (3 + 4) x = (14, -14)."""
    linear = Linear(2, 2)
    W, b = linear.weight.detach().clone(), linear.bias.detach().clone()
    layer = lora.LoRA(linear, torch.zeros(1, 2), 2.0)
    layer.weight.requires_grad_(False)
    with torch.no_grad():
        layer.A.copy_(torch.tensor([[1.0, 2.0]]))
        layer.B.copy_(torch.tensor([[3.0], [4.0]]))
    x = torch.tensor([1.0, -1.0])
    y = layer(x)
    torch.testing.assert_close(y, W @ x + b - torch.tensor([6.0, 8.0]))
    y.sum().backward()
    assert layer.B.grad.flatten().tolist() == [-2.0, -2.0] and layer.weight.grad is None
    assert layer.A.grad.flatten().tolist() == [14.0, -14.0]
    expected = W + 2 * torch.tensor([[3.0, 6.0], [4.0, 8.0]])
    torch.testing.assert_close(layer.merged().detach(), expected)


def test_adapters_alone_are_trained_and_start_at_nothing():
    model, plain = GPT(CONFIG), GPT(CONFIG)
    lora.adapt(model, 2, 4.0, 0)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * 2 * 4 and all(name[-2:] in (".A", ".B") for name in trained)
    assert torch.equal(model(IDS), plain(IDS))  # to the bit
    lora.adapt(model, 8, 1.0, 1)  # once
    assert {a.A.size(0) for a in lora.adapters(model).values()} == {2}


@pytest.mark.parametrize("make", [GPT, ScalarGPT])
def test_the_blocks_linear_layers_have_adapters_and_no_head_has(make):
    """An untied head, the embeddings and the norms stay as they are; a scalar head is trained
    itself. A is drawn from U(-1/√in, 1/√in), B is 0."""
    model = make(GPTConfig(11, 16, 2, 2, 256, tied=False))
    lora.adapt(model, 64, 4.0, 0)
    layers = ("attention.qkv", "attention.proj", "up", "down")
    places = {f"blocks.{i}.{layer}" for i in range(2) for layer in layers}
    trunk = "trunk." if make is ScalarGPT else ""
    adapters = lora.adapters(model)
    assert set(adapters) == {trunk + place for place in places}
    own = {name for name, p in model.named_parameters() if p.requires_grad and name[-2] != "."}
    assert own == ({"head.weight", "head.bias"} if trunk else set())
    for adapter in adapters.values():
        bound = 1 / math.sqrt(adapter.in_features)
        assert 0.999 * bound < adapter.A.abs().max() <= bound and not adapter.B.any()
        assert adapter.A.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
        assert abs(adapter.A.mean().item()) < 0.02 * bound


def test_the_base_is_the_same_weights_without_adapters():
    model = adapted()
    base = lora.base(model)
    assert torch.equal(base(IDS), GPT(CONFIG).double()(IDS)) and not lora.adapters(base)
    assert not torch.allclose(base(IDS), model(IDS))
    shared = {p.data_ptr() for p in model.parameters()}
    assert all(p.data_ptr() in shared and not p.requires_grad for p in base.parameters())
    first, second = memory.records({"policy": model, "ref": base})
    assert second["bytes"] == second["weight_bytes"] == 0
    n = 2 * 2 * (8 + 24 + 8 + 8 + 8 + 32 + 32 + 8)  # r (in + out) of four layers, two blocks
    assert first["trained_parameters"] == n and first["gradient_bytes"] == 8 * n
    assert "shared" in memory.ledger([first, second])


def test_merged_is_unmerged():
    model = adapted()
    before, scalar = model(IDS), ScalarGPT(CONFIG, trunk=adapted())
    plain = lora.merged(model)
    torch.testing.assert_close(plain(IDS), before, rtol=0, atol=1e-12)
    assert not lora.adapters(plain) and type(plain.blocks[0].up) is Linear
    assert len(lora.adapters(model)) == 2 * 4 and torch.equal(model(IDS), before)
    values = scalar.values(IDS)
    torch.testing.assert_close(lora.merged(scalar).values(IDS), values, rtol=0, atol=1e-12)


def test_merging_a_bfloat16_base_rounds_nothing_away():
    model = GPT(CONFIG).bfloat16()
    lora.adapt(model, 2, 1e-3, 0)
    layer = model.blocks[0].up
    assert layer.A.dtype == torch.float32 and layer.weight.dtype == torch.bfloat16
    with torch.no_grad():
        layer.B += 1.0
    change = layer.scale * (layer.B @ layer.A).detach()
    found = lora.merged(model).blocks[0].up.weight
    torch.testing.assert_close(found - layer.weight.float(), change)


def test_flops_of_frozen_weights():
    """A backward pass of a frozen base has the gradients of its inputs alone."""
    model, plain = adapted(), GPT(CONFIG)
    N = model.matmul_parameters()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    one = {"policy": 1}
    assert N == plain.matmul_parameters() + trained
    assert memory.flops({"policy": model}, one, one) == 2 * N + 2 * N + 2 * trained
    assert memory.flops({"policy": plain}, one, one) == 6 * plain.matmul_parameters()


def compute(dtype, **more):
    o = parse(Options, ["--device", "cpu", "--dtype", dtype])
    vars(o).update(more)
    return Compute(o)


@pytest.mark.parametrize("dtype", ["bfloat16", "bfloat16-pure"])
def test_the_base_has_the_run_s_precision_and_the_adapters_float32(dtype):
    model = compute(dtype, lora=2, lora_alpha=2.0)
    model = model.adapt(model.place(GPT(CONFIG), frozen=True))
    layer = model.blocks[0].up
    assert layer.weight.dtype == torch.bfloat16 and layer.A.dtype == torch.float32
    assert model.wte.weight.dtype == (torch.bfloat16 if "pure" in dtype else torch.float32)


@torch.no_grad()
def test_a_rollout_is_drawn_from_weights_that_are_cast_once():
    """And has the same logits to the bit as under autocast."""
    run = compute("bfloat16")
    for model in (GPT(CONFIG), adapted().float()):
        cast = run.to_sample(model)
        assert cast.blocks[0].up.weight.dtype == cast.head.dtype == torch.bfloat16
        assert cast.wte.weight is not cast.head and cast.wte.weight.dtype == torch.float32
        assert model.lm_head is None and model.blocks[0].up.weight.dtype == torch.float32
        with run.autocast():
            assert torch.equal(cast(IDS), model(IDS))
    plain, adapter = GPT(CONFIG), model.blocks[0].up
    assert compute("float32").to_sample(plain) is plain
    merged = compute("float32").to_sample(model)
    assert merged.blocks[0].up.weight is not adapter.weight and not lora.adapters(merged)
    assert merged.wte.weight is model.wte.weight and model.blocks[0].up is adapter
    torch.testing.assert_close(merged(IDS), model(IDS))


# ---- runs


SLOW = pytest.param("rlaif", marks=pytest.mark.slow)


@pytest.mark.parametrize("script", [x if x != "rlaif" else SLOW for x in METHODS])
def test_every_script_trains_adapters(script, capsys):
    """Where a script holds a reference, its first loss is that of no change."""
    args = [*TINY, *ENDS, *MORE.get(script, ()), "--lora", 2, "--out", f"lora/{script}.pt"]
    if script == "rlaif":
        args += ["--sl-steps", 2, "--pm-steps", 2, "--answers", 24, "--comparisons", 24]
    if script == "reward_model":
        args = [*TRAIN, "--init", "ends.pt", *args[-4:]]
    code = main(script, *args)
    said = capsys.readouterr()
    if script == "rlaif" and code == 1:  # a random model ends no critique
        assert "so there is nothing to learn" in said.err
        return
    assert code == 0, said.err
    record = lines(Path(f"lora/{script}.jsonl"))
    first, ledger = record[1], {m["role"]: m for m in record[0]["models"]}
    if script in ("dpo", "online_dpo"):
        assert first["loss"] == pytest.approx(math.log(2), abs=1e-7)
    if "ref" in ledger:
        assert ledger["ref"]["bytes"] == 0
    role = "reward" if script == "reward_model" else "policy"
    head = 17 if role == "reward" else 0  # is trained whole
    n = 2 * 2 * (16 + 48 + 16 + 16 + 16 + 64 + 64 + 16) + head
    assert ledger[role]["trained_parameters"] == n
    if script == "ppo":
        assert ledger["critic"]["trained_parameters"] == n + 17
    start, (model, meta) = load("ends.pt")[0], load(f"lora/{script}.pt")
    trunk = model.trunk if role == "reward" else model
    assert torch.equal(trunk.wte.weight, start.wte.weight)
    assert not torch.equal(trunk.blocks[0].up.weight, start.blocks[0].up.weight)
    assert meta["lora"]["rank"] == 2
    if script != "rlaif":
        assert meta["lora"]["start"] == "ends.pt"


def test_the_checkpoint_is_whole_and_keeps_its_adapters():
    assert main("dpo", *DPO, "--lr", 0.1, "--out", "lora/whole.pt") == 0
    start, (model, meta) = load("ends.pt")[0], load("lora/whole.pt")
    kept = meta["lora"]["tensors"]
    for name in ("blocks.0.attention.qkv", "blocks.1.down"):
        change = 4 / 2 * kept[f"{name}.B"] @ kept[f"{name}.A"]
        found = model.get_submodule(name).weight - start.get_submodule(name).weight
        torch.testing.assert_close(found, change)
        assert change.abs().max() > 1e-3


def test_a_checkpoint_with_adapters_is_merged_before_new_ones_are_trained():
    """sft --lora, then dpo --lora: the reference is what sft has made, and the first loss log 2."""
    assert main("sft", *DPO, "--lr", 0.1, "--out", "lora/first.pt") == 0
    args = [*TINY, "--init", "lora/first.pt", "--lora", 3, "--max-new-tokens", 4, "--lr", 1e-9]
    assert main("dpo", *args, "--out", "lora/second.pt") == 0
    assert lines(Path("lora/second.jsonl"))[1]["loss"] == pytest.approx(math.log(2), abs=1e-7)
    a, b = (load(f"lora/{name}.pt")[0] for name in ("first", "second"))
    torch.testing.assert_close(a(IDS), b(IDS), rtol=0, atol=1e-5)
    assert not torch.allclose(a(IDS), load("ends.pt")[0](IDS), atol=1e-3)


def test_a_state_holds_the_adapters_alone_and_is_gone_on_with(monkeypatch):
    args = [*DPO, "--save-every", 1, "--out"]
    assert main("dpo", *args, "lora/a.pt") == 0
    killed(3, "dpo", [*args, "lora/b.pt"], monkeypatch)
    state = torch.load("lora/b.state", weights_only=True)
    assert {name[-2:] for name in state["policy"]} == {".A", ".B"}
    assert main("dpo", *args, "lora/b.pt", "--resume") == 0
    a, b = (load(f"lora/{name}.pt")[0].state_dict() for name in "ab")
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    "args, words",
    [
        (["sft", "--lora", "2"], "--lora adapts a checkpoint; give one with --init"),
        (["dpo", "--lora-alpha", "2"], "--lora-alpha is read with --lora R only"),
        (["dpo", "--reference", "judge.pt", "--init", "ends.pt"], "judge.pt is a reward model"),
    ],
)
def test_mistakes(args, words, capsys):
    assert main(*args, "--out", "lora/no.pt") == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("more", [[], ["--lora", 2]])
def test_another_reference_is_a_second_model(more, monkeypatch):
    """It is what the loss, KL and win rate are held against."""
    seen = []
    measure = Evaluator.measure

    def measured(self, policy, prompts=0):
        seen.append(self.compared_with)
        return measure(self, policy, prompts)

    monkeypatch.setattr(Evaluator, "measure", measured)
    other = ["--reference", "out/reviews/sft.pt"]
    for script in ("dpo", "simpo"):
        args = [*TINY, *ENDS, *other, *more, "--out", f"lora/{script}-other.pt"]
        assert main(script, *args) == 0
    found = lines(Path("lora/dpo-other.jsonl"))
    assert found[0]["models"][1]["weight_bytes"] > 0
    assert found[1]["loss"] != pytest.approx(math.log(2), abs=1e-4)
    theirs = load("out/reviews/sft.pt")[0]
    assert torch.equal(seen[0].wte.weight, theirs.wte.weight) and seen[1] == other[1]
    assert load("lora/simpo-other.pt")[1]["reference"] == other[1]


def test_the_critic_keeps_a_base_of_its_own(monkeypatch):
    """The reward model's, or the policy's: its values must not move with the policy's adapters."""
    held = {}
    hold = Run.hold
    monkeypatch.setattr(
        Run, "hold", lambda self, **models: held.update(models) or hold(self, **models)
    )
    assert main("ppo", *TINY, *ENDS, "--reward", "judge.py:odd", "--lora", 2, "--out", "c.pt") == 0
    critic, policy = held["critic"].trunk, held["policy"]
    assert lora.adapters(critic) and critic.wte.weight is not policy.wte.weight

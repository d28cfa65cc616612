"""The scripts on a CUDA device that is emulated on the CPU by fake_cuda; run it with pytest -m
cuda.

Operations that a GPU refuses raise here too, memory holds NaN until it is written, and each wait of
the host for the device is counted. Speed and rounding are those of the CPU.
"""

import gc
import json
import math
import shutil
from collections import Counter
from pathlib import Path

import fake_cuda
import pytest
import torch
from conftest import killed, main
from test_gpt import END
from test_methods import SCRIPTS, arguments
from test_rlaif import SHORT, SMALL

import dpo
import gpu
import packing
from gpt import GPT, GPTConfig, load, save
from training import Compute, Run, parse, sampling
from training.optimizer import step_if
from training.sampling import sample

pytestmark = pytest.mark.cuda


@pytest.fixture(scope="session", autouse=True)
def device():
    if not shutil.which(fake_cuda.COMPILER):
        pytest.skip(f"no C++ compiler ({fake_cuda.COMPILER}) to build the emulation with")
    if torch.version.cuda:
        pytest.skip("this torch is built for CUDA: only a CPU build can be given the emulation")
    fake_cuda.install()
    return torch.device("cuda:0")


def on(device, script, *more):
    """-> the arguments of a small run on a device, with the checkpoint {device}/{script}.pt"""
    args = [x if x != "cpu" else device for x in arguments(script)]
    args[args.index("float64")] = "float32"
    return [*args, *more, "--out", f"{device}/{script}.pt"]


def losses(device, script):
    lines = Path(f"{device}/{script}.jsonl").read_text().splitlines()
    return [line["loss"] for line in map(json.loads, lines) if "loss" in line]


@pytest.fixture
def shop(ends, monkeypatch):
    """The folder of `ends`, which becomes the current one"""
    monkeypatch.chdir(ends)
    return ends


# ---- the scripts

WAITS = {"grpo": 14, "dapo": 20, "ppo": 24, "online_dpo": 20}  # at most so many per step
LEARNERS = {"reward_model": 5}  # of labelled rows; 4 if not named here


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_has_the_losses_of_the_cpu_and_waits_seldom(script, shop):
    """The second step, 8 rows of which are sampled with up to 24 tokens; PPO makes four updates."""
    more = ["--batch-size", 2 if script in ("grpo", "dapo") else 8]
    more += ["--max-new-tokens", 24] if script in WAITS else []
    assert main(script, *on("cpu", script, *more)) == 0
    with fake_cuda.watched_steps(Run) as steps:
        assert main(script, *on("cuda", script, *more)) == 0
    expected = losses("cpu", script)
    assert len(expected) == 3
    assert losses("cuda", script) == pytest.approx(expected, rel=2e-6, abs=2e-6)
    n = fake_cuda.number(steps[1])
    assert 0 < n <= (WAITS | LEARNERS).get(script, 4), f"{n} waits: {steps[1]}"


def test_figures_are_read_only_for_the_record(shop):
    waits = []
    for every in (1, 3):
        with fake_cuda.watched_steps(Run) as steps:
            assert main("sft", *on("cuda", "sft", "--log-every", every)) == 0
        waits.append(fake_cuda.number(steps[1]))
    assert waits[1] == waits[0] - 1


@pytest.mark.parametrize(
    "more",
    [
        "--dtype bfloat16",
        "--dtype bfloat16-pure",
        "--dtype float16",
        "--dtype bfloat16 --lora 2 --checkpoint-activations --micro-batch 2",
    ],
)
@pytest.mark.parametrize("script", ["dpo", "grpo", "ppo", "online_dpo"])
def test_in_16_bits(script, more, shop):
    assert main(script, *on("cuda", script, *more.split())) == 0
    found = losses("cuda", script)
    assert len(found) == 3 and all(map(math.isfinite, found))
    if script == "dpo":
        assert found[0] == pytest.approx(math.log(2), abs=0.01)


def test_rlaif(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = [x if x != "cpu" else "cuda" for x in (*SMALL, *SHORT)]
    assert main("rlaif", *args, "--eval-prompts", 16, "--out", "a/x.pt") == 0


def test_a_resumed_run_goes_on_as_if_nothing_had_been(shop, monkeypatch):
    *args, _ = on("cuda", "grpo", "--save-every", 1)
    assert main("grpo", *args, "whole/x.pt") == 0
    killed(2, "grpo", [*args, "cut/x.pt"], monkeypatch)
    assert main("grpo", *args, "cut/x.pt", "--resume") == 0
    assert Path("cut/x.pt").read_bytes() == Path("whole/x.pt").read_bytes()


def test_what_is_trained_is_evaluated_and_exported(shop, capsys):
    assert main("dpo", *on("cuda", "dpo")) == 0
    capsys.readouterr()
    assert main("evaluate", "cuda/dpo.pt", "--eval-prompts", 6, "--device", "cuda") == 0
    assert "gold reward (of 3)" in capsys.readouterr().out
    assert main("export", "cuda/dpo.pt", "--to", "folder") == 0


# ---- sampling


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("config", [dict(), dict(llama=True, n_kv_head=2, qk_norm=True)])
@pytest.mark.parametrize("share_from", [2, 128])
def test_a_graph_draws_what_the_steps_draw(config, group, share_from, device, monkeypatch):
    """In float64: step by step as on the CPU, as one graph per rollout, and as one more each time
    that rows are dropped."""
    monkeypatch.setattr(sampling, "SHARE_PROMPT_FROM", share_from)
    model = GPT(GPTConfig(11, 32, 2, 4, 16, **config), 3).double()
    with torch.no_grad():
        model.wte.weight *= 20
    monkeypatch.setattr(sampling, "CHECK_ENDS_SELDOM", 2)
    monkeypatch.setattr(sampling, "DROP_AT_STATIC", 1.0)
    prompts, captures = [[1, 2, 3, 4], [7, 8], [3, 9, 4], [5], [6, 6]], []
    uniform = sampling.uniforms(5 * group, 27, torch.Generator().manual_seed(1))

    def draw(static):
        found = sample(model, prompts, 27, (END,), 0.8, group=group, uniform=uniform, static=static)
        return {name: x.cpu() for name, x in vars(found).items()}

    expected = draw(False)
    assert expected["finished"].any()
    model = model.to(device)
    for static, drop_for in ((False, 128), (None, 128), (None, 1)):
        monkeypatch.setattr(sampling, "DROP_STATIC_FOR", drop_for)
        with fake_cuda.watched() as waits:
            found = draw(static)
        captures.append(sum(n for (kind, *_), n in waits.items() if kind == "captured"))
        for name, x in expected.items():
            torch.testing.assert_close(found[name], x, rtol=0, atol=1e-12)
    assert captures[:2] == [0, 1] and captures[2] > 1


@pytest.mark.parametrize("tokens", [1, 2, 3, 40])
def test_decoding_waits_once_in_eight_tokens_and_captures_what_it_replays(tokens, device):
    model = GPT(GPTConfig(11, 64, 2, 4, 16)).to(device)
    with fake_cuda.watched() as waits:
        sample(model, [[1, 2]] * 8, tokens, (99,))  # which is never drawn
    kinds = Counter(kind for kind, *_ in waits.elements())
    assert kinds.pop("captured", 0) == (tokens > 2)
    assert kinds == {"to the CPU": 1 + (tokens - 1) // 8}


# ---- memory


@pytest.mark.parametrize("adapters", [0, 2])
def test_loading_holds_no_more_than_what_stays(adapters, device, tmp_path):
    """What is frozen comes in the compute precision, tensor by tensor."""
    config = GPTConfig(999, 64, 3, 4, 64)
    save(GPT(config), tmp_path / "x.pt")
    more = ["--lora", str(adapters)] if adapters else []
    run = Compute(parse(dpo.Options, ["--device", "cuda", "--dtype", "bfloat16", *more]))
    gc.collect()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    model = run.place(load(tmp_path / "x.pt", mapped=True)[0], frozen=True)
    model = run.adapt(model) if adapters else run.freeze(model)
    stays = torch.cuda.memory_allocated() - before
    assert torch.cuda.max_memory_allocated() - before <= stays + 4096
    linear = sum(p.numel() for name, p in model.named_parameters() if p.dtype == torch.bfloat16)
    assert linear > 0.9 * sum(p.numel() for p in model.blocks.parameters())


def test_few_keys_for_many_queries_after_a_shared_prompt(device):
    """The log-probs are the CPU's; the columns after the prompt are attended with grouped heads."""
    model = GPT(GPTConfig(50, 64, 2, 4, 16, llama=True, n_kv_head=2)).double()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 50, (6, 30), generator=generator)
    ids[:, :20] = ids[0, :20]
    mask = torch.arange(30).expand(6, 30) >= 20
    packed = packing.pack(ids, packing.before(mask))
    assert packed.prefixes is not None
    expected = model.logprobs(ids, mask)
    found = model.to(device).logprobs(ids.to(device), mask.to(device))
    torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("flash, heads", [(True, 2), (False, 6)])
def test_heads_of_keys_are_copied_if_no_kernel_takes_fewer(flash, heads, device, monkeypatch):
    """And no mask is a table."""
    seen = []

    def attend(q, k, v, mask, **how):
        seen.append((k.size(1), type(mask), how))

    monkeypatch.setattr(gpu.F, "scaled_dot_product_attention", attend)
    monkeypatch.setattr(gpu, "can_use_flash_attention", lambda how: flash)
    q, k, v = (torch.randn(2, H, T, 8, device=device) for H, T in ((6, 3), (2, 5), (2, 5)))
    gpu.attention(q, k, v)
    assert seen == [(heads, type(gpu.causal_lower_right(3, 5)), {"enable_gqa": flash})]


def test_no_step_is_made_if_its_gradient_is_not_finite(device):
    p = torch.nn.Parameter(torch.ones(3, device=device))
    optimizer = torch.optim.AdamW([p], fused=True)
    p.grad = torch.full_like(p, torch.nan)
    assert not step_if(torch.isfinite(p.grad.sum()), optimizer)
    assert p.tolist() == [1, 1, 1]
    p.grad = torch.ones_like(p)
    assert step_if(torch.isfinite(p.grad.sum()), optimizer)
    assert p.tolist() == pytest.approx([1 - 1e-3 - 1e-5] * 3, abs=1e-6)


# ---- the emulation sees what a GPU refuses, and what makes the host wait


def test_what_a_gpu_refuses(device):
    here, there = torch.ones(2), torch.ones(2, device=device)
    with pytest.raises(RuntimeError, match="two devices"):
        here + there
    with pytest.raises(RuntimeError, match="generator"):
        torch.rand(2, generator=torch.Generator(), device=device)
    assert torch.empty(2, device=device).isnan().all()


def test_what_is_a_wait(device):
    there, pinned = torch.ones(2, device=device), torch.ones(2).pin_memory()
    assert pinned.is_pinned() and not torch.ones(2).is_pinned()
    pageable = torch.ones(2)
    for f, waits in (
        (lambda: pageable.to(device), 1),
        (lambda: pageable.to(device, non_blocking=True), 1),
        (lambda: pinned.to(device), 1),
        (lambda: pinned.to(device, non_blocking=True), 0),
        (lambda: there.sum().item(), 1),
        (lambda: there[there > 0], 1),
        (lambda: there.nonzero(), 1),
        (lambda: there * 2 + 1, 0),
    ):
        with fake_cuda.watched() as found:
            f()
        assert fake_cuda.number(found) == waits, found
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchronizing"):
            there.sum().item()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_copy_to_the_host_that_nobody_waits_for_has_not_arrived(device):
    there = torch.ones(2, device=device)
    here = there.to("cpu", non_blocking=True)
    there += 1
    assert here.isnan().all()
    torch.cuda.synchronize()
    assert here.tolist() == [1, 1]


def test_what_a_capture_refuses(device):
    x = torch.ones(2, device=device)
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="default stream"):
        graph.capture_begin()
    pool = torch.cuda.graph_pool_handle()
    with torch.cuda.stream(torch.cuda.Stream()):
        graph.capture_begin(pool)
        with pytest.raises(RuntimeError, match="capturing"):
            x.sum().item()
        x += 1
        graph.capture_end()
        assert x.tolist() == [1, 1]  # nothing has run
        graph.replay()
        assert x.tolist() == [2, 2]
        del graph
        with pytest.raises(RuntimeError, match="the pool has ended"):
            torch.cuda.CUDAGraph().capture_begin(pool)

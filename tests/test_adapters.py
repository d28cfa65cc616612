"""Files of adapters: merged into the precision of their base, saved alone, and read from PEFT."""

import json
from pathlib import Path

import pytest
import torch
from conftest import few_prompts, lines, main
from folders import edit, folder
from safetensors.torch import load_file, save_file

from gpt import load
from training import checkpoint

PREFIX = "base_model.model.model.layers"
PROJ = "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"


@pytest.fixture
def base(tmp_path, monkeypatch):
    """In a folder with a model in `base` and 39 pairs in x.jsonl. -> a short run's arguments"""
    few_prompts(monkeypatch, 8)
    monkeypatch.chdir(tmp_path)
    folder(tmp_path / "base")
    rows = [{"prompt": "a" * n, "chosen": "hi", "rejected": "the"} for n in range(1, 40)]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    args = ["--task", "x.jsonl", "--steps", 2, "--block-size", 32, "--truncate", "--warmup", 1]
    return [*args, "--max-new-tokens", 4, "--lr", 0.1, "--device", "cpu", "--log-every", 1]


def peft(path, modules=PROJ[:3], r=3, scale=1.0, **facts):
    """Writes adapters of PEFT on `base`, A and B of each module. -> {module of layer 0: B A}"""
    weights, tensors, change = load_file("base/model.safetensors"), {}, {}
    generator = torch.Generator().manual_seed(r)
    for name, W in weights.items():
        _, dot, rest = name.partition(".layers.")
        layer, _, module = rest.removesuffix(".weight").partition(".")
        if dot and module in modules:
            A = torch.randn(r, W.size(1), generator=generator)
            B = torch.randn(W.size(0), r, generator=generator) / 8
            tensors[f"{PREFIX}.{layer}.{module}.lora_A.weight"] = A
            tensors[f"{PREFIX}.{layer}.{module}.lora_B.weight"] = B
            change |= {module: B @ A} if layer == "0" else {}
    path.mkdir()
    save_file(tensors, path / "adapter_model.safetensors")
    said = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": r, "lora_alpha": scale * r}
    said |= {"base_model_name_or_path": "base", "bias": "none"} | facts
    (path / "adapter_config.json").write_text(json.dumps(said))
    return change


def qkv(path):
    """-> the first block's weights of q, k and v"""
    model = checkpoint.load(path)[0]
    return model.blocks[0].attention.qkv.weight.detach()


# ---- what a run writes


def test_a_merged_file_has_the_precision_of_its_base(base, tmp_path):
    """A bfloat16 base gives a bfloat16 file, in which W + α/r B A is rounded once."""
    folder(tmp_path / "half", dtype=torch.bfloat16)
    assert main("dpo", *base, "--init", "half", "--lora", 2, "--out", "y.pt") == 0
    (model, meta), start = load("y.pt"), checkpoint.load("half")[0]
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    kept, name = meta["lora"]["tensors"], "blocks.0.up"
    exact = start.get_submodule(name).weight.float() + kept[f"{name}.B"] @ kept[f"{name}.A"]
    assert torch.equal(model.get_submodule(name).weight, exact.bfloat16())
    assert torch.equal(model.wte.weight, start.wte.weight)
    assert not torch.equal(model.blocks[0].up.weight, start.blocks[0].up.weight)


def test_adapters_alone_are_read_on_their_base(base, capsys):
    """They give the weights of the whole file, and train on."""
    args = [*base, "--init", "base", "--lora", 2, "--lora-alpha", 3]
    assert main("dpo", *args, "--out", "whole.pt") == 0
    assert main("dpo", *args, "--save", "adapters", "--out", "deep/alone.pt") == 0
    theirs = dict(checkpoint.load("whole.pt")[0].named_parameters())
    alone = checkpoint.load("deep/alone.pt")[0]
    for name, p in alone.named_parameters():
        torch.testing.assert_close(p, theirs[name], rtol=0, atol=1e-6)
    file = torch.load("deep/alone.pt", weights_only=True)
    assert {name[-2:] for name in file["model"]} == {".A", ".B"}
    assert main("evaluate", "deep/alone.pt", "--eval-prompts", 4, "--device", "cpu") == 0
    assert main("export", "deep/alone.pt", "--adapter", "--to", "a") == 0
    assert main("export", "whole.pt", "--adapter", "--to", "b") == 0
    a, b = (load_file(f"{x}/adapter_model.safetensors") for x in "ab")
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    capsys.readouterr()
    Path("base").rename("gone")
    assert main("evaluate", "deep/alone.pt", "--eval-prompts", 4) == 2
    assert "deep/alone.pt holds adapters of base, which is missing" in capsys.readouterr().err


@pytest.mark.parametrize(
    "script, args, words",
    [
        ("dpo", [], "--save adapters needs --lora R; give both, or leave it out"),
        ("reward_model", ["--lora", 2], "argument --save: invalid choice: 'adapters'"),
    ],
)
def test_what_cannot_be_saved_alone(base, script, args, words, capsys):
    assert main(script, *base[:2], "--init", "base", *args, "--save", "adapters") == 2
    assert words in capsys.readouterr().err


# ---- what it reads


@pytest.mark.parametrize(
    "facts, factor",
    [
        ({}, [2, 2, 2]),
        ({"use_rslora": True}, [6 / 3**0.5] * 3),
        ({"alpha_pattern": {"k_proj": 12}}, [2, 4, 2]),
    ],
)
def test_adapters_of_peft_by_hand(base, tmp_path, facts, factor):
    """α/r B A is added to each of q, k and v, each with a scale of its own."""
    change = peft(tmp_path / "a", scale=2.0, **facts)
    expected = torch.cat([f * change[name] for f, name in zip(factor, PROJ)])
    torch.testing.assert_close(qkv("a") - qkv("base"), expected, rtol=1e-5, atol=1e-6)


def test_adapters_of_some_parts(base, tmp_path):
    """PEFT's default adapts q and v alone; k stays as it is."""
    change = peft(tmp_path / "a", ("self_attn.q_proj", "self_attn.v_proj"))
    found = (qkv("a") - qkv("base")).split(sizes())
    torch.testing.assert_close(found[0], change[PROJ[0]], rtol=1e-5, atol=1e-6)
    assert not found[1].any()
    torch.testing.assert_close(found[2], change[PROJ[2]], rtol=1e-5, atol=1e-6)


def sizes():
    H, K, D = checkpoint.load("base")[0].config.heads()
    return [H * D, K * D, K * D]


def test_they_are_trained_on_and_go_out_again(base, tmp_path):
    """π_ref is the start, adapters and all, so that the first loss is log 2. They go out to PEFT on
    the same base; a whole file is base and adapters."""
    peft(tmp_path / "a", PROJ[:3])
    args = [*base, "--init", "a", "--lora", 3]
    assert main("dpo", *args, "--out", "y.pt") == 0
    record = lines(Path("y.jsonl"))
    assert record[1]["loss"] == pytest.approx(0.6931472, abs=1e-6)
    ledger = {m["role"]: m for m in record[0]["models"]}
    assert 0 < ledger["ref"]["bytes"] < ledger["policy"]["weight_bytes"] / 4
    assert not torch.equal(qkv("y.pt"), qkv("a"))
    assert main("export", "y.pt", "--adapter", "--to", "out") == 0
    said = json.loads(Path("out/adapter_config.json").read_text())
    assert said["base_model_name_or_path"] == "base" and said["r"] == 3
    assert set(said["rank_pattern"].values()) == {9}  # q, k and v have adapters of their own
    torch.testing.assert_close(qkv("out"), qkv("y.pt"), rtol=0, atol=1e-6)
    back = checkpoint.load("out")[0].state_dict()
    for name, x in checkpoint.load("y.pt")[0].state_dict().items():
        torch.testing.assert_close(back[name], x, rtol=0, atol=1e-6)
    args = ["--task", "x.jsonl", "--eval-prompts", 4, "--max-new-tokens", 4, "--truncate"]
    assert main("evaluate", "a", *args) == 0


def test_a_run_without_lora_trains_the_merged_weights(base, tmp_path):
    peft(tmp_path / "a")
    assert main("sft", *base, "--init", "a", "--lr", 1e-30, "--out", "y.pt") == 0
    torch.testing.assert_close(qkv("y.pt"), qkv("a"), rtol=0, atol=1e-6)


def test_a_resumed_run_has_read_the_same_adapters(base, tmp_path, capsys):
    peft(tmp_path / "a")
    args = [*base, "--init", "a", "--lora", 3, "--out", "y.pt"]
    assert main("dpo", *args) == 0
    digests = load("y.pt")[1]["files"]
    assert digests["init"]
    edit(tmp_path / "a/adapter_config.json", lora_alpha=7)
    assert main("dpo", *args) == 0
    assert load("y.pt")[1]["files"]["init"] != digests["init"]
    assert "replaces y.pt" in capsys.readouterr().out


@pytest.mark.parametrize(
    "facts, args, words",
    [
        ({}, ["--lora", 2], "--lora 2: a has adapters of rank 3; give --lora 3"),
        ({}, ["--lora", 3, "--lora-alpha", 5], "--lora-alpha 5: a has adapters scaled by 3/r"),
        ({"use_dora": True}, [], "a has use_dora 'True', which is not supported"),
        ({"modules_to_save": ["lm_head"]}, [], "a has modules_to_save"),
        (
            {"base_model_name_or_path": "Qwen/Q"},
            [],
            "fetch it: hf download Qwen/Q --local-dir Qwen/Q",
        ),
        ({"r": 0}, [], "without r and lora_alpha"),
    ],
)
def test_adapters_that_are_refused(base, tmp_path, facts, args, words, capsys):
    peft(tmp_path / "a")
    edit(tmp_path / "a/adapter_config.json", **facts)
    assert main("dpo", *base, "--init", "a", *args) == 2
    assert words in capsys.readouterr().err


def test_what_no_layer_takes_and_what_fits_another_model_is_refused(base, tmp_path, capsys):
    peft(tmp_path / "a")
    path = tmp_path / "a/adapter_model.safetensors"
    good = load_file(path)
    head = {"base_model.model.lm_head.lora_A.weight": torch.ones(3, 24)}
    narrow = {name: x[:, :-1].contiguous() for name, x in good.items() if "lora_A" in name}
    for more, words in (
        (head, "adapts lm_head.lora_A.weight, which gets no adapter here; merge the adapters"),
        (narrow, "in base; the adapters belong on another model"),
    ):
        save_file(good | more, path)
        assert main("dpo", *base, "--init", "a") == 2
        assert words in capsys.readouterr().err


# ---- what PEFT reads


@pytest.mark.parametrize("family", ["qwen2.5", "gpt2"])
def test_adapters_go_out_under_their_own_names(family, tmp_path, monkeypatch, capsys):
    """What PEFT adds, α/r B A of each of its layers, is what was merged here."""
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": "a" * n, "chosen": "hi", "rejected": "the"} for n in range(1, 40)]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    folder(tmp_path / "base", family)
    args = ["--task", "x.jsonl", "--init", "base", "--lora", 2, "--lora-alpha", 3, "--steps", 2]
    more = ["--block-size", 32, "--truncate", "--max-new-tokens", 4, "--lr", 0.1, "--warmup", 1]
    assert main("dpo", *args, *more, "--out", "y.pt") == 0
    assert main("export", "y.pt", "--adapter", "--to", "adapter") == 0
    assert "the adapters fit base" in capsys.readouterr().out
    assert main("export", "y.pt", "--to", "whole") == 0
    facts = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert facts["base_model_name_or_path"] == "base" and facts["r"] == 2
    assert facts["fan_in_fan_out"] == (family == "gpt2")
    adapter = load_file("adapter/adapter_model.safetensors")
    before, after = (load_file(f"{x}/model.safetensors") for x in ("base", "whole"))
    names = {name.split(".lora_")[0] for name in adapter}
    assert {name.rpartition(".")[2] for name in names} == set(facts["target_modules"])
    for name in names:
        change = 1.5 * adapter[f"{name}.lora_B.weight"] @ adapter[f"{name}.lora_A.weight"]
        full = name.removeprefix("base_model.model.") + ".weight"
        found = after[full] - before[full]
        torch.testing.assert_close(found.T if family == "gpt2" else found, change)
    assert checkpoint.load("whole")[0].config.n_embd == 24
    assert main("export", "y.pt", "--adapter", "--dtype", "bfloat16", "--to", "half") == 0
    half = load_file("half/adapter_model.safetensors")
    assert half.keys() == adapter.keys()
    assert all(torch.equal(half[name], x.bfloat16()) for name, x in adapter.items())


def test_what_has_no_adapters_has_none_to_write(base, capsys):
    assert main("export", "base", "--adapter", "--to", "no") == 2
    assert "holds no adapters of a policy" in capsys.readouterr().err

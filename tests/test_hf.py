"""Checkpoints of Hugging Face: six model families compared with golden numbers, broken folders, and
export."""

import copy
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, killed, main
from folders import GOLDEN, edit, folder
from golden import IDS
from house import METHODS
from safetensors.torch import load_file, save_file

import data
import dpo
from data import UserError
from gpt import ScalarGPT, save
from hf import weights as hf
from training import Compute, checkpoint, parse
from training.files import digest
from training.memory import Tracker
from training.options import Options
from training.sampling import sample

IDS = torch.tensor(IDS)


@pytest.fixture(params=GOLDEN, scope="module")
def golden(request, tmp_path_factory):
    """-> (a model of a family, what transformers says of it)"""
    path = tmp_path_factory.mktemp("golden") / request.param
    return hf.load(folder(path, request.param))[0], GOLDEN[request.param]


# ---- the same numbers


@torch.no_grad()
def test_logits_are_those_of_transformers(golden):
    model, said = golden
    logits = model(IDS)
    torch.testing.assert_close(logits[:, -1, :8], torch.tensor(said["logits"]), rtol=0, atol=3e-5)
    assert abs(logits.abs().sum().item() - said["sum"]) < 0.02


@pytest.mark.parametrize("long", [1, 100])
def test_groups_of_ragged_prompts_are_drawn_with_their_own_probabilities(golden, long, monkeypatch):
    """Each row with its own copy of the prompt, and a group with one."""
    monkeypatch.setattr("training.sampling.SHARE_PROMPT_FROM", long)
    model = copy.deepcopy(golden[0]).double()
    prompts = [IDS[0, :4].tolist(), IDS[1, :9].tolist(), IDS[0, :2].tolist()]
    generator = torch.Generator().manual_seed(0)
    rollout = sample(model, prompts, 7, (22,), generator=generator, group=3)
    logp = model.logprobs(rollout.ids, rollout.mask).detach()
    torch.testing.assert_close(rollout.logp, logp, rtol=0, atol=1e-12)


def test_checkpointed_activations_change_no_gradient(golden):
    model, gradients = copy.deepcopy(golden[0]), []
    mask = torch.ones(2, 16, dtype=torch.bool)
    for on in (False, True):
        model.checkpoint_activations = on
        model.zero_grad()
        model.logprobs(IDS, mask).sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


def test_matmul_parameters_by_hand(tmp_path):
    """Llama, untied: 24² each of q and o, 8·24 each of k and v, three of 40·24, twice; the head."""
    model, _ = hf.load(folder(tmp_path, "llama-2", num_key_value_heads=6))
    assert model.matmul_parameters() == 2 * (4 * 24**2 + 3 * 40 * 24) + 23 * 24


def test_nothing_is_drawn_or_copied_but_what_is_joined(tmp_path, monkeypatch):
    """7B models have no room for random weights first."""
    path = folder(tmp_path, "llama-2", dtype=torch.bfloat16)
    monkeypatch.setattr("torch.nn.init.normal_", lambda p, *_, **__: p.is_meta or 1 / 0)
    model, _ = hf.load(path)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not any(p.is_meta for p in model.parameters())


# ---- the forms that a folder may have


@pytest.mark.parametrize("more", [["--lora", "2"], []])
def test_what_is_frozen_is_never_held_in_a_wider_precision(more, tmp_path):
    """While it is loaded there is one tensor of the file beside what stays."""
    path = folder(tmp_path)
    run = Compute(parse(dpo.Options, ["--device", "cpu", "--dtype", "bfloat16", *more]))
    model = checkpoint.load(path, mapped=True)[0]
    largest = max(4 * p.numel() for p in model.parameters())
    with Tracker() as tracker:
        model = run.place(model, frozen=True)
        model = run.adapt(model) if more else run.freeze(model)
    kept = sum(p.nbytes for p in model.parameters())
    assert 0 < tracker.peak <= kept + largest
    assert model.blocks[0].up.weight.dtype == torch.bfloat16


def test_shards_old_names_and_a_sliding_window(tmp_path):
    model, _ = hf.load(folder(tmp_path / "a", "mistral", sliding_window=12))
    assert model.config.block_size == 12
    path = folder(tmp_path / "b", "gpt2")
    state = load_file(path / "model.safetensors")
    state = {name.removeprefix("transformer."): x for name, x in state.items()}
    state |= {"h.0.attn.bias": torch.ones(1, 1, 32, 32), "lm_head.weight": state["wte.weight"] + 0}
    names = sorted(state)
    for i, part in enumerate((names[:9], names[9:])):
        save_file({name: state[name] for name in part}, path / f"part-{i}.safetensors")
    shards = {name: f"part-{int(name in names[9:])}.safetensors" for name in names}
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    (path / "model.safetensors").unlink()
    model, _ = hf.load(path)
    assert torch.equal(model(IDS), hf.load(folder(tmp_path / "c", "gpt2"))[0](IDS))


def test_a_head_of_its_own_is_kept_whatever_config_json_says(tmp_path, monkeypatch):
    """And goes out with a config.json that says so; one that equals the embedding is none."""
    monkeypatch.chdir(tmp_path)
    path = folder(tmp_path / "a", "llama-2", tie_word_embeddings=True)
    state = load_file(path / W)
    model, meta = hf.load(path)
    assert torch.equal(model.head, state["lm_head.weight"]) and not model.config.tied
    assert "lm_head.weight is kept, although config.json says" in meta["method"]
    assert main("export", "a", "--to", "b") == 0
    assert not hf.read_config("b").tied and torch.equal(hf.load("b")[0](IDS), model(IDS))
    weights(path, **{"lm_head.weight": state["model.embed_tokens.weight"] + 0})
    model, meta = hf.load(path)
    assert model.config.tied and model.lm_head is None and "kept" not in meta["method"]


def test_transformers_5_writes_rope_parameters(tmp_path):
    path = folder(tmp_path / "a", "llama-3.2")
    config = hf.read_config(path)
    assert config.rope_theta == 100.0 and config.rope_scaling == (8.0, 1.0, 4.0, 16.0)
    rope = GOLDEN["llama-3.2"]["config"]["rope_scaling"] | {"rope_theta": 100.0}
    edit(path / "config.json", rope_scaling=None, rope_theta=None, rope_parameters=rope)
    assert hf.read_config(path) == config


def test_the_digest_is_of_the_content_that_is_read(tmp_path):
    """A copy has the same, whatever its times and whatever else lies in it."""
    path = folder(tmp_path / "a")
    before = digest(path)
    copy = shutil.copytree(path, tmp_path / "b", copy_function=shutil.copy)
    os.utime(copy / "model.safetensors", (1, 1))
    for other in ("trainer_state.json", "consolidated.safetensors", "README.md", "old.jinja"):
        (copy / other).write_text("{}")
    assert digest(copy) == before
    weights, facts = copy / "model.safetensors", os.stat(path / "model.safetensors")
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    os.utime(weights, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    changed = digest(copy)
    assert changed != before
    weights.write_bytes(content)
    edit(copy / "config.json", torch_dtype="float32")
    assert digest(copy) not in (before, changed)


# ---- broken folders


def cut(path):
    text = path.read_bytes()
    path.write_bytes(text[: len(text) // 2])


def header(path, size, text=b"{}"):
    path.write_bytes(struct.pack("<Q", size) + text)


def shard(path, names):
    (path / "model.safetensors").unlink()
    text = json.dumps({"weight_map": dict(enumerate(names))})
    (path / "model.safetensors.index.json").write_text(text)


def weights(path, take=(), **more):
    state = load_file(path / "model.safetensors")
    state = {name: x for name, x in state.items() if name not in take} | more
    save_file(state, path / "model.safetensors")


def config(**changes):
    return lambda path: edit(path / "config.json", **changes)


def template(text):
    return lambda path: edit(path / "tokenizer_config.json", chat_template=text)


def wrap(prefix):
    def spoil(path):
        state = load_file(path / W)
        save_file({prefix + name: x for name, x in state.items()}, path / W)

    return spoil


def adapters(path):
    """As PEFT leaves them, without a model."""
    text = {"r": 2, "lora_alpha": 4, "base_model_name_or_path": "its/base"}
    (path / "adapter_config.json").write_text(json.dumps(text))
    (path / W).rename(path / "adapter_model.safetensors")
    (path / "config.json").unlink()


def pointer(name):
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    return lambda path: (path / name).write_text(text)


W, Q = "model.safetensors", "model.layers.0.self_attn"
BROKEN = {
    "no config": (lambda p: (p / "config.json").unlink(), "is a directory without config.json"),
    "config is no JSON": (lambda p: cut(p / "config.json"), "config.json cannot be read"),
    "config is a list": (lambda p: (p / "config.json").write_text("[1]"), "is no JSON object"),
    "other model": (config(model_type="mamba"), "of the type 'mamba'; known are GPT-2, Llama"),
    "other activation": (config(hidden_act="gelu"), "hidden_act 'gelu', which is not supported"),
    "yarn": (config(rope_scaling={"type": "yarn"}), "rotary positions 'yarn'"),
    "scaling without numbers": (config(rope_scaling={"type": "llama3"}), "missing or wrong"),
    "part of the rotation": (config(partial_rotary_factor=0.5), "partial_rotary_factor '0.5'"),
    "biases": (config(model_type="llama", attention_bias=True), "attention_bias 'True'"),
    "quantised": (config(quantization_config={"bits": 4}), "quantization_config"),
    "a size is no number": (config(vocab_size="many"), "vocab_size is many, not a int"),
    "a size is missing": (config(hidden_size=None), "config.json without hidden_size"),
    "heads that do not divide": (config(num_key_value_heads=4), "they do not fit"),
    "layers without end": (config(num_hidden_layers=10**8), "more than its files have weights"),
    "too few layers": (config(num_hidden_layers=1), "weights that no part of this model reads"),
    "other vocabulary": (config(vocab_size=29), "but config.json says otherwise"),
    "parts cut otherwise": (
        lambda p: weights(p, **{f"{Q}.{x}_proj.weight": torch.ones(16, 24) for x in "qk"}),
        "whose sizes are not those of config.json",
    ),
    "no weights": (lambda p: (p / W).unlink(), "has no model.safetensors; save it as"),
    "pickled weights": (
        lambda p: (p / W).rename(p / "pytorch_model.bin"),
        "pickled weights are never loaded",
    ),
    "shards without an index": (
        lambda p: (p / W).rename(p / "model-00001-of-00002.safetensors"),
        "it has shards; fetch their model.safetensors.index.json too",
    ),
    "weights of another name": (
        lambda p: (p / W).rename(p / "consolidated.safetensors"),
        "rename consolidated.safetensors to that, if it is the whole model",
    ),
    "llama.cpp's weights": (lambda p: (p / W).rename(p / "x.gguf"), "x.gguf is for llama.cpp"),
    "DDP's names": (wrap("module."), "as DistributedDataParallel names weights; save model.module"),
    "a compiler's names": (wrap("_orig_mod."), "as torch.compile names weights; save model._orig"),
    "PEFT's names": (wrap("base_model.model."), "as PEFT names weights; save model.merge_and"),
    "adapters": (
        adapters,
        "x holds adapters of its/base, which is no path here; fetch it: hf download its/base --loc",
    ),
    "a folder around it": (
        lambda p: (p.rename("y"), p.mkdir(), os.rename("y", "x/checkpoint-9")),
        "is a directory without config.json; give x/checkpoint-9, the .pt file in it",
    ),
    **{
        f"{name} is a pointer": (pointer(name), f"x/{name} is a pointer of Git LFS, not the f")
        for name in ("model.safetensors", "tokenizer.json", "config.json")
    },
    "a pickle with the name": (lambda p: (p / W).write_bytes(pickle.dumps({"a": 1})), "complete"),
    "cut weights": (lambda p: cut(p / W), "is not a complete safetensors file"),
    "empty weights": (lambda p: (p / W).write_bytes(b""), "is not a complete safetensors file"),
    "endless header": (lambda p: header(p / W, 2**62), "is not a complete safetensors file"),
    "header is no JSON": (
        lambda p: header(p / W, 4, b"????"),
        "is not a complete safetensors file",
    ),
    "missing shard": (lambda p: shard(p, ["a.safetensors"]), "lacks a.safetensors"),
    "shard elsewhere": (lambda p: shard(p, ["../a.safetensors"]), "does not name the files"),
    "a weight is missing": (lambda p: weights(p, ["model.norm.weight"]), "lacks the weights norm"),
    "no head": (
        config(tie_word_embeddings=False, model_type="qwen2"),
        "lacks the weights lm_head.weight; if it is the embedding, set tie_word_embeddings",
    ),
    "a weight twice": (
        lambda p: weights(p, **{"norm.weight": torch.ones(24)}),
        "has the weights norm.weight twice",
    ),
    "a weight too many": (lambda p: weights(p, x=torch.ones(2)), "no part of this model reads: x"),
    "whole numbers": (
        lambda p: weights(p, **{"model.norm.weight": torch.ones(24, dtype=torch.int8)}),
        "weights of int8: quantised ones are not supported",
    ),
    "a weight without axes": (
        lambda p: weights(p, **{"model.norm.weight": torch.tensor(1.0)}),
        "another number of axes",
    ),
    "an endless base": (config(rope_theta=10**400), "numbers are missing or wrong"),
    "no tokenizer": (lambda p: (p / "tokenizer.json").unlink(), "has no tokenizer.json"),
    "broken tokenizer": (lambda p: cut(p / "tokenizer.json"), "tokenizer.json of"),
    "no end": (
        lambda p: edit(p / "tokenizer_config.json", eos_token=None, chat_template=None),
        "names no end token",
    ),
    "template that is none": (template("{% if %}"), "cannot be read"),
    "template that refuses": (template("{{ raise_exception('no') }}"), "(no)"),
    "the system": (
        template("{{ cycler.__init__.__globals__.os.system('touch hacked') }}"),
        "cannot render a conversation",
    ),
    "a file": (template("{% include '/etc/hostname' %}"), "cannot render a conversation"),
    "a change of its messages": (template("{{ messages.append(1) }}"), "cannot render"),
    "a panic of the package": (
        lambda p: edit(
            p / "tokenizer.json",
            normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"},
        ),
        "tokenizer.json of x cannot be read",
    ),
    "settings that are no object": (
        lambda p: (p / "generation_config.json").write_text("[1]"),
        "generation_config.json is no JSON object",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_folder_is_one_line(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    spoil, words = BROKEN[name]
    path = folder(tmp_path / "x", "qwen2.5")
    spoil(path)
    with pytest.raises(UserError) as e:
        _, tokenizer, _ = checkpoint.load("x")
        tokenizer.prompt("the")
    assert words in str(e.value) and "\n" not in str(e.value)
    assert not (tmp_path / "hacked").exists()


def test_the_command_ends_with_2_and_has_written_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder(tmp_path / "x", quantization_config={"bits": 4})
    before = sorted(os.listdir())
    for script, *args in (["dpo", "--init", "x"], ["evaluate", "x"], ["export", "x"]):
        assert main(script, *args, "--task" if script == "evaluate" else "--to", "y") == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert sorted(os.listdir()) in (before, [*before, "out"])


def test_a_path_that_is_no_folder_of_a_checkpoint_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder(tmp_path / "x")
    pointer("y.pt")(tmp_path)
    for path, words in (
        ("x/model.safetensors", "x/model.safetensors is one file of a checkpoint; give its folder"),
        ("x/config.json", "x/config.json is one file of a checkpoint; give its folder, x"),
        ("y.pt", "y.pt is a pointer of Git LFS"),
        ("z/none.pt", "z/none.pt: no such file"),
    ):
        with pytest.raises(UserError, match=words):
            checkpoint.load(path)


def test_a_folder_of_another_kind_is_named(tmp_path):
    path = folder(tmp_path / "x")
    with pytest.raises(UserError, match="is a language model"):
        checkpoint.load_scalar(path)
    with pytest.raises(UserError, match="exact has a vocabulary of its own"):
        checkpoint.load(path, data.task("exact"))


WITHOUT = """
import sys
sys.modules["safetensors"] = sys.modules["tokenizers"] = None
sys.path.insert(0, {root!r})
import importlib
for name in {names}:
    importlib.import_module(name)
from training import checkpoint
checkpoint.load("x")
"""


@pytest.mark.machine
def test_the_packages_are_asked_for_by_folders_alone(tmp_path):
    """Every script is imported without them; a folder names what to install."""
    folder(tmp_path / "x")
    names = [*METHODS, "evaluate", "compare", "export"]
    code = WITHOUT.format(root=str(ROOT), names=names)
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True)
    last = done.stderr.decode().strip().splitlines()[-1]
    assert "UserError: x needs the package safetensors: pip install -r requirements-hf.txt" in last


# ---- out again


@pytest.mark.parametrize("family", GOLDEN)
def test_a_folder_goes_out_to_the_bit(family, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder(tmp_path / "a", family, dtype=torch.bfloat16)
    assert main("export", "a", "--to", "b") == 0
    before, after = (load_file(tmp_path / x / "model.safetensors") for x in "ab")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert hf.read_config("a") == hf.read_config("b")
    facts = json.loads((tmp_path / "b/config.json").read_text())
    assert facts["model_type"] == GOLDEN[family]["config"]["model_type"]
    assert facts["dtype"] == "bfloat16" and (tmp_path / "b/tokenizer.json").exists()
    assert main("export", "a", "--to", "b") == 2  # nothing on disk is lost


def test_what_overflows_does_not_go_out(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    large = torch.ones(24) * 0.5
    large[3] = -70_000
    weights(folder(tmp_path / "a"), **{"model.norm.weight": large})
    assert main("export", "a", "--to", "b", "--dtype", "float16") == 2
    words = "model.norm.weight holds -70000, but float16 ends at 65504; give a --dtype with more"
    assert words in capsys.readouterr().err and sorted(os.listdir()) == ["a"]
    assert main("export", "a", "--to", "b", "--dtype", "bfloat16") == 0


def test_a_reward_model_goes_out_and_in(tmp_path, monkeypatch, capsys):
    """With its bias, and with a padding token that ends no response."""
    monkeypatch.chdir(tmp_path)
    start, _, meta = checkpoint.load(folder(tmp_path / "a", "llama-2"))
    reward = ScalarGPT(start.config, trunk=start)
    with torch.no_grad():
        reward.head.bias += 0.25
    save(reward, "reward.pt", **meta)
    assert main("export", "reward.pt", "--to", "b") == 0
    assert "every score is 0.2500 higher here" in capsys.readouterr().out
    back, tokenizer, _ = checkpoint.load_scalar("b")
    assert torch.equal(back.values(IDS), reward.values(IDS))
    pad = json.loads((tmp_path / "b/config.json").read_text())["pad_token_id"]
    assert pad != tokenizer.end_id and "lm_head.weight" not in load_file("b/model.safetensors")


def test_a_toy_goes_out_and_in(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = str(tiny / "out/reviews/sft.pt")
    assert main("export", path, "--to", "b", "--dtype", "float32") == 0
    model, own, _ = checkpoint.load(path)
    back, tokenizer, _ = checkpoint.load("b")
    assert torch.equal(back(IDS), model(IDS)) and tokenizer.end_id == own.end_id
    for text in ("A drama, The Last Road: ", "a  b\n\n\tc_1234 don't é日🙂", "<|endoftext|>!!"):
        assert tokenizer.encode(text) == own.encode(text)
        assert tokenizer.decode(own.encode(text)) == own.decode(own.encode(text))


# ---- runs


ARGS = (
    "--steps 2 --batch-size 4 --warmup 1 --lr 1e-3 --block-size 32 --truncate --device cpu".split()
)
MORE = ["--max-new-tokens", "4", "--eval-prompts", "4", "--task", "x.jsonl"]


@pytest.fixture
def chats(tmp_path, monkeypatch):
    """A folder with the checkpoint "base", the reward model "judge" and rows of chats."""
    monkeypatch.chdir(tmp_path)
    folder(tmp_path / "base")
    start, _, meta = checkpoint.load("base")
    save(ScalarGPT(start.config, trunk=start), "judge.pt", **meta)
    assert main("export", "judge.pt", "--to", "judge") == 0
    user = [[{"role": "user", "content": "a" * n}] for n in range(1, 60)]
    rows = [{"prompt": x, "chosen": "hi", "rejected": "the " * 20} for x in user]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def test_a_run_from_a_folder_and_its_evaluation_from_elsewhere(chats, monkeypatch, capsys):
    """What it says first, and the same figures again."""
    assert main("dpo", *ARGS, *MORE, "--init", "base", "--out", "y.pt") == 0
    said = capsys.readouterr().out
    assert "a plain prompt is one user message (--no-chat keeps it bare)" in said
    assert "starts from base: qwen2, 0.0 M parameters" in said and "(n = 2)" in said
    shown = said[said.rindex("2 test prompts") :].splitlines()[1:5]
    (chats / "elsewhere").mkdir()
    monkeypatch.chdir(chats / "elsewhere")
    assert main("evaluate", "../y.pt", "--device", "cpu") == 0
    again = capsys.readouterr().out
    assert [line for line in shown if line not in again] == []
    tokenizer = checkpoint.load("../y.pt")[1]
    assert tokenizer.chat and tokenizer.meta["files"].keys() >= {"tokenizer.json", "config.json"}


def test_no_chat_is_kept_and_toys_have_none(chats, capsys):
    args = ["--no-chat", "--template-args", "think=true"]
    assert main("sft", *ARGS, *MORE, *args, "--init", "base", "--out", "y.pt") == 0
    assert "a plain prompt stays bare" in capsys.readouterr().out
    meta = checkpoint.load("y.pt")[1].meta
    assert meta["chat"] is False and meta["args"] == {"think": True}
    assert main("sft", *ARGS[:6], *MORE, "--truncate", "--init", "base", "--out", "z.pt") == 0
    assert "warning: --lr 0.004 is for toy models" in capsys.readouterr().out
    assert main("sft", *ARGS, "--no-chat") == 2
    assert "are for checkpoints with a chat template" in capsys.readouterr().err
    assert main("sft", *ARGS, "--init", "base", "--template-args", "think") == 2
    assert "--template-args think: give name=value" in capsys.readouterr().err
    for name in ("thnk", "messages", "bos_token"):
        assert main("sft", *ARGS, "--init", "base", "--template-args", f"{name}=1") == 2
        assert f"has no argument {name}; it has think" in capsys.readouterr().err


def test_options_of_several_words_may_be_given_twice():
    o = parse(Options, ["--template-args", "a=1", "--template-args", "b=2", "c=3"])
    assert list(o.template_args) == ["a=1", "b=2", "c=3"]


@pytest.mark.parametrize("script", ["dpo", "simpo", "sft"])
def test_another_reference_must_fit_before_anything_is_trained(script, chats, ends, capsys):
    """Of another vocabulary, or not there at all."""
    for path, words in ((str(ends / "ends.pt"), "another vocabulary"), ("no.pt", "no such file")):
        args = [*ARGS, *MORE, "--init", "base", "--reference", path, "--out", "y.pt"]
        assert main(script, *args) == 2
        assert words in capsys.readouterr().err
    assert main("reward_model", *ARGS, "--init", "base", "--reference", "base") == 2
    assert "--reference: invalid choice" in capsys.readouterr().err


def test_a_folder_is_a_judge_and_a_reference(chats, capsys):
    """A reward model of the policy's vocabulary reads its tokens; both are named in the ledger."""
    args = ["--init", "base", "--reward", "judge", "--missing-eos-penalty", 1, "--out", "y.pt"]
    assert main("ppo", *ARGS, *MORE, *args, "--reference", "base") == 0
    said = capsys.readouterr().out
    assert "judge judges the responses: qwen2" in said and "models held: 4" in said
    assert main("evaluate", "y.pt", "--device", "cpu") == 0
    assert "score of the reward model" in capsys.readouterr().out


def test_a_folder_alone_is_asked_and_measured(chats, capsys):
    assert main("evaluate", "base", "--prompt", "the") == 0
    assert "\n     policy " in capsys.readouterr().out
    assert main("evaluate", "base", "--task", "x.jsonl", "--truncate", *MORE[:4]) == 0
    assert "2 test prompts" in capsys.readouterr().out
    assert main("evaluate", "base") == 2
    assert "give --task, or a --prompt" in capsys.readouterr().err


def test_a_folder_that_has_changed_is_not_gone_on_with(chats, monkeypatch, capsys):
    args = [*ARGS, *MORE, "--init", "base", "--save-every", 1, "--out", "y.pt"]
    killed(2, "dpo", args, monkeypatch)
    path = chats / "base/model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))  # another last weight
    capsys.readouterr()
    assert main("dpo", *args, "--resume") == 2
    assert "an interrupted run that read another base" in capsys.readouterr().err


@pytest.mark.machine
def test_predict_reads_config_json_alone(chats, capsys):
    for name in ("model.safetensors", "tokenizer.json"):
        (chats / "base" / name).unlink()
    args = ["--methods", "dpo", "--seq-len", 16, "--out", "p"]
    assert main("compare", "--predict", "base", *args, "--lora", 2) == 0
    records = json.loads((chats / "p/compare.json").read_text())["methods"]
    n = 23 * 24 + 2 * (2 * 24**2 + 2 * 8 * 24 + 24 + 16 + 3 * 40 * 24 + 2 * 24) + 24
    adapters = 2 * 2 * (24 + 40 + 24 + 24 + 24 + 80 + 40 + 24)
    policy, ref = records[0]["models"]
    assert policy["parameters"] == n + adapters and policy["trained_parameters"] == adapters
    assert ref["parameters"] == n and ref["bytes"] == 0
    for more, words in ((["--n-layer", 3], "has its own sizes"), ([], "give own, 1b, 7b")):
        capsys.readouterr()
        path = "base" if more else "nowhere"
        assert main("compare", "--predict", path, *args, *more) == 2
        assert words in capsys.readouterr().err

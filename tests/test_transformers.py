"""Comparisons with the package transformers, if it is installed, and with real weights, if
NANOPO_MODEL names the folder of a checkpoint with a chat template. Run it with pytest -m slow
tests/test_transformers.py."""

import json
import os
import random

import pytest
import torch
from conftest import lines, main
from folders import folder
from golden import FAMILIES, GPT2, LLAMA

from data.chat import Chat
from gpt import ScalarGPT, save
from training import checkpoint
from training.sampling import sample

pytestmark = pytest.mark.slow
transformers = pytest.importorskip("transformers")
MODEL = os.environ.get("NANOPO_MODEL", "")
real = pytest.mark.skipif(not MODEL, reason="NANOPO_MODEL names no checkpoint")
QWEN = {**LLAMA, "model_type": "qwen2"}
SHAPES = FAMILIES | {
    "gpt2, n_inner": {**GPT2, "n_inner": 40},
    "mistral, a window": {**LLAMA, "model_type": "mistral", "sliding_window": 16},
    "qwen2.5, untied": {**QWEN, "tie_word_embeddings": False},
    "SmolLM2": {**LLAMA, "num_attention_heads": 6, "num_key_value_heads": 2},
}
IDS = torch.randint(0, 23, (3, 16), generator=torch.Generator().manual_seed(0))


def theirs(path, config, kind="CausalLM", scale=0.3, **more):
    """A tiny model with random weights, biases and norms too. -> it, saved at path beside a
    tokenizer"""
    folder(path)
    (path / "model.safetensors").unlink()
    (path / "config.json").write_text(json.dumps(config | more))
    auto = getattr(transformers, f"AutoModelFor{kind}")
    torch.manual_seed(1)
    model = auto.from_config(transformers.AutoConfig.from_pretrained(path)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(scale * torch.randn_like(p) if p.dim() > 1 else 0.1 * torch.randn_like(p))
    model.save_pretrained(path)
    return model


def logits(model, ids=IDS):
    with torch.no_grad():
        found = model(ids)
    return found if torch.is_tensor(found) else found.logits


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("shards", [False, True])
def test_in_out_and_read_back(name, shards, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    their_model = theirs(tmp_path / "a", SHAPES[name])
    if shards:
        (tmp_path / "a/model.safetensors").unlink()
        their_model.save_pretrained("a", max_shard_size="10KB")
        assert not (tmp_path / "a/model.safetensors").exists()
    ours = checkpoint.load("a")[0]
    torch.testing.assert_close(logits(ours), logits(their_model), rtol=0, atol=3e-5)
    assert main("export", "a", "--to", "b") == 0
    back = transformers.AutoModelForCausalLM.from_pretrained("b").eval()
    assert torch.equal(logits(back), logits(their_model))
    assert transformers.AutoTokenizer.from_pretrained("b").encode("the") == [19, 4]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("pad", [22, 21])
def test_reward_models_both_ways(name, pad, tmp_path, monkeypatch):
    """Where the padding token is the end token (22), transformers would read the token before."""
    monkeypatch.chdir(tmp_path)
    more = {"num_labels": 1, "pad_token_id": 0}
    their_model = theirs(tmp_path / "a", FAMILIES[name], "SequenceClassification", **more)
    ours = checkpoint.load_scalar("a")[0]
    ids, mask = IDS.clamp(min=1), torch.ones(3, 16, dtype=torch.bool)
    ids[:, -1] = 22
    scores = ours.score(ids, mask).detach()
    torch.testing.assert_close(scores, logits(their_model, ids)[:, 0], rtol=0, atol=3e-5)
    start, _, meta = checkpoint.load(folder(tmp_path / "x", name))
    meta["tokenizer"]["files"]["config.json"] = json.dumps(FAMILIES[name] | {"pad_token_id": pad})
    save(ScalarGPT(start.config, trunk=start), "reward.pt", **meta)
    reward = checkpoint.load_scalar("reward.pt")[0]
    assert main("export", "reward.pt", "--to", "b") == 0
    auto = transformers.AutoModelForSequenceClassification
    back = auto.from_pretrained("b").eval()
    scores = reward.score(ids, mask).detach()
    torch.testing.assert_close(logits(back, ids)[:, 0], scores, rtol=0, atol=3e-5)


def test_toys_are_read(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main("export", str(tiny / "out/reviews/sft.pt"), "--to", "b") == 0
    ours, tokenizer, _ = checkpoint.load(tiny / "out/reviews/sft.pt")
    back = transformers.AutoModelForCausalLM.from_pretrained("b").eval()
    torch.testing.assert_close(logits(back), logits(ours), rtol=0, atol=2e-6)
    read, rng = transformers.AutoTokenizer.from_pretrained("b"), random.Random(0)
    letters = "abc ABC 019_-.,!?\n\té日本🙂'’ \u0301\u00a0\u2003ÿ"
    for _ in range(2000):
        text = "".join(rng.choice(letters) for _ in range(rng.randint(1, 40)))
        ids = tokenizer.encode(text)
        assert read(text, add_special_tokens=False)["input_ids"] == ids
        assert read.decode(ids) == tokenizer.decode(ids)


@pytest.mark.parametrize("name", ["qwen2.5", "gpt2"])
def test_peft_reads_the_adapters(name, tmp_path, monkeypatch):
    peft = pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    theirs(tmp_path / "base", SHAPES[name])
    rows = [{"prompt": "a" * n, "chosen": "hi", "rejected": "the"} for n in range(1, 40)]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    args = ["--task", "x.jsonl", "--init", "base", "--lora", 2, "--lora-alpha", 3, "--steps", 2]
    more = ["--block-size", 32, "--truncate", "--max-new-tokens", 4, "--lr", 0.1, "--warmup", 1]
    assert main("dpo", *args, *more, "--out", "y.pt") == 0
    assert main("export", "y.pt", "--adapter", "--to", "adapter") == 0
    base = transformers.AutoModelForCausalLM.from_pretrained("base").eval()
    before = logits(base)
    adapted = peft.PeftModel.from_pretrained(base, "adapter").eval()
    ours = logits(checkpoint.load("y.pt")[0])
    torch.testing.assert_close(logits(adapted), ours, rtol=0, atol=1e-4)
    assert (ours - before).abs().max() > 0.01
    # and back: PEFT's folder is trained on, and PEFT reads what came of it
    adapted.save_pretrained("theirs")
    args[args.index("base")] = "theirs"
    assert main("dpo", *args, *more, "--out", "z.pt") == 0
    assert main("export", "z.pt", "--adapter", "--to", "further") == 0
    base = transformers.AutoModelForCausalLM.from_pretrained("base").eval()
    further = peft.PeftModel.from_pretrained(base, "further").eval()
    trained = logits(checkpoint.load("z.pt")[0])
    torch.testing.assert_close(logits(further), trained, rtol=0, atol=1e-4)
    assert (trained - ours).abs().max() > 0.01


# ---- real weights

PIECES = [
    *("hello", "  a  7", " é", "日本", "\n\n", "don't", "1234", "🙂", "\t", "!?", "x" * 9),
    *("The sum is 3.5.", "def f(x):\n  return x", " of", "\u0301", "\u200d", "{{ x }}", "<b>"),
]


TURN = "{{ '<|im_start|>' + m.role + '\\n' }}"
OPEN = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
LOOP = "{% for m in messages %}" + TURN + "BODY{{ '<|im_end|>\\n' }}{% endfor %}" + OPEN
THOUGHT = "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
CALLS = "{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}</call>{% endfor %}"
LAST = "{% if loop.last %}{{ m.content }}{% else %}{{ m.content.split('</think>')[-1] }}{% endif %}"
MARKED = "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}"
TEMPLATES = {  # chat templates that think, call tools or mark their answers; None: the model's own
    "own": None,
    "thoughts": LOOP.replace("BODY", THOUGHT + "{{ m.content | trim }}"),
    "thoughts of the last answer": LOOP.replace("BODY", LAST),
    "an opened thought": LOOP.replace("BODY", "{{ m.content }}").replace(
        "assistant\\n'", "assistant\\n<think>'"
    ),
    "tools": "{% if tools %}{{ tools | tojson }}{% endif %}"
    + LOOP.replace("BODY", "{{ m.content }}" + CALLS),
    "marks": LOOP.replace(
        "BODY{{ '<|im_end|>\\n' }}",
        "{% if m.role == 'assistant' %}" + MARKED + "{% else %}"
        "{{ m.content + '<|im_end|>' }}{% endif %}{{ '\\n' }}",
    ),
}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"é": 1}}}


def conversations(n, seed=0):
    """Yields (messages, tools or None), the last message an answer."""
    rng = random.Random(seed)
    for _ in range(n):

        def text():
            return "".join(rng.choices(PIECES, k=rng.randint(1, 8)))  # noqa: B023

        rows = [{"role": "system", "content": text()}] if rng.random() < 0.3 else []
        for _ in range(rng.randint(1, 3)):
            answer = {"role": "assistant", "content": text()}
            answer |= {"reasoning_content": text()} if rng.random() < 0.3 else {}
            answer |= {"tool_calls": [CALL]} if rng.random() < 0.3 else {}
            rows += [{"role": "user", "content": text()}, answer]
        yield rows, [CALL] if rng.random() < 0.5 else None


def chat(rows, tools):
    messages = []
    for row in rows:
        more = {k: x for k, x in row.items() if k not in ("role", "content")}
        messages.append((row["role"], row["content"], json.dumps(more) if more else ""))
    made = Chat("…", messages)
    made.columns = json.dumps({"tools": tools} if tools else {})
    return made


@real
@pytest.mark.parametrize("name", TEMPLATES)
def test_ids_are_those_of_apply_chat_template(name):
    """A thousand conversations: prompt and answer are the rendering of both, or its beginning. They
    may be cut into tokens otherwise at the seam, before an answer that begins with white space."""
    read, meta = transformers.AutoTokenizer.from_pretrained(MODEL), checkpoint.load(MODEL)[2]
    if TEMPLATES[name]:
        read.chat_template = TEMPLATES[name]
        meta["tokenizer"]["files"]["chat_template.jinja"] = TEMPLATES[name]
    ours, seams = checkpoint.tokenizer_of(meta), 0
    for rows, tools in conversations(1000):
        asked_for, how = chat(rows[:-1], tools), {"tools": tools, "return_dict": False}
        prompt = read.apply_chat_template(rows[:-1], add_generation_prompt=True, **how)
        assert ours.prompt(asked_for) == prompt
        mine = prompt + ours.answer(chat(rows[-1:], None), asked_for)
        said = read.apply_chat_template(rows, **how)
        if said[: len(mine)] != mine and not ours.apart:
            assert read.decode(said).startswith(read.decode(mine))
            seams += 1
        if name == "marks" and trained(ours, rows, tools) != marked(read, rows, how):
            assert any(row["content"][0].isspace() for row in rows if row["role"] == "assistant")
        assert ours.apart == 0 or name == "an opened thought"
        ours.apart = 0
    assert seams < 150
    found = ours.prompt(f"say {ours.hf.id_to_token(ours.end_id)} now")
    assert found.count(ours.end_id) == ours.prompt("say it now").count(ours.end_id)


def trained(tokenizer, rows, tools):
    """-> the ids that --turns all trains of a conversation"""
    ids = []
    for i, row in enumerate(rows):
        if row["role"] == "assistant":
            before = chat(rows[:i], tools)
            before.conversation = chat(rows, tools).messages
            ids += tokenizer.answer(row["content"], before)
    return ids


def marked(read, rows, how):
    how = how | {"return_dict": True, "return_assistant_tokens_mask": True}
    got = read.apply_chat_template(rows, **how)
    return [i for i, m in zip(got["input_ids"], got["assistant_masks"]) if m]


@real
@torch.no_grad()
def test_logits_of_real_weights():
    ours, tokenizer, _ = checkpoint.load(MODEL)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    ids = [tokenizer.prompt(f"What is {i} times {i + 9}, and why? " * 5)[:64] for i in range(4)]
    ids, ours = torch.tensor(ids), ours.float()
    torch.testing.assert_close(ours(ids), logits(theirs, ids), rtol=0, atol=2e-4)
    assert (ours(ids).argmax(-1) == logits(theirs, ids).argmax(-1)).all()
    prompts = [row[: 20 + 9 * i].tolist() for i, row in enumerate(ids)]
    rollout = sample(ours, prompts, 8, tokenizer.ends, group=2)
    logp = ours.logprobs(rollout.ids, rollout.mask)
    torch.testing.assert_close(logp, rollout.logp, rtol=0, atol=1e-4)


@real
def test_a_real_model_is_trained_and_goes_out(tmp_path, monkeypatch):
    """The first loss is log 2, and the folder says the same, greedily."""
    monkeypatch.chdir(tmp_path)
    rows = [
        {"prompt": f"What is {n} plus {n}?", "chosen": f"It is {2 * n}.", "rejected": f"{n}, no."}
        for n in range(40)
    ]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    args = [
        "--task",
        "x.jsonl",
        "--init",
        MODEL,
        "--batch-size",
        2,
        "--micro-batch",
        1,
        "--steps",
        3,
    ]
    args += ["--block-size", 256, "--max-new-tokens", 8, "--eval-prompts", 2, "--warmup", 1]
    assert main("dpo", *args, "--log-every", 1, "--lr", 1e-6, "--out", "y.pt") == 0
    assert lines(tmp_path / "y.jsonl")[1]["loss"] == pytest.approx(0.6931, abs=1e-3)
    assert main("export", "y.pt", "--to", "out") == 0
    ours, tokenizer, _ = checkpoint.load("y.pt")
    read = transformers.AutoModelForCausalLM.from_pretrained("out", dtype=torch.float32).eval()
    ids = tokenizer.prompt("What is 7 times 8?")
    n = len(ids)
    said = read.generate(torch.tensor([ids]), max_new_tokens=20, do_sample=False)[0, n:].tolist()
    for _ in said:
        ids.append(int(logits(ours, torch.tensor([ids]))[0, -1].argmax()))
    assert ids[n:] == said

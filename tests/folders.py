"""Tiny checkpoints of Hugging Face, written by the tests that read them."""

import json

import torch
from conftest import ROOT
from golden import weight
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

GOLDEN = json.loads((ROOT / "tests/golden.json").read_text())
CONTROLS = ["<s>", "<|im_start|>", "<|im_end|>"]
LETTERS = ["a", "b", "c", "d", "e", "h", "i", "r", "s", "t", "u", "y", "1", "2", "Ċ", "Ġ", "x", "n"]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role[0] }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>a\n{% if think %}1{% endif %}{% endif %}"
)


def tokenizer(bos=False):
    """-> the text of a tokenizer.json: 18 bytes, two merges, three control tokens. 23 tokens."""
    vocabulary = {x: i for i, x in enumerate([*LETTERS, "he", "th"])}
    made = Tokenizer(models.BPE(vocabulary, [("t", "h"), ("h", "e")]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(x, special=True) for x in CONTROLS])
    if bos:
        from tokenizers.processors import TemplateProcessing

        made.post_processor = TemplateProcessing("<s> $A", special_tokens=[("<s>", 20)])
    return made.to_str()


def folder(path, family="qwen2.5", template=CHATML, dtype=torch.float32, bos=False, **config):
    """Writes the checkpoint of golden.json, with a tokenizer and a template. -> its folder"""
    golden = GOLDEN[family]
    path.mkdir(exist_ok=True, parents=True)
    state = {name: weight(name, shape).to(dtype) for name, shape in golden["shapes"].items()}
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps(golden["config"] | config))
    (path / "tokenizer.json").write_text(tokenizer(bos))
    named = {"bos_token": "<s>", "eos_token": "<s>"} | (
        {"chat_template": template} if template else {}
    )
    (path / "tokenizer_config.json").write_text(json.dumps(named))
    return path


def edit(path, **changes):
    """Changes a JSON file; None: takes a key away."""
    facts = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: x for k, x in facts.items() if x is not None}))

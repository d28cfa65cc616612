"""Makes golden.json, what transformers says of tiny models of six families: python tests/golden.py

Needs transformers, which no test does. The weights are a formula of a tensor's name, so that they
need no file and no generator: the tests write the same ones and load them as a checkpoint.
"""

import json
import sys
import tempfile
import zlib
from pathlib import Path

import torch

SIZE = 23
IDS = [
    [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3],
    [2, 7, 1, 8, 2, 8, 1, 8, 2, 8, 4, 5, 9, 0, 4, 5],
]
LLAMA = {
    "model_type": "llama",
    "vocab_size": SIZE,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "rope_theta": 100.0,  # so that rotation and its scaling matter within 16 tokens
}
SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
GPT2 = {
    "model_type": "gpt2",
    "vocab_size": SIZE,
    "n_positions": 32,
    "n_embd": 24,
    "n_layer": 2,
    "n_head": 6,
    "layer_norm_epsilon": 1e-5,
    "activation_function": "gelu_new",
}
FAMILIES = {
    "gpt2": GPT2,
    "llama-2": {**LLAMA, "num_key_value_heads": 6},
    "llama-3.2": {**LLAMA, "tie_word_embeddings": True, "rope_scaling": SCALING},
    "mistral": {**LLAMA, "model_type": "mistral", "head_dim": 8, "sliding_window": None},
    "qwen2.5": {**LLAMA, "model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {**LLAMA, "model_type": "qwen3", "head_dim": 8, "num_key_value_heads": 1},
}


def weight(name, shape):
    """-> a float32 tensor: a sine whose frequency the name gives, near 1 for the norms' weights"""
    n = torch.arange(1, torch.Size(shape).numel() + 1, dtype=torch.float64)
    wave = torch.sin(n * (0.7 + zlib.crc32(name.encode()) % 1000 / 1000)).view(shape)
    norm = name.endswith("norm.weight") or ".ln_" in name and name.endswith("weight")
    return (1 + 0.3 * wave if norm else 0.5 * wave).float()


def main(path):
    from transformers import AutoConfig, AutoModelForCausalLM

    found = {}
    for family, config in FAMILIES.items():
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "config.json").write_text(json.dumps(config))
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).eval()
        tied = config.get("tie_word_embeddings", True)
        state = {k: x for k, x in model.state_dict().items() if not (tied and "lm_head" in k)}
        shapes = {name: list(x.shape) for name, x in state.items()}
        state = {name: weight(name, shape) for name, shape in shapes.items()}
        model.load_state_dict(state, strict=False)
        with torch.no_grad():
            logits = model(torch.tensor(IDS)).logits
        last = [[round(x, 5) for x in row] for row in logits[:, -1, :8].tolist()]
        total = round(logits.abs().sum().item(), 3)
        found[family] = {"config": config, "shapes": shapes, "logits": last, "sum": total}
    Path(path).write_text(json.dumps(found, indent=None))


if __name__ == "__main__":
    main(*sys.argv[1:] or [Path(__file__).with_name("golden.json")])

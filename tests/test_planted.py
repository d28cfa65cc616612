"""Mistakes that an implementation of these models can make, each planted in a copy of the sources:
the golden tests see every one of them."""

import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

PLANTED = {
    "pairs side by side": (
        "gpt.py",
        "x.roll(self.D // 2, -1)",
        "x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)",
    ),
    "the other sense of rotation": (
        "gpt.py",
        "torch.cat([-sin, sin], -1)",
        "torch.cat([sin, -sin], -1)",
    ),
    "no scaling of long waves": ("gpt.py", "if config.rope_scaling:", "if False:"),
    "another base": ("gpt.py", "1 / config.rope_theta **", "1 / 10000.0 **"),
    "no norm of queries and keys": ("gpt.py", "if self.qk_norm:\n", "if False:\n"),
    "another epsilon": (
        "gpt.py",
        "self.weight.to(x.dtype), self.eps",
        "self.weight.to(x.dtype), 1e-3",
    ),
    "gate and up the wrong way": ("gpt.py", "gate, h = h.chunk", "h, gate = h.chunk"),
    "queries of the wrong key": (
        "gpt.py",
        "q_ = q.reshape(rows * self.K, -1, D)",
        "q_ = q.unflatten(1, (-1, self.K)).transpose(1, 2).reshape(rows * self.K, -1, D)",
    ),
    "keys that are cached unrotated": ("gpt.py", "if angles:", "if angles and cache is None:"),
    "one position for all rows": (
        "gpt.py",
        "self.position = self.length[:, None] + self.column[:T]",
        "self.position = self.length.max() + self.column[:T].expand(len(self.length), T)",
    ),
    "the exact GELU": ("gpt.py", 'approximate="tanh"', 'approximate="none"'),
    "a head that is always tied": ("gpt.py", "if not config.tied:", "if False:"),
    "no 1/√D": ("gpt.py", "alpha=D**-0.5", "alpha=1.0"),
    "matrices as they stand in GPT-2": (
        "training/hf.py",
        "return inner and not config.llama",
        "return False",
    ),
    "keys and values exchanged": (
        "training/hf.py",
        '"self_attn.k_proj", "self_attn.v_proj"',
        '"self_attn.v_proj", "self_attn.k_proj"',
    ),
    "no biases in Qwen2": ("training/hf.py", 'qkv_bias=kind == "qwen2"', "qkv_bias=False"),
    "other heights": ("training/hf.py", "[H * D, K * D, K * D]", "[K * D, K * D, H * D]"),
}


@pytest.mark.slow
@pytest.mark.parametrize("mistake", PLANTED)
def test_it_is_seen(mistake, tmp_path):
    file, right, wrong = PLANTED[mistake]
    left_out = shutil.ignore_patterns(".*", "out", "docs", "__pycache__")
    shutil.copytree(ROOT, tmp_path / "x", ignore=left_out)
    path = tmp_path / "x" / file
    text = path.read_text()
    assert right in text
    path.write_text(text.replace(right, wrong))
    names = "logits or groups or to_the_bit"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "tests/test_hf.py", "-k", names]
    done = subprocess.run(command, cwd=tmp_path / "x", capture_output=True, text=True)
    assert done.returncode == 1 and "test_hf.py::" in done.stdout, done.stdout + done.stderr

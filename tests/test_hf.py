"""Checkpoints of Hugging Face: six families against golden numbers, broken folders, a way out."""

import copy
import json

import pytest
import torch
from conftest import ROOT
from golden import IDS, weight
from safetensors.torch import save_file

from gpt import KVCache, sample
from training import hf

GOLDEN = json.loads((ROOT / "tests/golden.json").read_text())
IDS = torch.tensor(IDS)


def folder(path, family, dtype=torch.float32, **config):
    """Writes the checkpoint of golden.json. -> its folder"""
    golden = GOLDEN[family]
    path.mkdir(exist_ok=True)
    state = {name: weight(name, shape).to(dtype) for name, shape in golden["shapes"].items()}
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    (path / "config.json").write_text(json.dumps(golden["config"] | config))
    (path / "tokenizer.json").write_text("{}")
    return path


@pytest.fixture(params=GOLDEN, scope="module")
def golden(request, tmp_path_factory):
    """-> (a model of a family, what transformers says of it)"""
    path = tmp_path_factory.mktemp("golden") / request.param
    return hf.load(folder(path, request.param))[0], GOLDEN[request.param]


@torch.no_grad()
def test_logits_are_those_of_transformers(golden):
    model, said = golden
    logits = model(IDS)
    torch.testing.assert_close(logits[:, -1, :8], torch.tensor(said["logits"]), rtol=0, atol=3e-5)
    assert abs(logits.abs().sum().item() - said["sum"]) < 0.02


@torch.no_grad()
@pytest.mark.parametrize("ragged", [False, True])
def test_the_cache_gives_the_same_logits(golden, ragged):
    """Prompts of 5 and 7 tokens, or of 5, then the rest at once, then a token at a time."""
    model = copy.deepcopy(golden[0]).double()
    n = torch.tensor([5, 7] if ragged else [5, 5])
    cache = KVCache(model.config, 2, 16, dtype=torch.float64)
    model.hidden(IDS[:, : n.max()], cache)
    cache.length, cache.ragged = n, ragged
    steps = [3, 1, 1] if not ragged else [1, 1, 1]
    for T in steps:
        new = torch.stack([row[i : i + T] for row, i in zip(IDS, n)])
        cache.width = int(n.max())
        found = model(new, cache)
        for row in range(2):
            whole = model(IDS[row : row + 1, : n[row] + T])[0, n[row] :]
            torch.testing.assert_close(found[row], whole, rtol=0, atol=1e-11)
        n = n + T
        cache.length = n


def test_groups_of_ragged_prompts_are_drawn_with_their_own_probabilities(golden):
    model = copy.deepcopy(golden[0]).double()
    prompts = [IDS[0, :4].tolist(), IDS[1, :9].tolist(), IDS[0, :2].tolist()]
    generator = torch.Generator().manual_seed(0)
    rollout = sample(model, prompts, 7, 22, generator=generator, group=3)
    logp = model.logprobs(rollout.ids, rollout.mask).detach()
    torch.testing.assert_close(logp.float(), rollout.logp, rtol=0, atol=2e-5)

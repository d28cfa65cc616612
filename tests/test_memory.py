"""The memory counts of training/memory.py: bytes counted by hand, the ledger, and FLOPs."""

import gc

import pytest
import torch
from conftest import ENDS, TRAIN, main

from gpt import GPT, GPTConfig, ScalarGPT
from training import memory
from training.memory import Tracker, track


def test_a_storage_counts_once_and_until_its_end():
    x, w = torch.ones(8, 16), torch.ones(16, 4)  # there before: not counted, nor their views
    with Tracker() as t:
        y = x @ w.mT.mT  # 8 × 4 × 4 bytes
        assert t.total == t.peak == 128
        view = y.view(4, 8)[1:].T
        y.add_(1).mul_(2)
        assert t.total == 128
        z = y + 1
        assert t.total == t.peak == 256
        del y
        assert t.total == 256  # a view holds it
        del view
        assert t.total == 128 and t.peak == 256
        t.start()
        assert t.peak == 128
        del z
        assert t.total == 0


def test_what_the_backward_pass_keeps_is_seen():
    x = torch.ones(10, 10, requires_grad=True)
    with Tracker() as t:
        y = (x * 2).exp().sum()  # exp keeps its result, and x * 2 is free once it is read
        assert t.total == 400 + 4 and t.peak == 800
        del y
        assert t.total == 0
        y = (x * 2).sin().sum()  # sin keeps x * 2, and nobody its result
        assert t.total == 400 + 4 and t.peak == 800 + 4
        y.backward()
        assert x.grad is not None and t.total == 400 + 4  # the graph is free, .grad is there
    with Tracker() as t, torch.no_grad():
        y = (x * 2).sin().sum()
        assert t.total == 4 and t.peak == 800


class Net(torch.nn.Module):
    """16 -> 4, 68 parameters"""

    def __init__(self):
        super().__init__()
        self.linear, self.config = torch.nn.Linear(16, 4), GPTConfig(vocab_size=1000)


@pytest.mark.parametrize("trained", [True, False])
def test_a_linear_layers_step(trained):
    """Weights 272 bytes, gradients as many, moments twice and 4 for each of two step counts; 8 × 4
    outputs are 128 bytes."""
    net = Net().requires_grad_(trained)
    weights = list(net.parameters())
    if not trained:
        weights = [torch.nn.Parameter(p.detach()) for p in weights]
    optimizer = torch.optim.AdamW(weights, fused=True)
    x = torch.ones(8, 16)
    with track({"policy": net}, optimizer) as t:
        assert t.parts == {"weights": 272} and t.total == 272
        y = net.linear(x)
        assert t.parts == {"weights": 272, "activations": 128}
        if trained:
            y.sum().backward()
            del y
            assert t.total == 272 + 272
            assert t.now["gradients"] == 272 and t.now["activations"] == 0
            optimizer.step()
            parts = {"weights": 272, "activations": 0, "gradients": 272}
            assert t.parts == parts | {"optimizer": 2 * 272 + 2 * 4} and t.total == t.peak
            optimizer.zero_grad()
            assert t.total == 272 + 2 * 272 + 2 * 4
        else:
            del y
            assert t.total == 272 and t.peak == 272 + 128


def test_logits_casts_and_sampling_are_told_apart():
    config = GPTConfig(64, 8, 1, 1, 16)  # 64 is also the width of the MLP
    model = GPT(config)
    ids, mask = torch.zeros(2, 8, dtype=torch.int64), torch.ones(2, 8, dtype=torch.bool)
    with track({"policy": model}, torch.optim.AdamW(model.parameters())) as t:
        model.logprobs(ids, mask).sum().backward()
        assert t.most["logits"] == 2 * 14 * 64 * 4  # of 14 tokens: logits, their exponentials
        assert t.now["logits"] == 0 and "casts" not in t.most
        with torch.autocast("cpu", torch.bfloat16):
            model.logprobs(ids, mask)
        read = [p for name, p in model.named_parameters() if "wpe" not in name]
        read = sum(p.numel() for p in read) - 6 * 16  # three norms are not cast
        assert t.most["casts"] == 2 * read  # all that linear layers read, biases too
        t.during("sampling")
        model(ids)
        assert t.most["sampling"] > 2 * 8 * 64 * 4
        assert t.most["logits"] == 14 * 64 * (2 + 4 + 4)  # bfloat16's, float32, exponentials


def test_ledger_and_flops_by_hand():
    """One block, width 4, 10 tokens of vocabulary, 6 places: 40 + 24 + 12·16 + 13·4 + 2·4
    parameters, of which 232 multiply a token."""
    config = GPTConfig(10, 6, 1, 1, 4)
    ref, reward = GPT(config).bfloat16(), ScalarGPT(config)
    held = {"policy": GPT(config), "ref": ref.requires_grad_(False)}
    held["reward"] = reward.requires_grad_(False)
    n = 40 + 24 + 12 * 16 + 13 * 4 + 2 * 4
    facts = [(m["role"], m["trainable"], m["parameters"], m["bytes"]) for m in memory.records(held)]
    assert facts[0] == ("policy", True, n, 16 * n)
    assert facts[1] == ("ref", False, n, 2 * n)
    assert facts[2] == ("reward", False, n + 5, 4 * (n + 5))
    said = memory.ledger(memory.records(held)).splitlines()
    assert said[0] == "models held: 3" and "policy   trained" in said[1] and "frozen" in said[2]
    forward, backward = {"policy": 3, "ref": 1, "reward": 1}, {"policy": 2, "ref": 0, "reward": 0}
    N, R = 12 * 16 + 40, 12 * 16 + 4  # a reward model has no vocabulary head
    rest = 2 * N + 2 * R
    assert memory.flops(held, forward, backward) == (2 * 3 + 4 * 2) * N + rest
    assert memory.flops(held, forward, backward, recompute=True) == (2 * 3 + 6 * 2) * N + rest


def test_no_model_outlives_its_run(ends, monkeypatch):
    """Two runs in this process, as an earlier stage and the run that needs it."""
    monkeypatch.chdir(ends)
    gc.collect()
    before = [x for x in gc.get_objects() if isinstance(x, GPT)]
    for script in ("sft", "grpo"):
        more = [*ENDS, "--reward", "judge.py:odd", "--group", 4] if script == "grpo" else ENDS[:2]
        assert main(script, *TRAIN, *more, "--eval-prompts", 6, "--out", "alive/x.pt") == 0
    gc.collect()
    after = [x for x in gc.get_objects() if isinstance(x, GPT)]
    assert len(after) <= len(before)

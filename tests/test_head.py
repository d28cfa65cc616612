"""The head in head.py: log-probs and their gradient from one table of logits, compared with what
autograd computes from the plain formula."""

import pytest
import torch

import head
from head import target_logprobs

LIMITS = {  # what is kept, made at once, and read at once
    "one table": (10**9, 10**9, 10**9),
    "one table, in blocks": (10**9, 10**9, 30),
    "a table and chunks": (500, 200, 30),
    "chunks": (0, 200, 10**9),
    "chunks, in blocks": (0, 300, 20),
}


def plain(h, W, target, temperature):
    """-> log-probs and entropies, by autograd"""
    log_p = (h @ W.T / temperature).log_softmax(1)
    return log_p.gather(1, target[:, None])[:, 0], -(log_p.exp() * log_p).sum(1)


@pytest.fixture(params=LIMITS)
def limits(request, monkeypatch):
    for name, x in zip(("TABLE", "CHUNK", "BLOCK"), LIMITS[request.param]):
        monkeypatch.setattr(head, name, {"cpu": x, "cuda": x})


def numbers(dtype, M=13, V=11, C=5, scale=1.0):
    generator = torch.Generator().manual_seed(0)
    h, W = (torch.randn(n, C, generator=generator, dtype=torch.float64) * scale for n in (M, V))
    target = torch.randint(V, (M,), generator=generator)
    return h.to(dtype).requires_grad_(), W.to(dtype).requires_grad_(), target


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_value_and_gradient_of_the_plain_formula(limits, temperature):
    h, W, target = numbers(torch.float64)
    weight = torch.arange(13.0, dtype=torch.float64) - 5
    expected, entropy = plain(h, W, target, temperature)
    logp, H = target_logprobs(h, W, target, temperature, entropy=True)
    torch.testing.assert_close(logp, expected, rtol=0, atol=1e-13)
    torch.testing.assert_close(H, entropy, rtol=0, atol=1e-13)
    assert not H.requires_grad
    found, wanted = (torch.autograd.grad((x * weight).sum(), (h, W)) for x in (logp, expected))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


def test_float32_is_within_rounding(limits):
    """The gradient is within 2e-6 of float64's, relative to the largest entry."""
    h, W, target = numbers(torch.float32, M=40, V=500, C=16)
    exact = [x.detach().double().requires_grad_() for x in (h, W)]
    logp, _ = target_logprobs(h, W, target)
    expected, _ = plain(*exact, target, 1.0)
    torch.testing.assert_close(logp.double(), expected, rtol=1e-6, atol=1e-6)
    found = torch.autograd.grad(logp.sum(), (h, W))
    for x, y in zip(found, torch.autograd.grad(expected.sum(), exact)):
        assert (x - y).abs().max() < 2e-6 * y.abs().max()


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_under_autocast_logits_have_16_bits_and_the_softmax_32(limits, low):
    h, W, target = numbers(torch.float32)
    with torch.autocast("cpu", low):
        logp, H = target_logprobs(h, W, target, 0.7, entropy=True)
        logits = torch.nn.functional.linear(h, W)
    log_p = (logits.float() / 0.7).log_softmax(1)
    assert logits.dtype == low and logp.dtype == H.dtype == torch.float32
    torch.testing.assert_close(logp, log_p.gather(1, target[:, None])[:, 0], rtol=0, atol=1e-6)
    torch.testing.assert_close(H, -(log_p.exp() * log_p).sum(1), rtol=0, atol=1e-6)
    found = torch.autograd.grad(logp.sum(), (h, W))
    expected = torch.autograd.grad(log_p.gather(1, target[:, None]).sum(), (h, W))
    for x, y in zip(found, expected):
        assert x.dtype == torch.float32
        torch.testing.assert_close(x, y, rtol=0.02, atol=0.02)


def test_a_frozen_head_gets_no_gradient(limits):
    h, W, target = numbers(torch.float64)
    logp, _ = target_logprobs(h, W.detach(), target)
    (found,) = torch.autograd.grad(logp.sum(), h)
    (expected,) = torch.autograd.grad(plain(h, W, target, 1.0)[0].sum(), h)
    torch.testing.assert_close(found, expected)


def test_no_states_have_no_log_probs_and_a_gradient_of_0(limits):
    h, W, target = numbers(torch.float32, M=0)
    logp, H = target_logprobs(h, W, target, entropy=True)
    assert logp.shape == H.shape == (0,)
    assert torch.autograd.grad(logp.sum(), W)[0].abs().sum() == 0


def test_the_gradient_is_made_once_and_has_none_itself(limits):
    h, W, target = numbers(torch.float64)
    logp, _ = target_logprobs(h, W, target)
    (grad,) = torch.autograd.grad((logp**2).sum(), h, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_a_second_backward_pass_has_the_same_gradient(limits):
    """The table has become the first one's gradient."""
    h, W, target = numbers(torch.float64)
    logp, _ = target_logprobs(h, W, target)
    first = torch.autograd.grad(logp.sum(), (h, W), retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(logp.sum(), (h, W)), first)


@pytest.mark.parametrize("limit, kept", [(13 * 11 * 4, 13), (13 * 11 * 4 - 1, 12), (11 * 4, 1)])
def test_as_many_logits_are_kept_as_fit(limit, kept, monkeypatch):
    h, W, target = numbers(torch.float32)
    monkeypatch.setattr(head, "TABLE", {"cpu": limit})
    table = target_logprobs(h, W, target)[0].grad_fn.z
    assert table.shape == (kept, 11)
    monkeypatch.setattr(head, "TABLE", {"cpu": 11 * 4 - 1})
    assert target_logprobs(h, W, target)[0].grad_fn.z is None
    monkeypatch.undo()
    with torch.no_grad():
        assert target_logprobs(h, W, target)[0].grad_fn is None

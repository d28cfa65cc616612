"""The model: causality, the cache, sampling, log-probs, files."""

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import gpt
from gpt import GPT, GPTConfig, KVCache, ScalarGPT, load, sample, save

SMALL = GPTConfig(vocab_size=11, block_size=32, n_layer=2, n_head=2, n_embd=8)
END = 10


def model(dtype=torch.float64, seed=0):
    m = GPT(SMALL, seed).to(dtype)
    with torch.no_grad():
        m.wte.weight *= 20  # far from uniform, so that mistakes show
    return m


def ragged():
    """3 rows of 4, 7 and 5 tokens, right-padded; the response starts at 2, 3 and 1. -> ids, mask"""
    ids = torch.tensor([[1, 2, 3, 10, 0, 0, 0], [4, 5, 6, 7, 8, 9, 10], [3, 3, 1, 2, 10, 0, 0]])
    column = torch.arange(7)
    mask = (column >= torch.tensor([[2], [3], [1]])) & (column < torch.tensor([[4], [7], [5]]))
    return ids, mask


def plain_logprobs(m, ids, mask, temperature=1.0):
    """The full-logits formula: log-softmax over V of every position, gathered at the next token."""
    logp = (m(ids)[:, :-1] / temperature).log_softmax(-1).gather(2, ids[:, 1:, None])[:, :, 0]
    return torch.nn.functional.pad(torch.where(mask[:, 1:], logp, 0.0), (1, 0))


def test_weights_are_the_seed_s_and_the_toy_size_is_small():
    a, b, c = GPT(SMALL, 3), GPT(SMALL, 3), GPT(SMALL, 4)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters()))
    assert not torch.equal(a.wte.weight, c.wte.weight)
    size = sum(p.numel() for p in GPT(GPTConfig()).parameters())
    assert size == 891_648  # V·C + T·C + 4 (12 C² + 13 C) + 2 C


def test_a_token_sees_nothing_after_it():
    m, (ids, _) = model(), ragged()
    changed = ids.clone()
    changed[:, 4:] = 9
    torch.testing.assert_close(m(ids)[:, :4], m(changed)[:, :4])
    assert not torch.allclose(m(ids)[:, 4:], m(changed)[:, 4:])


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_the_full_logits_formula(chunked, temperature, monkeypatch):
    """In value and gradient."""
    if chunked:  # two rows of logits a chunk, computed again in the backward pass
        monkeypatch.setattr(gpt, "LOGITS_BYTES", 2 * 12 * SMALL.vocab_size)
    m, (ids, mask) = model(), ragged()
    weight = torch.randn(3, 7, dtype=torch.float64)
    grads = []
    for logp in (m.logprobs(ids, mask, temperature), plain_logprobs(m, ids, mask, temperature)):
        grads.append((logp.detach(), torch.autograd.grad((logp * weight).sum(), m.parameters())))
    torch.testing.assert_close(grads[0][0], grads[1][0], rtol=1e-12, atol=1e-12)
    for a, b in zip(grads[0][1], grads[1][1]):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_logprobs_take_flat_positions_and_run_under_fake_tensors():
    m, (ids, mask) = model(), ragged()
    index = mask[:, 1:].flatten().nonzero().squeeze(1)
    assert torch.equal(m.logprobs(ids, mask, index=index), m.logprobs(ids, mask))
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        ids, mask, index = (fake.from_tensor(x) for x in (ids, mask, index))
        out = GPT(SMALL).logprobs(ids, mask, index=index)
    assert out.shape == (3, 7)


def test_logprobs_never_hold_logits_of_prompt_positions(monkeypatch):
    m, (ids, mask) = model(), ragged()
    seen, score = [], m._score
    monkeypatch.setattr(m, "_score", lambda h, *rest: (seen.append(len(h)), score(h, *rest))[1])
    m.logprobs(ids, mask)
    assert seen == [mask.sum().item()]


def test_entropy_is_that_of_the_distribution():
    m, (ids, mask) = model(), ragged()
    _, entropy = m.logprobs(ids, mask, entropy=True)
    p = m(ids)[:, :-1].softmax(-1)
    expected = torch.where(mask[:, 1:], -(p * p.log()).sum(-1), 0.0)
    torch.testing.assert_close(entropy, torch.nn.functional.pad(expected, (1, 0)))
    assert entropy.max() <= math.log(11) and not entropy.requires_grad


def test_padding_and_row_order_change_nothing():
    m, (ids, mask) = model(), ragged()
    logp = m.logprobs(ids, mask)
    wide_ids = torch.nn.functional.pad(ids, (0, 5), value=7)
    wide = m.logprobs(wide_ids, torch.nn.functional.pad(mask, (0, 5)))[:, :7]
    order = torch.tensor([2, 0, 1])
    moved, alone = m.logprobs(ids[order], mask[order]), m.logprobs(ids[:1, :4], mask[:1, :4])
    for found, expected in ((wide, logp), (moved, logp[order]), (alone, logp[:1, :4])):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_cached_forward_is_the_uncached_one():
    m, (ids, _) = model(), ragged()
    cache = KVCache(SMALL, 3, 7, dtype=torch.float64)
    steps = [m(ids[:, :3], cache), m(ids[:, 3:4], cache), m(ids[:, 4:7], cache)]
    torch.testing.assert_close(torch.cat(steps, 1), m(ids), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("group", [1, 3])
def test_sampled_logprobs_are_the_recomputed_ones(group):
    m, prompts = model(torch.float32), [[1, 2, 3, 4, 5, 6], [7], [3, 9, 4]]
    s = sample(m, prompts, 20, END, 0.8, torch.Generator().manual_seed(0), group)
    assert s.ids.shape == s.mask.shape == s.logp.shape == (3 * group, s.ids.size(1))
    assert s.logp.dtype == torch.float32
    torch.testing.assert_close(s.logp, m.logprobs(s.ids, s.mask, 0.8).detach(), rtol=0, atol=1e-4)
    for i, (ids, mask, finished) in enumerate(zip(s.ids, s.mask, s.finished)):
        prompt, n = prompts[i // group], mask.sum().item()
        assert ids[: len(prompt)].tolist() == prompt  # row i·group + j answers prompt i
        place = range(len(prompt), len(prompt) + n)  # the response, without a gap
        assert mask.nonzero()[:, 0].tolist() == list(place)
        response = ids[mask].tolist()
        assert END not in response[:-1] and finished == (response[-1] == END)
        assert finished or n == 20
        assert (ids[len(prompt) + n :] == 0).all()
    assert s.finished.any() and not s.finished.all()  # so that both cases were seen


def test_a_prompt_alone_is_sampled_as_in_a_batch():
    """The uniforms are drawn row by row up front: neither the other prompts nor the dropping of
    ended rows changes a sample."""
    m, prompts = model(), [[1, 2, 3, 4, 5, 6], [7], [3, 9, 4], [1]]
    generator = torch.Generator().manual_seed(5)
    together = sample(m, prompts, 20, END, generator=generator)
    generator.manual_seed(5)
    for i, prompt in enumerate(prompts):
        alone = sample(m, [prompt], 20, END, generator=generator)
        assert alone.ids[alone.mask].tolist() == together.ids[i][together.mask[i]].tolist()


def test_samples_follow_the_distribution():
    """20,000 one-token samples against softmax(logits / 0.9): each of 11 shares is within 5
    standard errors (p < 1e-5)."""
    m, n = model(), 20_000
    p = (m(torch.tensor([[3, 4]]))[0, -1] / 0.9).softmax(-1)
    s = sample(m, [[3, 4]], 1, END, 0.9, torch.Generator().manual_seed(0), group=n)
    share = torch.bincount(s.ids[:, 2], minlength=11) / n
    assert ((share - p).abs() <= 5 * (p * (1 - p) / n).sqrt()).all()


def test_samples_can_be_trained_on():
    m = model(torch.float32)
    s = sample(m, [[1, 2], [3]], 4, END, generator=torch.Generator().manual_seed(0))
    m.logprobs(s.ids, s.mask).sum().backward()
    assert m.wte.weight.grad.abs().sum() > 0


def test_too_long_a_prompt_is_refused_with_the_numbers():
    with pytest.raises(AssertionError, match="30 .* 29"):
        sample(model(), [[1] * 30], 3, END)


def test_scalar_model_reads_the_tokens_so_far():
    m, (ids, _) = ScalarGPT(SMALL), ragged()
    values = m.values(ids)
    changed = ids.clone()
    changed[:, 5:] = 1
    assert values.shape == (3, 7) and values.dtype == torch.float32
    torch.testing.assert_close(values[:, :5], m.values(changed)[:, :5])


def test_checkpointed_activations_change_no_gradient():
    m, (ids, mask) = model(), ragged()
    grads = []
    for m.checkpoint_activations in (False, True):
        grads.append(torch.autograd.grad(m.logprobs(ids, mask).sum(), m.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(*grads))


def test_files(tmp_path):
    path = str(tmp_path / "m.pt")
    for m in (GPT(SMALL, 1), ScalarGPT(SMALL, 1), GPT(SMALL, 1).double()):
        facts = {"method": "sft", "numbers": [1, 2.5], "nested": {"a": None}}
        save(m, path, **facts)
        again, meta = load(path)
        assert type(again) is type(m) and meta == facts
        for a, b in zip(m.parameters(), again.parameters()):
            assert torch.equal(a, b) and a.dtype == b.dtype
    assert [p.name for p in tmp_path.iterdir()] == ["m.pt"]
    whole = (tmp_path / "m.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    torch.save({"weights": 1}, tmp_path / "other.pt")
    bad = {"cut.pt": "not a whole checkpoint", "other.pt": "not a checkpoint"}
    bad |= {"none.pt": "no such file", "": "directory"}
    for name, words in bad.items():
        with pytest.raises(ValueError, match=words):
            load(str(tmp_path / name))


def test_the_score_is_read_at_the_last_response_token():
    """Of ragged rows, whatever stands in the padding: the value at the end token, or at the last
    token of a cut answer."""
    model = ScalarGPT(GPTConfig(11, 16, 2, 2, 16), seed=3).double()
    ids = torch.randint(0, 11, (3, 9), generator=torch.Generator().manual_seed(0))
    stop = torch.tensor([9, 5, 7])
    mask = (torch.arange(9) >= 3) & (torch.arange(9) < stop[:, None])
    score = model.score(ids, mask)
    alone = [model.values(ids[i : i + 1, :n])[0, -1].item() for i, n in enumerate(stop)]
    assert score.tolist() == pytest.approx(alone)
    other = torch.where(torch.arange(9) < stop[:, None], ids, (ids + 1) % 11)
    torch.testing.assert_close(model.score(other, mask), score)
    matrices = sum(p.numel() for p in model.parameters() if p.dim() == 2)
    assert model.matmul_parameters() == matrices - 11 * 16 - 16 * 16

"""Sampling in training/sampling.py: samples follow the distribution that is trained, however rows
are batched, read and dropped."""

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from test_gpt import END, model

from gpt import GPT, GPTConfig
from training import Compute, RolloutOptions, parse, sampling
from training.sampling import sample

WAYS = {  # what the names below are set to; static: buffers of one size
    "as it is": (128, 4, 0.9, False),
    "never dropped": (128, 99, 0.0, False),
    "shared prompts": (2, 4, 0.9, False),
    "shared prompts, dropped at once": (2, 1, 1.0, False),
    "static": (128, 4, 0.9, True),
    "static, shared prompts": (2, 2, 0.9, True),
}
PROMPTS = {
    "ragged": [[1, 2, 3, 4, 5, 6], [7], [3, 9, 4]],
    "even": [[1, 2, 3], [1, 2, 4], [5, 5, 5]],
    "one": [[4, 8]],
}


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("prompts", PROMPTS)
@pytest.mark.parametrize("way", WAYS)
def test_how_rows_are_read_and_dropped_changes_no_sample(way, prompts, group, monkeypatch):
    """In float64 the very tokens that each prompt draws alone; their log-probs are those of the
    model; both architectures, fewer keys than queries."""
    long, every, drop, static = WAYS[way]
    prompts = PROMPTS[prompts]
    monkeypatch.setattr(sampling, "SHARE_PROMPT_FROM", long)
    monkeypatch.setattr(sampling, "CHECK_ENDS_EVERY", every)
    for name in ("DROP_AT", "DROP_AT_STATIC"):
        monkeypatch.setattr(sampling, name, drop)
    uniform = sampling.uniforms(len(prompts) * group, 18, torch.Generator().manual_seed(1))
    for config in (dict(), dict(llama=True, n_kv_head=2)):
        m = GPT(GPTConfig(11, 32, 2, 4, 16, **config), 3).double()
        with torch.no_grad():
            m.wte.weight *= 20
        s = sample(m, prompts, 18, (END,), 0.8, group=group, uniform=uniform, static=static)
        logp = m.logprobs(s.ids, s.mask, 0.8).detach()
        torch.testing.assert_close(s.logp, logp, rtol=0, atol=1e-10)
        for i, (ids, mask) in enumerate(zip(s.ids, s.mask)):
            row = slice(i, i + 1)
            alone = sample(m, [prompts[i // group]], 18, (END,), 0.8, uniform=uniform[row])
            assert ids[mask].tolist() == alone.ids[alone.mask].tolist()
        assert len(prompts) * group < 8 or s.finished.any()


MORE = {
    "float32": [],
    "bfloat16": ["--dtype", "bfloat16"],
    "lora": ["--lora", "2"],
    "lora in bfloat16": ["--lora", "2", "--dtype", "bfloat16"],
    "compiled": ["--compile"],
}


@pytest.mark.parametrize("name", MORE)
def test_weights_are_taken_anew_for_each_rollout(name):
    """Two rollouts, with an update between them: each is drawn with the probabilities of the
    weights that are there, to 1e-4 in float32; in bfloat16 to what its rounding makes."""
    run = Compute(parse(RolloutOptions, ["--device", "cpu", *MORE[name]]))
    run.compile, run.tokenizer = name == "compiled", SimpleNamespace(ends=(END,))
    m = run.adapt(run.place(model(torch.float32)))
    near, found = 0.05 if "bfloat16" in name else 1e-4, []
    for _ in range(2):
        rollout = run.sample(m, [([1, 2, 3],), ([4],)], 12, group=4)
        with run.autocast():
            logp = m.logprobs(rollout.ids, rollout.mask).detach()
        torch.testing.assert_close(rollout.logp, logp, rtol=0, atol=near)
        found.append(rollout)
        with torch.no_grad():
            for p in m.parameters():
                p += p.requires_grad * 0.3 * torch.randn(p.shape, generator=seeded())
    first, second = found
    with run.autocast():
        later = m.logprobs(first.ids, first.mask)
    assert (later - first.logp).abs().max() > 2 * near  # the update is seen


def seeded():
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("group, ends", [(1, (END,)), (3, (END,)), (3, (4, END))])
def test_sampled_logprobs_are_the_recomputed_ones(group, ends):
    m, prompts = model(torch.float32), [[1, 2, 3, 4, 5, 6], [7], [3, 9, 4]]
    s = sample(m, prompts, 20, ends, 0.8, torch.Generator().manual_seed(0), group)
    assert s.ids.shape == s.mask.shape == s.logp.shape == (3 * group, s.ids.size(1))
    assert s.logp.dtype == torch.float32
    torch.testing.assert_close(s.logp, m.logprobs(s.ids, s.mask, 0.8).detach(), rtol=0, atol=1e-4)
    for i, (ids, mask, finished) in enumerate(zip(s.ids, s.mask, s.finished)):
        prompt, n = prompts[i // group], mask.sum().item()
        assert ids[: len(prompt)].tolist() == prompt  # row i·group + j answers prompt i
        place = range(len(prompt), len(prompt) + n)  # the response, without a gap
        assert mask.nonzero()[:, 0].tolist() == list(place)
        response = ids[mask].tolist()
        assert not {*ends} & {*response[:-1]} and finished == (response[-1] in ends)
        assert finished or n == 20
        assert (ids[len(prompt) + n :] == 0).all()
    assert s.finished.any() and not s.finished.all()  # so that both cases were seen


def test_a_prompt_alone_is_sampled_as_in_a_batch():
    """The uniforms are drawn row by row up front: neither the other prompts nor the dropping of
    ended rows changes a sample."""
    m, prompts = model(), [[1, 2, 3, 4, 5, 6], [7], [3, 9, 4], [1]]
    generator = torch.Generator().manual_seed(5)
    together = sample(m, prompts, 20, (END,), generator=generator)
    generator.manual_seed(5)
    for i, prompt in enumerate(prompts):
        alone = sample(m, [prompt], 20, (END,), generator=generator)
        assert alone.ids[alone.mask].tolist() == together.ids[i][together.mask[i]].tolist()


def test_samples_follow_the_distribution():
    """20,000 one-token samples against softmax(logits / 0.9): each of 11 shares is within 5
    standard errors (p < 1e-5)."""
    m, n = model(), 20_000
    p = (m(torch.tensor([[3, 4]]))[0, -1] / 0.9).softmax(-1)
    s = sample(m, [[3, 4]], 1, (END,), 0.9, torch.Generator().manual_seed(0), group=n)
    share = torch.bincount(s.ids[:, 2], minlength=11) / n
    assert ((share - p).abs() <= 5 * (p * (1 - p) / n).sqrt()).all()


def test_samples_can_be_trained_on():
    m = model(torch.float32)
    s = sample(m, [[1, 2], [3]], 4, (END,), generator=torch.Generator().manual_seed(0))
    m.logprobs(s.ids, s.mask).sum().backward()
    assert m.wte.weight.grad.abs().sum() > 0


def test_too_long_a_prompt_is_refused_with_the_numbers():
    with pytest.raises(AssertionError, match="30 .* 29"):
        sample(model(), [[1] * 30], 3, (END,))


def test_nothing_of_a_rollout_stays():
    """What a rollout makes ends with it, without the garbage collector: a copy of all weights under
    autocast is among it."""
    gc.disable()
    try:
        for config in (dict(), dict(llama=True)):
            m = GPT(GPTConfig(11, 32, 2, 2, 8, **config))
            held = weakref.ref(m.blocks[0].up.weight)
            sample(m, [[1, 2], [3]], 6, (END,), group=2)
            del m
            assert held() is None
    finally:
        gc.enable()

"""The model in gpt.py: causality, the cache, sampling, log-probs and files."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

import gpt
import head
import packing
from gpt import GPT, GPTConfig, ScalarGPT, load, save
from packing import before, last_token, pack

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


def plain_hidden(m, row):
    """The states of one row, by the textbook: softmax(Q K^T / sqrt(D) + causal) V in each head."""
    H, _, D = m.config.heads()
    causal = torch.full((len(row), len(row)), -math.inf).triu(1).to(m.wte.weight)
    x = m.wte.weight[row] + m.wpe.weight[: len(row)]
    for block in m.blocks:
        qkv = block.attention.qkv(block.norm_1(x)).view(len(row), 3, H, D)
        q, k, v = qkv.permute(1, 2, 0, 3)
        y = (q @ k.mT / math.sqrt(D) + causal).softmax(-1) @ v
        x = x + block.attention.proj(y.transpose(0, 1).flatten(1))
        h = F.gelu(block.up(block.norm_2(x)), approximate="tanh")
        x = x + block.down(h)
    return m.norm(x)


def plain_logprobs(m, ids, mask, temperature=1.0):
    """The full-logits formula, one row after the other: log-softmax over V of every position,
    gathered at the next token."""
    rows = []
    for row, marked in zip(ids, mask):
        logits = F.linear(plain_hidden(m, row), m.wte.weight)
        logp = (logits[:-1] / temperature).log_softmax(-1).gather(1, row[1:, None])[:, 0]
        rows.append(torch.where(marked[1:], logp, 0.0))
    return F.pad(torch.stack(rows), (1, 0))


def test_weights_are_the_seed_s_and_the_toy_size_is_small():
    a, b, c = GPT(SMALL, 3), GPT(SMALL, 3), GPT(SMALL, 4)
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters()))
    assert not torch.equal(a.wte.weight, c.wte.weight)
    size = sum(p.numel() for p in GPT(GPTConfig()).parameters())
    assert size == 891_648  # V·C + T·C + 4 (12 C² + 13 C) + 2 C


def drawn_weights(model):
    """{a weight's name: what it was made of}, from one stream of N(0, 1): the standard deviation
    of each, by which its entries are divided"""
    C, L = model.config.n_embd, model.config.n_layer
    for name, p in model.named_parameters():
        std = 0.02 / math.sqrt(2 * L) if "proj" in name or "down" in name else 0.02
        std = 1 / math.sqrt(C + 1) if name == "head.weight" else std
        if p.dim() == 2:
            yield name, p.detach() / std
        else:
            assert (p == ("norm" in name and "weight" in name)).all(), name  # norms 1, biases 0


@pytest.mark.parametrize("more", [{}, {"tied": False}, {"llama": True, "tied": False}])
def test_initial_weights(more):
    """N(0, 0.02), what writes into the residual stream N(0, 0.02 / √(2 n_layer)), a scalar head
    N(0, 1 / √(C + 1)), norms 1, biases 0: to the bit those of one stream of draws."""
    config = GPTConfig(64, 32, 3, 2, 32, **more)
    for model in (GPT(config, 5), ScalarGPT(config, 5)):
        generator = torch.Generator().manual_seed(5)
        for name, z in drawn_weights(model):
            if name == "head.weight":
                generator.manual_seed(5)
            expected = torch.empty_like(z).normal_(generator=generator)
            torch.testing.assert_close(z, expected, rtol=1e-5, atol=1e-6, msg=name)


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
    if chunked:  # two rows of logits per chunk, computed again in the backward pass
        monkeypatch.setattr(head, "TABLE", {"cpu": 0})
        monkeypatch.setattr(head, "CHUNK", {"cpu": 2 * 8 * SMALL.vocab_size})
    m, (ids, mask) = model(), ragged()
    weight = torch.randn(3, 7, dtype=torch.float64)
    grads = []
    for logp in (m.logprobs(ids, mask, temperature), plain_logprobs(m, ids, mask, temperature)):
        grads.append((logp.detach(), torch.autograd.grad((logp * weight).sum(), m.parameters())))
    torch.testing.assert_close(grads[0][0], grads[1][0], rtol=1e-12, atol=1e-12)
    for a, b in zip(grads[0][1], grads[1][1]):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


ROWS = {  # (prompt, response) each
    "ragged": [([1, 2, 3], [4, 10]), ([1], [2, 3, 4, 5, 10]), ([5, 6], [])],
    "pairs": [([1, 2, 3, 4, 5, 6], [7, 10]), ([1, 2, 3, 4, 5, 6], [8, 9, 10])],
    "group": [([4, 3, 2, 1] * 3, [i, 10]) for i in range(5)] + [([4, 3, 1], [2, 10])],
    "groups": [([1, 2, 1, 2, i % 2], [i, i, 10][i % 3 :]) for i in range(7)],
    "begins alike": [([1] * n, [2, 3][:n]) for n in (1, 2, 3, 5)] + [([1, 1, 2], [3])],
    "one token": [([3], [4])] * 3 + [([3], [5])] + [([2], [4])],
    "equal rows": [([1, 2, 3], [4, 10])] * 3,
    "even, nothing shared": [([i, 1, 2], [3, 10]) for i in range(4)],
    "nothing asked": [([1, 2], []), ([3], [])],
}


def table(rows):
    """-> ids, mask (B, T)"""
    ids = torch.zeros(len(rows), max(len(x) + len(y) for x, y in rows), dtype=torch.int64)
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for i, (x, y) in enumerate(rows):
        ids[i, : len(x) + len(y)] = torch.tensor(x + y)
        mask[i, len(x) : len(x) + len(y)] = True
    return ids, mask


@pytest.mark.parametrize("call", [0, 2**14])
@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("dtype, near", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_what_is_skipped_and_shared_changes_nothing(name, apart, call, dtype, near, monkeypatch):
    """Log-probs, values and scores, and all gradients, of the plain padded formula; with columns
    that are attended on their own wherever rows begin alike, and nowhere; with rows in as many
    calls of attention as there may be, and in one."""
    monkeypatch.setattr(packing, "SPLIT_BELOW", 2.0 if apart else 0.0)
    monkeypatch.setattr(packing, "CALL", call)
    (ids, mask), m = table(ROWS[name]), model(dtype)
    judge = ScalarGPT(SMALL, trunk=model(dtype)).to(dtype)
    packed, ends = pack(ids, before(mask)), last_token(mask)
    weight = torch.randn(ids.shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    plain = torch.stack([plain_hidden(judge.trunk, row) @ judge.head.weight[0] for row in ids])
    plain = plain + judge.head.bias
    found = [
        m.logprobs(ids, mask, packed=packed),
        judge.values_before(ids, mask),
        judge.values(ids),
    ]
    expected = [plain_logprobs(m, ids, mask), F.pad(plain[:, :-1], (1, 0)) * mask, plain]
    if mask.any(1).all():
        found.append(judge.score(ids, mask)[:, None])
        expected.append(plain[ends][:, None])
    weights, sums = [p for x in (m, judge) for p in x.parameters()], []
    for tables in (found, expected):
        sums.append(sum((x * weight[:, : x.size(1)]).sum() for x in tables))
        sums[-1] = sums[-1] + 0 * sum(p.sum() for p in weights)
    for x, y in zip(found, expected):
        torch.testing.assert_close(x, y, rtol=near, atol=near)
    for x, y in zip(*(torch.autograd.grad(x, weights) for x in sums)):
        torch.testing.assert_close(x, y, rtol=10 * near, atol=10 * near * y.abs().max().item())


def test_rows_of_like_length_are_attended_together(monkeypatch):
    """By hand, in pairs of a query and a key. 99 rows of one token and one of 1,000: alone the 99
    cost 99 pairs, with the other 99 · 1000². Rows of 100, 200 and 400 tokens, after 100 columns
    that are attended apart, need 0, 100 · 200 and 300 · 400 pairs."""
    assert packing._cuts(torch.tensor([1] * 99 + [1000]), 0) == [0, 99, 100]
    assert packing._cuts(torch.tensor([64] * 50), 0) == [0, 50]
    for call, cuts in ((2 * 100_000, [0, 3]), (2 * 100_000 - 1, [0, 2, 3]), (0, [0, 1, 2, 3])):
        monkeypatch.setattr(packing, "CALL", call)
        assert packing._cuts(torch.tensor([100, 200, 400]), 100) == cuts
    monkeypatch.setattr(packing, "CALL", 0)
    assert len(packing._cuts(torch.arange(1, 99), 0)) == 5  # four calls at most


def test_padding_repeats_the_last_token_of_its_row():
    ids, mask = table(ROWS["ragged"])
    packed = pack(ids, mask | (torch.arange(ids.size(1)) == 0))
    for row, real in zip(packed.rows, packing.row_lengths(mask)):
        assert (row[real:] == row[max(0, int(real) - 1)]).all()


def test_tokens_are_computed_once_and_no_padding():
    """By hand: of a pair, the prompt's six and what stands before the other response tokens. The
    first ragged row's prompt is how the second begins."""
    for name, tokens, p in (("ragged", 5 + 1, 3), ("pairs", 6 + 1 + 2, 6), ("group", 19, 12)):
        ids, mask = table(ROWS[name])
        packed = pack(ids, before(mask))
        assert (len(packed.ids), len(packed.places)) == (tokens, mask.sum().item()), name
        assert p == (0 if packed.prefixes is None else packed.prefixes.size(1)), name
        found = ids.flatten()[packed.places]
        assert torch.equal(packed.ids[packed.wanted], found) and torch.equal(
            packed.position[packed.wanted], packed.places % ids.size(1)
        )
    even, mask = table(ROWS["even, nothing shared"])
    assert pack(even, before(mask)).gather is None  # no row is gathered


def test_a_single_shared_token_is_not_worth_gathering_every_row():
    """Two even rows of 50 begin alike: with 1 token of 98 nothing is gathered, with 10 they are
    computed once; where a row is padded anyway, the one token too."""
    ids = torch.stack([torch.arange(50), torch.arange(50, 100)])
    mask = torch.arange(50) >= 30
    for together, tokens in ((1, 98), (10, 88)):
        ids[1, :together] = ids[0, :together]
        packed = pack(ids, before(mask.expand(2, -1)))
        assert len(packed.ids) == tokens and (packed.gather is None) == (together == 1)
    ids[1] = torch.tensor([0, *range(50, 99)])
    shorter = torch.stack([mask, mask & (torch.arange(50) < 40)])
    assert len(pack(ids, before(shorter)).ids) == 49 + 39 - 1


def test_logprobs_take_a_packing_and_run_under_fake_tensors():
    m, (ids, mask) = model(), ragged()
    packed = pack(ids, before(mask))
    assert torch.equal(m.logprobs(ids, mask, packed=packed), m.logprobs(ids, mask))
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        ids, mask, packed = tree_map_only(torch.Tensor, fake.from_tensor, (ids, mask, packed))
        out = GPT(SMALL).logprobs(ids, mask, packed=packed)
    assert out.shape == (3, 7)


def test_logprobs_never_hold_logits_of_prompt_positions(monkeypatch):
    m, (ids, mask) = model(), ragged()
    seen, score = [], gpt.target_logprobs
    counted = lambda h, *rest: (seen.append(len(h)), score(h, *rest))[1]  # noqa: E731
    monkeypatch.setattr(gpt, "target_logprobs", counted)
    m.logprobs(ids, mask)
    assert seen == [mask.sum().item()]


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_entropy_is_that_of_the_distribution(temperature):
    m, (ids, mask) = model(), ragged()
    _, entropy = m.logprobs(ids, mask, temperature, entropy=True)
    p = (m(ids)[:, :-1] / temperature).softmax(-1)
    expected = torch.where(mask[:, 1:], -(p * p.log()).sum(-1), 0.0)
    torch.testing.assert_close(entropy, F.pad(expected, (1, 0)))
    assert entropy.max() <= math.log(11) and not entropy.requires_grad


def test_log_probs_and_entropies_of_bfloat16_weights_are_float32():
    """The logits are bfloat16's, their softmax is not."""
    m, (ids, mask) = model(torch.bfloat16), ragged()
    found = m.logprobs(ids, mask, 0.7, entropy=True)
    log_p = (m(ids)[:, :-1].float() / 0.7).log_softmax(-1)
    logp = log_p.gather(2, ids[:, 1:, None])[:, :, 0]
    entropy = -(log_p.exp() * log_p).sum(-1)
    for x, expected in zip(found, (logp, entropy)):
        assert x.dtype == torch.float32
        expected = F.pad(torch.where(mask[:, 1:], expected, 0.0), (1, 0))
        torch.testing.assert_close(x, expected, rtol=1e-5, atol=1e-5)


def test_padding_and_row_order_change_nothing():
    m, (ids, mask) = model(), ragged()
    logp = m.logprobs(ids, mask)
    wide_ids = F.pad(ids, (0, 5), value=7)
    wide = m.logprobs(wide_ids, F.pad(mask, (0, 5)))[:, :7]
    order = torch.tensor([2, 0, 1])
    moved, alone = m.logprobs(ids[order], mask[order]), m.logprobs(ids[:1, :4], mask[:1, :4])
    for found, expected in ((wide, logp), (moved, logp[order]), (alone, logp[:1, :4])):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_scalar_model_reads_the_tokens_so_far():
    m, (ids, _) = ScalarGPT(SMALL), ragged()
    values = m.values(ids)
    changed = ids.clone()
    changed[:, 5:] = 1
    assert values.shape == (3, 7) and values.dtype == torch.float32
    torch.testing.assert_close(values[:, :5], m.values(changed)[:, :5])


def test_a_scalar_head_is_read_in_float32_under_bfloat16():
    """Scores near 2, where bfloat16 knows multiples of 1/64 alone, are the float32 product of the
    states, which are bfloat16's, with the head's own weights."""
    m, (ids, mask) = ScalarGPT(SMALL), ragged()
    m.head.bias.data.fill_(2.001)
    states, hidden = [], m.trunk.hidden
    m.trunk.hidden = lambda at: (states.append(hidden(at).bfloat16()), states[-1])[1]
    with torch.autocast("cpu", torch.bfloat16):
        found = m.score(ids, mask)
    expected = states[-1].float() @ m.head.weight[0] + 2.001
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert found.dtype == torch.float32 and (found - found.bfloat16()).abs().max() > 1e-4


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
    content = (tmp_path / "m.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(content[: len(content) // 2])
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

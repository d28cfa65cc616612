"""The enumerable world, its exact evaluation and its oracle; that DPO finds π*, and that broken DPO does not."""
import argparse
import copy
import math
from collections import Counter

import pytest
import torch
from conftest import lines, main, run

import common
import data
from data import oracle
from dpo import dpo_loss, ipo_loss
from evaluate import choose_yardstick, open_checkpoint
from gpt import GPT, GPTConfig, load
from kto import kto_loss
from orpo import orpo_loss
from simpo import simpo_loss

WORLD = data.task("exact")
R, PAIRS, LABELS = (torch.from_numpy(x) for x in (WORLD.r, WORLD.pairs, WORLD.labels))
LOG_D = torch.from_numpy(WORLD.d).log()  # stands for π_ref where no model is needed
TOKENIZER = data.tokenizer(own=WORLD.tokenizer)
CPU = common.Compute(argparse.Namespace(device="cpu", dtype="float32"))


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


# ---- the world


def test_forty_outcomes_and_four_tokens():
    assert len(WORLD.outcomes) == len(set(WORLD.outcomes)) == 1 + 3 + 9 + 27 and WORLD.r.shape == WORLD.d.shape == (4, 40)
    assert TOKENIZER.size == 4 and TOKENIZER.end_id == 3
    assert TOKENIZER.answer("") == [3] and TOKENIZER.answer("ab") == [0, 1, 3] and TOKENIZER.answer("abc") == [0, 1, 2]
    assert not any(a != b and b.startswith(a) for a in WORLD.contexts for b in WORLD.contexts)
    assert [len(x) for x in (data.task("exact:1").outcomes, data.task("exact:1").contexts)] == [4, 4]
    assert data.tokenizer(own=data.task("exact:1").tokenizer).answer("a") == [0]


def test_the_distribution_of_demonstrations():
    """Every outcome has at least 0.2/40; KL(d‖uniform) is far from 0; π* of d lies 0.5 to 2 nats from d."""
    assert WORLD.d.sum(1) == pytest.approx([1.0] * 4) and WORLD.d.min() >= 0.2 / 40
    assert 0.2 < oracle.kl(LOG_D, torch.full_like(LOG_D, -math.log(40))).mean() < 1
    star = oracle.star(LOG_D, R, 0.5)
    assert 0.5 < oracle.kl(star, LOG_D).mean() < 2
    assert (star.exp() * R).sum(1).mean() - (LOG_D.exp() * R).sum(1).mean() > 1
    again = data.task("exact")
    assert (again.r == WORLD.r).all() and (again.d == WORLD.d).all() and (data.task("exact:1").r[0, :4] != WORLD.r[0, :4]).any()


def test_pairs_are_two_different_demonstrations_with_bradley_terry_labels():
    """Row (x, y, z) by hand: 1/4 of a prompt, shown as (y, z) or (z, y), the second drawn until it differs, then σ(r_y - r_z)."""
    x, y, z = 1, 7, 30
    d, r = WORLD.d[x], WORLD.r[x]
    shown = d[y] * d[z] / (1 - d[y]) + d[z] * d[y] / (1 - d[z])
    assert WORLD.pairs[x, y, z] == pytest.approx(shown * sigmoid(r[y] - r[z]) / 4)
    assert WORLD.pairs.sum() == pytest.approx(1) and (WORLD.pairs[:, range(40), range(40)] == 0).all()
    p = sum(d[other] * sigmoid(r[y] - r[other]) for other in range(40))
    assert WORLD.labels[x, y].tolist() == pytest.approx([d[y] * (1 - p) / 4, d[y] * p / 4])


@pytest.mark.parametrize("what, table", [("demonstrations", WORLD.d / 4), ("preferences", WORLD.pairs), ("feedback", WORLD.labels)])
def test_rows_are_drawn_from_the_tables(what, table):
    """Of 200,000 rows, each cell within six standard errors (chance of a false alarm below 1e-4), and a function of the seed."""
    n, names = 200_000, (WORLD.contexts, WORLD.outcomes, (False, True) if what == "feedback" else WORLD.outcomes)
    counts = Counter(getattr(WORLD, what)(n, 0))
    for i, p in enumerate(table.flatten().tolist()):
        index = torch.unravel_index(torch.tensor(i), table.shape)
        row = tuple(names[axis][int(j)] for axis, j in enumerate(index))
        assert abs(counts.pop(row, 0) - n * p) <= 6 * math.sqrt(n * p) + 1, row
    assert not counts
    assert getattr(WORLD, what)(9, 1) == getattr(WORLD, what)(9, 1) != getattr(WORLD, what)(9, 2)


def test_rewards_and_prompts():
    assert WORLD.reward("bb", "bab") == WORLD.r[1, WORLD.outcomes.index("bab")] == WORLD.reward("bb", "bab", ended=False)
    assert {p for p, _ in WORLD.prompts(4, 0)} == {p for p, _ in WORLD.prompts(4, 0, split="test")} == set(WORLD.contexts)
    with pytest.raises(data.DataError, match="abcd"):
        WORLD.reward("bb", "abcd")
    with pytest.raises(data.DataError, match="'z'"):
        TOKENIZER.encode("az")


# ---- exact evaluation


def model(seed, scale=20):
    m = GPT(GPTConfig(4, 8, 1, 1, 16), seed)
    with torch.no_grad():
        m.wte.weight *= scale
    return m


def test_the_table_is_the_model_s_distribution():
    """Outcome by outcome the product of the plain next-token probabilities; all 40 sum to 1."""
    policy = model(0)
    table = choose_yardstick(CPU, WORLD, TOKENIZER, 8).table(policy)
    assert table.exp().sum(1).tolist() == pytest.approx([1.0] * 4, abs=1e-5)
    for i, x in enumerate(WORLD.contexts):
        for j in (0, 2, 11, 39):
            ids, y = TOKENIZER.encode(x), TOKENIZER.answer(WORLD.outcomes[j])
            probs = policy(torch.tensor([ids + y]))[0].softmax(-1)[len(ids) - 1 : -1]
            assert table[i, j].exp().item() == pytest.approx(math.prod(p[t].item() for p, t in zip(probs, y)), rel=1e-4)


def test_probabilities_that_do_not_sum_to_one_are_noticed():
    class Leaky(GPT):
        def logprobs(self, *args, **more):
            return super().logprobs(*args, **more) * 1.01

    with pytest.raises(AssertionError, match="sum to"):
        choose_yardstick(CPU, WORLD, TOKENIZER, 8).table(Leaky(GPTConfig(4, 8, 1, 1, 16)))


def test_kl_tv_and_star_by_hand():
    """π_ref = (1/2, 1/2), r = (0, β log 3): π* = (1/4, 3/4), KL(π*‖π_ref) = 3/4 log 3/2 - 1/4 log 2, TV 1/4."""
    ref, r = torch.tensor([[0.5, 0.5]]).double().log(), torch.tensor([[0.0, 0.5 * math.log(3)]]).double()
    star = oracle.star(ref, r, 0.5)
    assert star.exp()[0].tolist() == pytest.approx([0.25, 0.75])
    assert oracle.kl(star, ref).item() == pytest.approx(0.75 * math.log(1.5) - 0.25 * math.log(2))
    assert oracle.tv(star, ref).item() == pytest.approx(0.25)
    assert oracle.kl(torch.tensor([[0.0, -torch.inf]]), torch.tensor([[0.5, 0.5]]).log()).item() == pytest.approx(math.log(2))


def test_figures_by_enumeration(monkeypatch):
    """exact:1 with π = (1/2, 1/4, 1/8, 1/8), π_ref = 1/4 each, and r = (0, 1, 1, -1) for "", a, b, c at each prompt.
    E[r] = 1/4; KL = log 4 - H, H = 7/4 log 2; of the 16 (y, y') of equal π_ref: "" wins over c, draws with itself:
    win rate 1/2 (1 + 1/2)/4 + (1/4 + 1/8)(1 + 1 + 1/2 + 1/2)/4 + 1/8 (1/2)/4 = 0.484375. Length 1: a symbol or the end."""
    world = data.task("exact:1")
    world.r[:] = [0, 1, 1, -1]
    yardstick = choose_yardstick(CPU, world, data.tokenizer(own=world.tokenizer), 8, implicit="sum")
    policy, ref = object(), object()
    p = torch.tensor([[0.5, 0.25, 0.125, 0.125]] * 4).double().log()
    monkeypatch.setattr(yardstick, "table", lambda m: p if m is policy else torch.full((4, 4), 0.25).double().log())
    f, lines = yardstick.measure(policy, ref)
    kl, h = math.log(4) - 1.75 * math.log(2), 1.75 * math.log(2)
    expected = {"reward": 0.25, "ref_reward": 0.25, "kl": kl, "win_rate": 0.484375, "length": 1, "ref_length": 1, "ended": 0.5,
                "entropy": h, "objective": 0.25 - 0.5 * kl, "prompts": 4, "outcomes": 4}  # fmt: skip
    z = 1 + 2 * math.exp(2) + math.exp(-2)  # π* = exp(2r)/z
    star = [1 / z, math.exp(2) / z, math.exp(2) / z, math.exp(-2) / z]
    expected["kl_star"] = -h - sum(q * math.log(s) for q, s in zip((0.5, 0.25, 0.125, 0.125), star))
    expected["tv_star"] = sum(abs(q - s) for q, s in zip((0.5, 0.25, 0.125, 0.125), star)) / 2
    assert len(f.pop("frontier")) == 81 and f == pytest.approx(expected)
    best = math.log(z / 4) * 0.5  # J(π*) = β log Z
    assert best - f["objective"] == pytest.approx(0.5 * f["kl_star"])
    text = "\n".join(lines)
    assert f"{expected['kl_star']:.4f}" in text and "-> (empty)" in text and f"{math.log(4):.3f} nats" in text


# ---- the oracle


def toy(p):
    """One prompt, two responses of one token, the first preferred with probability p."""
    return torch.tensor([[[0, p], [1 - p, 0]]]).double()


def gap(log_p):
    return (log_p[0, 0] - log_p[0, 1]).item()


def test_optima_of_two_outcomes_by_hand():
    """p = 0.9, π_ref = (0.3, 0.7), h = log-odds of π over those of π_ref. DPO: σ(βh) = p. cDPO: σ(βh) = (1-ε)p + ε(1-p).
    IPO: p(h - c)² + (1-p)(h + c)² is least at h = c(2p - 1), c = 1/(2τ). SimPO (no π_ref): p σ(γ - βh) = (1-p) σ(γ + βh)."""
    pairs, ref = toy(0.9), torch.tensor([[0.3, 0.7]]).double().log()
    start = gap(ref)

    def h(loss):
        return gap(oracle.minimise(loss, ref)) - start

    assert h(lambda q: oracle.dpo(q, ref, pairs, 0.5)) == pytest.approx(math.log(9) / 0.5, rel=1e-6)
    assert h(lambda q: oracle.dpo(q, ref, pairs, 0.5, 0.1)) == pytest.approx(math.log(0.82 / 0.18) / 0.5, rel=1e-6)
    n = torch.tensor([1, 1])
    assert h(lambda q: oracle.ipo(q, ref, pairs, n, 0.25)) == pytest.approx(2 * 0.8, rel=1e-6)
    s = h(lambda q: oracle.simpo(q, pairs, n, 2.0, 0.5)) + start
    assert 0.9 * sigmoid(0.5 - 2 * s) == pytest.approx(0.1 * sigmoid(0.5 + 2 * s), rel=1e-6)


def test_orpo_s_optimum_of_two_outcomes_by_hand():
    """One-token answers of probability q and 1-q: o_w - o_l = 2 log(q/(1-q)) = 2x. Loss in x = logit q:
    -p log σ(x) - (1-p) log σ(-x) - λ[p log σ(2x) + (1-p) log σ(-2x)], whose slope σ(x) - p + 2λ(σ(2x) - p) is 0 at the minimum."""
    x = gap(oracle.minimise(lambda q: oracle.orpo(q, toy(0.8), torch.tensor([1, 1]), 0.25), torch.zeros(1, 2).double()))
    assert sigmoid(x) - 0.8 + 0.5 * (sigmoid(2 * x) - 0.8) == pytest.approx(0, abs=1e-8) and 0.5 < x < 1.4


def test_the_losses_on_paper_agree_with_the_scripts_losses():
    """At a random table the population loss is the pairs' mean of what dpo.py computes from the four log-probs."""
    log_p = torch.randn(4, 40, generator=torch.Generator().manual_seed(0)).double().log_softmax(-1)
    x, w, l = PAIRS.nonzero().unbind(1)
    n = torch.tensor([min(len(y) + 1, 3) for y in WORLD.outcomes])
    four = log_p[x, w], log_p[x, l], LOG_D[x, w], LOG_D[x, l]
    mean = (PAIRS[x, w, l] * dpo_loss(*four, beta=0.5, label_smoothing=0.1)).sum()
    assert oracle.dpo(log_p, LOG_D, PAIRS, 0.5, 0.1).item() == pytest.approx(mean.item())
    mean = (PAIRS[x, w, l] * ipo_loss(*(logp / n[y] for logp, y in zip(four, (w, l, w, l))), tau=0.3)).sum()
    assert oracle.ipo(log_p, LOG_D, PAIRS, n, 0.3).item() == pytest.approx(mean.item())


OPTIONS = {"pairs": 0, "sft_weight": 0.0, "loss": "dpo", "beta": 0.5, "label_smoothing": 0.0, "tau": 0.3, "ipo_sum": False}


def test_the_optima_of_the_world():
    """DPO's is π*, whatever the pairs' distribution; the others' lie apart, finite, 0.5 to 2 nats from π_ref (ORPO's 0.1 to 0.2),
    and are found from another start too."""
    star, n = oracle.star(LOG_D, R, 0.5), torch.tensor([min(len(y) + 1, 3) for y in WORLD.outcomes])
    flat = torch.from_numpy(WORLD.beats * (1 - torch.eye(40).numpy()) / (4 * 780))
    for pairs in (PAIRS, flat):
        assert oracle.kl(star, oracle.minimise(lambda q, pairs=pairs: oracle.dpo(q, LOG_D, pairs, 0.5), LOG_D)).max() < 1e-10
    assert oracle.kl(star, oracle.aim(WORLD, LOG_D, "dpo", OPTIONS)[1]).max() < 1e-10
    assert oracle.aim(WORLD, LOG_D, "dpo", OPTIONS | {"pairs": 300}) is None
    assert oracle.aim(WORLD, LOG_D, "dpo", OPTIONS | {"loss": "robust"}) is None and oracle.aim(WORLD, LOG_D, "sft", {}) is None
    losses = {"cdpo": lambda q: oracle.dpo(q, LOG_D, PAIRS, 0.5, 0.1), "ipo": lambda q: oracle.ipo(q, LOG_D, PAIRS, n, 0.3),
              "simpo": lambda q: oracle.simpo(q, PAIRS, n, 2.0, 0.5), "orpo": lambda q: oracle.orpo(q, PAIRS, n, 0.25)}  # fmt: skip
    other = torch.randn(4, 40, generator=torch.Generator().manual_seed(1)).double()
    for name, loss in losses.items():
        optimum = oracle.minimise(loss, LOG_D)
        low, high = (0.1, 0.2) if name == "orpo" else (0.5, 2)
        assert low < oracle.kl(optimum, LOG_D).mean() < high, name
        assert oracle.kl(optimum, star).mean() > 0.03 and oracle.kl(optimum, oracle.minimise(loss, other)).max() < 1e-8, name


def test_the_options_reach_the_oracle():
    """γ is γ/β times β, λ is --lam; KTO's weights and β set its limit; at β ≥ 1 there is none here."""
    n = torch.tensor([min(len(y) + 1, 3) for y in WORLD.outcomes])
    loss, optimum = oracle.aim(WORLD, None, "simpo", {"beta": 2.0, "gamma_beta_ratio": 0.25})
    assert loss(LOG_D).item() == pytest.approx(oracle.simpo(LOG_D, PAIRS, n, 2.0, 0.5).item())
    assert loss(optimum) < loss(LOG_D)
    loss, _ = oracle.aim(WORLD, None, "orpo", {"lam": 0.25})
    assert loss(LOG_D).item() == pytest.approx(oracle.orpo(LOG_D, PAIRS, n, 0.25).item())
    o = {"beta": 0.4, "w_desirable": 1.2, "w_undesirable": 1.0}
    loss, limit = oracle.aim(WORLD, LOG_D, "kto", o)
    assert oracle.tv(limit, oracle.kto_limit(LOG_D, LABELS, 0.4, 1.2, 1.0)[0]).max() < 1e-9 and loss(limit) < loss(LOG_D)
    assert oracle.aim(WORLD, LOG_D, "kto", o | {"beta": 1.0}) is None and oracle.aim(WORLD, None, "kto", o) is None


def test_weights_that_reject_everything_have_no_limit():
    with pytest.raises(oracle.NoOptimum, match="to keep"):
        oracle.kto_limit(LOG_D, LABELS, 0.5, w_undesirable=13.0)


def test_kto_goes_to_the_boundary():
    """Descent on the population's KTO loss, ẑ recomputed and detached, ends where kto_limit says: rejected outcomes vanish, ẑ = 0.
    By hand: of two outcomes, one desirable with probability 0.9, the other with 0.2, all mass goes to the first, so that with
    π_ref = 1/4 on it and β = 1, u = log 4: σ(u) = 4/5. Loss ½[0.9 (1 - 4/5) + 0.1 · 4/5 + 0.2] = 0.23."""
    labels = torch.tensor([[[0.05, 0.45], [0.4, 0.1]]]).double()
    limit, infimum = oracle.kto_limit(torch.tensor([[0.25, 0.75]]).double().log(), labels, 1.0)
    assert limit.exp()[0].tolist() == pytest.approx([1.0, 0.0]) and infimum.item() == pytest.approx(0.23)
    limit, infimum = oracle.kto_limit(LOG_D, LABELS, 0.5)
    vanished = LABELS[..., 0] >= LABELS[..., 1]
    assert ((limit == -torch.inf) == vanished).all() and limit.exp().sum(1).tolist() == pytest.approx([1.0] * 4)
    free = oracle.minimise(lambda q: oracle.kto(q, LOG_D, LABELS, 0.5), LOG_D, 1000, converged=False)
    assert 0 <= oracle.kto(free, LOG_D, LABELS, 0.5) - infimum < 1e-5 and oracle.tv(free, limit).max() < 1e-3


# ---- the methods against the truth


def descend(ref, normalise=False, uniform=False, drop_end=False, steps=300):
    """DPO on the whole population at once, a transformer as the policy, dpo_loss as it stands. -> mean KL(π‖π*)"""
    yardstick = choose_yardstick(CPU, WORLD, TOKENIZER, 8, implicit="sum")
    policy = copy.deepcopy(ref)
    batch = yardstick.batch
    mask = batch.mask & (batch.ids != TOKENIZER.end_id) if drop_end else batch.mask
    length = mask.sum(1).clamp(min=1) if normalise else torch.ones(len(mask))
    x, w, l = PAIRS.nonzero().unbind(1)
    weight, w, l = PAIRS[x, w, l], x * 40 + w, x * 40 + l
    with torch.no_grad():
        ref_logp = torch.zeros(len(mask)) if uniform else ref.logprobs(batch.ids, mask).sum(1) / length
    optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    for _ in range(steps):
        logp = policy.logprobs(batch.ids, mask).sum(1) / length
        (weight * dpo_loss(logp[w], logp[l], ref_logp[w], ref_logp[l], beta=0.5)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return yardstick.measure(policy, ref)[0]["kl_star"]


def test_dpo_finds_the_optimum_and_its_three_usual_mistakes_do_not(world):
    """Negative controls: a mean for the sum, a uniform reference, an end token left out of the sum."""
    ref = load(world / "out/exact/sft.pt")[0]
    right = descend(ref)
    assert right < 0.02
    for mistake in ("normalise", "uniform", "drop_end"):
        assert descend(ref, **{mistake: True}) > max(0.1, 10 * right), mistake


def test_equal_rows_are_scored_once_and_count_as_often_as_they_stand(world):
    """A batch of 64 pairs with many twins: its loss and gradient are those of the 128 rows one by one."""
    policy = load(world / "out/exact/sft.pt")[0].double()
    pairs, _ = data.encode(WORLD.preferences(64, 0), TOKENIZER, 8)
    rows = data.sides(pairs * 3)
    gradients = []
    for batch, pick in ((data.pad(rows), True), (None, False)):
        if pick:
            assert len(batch.ids) < 128 < len(batch.row) == 384 and batch.tokens == sum(len(x) + len(y) for x, y in set(rows))
            logp = batch.spread(policy.logprobs(batch.ids, batch.mask, index=batch.index).sum(1))
        else:
            single = [data.pad([row]) for row in rows]
            logp = torch.cat([policy.logprobs(b.ids, b.mask).sum(1) for b in single])
        loss = dpo_loss(*logp.chunk(2), *torch.zeros(2, 192).double(), beta=0.5).mean()
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, policy.parameters())]))
    assert gradients[0].norm() > 1e-3 and (gradients[0] - gradients[1]).norm() < 1e-9 * gradients[0].norm()


@pytest.mark.slow
def test_few_pairs_many_epochs_overfit(world):
    """300 pairs, 200 epochs: the loss falls to the end; KL(π‖π*) falls by 0.2, then rises by 0.3 and more."""
    done = run("dpo.py", "--task", "exact", "--pairs", 300, "--epochs", 200, "--out", "out/few.pt", "--device", "cpu", cwd=world)
    evals = [line for line in lines(world / "out/few.jsonl") if "eval" in line]
    distance = [line["eval"]["kl_star"] for line in evals]
    loss = [line["loss"] for line in lines(world / "out/few.jsonl") if "loss" in line]
    start = float(open_and_measure(world / "out/exact/sft.pt")["kl_star"])
    assert min(distance) < start - 0.2 and distance[-1] > min(distance) + 0.3 and distance.index(min(distance)) < len(distance) / 2
    assert loss[-1] < loss[len(loss) // 2] < loss[len(loss) // 4] < loss[0]
    printed = [line for line in done.stdout.splitlines() if "kl_star" in line]
    assert len(printed) == 20 and all("loss" in line for line in printed)


def open_and_measure(path):
    policy, tokenizer, _ = open_checkpoint(str(path))
    return choose_yardstick(CPU, WORLD, tokenizer, 8).measure(policy)[0]


def test_evaluate_prints_the_table(world, monkeypatch, capsys):
    monkeypatch.chdir(world)
    short = ["--task", "exact", "--steps", 60, "--batch-size", 512, "--warmup", 5, "--device", "cpu"]
    assert main("dpo", *short, "--out", "out/exact/short.pt") == 0
    final = lines(world / "out/exact/short.jsonl")[-1]["final"]
    assert final["kl_star"] < 1 and final["objective"] > final["ref_reward"] and "kl_se" not in final
    capsys.readouterr()
    assert main("evaluate", "out/exact/short.pt", "--device", "cpu") == 0
    text = capsys.readouterr().out
    for words in (f"{final['kl_star']:.4f}", f"{final['kl_optimum']:.4f}", "KL(·‖own optimum)", "KL(π_ref‖uniform)"):
        assert words in text
    assert text.count(" -> ") == 5 and text.count("E[r]") == 3
    assert main("dpo", *short, "--loss", "robust", "--dtype", "bfloat16", "--out", "out/exact/robust.pt") == 0
    assert "kl_optimum" not in lines(world / "out/exact/robust.jsonl")[-1]["final"]


def test_no_policy_lies_above_the_frontier(world):
    """The record's curve of (KL, E[r]) is π*'s: of 500 policies none lies above a line that touches it, and it has the slope β."""
    curve = torch.tensor(open_and_measure(world / "out/exact/sft.pt")["frontier"], dtype=torch.float64)
    beta = 10 ** (torch.arange(-40, 41) / 20)
    slope = curve.diff(dim=0)[:, 1] / curve.diff(dim=0)[:, 0]
    assert ((slope >= beta[:-1]) & (slope <= beta[1:])).all() and (curve.diff(dim=0) < 0).all()
    policy, tokenizer, _ = open_checkpoint(str(world / "out/exact/sft.pt"))
    log_ref, r = choose_yardstick(CPU, WORLD, tokenizer, 8).table(policy), torch.from_numpy(WORLD.r)
    best = (curve[:, 1] - beta * curve[:, 0])[:, None]  # J of π* at each β
    generator = torch.Generator().manual_seed(0)
    for strength in torch.linspace(0.1, 10, 500):
        tilt = r * torch.rand(1, generator=generator) + torch.randn(r.shape, generator=generator, dtype=torch.float64)
        log_q = (log_ref + strength * tilt).log_softmax(1)
        kl, reward = (log_q.exp() * (log_q - log_ref)).sum(1).mean(), (log_q.exp() * r).sum(1).mean()
        assert (reward - beta * kl <= best.squeeze(1) + 1e-9).all()


def test_kto_is_measured_against_its_limit(world, monkeypatch, capsys):
    monkeypatch.chdir(world)
    short = ["--task", "exact", "--steps", 60, "--batch-size", 512, "--warmup", 5, "--device", "cpu"]
    assert main("kto", *short, "--out", "out/exact/k.pt") == 0
    final = lines(world / "out/exact/k.jsonl")[-1]["final"]
    assert 0 < final["loss_gap"] < 0.05 and 0 < final["tv_optimum"] < 0.5 and "kl_optimum" not in final
    policy, ref = (CPU.frozen(load(world / f"out/exact/{name}.pt")[0]) for name in ("k", "sft"))
    yardstick = choose_yardstick(CPU, WORLD, TOKENIZER, 8)
    log_p, log_ref = yardstick.table(policy), yardstick.table(ref)
    limit, infimum = oracle.kto_limit(log_ref, LABELS, 0.5)
    assert final["tv_optimum"] == pytest.approx(oracle.tv(log_p, limit).mean().item(), rel=1e-4)
    assert final["loss_gap"] == pytest.approx((oracle.kto(log_p, log_ref, LABELS, 0.5) - infimum).item(), rel=1e-3)


def test_orpo_without_an_sft_checkpoint_still_shows_its_own_optimum(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main("orpo", "--task", "exact", "--steps", 4, "--batch-size", 64, "--device", "cpu") == 0
    final = lines(tmp_path / "out/exact/orpo.jsonl")[-1]["final"]
    assert "kl_star" not in final and final["kl_optimum"] > 0
    assert main("evaluate", "out/exact/orpo.pt", "--device", "cpu") == 0
    text = capsys.readouterr().out
    assert text.count(f"KL(·‖own optimum)         {final['kl_optimum']:>10.4f}") == 2 and "win rate and KL are left out" in text


def test_simpo_s_and_orpo_s_losses_agree_with_the_paper_s():
    """At a random table the population loss is the pairs' mean of what the scripts compute."""
    log_p = torch.randn(4, 40, generator=torch.Generator().manual_seed(0)).double().log_softmax(-1)
    x, w, l = PAIRS.nonzero().unbind(1)
    n = torch.tensor([min(len(y) + 1, 3) for y in WORLD.outcomes])
    simpo, orpo = oracle.simpo(log_p, PAIRS, n, 2.0, 0.5), oracle.orpo(log_p, PAIRS, n, 0.25)
    for loss, table, options in ((simpo_loss, simpo, (2.0, 0.5)), (orpo_loss, orpo, (0.25,))):
        mean = (PAIRS[x, w, l] * loss(log_p[x, w], log_p[x, l], n[w], n[l], *options)).sum()
        assert table.item() == pytest.approx(mean.item())
    x, y, label = LABELS.nonzero().unbind(1)
    mean = (LABELS[x, y, label] * kto_loss(log_p[x, y], LOG_D[x, y], label.bool(), torch.tensor(0.3), 0.5, 1.0, 2.0)).sum()
    assert oracle.kto(log_p, LOG_D, LABELS, 0.5, 1.0, 2.0, z=0.3).item() == pytest.approx(mean.item())


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_each_method_reaches_its_own_optimum(seed, tmp_path):
    rows = {"dpo": [], "cdpo": ["--label-smoothing", 0.1], "ipo": ["--loss", "ipo"], "simpo": [], "orpo": [], "kto": []}
    for name, options in rows.items():
        script = name if name in ("simpo", "orpo", "kto") else "dpo"
        run(f"{script}.py", "--task", "exact", "--seed", seed, *options, "--out", f"out/exact/{name}.pt", cwd=tmp_path)
        final = lines(tmp_path / f"out/exact/{name}.jsonl")[-1]["final"]
        if name == "kto":
            assert final["loss_gap"] < 0.005 and final["tv_optimum"] < 0.06
        else:
            assert final["kl_optimum"] < 0.03, name
            assert (final["kl_star"] == final["kl_optimum"]) == (name == "dpo")


@pytest.mark.slow
def test_a_longer_run_comes_nearer(tmp_path):
    run("dpo.py", "--task", "exact", "--steps", 4000, cwd=tmp_path)
    assert lines(tmp_path / "out/exact/dpo.jsonl")[-1]["final"]["kl_star"] < 0.01


@pytest.mark.slow
def test_the_reward_model_finds_the_rewards(tmp_path):
    run("reward_model.py", "--task", "exact", cwd=tmp_path)
    assert lines(tmp_path / "out/exact/reward_model.jsonl")[-1]["final"]["rms"] < 0.1

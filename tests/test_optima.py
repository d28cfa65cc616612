"""The optima in analysis/optima.py: the optimum of each loss by hand, by descent and by the mean
gradient; that the methods reach it and that broken DPO does not; and what the command prints."""

import copy
import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import lines, main, run

import data
import grpo
from analysis import optima
from analysis.optima import Options, distances, optimum
from data.exact import kl, star, tv
from dpo import apo_loss, dpo_loss, ipo_loss
from kto import kto_loss
from orpo import orpo_loss
from simpo import simpo_loss
from training import parse
from training.again import Again
from training.enumeration import Enumeration

WORLD = data.task("exact")
R, PAIRS, LABELS = (torch.from_numpy(x) for x in (WORLD.r, WORLD.pairs, WORLD.labels))
BEATS = torch.from_numpy(WORLD.beats)
LOG_D = torch.from_numpy(WORLD.d).log()  # stands for π_ref where no model is needed
N = torch.tensor([min(len(y) + 1, 3) for y in WORLD.outcomes])
SHORT = "--task exact --steps 60 --batch-size 512 --warmup 5 --device cpu".split()


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def of(task, log_ref, method, options, **change):
    """optimum() of a checkpoint with these options, some of them changed"""
    return optimum(task, log_ref, method, SimpleNamespace(**(options | change)))


def measured(path):
    """The command's figures of a checkpoint"""
    return distances(parse(Options, [str(path), "--device", "cpu"]))


# ---- of two outcomes, by hand


def toy(p):
    """One prompt, two responses of one token, the first preferred with probability p."""
    return torch.tensor([[[0, p], [1 - p, 0]]]).double()


def gap(log_p):
    return (log_p[0, 0] - log_p[0, 1]).item()


def test_optima_of_two_outcomes_by_hand():
    """p = 0.9, π_ref = (0.3, 0.7), h = log-odds of π over those of π_ref. DPO: σ(βh) = p. cDPO:
    σ(βh) = (1-ε)p + ε(1-p). IPO: p(h - c)² + (1-p)(h + c)² is least at h = c(2p - 1), c = 1/(2τ).
    SimPO (no π_ref): p σ(γ - βh) = (1-p) σ(γ + βh)."""
    pairs = toy(0.9)
    ref = torch.tensor([[0.3, 0.7]]).double().log()
    start = gap(ref)

    def h(loss):
        return gap(optima.minimise(loss, ref)) - start

    dpo = partial(optima.dpo, log_ref=ref, pairs=pairs, beta=0.5)
    assert h(dpo) == pytest.approx(math.log(9) / 0.5, rel=1e-6)
    smooth = partial(dpo, label_smoothing=0.1)
    assert h(smooth) == pytest.approx(math.log(0.82 / 0.18) / 0.5, rel=1e-6)
    n = torch.tensor([1, 1])
    ipo = partial(optima.ipo, log_ref=ref, pairs=pairs, n=n, tau=0.25)
    assert h(ipo) == pytest.approx(2 * 0.8, rel=1e-6)
    s = h(partial(optima.simpo, pairs=pairs, n=n, beta=2.0, gamma=0.5)) + start
    assert 0.9 * sigmoid(0.5 - 2 * s) == pytest.approx(0.1 * sigmoid(0.5 + 2 * s), rel=1e-6)


def test_orpo_s_optimum_of_two_outcomes_by_hand():
    """One-token answers of probability q and 1-q: o_w - o_l = 2 log(q/(1-q)) = 2x. Loss in
    x = logit q: -p log σ(x) - (1-p) log σ(-x) - λ[p log σ(2x) + (1-p) log σ(-2x)], whose slope
    σ(x) - p + 2λ(σ(2x) - p) is 0 at the minimum."""
    loss = partial(optima.orpo, pairs=toy(0.8), n=torch.tensor([1, 1]), lam=0.25)
    x = gap(optima.minimise(loss, torch.zeros(1, 2).double()))
    slope = sigmoid(x) - 0.8 + 0.5 * (sigmoid(2 * x) - 0.8)
    assert slope == pytest.approx(0, abs=1e-8) and 0.5 < x < 1.4


# ---- the losses on paper are the scripts' losses


def random_table(seed):
    return torch.randn(4, 40, generator=torch.Generator().manual_seed(seed)).double()


def test_the_losses_on_paper_agree_with_the_scripts_losses():
    """At a random table the population loss is the pairs' mean of what dpo.py computes from the
    four log-probs."""
    log_p = random_table(0).log_softmax(-1)
    x, w, l = PAIRS.nonzero().unbind(1)
    four = log_p[x, w], log_p[x, l], LOG_D[x, w], LOG_D[x, l]
    mean = (PAIRS[x, w, l] * dpo_loss(*four, beta=0.5, label_smoothing=0.1)).sum()
    assert optima.dpo(log_p, LOG_D, PAIRS, 0.5, 0.1).item() == pytest.approx(mean.item())
    means = [logp / N[y] for logp, y in zip(four, (w, l, w, l))]
    mean = (PAIRS[x, w, l] * ipo_loss(*means, tau=0.3)).sum()
    assert optima.ipo(log_p, LOG_D, PAIRS, N, 0.3).item() == pytest.approx(mean.item())


def test_simpo_s_orpo_s_and_kto_s_losses_agree_with_the_scripts():
    log_p = random_table(0).log_softmax(-1)
    x, w, l = PAIRS.nonzero().unbind(1)
    found = optima.simpo(log_p, PAIRS, N, 2.0, 0.5), optima.orpo(log_p, PAIRS, N, 0.25)
    for loss, table, options in zip((simpo_loss, orpo_loss), found, ((2.0, 0.5), (0.25,))):
        mean = (PAIRS[x, w, l] * loss(log_p[x, w], log_p[x, l], N[w], N[l], *options)).sum()
        assert table.item() == pytest.approx(mean.item())
    x, y, label = LABELS.nonzero().unbind(1)
    z = torch.tensor(0.3)
    weights = (0.5, 1.0, 2.0)
    losses = kto_loss(log_p[x, y], LOG_D[x, y], label.bool(), z, *weights)
    mean = (LABELS[x, y, label] * losses).sum()
    assert optima.kto(log_p, LOG_D, LABELS, *weights, z=0.3).item() == pytest.approx(mean.item())


def test_kto_s_reference_point_is_that_of_mismatched_pairs():
    """ẑ by a plain loop over (prompt, another prompt's answer): the answer comes from a row with
    another prompt. The policy answers each prompt as the others are answered, so ẑ is above 0, and
    with its own answers it would be below."""
    p = LABELS.sum(2)  # (x, y)
    log_p = (p.sum(0) - p).log().log_softmax(1)
    u, z, own = log_p - LOG_D, 0.0, 0.0
    for x in range(4):
        other_rows = p.sum() - p[x].sum()
        for y in range(40):
            others = sum(p[other, y] for other in range(4) if other != x)
            z += (p[x].sum() * others / other_rows * u[x, y]).item()
            own += (p[x, y] * u[x, y]).item()
    assert z > 0.1 > -0.1 > own
    loss, known = optima.kto(log_p, LOG_D, LABELS, 0.5), optima.kto(log_p, LOG_D, LABELS, 0.5, z=z)
    assert loss.item() == pytest.approx(known.item(), rel=1e-12)
    assert abs(loss - optima.kto(log_p, LOG_D, LABELS, 0.5, z=0.0)) > 1e-4
    log_p.requires_grad_()  # ẑ has no gradient
    slopes = [
        torch.autograd.grad(optima.kto(log_p, LOG_D, LABELS, 0.5, z=x), log_p)[0] for x in (None, z)
    ]
    torch.testing.assert_close(*slopes, rtol=1e-9, atol=1e-12)


# ---- of the world


DPO = {"pairs": 0, "sft_weight": 0.0, "loss": "dpo", "beta": 0.5, "label_smoothing": 0.0}
DPO |= {"ipo_sum": False, "length_penalty": 0.0}


def test_the_optima_of_the_world():
    """DPO's is π*, whatever the pairs' distribution; the others' lie apart, finite, 0.5 to 2 nats
    from π_ref (ORPO's 0.1 to 0.2), and are found from another start too."""
    best = star(LOG_D, R, 0.5)
    flat = torch.from_numpy(WORLD.beats * (1 - torch.eye(40).numpy()) / (4 * 780))
    for pairs in (PAIRS, flat):
        loss = partial(optima.dpo, log_ref=LOG_D, pairs=pairs, beta=0.5)
        assert kl(best, optima.minimise(loss, LOG_D)).max() < 1e-10
    assert kl(best, of(WORLD, LOG_D, "dpo", DPO)[1]).max() < 1e-10
    assert of(WORLD, LOG_D, "dpo", DPO, pairs=300) is None
    assert of(WORLD, LOG_D, "dpo", DPO, loss="robust") is None
    assert of(WORLD, LOG_D, "dpo", DPO, sft_weight=0.2) is None
    assert of(WORLD, None, "dpo", DPO) is None and of(WORLD, LOG_D, "sft", {}) is None
    losses = {
        "cdpo": partial(optima.dpo, log_ref=LOG_D, pairs=PAIRS, beta=0.5, label_smoothing=0.1),
        "ipo": partial(optima.ipo, log_ref=LOG_D, pairs=PAIRS, n=N, tau=0.3),
        "simpo": partial(optima.simpo, pairs=PAIRS, n=N, beta=2.0, gamma=0.5),
        "orpo": partial(optima.orpo, pairs=PAIRS, n=N, lam=0.25),
    }
    for name, loss in losses.items():
        point = optima.minimise(loss, LOG_D)
        low, high = (0.1, 0.2) if name == "orpo" else (0.5, 2)
        assert low < kl(point, LOG_D).mean() < high, name
        assert kl(point, best).mean() > 0.03
        assert kl(point, optima.minimise(loss, random_table(1))).max() < 1e-8, name


def test_r_dpo_s_optimum_has_shorter_answers():
    """π ∝ π_ref exp((r - α|y|)/β): descent on its loss ends there, and its answers are shorter."""
    loss, point = of(WORLD, LOG_D, "dpo", DPO, length_penalty=0.3)
    torch.testing.assert_close(point, star(LOG_D, R - 0.3 * N, 0.5))
    assert kl(point, optima.minimise(loss, LOG_D)).max() < 1e-10
    plain = of(WORLD, LOG_D, "dpo", DPO)[1]
    assert (point.exp() * N).sum(1).mean() < (plain.exp() * N).sum(1).mean() - 0.03
    x, w, l = PAIRS.nonzero().unbind(1)
    four = point[x, w], point[x, l], LOG_D[x, w], LOG_D[x, l]
    losses = dpo_loss(*four, beta=0.5, longer=0.3 * (N[w] - N[l]))
    assert loss(point).item() == pytest.approx((PAIRS[x, w, l] * losses).sum().item())


def test_dpo_s_means_have_an_optimum_of_their_own():
    loss, point = of(WORLD, LOG_D, "dpo", DPO, loss="norm", beta=1.0)
    x, w, l = PAIRS.nonzero().unbind(1)
    four = point[x, w] / N[w], point[x, l] / N[l], LOG_D[x, w] / N[w], LOG_D[x, l] / N[l]
    mean = (PAIRS[x, w, l] * dpo_loss(*four, beta=1.0)).sum()
    assert loss(point).item() == pytest.approx(mean.item())
    best = star(LOG_D, R, 0.5)
    assert 0.05 < kl(point, best).mean() < 0.2
    assert kl(point, optima.minimise(loss, random_table(1))).max() < 1e-8


@pytest.mark.slow
def test_apo_zero_goes_to_the_boundary():
    """Its infimum is KTO's, with ẑ = 0, of the pairs' answers: outcomes more often rejected
    than chosen vanish."""
    loss, limit = of(WORLD, LOG_D, "dpo", DPO, loss="apo")
    log_p = random_table(0).log_softmax(-1)
    x, w, l = PAIRS.nonzero().unbind(1)
    four = log_p[x, w], log_p[x, l], LOG_D[x, w], LOG_D[x, l]
    mean = (PAIRS[x, w, l] * apo_loss(*four, beta=0.5)).sum()
    assert loss(log_p).item() == pytest.approx(mean.item())
    assert ((limit == -torch.inf) == (PAIRS.sum(1) >= PAIRS.sum(2))).all()
    free = optima.minimise(loss, LOG_D, 1000, converged=False)
    assert 0 <= loss(free) - loss(limit) < 1e-5 and tv(free, limit).max() < 1e-3


def test_the_options_reach_the_optima():
    """τ of IPO is β, γ is γ/β times β, λ is --lam; KTO's weights and β set its limit; at β ≥ 1
    there is none here."""
    loss, point = of(WORLD, LOG_D, "dpo", DPO, loss="ipo", beta=0.3)
    assert loss(LOG_D).item() == pytest.approx(optima.ipo(LOG_D, LOG_D, PAIRS, N, 0.3).item())
    loss, _ = of(WORLD, LOG_D, "dpo", DPO, loss="ipo", beta=0.3, ipo_sum=True)
    ones = torch.ones_like(N)
    assert loss(point).item() == pytest.approx(optima.ipo(point, LOG_D, PAIRS, ones, 0.3).item())
    loss, _ = of(WORLD, LOG_D, "dpo", DPO, label_smoothing=0.1)
    assert loss(point).item() == pytest.approx(optima.dpo(point, LOG_D, PAIRS, 0.5, 0.1).item())
    simpo = {"pairs": 0, "sft_weight": 0.0, "beta": 2.0, "gamma_beta_ratio": 0.25}
    loss, point = of(WORLD, None, "simpo", simpo)
    assert loss(LOG_D).item() == pytest.approx(optima.simpo(LOG_D, PAIRS, N, 2.0, 0.5).item())
    assert loss(point) < loss(LOG_D)
    orpo = {"pairs": 0, "lam": 0.25, "prompt_loss": False}
    loss, _ = of(WORLD, None, "orpo", orpo)
    assert loss(LOG_D).item() == pytest.approx(optima.orpo(LOG_D, PAIRS, N, 0.25).item())
    assert of(WORLD, None, "orpo", orpo, prompt_loss=True) is None
    o = {"pairs": 0, "beta": 0.4, "w_desirable": 1.2, "w_undesirable": 1.0}
    loss, limit = of(WORLD, LOG_D, "kto", o)
    assert tv(limit, optima.kto_limit(LOG_D, LABELS, 0.4, 1.2, 1.0)[0]).max() < 1e-9
    assert loss(limit) < loss(LOG_D)
    assert of(WORLD, LOG_D, "kto", o, beta=1.0) is None and of(WORLD, None, "kto", o) is None
    with pytest.raises(optima.NoOptimum, match="to keep"):  # weights that reject everything
        of(WORLD, LOG_D, "kto", o, w_undesirable=13.0)


def test_the_command_says_why_no_optimum_was_found(world, monkeypatch, capsys):
    def fails(*_):
        raise optima.NoOptimum("descent ended at a gradient of 0.1")

    monkeypatch.setattr(optima, "optimum", fails)
    assert main("analysis.optima", world / "out/exact/sft.pt") == 0
    said = capsys.readouterr()
    assert "no optimum was found: descent ended at a gradient of 0.1" in said.out + said.err


@pytest.mark.slow
def test_kto_goes_to_the_boundary():
    """Descent on the population's KTO loss, ẑ recomputed and detached, ends where kto_limit says:
    rejected outcomes vanish, ẑ = 0. By hand: of two outcomes, one desirable with probability 0.9,
    the other with 0.2, all mass goes to the first, so that with π_ref = 1/4 on it and β = 1,
    u = log 4: σ(u) = 4/5. Loss ½[0.9 (1 - 4/5) + 0.1 · 4/5 + 0.2] = 0.23."""
    labels = torch.tensor([[[0.05, 0.45], [0.4, 0.1]]]).double()
    ref = torch.tensor([[0.25, 0.75]]).double().log()
    limit, infimum = optima.kto_limit(ref, labels, 1.0)
    assert limit.exp()[0].tolist() == pytest.approx([1.0, 0.0])
    assert infimum.item() == pytest.approx(0.23)
    limit, infimum = optima.kto_limit(LOG_D, LABELS, 0.5)
    assert ((limit == -torch.inf) == (LABELS[..., 0] >= LABELS[..., 1])).all()
    assert limit.exp().sum(1).tolist() == pytest.approx([1.0] * 4)
    loss = partial(optima.kto, log_ref=LOG_D, labels=LABELS, beta=0.5)
    free = optima.minimise(loss, LOG_D, 1000, converged=False)
    assert 0 <= loss(free) - infimum < 1e-5 and tv(free, limit).max() < 1e-3


# ---- GRPO's fixed points, PPO's and online DPO's optima


def tokens_of(world):
    """-> for each outcome its tokens' (prefix, action) places in a table of conditionals
    (prefix, 4), padded; and the mask"""
    longest = world.max_new_tokens
    prefixes = [y for y in world.outcomes if len(y) < longest]
    rows = []
    for y in world.outcomes:
        actions = [(prefixes.index(y[:t]), "abc".index(y[t])) for t in range(len(y))]
        rows.append(actions + [(prefixes.index(y), 3)] if y in prefixes else actions)
    place = torch.tensor([[p * 4 + a for p, a in r] + [0] * (longest - len(r)) for r in rows])
    mask = torch.tensor([[True] * len(r) + [False] * (longest - len(r)) for r in rows])
    return prefixes, place, mask


def conditionals(log_p, world, prefixes):
    """log π(y) (x, outcomes) -> log π(a | prefix) (x, prefixes, 4)"""
    mass = {}
    for s in world.outcomes:
        begun = [i for i, y in enumerate(world.outcomes) if y.startswith(s)]
        mass[s] = log_p[:, begun].logsumexp(1)
    rows = []
    for s in prefixes:
        branches = [*(mass[s + a] for a in "abc"), log_p[:, world.outcomes.index(s)]]
        rows.append(torch.stack(branches, 1) - mass[s][:, None])
    return torch.stack(rows, 1)


def mean_gradient(log_p, world, log_ref, kl, beta):
    """The expectation, over all outcomes, of the gradient of grpo.py's loss in the logits at each
    prefix; one-step, on-policy, A = r - E[r]."""
    prefixes, place, mask = tokens_of(world)
    r, p = torch.from_numpy(world.r), log_p.exp()
    ref = conditionals(log_ref, world, prefixes).flatten(1)[:, place]  # (x, outcome, token)
    theta = conditionals(log_p, world, prefixes).requires_grad_()
    logp = theta.log_softmax(-1).flatten(1)[:, place]
    adv = (r - (p * r).sum(1, keepdim=True))[:, :, None]
    rows = zip(logp, ref, adv)
    how = {"beta": beta, "kl": kl}
    losses = [grpo.grpo_loss(a, a.detach(), b, c, **how) for a, b, c in rows]
    (p[:, :, None] * mask * torch.stack(losses)).sum().backward()
    return theta.grad.abs().max().item()


GRPO = {"kl": "k3", "beta": 0.5, "group": 8, "agg": "sum", "adv_norm": "loo", "reward": "task"}
GRPO |= {"temperature": 1.0, "gamma": 1.0}


@pytest.mark.parametrize("name", ["exact", "exact:1"])
@pytest.mark.parametrize("penalty", ["k3", "k3-ratio"])
def test_the_fixed_point_is_where_the_mean_gradient_vanishes(name, penalty):
    """By enumeration with grpo.py's own loss: at the point 0 to 1e-9, elsewhere (π_ref; π* for
    plain k3) not."""
    world = data.task(name)
    r, log_ref = torch.from_numpy(world.r), torch.from_numpy(world.d).log()
    gradient = partial(mean_gradient, world=world, log_ref=log_ref, kl=penalty, beta=0.5)
    loss, point = of(world, log_ref, "grpo", GRPO, kl=penalty, agg="const")
    assert loss is None and point.exp().sum(1).tolist() == pytest.approx([1.0] * 4)
    assert gradient(point) < 1e-9 < 1e-2 < gradient(log_ref)
    best = star(log_ref, r, 0.5)
    if (name, penalty) != ("exact:1", "k3-ratio"):  # there, and only there, it is π*
        assert gradient(best) > 1e-2 and kl(point, best).mean() > 0.05
    else:
        torch.testing.assert_close(point, best)
    # summed over tokens each weighs the same too; r - mean is 7/8 of it: β is 8/7 as strong
    torch.testing.assert_close(of(world, log_ref, "grpo", GRPO, kl=penalty)[1], point)
    _, mean = of(world, log_ref, "grpo", GRPO, kl=penalty, adv_norm="none")
    stronger = of(world, log_ref, "grpo", GRPO, kl=penalty, beta=0.5 * 8 / 7)[1]
    torch.testing.assert_close(mean, stronger)


def test_plain_k3_s_point_by_hand():
    """Two actions, π_ref = ½, q = 0 and ½, β = ½: π = ¼/c + ¼/(c - ½) = 1, that is
    c² - c + 1/8 = 0, c = (1 + √½)/2."""
    c = (1 + math.sqrt(0.5)) / 2
    ref, q = torch.tensor([0.5, 0.5]).double().log(), torch.tensor([0.0, 0.5]).double()
    log_p = optima.k3_point(ref, q, 0.5)
    assert log_p.exp().tolist() == pytest.approx([0.25 / c, 0.25 / (c - 0.5)], abs=1e-12)


@pytest.mark.parametrize("agg", ["sum", "const"])
def test_what_is_known_of_grpo_and_ppo_and_what_is_not(agg):
    best = star(LOG_D, R, 0.5)
    o = GRPO | {"kl": "reward", "agg": agg}
    loss, point = of(WORLD, LOG_D, "grpo", o)
    torch.testing.assert_close(point, best)
    assert loss(point) < loss(LOG_D)
    assert loss(LOG_D).item() == pytest.approx(-(LOG_D.exp() * R).sum(1).mean().item())
    log_p = random_table(2).log_softmax(1)
    J = ((log_p.exp() * R).sum(1) - 0.5 * kl(log_p, LOG_D)).mean()
    assert loss(log_p).item() == pytest.approx(-J.item())
    torch.testing.assert_close(of(WORLD, LOG_D, "grpo", o, adv_norm="batch")[1], best)
    unknown = [
        {"kl": "none"},
        {"adv_norm": "batch", "kl": "k3"},
        {"adv_norm": "std"},
        {"agg": "seq_mean"},
        {"agg": "token_mean"},
    ]
    judges = [{"reward": x} for x in ("rm", "out/exact/reward_model.pt", "mine.py:number")]
    for change in [*unknown, *judges, {"temperature": 0.5}, {"beta": 0.0}]:
        assert of(WORLD, LOG_D, "grpo", o, **change) is None
    assert of(WORLD, None, "grpo", o) is None
    torch.testing.assert_close(of(WORLD, LOG_D, "ppo", o)[1], best)
    for change in [{"gamma": 0.9}, {"beta": 0.0}, *judges, {"temperature": 0.5}]:
        assert of(WORLD, LOG_D, "ppo", o, **change) is None
    one_token = data.task("exact:1")
    assert of(one_token, LOG_D[:, :4], "grpo", GRPO, agg="seq_mean") is not None


ONLINE = {"label": "bt", "ref_update": "fixed", "reward": "task", "loss": "dpo", "beta": 0.5}
ONLINE |= {"samples_per_prompt": 2, "temperature": 1.0, "rounds": 0, "ipo_sum": True}


def test_what_online_dpo_aims_at():
    best = star(LOG_D, R, 0.5)
    known = partial(of, WORLD, LOG_D, "online_dpo", ONLINE)
    torch.testing.assert_close(known()[1], best)
    more = {"rounds": 3, "samples_per_prompt": 4, "temperature": 0.7}  # the pairs do not matter
    torch.testing.assert_close(known(**more)[1], best)
    judges = [{"reward": x} for x in ("rm", "out/exact/reward_model.pt")]
    for change in [{"label": "argmax"}, {"ref_update": "per-round"}, *judges]:
        assert known(**change) is None
    for name, value in more.items():  # for IPO they do
        assert known(loss="ipo", **{name: value}) is None
    assert of(WORLD, None, "online_dpo", ONLINE) is None


def test_ipo_on_own_pairs_ends_where_no_policy_wins():
    """Of sums: Σ_y' π(y') [h(y, y') - (2 P(y beats y') - 1)/(2τ)] = 0 for each y, which is
    π ∝ π_ref exp(P(y beats π)/τ). Of means that policy is another one."""
    loss, point = of(WORLD, LOG_D, "online_dpo", ONLINE, loss="ipo", beta=0.3)
    beats = torch.einsum("xyz,xz->xy", BEATS, point.exp())
    assert loss is None and kl(point, LOG_D).mean() > 0.1
    assert kl(point, (LOG_D + beats / 0.3).log_softmax(1)).max() < 1e-9
    _, mean = of(WORLD, LOG_D, "online_dpo", ONLINE, loss="ipo", ipo_sum=False, beta=1.0)
    beats = torch.einsum("xyz,xz->xy", BEATS, mean.exp())
    assert kl(mean, (LOG_D + beats).log_softmax(1)).max() > 0.01


# ---- the methods against the truth


def tabled(path):
    """-> (the opened checkpoint, the world as it reads it)"""
    again = Again(parse(Options, [str(path), "--device", "cpu"]))
    return again, Enumeration(again, WORLD)


def descend(path, normalise=False, uniform=False, drop_end=False, steps=225):
    """DPO on the whole population at once, a transformer as the policy, dpo_loss as it stands. ->
    mean KL(π‖π*)"""
    again, enumeration = tabled(path)
    ref, world = again.policy, enumeration.batch
    policy = copy.deepcopy(ref).requires_grad_()
    mask = world.mask & (world.ids != again.tokenizer.end_id) if drop_end else world.mask
    length = mask.sum(1).clamp(min=1) if normalise else torch.ones(len(mask))
    x, w, l = PAIRS.nonzero().unbind(1)
    weight, w, l = PAIRS[x, w, l], x * 40 + w, x * 40 + l
    ref_logp = torch.zeros(len(mask))
    if not uniform:
        ref_logp = ref.logprobs(world.ids, mask).sum(1) / length
    optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    for _ in range(steps):
        logp = policy.logprobs(world.ids, mask).sum(1) / length
        losses = dpo_loss(logp[w], logp[l], ref_logp[w], ref_logp[l], beta=0.5)
        (weight * losses).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    with torch.no_grad():
        log_p, log_ref = enumeration.table(policy), enumeration.table(ref)
    return kl(log_p, star(log_ref, R, 0.5)).mean().item()


def test_dpo_finds_the_optimum(world):
    assert descend(world / "out/exact/sft.pt") < 0.02


@pytest.mark.slow
@pytest.mark.parametrize("mistake", ["normalise", "uniform", "drop_end"])
def test_dpo_s_usual_mistakes_do_not_find_it(mistake, world):
    """Negative controls: a mean for the sum, a uniform reference, an end token left out of the
    sum."""
    assert descend(world / "out/exact/sft.pt", **{mistake: True}) > 0.1


def test_the_command_prints_a_line_a_checkpoint(world, call):
    short = [*SHORT, "--steps", 10]
    said = call("dpo", *short, "--out", "out/exact/short.pt", cwd=world)
    final = lines(world / "out/exact/short.jsonl")[-1]["final"]
    assert "kl_optimum" not in final and "KL(·‖π*)" in said
    more = ["--loss", "robust", "--dtype", "bfloat16", "--out", "out/exact/robust.pt"]
    call("dpo", *short, *more, cwd=world)
    paths = "out/exact/short.pt", "out/exact/robust.pt"
    said = call("analysis.optima", *paths, "--device", "cpu", cwd=world).splitlines()
    short, robust = (next(x for x in said if x.startswith(path)) for path in paths)
    found = measured(world / paths[0])
    assert found["kl_star"] == pytest.approx(found["kl_optimum"]) == final["kl_star"]
    assert f"KL(π‖own optimum) {found['kl_optimum']:.4g}" in short
    for words in ("TV(π, own optimum)", "loss above its least value", f"{found['loss_gap']:.4g}"):
        assert words in short
    assert "no optimum of this loss is known for these options, KL(π‖π*)" in robust
    assert found["loss_gap"] > 0 and measured(world / paths[1]).keys() == {"kl_star"}


def test_the_command_s_mistakes_are_one_line(tiny, monkeypatch, capsys):
    monkeypatch.chdir(tiny)
    for args, said in (
        ([], "the following arguments are required: checkpoint"),
        (["missing.pt"], "missing.pt: no such file"),
        (["out/reviews/sft.pt"], "was trained on reviews; optima are known on exact alone"),
    ):
        assert main("analysis.optima", *args) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1


@pytest.mark.slow
def test_kto_is_measured_against_its_limit(world, call):
    call("kto", *SHORT, "--steps", 90, "--out", "out/exact/k.pt", cwd=world)
    found = measured(world / "out/exact/k.pt")
    assert 0 < found["loss_gap"] < 0.05 and 0 < found["tv_optimum"] < 0.5
    assert "kl_optimum" not in found
    again, enumeration = tabled(world / "out/exact/k.pt")
    with torch.no_grad():
        models = again.policy, again.open(again.reference)
        log_p, log_ref = map(enumeration.table, models)
    limit, infimum = optima.kto_limit(log_ref, LABELS, 0.5)
    assert found["tv_optimum"] == pytest.approx(tv(log_p, limit).mean().item(), rel=1e-4)
    loss = optima.kto(log_p, log_ref, LABELS, 0.5)
    assert found["loss_gap"] == pytest.approx((loss - infimum).item(), rel=1e-3)


def test_orpo_without_an_sft_checkpoint_still_shows_its_own_optimum(tmp_path, call):
    args = ["--task", "exact", "--steps", 4, "--batch-size", 64, "--warmup", 1, "--device", "cpu"]
    call("orpo", *args, cwd=tmp_path)
    found = measured(tmp_path / "out/exact/orpo.pt")
    assert "kl_star" not in found and found["kl_optimum"] > 0
    said = call("analysis.optima", "out/exact/orpo.pt", "--device", "cpu", cwd=tmp_path)
    assert f"KL(π‖own optimum) {found['kl_optimum']:.4g}" in said
    assert "win rate and KL are not reported" in said
    assert "kl_star" not in lines(tmp_path / "out/exact/orpo.jsonl")[-1]["final"]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_each_method_reaches_its_own_optimum(seed, tmp_path):
    rows = {"dpo": [], "cdpo": ["--label-smoothing", 0.1], "ipo": ["--loss", "ipo"]}
    for name in [*rows, "simpo", "orpo", "kto"]:
        script = "dpo" if name in rows else name
        out = f"out/exact/{name}.pt"
        args = ["--task", "exact", "--seed", seed, *rows.get(name, []), "--out", out]
        run(f"{script}.py", *args, cwd=tmp_path)
        final = lines(tmp_path / f"out/exact/{name}.jsonl")[-1]["final"]
        found = measured(tmp_path / out)
        if name == "kto":
            assert found["loss_gap"] < 0.005 and found["tv_optimum"] < 0.06
        else:
            assert found["kl_optimum"] < 0.03, name
            same = found["kl_optimum"] == pytest.approx(final["kl_star"], rel=1e-3)
            assert same == (name == "dpo")

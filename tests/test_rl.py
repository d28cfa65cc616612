"""Rewards, rollouts and the GRPO family: estimators against enumeration, fixed points, the loop's wiring, refill, users' rewards."""
import argparse
import difflib
import json
import math
import re
import shutil
from functools import partial

import pytest
import torch
from conftest import BATCH, ENDS, ROOT, TINY, first_gradient, lines, main, run

import common
import dapo
import data
import evaluate
import grpo
import ppo
from data import oracle
from evaluate import choose_yardstick
from gpt import GPT, GPTConfig, Samples, ScalarGPT, load, sample, save

WORLD = data.task("exact")
R, LOG_D = torch.from_numpy(WORLD.r), torch.from_numpy(WORLD.d).log()
TOKENIZER = data.tokenizer(own=WORLD.tokenizer)
CPU = common.Compute(argparse.Namespace(device="cpu", dtype="float32"))


# ---- estimators against enumeration, from a fixed policy on `exact`


def small(seed):
    m = GPT(GPTConfig(4, 8, 1, 1, 16), seed)
    with torch.no_grad():
        m.wte.weight *= 15
    return m


def gradient(value, model):
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, list(model.parameters()), retain_graph=True)])


def cosine(a, b):
    return (a @ b / a.norm() / b.norm()).item()


@pytest.fixture(scope="module")
def drawn():
    """20,480 samples in groups of 8 from a policy, with their log-probs under it and under a reference; the enumeration of both."""
    policy, ref = small(0), small(1)
    yardstick = choose_yardstick(CPU, WORLD, TOKENIZER, 8)
    prompts, group = [TOKENIZER.encode(x) for x in WORLD.contexts], 5120
    s = sample(policy, prompts, 3, TOKENIZER.end_id, generator=torch.Generator().manual_seed(0), group=group)
    outcome = [WORLD.outcomes.index(TOKENIZER.decode(ids[mask].tolist())) for ids, mask in zip(s.ids, s.mask)]
    r = R[torch.arange(4).repeat_interleave(group), outcome].view(-1, 8).float()  # (2560, 8)
    logp = policy.logprobs(s.ids, s.mask)
    with torch.no_grad():
        ref_logp = ref.logprobs(s.ids, s.mask)
    b = yardstick.batch
    table = policy.logprobs(b.ids, b.mask, index=b.index).sum(1).view(4, 40)
    return policy, logp, ref_logp, r, table, yardstick.table(ref).float(), R.float()


def objectives(table, log_ref, r):
    """E[r] and KL(π‖π_ref), means over prompts, by enumeration."""
    return (table.exp() * r).sum(1).mean(), (table.exp() * (table - log_ref)).sum(1).mean()


def test_rloo_and_dr_grpo_are_the_gradient_of_the_expected_reward(drawn):
    """One on-policy update, summed over tokens: E∇loss = -∇E[r] by leave-one-out; r - mean is (G-1)/G of it, sample by sample."""
    policy, logp, _, r, table, log_ref, world_r = drawn
    exact = -gradient(objectives(table, log_ref, world_r)[0], policy)
    found = {}
    for norm in ("loo", "none", "std"):
        adv = grpo.group_advantages(r, norm=norm).view(-1, 1)
        found[norm] = gradient(grpo.grpo_loss(logp, logp.detach(), None, adv, beta=0.0).sum() / len(logp), policy)
    assert cosine(found["loo"], exact) > 0.99 and cosine(found["none"], exact) > 0.99
    assert found["loo"].norm() / exact.norm() == pytest.approx(1, abs=0.1)
    assert (found["none"] - 7 / 8 * found["loo"]).norm() < 1e-4 * found["none"].norm()
    assert cosine(found["std"], exact) < cosine(found["loo"], exact)  # divided by std it is another objective's


def test_kl_in_the_reward_is_the_gradient_of_j(drawn):
    policy, logp, ref_logp, r, table, log_ref, world_r = drawn
    reward, kl = objectives(table, log_ref, world_r)
    R = r - 0.5 * (logp.detach() - ref_logp).sum(1).view_as(r)
    adv = grpo.group_advantages(R, norm="loo").view(-1, 1)
    found = gradient(grpo.grpo_loss(logp, logp.detach(), None, adv, beta=0.0).sum() / len(logp), policy)
    assert cosine(found, -gradient(reward - 0.5 * kl, policy)) > 0.99
    assert cosine(found, -gradient(reward, policy)) < 0.99  # the penalty is not small


@pytest.mark.parametrize("lam, low, high", [(1.0, 0.99, 1.0), (0.0, -1.0, 0.9)])
def test_a_wrong_critic_does_not_bias_ppo_at_lambda_1(lam, low, high, drawn):
    """The mean gradient of 160 rollouts of 128, each whitened by itself, against that of J = E[r] - β KL(π‖π_ref) by enumeration. The
    critic is a wrong function of the prefix, as large as the rewards: at λ = 1 a baseline, at λ = 0 what the policy is taught."""
    policy, logp, ref_logp, r, table, log_ref, world_r = drawn
    mask, total = logp != 0, 0.0
    wrong = 3 * torch.sin(100 * logp.detach().roll(1, 1) + 7)  # of the token before; of the padding at the first
    for rows in torch.randperm(len(logp), generator=torch.Generator().manual_seed(0)).split(128):
        old = logp[rows].detach()
        rewards = ppo.token_rewards(r.flatten()[rows], old, ref_logp[rows], mask[rows], 0.5)
        adv, _ = ppo.gae(rewards, wrong[rows], mask[rows], 1.0, lam)
        losses = ppo.ppo_loss(logp[rows], old, ppo.whiten(adv, mask[rows]))
        total = total + (losses * mask[rows]).sum() / mask[rows].sum() / 160
    reward, kl = objectives(table, log_ref, world_r)
    assert low < cosine(gradient(total, policy), -gradient(reward - 0.5 * kl, policy)) <= high


def test_kl_estimators_against_the_exact_kl(drawn):
    """x = log π/π_ref of the whole response. Values: k1 and k3 within four standard errors of KL(π‖π_ref). Gradients: k2 and ρ k3 are
    those of KL(π‖π_ref), k3 that of KL(π_ref‖π), k1 has none."""
    policy, logp, ref_logp, _, table, log_ref, world_r = drawn
    kl = objectives(table, log_ref, world_r)[1]
    reverse = (log_ref.exp() * (log_ref - table)).sum(1).mean()
    whole, ref = logp.sum(1, keepdim=True), ref_logp.sum(1, keepdim=True)
    k1, k3 = whole - ref, grpo.k3(whole, ref)
    for k in (k1, k3):
        assert abs(k.mean() - kl) < 4 * k.std() / len(k) ** 0.5
    toward, away = gradient(kl, policy), gradient(reverse, policy)
    assert cosine(gradient((k1**2 / 2).mean(), policy), toward) > 0.99
    assert cosine(gradient(((whole - whole.detach()).exp() * k3).mean(), policy), toward) > 0.99
    assert cosine(gradient(k3.mean(), policy), away) > 0.99
    assert gradient(k1.mean(), policy).norm() < 0.1 * toward.norm()
    assert cosine(toward, away) < 0.95  # the two directions differ


# ---- fixed points


def tokens_of(world):
    """-> for each outcome its tokens' (prefix, action) places in a table of conditionals (prefix, 4), padded; and the mask"""
    prefixes = [y for y in world.outcomes if len(y) < world.max_new_tokens]
    rows = []
    for y in world.outcomes:
        actions = [(prefixes.index(y[:t]), "abc".index(y[t])) for t in range(len(y))]
        rows.append(actions + [(prefixes.index(y), 3)] if y in prefixes else actions)
    place = torch.tensor([[p * 4 + a for p, a in row] + [0] * (world.max_new_tokens - len(row)) for row in rows])
    mask = torch.tensor([[True] * len(row) + [False] * (world.max_new_tokens - len(row)) for row in rows])
    return prefixes, place, mask


def conditionals(log_p, world, prefixes):
    """log π(y) (x, outcomes) -> log π(a | prefix) (x, prefixes, 4)"""
    mass = {s: log_p[:, [i for i, y in enumerate(world.outcomes) if y.startswith(s)]].logsumexp(1) for s in world.outcomes}
    ends = [log_p[:, world.outcomes.index(s)] for s in prefixes]
    rows = [torch.stack([*(mass[s + a] for a in "abc"), end], 1) - mass[s][:, None] for s, end in zip(prefixes, ends)]
    return torch.stack(rows, 1)


def mean_gradient(log_p, world, log_ref, kl, beta):
    """The expectation, over all outcomes, of the gradient of the loss in the logits at each prefix; one-step, on-policy, A = r - E[r]."""
    prefixes, place, mask = tokens_of(world)
    r, p = torch.from_numpy(world.r), log_p.exp()
    ref = conditionals(log_ref, world, prefixes).flatten(1)[:, place]  # (x, outcome, token)
    theta = conditionals(log_p, world, prefixes).requires_grad_()
    logp = theta.log_softmax(-1).flatten(1)[:, place]
    adv = (r - (p * r).sum(1, keepdim=True))[:, :, None]
    losses = torch.stack([grpo.grpo_loss(a, a.detach(), b, c, beta=beta, kl=kl) for a, b, c in zip(logp, ref, adv)])
    (p[:, :, None] * mask * losses).sum().backward()
    return theta.grad.abs().max().item()


@pytest.mark.parametrize("name", ["exact", "exact:1"])
@pytest.mark.parametrize("kl", ["k3", "k3-ratio"])
def test_the_fixed_point_is_where_the_mean_gradient_vanishes(name, kl):
    """By enumeration with grpo.py's own loss: at the oracle's point 0 to 1e-9, elsewhere (π_ref; π* for plain k3) not."""
    world = data.task(name)
    r, log_ref = torch.from_numpy(world.r), torch.from_numpy(world.d).log()
    o = {"kl": kl, "beta": 0.5, "group": 8, "agg": "const", "adv_norm": "loo", "reward": "task", "temperature": 1.0}
    loss, point = oracle.aim(world, log_ref, "grpo", o)
    assert loss is None and point.exp().sum(1).tolist() == pytest.approx([1.0] * 4)
    assert mean_gradient(point, world, log_ref, kl, 0.5) < 1e-9 < 1e-2 < mean_gradient(log_ref, world, log_ref, kl, 0.5)
    star = oracle.star(log_ref, r, 0.5)
    if (name, kl) != ("exact:1", "k3-ratio"):  # there, and only there, it is π*
        assert mean_gradient(star, world, log_ref, kl, 0.5) > 1e-2 and oracle.kl(point, star).mean() > 0.05
    else:
        torch.testing.assert_close(point, star)
    _, mean = oracle.aim(world, log_ref, "grpo", o | {"adv_norm": "none"})  # r - mean is 7/8 of it: β is 8/7 as strong
    torch.testing.assert_close(mean, oracle.aim(world, log_ref, "grpo", o | {"beta": 0.5 * 8 / 7})[1])


def test_plain_k3_s_point_by_hand():
    """Two actions, π_ref = ½, q = 0 and ½, β = ½: π = ¼/c + ¼/(c - ½) = 1, that is c² - c + 1/8 = 0, c = (1 + √½)/2."""
    c = (1 + math.sqrt(0.5)) / 2
    log_p = oracle.k3_point(torch.tensor([0.5, 0.5]).double().log(), torch.tensor([0.0, 0.5]).double(), 0.5)
    assert log_p.exp().tolist() == pytest.approx([0.25 / c, 0.25 / (c - 0.5)], abs=1e-12)


def test_what_the_oracle_does_not_know():
    o = {"kl": "reward", "beta": 0.5, "group": 8, "agg": "const", "adv_norm": "loo", "reward": "task", "temperature": 1.0}
    loss, point = oracle.aim(WORLD, LOG_D, "grpo", o)
    torch.testing.assert_close(point, oracle.star(LOG_D, R, 0.5))
    assert loss(point) < loss(LOG_D) and loss(LOG_D).item() == pytest.approx(-(LOG_D.exp() * R).sum(1).mean().item())
    for change in ({"kl": "none"}, {"adv_norm": "std"}, {"agg": "seq_mean"}, {"reward": "rm"}, {"temperature": 0.5}):
        assert oracle.aim(WORLD, LOG_D, "grpo", o | change) is None
    o |= {"gamma": 1.0}
    torch.testing.assert_close(oracle.aim(WORLD, LOG_D, "ppo", o)[1], oracle.star(LOG_D, R, 0.5))
    for change in ({"gamma": 0.9}, {"beta": 0.0}, {"reward": "rm"}, {"temperature": 0.5}):
        assert oracle.aim(WORLD, LOG_D, "ppo", o | change) is None
    assert oracle.aim(data.task("exact:1"), LOG_D[:, :4], "grpo", o | {"agg": "seq_mean", "kl": "k3"}) is not None


# ---- samples and prompts


def test_samples_are_taken_and_joined():
    mask = torch.tensor([[0, 1, 1, 0, 0], [0, 0, 1, 1, 1]], dtype=torch.bool)
    s = Samples(torch.arange(10).view(2, 5), mask, torch.arange(8.0).view(2, 4), torch.tensor([True, False]))
    assert s.stop.tolist() == [3, 5]
    part = s.take(torch.tensor([0]))
    assert part.ids.tolist() == [[0, 1, 2]] and part.mask.tolist() == [[False, True, True]] and part.logp.tolist() == [[0.0, 1.0]]
    both = Samples.cat([part, s])
    assert both.ids.tolist() == [[0, 1, 2, 0, 0], [0, 1, 2, 3, 4], [5, 6, 7, 8, 9]] and both.logp.shape == (3, 4)
    assert both.mask.tolist()[0] == [False, True, True, False, False] and both.finished.tolist() == [True, True, False]


def test_prompts_pass_over_the_training_split():
    """Every training prompt once a pass, in another order the next; the state goes on where it stood; test prompts never."""
    task, tokenizer = data.task("arithmetic:1"), data.tokenizer()
    prompts = data.Prompts(task, 8, 0, tokenizer, 250)
    n, steps = len(prompts.rows), prompts.per_epoch
    passes = [[row for _ in range(steps) for row in next(prompts)] for _ in range(2)]
    assert sorted(passes[0]) == sorted(passes[1]) == sorted(prompts.rows) and passes[0] != passes[1] and len(passes[0]) == n
    ids, prompt, columns = passes[0][0]
    assert tokenizer.decode(ids) == prompt and columns == {"answer": str(eval(prompt.rstrip("=")))}
    assert not {x for _, x, _ in prompts.rows} & {x for x, _ in task.prompts(None, 0, split="test")}
    state, ahead = prompts.state_dict(), [next(prompts), prompts.minibatches(10, 2, 3)]
    again = data.Prompts(task, 8, 0, tokenizer, 250)
    again.load_state_dict(state)
    behind = [next(again), again.minibatches(10, 2, 3)]
    assert ahead[0] == behind[0] and all(torch.equal(a, b) for a, b in zip(ahead[1], behind[1]))


def test_minibatches_are_shuffled_partitions():
    prompts = data.Prompts(data.task("arithmetic:1"), 8, 0, data.tokenizer(), 250)
    parts = prompts.minibatches(12, 2, 3)
    assert [len(p) for p in parts] == [4] * 6
    first, second = torch.cat(parts[:3]), torch.cat(parts[3:])
    assert first.sort()[0].tolist() == second.sort()[0].tolist() == list(range(12)) and first.tolist() != second.tolist()
    assert first.tolist() != list(range(12)) and prompts.minibatches(12, 1, 1)[0].tolist() == list(range(12))


# ---- the loop


@pytest.mark.parametrize("script", ["grpo", "ppo"])
def test_padding_is_never_trained_and_the_end_token_is(script, ends, monkeypatch):
    """Other ids in the padding, and more of it, change no gradient; an end token out of the mask does."""
    monkeypatch.chdir(ends)
    draw = grpo.sample

    def padded(*args):
        s = draw(*args)
        ids = torch.where(torch.arange(s.ids.size(1)) >= s.stop[:, None], 7, s.ids)
        widen = partial(torch.nn.functional.pad, pad=(0, 5))
        return Samples(widen(ids, value=9), widen(s.mask), widen(s.logp), s.finished)

    def endless(*args):
        s = draw(*args)
        assert 0.2 < s.finished.float().mean() < 1
        return s._replace(mask=s.mask & ~(s.finished[:, None] & (torch.arange(s.ids.size(1)) == s.stop[:, None] - 1)))

    args = [*ENDS, *BATCH, "--minibatches", 1, "--updates", 1]
    a, _ = first_gradient(script, args, monkeypatch)
    b, _ = first_gradient(script, [*args, "--micro-batch", 32], monkeypatch, sample=padded)
    c, _ = first_gradient(script, args, monkeypatch, sample=endless)
    assert a.norm() > 1e-3 and (a - b).norm() < 1e-9 * a.norm() and (a - c).norm() > 1e-2 * a.norm()


@pytest.mark.parametrize("agg", ["seq_mean", "token_mean", "const"])
def test_the_first_gradient_is_the_equation_s(agg, ends, monkeypatch):
    """On-policy, π = π_ref: the gradient of - Σ_i w_i A_i Σ_t log π(y_it), with w = 1/(S|y|), 1/Σ|y| or 1/(S L_max), by a plain loop."""
    monkeypatch.chdir(ends)
    kept = []

    def keep(*args):
        kept.append(sample(*args))
        return kept[-1]

    found, metrics = first_gradient("grpo", [*ENDS, *BATCH, "--agg", agg], monkeypatch, sample=keep)
    model, s, tokenizer = load("ends.pt")[0].double(), kept[0], data.tokenizer()
    reward = torch.tensor([1.0 if len(tokenizer.decode(i[m].tolist())) % 2 else -1.0 for i, m in zip(s.ids, s.mask)]).double()
    total, value, lengths = 0.0, 0.0, s.mask.sum(1).tolist()
    assert len(set(lengths)) > 3
    for i in range(32):
        group = reward[i // 4 * 4 : i // 4 * 4 + 4]
        adv = (reward[i] - group.mean()) / (((group - group.mean()) ** 2).sum() / 3 + 0.0).sqrt().add(1e-4)
        weight = {"seq_mean": 1 / 32 / lengths[i], "token_mean": 1 / sum(lengths), "const": 1 / 32 / 8}[agg]
        row, where = s.ids[i, : s.stop[i]], s.mask[i, 1 : s.stop[i]]
        logp = model(row[None])[0, :-1].log_softmax(-1).gather(1, row[1:, None])[:, 0]
        total, value = total - weight * adv * logp[where].sum(), value - weight * adv * lengths[i]
    torch.testing.assert_close(found, gradient(total, model), rtol=1e-5, atol=1e-8)
    assert metrics["kl"] == 0.0 and metrics["loss"] == pytest.approx(value.item(), abs=1e-6)  # each ratio is 1


def test_gspo_equals_seq_mean_grpo_on_the_first_update(ends, monkeypatch):
    monkeypatch.chdir(ends)
    a, _ = first_gradient("grpo", [*ENDS, *BATCH], monkeypatch)
    b, metrics = first_gradient("grpo", [*ENDS, *BATCH, "--ratio", "seq"], monkeypatch)
    assert a.norm() > 1e-3 and (a - b).norm() < 1e-12 and metrics["clip_ratio/low_mean"] == metrics["clip_ratio/high_mean"] == 0.0


@pytest.mark.parametrize("given, bounds", [([], (3e-4, 4e-4)), (["--eps", 0.1], (0.1, 0.1)), (["--eps-high", 0.1], (3e-4, 0.1))])
def test_gspo_has_bounds_of_its_own(given, bounds, ends, monkeypatch):
    monkeypatch.chdir(ends)
    assert main("grpo", *ENDS, *BATCH, "--ratio", "seq", *given, "--steps", 1, "--out", "bounds/x.pt") == 0
    options = lines(ends / "bounds/x.jsonl")[0]["options"]
    assert (options["eps"], options["eps_high"]) == bounds


@pytest.mark.parametrize("script", ["grpo", "dapo"])
def test_old_log_probs_are_those_before_the_rollout_s_updates(script, ends, monkeypatch):
    """Two passes of two minibatches: the first ratio is exactly 1, and every old log-prob is the starting policy's, whose rows and
    tokens are met again; later ratios are not 1, and with a large step some are clipped. What is logged is the mean of the four."""
    monkeypatch.chdir(ends)
    module, seen, clipped, norms = {"grpo": grpo, "dapo": dapo}[script], [], [], []
    name, clip = f"{script}_loss", torch.nn.utils.clip_grad_norm_
    loss = getattr(module, name)

    def spy(logp, old, *more):
        seen.append((logp.detach(), old))
        ratio, adv, high = (logp.detach() - old).exp(), more[script == "grpo"], 1.2 if script == "grpo" else 1.28
        tokens = (old != 0).sum()
        clipped.append([((ratio < 0.8) & (adv < 0)).sum() / tokens, ((ratio > high) & (adv > 0)).sum() / tokens])
        return loss(logp, old, *more)

    monkeypatch.setattr(module, name, spy)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *a: (norms.append(clip(*a)), norms[-1])[1])
    args = ["--steps", 1, "--updates", 2, "--minibatches", 2, "--warmup", 0, "--lr", 0.01, "--dtype", "float64", "--log-every", 1]
    assert main(script, *ENDS, *BATCH, *args, "--out", "old/x.pt") == 0
    assert len(seen) == 4 and torch.equal(*seen[0])  # ratio 1
    assert all((logp - old).abs().max() > 1e-3 for logp, old in seen[1:])
    sums = [torch.cat([old.sum(1) for _, old in seen[i : i + 2]]).sort()[0] for i in (0, 2)]
    torch.testing.assert_close(*sums)  # both passes: the same old log-probs, in another order
    line = lines(ends / "old/x.jsonl")[1]
    low, high = torch.tensor(clipped).mean(0).tolist()
    assert line["clip_ratio/low_mean"] == pytest.approx(low) and line["clip_ratio/high_mean"] == pytest.approx(high) and low > 0 < high
    assert line["grad_norm"] == pytest.approx(sum(norms).item() / 4)


def test_equal_rewards_move_nothing(ends, monkeypatch):
    """β = 0 and one reward for all: advantages are exactly 0, and after three steps every weight is what it was."""
    monkeypatch.chdir(ends)
    args = ["--reward", "judge.py:constant", "--beta", 0, "--steps", 3, "--batch-size", 4, "--group", 4, "--log-every", 1]
    assert main("grpo", *ENDS, *args, "--out", "equal/x.pt") == 0
    start, end = load("ends.pt")[0], load("equal/x.pt")[0]
    assert all(torch.equal(a, b) for a, b in zip(start.parameters(), end.parameters()))
    record = lines(ends / "equal/x.jsonl")
    assert record[1]["frac_reward_zero_std"] == 1.0 and record[1]["grad_norm"] == 0.0
    assert [m["role"] for m in record[-1]["final"]["models"]] == ["policy"]  # no reference


def test_kl_in_the_reward_is_subtracted_before_the_baseline(ends, monkeypatch):
    """Step 2: what the advantages are taken of is r - β Σ_t (log π - log π_ref), π the policy that sampled."""
    monkeypatch.chdir(ends)
    seen, drawn, policies = [], [], []
    advantages, draw = grpo.group_advantages, grpo.sample
    monkeypatch.setattr(grpo, "group_advantages", lambda R, norm: (seen.append(R), advantages(R, norm=norm))[1])

    def keep(policy, *args):
        policies.append({k: v.clone() for k, v in policy.state_dict().items()})
        drawn.append(draw(policy, *args))
        return drawn[-1]

    monkeypatch.setattr(grpo, "sample", keep)
    args = ["--kl", "reward", "--beta", 0.5, "--steps", 2, "--warmup", 0, "--lr", 0.01, "--adv-norm", "loo", "--log-every", 1]
    assert main("grpo", *ENDS, *BATCH, *args, "--out", "inside/x.pt") == 0
    ref, tokenizer, s = load("ends.pt")[0], data.tokenizer(), drawn[1]
    policy = GPT(ref.config)
    policy.load_state_dict(policies[1])
    with torch.no_grad():
        kl = (policy.logprobs(s.ids, s.mask) - ref.logprobs(s.ids, s.mask)).sum(1)
    r = torch.tensor([1.0 if len(tokenizer.decode(i[m].tolist())) % 2 else -1.0 for i, m in zip(s.ids, s.mask)])
    assert kl.abs().max() > 0.1
    torch.testing.assert_close(seen[1].flatten(), r - 0.5 * kl, rtol=0, atol=1e-3)
    with torch.no_grad():
        x = ref.logprobs(s.ids, s.mask) - policy.logprobs(s.ids, s.mask)
    assert lines(ends / "inside/x.jsonl")[2]["kl"] == pytest.approx((x.exp() - x - 1).sum(1).mean().item(), rel=1e-3)


EXACT = ["--task", "exact", "--adv-norm", "loo", "--agg", "const", "--kl", "reward", "--device", "cpu", "--lr", 1e-3, "--group", 32]


def test_shuffled_rewards_do_not_learn(world, monkeypatch):
    """40 steps of RLOO without KL gain more than 0.8 of reward; with the rewards of each rollout dealt out at random, it stays near."""
    monkeypatch.chdir(world)
    gains, judge, generator = [], evaluate.Reward.__call__, torch.Generator().manual_seed(0)

    def shuffled(self, rows, s):
        r = judge(self, rows, s)
        return r[torch.randperm(len(r), generator=generator)]

    for patch in (judge, shuffled):
        monkeypatch.setattr(evaluate.Reward, "__call__", patch)
        assert main("grpo", *EXACT, "--beta", 0, "--steps", 40, "--eval-every", 0, "--out", "shuffled/x.pt") == 0
        final = lines(world / "shuffled/x.jsonl")[-1]["final"]
        gains.append(final["reward"] - final["ref_reward"])
    assert gains[0] > 0.8 and abs(gains[1]) < 0.3, gains


@pytest.mark.slow
def test_rloo_comes_near_the_known_optimum(world, monkeypatch):
    """300 short steps: KL(π‖π*) from above 1 to below 0.1; without a penalty the same steps end further than 0.3 away."""
    monkeypatch.chdir(world)
    found = []
    for options in ([], ["--beta", 0]):
        assert main("grpo", *EXACT, "--steps", 300, *options, "--out", "near/x.pt") == 0
        found.append(lines(world / "near/x.jsonl")[-1]["final"])
    assert lines(world / "near/x.jsonl")[0]["options"]["kl"] == "none"
    assert found[0]["kl_star"] < 0.1 and found[0]["kl_optimum"] == pytest.approx(found[0]["kl_star"]) and found[1]["kl_star"] > 0.3


# ---- DAPO's refill


def fake_rollouts(monkeypatch, rounds):
    """dapo.rollout gives one round of verdicts after another; each response is the number of its place among all. -> the places"""
    rounds, count = [torch.tensor(x, dtype=torch.bool) for x in rounds], [0]

    def rollout(*_):
        verdicts = rounds.pop(0)
        n = verdicts.numel()
        ids = torch.arange(count[0], count[0] + n)[:, None].expand(n, 2 + count[0] % 3)
        count[0] += n
        return verdicts, Samples(ids, ids >= 0, torch.zeros(n, ids.size(1) - 1), torch.ones(n, dtype=torch.bool))

    monkeypatch.setattr(dapo, "rollout", rollout)
    return argparse.Namespace(correct=lambda verdicts, s: verdicts.flatten())


def test_the_refill_holds_mixed_groups_only_and_drops_the_surplus(monkeypatch):
    """Groups of 2, three needed: round 1 has one mixed, round 2 none, round 3 three, of which two are taken, in order."""
    reward = fake_rollouts(monkeypatch, [[[1, 1], [0, 1], [0, 0]], [[1, 1], [1, 1], [0, 0]], [[1, 0], [1, 0], [0, 1]]])
    o = argparse.Namespace(batch_size=3, max_rounds=5, group=2)
    s, correct, facts = dapo.dynamic_sampling(None, o, reward, None, 0, o, None)
    assert s.ids[:, 0].tolist() == [2, 3, 12, 13, 14, 15] and correct.tolist() == [[False, True], [True, False], [True, False]]
    assert facts["num_gen_batches"] == 3 and facts["kept_fraction"] == pytest.approx(4 / 9) and facts["accuracy"] == pytest.approx(10 / 18)


def test_random_refills_never_hold_a_constant_group(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        rounds = [(torch.rand(4, 3, generator=generator) < 0.8).tolist() for _ in range(30)]
        o = argparse.Namespace(batch_size=5, max_rounds=30, group=3)
        reward = fake_rollouts(monkeypatch, rounds)
        s, correct, _ = dapo.dynamic_sampling(None, o, reward, None, 0, o, None)
        flat = torch.tensor(rounds).flatten()
        assert correct.shape == (5, 3) and s.ids.size(0) == 15 and torch.equal(flat[s.ids[:, 0]], correct.flatten())
        assert (correct.any(1) & ~correct.all(1)).all()


EASY, HARD, MIXED = [[1, 1]] * 3, [[0, 0]] * 3, [[1, 0]] + [[1, 1]]


@pytest.mark.parametrize("rounds, word", [([EASY, EASY], "too easy"), ([HARD, HARD], "too hard"), ([MIXED, MIXED[:1]], "more rounds")])
def test_too_easy_and_too_hard(rounds, word, monkeypatch):
    reward = fake_rollouts(monkeypatch, rounds)
    o = argparse.Namespace(batch_size=3, max_rounds=2, group=2)  # stands for the prompts too, whose batch_size is asked for
    s, correct, why = dapo.dynamic_sampling(None, o, reward, None, 0, o, None)
    assert s is None and correct is None and word in why and "--max-rounds 2" in why and "of the 3 needed" in why


def test_a_run_that_finds_no_mixed_groups(ends, monkeypatch, capsys):
    """At the first step it is an error, and nothing is trained; later the run ends early, with its checkpoint and summary."""
    monkeypatch.chdir(ends)
    args = ["--steps", 4, "--batch-size", 4, "--group", 4, "--log-every", 1, "--max-rounds", 2]
    assert main("dapo", *ENDS, *args, "--reward", "judge.py:constant", "--out", "starved/x.pt") == 1
    assert "too easy" in capsys.readouterr().err and not (ends / "starved/x.pt").exists()
    sampling, calls = dapo.dynamic_sampling, []
    twice = lambda *args: calls.append(1) or sampling(*args) if len(calls) < 2 else (None, None, "too easy")  # noqa: E731
    monkeypatch.setattr(dapo, "dynamic_sampling", twice)
    args[args.index("--log-every") + 1] = 3
    assert main("dapo", *ENDS, *args, "--reward", "judge.py:odd", "--out", "starved/x.pt") == 0
    out = capsys.readouterr().out
    assert "too easy. The run ends after step 2 of 4" in out and "--resume" not in out
    record = lines(ends / "starved/x.jsonl")
    assert [line["step"] for line in record[1:-1]] == [2] and "reward" in record[-1]["final"] and load("starved/x.pt")[1]["steps"] == 2
    assert not (ends / "starved/x.state").exists()


def test_dapo_s_reward_is_the_verdict_with_the_length_penalty_after_the_filter(ends, monkeypatch):
    """±1, minus the soft punishment: with L_max = 8, L_c = 4 a response of 8 tokens loses 1, of 6 tokens ½, of 4 nothing."""
    monkeypatch.chdir(ends)
    seen, taken = [], []
    advantages, sampling = dapo.group_advantages, dapo.dynamic_sampling
    monkeypatch.setattr(dapo, "group_advantages", lambda R, norm: (seen.append(R), advantages(R, norm=norm))[1])
    monkeypatch.setattr(dapo, "dynamic_sampling", lambda *a: (taken.append(sampling(*a)), taken[-1])[1])
    args = ["--steps", 1, "--overlong-cache", 4, "--log-every", 1]
    assert main("dapo", *ENDS, *BATCH, *args, "--out", "long/x.pt") == 0
    s, correct, _ = taken[0]
    n = s.mask.sum(1).view(8, 4)
    assert {4, 6, 8} <= set(n.flatten().tolist())
    expected = torch.where(correct, 1.0, -1.0) - ((n - 4) / 4).clamp(min=0)
    torch.testing.assert_close(seen[0], expected)
    line = lines(ends / "long/x.jsonl")[1]
    assert line["overlong"] == pytest.approx((n > 4).float().mean().item()) and line["overlong_reward"] < 0
    assert line["frac_reward_zero_std"] == 0.0 and line["kept_fraction"] > 0
    assert line["reward"] == pytest.approx((2.0 * correct - 1).mean().item())


def test_fewer_prompts_than_a_batch_and_fewer_responses_than_minibatches(ends, tmp_path, monkeypatch):
    """A file with one training prompt: the batch is the set, for the refill too; 4 responses make at most 4 minibatches."""
    monkeypatch.chdir(tmp_path)
    for name in ("ends.pt", "judge.py"):
        shutil.copy(ends / name, tmp_path)
    (tmp_path / "two.jsonl").write_text('{"prompt": "Who?"}\n{"prompt": "Why?"}\n')
    args = ["--task", "two.jsonl", *ENDS, "--steps", 2, "--group", 4, "--minibatches", 64, "--log-every", 1, "--reward", "judge.py:odd"]
    for script in ("grpo", "dapo"):
        assert main(script, *args) == 0
        line = lines(tmp_path / f"out/two/{script}.jsonl")[1]
        assert 5 < line["entropy"] < math.log(748)  # a nearly random model's


def test_overlong_filter_leaves_cut_responses_out_of_the_loss(ends, monkeypatch):
    monkeypatch.chdir(ends)
    seen, loss = [], dapo.dapo_loss
    monkeypatch.setattr(dapo, "dapo_loss", lambda logp, *more: (seen.append((logp != 0).any(1)), loss(logp, *more))[1])
    args = [*ENDS, *BATCH, "--steps", 1, "--log-every", 1, "--minibatches", 1, "--out", "filter/x.pt"]
    assert main("dapo", *args) == 0 and main("dapo", *args, "--overlong-filter") == 0
    line = lines(ends / "filter/x.jsonl")[1]
    cut = line["completions/clipped_ratio"]
    assert seen[0].all() and 0 < cut < 1 and seen[1].float().mean() == pytest.approx(1 - cut)
    assert 5 < line["entropy"] < math.log(748) and line["completions/mean_length"] > 3  # a nearly random model's


def test_the_diff_of_the_two_files_is_the_method():
    """Beside docstrings, at most 60 lines of either file are not in the other."""
    texts = [re.sub(r'"""(?s:.*?)"""', "", (ROOT / name).read_text()).splitlines() for name in ("grpo.py", "dapo.py")]
    changed = [line for line in difflib.ndiff(*texts) if line[:2] in ("- ", "+ ") and line[2:].strip()]
    assert sum(line[0] == "-" for line in changed) <= 60 and sum(line[0] == "+" for line in changed) <= 60


# ---- rewards


def test_each_response_is_judged_with_its_own_prompt(tmp_path):
    """Prompts 12+34= and 50+50=, two responses each: 46 and 100; 100 without an end, and 100."""
    (tmp_path / "r.py").write_text("def f(prompt, completion): return len(completion) - 2")
    task, tokenizer = data.task("arithmetic:2"), data.tokenizer()
    rows = [(tokenizer.encode(x), x, {"answer": y}) for x, y in (("12+34=", "46"), ("50+50=", "100"))]
    answers = [tokenizer.answer("46"), tokenizer.answer("100"), tokenizer.answer("100")[:-1], tokenizer.answer("100")]
    batch = data.pad([(tuple(rows[i // 2][0]), tuple(y)) for i, y in enumerate(answers)])
    assert len(batch.ids) == 4
    s = Samples(batch.ids, batch.mask, None, torch.tensor([True, True, False, True]))
    reward = evaluate.Reward(CPU, task).open(tokenizer)
    assert reward(rows, s).tolist() == [1.0, 0.0, 0.0, 1.0] and reward.correct(rows, s).tolist() == [True, False, False, True]
    reward = evaluate.Reward(CPU, task, f"{tmp_path}/r.py:f").open(tokenizer)
    assert reward(rows, s).tolist() == [0.0, 1.0, 1.0, 1.0] and reward.correct(rows, s).tolist() == [False, True, True, True]


def test_a_user_s_function_gets_the_columns_it_names(tmp_path):
    (tmp_path / "r.py").write_text(
        "def named(prompt, completion, answer, weight=1): return weight * (completion == answer)\n"
        "def all_of_them(prompt, completion, **columns): return sorted(columns) == ['answer', 'ended', 'reference']\n"
        "def ended(prompt, completion, ended): return ended\n")  # fmt: skip
    columns = {"answer": "4", "reference": "it is 4"}
    named, every, ended = (data.user_reward(f"{tmp_path}/r.py:{name}", columns) for name in ("named", "all_of_them", "ended"))
    assert named("p", "4", True, **columns) == 1.0 and named("p", "5", True, **columns) == 0.0
    assert named("p", "4", weight=3, **columns) == 3.0
    (tmp_path / "r.py").write_text(
        "from __future__ import annotations\nimport dataclasses\n@dataclasses.dataclass\nclass A:\n    x: int = 1\n"
        "def long(p, c): raise ValueError('a' * 300 + '\\n' + 'b')\ndef big(p, c): return 10**400\ndef wide(p, c): return 1e39\n"
        "def rest(p, c, *more): return 1\ndef leave(p, c): raise SystemExit(3)\n")  # fmt: skip
    assert data.user_reward(f"{tmp_path}/r.py:rest", columns)("p", "c", True, **columns) == 1.0
    for name, words in {"long": "raised ValueError", "big": "returned 1000", "wide": "returned 1e", "leave": "raised SystemExit"}.items():
        with pytest.raises(data.DataError, match=words) as error:
            data.user_reward(f"{tmp_path}/r.py:{name}", columns)("p", "c")
        assert "\n" not in str(error.value) and len(str(error.value)) < 500
    assert every("p", "4", True, **columns) == 1.0 and (ended("p", "4", True), ended("p", "4", False)) == (1.0, 0.0)


def test_a_reward_on_a_file_is_its_mean_on_the_test_prompts(ends, tmp_path, monkeypatch):
    """The columns reach the function by name, `completion` as `reference`; the record's `reward` is its mean on the test prompts, and
    evaluate.py finds the function again."""
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"What is {i}?", "completion": f"It is {i}.", "size": 2.0} for i in range(60)]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "r.py").write_text("def check(prompt, completion, reference, size):\n"
                                   "    assert reference == prompt.replace('What', 'It').replace('?', '.')\n"
                                   "    return size if len(completion) % 2 else 0.0\n"
                                   "def zero(prompt, completion): return 0\n")  # fmt: skip
    args = ["--task", "q.jsonl", "--init", ends / "ends.pt", *TINY, "--group", 4, "--reward", "r.py:check"]
    done = run("grpo.py", *args, cwd=tmp_path)
    final = lines(tmp_path / "out/q/grpo.jsonl")[-1]["final"]
    test = data.task("q.jsonl").prompts(None, 0, split="test")
    assert final["prompts"] == len(test) and (final["reward"] * len(test) / 2) % 1 == pytest.approx(0) and 0 <= final["ref_reward"] <= 2
    assert "reward  " in done.stdout and "gold" not in done.stdout.split("test prompts")[1]
    again = run("evaluate.py", "out/q/grpo.pt", "--device", "cpu", cwd=tmp_path).stdout
    assert re.search(rf"^reward +{final['ref_reward']:.2f} +{final['reward']:.2f} ± ", again, re.M)
    other = run("evaluate.py", "out/q/grpo.pt", "--reward", "r.py:zero", "--device", "cpu", cwd=tmp_path).stdout
    assert re.search(r"^reward +0.00 +0.00", other, re.M)
    (tmp_path / "r.py").unlink()
    assert "r.py is no file" in run("evaluate.py", "out/q/grpo.pt", "--device", "cpu", cwd=tmp_path).stdout


def test_a_function_that_fails_later_names_the_prompt(ends, monkeypatch, capsys):
    """It works on what is tried before the training, and raises or returns nan later: one line with the prompt, the completion and the
    function's line, exit code 2; the steps done are saved, and once it is mended --resume ends with the bits of a run that met no error."""
    monkeypatch.chdir(ends)
    late = "calls = []\ndef late(prompt, completion):\n    calls.append(1)\n    return 1.0 if len(calls) < 30 else "
    args = [*ENDS, *TINY, "--group", 4, "--reward", "late.py:late"]
    for body, words in (("1 / 0", "raised ZeroDivisionError (division by zero, line 4) at"), ("float('nan')", "returned nan at")):
        (ends / "late.py").write_text(late + body + "\n")
        assert main("grpo", *args, "--out", "late/x.pt") == 2
        out, said = capsys.readouterr()
        said = said.strip().splitlines()
        assert len(said) == 1 and f"{words} the prompt 'A " in said[0] and "late.py:late" in said[0] and "and the completion '" in said[0]
        assert "step 1 is saved" in out and torch.load("late/x.state", weights_only=True)["step"] == 1
    (ends / "late.py").write_text("def late(prompt, completion):\n    return 1.0\n")
    assert main("grpo", *args, "--out", "late/x.pt", "--resume") == 0 and main("grpo", *args, "--out", "late/y.pt") == 0
    assert all(torch.equal(a, b) for a, b in zip(load("late/x.pt")[0].parameters(), load("late/y.pt")[0].parameters()))


def test_a_missing_reward_model_is_made_first(ends, tmp_path, monkeypatch, capsys):
    """--reward rm starts reward_model.py of the same task; the ledger holds it, and the record has both its score and the gold reward."""
    shutil.copytree(ends / "out", tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    calls = []

    class Process:
        def __init__(self, args, **more):
            calls.append([str(a) for a in args[1:]])
            self.returncode = main("reward_model", "--steps", 2, "--batch-size", 4, "--device", "cpu", "--warmup", 1)

        def poll(self):
            return self.returncode

    monkeypatch.setattr(common, "_commit", lambda: "")
    monkeypatch.setattr(common.subprocess, "Popen", Process)
    assert main("grpo", *TINY, "--group", 4, "--reward", "rm", "--eval-every", 2) == 0
    assert calls == [[str(ROOT / "reward_model.py"), "--task", "reviews", "--device", "cpu", "--dtype", "auto"]]
    record = lines(tmp_path / "out/reviews/grpo.jsonl")
    final, evaluation = record[-1]["final"], next(line for line in record if "eval" in line)["eval"]
    assert {m["role"]: m["trainable"] for m in final["models"]} == {"policy": True, "reward": False, "ref": False}
    for figures in (final, evaluation):
        assert {"score", "ref_score", "reward", "ref_reward"} <= set(figures) and figures["reward"] <= 3
    model = load("out/reviews/reward_model.pt")[0]
    rm = ["--reward", "rm", "--reward-model"]
    assert main("grpo", *TINY, "--group", 4, *rm, "out/reviews/sft.pt", "--out", "out/x.pt") == 2
    assert main("grpo", *TINY, "--group", 4, *rm[:2], "--out", "out/reviews/reward_model.pt") == 2
    assert "would overwrite out/reviews/reward_model.pt" in capsys.readouterr().err
    short, meta = load("out/reviews/reward_model.pt")
    save(ScalarGPT(GPTConfig(short.config.vocab_size, 64, 1, 1, 8)), "short.pt", **meta)
    assert main("grpo", *TINY, "--group", 4, *rm, "short.pt", "--out", "out/x.pt") == 2
    assert "short.pt reads at most 64 tokens, and the policy 256" in capsys.readouterr().err
    tokenizer = data.tokenizer()
    reward = evaluate.Reward(CPU, data.task("reviews"), "rm").open(tokenizer, "out/reviews/reward_model.pt")
    x, y = tokenizer.encode("A drama, The Last Road:"), tokenizer.answer(" Skip it.")
    mask = torch.tensor([[False] * len(x) + [True] * len(y) + [False] * 2])
    s = Samples(torch.tensor([[*x, *y, 5, 5]]), mask, torch.zeros(1, len(x) + len(y) + 1), torch.tensor([True]))
    expected = model.head(model.trunk.hidden(torch.tensor([[*x, *y]])))[0, -1, 0]  # at the end token
    assert reward([(x, "", {})], s).item() == pytest.approx(expected.item(), abs=1e-5)

"""Gradients of the estimators, compared with enumeration; and which tokens, rows and models are
trained, and which have no weight. test_steps.py compares the steps of the scripts themselves with
their equations."""

import copy
import math

import pytest
import test_steps
import torch
from conftest import BATCH, ENDS, few_prompts, first_gradient, lines, main
from torch.nn.functional import cosine_similarity, pad

import dapo
import data
import dpo
import grpo
import online_dpo
import ppo
from data.exact import star
from gpt import GPT, GPTConfig, ScalarGPT, load, response_logprobs
from packing import row_lengths
from training import Rollout, Run, parse
from training.sampling import sample

WORLD = data.task("exact")
R, D, BEATS = (torch.from_numpy(x) for x in (WORLD.r, WORLD.d, WORLD.beats))
LOG_D = D.log()
WORDS, TOKENIZER = data.tokenizer(), data.tokenizer(own=WORLD.tokenizer)
ONE = ["--updates", 1, "--minibatches", 1]
RM = [*ENDS, "--batch-size", 32, "--reward", "judge.pt"]  # of ppo.py
PAIRS = [*ENDS, "--batch-size", 8, "--reward", "judge.py:odd"]  # of online_dpo.py

watch = test_steps.watch


@pytest.fixture(autouse=True)
def few_test_prompts(monkeypatch):
    """The figures at the end of a run are not looked at here."""
    few_prompts(monkeypatch, 8)


def gradient(value, *models):
    parameters = [p for model in models for p in model.parameters()]
    found = torch.autograd.grad(value, parameters, retain_graph=True)
    return torch.cat([g.flatten() for g in found])


def cosine(a, b):
    return cosine_similarity(a, b, dim=0).item()


def table(model):
    """-> log π(y|x) of every outcome of `exact`, (4, 40), with gradient"""
    rows, _ = data.encode(WORLD.rows, TOKENIZER, 8)
    return response_logprobs(model, data.pad(rows)).view(4, 40)


# ---- estimators against enumeration, from a fixed policy on `exact`


def small(seed):
    model = GPT(GPTConfig(4, 8, 1, 1, 16), seed)
    with torch.no_grad():
        model.wte.weight *= 15
    return model


@pytest.fixture(scope="module")
def drawn():
    """20,480 samples in groups of 8 from a policy, their rewards, and their log-probs under it and
    under a reference; and by enumeration E[r] and the log-probs of both, with gradient."""
    policy, ref = small(0), small(1)
    prompts, generator = [TOKENIZER.encode(x) for x in WORLD.contexts], torch.Generator()
    s = sample(policy, prompts, 3, TOKENIZER.ends, 1.0, generator.manual_seed(0), 5120)
    texts = [TOKENIZER.decode(ids[mask].tolist()) for ids, mask in zip(s.ids, s.mask)]
    outcome = torch.tensor([WORLD.outcomes.index(text) for text in texts]).view(4, -1)
    r = R.gather(1, outcome).view(-1, 8).float()  # (2560, 8)
    logp = policy.logprobs(s.ids, s.mask)
    with torch.no_grad():
        ref_logp, log_ref = ref.logprobs(s.ids, s.mask), table(ref)
    log_p = table(policy)
    expected = (log_p.exp() * R.float()).sum(1).mean()
    return policy, s.mask, logp, ref_logp, r, expected, log_p, log_ref


def kl(log_p, log_q):
    return (log_p.exp() * (log_p - log_q)).sum(1).mean()


def reinforce(logp, reward, norm, policy):
    """-> the mean gradient of GRPO's loss on-policy, without KL, summed over the tokens"""
    adv = grpo.group_advantages(reward, norm=norm).view(-1, 1)
    losses = grpo.grpo_loss(logp, logp.detach(), None, adv, beta=0.0)
    return gradient(losses.sum() / len(logp), policy)


def test_rloo_and_dr_grpo_are_the_gradient_of_the_expected_reward(drawn):
    """One on-policy update, summed over tokens: E∇loss = -∇E[r] by leave-one-out; r - mean is
    (G-1)/G of it, sample by sample."""
    policy, _, logp, _, r, expected, *_ = drawn
    exact = -gradient(expected, policy)
    loo, none, std = (reinforce(logp, r, norm, policy) for norm in ("loo", "none", "std"))
    assert cosine(loo, exact) > 0.99 and cosine(none, exact) > 0.99
    assert loo.norm() / exact.norm() == pytest.approx(1, abs=0.1)
    assert (none - 7 / 8 * loo).norm() < 1e-4 * none.norm()
    assert cosine(std, exact) < cosine(loo, exact)  # divided by std it is another objective's


def test_kl_in_the_reward_is_the_gradient_of_j(drawn):
    policy, _, logp, ref_logp, r, expected, log_p, log_ref = drawn
    score = r - 0.5 * (logp.detach() - ref_logp).sum(1).view_as(r)
    found, J = reinforce(logp, score, "loo", policy), expected - 0.5 * kl(log_p, log_ref)
    assert cosine(found, -gradient(J, policy)) > 0.99
    assert cosine(found, -gradient(expected, policy)) < 0.99  # the penalty is not small


@pytest.mark.parametrize("options, exact", [("--tis 1e9", True), ("--tis 0.9", False), ("", False)])
@pytest.mark.parametrize("script", [grpo, dapo])
def test_tis_makes_the_samples_of_another_sampler_those_of_the_policy(script, options, exact):
    """One token, all outcomes, each as often as drawn at temperature 1.3. The mean gradient of the
    loss of the policy, which is read at 1, is that of J if no weight is cut."""
    world, policy, ref = data.task("exact:1"), small(0).double(), small(1).double()
    rows, _ = data.encode(world.rows, data.tokenizer(own=world.tokenizer), 8)
    batch = data.pad(rows)
    log_p, log_ref = (response_logprobs(model, batch).view(4, 4) for model in (policy, ref))
    sampler = (log_p.detach() / 1.3).log_softmax(1)
    r, mask = torch.from_numpy(world.r), batch.mask
    rollout = Rollout(ids=batch.ids, mask=mask, logp=mask * sampler.view(-1, 1))
    rollout.old_logp, rollout.ref_logp = (mask * x.detach().view(-1, 1) for x in (log_p, log_ref))
    penalty = 0.5 if script is grpo else 0.0
    words = "--adv-norm none " + ("--kl reward --beta 0.5 " if penalty else "--no-overlong ")
    o = parse(script.Options, (words + options).split(), script.PRESETS)
    rollout.adv = script.score_rollout(r, rollout, o)
    losses, _ = script.compute_loss(policy, rollout, o)
    found = gradient((sampler.exp().view(-1, 1) * losses * mask).sum() / 4, policy)
    J = (log_p.exp() * (r - penalty * (log_p - log_ref))).sum(1).mean()
    far = (found + gradient(J, policy)).norm() / gradient(J, policy).norm()
    assert far < 1e-9 if exact else far > 0.05


@pytest.mark.parametrize("lam, low, high", [(1.0, 0.99, 1.0), (0.0, -1.0, 0.9)])
def test_a_wrong_critic_does_not_bias_ppo_at_lambda_1(lam, low, high, drawn):
    """The mean gradient of 160 rollouts of 128, each whitened by itself, against that of
    J = E[r] - β KL(π‖π_ref) by enumeration. The critic is a wrong function of the prefix, as large
    as the rewards: at λ = 1 a baseline, at λ = 0 what the policy is taught."""
    policy, mask, logp, ref_logp, r, expected, log_p, log_ref = drawn
    total, generator = 0.0, torch.Generator().manual_seed(0)
    wrong = 3 * torch.sin(100 * logp.detach().roll(1, 1) + 7)  # of the token before
    for rows in torch.randperm(len(logp), generator=generator).split(128):
        old, m = logp[rows].detach(), mask[rows]
        rewards = ppo.token_rewards(r.flatten()[rows], old, ref_logp[rows], m, 0.5)
        adv, _ = ppo.gae(rewards, wrong[rows], m, 1.0, lam)
        losses = ppo.ppo_loss(logp[rows], old, ppo.whiten(adv, m))
        total = total + (losses * m).sum() / m.sum() / 160
    J = expected - 0.5 * kl(log_p, log_ref)
    assert low < cosine(gradient(total, policy), -gradient(J, policy)) <= high


def test_kl_estimators_against_the_exact_kl(drawn):
    """x = log π/π_ref of the whole response. Values: k1 and k3 within four standard errors of
    KL(π‖π_ref). Gradients: k2 and ρ k3 are those of KL(π‖π_ref), k3 that of KL(π_ref‖π), k1 has
    none."""
    policy, _, logp, ref_logp, _, _, log_p, log_ref = drawn
    logp_y, ref = logp.sum(1, keepdim=True), ref_logp.sum(1, keepdim=True)
    k1, k3, ratio = logp_y - ref, grpo.k3(logp_y, ref), (logp_y - logp_y.detach()).exp()
    for k in (k1, k3):
        assert abs(k.mean() - kl(log_p, log_ref)) < 4 * k.std() / len(k) ** 0.5
    toward, away = (gradient(kl(*q), policy) for q in ((log_p, log_ref), (log_ref, log_p)))
    assert cosine(gradient((k1**2 / 2).mean(), policy), toward) > 0.99
    assert cosine(gradient((ratio * k3).mean(), policy), toward) > 0.99
    assert cosine(gradient(k3.mean(), policy), away) > 0.99
    assert gradient(k1.mean(), policy).norm() < 0.1 * toward.norm()
    assert cosine(toward, away) < 0.95  # the two directions differ


def gradient_at(log_p, label, beta=0.5):
    """The largest entry of the expectation, over pairs of samples of the policy and their labels,
    of the gradient in the logits; π_ref = d."""
    theta = log_p.clone().requires_grad_()
    logp, p = theta.log_softmax(1), log_p.exp()
    wins = BEATS if label == "bt" else (R[:, :, None] > R[:, None, :]).double()
    weight = 2 * p[:, :, None] * p[:, None, :] * wins
    w, ref_w = (x[:, :, None].expand(4, 40, 40) for x in (logp, LOG_D))
    l, ref_l = (x[:, None, :].expand(4, 40, 40) for x in (logp, LOG_D))
    (weight * online_dpo.dpo_loss(w, l, ref_w, ref_l, beta)).sum().backward()
    return theta.grad.abs().max().item()


def test_the_optimum_of_own_pairs_is_that_of_the_labels():
    """Drawn by Bradley–Terry, the mean gradient of online DPO vanishes at π* and not at π_ref; with
    argmax it does not vanish at π*."""
    best = star(LOG_D, R, 0.5)
    assert gradient_at(best, "bt") < 1e-12 < 1e-2 < gradient_at(LOG_D, "bt")
    assert gradient_at(best, "argmax") > 1e-2


@pytest.mark.parametrize("loss", ["dpo", "ipo"])
def test_equal_rows_are_scored_once_and_count_as_often_as_they_stand(loss, world):
    """A batch of 64 pairs, three times, with many twins: its loss and gradient are those of the 192
    pairs one by one."""
    policy = load(world / "out/exact/sft.pt")[0].double()
    o, ref = parse(dpo.Options, ["--loss", loss, "--beta", "0.5"]), small(0).double()
    pairs, _ = data.encode(WORLD.preferences(64, 0), TOKENIZER, 8)
    pairs *= 3
    rows = {(pair[0], y) for pair in pairs for y in pair[1:]}
    batch = data.pad_pairs(pairs)
    assert len(batch.ids) == len(rows) < 128 < len(batch.inverse) == 384
    ends = sum(len(y) - 1 for _, y in rows)  # what stands before them; and once how prompts begin
    begins = {x[:i] for x, _ in rows for i in range(1, len(x) + 1)}
    assert batch.tokens == ends + len(begins)
    together, _ = dpo.compute_loss(policy, ref, batch, o)
    single = [dpo.compute_loss(policy, ref, data.pad_pairs([pair]), o)[0] for pair in pairs]
    a, b = (gradient(losses.mean(), policy) for losses in (together, torch.cat(single)))
    torch.testing.assert_close(together, torch.cat(single))
    assert a.norm() > 1e-3 and (a - b).norm() < 1e-9 * a.norm()


# ---- what is trained


def padded(*args, **more):
    """Samples with other ids in their padding, and more of it"""
    s = sample(*args, **more)
    ids = s.ids.where(torch.arange(s.ids.size(1)) < row_lengths(s.mask)[:, None], 7)
    wide = {name: pad(x, (0, 5)) for name, x in (("mask", s.mask), ("logp", s.logp))}
    return s | {"ids": pad(ids, (0, 5), value=9), **wide}


def endless(*args, **more):
    """Samples whose end tokens are left out of the mask"""
    s = sample(*args, **more)
    assert 0.2 < s.finished.float().mean() < 1
    last = torch.arange(s.ids.size(1)) == row_lengths(s.mask)[:, None] - 1
    return s | {"mask": s.mask & ~(s.finished[:, None] & last)}


@pytest.mark.parametrize("script", ["grpo", "ppo", "online_dpo"])
def test_padding_is_never_trained_and_the_end_token_is(script, ends, monkeypatch):
    """Other ids in the padding, and more of it, change no gradient; an end token out of the mask
    does."""
    monkeypatch.chdir(ends)
    args, micro = (PAIRS, 8) if script == "online_dpo" else ([*ENDS, *BATCH, *ONE], 32)
    a, _ = first_gradient(script, args, monkeypatch)
    b, _ = first_gradient(script, [*args, "--micro-batch", micro], monkeypatch, sample=padded)
    c, _ = first_gradient(script, args, monkeypatch, sample=endless)
    assert a.norm() > 1e-3 and (a - b).norm() < 1e-9 * a.norm()
    assert (a - c).norm() > 1e-2 * a.norm()


@pytest.mark.parametrize("agg", grpo.AGGREGATIONS)
@pytest.mark.parametrize("script", [grpo, dapo])
def test_weights_reduce_a_minibatch_as_agg_names_however_it_is_cut(script, agg):
    """By a plain loop over tokens, in float64; a response of which nothing is left
    (--overlong-filter) weighs nothing, nor does a minibatch of such."""
    mask = torch.tensor([[0, 1, 1, 1, 0], [0, 0, 1, 0, 0], [0, 1, 1, 0, 0], [0] * 5]).bool()
    minibatch = Rollout(ids=mask.long(), mask=mask, logp=mask.double())
    x = torch.arange(20, dtype=torch.float64).view(4, 5)
    rows, n = [x[i][mask[i]] for i in range(4)], 6
    expected = {
        "seq_mean": sum(row.mean() for row in rows[:3]) / 4,
        "token_mean": sum(row.sum() for row in rows) / n,
        "const": sum(row.sum() for row in rows) / (4 * 8),
        "sum": sum(row.sum() for row in rows) / 4,
    }
    for cut in (4, 3, 1):
        total = 0.0
        for i in torch.arange(4).split(cut):
            weight = script.token_weight(minibatch[i], minibatch, 8, agg)
            total = total + (weight * x[i, : weight.size(1)]).sum().item()
        assert total == pytest.approx(expected[agg].item(), rel=1e-12)
    assert script.token_weight(minibatch[3:], minibatch[3:], 8, agg).abs().max() == 0


def spy(monkeypatch, place, name):
    """-> a list that gets (arguments, result) of each call of place.name"""
    kept, f = [], getattr(place, name)

    def watch(*args, **more):
        kept.append((args, f(*args, **more)))
        return kept[-1][1]

    monkeypatch.setattr(place, name, watch)
    return kept


def same(a, b):
    """Whether the weights a are those of b, to the bit"""
    return all(torch.equal(x, b[name]) for name, x in a.items())


def test_four_models_two_of_them_frozen(ends, monkeypatch):
    """The critic starts from the reward model, the policy from --init; after three steps both have
    changed, and reference and reward model are to the bit what they were, without a gradient. With
    another reward three models, and a critic on the policy's trunk."""
    monkeypatch.chdir(ends)
    held, start, hold = {}, {}, Run.hold

    def noted(run, **models):
        hold(run, **models)
        held.clear()
        held.update(run.models)
        start.update({role: copy.deepcopy(x.state_dict()) for role, x in held.items()})

    monkeypatch.setattr(Run, "hold", noted)
    assert main("ppo", *RM, *"--steps 3 --beta 0.1 --out four/x.pt".split()) == 0
    assert list(held) == ["policy", "critic", "ref", "reward"]
    assert same(start["critic"], start["reward"]) and same(start["policy"], start["ref"])
    for role, model in held.items():
        frozen = role in ("ref", "reward")
        assert same(start[role], model.state_dict()) == frozen, role
        for p in model.parameters():
            assert p.requires_grad != frozen and (p.grad is None or not frozen), role
    parameters = [p for model in held.values() for p in model.parameters()]
    assert len({p.data_ptr() for p in parameters}) == len(parameters)  # no weight is shared
    assert same(load("judge.pt")[0].state_dict(), start["critic"])
    assert main("ppo", *ENDS, *BATCH, "--steps", 1, "--out", "three/x.pt") == 0
    assert list(held) == ["policy", "critic", "ref"] and isinstance(held["critic"], ScalarGPT)
    assert same({f"trunk.{k}": v for k, v in start["policy"].items()}, start["critic"])
    assert start["critic"]["head.weight"].abs().sum() == start["critic"]["head.bias"] == 0


@pytest.mark.parametrize("parts", [1, 32])
def test_overlong_filter_leaves_cut_responses_out_of_the_loss(parts, watch):
    """In 32 minibatches some are empty. The figures of the responses are those of all."""
    command = "dapo --init ends.pt --batch-size 8 --group 4 --reward judge.py:odd --overlong-filter"
    ((line, steps, _),) = watch(f"{command} --updates 1 --minibatches {parts}", 1)
    left = torch.cat([step.rows.mask.any(1) for step in steps])
    assert left.equal(torch.cat([step.rows.finished for step in steps]))
    cut = line["completions/clipped_ratio"]
    assert 0 < cut < 1 and cut == pytest.approx(1 - left.double().mean().item())
    assert all(map(math.isfinite, line.values()))


# ---- what is old


@pytest.mark.parametrize(
    "script, dtype",
    [(grpo, "float32"), (grpo, "bfloat16"), (dapo, "bfloat16"), (ppo, "bfloat16")],
)
def test_at_a_rollout_s_first_optimizer_step_the_ratio_is_1(script, dtype, ends, monkeypatch):
    """To the bit, however it is cut: of two rollouts with four minibatches of two micro-batches
    each, the first minibatch alone."""
    monkeypatch.chdir(ends)
    name = script.__name__
    losses, called = (
        spy(monkeypatch, script, f"{name}_loss"),
        spy(monkeypatch, script, "compute_loss"),
    )
    args = "--minibatches 4 --updates 1 --micro-batch 4 --steps 2 --warmup 0 --lr 0.01".split()
    assert main(name, *ENDS, *BATCH, *args, "--dtype", dtype, "--out", "one/x.pt") == 0
    assert len(losses) == len(called) == 16
    for i, (((logp, old, *_), _), (_, (_, metrics))) in enumerate(zip(losses, called)):
        first = i % 8 < 2
        assert torch.equal(logp, old) == first
        clipped = [x for key, x in metrics.items() if "clip" in key or "approxkl" in key]
        assert len(clipped) >= 2 and (not first or not any(x.any() for x in clipped))


# ---- what moves nothing


def test_equal_rewards_move_nothing(ends, monkeypatch):
    """β = 0 and one reward for all: advantages are exactly 0, and after three steps every weight is
    what it was."""
    monkeypatch.chdir(ends)
    args = "--reward judge.py:constant --beta 0 --steps 3 --batch-size 4 --group 4 --log-every 1"
    assert main("grpo", *ENDS, *args.split(), "--out", "equal/x.pt") == 0
    assert same(*(load(path)[0].state_dict() for path in ("ends.pt", "equal/x.pt")))
    record = lines(ends / "equal/x.jsonl")
    assert record[1]["frac_reward_zero_std"] == 1.0 and record[1]["grad_norm"] == 0.0
    held = [model["role"] for model in record[-1]["final"]["models"]]
    assert held == ["policy"]  # no reference


def twins(*args, **more):
    """The second sample to each prompt is the first again."""
    s = sample(*args, **more)
    return s[torch.arange(0, len(s), 2).repeat_interleave(2)]


@pytest.mark.parametrize(
    "options, sampler, moves",
    [
        (["--label", "bt"], twins, False),
        (["--label", "argmax", "--loss", "ipo"], twins, False),
        (["--label", "argmax", "--reward", "judge.py:constant"], sample, False),
        (["--label", "bt", "--reward", "judge.py:constant"], sample, True),  # a fair coin's word
    ],
)
def test_equal_samples_move_nothing_nor_do_ties_with_argmax(
    options, sampler, moves, ends, monkeypatch
):
    monkeypatch.chdir(ends)
    found, metrics = first_gradient("online_dpo", [*PAIRS, *options], monkeypatch, sampler)
    assert (found.abs().max() > 0) == moves == (metrics["loss"] != 0)

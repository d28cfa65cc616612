"""The losses of the scripts, compared with numbers derived by hand."""

import math

import pytest
import torch

import online_dpo
from dapo import dapo_loss, keep_groups, overlong_penalty
from dpo import apo_loss, dpo_loss, ipo_loss, robust_dpo_loss
from gpt import GPT, GPTConfig
from grpo import group_advantages, grpo_loss, k3, sequence_old_logp
from kto import kto_kl, kto_loss
from orpo import log_odds, odds_ratio_loss, orpo_loss
from ppo import gae, ppo_loss, token_rewards, value_loss, whiten
from reward_model import bradley_terry_loss
from sft import nll
from simpo import simpo_loss

LOG2 = math.log(2)


def t(*x):
    """A float64 tensor: t(1, 2) is (2,), t([1, 2]) is (1, 2)."""
    return torch.tensor(x, dtype=torch.float64)


def close(x):
    return pytest.approx(x, abs=1e-12)


def draw(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def at(h, loss, **options):
    """The loss of one pair whose log-ratio is h, and its gradient in logp_w: (h + 1 - 1) - (-3 -
    -3) = h."""
    logp_w = t(h + 1).requires_grad_()
    value = loss(logp_w, t(-3.0), t(1.0), t(-3.0), **options)
    value.sum().backward()
    return value.item(), logp_w.grad.item()


def test_log_2_at_equality():
    """At logp = ref_logp, h = 0 and σ(0) = 1/2. cDPO: (1-ε) log 2 + ε log 2. Robust: [(1-ε) - ε]
    log 2 / (1-2ε). IPO: 1/(4τ²)."""
    a, b = t(-3.0, -50.0, -0.5), t(-7.0, -2.0, -80.0)
    for loss in (
        dpo_loss(a, b, a, b),
        dpo_loss(a, b, a, b, beta=3.0, label_smoothing=0.3),
        robust_dpo_loss(a, b, a, b, flip=0.2),
        robust_dpo_loss(a, b, a, b, flip=0.0),
    ):
        assert loss.shape == (3,)
        torch.testing.assert_close(loss, t(LOG2, LOG2, LOG2))
    torch.testing.assert_close(ipo_loss(a, b, a, b, tau=0.1), t(25.0, 25.0, 25.0))


def test_dpo_value_and_gradient():
    """β = 0.5, h = 2 log 3: βh = log 3, σ = 3/4. L = -log(3/4) = log(4/3); ∂L/∂logp_w = -β σ(-βh) =
    -0.5 · 1/4 = -0.125."""
    value, gradient = at(2 * math.log(3), dpo_loss, beta=0.5)
    assert value == close(math.log(4 / 3))
    assert gradient == close(-0.125)


def test_dpo_is_the_sum_of_four_log_probs():
    """h = (-1 - -2) - (-5 - -3) = 1 + 2 = 3; β = 1: L = log(1 + e^-3) = 0.048587…; all four
    gradients are ± σ(-3) = 0.047426."""
    x = [t(v).requires_grad_() for v in (-1.0, -5.0, -2.0, -3.0)]
    loss = dpo_loss(*x, beta=1.0)
    loss.sum().backward()
    assert loss.item() == close(math.log(1 + math.exp(-3)))
    s = 1 / (1 + math.exp(3))
    assert [v.grad.item() for v in x] == close([-s, s, s, -s])


def test_swapping_the_answers():
    """-log σ(βh) + log σ(-βh) = -βh: at h = 5, β = 0.1 the two losses differ by -0.5."""
    assert at(5.0, dpo_loss)[0] - at(-5.0, dpo_loss)[0] == close(-0.5)


def test_doubling_beta_doubles_the_gradient_at_zero():
    """∂L/∂logp_w = -β σ(-βh), at h = 0 it is -β/2: -0.05 at β = 0.1, -0.1 at β = 0.2."""
    assert at(0.0, dpo_loss, beta=0.1)[1] == close(-0.05)
    assert at(0.0, dpo_loss, beta=0.2)[1] == close(-0.1)


def test_cdpo():
    """ε = 0.2: the gradient vanishes where σ(βh) = 1 - ε, at βh = log 4, and L there is the entropy
    -(0.8 log 0.8 + 0.2 log 0.2). At βh = log 3: L = -0.8 log(3/4) - 0.2 log(1/4); gradient
    -β[(1-ε)/4 - ε · 3/4] = -β · 0.05."""
    value, gradient = at(math.log(4) / 0.1, dpo_loss, label_smoothing=0.2)
    assert value == close(-(0.8 * math.log(0.8) + 0.2 * math.log(0.2)))
    assert gradient == close(0.0)
    value, gradient = at(math.log(3), dpo_loss, beta=1.0, label_smoothing=0.2)
    assert value == close(-0.8 * math.log(0.75) - 0.2 * math.log(0.25))
    assert gradient == close(-0.05)


def test_robust_dpo():
    """ε = 0.2, βh = log 3: L = [-0.8 log(3/4) + 0.2 log(1/4)] / 0.6, gradient -β[0.8/4 + 0.2 · 3/4]
    / 0.6 = -β · 0.35/0.6. Unbiased: 0.8 of it plus 0.2 of the flipped pair's (βh = -log 3) is the
    clean loss log(4/3). As h grows it has no bound below: at βh = 100, 0.2/0.6 · (-100)."""
    value, gradient = at(math.log(3), robust_dpo_loss, beta=1.0, flip=0.2)
    assert value == close((-0.8 * math.log(0.75) + 0.2 * math.log(0.25)) / 0.6)
    assert gradient == close(-0.35 / 0.6)
    flipped, _ = at(-math.log(3), robust_dpo_loss, beta=1.0, flip=0.2)
    assert 0.8 * value + 0.2 * flipped == close(math.log(4 / 3))
    assert at(100.0, robust_dpo_loss, beta=1.0, flip=0.2)[0] == pytest.approx(-100 / 3, abs=1e-9)


def test_ipo():
    """τ = 0.25: the minimum is at h = 1/(2τ) = 2. At h = 5: L = 3² = 9, gradient 2 · 3 = 6."""
    assert at(2.0, ipo_loss, tau=0.25) == close((0.0, 0.0))
    assert at(5.0, ipo_loss, tau=0.25) == close((9.0, 6.0))


def test_apo_zero_moves_each_answer_by_itself():
    """β = ½, u_w = 2 log 3: 1 - σ(log 3) = 1/4, gradient -β · 3/4 · 1/4. u_l = -2 log 3: σ(-log 3)
    = 1/4, gradient β · 3/16. At u = 0 it is ½ + ½; far beyond, 0 and 2."""
    w, l = t(1 + 2 * math.log(3)).requires_grad_(), t(-2 - 2 * math.log(3)).requires_grad_()
    loss = apo_loss(w, l, t(1.0), t(-2.0), beta=0.5)
    loss.sum().backward()
    assert loss.item() == close(0.5)
    assert (w.grad.item(), l.grad.item()) == close((-3 / 32, 3 / 32))
    ends = apo_loss(t(0.0, 1e4, -1e4), t(0.0, -1e4, 1e4), t(0.0, 0.0, 0.0), t(0.0, 0.0, 0.0))
    assert ends.tolist() == close([1.0, 0.0, 2.0])


def test_r_dpo_asks_more_of_a_longer_chosen_answer():
    """βh = log 3, α(|y_w| - |y_l|) = 0.1 · (7 - 2): -log σ(log 3 + ½) = log(1 + e^-½/3), which is
    less than with equal lengths, so that its gradient, -β σ(-log 3 - ½), is less too."""
    value, gradient = at(2 * math.log(3), dpo_loss, beta=0.5, longer=t(0.5))
    assert value == close(math.log(1 + math.exp(-0.5) / 3))
    assert gradient == close(-0.5 / (1 + 3 * math.exp(0.5)))


def test_extreme_log_ratios_stay_finite():
    smooth = {"label_smoothing": 0.1}
    for h in (-1e4, 1e4):
        for loss, options in (
            (dpo_loss, {}),
            (dpo_loss, smooth),
            (robust_dpo_loss, {}),
            (apo_loss, {}),
        ):
            assert all(map(math.isfinite, at(h, loss, beta=1.0, **options)))


def test_shapes_are_asserted():
    with pytest.raises(AssertionError):
        dpo_loss(t(1.0), t(1.0, 2.0), t(1.0), t(1.0))


def test_why_the_reference_must_not_share_the_policy_s_weights():
    """With one network as policy and reference, nothing detached, h is 0 for every θ: the loss
    stays log 2 and has no gradient, while the detached reference gives -β/2 ∇(logp_w - logp_l)."""
    policy = GPT(GPTConfig(vocab_size=7, block_size=8, n_layer=1, n_head=1, n_embd=8)).double()
    ids = torch.tensor([[1, 2, 3, 4], [1, 2, 5, 6]])
    mask = torch.tensor([[False, False, True, True]] * 2)
    norms = []
    for detached in (False, True):
        w, l = policy.logprobs(ids, mask).sum(1).chunk(2)
        ref_w, ref_l = (w.detach(), l.detach()) if detached else (w, l)
        loss = dpo_loss(w, l, ref_w, ref_l).sum()
        assert loss.item() == close(LOG2)
        gradient = torch.autograd.grad(loss, policy.parameters())
        norms.append(sum(g.square().sum() for g in gradient).sqrt())
    assert norms[1] > 1e-4 and norms[0] <= 1e-6 * norms[1]


def test_online_dpo_s_losses():
    """h = (-1 + 3) - (-2 + 2) = 2. DPO, β = ½: log(1 + e⁻¹). IPO, τ = ¼: (2 - 2)²; τ = 1:
    (2 - ½)². At h = 0 the gradients of DPO are -β/2 and β/2."""
    one = [t(x) for x in (-1.0, -2.0, -3.0, -2.0)]
    loss = online_dpo.dpo_loss(*one, beta=0.5).item()
    assert loss == pytest.approx(math.log(1 + math.exp(-1)))
    assert online_dpo.ipo_loss(*one, tau=0.25).item() == 0.0
    assert online_dpo.ipo_loss(*one, tau=1.0).item() == 2.25
    zero = [torch.zeros(3, requires_grad=True) for _ in range(4)]
    loss = online_dpo.dpo_loss(*zero, beta=0.5)
    loss.sum().backward()
    assert loss.tolist() == pytest.approx([LOG2] * 3)
    assert [x.grad.tolist() for x in zero[:2]] == [[-0.25] * 3, [0.25] * 3]
    with pytest.raises(AssertionError):
        online_dpo.dpo_loss(zero[0], zero[1][:2], *zero[2:])


def test_nll_sums_the_tokens():
    """-(log 1/2 + log 1/4) = 3 log 2; the masked 0 adds nothing."""
    assert nll(t([math.log(0.5), 0.0, math.log(0.25)])).tolist() == pytest.approx([3 * LOG2])


def bradley_terry(delta, **options):
    """The loss at r_w - r_l = delta, and its gradient in r_w."""
    reward_w = t(delta + 7).requires_grad_()
    loss = bradley_terry_loss(reward_w, t(7.0), **options)
    loss.sum().backward()
    return loss.item(), reward_w.grad.item()


def test_bradley_terry():
    """Δ = log 3: σ = 3/4, L = log(4/3), gradient -σ(-Δ) = -1/4. Δ = 0: log 2, whatever p. A
    constant on both scores changes nothing."""
    assert bradley_terry(math.log(3)) == close((math.log(4 / 3), -0.25))
    assert bradley_terry(0.0)[0] == bradley_terry(0.0, p=0.3)[0] == close(LOG2)
    w, l = t(1.0, 2.0), t(0.0, 5.0)
    torch.testing.assert_close(bradley_terry_loss(w, l), bradley_terry_loss(w + 100, l + 100))


def test_bradley_terry_margin():
    """A margin m is the loss without it at Δ - m: Δ = log 6, m = log 2 is log(4/3). One margin a
    pair."""
    two, three, six = math.log(2), math.log(3), math.log(6)
    assert bradley_terry(six, margin=two) == close((math.log(4 / 3), -0.25))
    losses = bradley_terry_loss(t(three, six), t(0.0, 0.0), margin=t(0.0, two))
    assert losses.tolist() == pytest.approx([math.log(4 / 3)] * 2)


def test_bradley_terry_soft_labels():
    """p = 0.8 at Δ = log 3: L = -0.8 log(3/4) - 0.2 log(1/4); gradient σ(Δ) - p = -0.05,
    and 0 at Δ = log 4, since σ(Δ) = p there. p = 1/2 is least at Δ = 0. Swapping the answers turns
    p into 1 - p."""
    value, gradient = bradley_terry(math.log(3), p=0.8)
    assert value == pytest.approx(-0.8 * math.log(0.75) - 0.2 * math.log(0.25))
    assert gradient == pytest.approx(-0.05)
    assert bradley_terry(math.log(4), p=0.8)[1] == close(0.0) == bradley_terry(0.0, p=0.5)[1]
    a, b, p = t(1.0, -2.0), t(0.5, 3.0), t(0.9, 0.4)
    torch.testing.assert_close(bradley_terry_loss(a, b, p=p), bradley_terry_loss(b, a, p=1 - p))


def test_bradley_terry_stays_finite():
    assert all(map(math.isfinite, bradley_terry(-1e4) + bradley_terry(1e4, p=0.0)))
    with pytest.raises(AssertionError):
        bradley_terry_loss(t(1.0), t(1.0, 2.0))


# ---- SimPO


def simpo(logp_w, logp_l, len_w, len_l, **options):
    """The loss of one pair, and its gradients in logp_w and logp_l."""
    w, l = t(logp_w).requires_grad_(), t(logp_l).requires_grad_()
    loss = simpo_loss(w, l, torch.tensor([len_w]), torch.tensor([len_l]), **options)
    loss.sum().backward()
    return loss.item(), w.grad.item(), l.grad.item()


def test_simpo():
    """Means -6/3 = -2 and -12/4 = -3, β = 2, γ = 2 - log 3: β(−2 + 3) - γ = log 3, L = log(4/3).
    Gradients -β/|y_w| σ(-log 3) = -2/3 · 1/4 = -1/6 and β/|y_l| · 1/4 = 1/8. Equal answers: -log
    σ(-γ) = log(1 + e^γ). γ is not the ratio γ/β."""
    value, *gradients = simpo(-6.0, -12.0, 3, 4, beta=2.0, gamma=2 - math.log(3))
    assert value == close(math.log(4 / 3)) and gradients == close([-1 / 6, 1 / 8])
    assert simpo(-5.0, -5.0, 4, 4, gamma=0.7)[0] == close(math.log(1 + math.exp(0.7)))


def test_simpo_is_reference_free_dpo_at_equal_lengths():
    """With γ = 0 and both lengths n it is DPO with β/n and a reference of log-prob 0: here n = 5, β
    = 2."""
    zero = t(0.0, 0.0)
    a, b, n = t(-3.0, -9.0), t(-4.5, -2.0), torch.tensor([5, 5])
    dpo = dpo_loss(a, b, zero, zero, beta=0.4)
    torch.testing.assert_close(simpo_loss(a, b, n, n, beta=2.0, gamma=0.0), dpo)


# ---- ORPO


def test_log_odds():
    """p = 3/4: log 3; p = 1/2: 0. Near p = 1, at ℓ = -1e-7 in float32, log(1e7) = 16.118, not inf;
    at ℓ = 0 finite too."""
    assert log_odds(t(math.log(0.75), math.log(0.5))).tolist() == close([math.log(3), 0.0])
    near = log_odds(torch.tensor([-1e-7, -1e-8, 0.0, -80.0]))
    assert near[0].item() == pytest.approx(math.log(1e7), abs=1e-3)
    assert torch.isfinite(near).all() and near[3].item() == -80.0
    assert near[0] == near[1] == near[2]  # constant from there on


def test_orpo():
    """ℓ_w = log 3/4, ℓ_l = log 1/2 (lengths 2 and 4): log odds ratio log 3, odds term log(4/3), NLL
    log(4/3): L = (1 + λ) log(4/3). dO/dℓ_w = -σ(-log 3)/(1 - p_w) = -1/4 · 4 = -1, dO/dℓ_l = 1/4 ·
    2 = 1/2, each over its length."""
    w, l = t(2 * math.log(0.75)).requires_grad_(), t(4 * math.log(0.5)).requires_grad_()
    two, four = torch.tensor([2]), torch.tensor([4])
    odds = odds_ratio_loss(w, l, two, four)
    assert odds.item() == close(math.log(4 / 3))
    assert orpo_loss(w, l, two, four, lam=0.5).item() == close(1.5 * math.log(4 / 3))
    gradients = torch.autograd.grad(odds, (w, l))
    assert [g.item() for g in gradients] == close([-1 / 2, 1 / 8])
    same = odds_ratio_loss(t(-4.0), t(-6.0), torch.tensor([2]), torch.tensor([3]))
    assert same.item() == close(LOG2)  # equal means


def test_orpo_at_certainty_has_finite_gradients():
    for value in (-1e-7, 0.0):
        w = torch.tensor([value], requires_grad=True)
        orpo_loss(w, torch.tensor([-1e-7]), torch.tensor([1]), torch.tensor([1])).sum().backward()
        assert torch.isfinite(w.grad).all()


# ---- KTO


def test_kto():
    """β = 0.5, r = 2 log 3 + 1, ẑ = 1: σ(log 3) = 3/4. Desirable λ_D/4, undesirable λ_U 3/4;
    gradients ∓ λ β 3/16."""
    logp = t(2 * math.log(3) + 1 - 4, 2 * math.log(3) + 1 - 4).requires_grad_()
    labels, weights = torch.tensor([True, False]), {"w_desirable": 2.0, "w_undesirable": 3.0}
    loss = kto_loss(logp, t(-4.0, -4.0), labels, t(1.0)[0], beta=0.5, **weights)
    assert loss.tolist() == close([2 / 4, 3 * 3 / 4])
    (gradient,) = torch.autograd.grad(loss.sum(), logp)
    assert gradient.tolist() == close([-2 * 0.5 * 3 / 16, 3 * 0.5 * 3 / 16])


def test_kto_at_equality_and_the_pull_of_the_reference_point():
    """At π = π_ref and ẑ = 0: λ/2 each. Raising ẑ raises a desirable loss and lowers an undesirable
    one; both lie in (0, λ)."""
    labels, zero = torch.tensor([True, False]), t(-7.0, -7.0)
    assert kto_loss(zero, zero, labels, t(0.0)[0], w_undesirable=3.0).tolist() == [0.5, 1.5]
    low, high = (kto_loss(zero + 1, zero, labels, t(z)[0], beta=0.3) for z in (0.0, 2.0))
    assert high[0] > low[0] and high[1] < low[1] and ((0 < low) & (low < 1)).all()


def test_kto_reference_point():
    """Mean of (3, -1, 4) = 2; of (-3, -1) clamped to 0; of nothing 0; no gradient reaches the
    mismatched log-probs."""
    a = t(5.0, 1.0, 5.0).requires_grad_()
    z = kto_kl(a, t(2.0, 2.0, 1.0))
    assert z.item() == 2.0 and not z.requires_grad
    assert kto_kl(t(-3.0, -1.0), t(0.0, 0.0)).item() == 0.0 and kto_kl(t(), t()).item() == 0.0


# ---- rewards of groups


def test_group_advantages_by_hand():
    """(1, 0, 0, 1): mean ½, unbiased std √(4 · ¼ / 3) = 1/√3; std: ±½ / (1/√3 + 1e-4). Of the
    others: 1 - 1/3 and 0 - 2/3."""
    r = t([1.0, 0.0, 0.0, 1.0], [3.0, 1.0, 1.0, 1.0])
    a = 0.5 / (1 / math.sqrt(3) + 1e-4)
    assert group_advantages(r)[0].tolist() == close([a, -a, -a, a])
    b = 0.5 / (1 + 1e-4)  # std = 1
    assert group_advantages(r)[1].tolist() == close([3 * b, -b, -b, -b])
    plain = group_advantages(r, norm="none")
    assert plain.tolist() == [[0.5, -0.5, -0.5, 0.5], [1.5, -0.5, -0.5, -0.5]]
    c = 2 / 3
    found = group_advantages(r, norm="loo").flatten().tolist()
    assert found == pytest.approx([c, -c, -c, c, 2, -c, -c, -c])
    assert group_advantages(r, eps=1.0)[1, 0].item() == pytest.approx(1.5 / 2)


def test_the_std_of_a_batch_is_that_of_all_its_rewards():
    """(1, 0), (3, 0): R - mean is ±½ and ±1½; all four have the mean 1 and the unbiased std
    √((0 + 1 + 4 + 1)/3) = √2."""
    found = group_advantages(t([1.0, 0.0], [3.0, 0.0]), norm="batch")
    s = math.sqrt(2) + 1e-4
    assert found.flatten().tolist() == close([0.5 / s, -0.5 / s, 1.5 / s, -1.5 / s])


@pytest.mark.parametrize("norm", ["std", "batch", "none", "loo"])
def test_group_advantages_sum_to_zero_and_equal_rewards_give_zero(norm):
    r = torch.randn(50, 7, generator=torch.Generator().manual_seed(0))
    assert group_advantages(r, norm=norm).sum(1).abs().max() < 1e-5
    equal = group_advantages(torch.tensor([0.1, 1e6 + 0.1, -3.3])[:, None].expand(3, 7), norm=norm)
    assert (equal == 0).all()  # to the bit: 0.1 has no exact mean
    assert not group_advantages(r.clone().requires_grad_(), norm=norm).requires_grad
    with pytest.raises(AssertionError):
        group_advantages(r[:, :1])


def test_k3_by_hand():
    """π = ½, π_ref = ¼: π_ref/π - log(π_ref/π) - 1 = ½ + log 2 - 1; its gradient in log π is 1 -
    π_ref/π = ½. Never below 0."""
    logp = t(math.log(0.5)).requires_grad_()
    value = k3(logp, t(math.log(0.25)))
    value.sum().backward()
    assert value.item() == close(math.log(2) - 0.5) and logp.grad.item() == close(0.5)
    x = torch.linspace(-30, 30, 601, dtype=torch.float64)
    assert (k3(x, torch.zeros_like(x)) >= 0).all() and k3(t(0.3), t(0.3)).item() == 0.0
    assert k3(t(-500.0), t(0.0)).item() == pytest.approx(math.exp(20) - 21)  # clamped, finite


def token(ratio, adv, loss=grpo_loss, **options):
    """The loss of one token at a ratio to the old policy, and its gradient in log π."""
    logp = t([math.log(ratio)]).requires_grad_()
    args = (logp, t([0.0]), None, t([adv])) if loss is grpo_loss else (logp, t([0.0]), t([adv]))
    value = loss(*args, **({"beta": 0.0} if loss is grpo_loss else {}), **options)
    value.sum().backward()
    return value.item(), logp.grad.item()


@pytest.mark.parametrize(
    "ratio, adv, value, gradient",
    [
        (1.0, 2.0, -2.0, -2.0),  # on-policy: the gradient is -A
        (1.0, -2.0, 2.0, 2.0),
        (1.1, 1.0, -1.1, -1.1),  # inside the bounds: -ρA, and d(ρ)/d(log π) = ρ
        (0.9, -1.0, 0.9, 0.9),
        (1.5, 1.0, -1.2, 0.0),  # beyond them, risen or fallen enough: clipped, no gradient
        (0.5, -1.0, 0.8, 0.0),
        (1.5, -1.0, 1.5, 1.5),  # beyond them on the wrong side: not clipped
        (0.5, 1.0, -0.5, -0.5),
    ],
)
def test_grpo_clips_the_ratio(ratio, adv, value, gradient):
    assert token(ratio, adv) == close((value, gradient))


@pytest.mark.parametrize("loss", [grpo_loss, dapo_loss])
def test_cispo_clips_the_weight_and_keeps_each_token_s_gradient(loss):
    """-min(ρ, cap) A log π, log π = log ρ, with π_old = 1 and the cap 1.2. Below it the gradient is
    -ρA; above, where GRPO's is 0, it is that of -cap · A log π. On-policy the two are one."""
    how = {"clip": "weight", "eps_high": 0.2} | (
        {"eps": 1.0} if loss is grpo_loss else {"eps_low": 1.0}
    )
    for ratio, adv, weight in (
        (1.0, 2.0, 1.0),
        (0.5, -1.0, 0.5),
        (1.5, 2.0, 1.2),
        (1.5, -2.0, 1.2),
    ):
        value, gradient = token(ratio, adv, loss, **how)
        assert value == close(-weight * adv * math.log(ratio)) and gradient == close(-weight * adv)
    assert token(1.5, 2.0, loss, eps_high=0.2)[1] == 0
    assert token(1.0, 2.0, loss)[1] == token(1.0, 2.0, loss, **how)[1]


def test_decoupled_bounds():
    """ρ = 1.25: with ε = 0.2 clipped at 1.2; DAPO's 1 + 0.28 leaves it; ρ = 1.3 is clipped at 1.28.
    Below, 0.75 is clipped at 0.8."""
    assert token(1.25, 1.0) == pytest.approx((-1.2, 0.0))
    for ratio, expected in ((1.25, (-1.25, -1.25)), (1.3, (-1.28, 0.0))):
        assert token(ratio, 1.0, dapo_loss) == pytest.approx(expected)
        assert token(ratio, 1.0, eps_high=0.28) == pytest.approx(expected)
    assert token(0.75, -1.0, dapo_loss) == pytest.approx((0.8, 0.0))
    assert token(0.75, -1.0, dapo_loss, eps_low=0.3)[0] == 0.75
    x, y, a = (draw(5, 6, seed=i) for i in range(3))
    expected = grpo_loss(x, y, None, a[:, :1], 0.2, 0.0)
    torch.testing.assert_close(dapo_loss(x, y, a[:, :1], 0.2, 0.2), expected)


def test_the_two_kl_terms_of_grpo():
    """π_ref/π = 2, ρ = 1, A = 3, β = ½: k3 = 2 - log 2 - 1. Plain: -3 + ½ k3, gradient -3 + ½ (1 -
    2). ρ k3: the gradient has k3 too."""
    for kl, more in (("k3", 0.0), ("k3-ratio", 0.5 * (1 - math.log(2)))):
        logp, ref_logp = t([-1.0]).requires_grad_(), t([-1.0 + math.log(2)])
        value = grpo_loss(logp, logp.detach(), ref_logp, t([3.0]), beta=0.5, kl=kl)
        value.sum().backward()
        assert value.item() == close(-3 + 0.5 * (1 - math.log(2)))
        assert logp.grad.item() == close(-3 - 0.5 + more)
    with pytest.raises(AssertionError):
        grpo_loss(t([0.0]), t([0.0]), None, t(1.0), beta=0.0)


def test_gspo_s_ratio_is_the_geometric_mean():
    """Log-ratios 0.2, 0.4 and (masked) 9: each token has the ratio e^0.3 and the gradient e^0.3 A;
    the mean over tokens is counted once."""
    logp = t([-1.0, -2.0, -3.0]).requires_grad_()
    old, mask = t([-1.2, -2.4, -12.0]), torch.tensor([[True, True, False]])
    used = sequence_old_logp(logp, old, mask)
    assert (logp - used).exp()[0, :2].tolist() == pytest.approx([math.exp(0.3)] * 2)
    assert not used.requires_grad
    losses = grpo_loss(logp, used, None, t([2.0]), 9.0, 0.0)
    (losses * mask).sum().div(2).backward()
    assert logp.grad[0].tolist() == pytest.approx([-math.exp(0.3)] * 2 + [0.0])
    one = torch.tensor([[False, True, False]])  # of a response of one token it is the token's own
    torch.testing.assert_close(sequence_old_logp(logp, old, one)[one], old[one])


def test_groups_that_are_kept():
    correct = torch.tensor([[1, 1, 1], [0, 0, 0], [1, 0, 0], [0, 1, 1]]).bool()
    assert keep_groups(correct).tolist() == [False, False, True, True]


def test_overlong_penalty_at_its_corners():
    """L_max = 100, L_c = 20: 0 up to 80, -½ at 90, -1 at 100 and beyond."""
    length = torch.tensor([1, 80, 81, 90, 100, 120])
    assert overlong_penalty(length, 100, 20).tolist() == pytest.approx([0, 0, -0.05, -0.5, -1, -1])


# ---- PPO


def test_ppo_clips_the_ratio_as_grpo_does():
    """The table of GRPO's clip, each token with an advantage of its own: the loss and the gradient
    are those of the tokens alone."""
    for ratio, adv in ((1.0, 2.0), (1.1, 1.0), (1.5, 1.0), (0.5, -1.0), (1.5, -1.0), (0.5, 1.0)):
        assert token(ratio, adv, ppo_loss) == close(token(ratio, adv))
    assert token(1.25, 1.0, ppo_loss, eps=0.3) == pytest.approx((-1.25, -1.25))
    assert token(1.25, 1.0, ppo_loss) == pytest.approx((-1.2, 0))
    logp = t([math.log(1.5), math.log(1.5)]).requires_grad_()
    value = ppo_loss(logp, t([0.0, 0.0]), t([1.0, -1.0]))
    value.sum().backward()
    assert value[0].tolist() == pytest.approx([-1.2, 1.5])
    assert logp.grad[0].tolist() == pytest.approx([0.0, 1.5])
    with pytest.raises(AssertionError):
        ppo_loss(t([0.0, 0.0]), t([0.0, 0.0]), t([1.0]))


def test_value_loss_takes_the_larger_error():
    """V_old = 1, ε_v = 0.2, R = 2. V = 1.5 is nearer than its clip, 1.2: ½ 0.8², no gradient. V =
    0.5, clip 0.8: ½ 1.5², gradient -1.5. V = 3.5, clip 1.2: ½ 1.5², gradient 1.5. V = 1.1 is its
    own clip: ½ 0.9², gradient -0.9."""
    values = t([1.5, 0.5, 3.5, 1.1]).requires_grad_()
    loss = value_loss(values, torch.ones_like(values).detach(), t([2.0, 2.0, 2.0, 2.0]))
    loss.sum().backward()
    assert loss[0].tolist() == pytest.approx([0.32, 1.125, 1.125, 0.405])
    assert values.grad[0].tolist() == pytest.approx([0.0, -1.5, 1.5, -0.9])
    assert value_loss(t([1.5]), t([1.0]), t([2.0]), eps_v=1.0).item() == pytest.approx(0.125)
    with pytest.raises(AssertionError):
        value_loss(t([0.0]), t([0.0]), t(0.0))


# a prompt token, a response of three, padding
ROW = torch.tensor([[False, True, True, True, False]])


@pytest.mark.parametrize(
    "gamma, lam, adv",
    [
        (1.0, 1.0, (6.5, 5.0, 2.0)),  # the rewards to come are 7, 6, 4; minus V
        (1.0, 0.0, (1.5, 3.0, 2.0)),  # one-step errors: 1 + 1 - 0.5, 2 + 2 - 1, 4 - 2
        (1.0, 0.5, (3.5, 4.0, 2.0)),  # from the end: 2; 3 + ½ 2; 1.5 + ½ 4
        (0.5, 1.0, (2.5, 3.0, 2.0)),  # 1 + ½ 2 + ¼ 4 - 0.5, 2 + ½ 4 - 1, 4 - 2
        (0.5, 0.5, (1.625, 2.5, 2.0)),  # δ = 1, 2, 2 at γ = ½; 2; 2 + ¼ 2; 1 + ¼ 2.5
        (0.0, 0.95, (0.5, 1.0, 2.0)),  # r - V
    ],
)
def test_gae_by_hand(gamma, lam, adv):
    """r = 1, 2, 4 and V = ½, 1, 2 on the three tokens. What stands at the prompt and in the padding
    is never seen."""
    for beside in (0.0, 100.0):
        rewards, values = t([beside, 1.0, 2.0, 4.0, beside]), t([-beside, 0.5, 1.0, 2.0, beside])
        found, returns = gae(rewards, values, ROW, gamma, lam)
        assert found[0].tolist() == close([0.0, *adv, 0.0])
        assert returns[0].tolist() == close([0.0, adv[0] + 0.5, adv[1] + 1, adv[2] + 2, 0.0])


def test_gae_of_rows_that_end_elsewhere():
    """A row alone and among others: the same; a response of one token has r - V."""
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 0], [0, 1, 1, 0]], dtype=torch.bool)
    r, v = (draw(3, 4, seed=i) for i in (0, 1))
    adv, returns = gae(r, v, mask, 0.9, 0.8)
    for i in range(3):
        later, row = 0.0, mask[i].nonzero()[:, 0].tolist()
        for t_ in reversed(row):  # the recursion of the equation
            delta = r[i, t_] + (0.9 * v[i, t_ + 1] if t_ + 1 in row else 0.0) - v[i, t_]
            later = delta + 0.9 * 0.8 * later
            assert adv[i, t_].item() == close(later.item())
    assert adv[1, 2].item() == pytest.approx((r - v)[1, 2].item())
    assert (adv[~mask] == 0).all() and (returns[~mask] == 0).all()


def test_token_rewards():
    """β = ½; log-ratios 1, -2, 4 and a score of 10: -½, 1, -2 + 10. A response of one token gets
    both at once."""
    logp = t([7.0, -1.0, -3.0, -1.0, 7.0], [7.0, 7.0, -1.0, 7.0, 7.0])
    ref = t([0.0, -2.0, -1.0, -5.0, 0.0], [0.0, 0.0, -2.0, 0.0, 0.0])
    mask = torch.cat([ROW, torch.tensor([[False, False, True, False, False]])])
    rewards = token_rewards(t(10.0, 3.0), logp, ref, mask, 0.5)
    assert rewards.tolist() == [[0.0, -0.5, 1.0, 8.0, 0.0], [0.0, 0.0, 2.5, 0.0, 0.0]]
    assert token_rewards(t(10.0, 3.0), logp, ref, mask, 0.0).sum(1).tolist() == [10.0, 3.0]
    with pytest.raises(AssertionError):
        token_rewards(t([10.0], [3.0]), logp, ref, mask, 0.5)


def test_whitening_is_of_valid_tokens():
    """1, 2 and 6 have the mean 3 and the biased variance (4 + 1 + 9)/3; what stands beside them
    counts for nothing. Equal ones give 0."""
    x = t([100.0, 1.0, 2.0, 6.0, -50.0])
    scale = math.sqrt(14 / 3 + 1e-8)
    assert whiten(x, ROW)[0].tolist() == close([0.0, -2 / scale, -1 / scale, 3 / scale, 0.0])
    assert whiten(t([9.0, 2.0, 2.0, 2.0, 9.0]), ROW)[0].tolist() == [0.0] * 5

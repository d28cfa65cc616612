"""What each method aims at on `exact`: the minimiser of its population objective over all distributions of the outcomes, or for GRPO's
token by token KL penalties, which are no objective's gradient, the policy at which the mean gradient vanishes.

No model and no sampling: the policy is a table of log-probs (4 prompts, 40 outcomes) in float64, the population the task's own
tables: `pairs` (x, w, l) and `labels` (x, y, [undesirable, desirable]), each summing to 1. The minimiser is found by descent on the
policy's table; DPO's is known in closed form, and KTO's infimum lies on the boundary (`kto_limit`). The losses are written here from
their formulas, not taken from the method scripts, so that the two check one another.

    u = log π/π_ref, n = the response's tokens, all of (y); w, l = chosen, rejected; E over the population's pairs
    dpo      E[- (1-ε) log σ(βh) - ε log σ(-βh)],  h = u_w - u_l                    ε = 0: π*, whatever the pairs' distribution
    ipo      E[(h - 1/(2τ))²],                     h = u_w/n_w - u_l/n_l            (of sums: h = u_w - u_l)
    simpo    E[- log σ(β(s_w - s_l) - γ)],         s = log π / n
    orpo     E[- s_w - λ log σ(o_w - o_l)],        o = s - log(1 - e^s)
    kto      E over (x, y, label) of λ_D (1 - σ(β(u - ẑ))) or λ_U (1 - σ(β(ẑ - u)))
    grpo     at every prefix s, from the last token back, with Q(s, a) = E_π[r | s, a], for advantages that are not divided by std:
             plain k3   π(a|s) = β π_ref(a|s) / (c - Q(s, a)), c from Σ_a π = 1: k3's gradient is that of KL(π_ref‖π)
             ρ k3       π(a|s) ∝ π_ref(a|s) exp(Q(s, a)/β): the KL of this token, without that of the later ones
             KL in the reward (RLOO)  π*, the maximiser of J = E[r] - β KL(π‖π_ref)
    ppo      π*, at γ = 1: where the critic is right each advantage is 0 there
    online_dpo   with the labels of Bradley–Terry π*, whatever pairs it draws; ipo: the policy that minimises the loss over pairs of
                 its own samples. With n = 1: π ∝ π_ref exp(P(y beats a sample of π)/τ), where no policy beats it by more than
                 τ times what its KL to π_ref is larger
"""
from contextlib import suppress
from functools import partial

import torch
import torch.nn.functional as F


class NoOptimum(Exception):
    """The loss has no minimum here, or descent did not find it."""


def star(log_ref, r, beta):
    """log π*, π* ∝ π_ref exp(r/β). log_ref, r: (…, Y). Returns the same shape."""
    return (log_ref + r / beta).log_softmax(-1)


def kl(log_p, log_q):
    """KL(p‖q) in nats, (…, Y) each -> (…). An outcome of probability 0 in p counts 0."""
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_q), 0.0).sum(-1)


def tv(log_p, log_q):
    """Total variation distance, half the sum of |p - q|: (…, Y) each -> (…)."""
    return (log_p.exp() - log_q.exp()).abs().sum(-1) / 2


def dpo(log_p, log_ref, pairs, beta, label_smoothing=0.0):
    h = _difference(log_p - log_ref)
    return (pairs * (-(1 - label_smoothing) * F.logsigmoid(beta * h) - label_smoothing * F.logsigmoid(-beta * h))).sum()


def ipo(log_p, log_ref, pairs, n, tau):
    return (pairs * (_difference((log_p - log_ref) / n) - 1 / (2 * tau)) ** 2).sum()


def simpo(log_p, pairs, n, beta, gamma):
    return -(pairs * F.logsigmoid(beta * _difference(log_p / n) - gamma)).sum()


def orpo(log_p, pairs, n, lam):
    s = log_p / n
    odds = s - torch.log(-torch.expm1(s))
    return -(pairs * (s[:, :, None] + lam * F.logsigmoid(_difference(odds)))).sum()


def kto(log_p, log_ref, labels, beta, w_desirable=1.0, w_undesirable=1.0, z=None):
    """z: the reference point ẑ; by default that of the population, max(0, mean of u over prompts with other prompts' answers)."""
    u = log_p - log_ref
    if z is None:
        answers = labels.sum(2)  # (x, y), 1/4 a prompt
        others = (answers.sum(0) - answers) / (1 - answers.sum(1, keepdim=True))  # (x, y): an answer to another prompt than x
        z = (answers.sum(1, keepdim=True) * others * u).sum().clamp(min=0).detach()
    undesirable, desirable = labels.unbind(2)
    return (desirable * w_desirable * torch.sigmoid(beta * (z - u)) + undesirable * w_undesirable * torch.sigmoid(beta * (u - z))).sum()


def _difference(s):
    """(x, y) -> (x, w, l): s_w - s_l"""
    return s[:, :, None] - s[:, None, :]


def minimise(loss, start, iterations=2000, converged=True):
    """-> the log-probs (x, y) at the minimum of loss(log_p), by L-BFGS on the table of logits, from `start`. Without `converged` also
    where the gradient has not vanished yet."""
    theta = start.detach().clone().requires_grad_()
    descent = torch.optim.LBFGS([theta], max_iter=iterations, max_eval=2 * iterations, tolerance_grad=1e-10, tolerance_change=0.0,
                                history_size=50, line_search_fn="strong_wolfe")  # fmt: skip

    def closure():
        descent.zero_grad()
        value = loss(theta.log_softmax(-1))
        value.backward()
        return value

    descent.step(closure)
    closure()
    if converged and not theta.grad.abs().max() < 1e-6:
        raise NoOptimum(f"descent ended at a gradient of {theta.grad.abs().max()}")
    return theta.detach().log_softmax(-1)


def kto_limit(log_ref, labels, beta, w_desirable=1.0, w_undesirable=1.0):
    """-> where descent on the KTO objective goes for β < 1: (log-probs, -inf where an outcome vanishes; the infimum of the loss).

    Rejected outcomes, those with λ_U P(undesirable) ≥ λ_D P(desirable), lose all mass; the mean of u then goes to -∞, and ẑ is
    clamped to 0. What is left is a minimum over the outcomes that are kept, where the loss is convex: 1 - σ(β log(p/p_ref)) is
    convex in p for β < 1. Raises NoOptimum where the weights leave a prompt no outcome.
    """
    kept = w_desirable * labels[..., 1] > w_undesirable * labels[..., 0]
    if kept.all() or not kept.any(1).all():
        raise NoOptimum("each prompt needs an outcome to keep, and there must be one to reject")
    vanished = torch.where(kept, 0.0, -1e4)

    def loss(log_p):
        return kto(log_p, log_ref, labels, beta, w_desirable, w_undesirable, z=0.0)

    limit = minimise(lambda log_p: loss((log_p + vanished).log_softmax(-1)), log_ref)
    limit = torch.where(kept, limit, -torch.inf).log_softmax(-1)
    return limit, loss(limit)


def by_prefix(log_ref, r, outcomes, solve):
    """-> log-probs (x, y) of the policy that at each prefix s is solve(log π_ref(·|s), Q(s, ·)), both (x, symbols and end), from the last
    token back: Q(s, a) = E[r | s, a] under that policy itself."""
    place, longest = {y: i for i, y in enumerate(outcomes)}, max(map(len, outcomes))
    symbols = sorted({y[-1] for y in outcomes if y})
    log_mass = {s: log_ref[:, [i for y, i in place.items() if y.startswith(s)]].logsumexp(1) for s in outcomes}

    def below(s):
        """-> (log π(rest of y | s) of every outcome y that starts with s, E[r | s])"""
        end = {s: torch.zeros_like(r[:, 0])}, r[:, place[s]]
        if len(s) == longest:
            return end
        branches = [*(below(s + a) for a in symbols), end]
        q = torch.stack([value for _, value in branches], 1)
        ref = torch.stack([*(log_mass[s + a] for a in symbols), log_ref[:, place[s]]], 1) - log_mass[s][:, None]
        log_p = solve(ref, q)
        tails = {y: log_p[:, a] + rest for a, (branch, _) in enumerate(branches) for y, rest in branch.items()}
        return tails, (log_p.exp() * q).sum(1)

    tails, _ = below("")
    return torch.stack([tails[y] for y in outcomes], 1)


def k3_point(log_ref, q, beta):
    """log π of π = β π_ref/(c - q), by bisection on c. log_ref, q: (…, actions). Returns the same shape."""
    low, high = (q + beta * log_ref.exp()).amax(-1, keepdim=True), q.amax(-1, keepdim=True) + beta  # Σ π ≥ 1 and Σ π ≤ 1
    for _ in range(100):
        c = (low + high) / 2
        more = (beta * log_ref.exp() / (c - q)).sum(-1, keepdim=True) > 1
        low, high = torch.where(more, c, low), torch.where(more, high, c)
    return (log_ref - (c - q).log()).log_softmax(-1)


def own_minimum(loss, beats, log_p, rounds=200):
    """-> the log-probs (x, y) of the policy that minimises loss(log_p, pairs=pairs) over pairs of its own samples: round after round the
    minimum over those of the last, from log_p. beats: (x, y, y'), P(y beats y')."""
    for _ in range(rounds):
        p = log_p.exp()
        pairs = 2 * p[:, :, None] * p[:, None, :] * beats / len(p)
        last, log_p = log_p, minimise(partial(loss, pairs=pairs), log_p)
        if kl(last, log_p).max() < 1e-9:
            return log_p
    raise NoOptimum(f"after {rounds} rounds the policy still moves by {kl(last, log_p).max()} nats")


def aim(task, log_ref, method, o):
    """-> (the method's population loss as a function of log-probs (4, 40), the log-probs where it is least), with the options `o`; the
    loss is None where there is a point, but none that it is the least value of. None for a fixed set of rows, which has another
    optimum, for what is not written above (robust DPO, made for flipped labels; an added SFT term, KTO at β ≥ 1, advantages divided
    by std, γ below 1), where the loss needs a π_ref and `log_ref` is None, and where no minimum is found."""
    with suppress(NoOptimum):
        return _aim(task, log_ref, method, o)


def _aim(task, log_ref, method, o):
    if method == "grpo":
        return _grpo(task, log_ref, o)
    if method == "online_dpo":
        return _online_dpo(task, log_ref, o)
    if method == "ppo":
        own = log_ref is not None and o["reward"] == "task" and o["temperature"] == o["gamma"] == 1
        return _j(log_ref, torch.from_numpy(task.r), o["beta"]) if own and o["beta"] else None
    pairs, labels = torch.from_numpy(task.pairs), torch.from_numpy(task.labels)
    n = _lengths(task)
    if o.get("pairs") or o.get("sft_weight") or o.get("prompt_loss") or log_ref is None and method not in ("simpo", "orpo"):
        return None
    if method == "dpo" and o["loss"] == "dpo":
        loss = partial(dpo, log_ref=log_ref, pairs=pairs, beta=o["beta"], label_smoothing=o["label_smoothing"])
        if o["label_smoothing"] == 0:
            return loss, star(log_ref, torch.from_numpy(task.r), o["beta"])
    elif method == "dpo" and o["loss"] == "ipo":
        loss = partial(ipo, log_ref=log_ref, pairs=pairs, n=torch.ones_like(n) if o["ipo_sum"] else n, tau=o["tau"])
    elif method == "simpo":
        loss = partial(simpo, pairs=pairs, n=n, beta=o["beta"], gamma=o["gamma_beta_ratio"] * o["beta"])
    elif method == "orpo":
        loss = partial(orpo, pairs=pairs, n=n, lam=o["lam"])
    elif method == "kto" and o["beta"] < 1:
        weights = {"beta": o["beta"], "w_desirable": o["w_desirable"], "w_undesirable": o["w_undesirable"]}
        return partial(kto, log_ref=log_ref, labels=labels, **weights), kto_limit(log_ref, labels, **weights)[0]
    else:
        return None
    return loss, minimise(loss, torch.zeros(task.r.shape, dtype=torch.float64) if log_ref is None else log_ref)


def _lengths(task):
    """-> (40,) tokens of each outcome"""
    return torch.tensor([min(len(y) + 1, task.max_new_tokens) for y in task.outcomes])


def _online_dpo(task, log_ref, o):
    if log_ref is None or o["label"] == "argmax" or o["ref_update"] == "per-round" or o["reward"] != "task":
        return None
    if o["loss"] == "dpo":
        return None, star(log_ref, torch.from_numpy(task.r), o["beta"])
    if o["samples_per_prompt"] > 2 or o["temperature"] != 1 or o["rounds"]:
        return None
    n = _lengths(task)
    loss = partial(ipo, log_ref=log_ref, n=torch.ones_like(n) if o["ipo_sum"] else n, tau=o["tau"])
    return None, own_minimum(loss, torch.from_numpy(task.beats), log_ref)


def _j(log_ref, r, beta):
    return lambda log_p: (beta * kl(log_p, log_ref) - (log_p.exp() * r).sum(1)).mean(), star(log_ref, r, beta)


def _grpo(task, log_ref, o):
    r, beta, G = torch.from_numpy(task.r), o["beta"], o["group"]
    even = o["agg"] == "const" or task.max_new_tokens == 1  # each token weighs the same
    if log_ref is None or o["kl"] == "none" or o["adv_norm"] == "std" or not even or o["reward"] != "task" or o["temperature"] != 1:
        return None
    if o["kl"] == "reward":
        return _j(log_ref, r, beta)
    if o["adv_norm"] == "none":  # r - mean is (G-1)/G of the leave-one-out advantage
        beta = beta * G / (G - 1)
    solve = k3_point if o["kl"] == "k3" else star
    return None, by_prefix(log_ref, r, task.outcomes, partial(solve, beta=beta))

"""Computes the optimum of each method on `exact`: the policy that minimises its population loss.
GRPO's KL penalties per token are not the gradient of a loss; for them the optimum is the policy at
which the mean gradient vanishes.

There is no model and no sampling. A policy is a table of log-probs (4 prompts, 40 outcomes) in
float64, and the population is the tables of the task: `pairs` (x, w, l) and `labels` (x, y,
[undesirable, desirable]), each of which sums to 1. Descent on the table finds the minimum. DPO's is
known in closed form, and KTO's infimum is on the boundary (`kto_limit`). The losses are written
here from their formulas, not taken from the scripts, so that the two check each other.

    u = log π/π_ref, n = response tokens, all of (y); w, l = chosen, rejected; E is over the pairs
    dpo      E[- (1-ε) log σ(βh) - ε log σ(-βh)],  h = u_w - u_l       ε = 0: π*, whatever the pairs
             norm: h = u_w/n_w - u_l/n_l; R-DPO: βh + α(n_w - n_l), π ∝ π_ref exp((r - αn)/β)
             apo: E[1 - σ(βu_w) + σ(βu_l)], which is KTO's loss of the pairs' answers at ẑ = 0
    ipo      E[(h - 1/(2τ))²],                     h = u_w/n_w - u_l/n_l       (sums: h = u_w - u_l)
    simpo    E[- log σ(β(s_w - s_l) - γ)],         s = log π / n
    orpo     E[- s_w - λ log σ(o_w - o_l)],        o = s - log(1 - e^s)
    kto      E over (x, y, label) of λ_D (1 - σ(β(u - ẑ))) or λ_U (1 - σ(β(ẑ - u)))
    grpo     at every prefix s, from the last token back, with Q(s, a) = E_π[r | s, a], for
             advantages that are not divided by std:
             plain k3   π(a|s) = β π_ref(a|s) / (c - Q(s, a)), c from Σ_a π = 1: k3's gradient is
                        that of KL(π_ref‖π)
             ρ k3       π(a|s) ∝ π_ref(a|s) exp(Q(s, a)/β): the KL of this token alone
             KL in the reward (RLOO)  π*, the maximiser of J = E[r] - β KL(π‖π_ref)
    ppo      π*, at γ = 1: with the right critic every advantage is 0 there
    online_dpo   with Bradley–Terry labels π*, whatever pairs it draws; ipo: the policy that
             minimises the loss over pairs of its own samples. At n = 1 it is
             π ∝ π_ref exp(P(y beats a sample of π)/τ): another policy beats it by at most τ times
             the difference of their KLs to π_ref

    python -m analysis.optima out/exact/dpo.pt out/exact/kto.pt
"""

import sys
from dataclasses import dataclass
from functools import partial
from itertools import takewhile

import torch
import torch.nn.functional as F

import data
import training
from analysis.rows import EVERY
from data import UserError, say
from data.exact import kl, star, tv
from training import opt, parse
from training.again import Again
from training.enumeration import Enumeration
from training.options import DTYPES


class NoOptimum(Exception):
    """The loss has no minimum, or descent did not find it."""


# ---- the losses of a table of log-probs


def dpo(log_p, log_ref, pairs, beta, label_smoothing=0.0, n=1, cost=0.0):
    """n: (40,) tokens, for means over them. cost: (40,) α tokens, R-DPO's"""
    h = _difference(beta * (log_p - log_ref) / n + cost)
    right, wrong = F.logsigmoid(h), F.logsigmoid(-h)
    return -(pairs * ((1 - label_smoothing) * right + label_smoothing * wrong)).sum()


def ipo(log_p, log_ref, pairs, n, tau):
    return (pairs * (_difference((log_p - log_ref) / n) - 1 / (2 * tau)) ** 2).sum()


def simpo(log_p, pairs, n, beta, gamma):
    return -(pairs * F.logsigmoid(beta * _difference(log_p / n) - gamma)).sum()


def orpo(log_p, pairs, n, lam):
    s = log_p / n
    odds = s - torch.log(-torch.expm1(s))
    return -(pairs * (s[:, :, None] + lam * F.logsigmoid(_difference(odds)))).sum()


def kto(log_p, log_ref, labels, beta, w_desirable=1.0, w_undesirable=1.0, z=None):
    """z: the reference point ẑ. By default it is that of the population: max(0, mean of u over
    pairs of a prompt and an answer to another prompt)."""
    u = log_p - log_ref
    if z is None:
        answers = labels.sum(2)  # (x, y), 1/4 per prompt
        mass = answers.sum(1, keepdim=True)
        others = (answers.sum(0) - answers) / (1 - mass)  # an answer to another prompt than x
        z = (mass * others * u).sum().clamp(min=0).detach()
    undesirable, desirable = labels.unbind(2)
    kept = desirable * w_desirable * torch.sigmoid(beta * (z - u))
    return (kept + undesirable * w_undesirable * torch.sigmoid(beta * (u - z))).sum()


def _difference(s):
    """(x, y) -> (x, w, l): s_w - s_l"""
    return s[:, :, None] - s[:, None, :]


# ---- their minima


def minimise(loss, start, iterations=2000, converged=True):
    """-> the log-probs (x, y) at the minimum of loss(log_p), found by L-BFGS on the table of logits
    from `start`. With `converged`, raises NoOptimum if the gradient has not vanished."""
    theta = start.detach().clone().requires_grad_()
    limits = {"max_iter": iterations, "max_eval": 2 * iterations, "history_size": 50}
    limits |= {"tolerance_grad": 1e-10, "tolerance_change": 0.0}
    descent = torch.optim.LBFGS([theta], line_search_fn="strong_wolfe", **limits)

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
    """-> the limit of descent on the KTO loss for β < 1: (log-probs, -inf for outcomes that vanish;
    the infimum of the loss).

    Rejected outcomes, those with λ_U P(undesirable) ≥ λ_D P(desirable), lose all mass; the mean of
    u then goes to -∞, and ẑ is clamped to 0. A minimum over the kept outcomes remains, and there
    the loss is convex: 1 - σ(β log(p/p_ref)) is convex in p for β < 1. Raises NoOptimum if a prompt
    keeps no outcome, or if none is rejected.
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
    """-> log-probs (x, y) of the policy that at each prefix s is solve(log π_ref(·|s), Q(s, ·)), of
    arguments (x, symbols and end). It is solved from the last token back, because
    Q(s, a) = E[r | s, a] is under that policy itself."""
    place, longest = {y: i for i, y in enumerate(outcomes)}, max(map(len, outcomes))
    symbols = sorted({y[-1] for y in outcomes if y})
    log_mass = {}
    for s in outcomes:
        log_mass[s] = log_ref[:, [i for y, i in place.items() if y.startswith(s)]].logsumexp(1)

    def below(s):
        """-> (log π(rest of y | s) of every outcome y that starts with s, E[r | s])"""
        end = {s: torch.zeros_like(r[:, 0])}, r[:, place[s]]
        if len(s) == longest:
            return end
        branches = [*(below(s + a) for a in symbols), end]
        q = torch.stack([value for _, value in branches], 1)
        masses = [*(log_mass[s + a] for a in symbols), log_ref[:, place[s]]]
        log_p = solve(torch.stack(masses, 1) - log_mass[s][:, None], q)
        tails = {}
        for a, (branch, _) in enumerate(branches):
            tails |= {y: log_p[:, a] + rest for y, rest in branch.items()}
        return tails, (log_p.exp() * q).sum(1)

    tails, _ = below("")
    return torch.stack([tails[y] for y in outcomes], 1)


def k3_point(log_ref, q, beta):
    """-> log π of π = β π_ref/(c - q), by bisection on c; (…, actions), as log_ref and q are"""
    low = (q + beta * log_ref.exp()).amax(-1, keepdim=True)  # Σ π ≥ 1
    high = q.amax(-1, keepdim=True) + beta  # Σ π ≤ 1
    for _ in range(100):
        c = (low + high) / 2
        more = (beta * log_ref.exp() / (c - q)).sum(-1, keepdim=True) > 1
        low, high = torch.where(more, c, low), torch.where(more, high, c)
    return (log_ref - (c - q).log()).log_softmax(-1)


def own_minimum(loss, beats, log_p, rounds=200):
    """-> the log-probs (x, y) of the policy that minimises loss(log_p, pairs=pairs) over pairs of
    its own samples. Starting from log_p, each round minimises over pairs of the last round's
    policy. beats: (x, y, y'), P(y beats y')."""
    for _ in range(rounds):
        p = log_p.exp()
        pairs = 2 * p[:, :, None] * p[:, None, :] * beats / len(p)
        last, log_p = log_p, minimise(partial(loss, pairs=pairs), log_p)
        if kl(last, log_p).max() < 1e-9:
            return log_p
    raise NoOptimum(f"after {rounds} rounds the policy still moves by {kl(last, log_p).max()} nats")


# ---- the optimum for a checkpoint's options


def optimum(task, log_ref, method, o):
    """-> (the method's population loss as a function of log-probs (4, 40), the log-probs at its
    minimum), with a checkpoint's options `o`. The loss is None if the point is known but minimises
    no loss. Returns None in these cases: a fixed set of rows, which has another optimum; a loss not
    written above (robust DPO, which is for flipped labels; an added SFT term; KTO at β ≥ 1;
    advantages divided by std; γ below 1); a loss that needs π_ref if log_ref is None. Raises
    NoOptimum if the minimum is not found."""
    find = FIND.get(method)
    if find and not (log_ref is None and "ref" in EVERY[method].models.split()):
        return find(task, log_ref, o)


def _dpo(task, log_ref, o):
    if o.pairs or o.sft_weight or o.loss == "robust":
        return None
    pairs = torch.from_numpy(task.pairs)
    if o.loss == "ipo":
        n = _lengths(task, o.ipo_sum)
        return _least(partial(ipo, log_ref=log_ref, pairs=pairs, n=n, tau=o.beta), log_ref)
    if o.loss == "apo":
        answers = torch.stack([pairs.sum(1), pairs.sum(2)], 2)  # each as rejected, as chosen
        given = log_ref, answers, o.beta
        return lambda log_p: kto(log_p, *given, z=0.0), kto_limit(*given)[0]
    how = {"log_ref": log_ref, "pairs": pairs, "beta": o.beta}
    how |= {"label_smoothing": o.label_smoothing, "cost": o.length_penalty * _lengths(task)}
    loss = partial(dpo, **how, n=_lengths(task, ones=o.loss != "norm"))
    if o.loss == "norm" or o.label_smoothing:
        return _least(loss, log_ref)
    return loss, star(log_ref, torch.from_numpy(task.r) - how["cost"], o.beta)


def _simpo(task, log_ref, o):
    if o.pairs or o.sft_weight:
        return None
    pairs = torch.from_numpy(task.pairs)
    gamma = o.gamma_beta_ratio * o.beta
    loss = partial(simpo, pairs=pairs, n=_lengths(task), beta=o.beta, gamma=gamma)
    return _least(loss, torch.zeros(task.r.shape).double())


def _orpo(task, log_ref, o):
    if o.pairs or o.prompt_loss:
        return None
    loss = partial(orpo, pairs=torch.from_numpy(task.pairs), n=_lengths(task), lam=o.lam)
    return _least(loss, torch.zeros(task.r.shape).double())


def _kto(task, log_ref, o):
    if o.pairs or o.beta >= 1:
        return None
    given = log_ref, torch.from_numpy(task.labels), o.beta, o.w_desirable, o.w_undesirable
    return lambda log_p: kto(log_p, *given), kto_limit(*given)[0]


def _online_dpo(task, log_ref, o):
    if o.label == "argmax" or o.ref_update == "per-round" or o.reward != "task":
        return None
    if o.loss == "dpo":
        return None, star(log_ref, torch.from_numpy(task.r), o.beta)
    if o.samples_per_prompt > 2 or o.temperature != 1 or o.rounds:
        return None
    loss = partial(ipo, log_ref=log_ref, n=_lengths(task, o.ipo_sum), tau=o.beta)
    return None, own_minimum(loss, torch.from_numpy(task.beats), log_ref)


def _grpo(task, log_ref, o):
    even = o.agg in ("const", "sum") or task.max_new_tokens == 1  # each token weighs the same
    no_penalty = o.kl == "none" or not o.beta
    if no_penalty or o.adv_norm == "std" or not even or o.reward != "task" or o.temperature != 1:
        return None
    if o.kl == "reward":
        return _j(task, log_ref, o.beta)
    if o.adv_norm == "batch":  # β differs at every step
        return None
    beta = o.beta
    if o.adv_norm == "none":  # r - mean is (G-1)/G of the leave-one-out advantage
        beta = beta * o.group / (o.group - 1)
    solve = partial(k3_point if o.kl == "k3" else star, beta=beta)
    return None, by_prefix(log_ref, torch.from_numpy(task.r), task.outcomes, solve)


def _ppo(task, log_ref, o):
    if o.reward != "task" or not o.temperature == o.gamma == 1 or not o.beta:
        return None
    return _j(task, log_ref, o.beta)


FIND = {"dpo": _dpo, "simpo": _simpo, "orpo": _orpo, "kto": _kto, "online_dpo": _online_dpo}
FIND |= {"grpo": _grpo, "ppo": _ppo}


def _least(loss, start):
    return loss, minimise(loss, start)


def _j(task, log_ref, beta):
    r = torch.from_numpy(task.r)

    def loss(log_p):
        return (beta * kl(log_p, log_ref) - (log_p.exp() * r).sum(1)).mean()

    return loss, star(log_ref, r, beta)


def _lengths(task, ones=False):
    """-> (40,) the number of tokens of each outcome, or ones if the loss has sums, not means"""
    return torch.tensor(
        [1 if ones else min(len(y) + 1, task.max_new_tokens) for y in task.outcomes]
    )


# ---- the command


@dataclass
class Options:
    checkpoint: str = opt(..., "the .pt file of a policy trained on exact; or several files")
    reference: str = opt("", "π_ref (default: the checkpoint that it started from)")
    device: str = opt("auto", "cpu, cuda, cuda:1, mps")
    dtype: str = opt("auto", "precision", choices=DTYPES[:-1])
    max_new_tokens = seed = truncate = eval_prompts = 0  # options that evaluate.py reads


@torch.no_grad()
def distances(o):
    """-> how far a checkpoint is from its own optimum: kl_optimum (if it is finite) and tv_optimum,
    means over prompts; loss_gap, the loss minus its minimum; and kl_star, KL(π‖π*)"""
    run = Again(o)
    task = data.task(run.meta["task"])
    if not task.outcomes:
        where = f"was trained on {task.name}; optima are known on exact alone"
        raise UserError(f"{o.checkpoint} {where}")
    world = Enumeration(run, task)
    log_p = world.table(run.policy)
    log_ref, figures = None, {}
    if run.reference:
        log_ref = world.table(run.open(run.reference))
    found = None
    try:
        with torch.enable_grad():
            found = optimum(task, log_ref, run.meta["method"], run.trained)
    except NoOptimum as e:
        say(f"{o.checkpoint}: no optimum was found: {e}")
    if found:
        loss, point = found
        figures = {"kl_optimum": kl(log_p, point).mean(), "tv_optimum": tv(log_p, point).mean()}
        if loss:
            figures["loss_gap"] = loss(log_p) - loss(point)
    if log_ref is not None:
        log_star = star(log_ref, torch.from_numpy(task.r), task.world_beta)
        figures["kl_star"] = kl(log_p, log_star).mean()
    return {name: x.item() for name, x in figures.items() if x.isfinite()}


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    paths = list(takewhile(lambda x: not x.startswith("-"), argv))
    names = {"kl_optimum": "KL(π‖own optimum)", "tv_optimum": "TV(π, own optimum)"}
    names |= {"loss_gap": "loss above its least value", "kl_star": "KL(π‖π*)"}
    for given in [[path] for path in paths] or [[]]:
        o = parse(Options, [*given, *argv[len(paths) :]])
        figures = distances(o)
        words = [f"{names[key]} {x:.4g}" for key, x in figures.items()]
        if "tv_optimum" not in figures:
            words.insert(0, "no optimum of this loss is known for these options")
        print(f"{o.checkpoint}: {', '.join(words)}")


if __name__ == "__main__":
    training.command(main)

"""The steps of every script, compared with the equations of its docstring written out again in
plain Python: the loss, the gradient of every weight, and every figure that is logged.

Each row is scored alone, from plain logits in float64. The policy always differs from the
reference, other.pt, and after the first optimizer step on a rollout it also differs from the policy
that sampled. So a missing β, a wrong sign or two exchanged bounds cannot hide behind a log-ratio of
0.
"""

import copy
import json
from math import exp, sqrt
from types import SimpleNamespace

import pytest
import torch
from conftest import few_prompts, lines, main

import data
from gpt import load, save
from training import Run
from training.optimizer import learning_rate
from training.sampling import sample

WORDS = data.tokenizer()


# ---- how a script is watched


class Step:
    """An optimizer step: its rows, a copy of the models before it, and the gradient of every
    trained weight before it is clipped."""

    def __init__(self, run, rows):
        self.rows = rows
        self.models = SimpleNamespace(**copy.deepcopy(run.models))
        roles = [m["role"] for m in run.ledger if m["trainable"]]
        self.weights = weights(run.models, roles)
        self.own = weights(vars(self.models), roles)


def weights(models, roles):
    return [p for role in roles for p in models[role].parameters()]


def watching(monkeypatch):
    """-> two lists that get an entry for each training step of the runs that follow: its optimizer
    steps, and its rollouts"""
    taken, drawn = [], []
    begin, micro_batches, update = Run.steps, Run.micro_batches, Run.update

    def of_training(self, *args, **state):
        for step in begin(self, *args, **state):
            taken.append([])
            drawn.append([])
            yield step

    def cut(self, rows, **more):
        taken[-1].append(Step(self, rows))
        return micro_batches(self, rows, **more)

    def updated(self, optimizer):
        step = taken[-1][-1]
        step.gradient = [p.grad.clone() for p in step.weights]
        update(self, optimizer)
        step.after = [p.detach().clone() for p in step.weights]

    def kept(*args, **more):
        rollout = sample(*args, **more)
        if drawn:  # before the first step a reward is tried out
            drawn[-1].append(rollout)
        return rollout | {}

    monkeypatch.setattr(Run, "steps", of_training)
    monkeypatch.setattr(Run, "micro_batches", cut)
    monkeypatch.setattr(Run, "update", updated)
    monkeypatch.setattr("training.sampling.sample", kept)
    return taken, drawn


@pytest.fixture
def watch(ends, monkeypatch):
    """watch(command) -> of each training step, in float64: (its line of the record, its optimizer
    steps, its rollouts). The run ends before its closing evaluation."""
    few_prompts(monkeypatch, 8)
    monkeypatch.chdir(ends)
    if not (ends / "other.pt").exists():
        model, meta = load("ends.pt")
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in model.parameters():
                p += 0.05 * torch.randn(p.shape, generator=generator)
        save(model, "other.pt", **meta)
    taken, drawn = watching(monkeypatch)
    monkeypatch.setattr(Run, "finish", lambda *_, **__: None)

    def watch(command, steps=2):
        script, *args = command.split()
        how = ["--dtype float64 --device cpu --log-every 1 --out steps/x.pt"]
        if "--steps" not in args:
            how.append(f"--steps {steps} --warmup 0 --lr 0.01")
        if script != "reward_model" and "--max-new-tokens" not in args:
            how.append("--max-new-tokens 8")
        assert main(script, *args, *" ".join(how).split()) == 0
        found = [line for line in lines(ends / "steps/x.jsonl") if "loss" in line]
        return list(zip(found, taken, drawn, strict=True))

    return watch


def agree(line, steps, expected):
    """Loss, gradient and figures are what is expected of each optimizer step: (its loss, {figure:
    value}). The line has the means over them, and all its figures are expected."""
    values = []
    for step, (loss, figures) in zip(steps, expected, strict=True):
        gradient = torch.autograd.grad(loss, step.own)
        norm = distance(gradient, [0.0] * len(gradient))
        assert distance(gradient, step.gradient) < 1e-6 * norm + 1e-12
        values.append(figures | {"loss": loss.item(), "grad_norm": norm})
    means = {key: mean([x[key] for x in values]) for key in values[0]}
    found = {key: x for key, x in line.items() if key not in ("step", "lr")}
    assert means["grad_norm"] > 1e-2 and found == pytest.approx(means, rel=1e-5, abs=1e-9)


def distance(a, b):
    return sqrt(sum((x - y).square().sum().item() for x, y in zip(a, b)))


# ---- plain Python


def mean(x):
    return sum(x) / len(x)


def averaged(found):
    """[(loss, {figure: value})] of rows -> their mean"""
    losses, figures = zip(*found)
    return mean(losses), {key: mean([x[key] for x in figures]) for key in figures[0]}


def sigmoid(x):
    return 1 / (1 + torch.exp(-torch.as_tensor(x)))


def tokens(model, x, y, temperature=1.0):
    """-> log π(y_t | x, y_<t) of every token, with gradient, and the entropies of these
    distributions, in nats"""
    z = model(torch.tensor([[*x, *y]]))[0, len(x) - 1 : -1] / temperature
    logp = z - z.exp().sum(1, keepdim=True).log()
    entropy = -(logp.exp() * logp).sum(1)
    return logp[range(len(y)), y], entropy.tolist()


def logp_of(model, x, y):
    """-> log π(y | x)"""
    return tokens(model, x, y)[0].sum()


def score(model, x, y):
    """-> r(x, y), read at the last token"""
    return model.values(torch.tensor([[*x, *y]]))[0, -1]


def mean_nll(step):
    """-> SFT's loss of an optimizer step: the mean over its tokens"""
    logp = torch.cat([tokens(step.models.policy, x, y)[0] for x, y in step.rows])
    return -logp.sum() / len(logp)


# ---- SFT and the reward model


def test_sft(watch):
    """The mean is over the step's tokens, however it is cut."""
    for line, steps, _ in watch("sft --init ends.pt --batch-size 6 --micro-batch 2"):
        (step,) = steps
        assert len({len(y) for _, y in step.rows}) > 2
        agree(line, steps, [(mean_nll(step), {})])


def test_reward_model(watch, ends):
    """With margins m, soft labels p and η = 0.3."""
    rows = data.task("reviews").preferences(24, 0)
    with open(ends / "soft.jsonl", "w") as file:
        for i, (x, w, l) in enumerate(rows):
            row = {"prompt": x, "chosen": w, "rejected": l, "margin": 0.2 * (i % 4)}
            file.write(json.dumps(row | {"p": 1 - 0.1 * (i % 5)}) + "\n")
    more = "--init ends.pt --batch-size 4 --micro-batch 2 --center-rewards 0.3 --steps 6"
    extremes = set()
    for line, steps, _ in watch(f"reward_model --task soft.jsonl {more} --warmup 0 --lr 0.01"):
        (step,) = steps
        found, scores = [], []
        for x, w, l, m, p in step.rows:
            r_w, r_l = (score(step.models.reward, x, y) for y in (w, l))
            delta = r_w - r_l - m
            loss = -p * sigmoid(delta).log() - (1 - p) * sigmoid(-delta).log()
            scores += [r_w.item(), r_l.item()]
            figures = {"accuracy": float(r_w > r_l), "margin": (r_w - r_l).item()}
            found.append((loss + 0.3 * (r_w + r_l) ** 2, figures))
        loss, figures = averaged(found)
        figures |= {"mean_reward": mean(scores)}
        figures |= {"min_reward": min(scores), "max_reward": max(scores)}
        agree(line, steps, [(loss, figures)])
        extremes |= {(name, scores.index(name(scores)) % 2) for name in (min, max)}
    assert len(extremes) == 4  # the least and the greatest are of chosen and of rejected answers


# ---- pairs


def dpo(u_w, u_l, beta=0.1, eps=0.0):
    h = beta * (u_w - u_l)
    return -(1 - eps) * sigmoid(h).log() - eps * sigmoid(-h).log()


def robust(u_w, u_l, beta=0.1, eps=0.1):
    h = beta * (u_w - u_l)
    return (-(1 - eps) * sigmoid(h).log() + eps * sigmoid(-h).log()) / (1 - 2 * eps)


def apo(u_w, u_l, beta=0.1):
    return 1 - sigmoid(beta * u_w) + sigmoid(beta * u_l)


def ipo(u_w, u_l, beta=1.0):
    return (u_w - u_l - 1 / (2 * beta)) ** 2


def pair_figures(reward_w, reward_l, w, l):
    """The figures of a pair that DPO, SimPO, ORPO and online DPO log"""
    reward_w, reward_l = reward_w.item(), reward_l.item()
    return {
        "rewards/chosen": reward_w,
        "rewards/rejected": reward_l,
        "rewards/margins": reward_w - reward_l,
        "rewards/accuracies": float(reward_w > reward_l),
        "logps/chosen": w.item(),
        "logps/rejected": l.item(),
    }


def against_reference(models, x, y_w, y_l, loss, beta, means=False, sft_weight=0.0, alpha=0.0):
    """A pair under DPO or IPO -> (loss, figures). means: of log-ratios over tokens. alpha: R-DPO's,
    as βh + α(|y_w| - |y_l|) is β(h + α(|y_w| - |y_l|)/β)"""
    w, l = (logp_of(models.policy, x, y) for y in (y_w, y_l))
    ref_w, ref_l = (logp_of(models.ref, x, y).item() for y in (y_w, y_l))
    n_w, n_l = (len(y_w), len(y_l)) if means else (1, 1)
    u_w, u_l = (w - ref_w) / n_w, (l - ref_l) / n_l
    longer = alpha * (len(y_w) - len(y_l)) / beta
    value = loss(u_w + longer, u_l, beta) - sft_weight * w / len(y_w)
    return value, pair_figures(beta * u_w, beta * u_l, w, l)


PAIRS = "--init ends.pt --batch-size 6 --micro-batch 2"
DPO = {  # options -> the loss of u = log π/π_ref, β, and whether u is a mean over tokens
    "": (dpo, 0.1, False),
    "--beta 0.3 --label-smoothing 0.2": (lambda *x: dpo(*x, eps=0.2), 0.3, False),
    "--loss robust --label-smoothing 0.2 --beta 0.3": (lambda *x: robust(*x, eps=0.2), 0.3, False),
    "--loss robust": (robust, 0.1, False),
    "--loss ipo --beta 0.4": (ipo, 0.4, True),
    "--loss ipo --ipo-sum": (ipo, 1.0, False),
    "--loss norm": (dpo, 5.0, True),
    "--loss apo --beta 0.3": (apo, 0.3, False),
    "--length-penalty 0.4 --beta 0.3": (dpo, 0.3, False),
    "--sft-weight 0.5": (dpo, 0.1, False),
    "--pairs 9 --precompute-ref": (dpo, 0.1, False),  # then six pairs, and three
}


@pytest.mark.parametrize("options", DPO)
def test_dpo(options, watch):
    loss, beta, means = DPO[options]
    weight, alpha = 0.5 if "sft" in options else 0.0, 0.4 if "length" in options else 0.0
    accuracies = []
    for line, steps, _ in watch(f"dpo {PAIRS} --reference other.pt {options}"):
        (step,) = steps
        models, found = step.models, []
        models.ref = load("other.pt")[0].double()  # not in memory if it was precomputed
        for row in step.rows:
            found.append(against_reference(models, *row[:3], loss, beta, means, weight, alpha))
        value, figures = averaged(found)
        accuracies.append(figures["rewards/accuracies"])
        agree(line, steps, [(value, figures)])
    assert 0 < mean(accuracies) < 1


@pytest.mark.parametrize(
    "options, beta, gamma, weight",
    [
        ("--beta 3 --gamma-beta-ratio 0.4", 3.0, 1.2, 0.0),
        ("--sft-weight 0.5", 2.0, 1.0, 0.5),
    ],
)
def test_simpo(options, beta, gamma, weight, watch):
    for line, steps, _ in watch(f"simpo {PAIRS} {options}"):
        (step,) = steps
        found = []
        for x, y_w, y_l in step.rows:
            w, l = (logp_of(step.models.policy, x, y) for y in (y_w, y_l))
            r_w, r_l = beta * w / len(y_w), beta * l / len(y_l)
            loss = -sigmoid(r_w - r_l - gamma).log() - weight * w / len(y_w)
            found.append((loss, pair_figures(r_w, r_l, w, l)))
        agree(line, steps, [averaged(found)])


@pytest.mark.parametrize("options, lam", [("--lam 2", 2.0), ("--prompt-loss", 0.1)])
def test_orpo(options, lam, watch):
    """--prompt-loss: the NLL is a mean over all tokens but the first."""
    for line, steps, _ in watch(f"orpo {PAIRS} {options}"):
        (step,) = steps
        found = []
        for x, y_w, y_l in step.rows:
            w, l = (logp_of(step.models.policy, x, y) for y in (y_w, y_l))
            p_w, p_l = (w / len(y_w)).exp(), (l / len(y_l)).exp()
            log_odds = (p_w / (1 - p_w)).log() - (p_l / (1 - p_l)).log()
            nll = -w / len(y_w)
            if "prompt" in options:
                nll = -tokens(step.models.policy, x[:1], x[1:] + y_w)[0].mean()
            figures = pair_figures(lam * w / len(y_w), lam * l / len(y_l), w, l)
            figures |= {"nll_loss": nll.item(), "log_odds_chosen": log_odds.item()}
            figures |= {"log_odds_ratio": sigmoid(log_odds).log().item()}
            found.append((nll - lam * sigmoid(log_odds).log(), figures))
        agree(line, steps, [averaged(found)])


def test_kto(watch):
    """λ_D = 1.5, λ_U = 0.5 and ẑ > 0: the mean log-ratio of the answers that the rows after have,
    the next one with another prompt."""
    options = "--reference other.pt --beta 0.2 --w-desirable 1.5 --w-undesirable 0.5"
    for line, steps, _ in watch(f"kto {PAIRS.replace('6', '8')} {options}"):
        (step,) = steps
        policy, ref, rows = step.models.policy, step.models.ref, step.rows

        def u(x, y, policy=policy, ref=ref):
            return logp_of(policy, x, y) - logp_of(ref, x, y).item()

        z = []
        for i, (x, *_) in enumerate(rows):
            after = rows[i + 1 :] + rows[:i]
            z.append(u(x, next(y for other, y, _ in after if other != x)).item())
        z = max(0.0, mean(z))
        losses, figures = [], {"kl": z}
        for name, label in (("chosen", True), ("rejected", False)):
            kind = [(x, y) for x, y, desirable in rows if desirable == label]
            sign, weight = (1, 1.5) if label else (-1, 0.5)
            losses += [weight * (1 - sigmoid(sign * 0.2 * (u(x, y) - z))) for x, y in kind]
            figures[f"rewards/{name}"] = mean([0.2 * u(x, y).item() for x, y in kind])
            figures[f"logps/{name}"] = mean([logp_of(policy, x, y).item() for x, y in kind])
        figures["rewards/margins"] = figures["rewards/chosen"] - figures["rewards/rejected"]
        assert z > 0.05 and len(losses) == 8
        agree(line, steps, [(mean(losses), figures)])


# ---- rollouts


def responses(rollout):
    """-> [(prompt, response, whether it ended)], as ids"""
    found = []
    for ids, mask, finished in zip(rollout.ids, rollout.mask, rollout.finished.tolist()):
        x, y = ids[: mask.int().argmax()], ids[mask]
        found.append((tuple(x.tolist()), tuple(y.tolist()), finished))
    return found


def odd(y):
    """judge.py:odd of a response"""
    return 1.0 if len(WORDS.decode(y)) % 2 else -1.0


def summary(rows):
    ended = mean([float(finished) for *_, finished in rows])
    return {
        "completions/mean_length": mean([len(y) for _, y, _ in rows]),
        "completions/clipped_ratio": 1 - ended,
    }


def group_figures(groups):
    """[[reward]] -> what GRPO and DAPO log of them"""
    return {
        "reward": mean([mean(group) for group in groups]),
        "reward_std": mean([deviation(group) for group in groups]),
        "frac_reward_zero_std": mean([float(len(set(group)) == 1) for group in groups]),
    }


def deviation(x):
    """The unbiased standard deviation"""
    return sqrt(sum((a - mean(x)) ** 2 for a in x) / (len(x) - 1))


def advantages(groups, norm):
    """[[score]] -> [A], one per response"""
    found, spread = [], deviation([r for group in groups for r in group])
    for group in groups:
        for r in group:
            others = (sum(group) - r) / (len(group) - 1)
            A = r - (others if norm == "loo" else mean(group))
            std = {"std": deviation(group) + 1e-4, "batch": spread + 1e-4}
            found.append(A / std.get(norm, 1.0))
    return found


def clipped(
    steps,
    adv,
    models,
    temperature,
    weight,
    low,
    high,
    penalty,
    by_response=False,
    cispo=False,
    tis=(),
):
    """The clipped loss of the responses of each optimizer step -> [(loss, figures)].

    adv: {(x, y): A}. weight(y, S, tokens): of each token of y, among S responses with so many
    tokens. penalty(logp, ref_logp, ρ) -> of a token, added to its loss. by_response: ρ is that of
    the response. cispo: the bounded ρ is a weight of A log π. tis: {(x, y): the weight of each
    token's loss}"""
    found = []
    for step in steps:
        minibatch = [row[:2] for row in responses(step.rows)]
        n = sum(len(y) for _, y in minibatch)
        loss, entropies, lower, upper, k3 = 0.0, [], 0, 0, 0.0
        for x, y in minibatch:
            logp, entropy = tokens(step.models.policy, x, y, temperature)
            old = tokens(models.policy, x, y, temperature)[0].tolist()
            ref = tokens(models.ref, x, y, temperature)[0].tolist() if penalty else old
            A, entropies = adv[x, y], entropies + entropy
            ratios = [(logp[t] - old[t]).exp() for t in range(len(y))]
            if by_response:  # the geometric mean
                ratios = [(logp - torch.tensor(old)).mean().exp()] * len(y)
            for t, ratio in enumerate(ratios):
                bounded = min(max(ratio.item(), 1 - low), 1 + high)
                value = -min(ratio * A, bounded * A + 0 * ratio.detach())
                value = -bounded * A * logp[t] if cispo else value
                if penalty:
                    value = value + penalty(logp[t], ref[t], ratio)
                    k3 += exp(ref[t] - logp[t].item()) - (ref[t] - logp[t].item()) - 1
                value = value * tis[x, y][t] if tis else value
                loss = loss + weight(y, len(minibatch), n) * value
                lower += ratio.item() < 1 - low and A < 0
                upper += ratio.item() > 1 + high and A > 0
        figures = {"entropy": mean(entropies)}
        figures |= {"clip_ratio/low_mean": lower / n, "clip_ratio/high_mean": upper / n}
        found.append((loss, figures | ({"kl": k3 / len(minibatch)} if penalty else {})))
    assert found[0][1]["clip_ratio/low_mean"] == found[0][1]["clip_ratio/high_mean"] == 0
    assert any(x["clip_ratio/low_mean"] for _, x in found)
    assert any(x["clip_ratio/high_mean"] for _, x in found)
    return found


WEIGHTS = {
    "seq_mean": lambda y, S, tokens: 1 / (S * len(y)),
    "token_mean": lambda y, S, tokens: 1 / tokens,
    "const": lambda y, S, tokens: 1 / (S * 8),
    "sum": lambda y, S, tokens: 1 / S,
}
SAMPLED = "--init ends.pt --batch-size 8 --group 4 --updates 2 --minibatches 2 --micro-batch 8"
GRPO = {  # options -> normalisation, aggregation, temperature, ε, ε_high, KL, β
    "--eps 0.02 --eps-high 0.05 --beta 0.3": ("std", "seq_mean", 1.0, 0.02, 0.05, "k3", 0.3),
    "--agg token_mean --kl k3-ratio --temperature 1.3 --eps 0.03": (
        *("std", "token_mean", 1.3, 0.03, 0.03, "k3-ratio", 0.04),
    ),
    "--adv-norm none --agg const --kl none --eps-high 0.03 --eps 0.05": (
        *("none", "const", 1.0, 0.05, 0.03, "none", 0.0),
    ),
    "--adv-norm loo --agg sum --kl reward --beta 0.5 --eps 0.02": (
        *("loo", "sum", 1.0, 0.02, 0.02, "reward", 0.5),
    ),
    "--adv-norm batch --kl none --eps 0.02 --eps-high 0.05": (
        *("batch", "seq_mean", 1.0, 0.02, 0.05, "none", 0.0),
    ),
    "--clip weight --beta 0.3 --eps 0.02 --eps-high 0.03": (
        *("std", "seq_mean", 1.0, 0.02, 0.03, "k3", 0.3),
    ),
    "--ratio seq --kl none --eps 0.01 --eps-high 0.02": (
        *("std", "seq_mean", 1.0, 0.01, 0.02, "none", 0.0),
    ),
}


@pytest.mark.parametrize("options", GRPO)
def test_grpo(options, watch):
    """Two passes of two minibatches over a rollout."""
    norm, agg, temperature, low, high, kl, beta = GRPO[options]
    command = f"grpo {SAMPLED} --reference other.pt --reward judge.py:odd {options}"
    sampled = 0
    for line, steps, (rollout,) in watch(command, 2 if kl == "k3" else 1):
        rows, models = responses(rollout), steps[0].models
        rewards = scores = [odd(y) for _, y, _ in rows]
        if kl == "reward":
            scores = []
            for (x, y, _), r in zip(rows, rewards):
                old, ref = (tokens(m, x, y)[0].sum().item() for m in (models.policy, models.ref))
                scores.append(r - beta * (old - ref))
        groups = [scores[i : i + 4] for i in range(0, 32, 4)]
        adv = {(x, y): A for (x, y, _), A in zip(rows, advantages(groups, norm))}
        assert len({x for x, *_ in rows}) == 8

        def penalty(logp, ref, ratio):
            if kl == "reward":
                return 0.0
            k3 = (ref - logp).exp() - (ref - logp) - 1
            return beta * k3 * (ratio if kl == "k3-ratio" else 1)

        how = (adv, models, temperature, WEIGHTS[agg], low, high, kl != "none" and penalty)
        found = clipped(steps, *how, by_response="seq" in options, cispo="weight" in options)
        groups = [rewards[i : i + 4] for i in range(0, 32, 4)]
        sampled += sum(len(y) for _, y, _ in rows)
        rest = group_figures(groups) | summary(rows) | {"sampled_tokens": sampled}
        agree(line, steps, [(loss, figures | rest) for loss, figures in found])


def test_dapo(watch):
    """ε_low ≠ ε_high, a temperature, and R_len = -((|y| - 5) / 3) above 5 of 8 tokens. Groups all
    correct or all wrong are left out, and so is what was sampled beyond 8 groups."""
    options = "--temperature 1.3 --eps 0.02 --eps-high 0.05 --overlong-cache 3"
    sampled = 0
    for line, steps, rollouts in watch(f"dapo {SAMPLED} --reward judge.py:odd {options}"):
        drawn = [row for rollout in rollouts for row in responses(rollout)]
        sampled += sum(len(y) for _, y, _ in drawn)
        groups = [drawn[i : i + 4] for i in range(0, len(drawn), 4)]
        mixed = [group for group in groups if len({odd(y) for _, y, _ in group}) == 2]
        rows = [row for group in mixed[:8] for row in group]
        rewards = [odd(y) for _, y, _ in rows]
        lengths = [-max(0.0, (len(y) - 5) / 3) for _, y, _ in rows]
        scores = [r + penalty for r, penalty in zip(rewards, lengths)]
        adv = advantages([scores[i : i + 4] for i in range(0, 32, 4)], "std")
        adv = {(x, y): A for (x, y, _), A in zip(rows, adv)}
        assert {row[:2] for step in steps for row in responses(step.rows)} == adv.keys()
        how = (adv, steps[0].models, 1.3, WEIGHTS["token_mean"], 0.02, 0.05, None)
        rest = group_figures([rewards[i : i + 4] for i in range(0, 32, 4)]) | summary(rows)
        rest |= {
            "accuracy": mean([float(odd(y) > 0) for _, y, _ in drawn]),
            "kept_fraction": len(mixed) / len(groups),
            "num_gen_batches": len(rollouts),
            "overlong": mean([float(x < 0) for x in lengths]),
            "overlong_reward": mean(lengths),
            "sampled_tokens": sampled,
        }
        assert len(rollouts) > 1 and len(mixed) > 8 and 0 < rest["overlong"] < 1
        found = clipped(steps, *how)
        agree(line, steps, [(loss, figures | rest) for loss, figures in found])


def another_sampler(*args, sample=sample, **more):
    """Samples of which another engine says other log-probs"""
    rollout = sample(*args, **more)
    return rollout | {"logp": rollout.logp + 0.1 * torch.sin(7 * rollout.logp) * rollout.mask}


@pytest.mark.parametrize("script", ["grpo", "dapo"])
def test_truncated_importance_sampling(script, watch, monkeypatch):
    """Each token's loss times min(π_old/π_sampler, C). With --kl reward R has the KL of π_old."""
    monkeypatch.setattr("test_steps.sample", another_sampler)
    command = f"{script} {SAMPLED} --reward judge.py:odd --tis 1.04 --eps 0.02 --eps-high 0.03"
    more = "--kl reward --beta 0.5 --reference other.pt" if script == "grpo" else "--no-overlong"
    for line, steps, rollouts in watch(f"{command} {more}"):
        models, rows, weights = steps[0].models, [], {}
        for rollout in rollouts:
            for (x, y, _), logp, mask in zip(responses(rollout), rollout.logp, rollout.mask):
                rows.append((x, y))
                old = tokens(models.policy, x, y)[0]
                weights[x, y] = (old - logp[mask]).exp().clamp(max=1.04).tolist()
        groups = [rows[i : i + 4] for i in range(0, len(rows), 4)]
        if script == "dapo":
            groups = [group for group in groups if len({odd(y) for _, y in group}) == 2][:8]
        rows = [row for group in groups for row in group]
        scores = [odd(y) for _, y in rows]
        if script == "grpo":
            for i, (x, y) in enumerate(rows):
                old, ref = (tokens(m, x, y)[0].sum().item() for m in (models.policy, models.ref))
                scores[i] -= 0.5 * (old - ref)
        adv = advantages([scores[i : i + 4] for i in range(0, 32, 4)], "std")
        adv = dict(zip(rows, adv))
        how = WEIGHTS["seq_mean" if script == "grpo" else "token_mean"], 0.02, 0.03
        found = clipped(steps, adv, models, 1.0, *how, penalty=None, tis=weights)
        for step, (loss, _) in zip(steps, found, strict=True):
            gradient = torch.autograd.grad(loss, step.own)
            assert distance(gradient, step.gradient) < 1e-6 * distance(
                gradient, [0] * len(gradient)
            )
        used = [w for step in steps for x, y, _ in responses(step.rows) for w in weights[x, y]]
        assert max(used) == 1.04 and min(used) < 0.96
        assert line["loss"] == pytest.approx(mean([loss.item() for loss, _ in found]))
        per_step = [[w for x, y, _ in responses(s.rows) for w in weights[x, y]] for s in steps]
        assert line["tis_weight"] == pytest.approx(mean(list(map(mean, per_step))))


def test_the_sampler_is_the_policy_to_rounding(watch):
    """float64, on-policy: the weights are 1, as they are to 1e-5 in float32."""
    for line, _, _ in watch(f"grpo {SAMPLED} --reward judge.py:odd --tis 2 --kl none"):
        assert line["tis_weight"] == pytest.approx(1, abs=1e-6)


def test_a_fifth_of_the_length_is_shaped_by_default(watch):
    """L_max = 12: R_len is -(|y| - 10)/2 above 10 tokens."""
    command = f"dapo {SAMPLED} --reward judge.py:odd --temperature 1.3"
    command += " --max-new-tokens 12"
    for line, steps, _ in watch(command, 1):
        kept = [row for step in steps[:2] for row in responses(step.rows)]
        shaped = [-max(0.0, (len(y) - 10) / 2) for _, y, _ in kept]
        assert min(shaped) < 0 and line["overlong_reward"] == pytest.approx(mean(shaped))


def test_ppo(watch):
    """Two passes of two minibatches, a learned reward with a penalty where there is no end, γ and λ
    below 1, a temperature, and bounds that are met."""
    command = f"ppo {SAMPLED} --reference other.pt --reward judge.pt --temperature 1.3 --beta 0.3"
    command += " --eps 0.03 --eps-v 0.02 --vf-coef 0.3 --gamma 0.8 --lam 0.9"
    sampled = 0
    for line, steps, (rollout,) in watch(f"{command} --missing-eos-penalty 5"):
        rows, models = responses(rollout), steps[0].models
        sampled += sum(len(y) for _, y, _ in rows)
        found, adv, returns, kls, scores, totals = {}, [], [], [], [], []
        for x, y, finished in rows:
            old, ref = (tokens(m, x, y, 1.3)[0].tolist() for m in (models.policy, models.ref))
            V = values(models.critic, x, y).tolist()
            scores.append(score(models.reward, x, y).item() - (0 if finished else 5))
            r = [-0.3 * (old[t] - ref[t]) for t in range(len(y))]
            r[-1] += scores[-1]
            A = gae(r, V, 0.8, 0.9)
            found[x, y] = old, V, A
            adv += A
            returns += [a + v for a, v in zip(A, V)]
            kls.append(sum(old) - sum(ref))
            totals.append(sum(r))
        scale = sqrt(mean([(a - mean(adv)) ** 2 for a in adv]) + 1e-8)
        rest = summary(rows) | {
            "reward": mean(scores),
            "rlhf_reward": mean(totals),
            "kl": mean(kls),
            "explained_variance": 1 - variance(adv) / (variance(returns) + 1e-5),
            "sampled_tokens": sampled,
        }
        expected = []
        for step in steps:
            total, per_token = 0.0, []
            for x, y, _ in responses(step.rows):
                logp, entropy = tokens(step.models.policy, x, y, 1.3)
                V = values(step.models.critic, x, y)
                for t, (old, old_V, A) in enumerate(zip(*found[x, y])):
                    R, A, ratio = A + old_V, (A - mean(adv)) / scale, (logp[t] - old).exp()
                    bounded = min(max(ratio.item(), 0.97), 1.03)
                    near = old_V + min(max(V[t].item() - old_V, -0.02), 0.02)
                    L_pi = max(-A * ratio, -A * bounded + 0 * ratio.detach())
                    L_V = max((V[t] - R) ** 2, (near - R) ** 2 + 0 * V[t].detach()) / 2
                    total = total + L_pi + 0.3 * L_V
                    per_token.append(
                        {
                            "loss/policy_avg": L_pi.item(),
                            "loss/value_avg": L_V.item(),
                            "entropy": entropy[t],
                            "policy/approxkl_avg": (logp[t].item() - old) ** 2 / 2,
                            "policy/clipfrac_avg": float(-A * bounded > -A * ratio.item()),
                            "val/clipfrac_avg": float((near - R) ** 2 > (V[t].item() - R) ** 2),
                        }
                    )
            figures = {key: mean([x[key] for x in per_token]) for key in per_token[0]}
            expected.append((total / len(per_token), figures | rest))
        assert line["policy/clipfrac_avg"] > 0 < line["val/clipfrac_avg"]
        agree(line, steps, expected)


def gae(r, V, gamma, lam):
    """A_t = δ_t + γλ A_t+1, with V = 0 after the last token"""
    A, later = [], 0.0
    for t in reversed(range(len(r))):
        delta = r[t] + gamma * (V[t + 1] if t + 1 < len(r) else 0.0) - V[t]
        later = delta + gamma * lam * later
        A.insert(0, later)
    return A


def values(critic, x, y):
    """-> (|y|,) V of what stands before each token of y"""
    return critic.values(torch.tensor([[*x, *y]]))[0, len(x) - 1 : -1]


def variance(x):
    return mean([(a - mean(x)) ** 2 for a in x])


ONLINE = {
    "--beta 0.3": (dpo, 0.3, False),
    "--label argmax": (dpo, 0.1, False),
    "--label argmax --loss ipo --beta 0.4": (ipo, 0.4, True),
    "--loss ipo --ipo-sum": (ipo, 1.0, False),
}


@pytest.mark.parametrize("options", ONLINE)
def test_online_dpo(options, watch, monkeypatch):
    """The best and the worst of three samples, the first prompt's better one losing its draw. Equal
    answers weigh nothing, nor do ties with argmax."""
    loss, beta, means = ONLINE[options]
    rand = torch.rand
    fixed = torch.tensor([0.999, 0.1] * 4)

    def drawn(*size, **more):
        return fixed.clone() if size == (8,) else rand(*size, **more)

    monkeypatch.setattr(torch, "rand", drawn)
    command = "online_dpo --init ends.pt --batch-size 8 --micro-batch 4 --samples-per-prompt 3"
    command += " --reference other.pt --reward judge.py:odd --temperature 1.3"
    labels = sampled = lowest = tied = 0
    for line, (step,), (rollout,) in watch(f"{command} {options}"):
        rows, found, kls = responses(rollout), [], []
        margins, equals = [], []
        for i in range(8):
            x, group = rows[3 * i][0], [y for _, y, _ in rows[3 * i : 3 * i + 3]]
            best = max(range(3), key=lambda j: (odd(group[j]), j))  # of equal ones the last
            worst = min(range(3), key=lambda j: (odd(group[j]), j))  # and the first
            margin = odd(group[best]) - odd(group[worst])
            y_w, y_l = group[best], group[worst]
            if "argmax" not in options and fixed[i].item() >= 1 / (1 + exp(-margin)):
                y_w, y_l, margin = y_l, y_w, -margin
            pair, figures = against_reference(step.models, x, y_w, y_l, loss, beta, means)
            u = [
                (logp_of(step.models.policy, x, y) - logp_of(step.models.ref, x, y)).item()
                for y in (y_w, y_l)
            ]
            kls.append(mean(u))
            margins.append(margin)
            equals.append(y_w == y_l)
            if not equals[-1] and not ("argmax" in options and margin == 0):
                found.append((pair, figures))
        labels += equals.count(False)
        sampled += sum(len(y) for _, y, _ in rows)
        value, figures = averaged(found)
        figures |= summary(rows) | {
            "kl": mean(kls),
            "reward": mean([odd(y) for _, y, _ in rows]),
            "reward_margin": mean(margins),
            "equal_fraction": mean([float(x) for x in equals]),
            "tie_fraction": mean([float(x == 0) for x in margins]),
            "labels": labels,
            "sampled_tokens": sampled,
        }
        lowest = min([lowest, *margins])
        tied |= 0 < figures["tie_fraction"] < 1
        agree(line, [step], [(value, figures)])
    assert tied and (lowest < 0 or "argmax" in options)


# ---- what every step does with its gradient

SCHEDULES = [  # step, from 0, of 10 with 4 of warmup -> the learning rate, relative to its peak
    ("constant", {0: 1 / 4, 3: 1, 4: 1, 7: 1, 9: 1}),
    ("linear", {0: 1 / 4, 3: 1, 4: 1, 7: 1 / 2, 9: 1 / 6}),
    ("cosine", {0: 1 / 4, 3: 1, 4: 1, 7: 0.55, 9: 0.55 - 0.45 * sqrt(3) / 2}),
]


@pytest.mark.parametrize("schedule, rates", SCHEDULES)
def test_the_learning_rate(schedule, rates):
    """Up to its peak in the last step of the warmup, and there in the first after it; then linear
    to 0, or cosine to a tenth, both of which would be reached one step after the last."""
    o = SimpleNamespace(lr=2.0, lr_schedule=schedule, warmup=4, steps=10)
    found = {step: learning_rate(step, o) / 2 for step in rates}
    assert found == pytest.approx(rates)
    o.warmup = 0
    assert learning_rate(0, o) == 2.0
    end = {"constant": 1.0, "linear": 0.0, "cosine": 0.1}[schedule]
    assert learning_rate(10, o) / 2 == pytest.approx(end)
    o.warmup = 20  # which the run does not live to see end
    assert learning_rate(9, o) == pytest.approx(1.0)


def adamw(steps, rates, decay, largest):
    """Decoupled weight decay on matrices alone, β = (0.9, 0.95), ε = 1e-8, all gradients scaled to
    a norm of at most `largest`: the weights after each step are those that the run has."""
    m = [torch.zeros_like(p) for p in steps[0].own]
    v, norms = [x.clone() for x in m], []
    for t, (step, lr) in enumerate(zip(steps, rates, strict=True), 1):
        norm = distance(step.gradient, [0.0] * len(m))
        norms.append(norm)
        scale = min(1.0, largest / (norm + 1e-6))
        for i, (p, g) in enumerate(zip(step.own, step.gradient)):
            m[i] = 0.9 * m[i] + 0.1 * scale * g
            v[i] = 0.95 * v[i] + 0.05 * (scale * g) ** 2
            direction = m[i] / (1 - 0.9**t) / ((v[i] / (1 - 0.95**t)).sqrt() + 1e-8)
            kept = 1 - lr * decay if p.dim() == 2 else 1.0
            expected = kept * p.detach() - lr * direction
            torch.testing.assert_close(step.after[i], expected, rtol=1e-9, atol=1e-12)
    return norms


def test_adamw_by_hand(watch):
    """Four steps: two of warmup, then linear; the first gradients are clipped, the others not."""
    command = "sft --init ends.pt --batch-size 4 --steps 4 --lr 0.02 --warmup 2 --weight-decay 0.5"
    found = watch(f"{command} --lr-schedule linear --grad-clip 1.3")
    rates = [0.01, 0.02, 0.02, 0.01]
    assert [line["lr"] for line, *_ in found] == pytest.approx(rates)
    norms = adamw([step for _, (step,), _ in found], rates, 0.5, 1.3)
    assert min(norms) < 1.2 and max(norms) > 1.4, norms


def test_every_update_of_a_rollout_has_its_learning_rate(watch):
    """Four optimizer steps on each of two rollouts; the gradients of the policy and of the critic
    are clipped together, at 1 by default."""
    found = watch(f"ppo {SAMPLED} --reward judge.pt --steps 2 --lr 0.02 --warmup 2 --vf-coef 3")
    rates = [0.01] * 4 + [0.02] * 4
    assert [line["lr"] for line, *_ in found] == pytest.approx([0.01, 0.02])
    norms = adamw([step for _, steps, _ in found for step in steps], rates, 0.0, 1.0)
    assert max(norms) > 1.1, norms

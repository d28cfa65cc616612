"""GRPO: Group Relative Policy Optimization (DeepSeekMath, arXiv:2402.03300).

    A_i   = (R_i - mean R) / std R                 over the G responses to one prompt: no critic
    R_i   = r_i, or r_i - β Σ_t log(π_old/π_ref) with --kl reward
    ρ_it  = π_θ(y_it | x, y_i<t) / π_old(y_it | x, y_i<t)
    k3_it = π_ref/π_θ - log(π_ref/π_θ) - 1         of the same token
    L(θ) = 1/S Σ_i 1/|y_i| Σ_t [- min(ρ_it A_i, clip(ρ_it, 1-ε, 1+ε) A_i) + β k3_it]

    Dr. GRPO  R - mean R; 1/S Σ_i 1/L_max Σ_t; no KL     --adv-norm none --agg const --kl none
    RLOO      R - mean of the other R; 1/S Σ_i Σ_t       --adv-norm loo --agg sum --kl reward
    GSPO      ρ_i = (π_θ(y_i|x)/π_old(y_i|x))^(1/|y_i|)   --ratio seq --kl none --minibatches 4
    CISPO     - sg(min(ρ, 1+ε_high)) A log π_θ           --clip weight       arXiv:2506.13585

    paper               code                      shape, or meaning
    G, S                group, len(minibatch)     responses per prompt; per optimizer step
    r, R, A             reward, score, adv        (P, G) of P prompts; A (P·G, 1), one per response
    log π_θ, π_old      logp, old_logp            (B, T) of token t, nats, at --temperature
    log π_ref           ref_logp                  (B, T); rollout.logp is log π_old as sampled
    |y|, L_max          length, longest           response tokens, end token included

Models in memory: 2 (policy, trained; ref, frozen), 1 with --kl none; a learned reward adds one.
Data: prompts, and a judge of responses.
Departures: 1. the std of a group is the unbiased one, and 1e-4 is added to it;
2. one reward per response; 3. no outer iterations that refresh π_ref and retrain the reward model.
At the first optimizer step of a rollout ρ = 1, so nothing is clipped. With its defaults grpo.py has
one step per rollout; --minibatches 4 or --updates 2 turns the clip on. dapo.py has 4 or 8 steps.

    python grpo.py --task arithmetic:2          sums of two digits, reward 1 if right
"""

from dataclasses import dataclass

import torch

import data
import training
from evaluate import Evaluator
from gpt import token_logprobs
from training import RolloutOptions, Run, opt, parse
from training.reward import load_judge

ADVANTAGES = ("std", "batch", "none", "loo")
RATIOS = ("token", "seq")
AGGREGATIONS = ("seq_mean", "token_mean", "const", "sum")


def group_advantages(reward, eps=1e-4, norm="std"):
    """reward: (P, G), G > 1 responses to each of P prompts -> (P, G) advantages, without gradient.
    norm: "std" (R - mean) / (std + eps); "batch" the same with the std of all P·G; "none" R - mean;
    "loo" R - mean of the other G - 1. Each row sums to 0, and equal rewards give exactly 0."""
    assert reward.dim() == 2 and reward.size(1) > 1, "a (P, G) tensor, G > 1"
    given = reward.detach()
    reward = given - given[:, :1]  # equal rewards give 0, not a rounding error divided by eps
    adv = reward - reward.mean(1, keepdim=True)
    G = reward.size(1)
    if norm == "std":
        return adv / (reward.std(1, keepdim=True) + eps)
    if norm == "batch":  # REINFORCE++ with the groups' baseline (arXiv:2501.03262)
        return adv / (given.std() + eps)
    return adv * G / (G - 1) if norm == "loo" else adv  # r - mean of the other G - 1


def k3(logp, ref_logp):
    """π_ref/π - log(π_ref/π) - 1 ≥ 0, (B, T), nats. Its mean over samples from π is KL(π‖π_ref),
    but its mean gradient is that of KL(π_ref‖π). The log-ratio is clamped to ±20."""
    x = (ref_logp - logp).clamp(-20, 20)
    return x.expm1() - x  # e^x - 1 - x; near 0 its error is eps·|x|, not eps


def grpo_loss(logp, old_logp, ref_logp, adv, eps=0.2, beta=0.04, eps_high=None, kl="k3", clip=""):
    """GRPO, arXiv:2402.03300; with clip="weight" CISPO. logp, old_logp, ref_logp: (B, T) log-probs
    of tokens, nats; ref_logp may be None without k3. adv: (B, 1). kl: "k3", or "k3-ratio" for ρ k3,
    whose mean gradient at each token is that of KL(π‖π_ref). Returns (B, T) losses."""
    assert logp.shape == old_logp.shape and adv.shape == (len(logp), 1), "(B, T) twice, (B, 1)"
    ratio = (logp - old_logp).exp()
    clipped = ratio.clamp(1 - eps, 1 + (eps if eps_high is None else eps_high))
    losses = -torch.min(ratio * adv, clipped * adv)
    if clip == "weight":  # no token loses its gradient
        losses = -clipped.detach() * adv * logp
    if beta and kl.startswith("k3"):  # with "reward" it is in the advantage
        losses = losses + beta * k3(logp, ref_logp) * (ratio if kl == "k3-ratio" else 1)
    return losses


def sequence_old_logp(logp, old_logp, mask):
    """GSPO's token form (arXiv:2507.18071): logp - log s, (B, T), without gradient; log s is the
    response's mean of log π/π_old. As old_logp it gives each token ratio s and its own gradient."""
    mean = ((logp - old_logp) * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True)
    return (logp - mean).detach()


@dataclass
class Options(RolloutOptions):
    group: int = opt(8, "G: responses per prompt", low=2)
    adv_norm: str = opt("std", "how A follows from the rewards", choices=ADVANTAGES)
    agg: str = opt("seq_mean", "how the tokens' losses are averaged", choices=AGGREGATIONS)
    ratio: str = opt("token", "seq: ρ per response", choices=RATIOS, clips=True, only="clip=ratio")
    clip: str = opt("ratio", "PPO's clip or CISPO's", choices=("ratio", "weight"), clips=True)
    eps: float = opt(0.2, "ε: ρ is clipped to [1 - ε, 1 + ε_high]", low=0, clips=True)
    eps_high: float = opt(None, "ε_high of the clip", low=0, like="eps", clips=True)
    tis: float = opt(None, "C: weight tokens by min(π_old/π_sampler, C) (common: 2)", above=0)
    kl: str = opt("k3", "how the KL is penalised", choices=("k3", "k3-ratio", "reward", "none"))
    beta: float = opt(0.04, "β: weight of the KL", low=0, only="kl=k3|k3-ratio|reward")


PRESETS = {  # defaults for any task, for a kind of task, for an option's value; the last match wins
    "any": dict(steps=100, batch_size=16, lr=2e-4, save_every=20),
    "arithmetic": dict(steps=200, batch_size=32),
    "exact": dict(group=64, batch_size=4, steps=1500, lr=3e-4, lr_schedule="linear", beta=0.5),
    "ratio=seq": dict(eps=3e-4, eps_high=4e-4),
    "clip=weight": dict(eps=1.0, eps_high=4.0),  # no lower bound
}


def compute_loss(policy, batch, o):
    """A micro-batch of B responses -> losses (B, T), and metrics, (B, T) or (B,) per response."""
    logp, entropy = token_logprobs(policy, batch, o.temperature, entropy=True)
    old_logp = batch.old_logp_or(logp)  # first step of a rollout: π_old is π_θ, ρ is 1
    old_logp = sequence_old_logp(logp, old_logp, batch.mask) if o.ratio == "seq" else old_logp
    how = o.eps, o.beta, o.eps_high, o.kl, o.clip
    losses = grpo_loss(logp, old_logp, batch.ref_logp, batch.adv, *how)

    logp = logp.detach()
    ratio = (logp - old_logp).exp()
    metrics = {
        "entropy": entropy,
        "clip_ratio/low_mean": (ratio < 1 - o.eps) & (batch.adv < 0),
        "clip_ratio/high_mean": (ratio > 1 + o.eps_high) & (batch.adv > 0),
    }
    if batch.ref_logp is not None:  # k3 summed per response; PPO logs sums of k1
        metrics["kl"] = (k3(logp, batch.ref_logp) * batch.mask).sum(1)
    if o.tis:  # the sampler's π differs from π_old in precision, engine or temperature
        metrics["tis_weight"] = (batch.old_logp_or(logp) - batch.logp).exp().clamp(max=o.tis)
        losses = losses * metrics["tis_weight"]
    return losses, metrics


def score_rollout(reward, rollout, o):
    """reward (P, G) -> the advantage A of each response's score, (P·G, 1)"""
    score = reward
    if o.kl == "reward" and rollout.ref_logp is not None:
        k1 = rollout.old_logp_or(rollout.logp) - rollout.ref_logp
        score = reward - o.beta * k1.sum(1).view_as(reward)
    adv = group_advantages(score, norm=o.adv_norm)
    return adv.view(-1, 1).to(rollout.logp)


def token_weight(batch, minibatch, longest, agg):
    """The weight of each token's loss, (B, T), 0 off the response. The weighted sum over a
    minibatch is the average that agg names, however the minibatch is cut into micro-batches."""
    S, mask = len(minibatch), batch.mask.to(batch.logp)
    if agg == "seq_mean":  # 1/S Σ_i 1/|y_i| Σ_t, GRPO
        return mask / (S * batch.length.clamp(min=1))
    if agg == "token_mean":  # 1/Σ_i |y_i| Σ_i Σ_t, DAPO
        return mask / minibatch.length.sum().clamp(min=1)
    if agg == "const":  # 1/S Σ_i 1/L_max Σ_t, Dr. GRPO (arXiv:2503.20783)
        return mask / (S * longest)
    return mask / S  # 1/S Σ_i Σ_t, RLOO (arXiv:2402.14740)


def group_figures(reward):
    """reward: (P, G) -> the figures of a rollout that are logged"""
    equal = (reward == reward[:, :1]).all(1).float().mean()
    spread = reward.std(1).mean()
    return {"reward": reward.mean(), "reward_std": spread, "frac_reward_zero_std": equal}


def main(argv=None):
    o = parse(Options, argv, PRESETS)
    run = Run("grpo", o)
    task = data.task(o.task, o.eval_file, o.strict)
    judge = load_judge(o.reward, run, task)
    policy = run.load(o.init or run.stage("sft"), task)
    ref = run.reference(policy) if o.kl != "none" and o.beta else None
    run.hold(policy=policy, ref=ref, reward=judge.model)

    prompts = run.prompts()
    evaluator = Evaluator(run, task, judge)
    judge.try_out(policy, prompts)
    optimizer = run.adamw(policy)
    on_policy = o.updates == o.minibatches == 1 and not o.tis  # π_old is π_θ

    for _ in run.steps(prompts, optimizer):
        with run.clock("sample"):
            questions = next(prompts)  # P of them
            rollout = run.sample(policy, questions, prompts.longest, o.group, o.temperature)
            reward = judge(questions, rollout).view(-1, o.group)  # (P, G)
        with run.clock("logprobs"):
            rollout.old_logp = None if on_policy else run.logprobs(policy, rollout, o.temperature)
            rollout.ref_logp = run.logprobs(ref, rollout, o.temperature) if ref else None

        rollout.adv = score_rollout(reward, rollout, o)  # (P·G, 1)
        run.log(group_figures(reward) | rollout.summary())

        with run.clock("update"):
            for minibatch in rollout.minibatches(o.updates, o.minibatches, run.generator):
                for batch in run.micro_batches(minibatch):
                    with run.autocast():
                        losses, metrics = compute_loss(policy, batch, o)
                    weight = token_weight(batch, minibatch, prompts.longest, o.agg)
                    run.backward((weight * losses).sum(), tokens=batch.tokens)
                    run.log({"loss": losses}, weight)
                    if ref:
                        run.log({"kl": metrics.pop("kl")}, 1 / len(minibatch))
                    run.log(metrics, token_weight(batch, minibatch, prompts.longest, "token_mean"))
                run.update(optimizer)
        run.evaluate(evaluator, policy)

    run.finish(evaluator, policy)


if __name__ == "__main__":
    training.command(main)

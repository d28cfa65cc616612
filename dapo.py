"""DAPO: Decoupled Clip and Dynamic sAmpling Policy Optimization (arXiv:2503.14476).

    A_i   = (R_i - mean R) / std R                 over the G responses to one prompt: no critic
    ρ_it  = π_θ(y_it | x, y_i<t) / π_old(y_it | x, y_i<t)
    L(θ)  = 1/Σ_i|y_i| Σ_i Σ_t - min(ρ_it A_i, clip(ρ_it, 1-ε_low, 1+ε_high) A_i)

    1. clip-higher        ε_high > ε_low: a rare token may rise further before its gradient stops
    2. dynamic sampling   groups all correct or all wrong teach nothing: others are sampled instead
    3. token-level loss   the mean over all response tokens of the optimizer step
    4. overlong shaping   R_i = ±1 (is it correct?) + R_len: 0 up to L_max - L_c tokens, -1 at L_max
    CISPO     - sg(min(ρ, 1+ε_high)) A log π_θ           --clip weight       arXiv:2506.13585

    paper               code                      shape, or meaning
    G, S                group, len(minibatch)     responses per prompt; per optimizer step
    r, R, A             reward, score, adv        (P, G) of P prompts; A (P·G, 1), one per response
    log π_θ, π_old      logp, old_logp            (B, T) of token t, nats, at --temperature
    ε_low, ε_high       eps, eps_high             how far ρ may fall and rise
    |y|, L_max          length, longest           response tokens, end token included

Models in memory: 1 (policy, trained), no reference; a learned reward adds one.
Data: prompts, and a judge of responses.
Departures: 1. the std of a group is the unbiased one, and 1e-4 is added to it;
2. a round of sampling is as large as the batch; the authors' is three times as large.
At the first optimizer step of a rollout ρ = 1, so nothing is clipped. With its defaults grpo.py has
one step per rollout; --minibatches 4 or --updates 2 turns the clip on. dapo.py has 4 or 8 steps.

    python dapo.py --task arithmetic:2          sums of two digits, reward 1 if right
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


def keep_groups(correct):
    """correct: (P, G) bool. Returns (P,) bool: the groups neither all correct nor all wrong."""
    return correct.any(1) & ~correct.all(1)


def dapo_loss(logp, old_logp, adv, eps_low=0.2, eps_high=0.28, clip=""):
    """DAPO, arXiv:2503.14476; with clip="weight" CISPO. logp, old_logp: (B, T) of tokens, nats.
    adv: (B, 1). Returns (B, T) losses. At logp = old_logp their gradient is that of -A log π."""
    assert logp.shape == old_logp.shape and adv.shape == (len(logp), 1), "(B, T) twice, (B, 1)"
    ratio = (logp - old_logp).exp()
    clipped = ratio.clamp(1 - eps_low, 1 + eps_high)
    losses = -torch.min(ratio * adv, clipped * adv)
    if clip == "weight":  # no token loses its gradient
        losses = -clipped.detach() * adv * logp
    return losses


def overlong_penalty(length, max_len, cache_len):
    """length: tokens, any shape. Returns that shape: 0 up to max_len - cache_len, -1 at max_len."""
    return -((length - (max_len - cache_len)) / cache_len).clamp(0, 1)


@dataclass
class Options(RolloutOptions):
    group: int = opt(8, "G: responses per prompt", low=2)
    adv_norm: str = opt("std", "how A follows from the rewards", choices=ADVANTAGES)
    agg: str = opt("seq_mean", "how the tokens' losses are averaged", choices=AGGREGATIONS)
    clip: str = opt("ratio", "PPO's clip or CISPO's", choices=("ratio", "weight"), clips=True)
    eps: float = opt(0.2, "ε: ρ is clipped to [1 - ε, 1 + ε_high]", low=0, clips=True)
    eps_high: float = opt(0.28, "ε_high of the clip", low=0, clips=True)
    tis: float = opt(None, "C: weight tokens by min(π_old/π_sampler, C) (common: 2)", above=0)
    max_rounds: int = opt(10, "most rounds of sampling to find P mixed groups", low=1)
    overlong: bool = opt(True, "add R_len to the reward")
    overlong_cache: int = opt(0, "L_c, tokens (0: a fifth of L_max)", low=0, only="overlong=True")
    overlong_filter: bool = opt(False, "leave unfinished responses out of the loss")


PRESETS = {  # defaults for any task, for a kind of task, for an option's value; the last match wins
    "any": dict(agg="token_mean", steps=40, batch_size=16, minibatches=8, lr=2e-4, save_every=20),
    "arithmetic": dict(steps=50, batch_size=32, minibatches=4),
    "exact": dict(
        group=64, batch_size=4, steps=1500, lr=3e-4, lr_schedule="linear", overlong=False
    ),
    "clip=weight": dict(eps=1.0, eps_high=4.0),  # no lower bound
}


def compute_loss(policy, batch, o):
    """A micro-batch of B responses -> losses (B, T), and metrics, (B, T) or (B,) per response."""
    logp, entropy = token_logprobs(policy, batch, o.temperature, entropy=True)
    old_logp = batch.old_logp_or(logp)  # first step of a rollout: π_old is π_θ, ρ is 1
    losses = dapo_loss(logp, old_logp, batch.adv, o.eps, o.eps_high, o.clip)

    logp = logp.detach()
    ratio = (logp - old_logp).exp()
    metrics = {
        "entropy": entropy,
        "clip_ratio/low_mean": (ratio < 1 - o.eps) & (batch.adv < 0),
        "clip_ratio/high_mean": (ratio > 1 + o.eps_high) & (batch.adv > 0),
    }
    if o.tis:  # the sampler's π differs from π_old in precision, engine or temperature
        metrics["tis_weight"] = (batch.old_logp_or(logp) - batch.logp).exp().clamp(max=o.tis)
        losses = losses * metrics["tis_weight"]
    return losses, metrics


def score_rollout(reward, rollout, o):
    """reward (P, G) -> the advantage A of each response's score, (P·G, 1)"""
    score = reward
    if o.overlong:  # after the filter, so that lengths make no group mixed
        score = reward + rollout.R_len.view_as(reward)
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


def dynamic_sampling(policy, prompts, judge, run, o):
    """Samples until P groups are mixed. -> (their Rollout, rewards ±1 (P, G), figures to log)"""
    parts, verdicts, keep = [], [], torch.zeros(0)
    while keep.sum() < prompts.batch_size and len(parts) < o.max_rounds:
        questions = next(prompts)  # P of them
        parts.append(run.sample(policy, questions, prompts.longest, o.group, o.temperature))
        verdicts.append(judge.correct(questions, parts[-1]).view(-1, o.group))
        keep = keep_groups(correct := torch.cat(verdicts))
    figures = {"accuracy": correct.float().mean(), "kept_fraction": keep.float().mean()}
    keep &= keep.cumsum(0) <= prompts.batch_size  # the surplus is dropped
    kept = run.kept(parts[0].cat(parts), keep.repeat_interleave(o.group))
    return kept, 2 * correct[keep].to(kept.logp) - 1, figures | {"num_gen_batches": len(parts)}


def main(argv=None):
    o = parse(Options, argv, PRESETS)
    run = Run("dapo", o)
    task = data.task(o.task, o.eval_file, o.strict)
    judge = load_judge(o.reward, run, task)
    policy = run.load(o.init or run.stage("sft"), task)
    run.hold(policy=policy, reward=judge.model)

    prompts = run.prompts()
    cache = o.overlong_cache or max(1, prompts.longest // 5)
    if o.overlong and cache > prompts.longest:
        raise data.UserError(f"--overlong-cache {cache} must be at most L_max = {prompts.longest}")
    evaluator = Evaluator(run, task, judge)
    judge.try_out(policy, prompts)
    optimizer = run.adamw(policy)
    on_policy = o.updates == o.minibatches == 1 and not o.tis  # π_old is π_θ

    for _ in run.steps(prompts, optimizer):
        with run.clock("sample"):
            rollout, reward, figures = dynamic_sampling(policy, prompts, judge, run, o)
        if len(reward) < prompts.batch_size:
            found = f"{len(reward)} of the {prompts.batch_size} mixed groups that a step needs"
            easy = "too easy" if figures["accuracy"] > 0.5 else "too hard"
            run.cut_short(f"--max-rounds {o.max_rounds} found {found}: {easy}, or too few rounds")
            break
        with run.clock("logprobs"):
            rollout.old_logp = None if on_policy else run.logprobs(policy, rollout, o.temperature)

        if o.overlong:
            R_len = rollout.R_len = overlong_penalty(
                rollout.length.to(reward), prompts.longest, cache
            )
            figures |= {"overlong": (R_len < 0).float().mean(), "overlong_reward": R_len.mean()}
        rollout.adv = score_rollout(reward, rollout, o)  # (P·G, 1)
        run.log(group_figures(reward) | rollout.summary())
        run.log(figures)
        if o.overlong_filter:  # responses, even minibatches, may be left without tokens
            rollout.leave_out_unfinished()

        with run.clock("update"):
            for minibatch in rollout.minibatches(o.updates, o.minibatches, run.generator):
                for batch in run.micro_batches(minibatch):
                    with run.autocast():
                        losses, metrics = compute_loss(policy, batch, o)
                    weight = token_weight(batch, minibatch, prompts.longest, o.agg)
                    run.backward((weight * losses).sum(), tokens=batch.tokens)
                    run.log({"loss": losses}, weight)
                    run.log(metrics, token_weight(batch, minibatch, prompts.longest, "token_mean"))
                run.update(optimizer)
        run.evaluate(evaluator, policy)

    run.finish(evaluator, policy)


if __name__ == "__main__":
    training.command(main)

"""PPO: Proximal Policy Optimization (arXiv:1707.06347), as RLHF uses it.

RLHF is that of InstructGPT (arXiv:2203.02155). N+ stands for the details of arXiv:2403.17031.

    r_t   = - β (log π_old(y_t|s_t) - log π_ref(y_t|s_t)),  + r_φ(x, y) at the last token
    δ_t   = r_t + γ V(s_t+1) - V(s_t),   s_t = x, y_<t,   V = 0 after the last token
    A_t   = δ_t + γλ A_t+1,   R_t = A_t + V(s_t);   then A is whitened over the rollout's tokens
    ρ_t   = π_θ(y_t|s_t) / π_old(y_t|s_t)
    L_π   = mean_t max(- A_t ρ_t, - A_t clip(ρ_t, 1-ε, 1+ε))
    L_V   = mean_t ½ max((V_ψ - R_t)², (clip(V_ψ, V-ε_v, V+ε_v) - R_t)²)
    L     = L_π + c_v L_V       K passes over the rollout, each in shuffled minibatches

    paper               code                       shape
    π_θ, π_ref          policy, ref                π_old is `old_logp`, not a model
    V_ψ, V              critic; values, old_values (B, T): of the state before token t
    r_φ                 reward; score              (N,) one per response
    r_t, A, R           rewards, adv, returns      (N, T)
    β, γ, λ             beta, gamma, lam
    ε, ε_v, c_v, K      eps, eps_v, vf_coef, updates

Models in memory: 4 (policy and critic, trained; ref and reward, frozen). The critic starts from the
reward model. With --reward task or FILE.py:function there is no reward model, so there are 3, and
the critic starts from the policy's trunk, with V = 0. Data: prompts, and a judge of responses.
Departures from the papers: 1. the score is given at the end token (N+ gives it one slot later,
which has a value but no action); 2. a response that did not end loses --missing-eos-penalty (N+
replaces its score by -1); 3. there is no pretraining loss (ptx), no entropy bonus, no adaptive β
and no reward whitening; 4. AdamW keeps torch's ε, the gradients of both networks are clipped by
their common norm, and the default learning rates suit toy models.

    python ppo.py                               reviews: sft.py and reward_model.py run if missing
    python ppo.py --beta 0 --steps 150 --eval-every 10       over-optimisation
    python ppo.py --task exact --lam 1          the distance to the known optimum π*
    python ppo.py --task my.jsonl --init out/my/sft.pt --reward my_rewards.py:number
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

import data
import training
from evaluate import Evaluator
from gpt import ScalarGPT, token_logprobs
from packing import last_token
from training import RolloutOptions, Run, opt, parse
from training.checkpoint import load, load_scalar
from training.reward import load_judge


def token_rewards(score, logp, ref_logp, mask, kl_coef):
    """r_t: minus kl_coef times the log-ratio of each token (k1, whose sum over a response is an
    unbiased KL), plus the score at the response's last token. score: (B,). logp, ref_logp, mask:
    (B, T), of the response tokens. Returns (B, T), 0 off the mask."""
    assert score.shape == (len(mask),) and logp.shape == ref_logp.shape == mask.shape, (
        "(B,), (B, T)"
    )
    return -kl_coef * (logp - ref_logp) * mask + score[:, None] * last_token(mask)


def gae(rewards, values, mask, gamma=1.0, lam=0.95):
    """Generalized advantage estimation (arXiv:1506.02438): A_t = δ_t + γλ A_t+1, with
    δ_t = r_t + γ V_t+1 - V_t. rewards, values, mask: (B, T); values[:, t] is the value of the state
    before token t, and the value after a response's last token is 0. Returns two (B, T) tables, 0
    off the mask: adv, and returns = adv + values. If λ = γ = 1, a return is the sum of the rewards
    from token t on."""
    assert rewards.shape == values.shape == mask.shape and mask.dtype == torch.bool, "(B, T) thrice"
    values = values * mask
    delta = (rewards + gamma * F.pad(values, (0, 1))[:, 1:] - values) * mask
    adv, ahead = torch.zeros_like(delta), 0.0
    for t in reversed(range(mask.size(1))):
        adv[:, t] = ahead = delta[:, t] + gamma * lam * ahead
    adv = adv * mask
    return adv, adv + values


def whiten(x, mask):
    """(x - mean) / √(var + 1e-8), with the mean and the biased variance of the entries that `mask`
    marks. x, mask: (B, T). Returns (B, T), 0 off the mask."""
    n = mask.sum()
    x = (x - (x * mask).sum() / n) * mask
    return x * ((x**2).sum() / n + 1e-8).rsqrt()


def explained_variance(adv, returns, mask):
    """1 - Var(R - V) / Var(R) over the entries that `mask` marks: 1 for a critic that knows the
    returns, 0 for one no better than their mean. adv is R - V. All are (B, T); returns a scalar."""
    unexplained, variance = (x[mask].var(correction=0) for x in (adv, returns))
    return 1 - unexplained / (variance + 1e-5)  # no division by 0 if all returns are equal


def ppo_loss(logp, old_logp, adv, eps=0.2):
    """The clipped policy loss, arXiv:1707.06347. logp, old_logp, adv: (B, T), log-probs in nats.
    Returns (B, T) losses, to be averaged over all response tokens of the minibatch. At
    logp = old_logp the ratio is 1, and the gradient is that of -A log π."""
    assert logp.shape == old_logp.shape == adv.shape, "three (B, T) tensors"
    ratio = (logp - old_logp).exp()
    return torch.max(-adv * ratio, -adv * ratio.clamp(1 - eps, 1 + eps))


def value_loss(values, old_values, returns, eps_v=0.2):
    """Half of the larger of two squared errors: that of V, and that of V clipped to within eps_v of
    the old value. values, old_values, returns: (B, T), in units of the reward. Returns (B, T)
    losses, to be averaged like those of the policy."""
    assert values.shape == old_values.shape == returns.shape, "three (B, T) tensors"
    clipped = old_values + (values - old_values).clamp(-eps_v, eps_v)
    return 0.5 * torch.max((values - returns) ** 2, (clipped - returns) ** 2)


@dataclass
class Options(RolloutOptions):
    missing_eos_penalty: float = opt(
        3.0, "what a score loses if the response did not end", low=0, only="reward=rm|*.pt"
    )
    beta: float = opt(0.05, "β: KL penalty per token, in the reward (InstructGPT: 0.02)", low=0)
    gamma: float = opt(1.0, "γ: discount per token", low=0, high=1)
    lam: float = opt(0.95, "λ of GAE: 0 trusts the critic alone, 1 the rewards", low=0, high=1)
    eps: float = opt(0.2, "ε: ρ is clipped to [1 - ε, 1 + ε]", low=0, clips=True)
    eps_v: float = opt(0.2, "ε_v: a value is clipped to within ε_v of the old one", low=0)
    vf_coef: float = opt(0.1, "c_v: weight of the value loss", low=0)


ROLLOUT = dict(reward="rm", group=1, updates=2, minibatches=4, batch_size=128)
LEARNING = dict(steps=60, lr=2e-4, lr_schedule="linear", warmup=10, save_every=20)

PRESETS = {  # defaults for any task, for a kind of task, for an option's value; the last match wins
    "any": ROLLOUT | LEARNING,
    "arithmetic": dict(reward="task", steps=100, batch_size=256),
    "exact": dict(
        reward="task",
        beta=0.5,
        group=64,
        batch_size=4,
        steps=300,
        lr=5e-4,
        missing_eos_penalty=0.0,  # a missing end costs nothing there
    ),
    "file": dict(reward="task"),
}


def compute_loss(policy, critic, batch, o):
    """A micro-batch of B responses -> (losses, metrics), each (B, T): one entry per token."""
    logp, entropy = token_logprobs(policy, batch, o.temperature, entropy=True)
    values = critic.values_before(batch.ids, batch.mask, batch.packed)
    old_logp = batch.old_logp_or(logp)  # first step of a rollout: π_old is π_θ, ρ is 1
    policy_losses = ppo_loss(logp, old_logp, batch.adv, o.eps)
    value_losses = value_loss(values, batch.old_values, batch.returns, o.eps_v)
    losses = policy_losses + o.vf_coef * value_losses

    with torch.no_grad():
        log_ratio = logp - old_logp
        unclipped = -batch.adv * log_ratio.exp()
        moved = (values - batch.old_values).abs() > o.eps_v
        error = 0.5 * (values - batch.returns) ** 2
    return losses, {
        "loss/policy_avg": policy_losses.detach(),
        "loss/value_avg": value_losses.detach(),
        "entropy": entropy,
        "policy/approxkl_avg": 0.5 * log_ratio**2,
        "policy/clipfrac_avg": policy_losses > unclipped,
        "val/clipfrac_avg": moved & (value_losses > error),
    }


def new_critic(judge, run):
    """-> a copy of the reward model, to be trained further. If there is none, or if its vocabulary
    or its context does not fit, -> the policy's trunk with a head of zeros, so that V = 0 at first
    """
    same_vocabulary = judge.model and judge.reads_tokens
    if same_vocabulary and judge.model.config.block_size >= run.block_size:
        return run.prepare(load_scalar(judge.path, mapped=True)[0])
    trunk, _, _ = load(run.start, mapped=True)
    critic = ScalarGPT(trunk.config, trunk=trunk)
    torch.nn.init.zeros_(critic.head.weight)
    return run.prepare(critic)


def main(argv=None):
    o = parse(Options, argv, PRESETS)
    run = Run("ppo", o)
    task = data.task(o.task, o.eval_file, o.strict)
    judge = load_judge(o.reward, run, task, o.missing_eos_penalty)
    policy = run.load(o.init or run.stage("sft"), task)
    critic = new_critic(judge, run)
    ref = run.reference(policy)
    run.hold(policy=policy, critic=critic, ref=ref, reward=judge.model)

    prompts = run.prompts()
    evaluator = Evaluator(run, task, judge)
    judge.try_out(policy, prompts)
    optimizer = run.adamw(policy, critic)

    for _ in run.steps(prompts, optimizer):
        with run.clock("sample"):
            questions = next(prompts)
            rollout = run.sample(policy, questions, prompts.longest, o.group, o.temperature)
            score = judge.reward(questions, rollout)  # (N,)
        with run.clock("logprobs"):
            rollout.old_logp = run.logprobs(policy, rollout, o.temperature)  # (N, T)
            ref_logp = run.logprobs(ref, rollout, o.temperature)
            rollout.old_values = run.values(critic, rollout)

        mask = rollout.mask
        rewards = token_rewards(score.to(ref_logp), rollout.old_logp, ref_logp, mask, o.beta)
        adv, rollout.returns = gae(rewards, rollout.old_values, mask, o.gamma, o.lam)
        rollout.adv = whiten(adv, mask)
        run.log({"reward": score.mean(), "rlhf_reward": rewards.sum(1).mean()})
        run.log({"kl": (rollout.old_logp - ref_logp).sum(1).mean()})
        run.log({"explained_variance": explained_variance(adv, rollout.returns, mask)})
        run.log(rollout.summary())

        with run.clock("update"):
            for minibatch in rollout.minibatches(o.updates, o.minibatches, run.generator):
                for batch in run.micro_batches(minibatch):
                    with run.autocast():
                        losses, metrics = compute_loss(policy, critic, batch, o)
                    weight = batch.mask.to(losses) / minibatch.length.sum()  # a mean over tokens
                    run.backward((weight * losses).sum(), tokens=batch.tokens)
                    run.log(metrics | {"loss": losses}, weight)
                run.update(optimizer)
        run.evaluate(evaluator, policy)

    run.finish(evaluator, policy)


if __name__ == "__main__":
    training.command(main)

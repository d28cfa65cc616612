"""PPO: Proximal Policy Optimization (arXiv:1707.06347) as RLHF uses it (InstructGPT, arXiv:2203.02155; the N+ details, arXiv:2403.17031).

    r_t   = - β (log π_old(y_t|s_t) - log π_ref(y_t|s_t)),  + r_φ(x, y) at the last token          s_t = x, y_<t
    δ_t   = r_t + γ V(s_t+1) - V(s_t),  V = 0 after the last token
    A_t   = δ_t + γλ A_t+1,   R_t = A_t + V(s_t);   then A is whitened over all tokens of the rollout (N+)
    ρ_t   = π_θ(y_t|s_t) / π_old(y_t|s_t)
    L_π   = mean_t max(- A_t ρ_t, - A_t clip(ρ_t, 1-ε, 1+ε))
    L_V   = mean_t ½ max((V_ψ - R_t)², (clip(V_ψ, V-ε_v, V+ε_v) - R_t)²)                                          (N+)
    L     = L_π + c_v L_V                          K passes over the rollout, each in shuffled minibatches; means over their tokens

    paper               code                       shape
    π_θ, π_ref          policy, ref                π_old is `old_logp`, not a model
    V_ψ, V              critic; values, old_values (B, T-1) at the token before y_t: what the rest of the response will earn
    r_φ                 reward                     (B,) `score`; of a response that did not end --missing-end-score
    r_t, A, R           rewards, adv, returns      (B, T-1)
    β, γ, λ             beta, gamma, lam
    ε, ε_v, c_v, K      eps, eps_v, vf_coef, updates

Models in memory: 4 (policy and critic, trained; reference and reward model, frozen). The critic starts from the reward model. With
--reward task or FILE.py:function 3, and the critic starts from the policy's trunk, with V = 0. Data: prompts, and what judges a response.
Departures from the papers: 1. the score stands at the end token (N+: one slot later, which has a value and no policy); 2. a response
that did not end scores the reward model's first percentile over the start's own (N+: -1); 3. no pretraining loss (ptx), entropy bonus,
adaptive β or reward whitening; 4. AdamW at its own ε, gradients of both networks clipped together, a learning rate for toy models.

    python ppo.py                                              reviews: sft.py and reward_model.py run first where they have not
    python ppo.py --beta 0 --steps 150 --eval-every 10         score and gold reward side by side: over-optimisation
    python ppo.py --task exact --lam 1                         the distance to the known optimum π*
    python ppo.py --task arithmetic:2                          three models
    python ppo.py --task my.jsonl.gz --init out/my/sft.pt --reward my_rewards.py:number

It ends with the reward before and after, the win rate against the reference, KL(π‖π_ref), and two samples of each.
"""
import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import common
import data
import memory
from common import Count, NonNegative, Number, Positive, Share, Whole
from evaluate import ROWS, Reward, choose_yardstick, context, describe, open_checkpoint, open_reward_model, report
from gpt import CheckpointError, ScalarGPT, sample, save


def token_rewards(score, logp, ref_logp, mask, kl_coef):
    """r_t: minus kl_coef times the log-ratio on each token (k1, whose sum over a response is an unbiased KL), plus the score at the
    response's last. score: (B,). logp, ref_logp, mask: (B, T), of the response tokens. Returns (B, T), 0 off the mask."""
    assert score.shape == (len(mask),) and logp.shape == ref_logp.shape == mask.shape, "a (B,) and three (B, T) tensors"
    last = mask & (mask.cumsum(1) == mask.sum(1, keepdim=True))
    return -kl_coef * (logp - ref_logp) * mask + score[:, None] * last


def gae(rewards, values, mask, gamma=1.0, lam=0.95):
    """Generalized advantage estimation (arXiv:1506.02438): A_t = Σ_{s≥t} (γλ)^(s-t) δ_s, δ_t = r_t + γ V_t+1 - V_t. rewards, values,
    mask: (B, T); values[:, t] is that of the state before token t, and past a response's last token 0. Returns adv and returns =
    adv + values, (B, T) each, 0 off the mask. At λ = 1 and γ = 1 the returns are the sums of the rewards to come."""
    assert rewards.shape == values.shape == mask.shape and mask.dtype == torch.bool, "three (B, T) tensors, a bool mask"
    values = values * mask
    delta = (rewards + gamma * F.pad(values, (0, 1))[:, 1:] - values) * mask
    t = torch.arange(mask.size(1), device=mask.device)
    decay = ((gamma * lam) ** (t[:, None] - t).clamp(min=0).to(delta.dtype)).tril()  # (s, t): (γλ)^(s-t), 0 where s < t
    adv = delta @ decay * mask
    return adv, adv + values


def whiten(x, mask):
    """x less its mean, over its standard deviation (biased, √(var + 1e-8)), both of the entries that `mask` marks. x, mask: (B, T).
    Returns (B, T), 0 off the mask."""
    n = mask.sum()
    x = (x - (x * mask).sum() / n) * mask
    return x * ((x**2).sum() / n + 1e-8).rsqrt()


def ppo_loss(logp, old_logp, adv, eps=0.2):
    """The clipped policy loss, arXiv:1707.06347. logp, old_logp, adv: (B, T), log-probs in nats. Returns (B, T) losses, to be averaged
    over all response tokens of the minibatch. At logp = old_logp the ratio is 1, and the gradient that of -A log π."""
    assert logp.shape == old_logp.shape == adv.shape, "three (B, T) tensors"
    ratio = (logp - old_logp).exp()
    return torch.max(-adv * ratio, -adv * ratio.clamp(1 - eps, 1 + eps))


def value_loss(values, old_values, returns, eps_v=0.2):
    """½ of the larger squared error of V and of V kept within eps_v of the old value. values, old_values, returns: (B, T), in units of
    the reward. Returns (B, T) losses, to be averaged as the policy's."""
    assert values.shape == old_values.shape == returns.shape, "three (B, T) tensors"
    clipped = old_values + (values - old_values).clamp(-eps_v, eps_v)
    return 0.5 * torch.max((values - returns) ** 2, (clipped - returns) ** 2)


@dataclass
class Options(common.Options):
    reward: str = "rm"  # what judges a response: rm (a reward model), task, or FILE.py:function
    reward_model: str = ""  # checkpoint for --reward rm (default: out/<task>/reward_model.pt, made first where it is missing)
    missing_end_score: Number = None  # of a response that does not end, --reward rm (default: first percentile of --init's own)
    group: Count = 1  # responses to a prompt; a baseline from the critic needs no second
    beta: NonNegative = 0.05  # β: KL penalty a token, in the reward (InstructGPT: 0.02, N+: 0.05)
    gamma: Share = 1.0  # γ: discount a token
    lam: Share = 0.95  # λ of GAE: 1 does not trust the critic, 0 trusts it after one token
    eps: NonNegative = 0.2  # ε: the ratio is clipped to [1 - ε, 1 + ε]
    eps_v: NonNegative = 0.2  # ε_v: a value is clipped to within ε_v of the old one, in units of the reward
    vf_coef: NonNegative = 0.1  # c_v: weight of the value loss
    temperature: Positive = 1.0  # of the samples and of the log-probs that are trained, those of softmax(logits / temperature)
    updates: Count = 2  # K: passes over a rollout (InstructGPT: 1, N+: 4)
    minibatches: Count = 4  # optimizer steps a pass, over shuffled responses
    steps: Count = 60  # rollouts (default: %(default)s; of a file: one pass over its prompts)
    epochs: Whole = 0  # passes over the training prompts, in place of --steps
    batch_size: Count = 128  # prompts a rollout
    micro_batch: Whole = 0  # responses a forward pass: less memory, the same gradient (0: all of an optimizer step's)
    lr: Positive = 2e-4  # AdamW learning rate of both networks at its peak; large models take 1e-6 to 1e-5
    lr_schedule: common.Schedule = "linear"  # after the warmup: stay, fall to 0, or fall to a tenth
    warmup: Whole = 10  # rollouts over which the learning rate rises from 0
    save_every: Count = 20  # rollouts between saved states
    on_arithmetic = dict(reward="task", steps=100, batch_size=256)
    on_exact = dict(reward="task", beta=0.5, group=64, batch_size=4, steps=300, lr=5e-4)
    on_predict = dict(batch_size=4, minibatches=1, updates=1)
    on_file = dict(reward="task")


def rollout(policy, prompts, tokenizer, longest, o, run):
    """-> P prompts, rows (ids, prompt, columns), and the Samples of the responses to each"""
    batch = next(prompts)
    with run.autocast():
        s = sample(policy, [ids for ids, *_ in batch], longest, tokenizer.end_id, o.temperature, prompts.generator, o.group)
    prompts.sampled += int(s.mask.sum())
    return batch, s


def first_percentile(reward, policy, prompts, tokenizer, longest, o, run):
    """-> the score below which lies a hundredth of the policy's own responses to up to 512 prompts, those that end, if any does; and how
    that was found, as text"""
    scores, finished, generator = [], [], torch.Generator().manual_seed(o.seed)
    chosen = [row for i in range(min(prompts.per_epoch, -(-512 // prompts.batch_size))) for row in prompts[i]][:512]
    for i in range(0, len(chosen), ROWS):
        rows = chosen[i : i + ROWS]
        with run.autocast():
            s = sample(policy, [ids for ids, *_ in rows], longest, tokenizer.end_id, o.temperature, generator)
        scores, finished = [*scores, reward(rows, s)], [*finished, s.finished]
    scores, finished = torch.cat(scores).float(), torch.cat(finished)
    n, few = int(finished.sum()), "; that is few, --missing-end-score names another" if finished.sum() < len(finished) / 2 else ""
    how = f"the first percentile of the reward model over the policy's own, of which {n} of {len(finished)} end{few}"
    return float((scores[finished] if n else scores).quantile(0.01)), how


@common.command(CheckpointError, data.DataError)
def main(argv=None):
    o = common.parse(Options, argv)
    common.refuse_unread(o, "reward", {"rm": {"reward_model", "missing_end_score"}})
    if common.is_exact(o.task) and "missing_end_score" in o.given:
        raise common.UserError(f"--missing-end-score: a missing end costs nothing on {o.task}; leave it out")
    task = data.task(o.task, o.eval_file, o.strict)
    run = common.Run(o, "ppo")
    reward = Reward(run, task, o.reward)
    init = o.init or common.stage("sft.py", o)
    policy, tokenizer, meta = open_checkpoint(init, o, task)
    run.say(f"the policy starts from {init}: {describe(meta)}")
    task.template, block_size = meta["template"], context(o, policy)
    if o.reward == "rm":
        o.reward_model = o.reward_model or common.stage("reward_model.py", o, "--reward-model")
        critic, _ = open_reward_model(o.reward_model, tokenizer, block_size, o, task)
    else:
        critic = ScalarGPT(policy.config, trunk=copy.deepcopy(policy))
        torch.nn.init.zeros_(critic.head.weight)  # V = 0 until it has learned
    reward, aim = reward.open(tokenizer, o.reward_model, block_size), (run.method, vars(o))
    yardstick = choose_yardstick(run, task, tokenizer, block_size, o.max_new_tokens, o.truncate, "none", aim=aim, reward=reward)
    longest = yardstick.max_new_tokens
    prompts = data.Prompts(task, o.batch_size, o.seed, tokenizer, block_size - longest, o.truncate)
    for note in filter(None, [*task.notes, prompts.note, *yardstick.notes]):
        run.say(note)

    policy, critic = run.prepare(policy), run.prepare(critic)
    policy.checkpoint_activations = critic.trunk.checkpoint_activations = o.checkpoint_activations
    reward.probe(policy, prompts.rows[:4], longest)
    if o.reward == "rm" and not (common.is_exact(o.task) or o.predict):
        reward.unended, how = o.missing_end_score, "--missing-end-score"
        if reward.unended is None:
            reward.unended, how = first_percentile(reward, policy, prompts, tokenizer, longest, o, run)
        run.say(f"a response that does not end scores {reward.unended:.2f} ({how})")
    ref, pair = run.frozen(policy), torch.nn.ModuleDict({"policy": policy, "critic": critic})
    held = memory.Ledger(policy=policy, critic=critic, ref=ref, reward=reward.model)
    optimizer = common.adamw(pair, o)
    run.begin(held, prompts, policy=policy, critic=critic, optimizer=optimizer, reward=reward, prompts=prompts)

    for step in run.steps():
        with run.clock("sample"):
            batch, s = rollout(policy, prompts, tokenizer, longest, o, run)
            score = reward(batch, s)  # (B,)
        with run.clock("logprobs"):
            old_logp = run.whole(s, lambda ids, mask: policy.logprobs(ids, mask, o.temperature))  # (B, T-1)
            ref_logp = run.whole(s, lambda ids, mask: ref.logprobs(ids, mask, o.temperature))
            old_values = run.whole(s, lambda ids, mask: critic.values(ids[:, :-1]))
        mask = s.mask[:, 1:]
        rewards = token_rewards(score, old_logp, ref_logp, mask, o.beta)
        adv, returns = gae(rewards, old_values, mask, o.gamma, o.lam)
        explained = 1 - adv[mask].var(correction=0) / (returns[mask].var(correction=0) + 1e-5)  # 1 - Var(R - V) / Var(R)
        adv = whiten(adv, mask)
        run.tokens += int(s.stop.sum())

        with run.clock("update"):
            parts = prompts.minibatches(len(s.ids), o.updates, o.minibatches)
            k = len(parts)  # optimizer steps on this rollout
            for i, index in enumerate(parts):
                tokens = run.total(mask[index].sum())
                for rows in run.micro_batches(index):
                    ids, m, *_ = s.take(rows)
                    with run.autocast():
                        logp, entropy = policy.logprobs(ids, m, o.temperature, entropy=True)  # (B, T-1)
                        values = critic.values(ids[:, :-1])
                    m, A, R, old, V = (x[rows, : logp.size(1)] for x in (mask, adv, returns, old_logp, old_values))
                    old = logp.detach() if i == 0 else old  # π_θ is π_old until the first step: ρ is 1 to the bit
                    losses, errors = ppo_loss(logp, old, A, o.eps), value_loss(values, V, R, o.eps_v)
                    policy_loss, critic_loss = (m * losses).sum() / tokens, (m * errors).sum() / tokens
                    loss = policy_loss + o.vf_coef * critic_loss
                    loss.backward()

                    with torch.no_grad():
                        x = logp - old
                        clipped = m & (losses > -A * x.exp())
                        held_back = m & ((values - V).abs() > o.eps_v) & (errors > 0.5 * (values - R) ** 2)
                    sums = {"entropy": entropy, "policy/approxkl_avg": 0.5 * m * x**2, "policy/clipfrac_avg": clipped,
                            "val/clipfrac_avg": held_back}  # fmt: skip
                    run.add({"loss": loss / k, "loss/policy_avg": policy_loss / k, "loss/value_avg": critic_loss / k})
                    run.add({name: x.sum() / tokens / k for name, x in sums.items()})
                run.update(step, pair, optimizer, share=1 / k)
        length = mask.sum(1).float()
        run.add({"reward": score.mean(), "kl": (old_logp - ref_logp).sum(1).mean(), "rlhf_reward": rewards.sum(1).mean(),
                 "explained_variance": explained, "completions/mean_length": length.mean(),
                 "completions/clipped_ratio": 1 - s.finished.float().mean(), "sampled_tokens": prompts.sampled})  # fmt: skip
        if o.eval_every and (step + 1) % o.eval_every == 0:
            run.evaluated(step, yardstick.measure(policy, ref, n=128)[0])

    final, samples = yardstick.measure(policy, ref)
    save(policy, o.out, **run.facts(), tokenizer=tokenizer.meta, template=task.template, reference=init, implicit=yardstick.implicit,
         max_new_tokens=longest, unended=reward.unended, reward=final.get("reward"))  # fmt: skip
    report(f"{run.method} on {o.task}", final, samples, reward.bound)
    forward = {"policy": 2 + o.updates, "critic": 1 + o.updates, "ref": 1, "reward": 1}  # sampling, log-probs and values of π_old, training
    final |= {"sampled_tokens": prompts.sampled} | ({} if reward.unended is None else {"missing_end_score": reward.unended})
    run.finish(final, forward, backward={"policy": o.updates, "critic": o.updates})


if __name__ == "__main__":
    main()

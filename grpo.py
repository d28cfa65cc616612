"""GRPO: Group Relative Policy Optimization (DeepSeekMath, arXiv:2402.03300; DeepSeek-R1, arXiv:2501.12948), and its relatives.

    A_i   = (r_i - mean r) / std r                          over the G responses to one prompt; no critic
    ρ_it  = π_θ(y_it | x, y_i<t) / π_old(y_it | x, y_i<t)
    k3_it = π_ref/π_θ - log(π_ref/π_θ) - 1                  of the same token
    L(θ)  = 1/S Σ_i 1/|y_i| Σ_t [ - min(ρ_it A_i, clip(ρ_it, 1-ε, 1+ε) A_i) + β k3_it ]

    Dr. GRPO (arXiv:2503.20783)   A_i = r_i - mean r;  1/S Σ_i 1/L_max Σ_t            --adv-norm none --agg const --kl none
    RLOO (arXiv:2402.14740)       A_i = R_i - mean of the other R,                    --adv-norm loo --agg const --kl reward
                                  R_i = r_i - β Σ_t log π_old/π_ref
    GSPO (arXiv:2507.18071)       ρ_it = (π_θ(y_i|x) / π_old(y_i|x))^(1/|y_i|)          --ratio seq --kl none --minibatches 4

By default a rollout is one optimizer step: then π_θ is π_old, every ρ is 1, and nothing is clipped. With --updates or --minibatches
above 1 the log-probs of π_old are kept.

    paper               code                         shape
    G                   group                        responses to each of P prompts
    S                   n                            responses in an optimizer step
    r, R, A             r, R, adv                    (P, G); R is r, or r less the KL; A (B, 1), the same on every token of a response
    log π_θ, π_old      logp, old_logp               (B, T-1) a token, nats, at the sampling temperature
    log π_ref           ref_logp                     (B, T-1)
    |y|, L_max          length, longest              tokens of a response, end token included; --max-new-tokens
    β, ε, μ             beta, eps, updates

Models in memory: 2 (the policy, trained; the reference, frozen), 1 with --kl none; --reward rm adds a reward model. Data: prompts,
and what judges a response. Departures from the paper: 1. one reward a response (outcome supervision); 2. std is the unbiased
one, + 1e-4; 3. the reference stays, the reward model is not trained again; 4. a learning rate for toy models.

    python grpo.py --task arithmetic:2                         makes out/arithmetic-2/sft.pt first where it is missing
    python grpo.py --task arithmetic:2 --updates 2 --minibatches 4
    python grpo.py --task exact --adv-norm loo --agg const --kl reward            RLOO: the distance to the known optimum π*
    python grpo.py --reward rm                                 reviews, by the score of out/reviews/reward_model.pt
    python grpo.py --task my.jsonl.gz --init out/my/sft.pt --reward my_rewards.py:number

It ends with the reward before and after, the win rate against the reference, KL(π‖π_ref), and two samples of each.
"""
from dataclasses import dataclass
from typing import Literal

import torch

import common
import data
import memory
from common import Count, NonNegative, Positive, Whole
from evaluate import Reward, choose_yardstick, context, describe, open_checkpoint, reopen, report
from gpt import CheckpointError, sample, save


def group_advantages(reward, eps=1e-4, norm="std"):
    """Group-relative advantages (arXiv:2402.03300). reward: (P, G), G > 1 responses to each of P prompts. norm: "std", (r - mean) /
    (std + eps) with the unbiased std; "none", r - mean (Dr. GRPO); "loo", r - the mean of the others (RLOO), which is G/(G-1) times
    that. Returns (P, G), without gradient; each row sums to 0, and equal rewards give exactly 0."""
    assert reward.dim() == 2 and reward.size(1) > 1, "a (P, G) tensor, G > 1"
    reward = reward.detach() - reward.detach()[:, :1]  # so that equal rewards are 0, not a rounding error over eps
    adv, G = reward - reward.mean(1, keepdim=True), reward.size(1)
    return {"std": adv / (reward.std(1, keepdim=True) + eps), "none": adv, "loo": adv * G / (G - 1)}[norm]


def k3(logp, ref_logp):
    """π_ref/π - log(π_ref/π) - 1 ≥ 0, whose mean over samples from π is KL(π‖π_ref), and whose mean gradient is that of KL(π_ref‖π).
    logp, ref_logp: (B, T), nats. Returns (B, T). The log-ratio is clamped to ±20."""
    x = (ref_logp - logp).clamp(-20, 20)
    return x.exp() - x - 1


def grpo_loss(logp, old_logp, ref_logp, adv, eps=0.2, beta=0.04, eps_high=None, kl="k3"):
    """GRPO, arXiv:2402.03300. logp, old_logp, ref_logp: (B, T) token log-probs in nats; ref_logp may be None where beta = 0. adv: (B, 1).
    The ratio is clipped to [1 - eps, 1 + eps_high], by default 1 + eps. kl: "k3", or "k3-ratio" for ρ k3, whose mean gradient is that of
    KL(π‖π_ref) of each token. Returns (B, T) losses, to be averaged over response tokens. At logp = old_logp the ratio is 1, and
    without KL the gradient that of -A log π."""
    assert logp.shape == old_logp.shape and adv.shape == (len(logp), 1), "two (B, T) tensors and a (B, 1)"
    ratio = (logp - old_logp).exp()
    loss = -torch.min(ratio * adv, ratio.clamp(1 - eps, 1 + (eps if eps_high is None else eps_high)) * adv)
    return loss + beta * k3(logp, ref_logp) * (ratio if kl == "k3-ratio" else 1) if beta else loss


def sequence_old_logp(logp, old_logp, mask):
    """GSPO (arXiv:2507.18071), as its token form: the old log-probs that give every token of a response the ratio (π/π_old)^(1/|y|) of
    the response, with the gradient of its own log-prob. logp, old_logp, mask: (B, T). Returns (B, T), without gradient."""
    mean = ((logp - old_logp) * mask).sum(1, keepdim=True) / mask.sum(1, keepdim=True)
    return (logp - mean).detach()


@dataclass
class Options(common.Options):
    reward: str = "task"  # what judges a response: task, rm (a reward model), or FILE.py:function (default: task)
    reward_model: str = ""  # checkpoint for --reward rm (default: out/<task>/reward_model.pt, made first where it is missing)
    group: Count = 8  # G: responses to a prompt (DeepSeekMath: 64)
    adv_norm: Literal["std", "none", "loo"] = "std"  # A: (r - mean)/std, r - mean (Dr. GRPO), or r - mean of the others (RLOO)
    agg: Literal["seq_mean", "token_mean", "const"] = "seq_mean"  # 1/S Σ 1/|y| Σ_t, 1/Σ|y| Σ Σ_t (DAPO), or 1/S Σ 1/L_max Σ_t (Dr. GRPO)
    ratio: Literal["token", "seq"] = "token"  # ρ: π_θ/π_old of a token, or of a response to the power 1/|y| (GSPO)
    eps: NonNegative = 0.2  # ε: the ratio is clipped to [1 - ε, 1 + ε_high] (default: 0.2; of --ratio seq: 3e-4)
    eps_high: NonNegative = 0.2  # ε_high (default: ε; of --ratio seq without --eps: 4e-4)
    kl: Literal["k3", "k3-ratio", "reward", "none"] = "k3"  # in the loss β k3 or β ρ k3, in the reward -β Σ_t log π_old/π_ref, or none
    beta: NonNegative = 0.04  # β: strength of the KL penalty; 0 is --kl none
    temperature: Positive = 1.0  # of the samples and of the log-probs that are trained, those of softmax(logits / temperature)
    updates: Count = 1  # μ: passes over a rollout
    minibatches: Count = 1  # optimizer steps a pass, over shuffled responses
    steps: Count = 100  # rollouts (default: %(default)s; of a file: one pass over its prompts)
    epochs: Whole = 0  # passes over the training prompts, in place of --steps
    batch_size: Count = 16  # P: prompts a rollout
    micro_batch: Whole = 0  # responses a forward pass: less memory, the same gradient (0: all of an optimizer step's)
    lr: Positive = 2e-4  # AdamW learning rate at its peak; large models take 1e-6 to 3e-6
    warmup: Whole = 20  # rollouts over which the learning rate rises from 0
    save_every: Count = 20  # rollouts between saved states
    on_arithmetic = dict(steps=200, batch_size=32)
    on_exact = dict(beta=0.5, group=64, batch_size=4, steps=1500, lr=3e-4, lr_schedule="linear")
    on_predict = dict(batch_size=1, group=4)


def rollout(policy, prompts, tokenizer, longest, o, run):
    """-> P prompts, rows (ids, prompt, columns), and the Samples of G responses to each"""
    batch = next(prompts)
    with run.autocast():
        s = sample(policy, [ids for ids, *_ in batch], longest, tokenizer.end_id, o.temperature, prompts.generator, o.group)
    prompts.sampled += int(s.mask.sum())
    return batch, s


@common.command(CheckpointError, data.DataError)
def main(argv=None):
    o = common.parse(Options, argv)
    common.refuse_unread(o, "kl", {"k3": {"beta"}, "k3-ratio": {"beta"}, "reward": {"beta"}})
    if o.group == 1:
        raise common.UserError("--group 1: a response is compared with the others to the same prompt; give at least 2")
    if o.ratio == "seq" and "eps" not in o.given:
        o.eps, o.eps_high = 3e-4, o.eps_high if "eps_high" in o.given else 4e-4
    elif "eps_high" not in o.given:
        o.eps_high = o.eps
    o.kl = o.kl if o.beta else "none"
    common.refuse_unread(o, "reward", {"rm": {"reward_model"}})
    task = data.task(o.task, o.eval_file, o.strict)
    run = common.Run(o, "grpo")
    reward = Reward(run, task, o.reward)
    init = o.init or common.stage("sft.py", o)
    policy, tokenizer, meta = open_checkpoint(init, o, task)
    run.say(f"the policy starts from {init}: {describe(meta)}")
    task.template, block_size = meta["template"], context(o, policy)
    if o.reward == "rm":
        o.reward_model = o.reward_model or common.stage("reward_model.py", o, "--reward-model")
    reward, aim = reward.open(tokenizer, o.reward_model, block_size), (run.method, vars(o))
    yardstick = choose_yardstick(run, task, tokenizer, block_size, o.max_new_tokens, o.truncate, "none", aim=aim, reward=reward)
    longest = yardstick.max_new_tokens
    prompts = data.Prompts(task, o.batch_size, o.seed, tokenizer, block_size - longest, o.truncate)
    for note in filter(None, [*task.notes, prompts.note, *yardstick.notes]):
        run.say(note)

    policy = run.prepare(policy)
    policy.checkpoint_activations = o.checkpoint_activations
    reward.probe(policy, prompts.rows[:4], longest)
    ref = run.frozen(policy) if o.kl != "none" else None
    held = memory.Ledger(policy=policy, ref=ref, reward=reward.model)
    optimizer = common.adamw(policy, o)
    beta = o.beta if o.kl in ("k3", "k3-ratio") else 0.0  # of the term in the loss
    if o.updates == o.minibatches == 1 and o.given & {"ratio", "eps", "eps_high"}:
        run.say("one optimizer step a rollout: ρ is 1, and --ratio and --eps change nothing; --minibatches 4 gives them something to clip")
    run.begin(held, prompts, policy=policy, optimizer=optimizer, prompts=prompts)

    for step in run.steps():
        with run.clock("sample"):
            batch, s = rollout(policy, prompts, tokenizer, longest, o, run)
            r = reward(batch, s).view(-1, o.group)  # (P, G)
        parts = prompts.minibatches(len(s.ids), o.updates, o.minibatches)
        k, length = len(parts), s.mask.sum(1, keepdim=True)  # k optimizer steps on this rollout; (P·G, 1)
        with run.clock("logprobs"):
            old_logp = run.whole(s, lambda ids, mask: policy.logprobs(ids, mask, o.temperature)) if k > 1 else None
            ref_logp = run.whole(s, lambda ids, mask: ref.logprobs(ids, mask, o.temperature)) if ref else None
        R = r - o.beta * (s.logp - ref_logp).sum(1).view_as(r) if o.kl == "reward" else r
        adv = group_advantages(R, norm=o.adv_norm).view(-1, 1)  # (P·G, 1)
        run.tokens += int(s.stop.sum())

        with run.clock("update"):
            for i, index in enumerate(parts):
                n, tokens = run.total(len(index)), run.total(s.mask[index].sum().clamp(min=1))
                for rows in run.micro_batches(index):
                    ids, mask, *_ = s.take(rows)
                    with run.autocast():
                        logp, entropy = policy.logprobs(ids, mask, o.temperature, entropy=True)  # (B, T-1)
                    mask, A, T = mask[:, 1:], adv[rows], logp.size(1)
                    old = logp.detach() if i == 0 else old_logp[rows, :T]  # at the first step of a rollout π_θ is π_old
                    old = sequence_old_logp(logp, old, mask) if o.ratio == "seq" else old
                    ref_ = ref_logp[rows, :T] if ref else None
                    losses = grpo_loss(logp, old, ref_, A, o.eps, beta, o.eps_high, o.kl)
                    weight = {"seq_mean": 1 / (n * length[rows]), "token_mean": 1 / tokens, "const": 1 / (n * longest)}[o.agg]
                    loss = (weight * mask * losses).sum()
                    loss.backward()

                    ratio = (logp.detach() - old).exp()
                    low, high = (ratio < 1 - o.eps) & (A < 0) & mask, (ratio > 1 + o.eps_high) & (A > 0) & mask
                    run.add({"loss": loss / k, "entropy": entropy.sum() / tokens / k,
                             "clip_ratio/low_mean": low.sum() / tokens / k, "clip_ratio/high_mean": high.sum() / tokens / k})  # fmt: skip
                    run.add({"kl": (k3(logp.detach(), ref_) * mask).sum() / n / k} if ref else {})
                run.update(step, policy, optimizer, share=1 / k)
        run.add({"reward": r.mean(), "reward_std": r.std(1).mean(), "frac_reward_zero_std": (r == r[:, :1]).all(1).float().mean(),
                 "completions/mean_length": length.float().mean(), "completions/clipped_ratio": 1 - s.finished.float().mean(),
                 "sampled_tokens": prompts.sampled})  # fmt: skip
        if o.eval_every and (step + 1) % o.eval_every == 0:
            run.evaluated(step, yardstick.measure(policy, ref or reopen(run, init), n=128)[0])

    final, samples = yardstick.measure(policy, ref or reopen(run, init))
    save(policy, o.out, **run.facts(), tokenizer=tokenizer.meta, template=task.template, reference=init, implicit=yardstick.implicit,
         max_new_tokens=longest, reward=final.get("reward"))  # fmt: skip
    report(f"{run.method} on {o.task}", final, samples, reward.bound)
    forward = {"policy": 1 + (o.updates * o.minibatches > 1) + o.updates, "ref": 1, "reward": 1}  # sampling, log-probs of π_old, training
    run.finish(final | {"sampled_tokens": prompts.sampled}, forward, backward={"policy": o.updates})


if __name__ == "__main__":
    main()

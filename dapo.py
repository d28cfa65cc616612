"""DAPO: Decoupled Clip and Dynamic sAmpling Policy Optimization (arXiv:2503.14476). `diff grpo.py dapo.py` shows its four parts.

    L(θ) = 1/Σ_i|y_i| Σ_i Σ_t - min(ρ_it A_i, clip(ρ_it, 1-ε_low, 1+ε_high) A_i),      0 < correct answers of the G < G

    1. clip-higher         ε_high > ε_low: a token of low probability may rise further before its gradient stops
    2. dynamic sampling    groups that are all correct or all wrong have A = 0: they are dropped, and others sampled in their place,
                           until P are left; the surplus is dropped
    3. token-level loss    the mean over all response tokens of the optimizer step, not of each response first
    4. overlong shaping    r_i = ±1 (correct or not) + R_len;  R_len = 0 up to L_max - L_c tokens, from there falling to -1 at L_max

    paper               code                         shape
    G, N                group, batch_size            responses to a prompt; prompts that are kept
    R, A                r, adv                       (P, G); (B, 1), the same on every token of a response: (R - mean)/std
    log π_θ, π_old      logp, old_logp               (B, T-1) a token, nats, at the sampling temperature
    is_equivalent       correct                      (P, G) bool, the task's verdict; groups are filtered on it, before R_len is added
    L_max, L_c          longest, overlong_cache      tokens, end token included
    ε_low, ε_high       eps_low, eps_high

No KL penalty, no reference, no entropy bonus. Models in memory: 1 (the policy, trained); --reward rm adds a reward model. Data:
prompts, and a verdict on a response. Departures from the paper: 1. a round of sampling is as large as the batch, theirs three times
that; 2. std is the unbiased one, + 1e-4; 3. a learning rate for toy models.

    python dapo.py --task arithmetic:2                         makes out/arithmetic-2/sft.pt first where it is missing
    python dapo.py --task arithmetic:2 --eps-high 0.2          without clip-higher; --no-overlong: without part 4
    python dapo.py                                             reviews: correct is a gold reward of at least 1
    python dapo.py --task my.jsonl.gz --init out/my/sft.pt --reward my_rewards.py:number           correct: more than 0

It ends with the reward before and after, the win rate against the checkpoint it started from, and two samples of each.
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


def keep_groups(correct):
    """correct: (P, G) bool. Returns (P,) bool: the groups that are neither all correct nor all wrong, whose advantages are not 0."""
    return correct.any(1) & ~correct.all(1)


def dapo_loss(logp, old_logp, adv, eps_low=0.2, eps_high=0.28):
    """DAPO, arXiv:2503.14476. logp, old_logp: (B, T) token log-probs in nats. adv: (B, 1). The ratio is clipped to [1 - eps_low,
    1 + eps_high]. Returns (B, T) losses, to be averaged over all response tokens of the optimizer step. At logp = old_logp the ratio
    is 1, and the gradient that of -A log π."""
    assert logp.shape == old_logp.shape and adv.shape == (len(logp), 1), "two (B, T) tensors and a (B, 1)"
    ratio = (logp - old_logp).exp()
    return -torch.min(ratio * adv, ratio.clamp(1 - eps_low, 1 + eps_high) * adv)


def overlong_penalty(length, max_len, cache_len):
    """Soft overlong punishment. length: (B,) response tokens. Returns (B,): 0 up to max_len - cache_len, falling to -1 at max_len."""
    return -((length - (max_len - cache_len)) / cache_len).clamp(0, 1)


@dataclass
class Options(common.Options):
    reward: str = "task"  # what judges a response: task, rm (a reward model), or FILE.py:function (default: task)
    reward_model: str = ""  # checkpoint for --reward rm (default: out/<task>/reward_model.pt, made first where it is missing)
    group: Count = 8  # G: responses to a prompt (DeepSeekMath: 64)
    adv_norm: Literal["std", "none", "loo"] = "std"  # A: (r - mean)/std, r - mean (Dr. GRPO), or r - mean of the others (RLOO)
    agg: Literal["seq_mean", "token_mean", "const"] = "token_mean"  # 1/S Σ 1/|y| Σ_t, 1/Σ|y| Σ Σ_t (DAPO), or 1/S Σ 1/L_max Σ_t (Dr. GRPO)
    eps_low: NonNegative = 0.2  # ε_low: the ratio is clipped to [1 - ε_low, 1 + ε_high]
    eps_high: NonNegative = 0.28  # ε_high
    max_rounds: Count = 10  # rounds of --batch-size prompts in which as many groups with mixed answers must be found (paper: 10)
    overlong: bool = True  # add R_len to the reward
    overlong_cache: Whole = 0  # L_c, tokens (0: a fifth of L_max, --max-new-tokens, as in the paper: 4096 of 20480)
    overlong_filter: bool = False  # leave responses that did not end out of the loss (in the paper's ablation, not in its best runs)
    temperature: Positive = 1.0  # of the samples and of the log-probs that are trained, those of softmax(logits / temperature)
    updates: Count = 1  # μ: passes over a rollout
    minibatches: Count = 8  # optimizer steps a pass, over shuffled responses
    steps: Count = 40  # rollouts (default: %(default)s; of a file: one pass over its prompts)
    epochs: Whole = 0  # as many steps as grpo.py makes in so many passes over the training prompts; the refill takes more prompts
    batch_size: Count = 16  # P: prompts a rollout
    micro_batch: Whole = 0  # responses a forward pass: less memory, the same gradient (0: all of an optimizer step's)
    lr: Positive = 2e-4  # AdamW learning rate at its peak; large models take 1e-6 to 3e-6
    warmup: Whole = 20  # rollouts over which the learning rate rises from 0
    save_every: Count = 20  # rollouts between saved states
    on_arithmetic = dict(steps=50, batch_size=32, minibatches=4)
    on_exact = dict(overlong=False, group=64, batch_size=4, steps=1500, lr=3e-4, lr_schedule="linear")
    on_predict = dict(batch_size=1, group=4, minibatches=1)


def rollout(policy, prompts, tokenizer, longest, o, run):
    """-> P prompts, rows (ids, prompt, columns), and the Samples of G responses to each"""
    batch = next(prompts)
    with run.autocast():
        s = sample(policy, [ids for ids, *_ in batch], longest, tokenizer.end_id, o.temperature, prompts.generator, o.group)
    prompts.sampled += int(s.mask.sum())
    return batch, s


def dynamic_sampling(policy, prompts, reward, tokenizer, longest, o, run):
    """-> the Samples and verdicts (P, G) of the first P groups that are neither all correct nor all wrong, and facts to log. Where
    max_rounds do not find as many: None, None, and why."""
    parts, verdicts, keep, P = [], [], torch.zeros(0), prompts.batch_size
    while keep.sum() < P and len(parts) < o.max_rounds:
        batch, s = rollout(policy, prompts, tokenizer, longest, o, run)
        parts, verdicts = [*parts, s], [*verdicts, reward.correct(batch, s).view(-1, o.group)]
        correct = torch.cat(verdicts)
        keep = keep_groups(correct)
    if keep.sum() < P:
        right, wrong = correct.all(1).float().mean(), (~correct).all(1).float().mean()
        how = "the task is too easy, take a harder one" if right > wrong else "the task is too hard, take an easier one or a longer SFT"
        how = how if right + wrong > 0.5 else "allow more rounds"
        return None, None, (f"--max-rounds {o.max_rounds} found {keep.sum()} groups with mixed answers of the {P} needed; of all groups "
                            f"{right:.0%} were all correct, {wrong:.0%} all wrong: {how}")  # fmt: skip
    chosen = keep & (keep.cumsum(0) <= P)  # the surplus is dropped
    facts = {"accuracy": correct.float().mean(), "kept_fraction": keep.float().mean(), "num_gen_batches": len(parts)}
    return s.cat(parts).take(chosen.repeat_interleave(o.group)), correct[chosen], facts


@common.command(CheckpointError, data.DataError)
def main(argv=None):
    o = common.parse(Options, argv)
    if o.group == 1:
        raise common.UserError("--group 1: a response is compared with the others to the same prompt; give at least 2")
    common.refuse_unread(o, "reward", {"rm": {"reward_model"}})
    task = data.task(o.task, o.eval_file, o.strict)
    longest = (o.max_new_tokens or task.max_new_tokens) * o.overlong
    if o.overlong_cache > longest:
        raise common.UserError(f"--overlong-cache {o.overlong_cache} goes with --overlong, and is at most a response's {longest} tokens")
    run = common.Run(o, "dapo")
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
    held = memory.Ledger(policy=policy, reward=reward.model)
    optimizer = common.adamw(policy, o)
    run.begin(held, prompts, policy=policy, optimizer=optimizer, prompts=prompts)

    for step in run.steps():
        with run.clock("sample"):
            s, correct, facts = dynamic_sampling(policy, prompts, reward, tokenizer, longest, o, run)
        if s is None:
            run.cut_short(step, facts)
            break
        r = 2.0 * correct - 1  # (P, G)
        parts = prompts.minibatches(len(s.ids), o.updates, o.minibatches)
        k, length = len(parts), s.mask.sum(1, keepdim=True)  # k optimizer steps on this rollout; (P·G, 1)
        with run.clock("logprobs"):
            old_logp = run.whole(s, lambda ids, mask: policy.logprobs(ids, mask, o.temperature)) if k > 1 else None
        R_len = overlong_penalty(length.view_as(r), longest, o.overlong_cache or max(1, longest // 5))
        R = r + R_len if o.overlong else r  # after the filter, so that lengths make no group mixed
        adv = group_advantages(R, norm=o.adv_norm).view(-1, 1)  # (P·G, 1)
        run.tokens += int(s.stop.sum())
        if o.overlong_filter:
            s = s._replace(mask=s.mask & s.finished[:, None])

        with run.clock("update"):
            for i, index in enumerate(parts):
                n, tokens = run.total(len(index)), run.total(s.mask[index].sum().clamp(min=1))
                for rows in run.micro_batches(index):
                    ids, mask, *_ = s.take(rows)
                    with run.autocast():
                        logp, entropy = policy.logprobs(ids, mask, o.temperature, entropy=True)  # (B, T-1)
                    mask, A, T = mask[:, 1:], adv[rows], logp.size(1)
                    old = logp.detach() if i == 0 else old_logp[rows, :T]  # at the first step of a rollout π_θ is π_old
                    losses = dapo_loss(logp, old, A, o.eps_low, o.eps_high)
                    weight = {"seq_mean": 1 / (n * length[rows]), "token_mean": 1 / tokens, "const": 1 / (n * longest)}[o.agg]
                    loss = (weight * mask * losses).sum()
                    loss.backward()

                    ratio = (logp.detach() - old).exp()
                    low, high = (ratio < 1 - o.eps_low) & (A < 0) & mask, (ratio > 1 + o.eps_high) & (A > 0) & mask
                    run.add({"loss": loss / k, "entropy": entropy.sum() / tokens / k,
                             "clip_ratio/low_mean": low.sum() / tokens / k, "clip_ratio/high_mean": high.sum() / tokens / k})  # fmt: skip
                run.update(step, policy, optimizer, share=1 / k)
        run.add({"reward": r.mean(), "reward_std": r.std(1).mean(), "frac_reward_zero_std": (r == r[:, :1]).all(1).float().mean(),
                 "completions/mean_length": length.float().mean(), "completions/clipped_ratio": 1 - s.finished.float().mean(),
                 "sampled_tokens": prompts.sampled})  # fmt: skip
        run.add(facts | ({"overlong": (R_len < 0).float().mean(), "overlong_reward": R_len.mean()} if o.overlong else {}))
        if o.eval_every and (step + 1) % o.eval_every == 0:
            run.evaluated(step, yardstick.measure(policy, reopen(run, init), n=128)[0])

    final, samples = yardstick.measure(policy, reopen(run, init))
    save(policy, o.out, **run.facts(), tokenizer=tokenizer.meta, template=task.template, reference=init, implicit=yardstick.implicit,
         max_new_tokens=longest, reward=final.get("reward"))  # fmt: skip
    report(f"{run.method} on {o.task}", final, samples, reward.bound)
    forward = {"policy": 1 + (o.updates * o.minibatches > 1) + o.updates, "reward": 1}  # sampling, log-probs of π_old, training
    run.finish(final | {"sampled_tokens": prompts.sampled}, forward, backward={"policy": o.updates})


if __name__ == "__main__":
    main()

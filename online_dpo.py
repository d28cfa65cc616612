"""Online DPO (OAIF, arXiv:2402.04792) and iterative DPO: DPO (arXiv:2305.18290) on pairs that the policy itself has just written.

    y_1 … y_n ~ π_θ(·|x), no gradient through the sampling; a, b: the one with the highest and the one with the lowest reward r
    (y_w, y_l) = (a, b) with probability σ(r(x,a) - r(x,b)), else (b, a)          --label argmax: always (a, b)
    h(θ) = [log π_θ(y_w|x) - log π_ref(y_w|x)] - [log π_θ(y_l|x) - log π_ref(y_l|x)]
    L(θ) = - log σ(βh)                                                            --loss ipo: (h - 1/(2τ))²

Online: a pair is trained on once, at once. Iterative, --rounds N: a round of pairs is sampled and labelled, trained on for one
epoch, and the next round comes from what the policy has become; --ref-update per-round makes that the new π_ref too.
For DPO with a fixed π_ref and the labels of Bradley–Terry the optimum is π* ∝ π_ref exp(r/β), however pairs are chosen, since
σ(r_a - r_b) is what σ(βh) has to predict; with argmax h grows without bound, and what is left is the single best answer.

    paper                        code                        shape
    y_w, y_l                     chosen, rejected            (P,) which of the n samples; rows i and P + i of the pairs' Samples
    r(x, y)                      r                           (P, n) of --reward or --judge
    log π_θ(y|x)                 logp                        (2B,) sums over response tokens, nats; B pairs, the chosen ones first
    log π_ref(y|x)               ref_logp                    (2B,)
                                 counts                      (P,) False: the two are equal (argmax: or equally good), and weigh nothing
    β, τ                         beta, tau

Models in memory: 2 (the policy, trained; the reference, frozen), with --reward rm or --judge a third. Data: prompts, and what
judges a response. Departures from OAIF: 1. labels drawn by Bradley–Terry by default, from a reward, where an LLM was asked and its
choice taken; 2. equal answers weigh nothing, and the mean is over the other pairs; 3. IPO takes h of log-probs averaged over the
response (--ipo-sum: of sums); 4. AdamW for Adafactor, a learning rate for toy models.

    python online_dpo.py                                       reviews; makes out/reviews/sft.pt first where it is missing
    python online_dpo.py --task exact                          the distance to the known optimum π*; --label argmax has another
    python online_dpo.py --rounds 3 --samples-per-prompt 4     iterative: best against worst of four, 50 steps a round
    python online_dpo.py --judge out/reviews/reward_model.pt   by the score of a reward model that was trained elsewhere
    python online_dpo.py --task my.jsonl.gz --init out/my/sft.pt --reward my_rewards.py:number

It ends with the reward before and after, the win rate against the start, KL(π‖π_start), and two samples of each.
"""
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F

import common
import data
import memory
from common import Count, NonNegative, Positive, Whole
from evaluate import Reward, choose_yardstick, context, describe, open_checkpoint, reopen, report
from gpt import CheckpointError, Samples, sample, save


def dpo_loss(logp_w, logp_l, ref_logp_w, ref_logp_l, beta=0.1):
    """DPO, Eq. 7 of arXiv:2305.18290. logp_*, ref_logp_*: (B,) summed response log-probs in nats, end token included. beta: β > 0,
    1/nats. Returns (B,) losses. Raises AssertionError if shapes differ. At logp = ref_logp the loss is log 2."""
    return -F.logsigmoid(beta * log_ratio(logp_w, logp_l, ref_logp_w, ref_logp_l))


def ipo_loss(logp_w, logp_l, ref_logp_w, ref_logp_l, tau=0.1):
    """IPO, Eq. 17 of arXiv:2310.12036: (h - 1/(2τ))². logp_*, ref_logp_*: (B,) means over response tokens (or sums: then τ is
    another scale). tau: τ > 0. Returns (B,) losses. The minimum is at h = 1/(2τ); at logp = ref_logp the loss is 1/(4τ²)."""
    return (log_ratio(logp_w, logp_l, ref_logp_w, ref_logp_l) - 1 / (2 * tau)) ** 2


def log_ratio(logp_w, logp_l, ref_logp_w, ref_logp_l):
    """h, (B,): how much further the policy has moved the chosen answers than the rejected ones, in nats."""
    assert logp_w.shape == logp_l.shape == ref_logp_w.shape == ref_logp_l.shape and logp_w.dim() == 1, "four (B,) tensors"
    return (logp_w - ref_logp_w) - (logp_l - ref_logp_l)


def choose(reward, uniform=None):
    """Best against worst. reward: (P, n), n > 1 samples of each of P prompts. uniform: (P,) numbers drawn from [0, 1): the better one
    wins with probability σ(difference of the rewards), by Bradley–Terry; None: it always wins, argmax.
    Returns (chosen, rejected): (P,) columns, two different ones for each prompt, without gradient."""
    assert reward.dim() == 2 and reward.size(1) > 1, "a (P, n) tensor, n > 1"
    ordered, column = reward.detach().sort(stable=True, dim=1)
    worst, best = column[:, 0], column[:, -1]
    if uniform is None:
        return best, worst
    better_wins = uniform < torch.sigmoid(ordered[:, -1] - ordered[:, 0])
    return torch.where(better_wins, best, worst), torch.where(better_wins, worst, best)


READS = {"dpo": {"beta"}, "ipo": {"tau", "ipo_sum"}}


@dataclass
class Options(common.Options):
    reward: str = "task"  # what judges a response: task, rm (a reward model), or FILE.py:function (default: task)
    reward_model: str = ""  # checkpoint for --reward rm (default: out/<task>/reward_model.pt, made first where it is missing)
    judge: str = ""  # in place of --reward: the checkpoint of a reward model trained elsewhere; it reads text, so any vocabulary will do
    missing_eos_penalty: NonNegative = 1.0  # what a reward model's score loses where the response did not end
    label: Literal["bt", "argmax"] = "bt"  # the winner is drawn by Bradley–Terry, or the one with the higher reward (OAIF)
    loss: Literal["dpo", "ipo"] = "dpo"  # of a pair
    beta: Positive = 0.1  # β: strength of the KL penalty to π_ref, 1/nats
    tau: Positive = 1.0  # τ of IPO: the target of h is 1/(2τ), nats a token (with --ipo-sum: nats a response)
    ipo_sum: bool = False  # IPO on summed log-probs, as its Eq. 17 reads, not on their means over the response
    rounds: Whole = 0  # rounds of sampling and labelling, each followed by one epoch on its pairs (0: one a step, online DPO)
    samples_per_prompt: Count = 2  # n: the best of them is compared with the worst
    ref_update: Literal["fixed", "per-round"] = "fixed"  # π_ref: where the run starts, or where each round starts
    temperature: Positive = 1.0  # of the samples; the loss is that of the model as it is (TRL samples at 0.9)
    steps: Count = 150  # optimizer steps (default: %(default)s; of a file: one pass over its prompts)
    epochs: Whole = 0  # passes over the training prompts, in place of --steps
    batch_size: Count = 32  # P: prompts an optimizer step, each with one pair
    micro_batch: Whole = 0  # pairs a forward pass: less memory, the same gradient (0: all of an optimizer step's)
    lr: Positive = 3e-4  # AdamW learning rate at its peak; large models take 5e-7
    on_exact = dict(beta=0.5, tau=0.3, steps=1000, batch_size=256, lr=5e-4, lr_schedule="linear", missing_eos_penalty=0.0)
    on_predict = dict(batch_size=2)


class Round:
    """The labelled pairs of a round, step by step, and the labels asked for since the start of the run: part of its saved state."""

    def __init__(self):
        self.first, self.steps, self.labels = 0, [], 0

    def __getitem__(self, step):
        """-> (Samples of 2P rows, the chosen ones first; counts (P,); figures of all samples) that the step trains on"""
        return self.steps[step - self.first]

    def fill(self, first, steps):
        self.first, self.steps = first, steps
        self.labels += sum(int(figures["labels"]) for *_, figures in steps)

    def state_dict(self):
        return {"first": self.first, "labels": self.labels, "steps": [(tuple(s), *more) for s, *more in self.steps]}

    def load_state_dict(self, state):
        self.first, self.labels, self.steps = state["first"], state["labels"], [(Samples(*s), *more) for s, *more in state["steps"]]


def collect(policy, prompts, reward, tokenizer, longest, o, run):
    """n samples to each of P prompts, from the policy as it is now; their best and worst, and which of them wins.
    -> (Samples of 2P rows, the chosen ones first; counts (P,); figures of all samples)"""
    batch, n = next(prompts), o.samples_per_prompt
    with run.autocast():
        s = sample(policy, [ids for ids, *_ in batch], longest, tokenizer.end_id, o.temperature, prompts.generator, n)
    uniform = torch.rand(len(batch), generator=prompts.generator).to(s.ids.device)
    prompts.sampled += int(s.mask.sum())
    r = reward(batch, s)
    if o.reward == "rm":
        r = r - o.missing_eos_penalty * ~s.finished
    r = r.view(-1, n)  # (P, n)
    chosen, rejected = choose(r, uniform if o.label == "bt" else None)
    row = torch.arange(len(batch), device=r.device)
    pairs = s.take(torch.cat([row * n + chosen, row * n + rejected]))  # (2P, T)
    equal = ~torch.ne(*pairs.ids.chunk(2)).any(1) & ~torch.ne(*pairs.mask.chunk(2)).any(1)  # (P,)
    gap = r[row, chosen] - r[row, rejected]
    figures = {"reward": r.mean(), "reward_margin": gap.mean(), "equal_fraction": equal.float().mean(),
               "tie_fraction": (gap == 0).float().mean(), "labels": (~equal).sum(), "completions/mean_length": s.mask.sum(1).float().mean(),
               "completions/clipped_ratio": 1 - s.finished.float().mean()}  # fmt: skip
    counts = ~equal & (gap != 0) if o.label == "argmax" else ~equal
    return pairs, counts, {name: float(x) for name, x in figures.items()}


@common.command(CheckpointError, data.DataError)
def main(argv=None):
    o = common.parse(Options, argv)
    common.refuse_unread(o, "loss", READS)
    if o.judge:
        if o.given & {"reward", "reward_model"}:
            raise common.UserError("--judge and --reward, --reward-model both say what judges a response; give one of them")
        o.reward, o.reward_model = "rm", o.judge
    common.refuse_unread(o, "reward", {"rm": {"reward_model", "missing_eos_penalty"}})
    if o.samples_per_prompt == 1:
        raise common.UserError("--samples-per-prompt 1: a response is compared with another to the same prompt; give at least 2")
    if o.ref_update == "per-round" and not o.rounds:
        raise common.UserError("--ref-update per-round goes with --rounds N, the rounds of iterative DPO")
    task = data.task(o.task, o.eval_file, o.strict)
    run = common.Run(o, "online_dpo")
    reward = Reward(run, task, o.reward)
    init = o.init or common.stage("sft.py", o)
    policy, tokenizer, meta = open_checkpoint(init, o, task)
    run.say(f"the policy starts from {init}: {describe(meta)}")
    task.template, block_size, mean = meta["template"], context(o, policy), o.loss == "ipo" and not o.ipo_sum
    if o.reward == "rm":
        o.reward_model = o.reward_model or common.stage("reward_model.py", o, "--reward-model")
    reward, aim = reward.open(tokenizer, o.reward_model, block_size, judge=bool(o.judge)), (run.method, vars(o))
    yardstick = choose_yardstick(run, task, tokenizer, block_size, o.max_new_tokens, o.truncate, "none", aim=aim, reward=reward)
    longest = yardstick.max_new_tokens
    count = o.batch_size if common.is_exact(o.task) else None  # its four prompts again and again
    prompts = data.Prompts(task, o.batch_size, o.seed, tokenizer, block_size - longest, o.truncate, count)
    for note in filter(None, [*task.notes, prompts.note, *yardstick.notes]):
        run.say(note)

    policy = run.prepare(policy)
    policy.checkpoint_activations = o.checkpoint_activations
    reward.probe(policy, prompts.rows[:4], longest)
    ref = run.frozen(policy)
    start = ref if o.ref_update == "fixed" else None  # what the policy is compared with at the end
    optimizer = common.adamw(policy, o)
    loss_fn = {"dpo": partial(dpo_loss, beta=o.beta), "ipo": partial(ipo_loss, tau=o.tau)}[o.loss]
    scale = o.tau if o.loss == "ipo" else o.beta  # of the implicit reward, scale · log π/π_ref
    pairs, state = Round(), {} if start else {"ref": ref}
    run.begin(memory.Ledger(policy=policy, ref=ref, reward=reward.model), prompts, policy=policy, optimizer=optimizer, prompts=prompts,
              round=pairs, **state)  # fmt: skip
    rounds = o.rounds or o.steps
    if rounds > o.steps:
        raise common.UserError(f"--rounds {rounds} are more than the {o.steps} steps; a round has at least one")
    starts = [i * o.steps // rounds for i in range(rounds + 1)]
    ends = dict(zip(starts, starts[1:]))  # where a round begins -> where it ends

    for step in run.steps():
        end = step + 1 if run.predicting else ends.get(step)
        if end:  # a new round
            if o.ref_update == "per-round" and step > 0:
                ref.load_state_dict(policy.state_dict())
            with run.clock("sample"):
                pairs.fill(step, [collect(policy, prompts, reward, tokenizer, longest, o, run) for _ in range(step, end)])
        s, counts, figures = pairs[step]
        run.tokens += int(s.stop.sum())
        run.add(figures | {"labels": pairs.labels, "sampled_tokens": prompts.sampled})
        counted, P = run.total(counts.sum().clamp(min=1)), len(counts)
        with run.clock("update"):
            for rows in run.micro_batches(torch.arange(P)):
                ids, mask, *_ = s.take(torch.cat([rows, rows + P]))
                with run.autocast():
                    logp = policy.logprobs(ids, mask).sum(1)  # (2B,)
                    with torch.no_grad():
                        ref_logp = ref.logprobs(ids, mask).sum(1)
                size = mask.sum(1)  # (2B,) response tokens, end tokens included
                used, ref_used = (logp / size, ref_logp / size) if mean else (logp, ref_logp)
                losses = loss_fn(*used.chunk(2), *ref_used.chunk(2))  # (B,)
                weight = counts[rows] / counted  # mean over the step's pairs that count
                loss = (weight * losses).sum()
                loss.backward()

                reward_w, reward_l = (scale * (used - ref_used)).detach().chunk(2)
                logp_w, logp_l = logp.detach().chunk(2)
                run.add({
                    "loss": loss, "rewards/chosen": (weight * reward_w).sum(), "rewards/rejected": (weight * reward_l).sum(),
                    "rewards/margins": (weight * (reward_w - reward_l)).sum(), "rewards/accuracies": (weight * (reward_w > reward_l)).sum(),
                    "logps/chosen": (weight * logp_w).sum(), "logps/rejected": (weight * logp_l).sum(),
                    "kl": (logp.detach() - ref_logp).sum() / run.total(2 * P),
                })  # fmt: skip
            run.update(step, policy, optimizer)
        if o.eval_every and (step + 1) % o.eval_every == 0:
            run.evaluated(step, yardstick.measure(policy, start or reopen(run, init), n=128)[0])

    final, samples = yardstick.measure(policy, start or reopen(run, init))
    save(policy, o.out, **run.facts(), tokenizer=tokenizer.meta, template=task.template, reference=init, implicit=yardstick.implicit,
         max_new_tokens=longest, reward=final.get("reward"))  # fmt: skip
    report(f"{run.method} on {o.task}", final, samples, reward.bound)
    sampled = o.samples_per_prompt / 2  # responses for each that is trained on
    run.finish(final | {"labels": pairs.labels, "sampled_tokens": prompts.sampled},
               forward={"policy": 1 + sampled, "ref": 1, "reward": sampled}, backward={"policy": 1})  # fmt: skip


if __name__ == "__main__":
    main()

"""Online DPO (OAIF, arXiv:2402.04792) and iterative DPO: DPO on pairs that the policy has written.

    y_1 … y_n ~ π_θ(·|x);  a, b: those with the highest and the lowest reward r
    (y_w, y_l) = (a, b) with probability σ(r(x,a) - r(x,b)), else (b, a)      --label argmax: (a, b)
    h(θ) = [log π_θ(y_w|x) - log π_ref(y_w|x)] - [log π_θ(y_l|x) - log π_ref(y_l|x)]
    L(θ) = - log σ(βh)                                                        --loss ipo: as dpo.py

By default the method is online: each pair is trained on once, as soon as it is sampled. With
--rounds N it is iterative: it samples and labels a round of pairs and trains on them for one epoch;
then the trained policy samples the next round and, with --ref-update per-round, becomes the new
π_ref. With the DPO loss, a fixed π_ref and Bradley–Terry labels the optimum is π* ∝ π_ref exp(r/β),
however pairs are chosen. With argmax labels h grows without bound, and in the end the policy gives
a single best answer.

    paper                        code                        shape
    y_w, y_l                     chosen, rejected            (P,) which of the n samples
    r(x, y)                      reward                      (P, n)
    log π_θ(y|x)                 logp_w, logp_l              (B,) sums over response tokens, nats
    log π_ref(y|x)               ref_logp_w, ref_logp_l      (B,)
                                 counts                      (P,) False for equal answers and ties
    β                            beta                        β is the τ of IPO

Models in memory: 2 (policy, trained; ref, frozen); a learned reward adds one. Data: prompts, and a
judge of responses.
Departures from OAIF: 1. labels come from a reward, by Bradley–Terry, not from an LLM; 2. pairs of
equal answers, and with --label argmax pairs of equal rewards, have no weight in the mean; 3. IPO
averages log-probs over tokens, and --ipo-sum sums them; 4. the optimizer is AdamW, not Adafactor,
and the default learning rates suit toy models.

    python online_dpo.py                        film reviews; trains out/reviews/sft.pt if missing
    python online_dpo.py --task exact           the distance to the known optimum π*
    python online_dpo.py --rounds 3 --samples-per-prompt 4     best against worst of four
    python online_dpo.py --reward rm            by the score of out/reviews/reward_model.pt
    python online_dpo.py --task my.jsonl --init out/my/sft.pt --reward my_rewards.py:number
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

import data
import training
from data import UserError
from evaluate import Evaluator
from gpt import response_logprobs
from packing import row_lengths
from training import JudgedOptions, Rollout, Run, Weights, opt, parse
from training.reward import load_judge


def dpo_loss(logp_w, logp_l, ref_logp_w, ref_logp_l, beta=0.1):
    """DPO, Eq. 7 of arXiv:2305.18290. logp_*, ref_logp_*: (B,) log-probs of responses, sums over
    tokens, in nats. beta: β > 0, 1/nats. Returns (B,) losses. At logp = ref_logp it is log 2."""
    return -F.logsigmoid(beta * log_ratio(logp_w, logp_l, ref_logp_w, ref_logp_l))


def ipo_loss(logp_w, logp_l, ref_logp_w, ref_logp_l, tau=0.1):
    """IPO, Eq. 17 of arXiv:2310.12036. logp_*, ref_logp_*: (B,) means over response tokens (or
    sums, which give τ another scale). tau: τ > 0. Returns (B,) losses, least at h = 1/(2τ)."""
    return (log_ratio(logp_w, logp_l, ref_logp_w, ref_logp_l) - 1 / (2 * tau)) ** 2


def log_ratio(logp_w, logp_l, ref_logp_w, ref_logp_l):
    """h, (B,): how much more the policy has raised log π of the chosen answer than of the other."""
    assert logp_w.shape == logp_l.shape == ref_logp_w.shape == ref_logp_l.shape, "four (B,) tensors"
    return (logp_w - ref_logp_w) - (logp_l - ref_logp_l)


def choose(reward, uniform=None):
    """Pairs the best sample with the worst. reward: (P, n), n > 1 samples of each of P prompts.
    uniform: (P,) numbers drawn from [0, 1), so that the better sample wins with probability
    σ(difference of the rewards), by Bradley–Terry; if None, the better sample always wins (argmax).
    Returns (chosen, rejected): for each prompt two different columns, (P,), without gradient."""
    assert reward.dim() == 2 and reward.size(1) > 1, "a (P, n) tensor, n > 1"
    ordered, column = reward.detach().sort(stable=True, dim=1)
    worst, best = column[:, 0], column[:, -1]
    if uniform is None:
        return best, worst
    better_wins = uniform < torch.sigmoid(ordered[:, -1] - ordered[:, 0])
    return torch.where(better_wins, best, worst), torch.where(better_wins, worst, best)


@dataclass
class Options(JudgedOptions):
    missing_eos_penalty: float = opt(
        1.0, "what a score loses if the response did not end", low=0, only="reward=rm|*.pt"
    )
    label: str = opt("bt", "who wins: by Bradley–Terry, or the best", choices=("bt", "argmax"))
    loss: str = opt("dpo", "loss of a pair", choices=("dpo", "ipo"))
    beta: float = opt(0.1, "β: strength of the KL penalty to π_ref, 1/nats; IPO's τ", above=0)
    ipo_sum: bool = opt(False, "IPO sums log-probs over tokens (Eq. 17)", only="loss=ipo")
    rounds: int = opt(0, "rounds of sampling, one epoch each (0: online, one per step)", low=0)
    samples_per_prompt: int = opt(2, "n: the best of n is paired with the worst", low=2)
    temperature: float = opt(1.0, "of the samples; the loss is at temperature 1", above=0)
    ref_update: str = opt(
        "fixed",
        "π_ref: the policy at the start of the run, or of each round",
        choices=("fixed", "per-round"),
        only="lora=0",
    )

    def check(self):
        super().check()
        if self.ref_update == "per-round" and not self.rounds:
            rounds = "needs --rounds N, which makes DPO iterative"
            raise UserError(f"--ref-update per-round {rounds}")
        if 0 < self.steps < self.rounds:
            steps = f"is more than the {self.steps} steps, but a round needs one; lower it"
            raise UserError(f"--rounds {self.rounds} {steps}")


LEARNING = dict(steps=1000, batch_size=256, lr=5e-4, lr_schedule="linear")

PRESETS = {  # defaults for any task, for a kind of task, for an option's value; the last match wins
    "any": dict(steps=150, lr=3e-4),
    # a missing end costs nothing there
    "exact": LEARNING | dict(beta=0.5, missing_eos_penalty=0.0),
    "loss=ipo": dict(beta=1.0),
    "exact loss=ipo": dict(beta=0.3),
}


def compute_loss(policy, ref, batch, o):
    """A micro-batch of B pairs, 2B responses, the chosen ones first -> (losses, metrics), each
    (B,): one entry per pair."""
    logp_w, logp_l = response_logprobs(policy, batch).chunk(2)  # (B,)
    with torch.no_grad():
        ref_logp_w, ref_logp_l = response_logprobs(ref, batch).chunk(2)

    sum_w, sum_l = logp_w.detach(), logp_l.detach()
    kl = (sum_w - ref_logp_w + sum_l - ref_logp_l) / 2
    if o.loss == "ipo" and not o.ipo_sum:  # means over tokens
        len_w, len_l = batch.mask.sum(1).chunk(2)
        logp_w, ref_logp_w = logp_w / len_w, ref_logp_w / len_w
        logp_l, ref_logp_l = logp_l / len_l, ref_logp_l / len_l
    logps = logp_w, logp_l, ref_logp_w, ref_logp_l
    losses = ipo_loss(*logps, o.beta) if o.loss == "ipo" else dpo_loss(*logps, o.beta)

    reward_w = o.beta * (logp_w - ref_logp_w).detach()
    reward_l = o.beta * (logp_l - ref_logp_l).detach()
    return losses, {
        "rewards/chosen": reward_w,
        "rewards/rejected": reward_l,
        "rewards/margins": reward_w - reward_l,
        "rewards/accuracies": reward_w > reward_l,
        "logps/chosen": sum_w,
        "logps/rejected": sum_l,
        "kl": kl,
    }


class Round:
    """The labelled pairs of a round, step by step, and the number of labels that the run has used
    so far. It is a part of the run's saved state."""

    def __init__(self):
        self.first, self.steps, self.labels = 0, [], 0

    def __getitem__(self, step):
        """-> (Rollout of the step's 2P rows, the chosen ones first; figures of all samples)"""
        return self.steps[step - self.first]

    def fill(self, first, steps):
        self.first, self.steps = first, steps
        self.labels += sum(int(figures["labels"]) for _, figures in steps)

    def state_dict(self):
        steps = [(vars(pairs), figures) for pairs, figures in self.steps]
        return {"first": self.first, "labels": self.labels, "steps": steps}

    def load_state_dict(self, state):
        self.first, self.labels = state["first"], state["labels"]
        self.steps = [(Rollout(**columns), figures) for columns, figures in state["steps"]]


def collect(policy, prompts, judge, run, o):
    """Draws n samples for each of P prompts from the current policy, and pairs the best with the
    worst. -> (Rollout of 2P rows, the chosen ones first; figures of all samples)"""
    questions, n = next(prompts), o.samples_per_prompt
    rollout = run.sample(policy, questions, prompts.longest, n, o.temperature)
    uniform = torch.rand(len(questions), generator=run.generator).to(rollout.ids.device)
    reward = judge.reward(questions, rollout).view(-1, n)  # (P, n)
    chosen, rejected = choose(reward, uniform if o.label == "bt" else None)

    row = torch.arange(len(questions), device=reward.device)
    pairs = rollout[torch.cat([row * n + chosen, row * n + rejected])]  # (2P, T)
    (ids_w, ids_l), (mask_w, mask_l) = pairs.ids.chunk(2), pairs.mask.chunk(2)
    equal = (ids_w == ids_l).all(1) & (mask_w == mask_l).all(1)  # (P,)
    margin = reward[row, chosen] - reward[row, rejected]
    tied = margin == 0
    counts = ~(equal | tied) if o.label == "argmax" else ~equal
    pairs.counts = torch.cat([counts, counts])
    figures = {
        "reward": reward.mean(),
        "reward_margin": margin.mean(),
        "equal_fraction": equal.float().mean(),
        "tie_fraction": tied.float().mean(),
        "labels": (~equal).sum(),
    }
    figures |= rollout.summary()
    return pairs, {name: float(x) for name, x in figures.items()}


def end_of_round(step, o):
    """-> the step at which the round that begins at `step` ends; None if none begins there"""
    rounds = o.rounds or o.steps
    starts = [i * o.steps // rounds for i in range(rounds + 1)]
    return dict(zip(starts, starts[1:])).get(step)


def main(argv=None):
    o = parse(Options, argv, PRESETS)
    run = Run("online_dpo", o)
    task = data.task(o.task, o.eval_file, o.strict)
    judge = load_judge(o.reward, run, task, o.missing_eos_penalty)
    policy = run.load(o.init or run.stage("sft"), task)
    ref = run.reference(policy)
    run.hold(policy=policy, ref=ref, reward=judge.model)

    prompts = run.prompts()
    fixed = o.ref_update == "fixed"
    evaluator = Evaluator(run, task, judge, ref if fixed else run.baseline)
    judge.try_out(policy, prompts)
    optimizer = run.adamw(policy)
    labelled, state = Round(), {} if fixed else {"ref": Weights(ref, frozen=True)}

    for step in run.steps(prompts, optimizer, round=labelled, **state):
        end = end_of_round(step, o)
        if end:
            if not fixed and step > 0:
                ref.load_state_dict(policy.state_dict())
            with run.clock("sample"):
                steps = [collect(policy, prompts, judge, run, o) for _ in range(step, end)]
                labelled.fill(step, steps)

        pairs, figures = labelled[step]
        P, length = len(pairs) // 2, row_lengths(pairs.host.mask)
        counted = pairs.counts[:P].sum().clamp(min=1)
        with run.clock("update"):
            lengths = length[:P] + length[P:]
            for rows in run.micro_batches(torch.arange(P), responses=2, lengths=lengths):
                batch = pairs[torch.cat([rows, rows + P])]
                with run.autocast():
                    losses, metrics = compute_loss(policy, ref, batch, o)
                counts = batch.counts[: len(rows)].to(losses)
                weight = counts / counted  # a mean over the pairs that count
                run.backward((weight * losses).sum(), tokens=batch.tokens)
                run.log({"kl": metrics.pop("kl")}, 1 / P)
                run.log(metrics | {"loss": losses}, weight)
            run.update(optimizer)
        run.log(figures | {"labels": labelled.labels})
        run.evaluate(evaluator, policy)

    run.finish(evaluator, policy, labels=labelled.labels)


if __name__ == "__main__":
    training.command(main)

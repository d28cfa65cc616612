"""On-policy distillation: GKD (arXiv:2306.13649), MiniLLM (arXiv:2306.08543).

    y ~ π_θ(·|x), s_t = (x, y_<t)                  the student's own states; no gradient through y
    L(θ) = 1/S Σ_i 1/|y_i| Σ_t D(π_θ, π_T; s_it)   over the whole vocabulary at each state

    reverse  KL(π_θ‖π_T) = Σ_v π_θ(v|s) log π_θ(v|s)/π_T(v|s)        mode-seeking, the default
    forward  KL(π_T‖π_θ)                                             covers all that π_T does
    JSD      β KL(π_T‖m) + (1-β) KL(π_θ‖m), m = β π_T + (1-β) π_θ    GKD, Eq. 1
    sampled  - ρ_t A_t,  A_t = log π_T(y_t|s_t) - log π_θ(y_t|s_t)   one reward per token, no return

    paper                code                       shape, or meaning
    log π_θ, log π_T     logp, teacher_logp         (m, V) at m states; (B, T) for sampled; nats
    β, ρ, A              beta, ratio, adv           β of the JSD; π_θ/π_old; (B, T), no gradient
    S, |y|               len(minibatch), length     responses per step; tokens, the end included
    λ                    1 - answers                GKD's share of the student's own responses

Models in memory: 2 (policy, the student, trained; teacher, frozen). They share a vocabulary, but
may have any sizes. Data: prompts; with --answers also the answers of the rows. Training reads no
reward. The fixed point of all four losses is π_θ = π_T at the states that the student visits. At
each state sampled has the same mean gradient as reverse, with more noise. The figure kl_teacher is
KL(π_θ‖π_T) per response; kl is measured against the student's start.
Departures: 1. --answers is a share of each step's prompts, while GKD flips one coin per step;
2. only the divergence of MiniLLM is used; 3. ρ is not clipped; 4. --temperature applies to the
distributions of both models too, not only to the samples.

    python distill.py                   a student of half the width, taught by out/reviews/ppo.pt
    python distill.py --task exact --init out/exact/sft.pt --teacher out/exact/dpo.pt
"""

import math
from dataclasses import dataclass

import torch

import data
import training
from data import UserError
from evaluate import Evaluator
from gpt import token_logprobs
from training import RolloutOptions, Run, opt, parse
from training.teacher import Answers, compared, load

LOSSES = ("reverse", "forward", "jsd", "sampled")


def kl(logp, logq):
    """KL(p‖q) = Σ_v p (log p - log q) in nats. logp, logq: (…, V) log-probs. Returns (…), ≥ 0."""
    assert logp.shape == logq.shape, "two tables of one vocabulary"
    return (logp.exp() * (logp - logq)).sum(-1)


def jsd(logp, teacher_logp, beta=0.5):
    """GKD's generalised JSD, Eq. 1 of arXiv:2306.13649. logp, teacher_logp: (…, V). beta: the
    teacher's share of the mixture, 0 < β < 1. Returns (…); it approaches β KL(π_T‖π_θ) as β → 0,
    and (1-β) KL(π_θ‖π_T) as β → 1."""
    mixture = torch.logaddexp(teacher_logp + math.log(beta), logp + math.log1p(-beta))
    return beta * kl(teacher_logp, mixture) + (1 - beta) * kl(logp, mixture)


def divergence(logp, teacher_logp, loss="reverse", beta=0.5):
    """D(π_θ, π_T) at each state. logp, teacher_logp: (m, V). Returns (m,), nats. At π_θ = π_T the
    divergence and its gradient are 0."""
    if loss == "reverse":
        return kl(logp, teacher_logp)
    return kl(teacher_logp, logp) if loss == "forward" else jsd(logp, teacher_logp, beta)


def sampled_loss(logp, old_logp, teacher_logp):
    """-ρA of the sampled tokens. logp, old_logp, teacher_logp: (B, T), nats. Returns (B, T) losses.
    Over tokens drawn from π_old their mean gradient is that of KL(π_θ‖π_T) at the state."""
    adv = (teacher_logp - logp).detach()
    return -(logp - old_logp).exp() * adv


@dataclass
class Options(RolloutOptions):
    teacher: str = opt("", "π_T, a checkpoint (default: out/<task>/ppo.pt)", file=True)
    loss: str = opt("reverse", "D over the vocabulary, or one sampled token", choices=LOSSES)
    jsd_beta: float = opt(0.5, "β of the JSD", above=0, below=1, only="loss=jsd")
    agg: str = opt("seq_mean", "how tokens are averaged", choices=("seq_mean", "token_mean"))
    answers: float = opt(
        0.0, "share of prompts with given answers", low=0, below=1, only="loss=reverse|forward|jsd"
    )
    reward: str = opt("task", "unused: the teacher takes its place", choices=("task",))

    def answered(self, prompts):
        """-> how many of `prompts` prompts are trained on with the answers of their rows"""
        return int(self.answers * prompts)

    def check(self):
        super().check()
        if self.answers and not self.answered(self.batch_size):
            few = f"of --batch-size {self.batch_size} prompts is less than one prompt"
            raise UserError(f"--answers {self.answers:g} {few}; raise it, or give 0")


PRESETS = {  # defaults for any task, for a kind of task, for an option's value; the last match wins
    "any": dict(steps=100, batch_size=16, lr=1e-3, save_every=20),
    "exact": dict(group=64, batch_size=4, steps=300, lr=2e-3, lr_schedule="linear"),
}


def compute_loss(policy, teacher, batch, o):
    """A micro-batch of B responses -> losses (B, T), and metrics, (B, T) or (B,) per response."""
    if o.loss == "sampled":
        logp, entropy = token_logprobs(policy, batch, o.temperature, entropy=True)
        with torch.no_grad():
            teacher_logp = token_logprobs(teacher, batch, o.temperature)
        losses = sampled_loss(logp, batch.old_logp_or(logp), teacher_logp)
        gap = (logp - teacher_logp).detach()
    else:

        def at_states(logp, teacher_logp):
            own = logp.detach()
            entropy = -(own.exp() * own).sum(-1)
            loss = divergence(logp, teacher_logp, o.loss, o.jsd_beta)
            return loss, kl(own, teacher_logp), entropy

        losses, gap, entropy = compared(policy, teacher, batch, at_states, o.temperature)
    return losses, {"entropy": entropy, "kl_teacher": gap.sum(1)}


def token_weight(batch, minibatch, agg):
    """The weight of each token's loss, (B, T), 0 off the response. The weighted sum over a
    minibatch is the average that agg names, however the minibatch is cut into micro-batches."""
    mask = batch.mask.to(batch.logp)
    if agg == "seq_mean":  # 1/S Σ_i 1/|y_i| Σ_t, GKD
        return mask / (len(minibatch) * batch.length.clamp(min=1))
    return mask / minibatch.length.sum().clamp(min=1)  # 1/Σ_i |y_i| Σ_i Σ_t, as TRL


class BesideTeacher(Evaluator):
    """Compares the student with its teacher, and then with its start."""

    def measure(self, policy, prompts=0):
        start, self.compared_with = self.compared_with, self.run.models["teacher"]
        beside = super().measure(policy, prompts)
        self.compared_with, found = start, {"kl_teacher": beside["kl"]}
        found |= {"teacher_reward": beside["ref_reward"]} if "ref_reward" in beside else {}
        return super().measure(policy, prompts) | found

    def report(self, title, f):
        super().report(title, f)
        data.say(f"KL(π‖π_T), nats per response: {f['kl_teacher']:.4f}")


def main(argv=None):
    o = parse(Options, argv, PRESETS)
    run = Run("distill", o)
    task = data.task(o.task, o.eval_file, o.strict)
    policy, teacher = load(run, task, o.teacher)
    run.hold(policy=policy, teacher=teacher)

    prompts = run.prompts()
    answers = Answers(run, task, o.answered(o.batch_size)) if o.answers else None
    evaluator = BesideTeacher(run, task)
    optimizer = run.adamw(policy)
    stale = o.loss == "sampled" and not o.updates == o.minibatches == 1

    for step in run.steps(prompts, optimizer):
        with run.clock("sample"):
            questions = next(prompts)  # P of them
            n = o.answered(len(questions))  # of them have given answers; none by default
            rollout = run.sample(policy, questions[n:], prompts.longest, o.group, o.temperature)
            rollout.own = torch.ones_like(rollout.finished)  # (N,) True: the student's own sample
        with run.clock("logprobs"):
            rollout.old_logp = run.logprobs(policy, rollout, o.temperature) if stale else None
        run.log(rollout.summary())
        rollout = answers.joined(rollout, step, n) if n else rollout  # (P·G, T)

        with run.clock("update"):
            for minibatch in rollout.minibatches(o.updates, o.minibatches, run.generator):
                for batch in run.micro_batches(minibatch):
                    with run.autocast():
                        losses, metrics = compute_loss(policy, teacher, batch, o)
                    weight = token_weight(batch, minibatch, o.agg)
                    run.backward((weight * losses).sum(), tokens=batch.tokens)
                    run.log({"loss": losses}, weight)
                    sampled = batch.own / minibatch.own.sum().clamp(min=1)
                    run.log({"kl_teacher": metrics.pop("kl_teacher")}, sampled)
                    run.log(metrics, token_weight(batch, minibatch, "token_mean"))
                run.update(optimizer)
        run.evaluate(evaluator, policy)

    run.finish(evaluator, policy)


if __name__ == "__main__":
    training.command(main)

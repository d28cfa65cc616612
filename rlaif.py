"""Constitutional AI (arXiv:2212.08073) and RLAIF (arXiv:2309.00267): principles in place of labels.

    skills   L(θ) = - mean over turns of 1/|turn| Σ_t log π(y_t | x, y_<t)      demonstrations
    SL-CAI   y ~ π(·|x);  critique ~ π(·|x, y, principle);  y' ~ π(·|x, y, principle, critique)
             L(θ) = - Σ log π_θ(y'_t | x, y'_<t) / Σ |y'|                       revisions y' alone
    PM       y_a, y_b ~ π_SL(·|x);  P(A|q) = π(A|q) / (π(A|q) + π(B|q)), computed, never sampled
             p = ½ [P(A | x, principle, A: y_a, B: y_b) + P(B | x, principle, A: y_b, B: y_a)]
             L(φ) = - p log σ(Δ) - (1-p) log σ(-Δ),  Δ = r_φ(x, y_a) - r_φ(x, y_b)
    RL-CAI   R_i = r_φ(x, y_i) - β Σ_t log π_old/π_SL;  A_i = R_i - mean of the prompt's other R
             L(θ) = - mean_i A_i log π_θ(y_i|x)

    paper                  code                          shape
    P(A|q), P(B|q)         ab, ba                        (N, 2) of the option tokens, in both orders
    p                      p                             (N,) AI label: P(y_a is the better one)
    r_φ, A                 reward, adv                   (P, G) of G samples to P prompts; (P·G, 1)
    log π_θ, π_old, π_SL   logp, rollout.logp, ref_logp  (B, T) nats

Models in memory: skills 1 (policy); SL-CAI 1, after 1 frozen model has written the revisions; PM 1,
after 2 frozen models (π_SL, judge) have answered and compared; RL-CAI 3 (policy, π_SL, PM). The
model with the skills, which is the default judge and with which win rate and KL compare, is not
counted. Data: prompts and a constitution, from which each critique and each comparison draws a
principle. After the skills, training reads no reward, and no labels but the model's own. Each phase
leaves a checkpoint beside --out.
Departures: 1. a small model cannot criticise by itself, so data/skills.py shows it how, and the
same model judges; 2. p averages both orders, as in RLAIF; 3. there is no helpfulness data;
4. SL-CAI starts from the model with the skills; 5. a leave-one-out baseline (RLOO) replaces the
learned value of RLAIF; 6. a response that did not end loses --missing-eos-penalty.

    python rlaif.py                          reviews, all phases, five minutes on a laptop
    python rlaif.py --init out/reviews/rlaif-skills.pt --beta 0.2       with skills learned before
    python rlaif.py --constitution my.txt    some of the four principles; new ones need --init
"""

import time
from dataclasses import dataclass, replace
from functools import partial

import torch.nn.functional as F

import data
import training
from data import Stopped, UserError, printable, say
from data.constitution import Dialogues, constitution, pad_dialogues
from data.skills import demonstrate
from evaluate import Evaluator
from gpt import response_scores, token_logprobs
from training import Rollout, Run, ScratchOptions, checkpoint, feedback, opt, parse
from training.reward import load_judge

KEPT = "reward win_rate kl length accuracy gold_accuracy revisions labels".split()
KEPT += "models models_asked wall_s step_ms".split()  # of each phase, in RL-CAI's record


def ai_label(ab, ba, clamp=0.0):
    """The soft label of a comparison. ab, ba: (N, 2) log-probs of the options A and B; y_a is
    option A in ab and option B in ba. Each is normalised over the two options, and the two orders
    are averaged (arXiv:2309.00267). clamp: p is kept in [clamp, 1 - clamp]; arXiv:2212.08073 does
    so after a chain of thought, with 0.4. Returns (N,) the probability that y_a is better, without
    gradient."""
    assert ab.shape == ba.shape and ab.size(1) == 2, "two (N, 2) tensors"
    p = (ab.softmax(1)[:, 0] + ba.softmax(1)[:, 1]) / 2
    return p.clamp(clamp, 1 - clamp).detach()


def bradley_terry_loss(reward_a, reward_b, p):
    """Cross-entropy with a soft label. reward_a, reward_b: (B,) scores; p: (B,) in [0, 1], the
    probability that a is preferred. Returns (B,) losses, nats, least at σ(reward_a - reward_b) = p.
    """
    assert reward_a.shape == reward_b.shape == p.shape and reward_a.dim() == 1, "three (B,) tensors"
    delta = reward_a - reward_b
    return -p * F.logsigmoid(delta) - (1 - p) * F.logsigmoid(-delta)


def leave_one_out(reward):
    """reward: (P, G), G > 1 -> (P·G,) advantages, without gradient: each reward minus the mean of
    the other rewards of its prompt."""
    G = reward.size(1)
    return ((reward - reward.mean(1, keepdim=True)) * G / (G - 1)).flatten().detach()


@dataclass
class Options(ScratchOptions):
    constitution: str = opt("", "file of one principle per line (default: data's)", file=True)
    judge: str = opt(
        "", "language model that judges (default: the one with skills)", file=True, hub="model"
    )
    save: str = opt("whole", "unused: a phase reads whole checkpoints", choices=("whole",))
    loss_every: int = opt(0, "unused: there is no held-out loss", high=0)
    clamp: float = opt(0.0, "keep labels in [clamp, 1 - clamp] (the paper: 0.4)", low=0, below=0.5)
    revisions: int = opt(2, "rounds of critique and revision, all trained on (paper: 4)", low=1)
    answers: int = opt(1024, "prompts whose answers are revised", low=1)
    comparisons: int = opt(2048, "pairs of answers that the judge labels", low=1)
    skill_steps: int = opt(900, "optimizer steps of the skills", low=1, only="init=")
    skill_lr: float = opt(4e-3, "peak learning rate of the skills", above=0, only="init=")
    sl_steps: int = opt(100, "optimizer steps of SL-CAI", low=1)
    sl_lr: float = opt(1e-3, "peak learning rate of SL-CAI", above=0)
    pm_steps: int = opt(150, "optimizer steps of the preference model", low=1)
    pm_lr: float = opt(1e-3, "peak learning rate of the preference model", above=0)
    group: int = opt(4, "G: responses per prompt of RL-CAI", low=2)
    beta: float = opt(0.05, "β: strength of the KL penalty to π_SL, 1/nats (RLAIF: 0.05)", low=0)
    missing_eos_penalty: float = opt(1.0, "what a score loses if the response did not end", low=0)
    temperature: float = opt(1.0, "of RL-CAI's samples and trained log-probs", above=0)

    def endless(self):
        return False

    def rows(self):
        n = self.batch_size * self.group
        return n, f"--batch-size {self.batch_size} × --group {self.group}"


PRESETS = {"any": dict(steps=60, lr=2e-4, save_every=50)}


def skills_loss(policy, batch):
    """A micro-batch of B dialogues -> (losses (B,), sums over the model's turns; no metrics)."""
    return -(batch.weight * token_logprobs(policy, batch)).sum(1), {}


def revision_loss(policy, batch):
    """A micro-batch of B revisions -> (losses (B,), sums over their tokens; no metrics)."""
    return -token_logprobs(policy, batch).sum(1), {}


def preference_loss(reward, batch):
    """A micro-batch of B labelled pairs -> (losses, metrics), each (B,): one entry per pair."""
    reward_a, reward_b = response_scores(reward, batch).chunk(2)
    p = batch.columns["p"].to(reward_a)
    delta = (reward_a - reward_b).detach()
    metrics = {"accuracy": (delta > 0) == (p > 0.5), "margin": delta.abs()}
    return bradley_terry_loss(reward_a, reward_b, p), metrics


def compute_loss(policy, batch, o):
    """RL-CAI's: a micro-batch of B responses -> (losses (B,), metrics (B, T))."""
    logp, entropy = token_logprobs(policy, batch, o.temperature, entropy=True)
    return -(batch.adv * logp).sum(1), {"entropy": entropy}


class Pipeline:
    """What the phases share, and which of them --resume finds complete."""

    def __init__(self, o):
        self.task = data.task(o.task, o.eval_file, o.strict)
        if self.task.outcomes:
            raise UserError(f"{o.task} has a vocabulary of its own, without words for a critique")
        self.principles = constitution(o.constitution)
        self.split = (
            "train" if data.kind(o.task) == "file" else "rest"
        )  # the skills learn from the others
        self.run, self.runs = Run("rlaif", o), {}
        self.ended = {"skills": {"models": [], "wall_s": 0.0}}  # the figures of each phase
        phases = {} if o.init else {"skills": (o.skill_steps, o.skill_lr)}
        phases |= {"sl": (o.sl_steps, o.sl_lr), "pm": (o.pm_steps, o.pm_lr)}
        for name, (steps, lr) in phases.items():
            own = replace(o, steps=steps, lr=lr, out=f"{o.out.removesuffix('.pt')}-{name}.pt")
            own.given = o.given
            self.runs[name] = Run(f"rlaif-{name}", own)
        self.runs["rl"] = self.run
        self.start = o.init or self.runs["skills"].o.out
        self.judge = None
        if o.judge:
            model, tokenizer, _ = checkpoint.load(o.judge, mapped=True)
            model = self.run.freeze(self.run.place(model, frozen=True))
            self.judge = feedback.AIJudge(model, tokenizer, self.run)

    def writer(self, run, path):
        model = run.load(path, self.task)
        return feedback.Writer(run.freeze(model), run, self.task, self.principles)

    def open(self):
        """Opens the model with the skills, from which all phases start, and prints what is cut."""
        run = self.run
        self.skilled = self.writer(run, self.start)
        self.judge = self.judge or feedback.AIJudge(self.skilled.model, run.tokenizer, run)
        self.evaluator = Evaluator(run, self.task, compared_with=self.start)
        self.prompts = run.prompts(self.split)

    def do(self, name, learn):
        """Trains a phase, unless --resume finds that it has ended. Training a phase makes the
        records and states that earlier runs left of later phases stale, so they are removed."""
        run, since = self.runs[name], time.time()
        run.figures.run_began = since
        final = run.state.past() if run.o.resume else None
        if final:
            say(f"--resume: {run.method} has ended; its checkpoint is {run.o.out}")
        else:
            final = learn(self, run)
            for later in self.runs.keys() - self.ended.keys() - {name}:
                self.runs[later].files.forget()
        earlier = final["wall_s"] - (time.time() - since)  # seconds that earlier processes took
        self.run.figures.run_began -= earlier
        self.ended[name] = final
        return final


def fit(run, model, batches, compute_loss, evaluator, pad, count, **figures):
    """The training loop of the first three phases. count(row): the weight of a row in a step's
    mean."""
    optimizer = run.adamw(model)

    for step in run.steps(batches, optimizer):
        rows = batches[step]
        weight = 1 / sum(map(count, rows))
        for micro in run.micro_batches(rows):
            batch = pad(micro, run.device)
            with run.autocast():
                losses, metrics = compute_loss(model, batch)
            run.backward((weight * losses).sum(), tokens=batch.tokens)
            run.log(metrics | {"loss": losses}, weight)
        run.update(optimizer)

    return run.finish(evaluator, model, **figures)


def learn_skills(p, run):
    """Next-token prediction on demonstrations. All turns have the same weight, whatever their
    length."""
    policy = run.create(p.task)
    run.hold(policy=policy)
    draw = partial(demonstrate, p.task, principles=p.principles)
    batches = Dialogues(draw, run.o.batch_size, run.o.seed, run.tokenizer, run.block_size)
    evaluator = Evaluator(run, p.task, compared_with="", is_reference=True)
    return fit(run, policy, batches, skills_loss, evaluator, pad_turns, lambda x: sum(x[1]))


def pad_turns(rows, device):
    ids, weight = pad_dialogues(rows, device)
    return Rollout(ids=ids, mask=weight > 0, weight=weight)


def learn_revisions(p, run):
    """SL-CAI: fine-tuning on the revisions alone, without the critiques that led to them."""
    o, what = run.o, "to criticise and revise"
    helpers = feedback.frozen_records(what, policy=p.skilled.model)
    made = p.skilled.revise(o.answers, "revisions", p.split, o.revisions)
    if not made:
        what = "answer, critique and revision, so there is nothing to learn"
        more = "another --init" if o.init else "more --skill-steps"
        remedy = f"give {more}, or more --max-new-tokens"
        raise Stopped(f"{p.start} finished no {what}; {remedy}")
    rows = [(x.prompt, x.b) for x in made]
    policy = run.load(p.start, p.task)
    run.hold(policy=policy)
    batches = run.batches(lambda n, seed: rows, fixed=len(rows))
    how = revision_loss, p.evaluator, data.pad, lambda x: len(x[1])
    return fit(run, policy, batches, *how, revisions=len(batches.rows), models_asked=helpers)


def learn_preferences(p, run):
    """The judge labels pairs of SL-CAI's answers. The preference model, which learns from these
    labels, starts from the model with the skills."""
    o, writer = run.o, p.writer(run, p.runs["sl"].o.out)
    models = {"policy": writer.model, "judge": p.judge.model}
    helpers = feedback.frozen_records("to answer and compare", **models)
    pairs = writer.pairs(o.comparisons, "comparisons", p.split)
    if not pairs:
        raise Stopped("no prompt got two different answers that ended, so none can be compared")
    labels = ai_label(*p.judge.compare(pairs), o.clamp).tolist()
    rows = [data.Graded(x.prompt, x.a, x.b, p=label) for x, label in zip(pairs, labels)]
    held_out = writer.pairs(o.eval_prompts, "held out", "test")
    evaluator = feedback.PreferenceEvaluator(run, p.task, p.judge, held_out, p.evaluator.facts)
    del writer  # only one model is in memory while it learns
    reward = run.load(p.start, p.task, scalar=True)
    run.hold(reward=reward)
    batches = run.batches(lambda n, seed: rows, fixed=len(rows))
    pad = partial(data.pad_pairs, ends=True)
    how = preference_loss, evaluator, pad, lambda x: 1
    return fit(run, reward, batches, *how, labels=len(batches.rows), models_asked=helpers)


def reinforce(p, run, figures):
    """RL-CAI: REINFORCE on the preference model's score minus β times the KL to SL-CAI's model."""
    o, prompts = run.o, p.prompts
    judge = load_judge(p.runs["pm"].o.out, run, p.task, o.missing_eos_penalty)
    policy = run.load(p.runs["sl"].o.out, p.task)
    ref = run.reference(policy)
    run.hold(policy=policy, ref=ref, reward=judge.model)
    evaluator = Evaluator(run, p.task, judge, o.reference or p.start)
    optimizer = run.adamw(policy)

    for _ in run.steps(prompts, optimizer):
        with run.clock("sample"):
            questions = next(prompts)  # P of them
            rollout = run.sample(policy, questions, prompts.longest, o.group, o.temperature)
            reward = judge.reward(questions, rollout).view(-1, o.group)  # (P, G)
        with run.clock("logprobs"):
            rollout.ref_logp = run.logprobs(ref, rollout, o.temperature)
        kl = (rollout.logp - rollout.ref_logp).sum(1).view_as(reward)
        rollout.adv = leave_one_out(reward - o.beta * kl)[:, None]  # (P·G, 1)

        with run.clock("update"):
            for batch in run.micro_batches(rollout):
                with run.autocast():
                    losses, metrics = compute_loss(policy, batch, o)
                weight = 1 / len(rollout)  # a mean over the step's responses
                run.backward((weight * losses).sum(), tokens=batch.tokens)
                run.log({"loss": losses}, weight)
                run.log(metrics, batch.mask.to(losses) / rollout.length.sum())
            run.update(optimizer)
        equal = (reward == reward[:, :1]).all(1).float().mean()
        run.log({"reward": reward.mean(), "reward_std": reward.std(1).mean(), "kl": kl.mean()})
        run.log({"frac_reward_zero_std": equal} | rollout.summary())
        run.evaluate(evaluator, policy)

    return run.finish(evaluator, policy, **figures)


def summary(p):
    """Prints the phases side by side, and one held-out answer with its critique, its revision and
    the judge's verdict."""
    keys = ("reward", "win_rate", "kl", "length", "entropy")
    print(f"{'phase':<8}" + "".join(f"{key:>10}" for key in keys) + "   models held; used before")
    for phase, f in p.ended.items():
        cells = "".join(f"{f[key]:>10.2f}" if key in f else f"{'':>10}" for key in keys)
        held, used = ([m["role"] for m in f.get(x, ())] for x in ("models", "models_asked"))
        print(f"{phase:<8}{cells}   {', '.join(held)}" + (f"; {', '.join(used)}" if used else ""))
    rows = p.skilled.revise(64, "example", "test")
    if rows:
        x = max(rows, key=lambda row: len(row.critique))
        ab, ba = p.judge.compare([x])
        print(f"\nthe longest of {len(rows)} critiques of held-out answers:\n{x.prompt}")
        texts = {"answer": x.a, "principle": x.principle, "critique": x.critique, "revision": x.b}
        for name, text in texts.items():
            print(f"  {name:>9} | {printable(text)}")
        orders = f"{ab.softmax(1)[0, 1]:.3f} as option B, {ba.softmax(1)[0, 0]:.3f} as option A"
        better = 1 - ai_label(ab, ba)[0]
        print(f"  the judge's P(the revision is better): {better:.3f} ({orders})")
    print(flush=True)


def main(argv=None):
    p = Pipeline(parse(Options, argv, PRESETS))
    if "skills" in p.runs:
        p.do("skills", learn_skills)
    p.open()
    skills = feedback.skill_figures(p.skilled, p.judge, p.run.o.eval_prompts)
    sl = p.do("sl", learn_revisions)
    p.ended["skills"] |= {x: sl[f"ref_{x}"] for x in ("reward", "length") if f"ref_{x}" in sl}
    p.do("pm", learn_preferences)
    phases = [{"phase": name} | {x: f[x] for x in KEPT if x in f} for name, f in p.ended.items()]
    p.ended["rl"] = reinforce(p, p.run, skills | {"phases": phases})
    summary(p)


if __name__ == "__main__":
    training.command(main)

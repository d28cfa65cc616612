"""Constitutional AI (arXiv:2212.08073) and RLAIF (arXiv:2309.00267): principles in place of people's labels.

    skills   L(θ) = - mean over turns of 1/|turn| Σ_t log π(y_t | x, y_<t)             demonstrations of what is asked of it below
    SL-CAI   y ~ π(·|x); critique ~ π(·|x, y, principle); y' ~ π(·|x, y, principle, critique)
             L(θ) = - Σ log π_θ(y'_t | x, y'_<t) / Σ |y'|                              on the revisions y' alone
    labels   y_a, y_b ~ π_SL(·|x);   p = ½ [P(A | x, principle, A: y_a, B: y_b) + P(B | x, principle, A: y_b, B: y_a)]
             P(A | q) = π(A|q) / (π(A|q) + π(B|q)), read from the judge's next-token probabilities, never sampled
    PM       L(φ) = - p log σ(Δ) - (1-p) log σ(-Δ),   Δ = r_φ(x, y_a) - r_φ(x, y_b)
    RL-CAI   R_i = r_φ(x, y_i) - β Σ_t log π_old/π_SL;   A_i = R_i - mean of the other R of the prompt
             L(θ) = - mean_i A_i log π_θ(y_i|x)
             --direct (d-RLAIF): no labels and no PM; r = Σ_i i P(i) of the judge's rating 1 … 9, rescaled to [-1, 1]

A principle is drawn at random from the constitution for each critique, each comparison and, with --direct, each prompt.

    paper                       code                         shape
    P(A|q), P(B|q)              ab, ba                       (N, 2) log-probs of the two option tokens, in either order
    p                           p                            (N,) AI label: the probability that y_a is the better one
    r_φ                         r                            (P, G) of G samples to each of P prompts
    A                           adv                          (P·G,)
    log π_θ, π_old, π_SL        logp, s.logp, ref_logp       (B,), (B, T-1), (B, T-1) nats

Models in memory: skills 1 (policy); critiques and revisions 1 frozen; SL-CAI 1; labels 2 frozen (π_SL, judge); PM 1; RL-CAI 3 (policy,
π_SL, PM; --direct: policy, π_SL, judge). Data: prompts and a constitution. After the first phase no reward and no label but the
model's own is read in training; the gold reward is for the figures. Each phase leaves a checkpoint beside --out. Not counted:
the model with the skills, which stays for the figures as every yardstick's reference does, and the judge once its labels are made.
The paper's: the phases, soft labels from option probabilities, a principle drawn at random. The toy's: 1. a small model cannot criticise
unasked, so it is shown how (data/skills.py), and the same model judges; 2. p averages both orders (RLAIF); 3. no
helpfulness data beside; 4. SL-CAI starts from the model with the skills; 5. a leave-one-out baseline (RLOO) for the paper's PPO.

    python rlaif.py                                            reviews, all phases, four minutes on a laptop
    python rlaif.py --init out/reviews/rlaif-skills.pt --beta 0.2          with the skills that an earlier run has learned
    python rlaif.py --init out/reviews/rlaif-skills.pt --direct            the judge's rating is the reward
    python rlaif.py --constitution my.txt                      other principles; a selection of the four, or with an --init of your own

It ends with the gold reward, the win rate and KL after each phase, and one answer criticised, revised and compared.
"""
import dataclasses
import os
import random
import time
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

import common
import data
import memory
from common import BelowHalf, Count, NonNegative, Positive, Whole
from evaluate import PROMPTS, Reward, choose_yardstick, completions, context, describe, open_checkpoint, open_or_make, printable, report
from gpt import CheckpointError, ScalarGPT, sample, save

ROWS = 128  # questions a forward pass


def ai_label(ab, ba, clamp=0.0):
    """The soft label of a comparison. ab, ba: (N, 2) log-probs of the options A and B; in ab y_a stands as A, in ba as B. Each is
    normalised over the two options, and the orders are averaged (arXiv:2309.00267). clamp: p is kept in [clamp, 1 - clamp]
    (arXiv:2212.08073, after chains of thought: 0.4). Returns (N,) the probability that y_a is better, without gradient."""
    assert ab.shape == ba.shape and ab.size(1) == 2, "two (N, 2) tensors"
    p = (ab.softmax(1)[:, 0] + ba.softmax(1)[:, 1]) / 2
    return p.clamp(clamp, 1 - clamp).detach()


def bradley_terry_loss(reward_a, reward_b, p):
    """Cross-entropy with a soft label. reward_a, reward_b: (B,) scores; p: (B,) in [0, 1], the probability that a is preferred. Returns
    (B,) losses, nats; the least is where σ(reward_a - reward_b) = p."""
    assert reward_a.shape == reward_b.shape == p.shape and reward_a.dim() == 1, "three (B,) tensors"
    delta = reward_a - reward_b
    return -p * F.logsigmoid(delta) - (1 - p) * F.logsigmoid(-delta)


def expected_rating(logp):
    """d-RLAIF's reward (arXiv:2309.00267). logp: (N, K) log-probs of the ratings 1 … K. Returns (N,): Σ i P(i), normalised over the K
    options, rescaled to [-1, 1]."""
    K = logp.size(1)
    mean = logp.softmax(1) @ torch.arange(1, K + 1, device=logp.device, dtype=logp.dtype)
    return 2 * (mean - 1) / (K - 1) - 1


def leave_one_out(reward):
    """reward: (P, G), G > 1 -> (P·G,) advantages, without gradient: each less the mean of the others to the same prompt."""
    G = reward.size(1)
    return ((reward - reward.mean(1, keepdim=True)) * G / (G - 1)).flatten().detach()


@dataclass
class Options(common.Options):
    init: str = ""  # checkpoint that can criticise, revise and compare (default: random weights, which the first phase trains)
    constitution: str = ""  # text file with a principle a line (default: data/constitution.txt)
    judge: str = ""  # checkpoint of the language model that compares, of any vocabulary (default: the one that criticises)
    direct: bool = False  # the judge's rating is the reward, without labels and preference model (d-RLAIF)
    clamp: BelowHalf = 0.0  # keep labels in [clamp, 1 - clamp] (the paper: 0.4 after a chain of thought)
    revisions: Count = 2  # rounds of critique and revision, each of the round before; all are trained on (the paper: 4)
    answers: Count = 1024  # prompts whose answers are revised
    comparisons: Count = 2048  # pairs of answers that the judge labels
    skill_steps: Count = 900  # optimizer steps of the first phase
    skill_lr: Positive = 4e-3  # its learning rate at its peak
    sl_steps: Count = 100  # optimizer steps of SL-CAI
    sl_lr: Positive = 1e-3  # its learning rate at its peak
    pm_steps: Count = 150  # optimizer steps of the preference model
    pm_lr: Positive = 1e-3  # its learning rate at its peak
    group: Count = 4  # G: responses to a prompt of RL-CAI
    beta: NonNegative = 0.05  # β: strength of the KL penalty to π_SL, 1/nats (RLAIF: 0.05)
    missing_eos_penalty: NonNegative = 1.0  # what a response that did not end loses
    temperature: Positive = 1.0  # of the samples of RL-CAI and of the log-probs that it trains
    steps: Count = 60  # rollouts of RL-CAI, each an optimizer step (default: %(default)s; of a file: one pass over its prompts)
    epochs: Whole = 0  # passes over the prompts of RL-CAI, in place of --steps
    batch_size: Count = 32  # an optimizer step: dialogues, revisions, pairs; prompts of RL-CAI
    micro_batch: Whole = 0  # rows a forward pass: less memory, the same gradient (0: all of a step's)
    lr: Positive = 2e-4  # AdamW learning rate of RL-CAI at its peak
    n_layer: Count = 4  # blocks, where weights start random
    n_head: Count = 4  # attention heads a block, where weights start random
    n_embd: Count = 128  # width, where weights start random
    block_size: Whole = 0  # longest sequence, a question and its answer, in tokens (0: the checkpoint's, or 256 at random weights)
    save_every: Count = 50  # steps between saved states
    on_predict = dict(batch_size=1)


class Judge:
    """A frozen language model that is asked multiple choice, in its own vocabulary; its answer is what it would say next."""

    def __init__(self, model, tokenizer, run):
        self.model, self.tokenizer, self.run = model, tokenizer, run

    @torch.no_grad()
    def options(self, questions, letters):
        """-> (N, len(letters)) log-probs of the option tokens, up to a constant of each question: nothing is sampled. A question that is
        too long loses its beginning."""
        weight, room = self.model.wte.weight[[self.token(letter) for letter in letters]], self.model.config.block_size
        ids, out = [data.spell(q, self.tokenizer)[0][-room:] for q in questions], [weight.new_zeros(0, len(letters)).float()]
        for i in range(0, len(ids), ROWS):
            batch = data.pad([(x, ()) for x in ids[i : i + ROWS]], self.run.device)
            with self.run.autocast():
                h = self.model.hidden(batch.ids)[torch.arange(len(batch.ids), device=batch.ids.device), batch.text.sum(1) - 1]
            out.append(batch.spread(F.linear(h.float(), weight.float())))
        return torch.cat(out)

    def token(self, letter):
        """-> the option's token as it follows "(", without a space; a letter of two tokens would be no option"""
        token, *more = self.tokenizer.encode(letter)
        if more:
            raise data.DataError(f"the judge's vocabulary spells the option {letter!r} in {1 + len(more)} tokens; give another --judge")
        return token

    def compare(self, pairs):
        """Pairs -> (ab, ba), each (N, 2): log-probs of the options A and B, with a standing as A, and with b"""
        ab = [data.ask_choice(x, a, b, principle) for x, a, b, principle, _ in pairs]
        ba = [data.ask_choice(x, b, a, principle) for x, a, b, principle, _ in pairs]
        return self.options(ab, "AB"), self.options(ba, "AB")

    def rate(self, answers):
        """answers: (prompt, answer, principle) -> (N,) expected ratings in [-1, 1]"""
        return expected_rating(self.options([data.ask_rating(*answer) for answer in answers], "123456789"))


class Pipeline:
    """What the phases share: their Runs, prompts, principles, vocabulary and yardstick, and how a model is asked."""

    def __init__(self, o):
        self.o, self.task, self.principles = o, data.task(o.task, o.eval_file, o.strict), data.constitution(o.constitution)
        self.run, self.resume, self.ended, self.began = common.Run(o, "rlaif"), o.resume, {}, time.time()
        phases = [("skills", o.skill_steps, o.skill_lr)] * (not o.init) + [("sl", o.sl_steps, o.sl_lr)]
        self.runs = {name: self.phase(name, *how) for name, *how in phases + [("pm", o.pm_steps, o.pm_lr)] * (not o.direct)}
        self.split = "train" if common.is_file(o.task) else "rest"  # prompts of which no skill was demonstrated

    def phase(self, name, steps, lr):
        """-> the Run of a phase before the last: its own steps and learning rate, its checkpoint beside --out"""
        n, out = self.o.batch_size, f"{self.o.out.removesuffix('.pt')}-{name}.pt"
        micro = min(self.o.micro_batch, n)
        o = dataclasses.replace(self.o, steps=steps, lr=lr, out=out, micro_batch=micro, group=1, epochs=0)
        o.given = self.o.given - {"epochs"} | {"steps"}
        return common.Run(o, f"rlaif-{name}")

    def do(self, name, learn, *args):
        """Trains a phase, unless --resume finds that it has ended: it goes on in the first that has not, and makes those after it anew."""
        run, self.since = self.runs[name], time.time()
        begun = os.path.exists(run.state_path)
        if self.resume and run.finished(strict=name == next(iter(self.runs))):
            run.say(f"--resume: {run.method} has ended, {run.out} is its checkpoint")
            self.began -= run.past()["wall_s"]
        else:
            if self.resume and not begun:
                run.say(f"--resume: {run.method} has not begun, so it starts afresh")
            run.o.resume, self.resume = self.resume and begun, False
            learn(self, run, run.o, *args)
            self.began -= run.past()["wall_s"] - (time.time() - self.since)
        self.ended[name] = run.past()

    def know(self, model, tokenizer, template):
        """Takes over the vocabulary, template and context of the model that all phases start from."""
        o, self.tokenizer, self.task.template, self.block_size = self.o, tokenizer, template, context(self.o, model)
        self.yardstick = self.measuring()
        self.longest, limit = self.yardstick.max_new_tokens, self.block_size - self.yardstick.max_new_tokens
        self.rollouts = data.Prompts(self.task, o.batch_size, o.seed, tokenizer, limit, o.truncate, split=self.split)

    def measuring(self, reward=None):
        o = self.o
        return choose_yardstick(self.run, self.task, self.tokenizer, self.block_size, o.max_new_tokens, o.truncate, "none", reward=reward)

    def save(self, run, model, **meta):
        save(model, run.out, **run.facts(), tokenizer=self.tokenizer.meta, template=self.task.template, implicit="none",
             max_new_tokens=self.longest, **meta)  # fmt: skip

    def prompts(self, n, seed, split):
        """-> n rows (prompt, columns), a generator of principles and one of samples, all of them functions of the seed"""
        rng = random.Random(f"rlaif {self.o.seed} {seed}")
        return self.task.prompts(n, f"{self.o.seed} {seed}", split), rng, torch.Generator().manual_seed(rng.getrandbits(62))

    def ask(self, model, questions, generator):
        """One turn of the model's in reply to each question, drawn at temperature 1 -> (texts, whether each has ended). A question that
        leaves no room loses its beginning, and the reply does not count as ended."""
        texts, ended, room = [], [], self.block_size - self.longest
        ids = [data.spell(question, self.tokenizer)[0] for question in questions]
        for i in range(0, len(ids), ROWS):
            part = ids[i : i + ROWS]
            with self.run.autocast():
                s = sample(model, [x[-room:] for x in part], self.longest, self.tokenizer.end_id, generator=generator)
            texts += completions(self.tokenizer, s)
            ended += [end and len(x) <= room for x, end in zip(part, s.finished.tolist())]
        return texts, ended

    def revise(self, model, n, seed, split, rounds=1):
        """The model answers n prompts, criticises each answer under a principle and revises it, then the revision, for some rounds.
        -> a data.Revision for each prompt and round, but for those that did not end"""
        rows, rng, generator = self.prompts(n, seed, split)
        out, (answers, whole) = [], self.ask(model, [[x] for x, _ in rows], generator)
        for _ in range(rounds):
            asked = [(x, y, rng.choice(self.principles)) for (x, _), y in zip(rows, answers)]
            critiques, ended = self.ask(model, [data.ask_critique(*one) for one in asked], generator)
            revised, ends = self.ask(model, [data.ask_revision(*one, c) for one, c in zip(asked, critiques)], generator)
            whole = [all(three) for three in zip(whole, ended, ends)]
            made = [data.Revision(*one, c, y, columns) for one, c, y, (_, columns) in zip(asked, critiques, revised, rows)]
            out += [revision for revision, good in zip(made, whole) if good]
            answers = revised
        return out

    def pairs(self, model, n, seed, split):
        """-> a data.Pair of the model's answers to each of n prompts, but for those that are equal or did not end"""
        rows, rng, generator = self.prompts(n, seed, split)
        texts, ended = self.ask(model, [[x] for x, _ in rows for _ in "ab"], generator)
        found = [data.Pair(x, a, b, rng.choice(self.principles), columns) for (x, columns), a, b in zip(rows, texts[::2], texts[1::2])]
        return [pair for pair, both in zip(found, zip(ended[::2], ended[1::2])) if all(both) and pair.a != pair.b]


# ------------------------------------------------------------------------------------------------ the phases


def learn_skills(p, run, o):
    """Next-token prediction on demonstrations of all skills, the answers that are spoken of among them. Each turn weighs the same, a
    verdict of one letter as much as a review."""
    policy, *known = open_or_make(o, p.task)
    p.know(policy, *known)
    draw = partial(data.demonstrate, p.task, principles=p.principles)
    batches = data.Dialogues(draw, o.batch_size, o.seed, p.tokenizer, p.block_size)
    policy = run.prepare(policy)
    policy.checkpoint_activations = o.checkpoint_activations
    optimizer = common.adamw(policy, o)
    run.begin(memory.Ledger(policy=policy), batches, policy=policy, optimizer=optimizer)

    for step in run.steps():
        rows = batches[step]
        turns = run.total(sum(sum(weight) for _, weight in rows))
        for micro in run.micro_batches(rows):
            ids, weight = data.pad_dialogues(micro, run.device)
            with run.autocast():
                logp = policy.logprobs(ids, weight > 0)  # (B, T-1)
            loss = -(weight[:, 1:] * logp).sum() / turns
            loss.backward()
            run.tokens += sum(len(ids) for ids, _ in micro)
            run.add({"loss": loss})
        run.update(step, policy, optimizer)

    p.save(run, policy, reference="", reward=None)
    run.finish({}, forward={"policy": 1}, backward={"policy": 1})


def learn_revisions(p, run, o, start, path):
    """SL-CAI: fine-tuning on the revisions. The answers, principles and critiques that led to them are not seen."""
    asked = memory.Ledger(policy=start)
    run.say(f"{o.answers} answers are criticised and revised, {o.revisions} times each\n{asked.text()}")
    rows = [(row.prompt, row.revised) for row in p.revise(start, o.answers, "revisions", p.split, o.revisions)]
    if not rows:
        raise common.Stopped(f"{path} ended no answer, critique and revision within {p.longest} tokens each, so there is nothing to learn: "
                             "it needs more --skill-steps, or more --max-new-tokens")  # fmt: skip
    batches = data.Batches(lambda n, seed: rows, None, o.batch_size, o.seed, p.tokenizer, p.block_size, o.truncate)
    policy = run.prepare(open_checkpoint(path)[0])
    policy.checkpoint_activations = o.checkpoint_activations
    optimizer = common.adamw(policy, o)
    run.begin(memory.Ledger(policy=policy), batches, policy=policy, optimizer=optimizer)
    run.wall = p.since  # its seconds are those of the revisions too

    for step in run.steps():
        rows = batches[step]
        n = run.total(sum(len(y) for _, y in rows))  # response tokens of the whole step
        for micro in run.micro_batches(rows):
            batch = data.pad(micro, run.device)
            with run.autocast():
                logp = policy.logprobs(batch.ids, batch.mask, index=batch.index)  # (B, T-1)
            loss = -batch.spread(logp.sum(1)).sum() / n
            loss.backward()
            run.tokens += batch.tokens
            run.add({"loss": loss})
        run.update(step, policy, optimizer)

    final, _ = p.yardstick.measure(policy, start)
    p.save(run, policy, reference=path, reward=final.get("reward"))
    run.finish(final | {"revisions": len(batches.rows), "models_asked": asked.records()}, forward={"policy": 1}, backward={"policy": 1})


def learn_preferences(p, run, o, start, path, judge):
    """The judge labels pairs of SL-CAI's answers, and the preference model, which starts from the skills, learns its probabilities."""
    writer = run.frozen(run.prepare(open_checkpoint(p.runs["sl"].out)[0]))
    asked = memory.Ledger(policy=writer, judge=judge.model)
    run.say(f"{o.comparisons} pairs of answers are compared\n{asked.text()}")
    pairs = p.pairs(writer, o.comparisons, "comparisons", p.split)
    if not pairs:
        raise common.Stopped(f"{run.method}: no two answers to a prompt differed and ended, so there is nothing to compare")
    labels = ai_label(*judge.compare(pairs), o.clamp).tolist()
    rows = [(pair.prompt, pair.a, pair.b, label) for pair, label in zip(pairs, labels)]
    batches = data.Batches(lambda n, seed: rows, None, o.batch_size, o.seed, p.tokenizer, p.block_size, o.truncate)
    model = run.prepare(ScalarGPT(start.config, o.seed, trunk=open_checkpoint(path)[0]))
    model.trunk.checkpoint_activations = o.checkpoint_activations
    optimizer = common.adamw(model, o)
    run.begin(memory.Ledger(reward=model), batches, model=model, optimizer=optimizer)
    run.wall = p.since

    for step in run.steps():
        rows = batches[step]
        n = run.total(len(rows))
        for micro in run.micro_batches(rows):
            batch = data.pad(data.sides(micro), run.device)
            with run.autocast():
                reward_a, reward_b = batch.spread(model.score(batch.ids, batch.mask)).chunk(2)  # (B,) each
            label = torch.tensor([row[3] for row in micro], dtype=reward_a.dtype, device=run.device)
            loss = bradley_terry_loss(reward_a, reward_b, label).sum() / n  # mean over the step's pairs
            loss.backward()
            delta = (reward_a - reward_b).detach()
            run.tokens += batch.tokens
            run.add({"loss": loss, "accuracy": ((delta > 0) == (label > 0.5)).sum() / n, "margin": delta.abs().sum() / n})
        run.update(step, model, optimizer)

    p.save(run, model, reference=path, reward=None)
    final = preference_figures(p, model, judge, p.pairs(writer, PROMPTS, "held out", "test"))
    final |= {"labels": len(batches.rows), "models_asked": asked.records()}
    run.finish(final, forward={"reward": 1}, backward={"reward": 1})


def reinforce(p, start, path, judge):
    """RL-CAI: REINFORCE on the preference model's score, less the KL to SL-CAI, against the mean of the other answers to the prompt."""
    run, o, tokenizer, longest, prompts = p.run, p.o, p.tokenizer, p.longest, p.rollouts
    o.resume = p.resume
    policy = run.prepare(open_checkpoint(path if o.predict else p.runs["sl"].out, o, p.task)[0])
    policy.checkpoint_activations = o.checkpoint_activations
    ref = run.frozen(policy)
    pm = None if o.direct else Reward(run, p.task, "rm").open(tokenizer, p.runs["pm"].out, p.block_size)
    yardstick = p.measuring(pm)
    held = memory.Ledger(policy=policy, ref=ref, **({"judge": judge.model} if o.direct else {"reward": pm.model}))
    optimizer = common.adamw(policy, o)
    run.begin(held, prompts, policy=policy, optimizer=optimizer, prompts=prompts)
    run.wall = p.began  # its seconds are those of all phases

    for step in run.steps():
        with run.clock("sample"):
            batch = next(prompts)
            with run.autocast():
                s = sample(policy, [ids for ids, *_ in batch], longest, tokenizer.end_id, o.temperature, prompts.generator, o.group)
            prompts.sampled += int(s.mask.sum())
            if o.direct:
                drawn = torch.randint(len(p.principles), (len(batch),), generator=prompts.generator).tolist()
                asked = [(x, p.principles[i]) for (_, x, _), i in zip(batch, drawn) for _ in range(o.group)]
                r = judge.rate([(x, y, principle) for (x, principle), y in zip(asked, completions(tokenizer, s))])
            else:
                r = pm(batch, s)
            r = (r - o.missing_eos_penalty * ~s.finished).view(-1, o.group)  # (P, G)
        with run.clock("logprobs"):
            ref_logp = run.whole(s, lambda ids, mask: ref.logprobs(ids, mask, o.temperature))
        kl = (s.logp - ref_logp).sum(1)  # (P·G,)
        adv = leave_one_out(r - o.beta * kl.view_as(r))
        run.tokens += int(s.stop.sum())
        n, tokens = run.total(len(adv)), run.total(s.mask.sum())

        with run.clock("update"):
            for rows in run.micro_batches(torch.arange(len(adv))):
                ids, mask, *_ = s.take(rows)
                with run.autocast():
                    logp, entropy = policy.logprobs(ids, mask, o.temperature, entropy=True)
                loss = -(adv[rows] * logp.sum(1)).sum() / n  # mean over the step's responses
                loss.backward()
                run.add({"loss": loss, "entropy": entropy.sum() / tokens})
            run.update(step, policy, optimizer)
        run.add({"reward": r.mean(), "reward_std": r.std(1).mean(), "frac_reward_zero_std": (r == r[:, :1]).all(1).float().mean(),
                 "kl": kl.mean(), "completions/mean_length": s.mask.sum(1).float().mean(),
                 "completions/clipped_ratio": 1 - s.finished.float().mean(), "sampled_tokens": prompts.sampled})  # fmt: skip
        if o.eval_every and (step + 1) % o.eval_every == 0:
            run.evaluated(step, yardstick.measure(policy, start, n=128)[0])

    final, samples = yardstick.measure(policy, start)
    p.save(run, policy, reference=path, reward=final.get("reward"))
    report(f"{run.method} on {o.task}", final, samples, p.task.bound)
    return final | {"sampled_tokens": prompts.sampled}, {"policy": 2, "ref": 1, "reward": 1, "judge": 1}, {"policy": 1}


# ------------------------------------------------------------------------------------------------ the figures


def label_figures(p, pairs, ab, ba):
    return data.label_figures(p.task, pairs, ai_label(ab, ba), ab.softmax(1)[:, 0], ba.softmax(1)[:, 1])


def preference_figures(p, model, judge, pairs):
    """-> what the labels of held-out pairs are worth, and how often the preference model agrees with them and with the gold reward"""
    rows, _ = data.encode([pair[:3] for pair in pairs], p.tokenizer, p.block_size, truncate=True) if pairs else ([], "")
    if len(rows) < len(pairs) or not pairs:
        return {}
    ab, ba = judge.compare(pairs)
    with torch.no_grad(), p.run.autocast():
        batches = [data.pad(data.sides(rows[i : i + ROWS]), p.run.device) for i in range(0, len(rows), ROWS)]
        a_wins = torch.cat([torch.gt(*batch.spread(model.score(batch.ids, batch.mask)).chunk(2)) for batch in batches])
    gold = data.gold_agreement(p.task, pairs, a_wins)
    accuracy = (a_wins == (ai_label(ab, ba) > 0.5)).float().mean().item()
    return label_figures(p, pairs, ab, ba) | {"accuracy": accuracy} | ({} if gold is None else {"gold_accuracy": gold})


def skill_figures(p, start, judge):
    """Measures and prints, on held-out prompts, how well the model criticises and revises, and how well the judge compares. -> figures"""
    pairs, revisions = p.pairs(start, PROMPTS, "skills", "test"), p.revise(start, PROMPTS, "skills", "test")
    ab, ba = judge.compare(pairs)
    figures = label_figures(p, pairs, ab, ba) | data.revision_figures(p.task, revisions)
    p.run.say(data.skills_text(p.task, pairs, ai_label(ab, ba), revisions, figures))
    return figures


NAMES = {"skills": "skills SFT", "sl": "SL-CAI", "pm": "PM", "rl": "RL-CAI"}


def summary(p, start, judge, final):
    """Prints the phases side by side, and one held-out answer, criticised, revised and compared."""
    columns = (("gold reward", "reward"), ("win rate", "win_rate"), ("KL, nats", "kl"), ("length", "length"), ("entropy", "entropy"))
    print(f"{'phase':<12}" + "".join(f"{name:>12}" for name, _ in columns) + "   models held (* trained)")
    for phase, f in (p.ended | {"rl": final | {"models": p.run.models}}).items():
        cells = "".join(f"{format(f[key], '.2f') if key in f else '':>12}" for _, key in columns)
        models, asked = (", ".join(m["role"] + "*" * m["trainable"] for m in f.get(key, ())) for key in ("models", "models_asked"))
        print(f"{NAMES[phase]:<12}{cells}   {models}" + f"; before: {asked}" * bool(asked))
    rows = p.revise(start, 64, "example", "test")
    if rows:
        r = max(rows, key=lambda row: len(row.critique))
        ab, ba = judge.compare([data.Pair(r.prompt, r.answer, r.revised, r.principle, {})])
        print(f"\nof {len(rows)} held-out answers the one with the longest critique:\n{r.prompt}")
        for name, text in (("answer", r.answer), ("principle", r.principle), ("critique", r.critique), ("revision", r.revised)):
            print(f"  {name:>9} | {printable(text)}")
        print(f"  the judge: the revision is better with probability {1 - ai_label(ab, ba)[0]:.3f} "
              f"({ab.softmax(1)[0, 1]:.3f} where it stands as B, {ba.softmax(1)[0, 0]:.3f} as A)")  # fmt: skip
    print(flush=True)


@common.command(CheckpointError, data.DataError)
def main(argv=None):
    o = common.parse(Options, argv)
    if o.direct and (unread := sorted(o.given & {"comparisons", "clamp", "pm_steps", "pm_lr"})):
        raise common.UserError(f"--{unread[0].replace('_', '-')}: with --direct there are no labels and no preference model; leave one out")
    if common.is_exact(o.task):
        raise common.UserError(f"--task {o.task} has a vocabulary of its own, in which nothing can be asked; give --task reviews")
    if o.init and (unread := sorted(o.given & {"skill_steps", "skill_lr", "n_layer", "n_head", "n_embd"})) and not o.predict:
        raise common.UserError(f"--{unread[0].replace('_', '-')} shapes the first phase, in whose place --init stands; leave one out")
    if o.group == 1:
        raise common.UserError("--group 1: a response is compared with the others to the same prompt; give at least 2")
    p, judge = Pipeline(o), None
    if o.judge and not o.predict:
        model, vocabulary, _ = open_checkpoint(o.judge)
        judge = Judge(p.run.frozen(p.run.prepare(model)), vocabulary, p.run)
        judge.compare([data.Pair("", "", "", p.principles[0], {})])  # one that cannot answer is told before the training
    path = o.init or p.runs["skills"].out
    if o.predict:
        o.init = path
    elif not o.init:
        p.do("skills", learn_skills)
    start, tokenizer, meta = open_checkpoint(path, o, p.task)
    p.run.say(f"\nall phases start from {path}: {describe(meta)}")
    p.know(start, tokenizer, meta["template"])
    for note in filter(None, [*p.task.notes, p.rollouts.note, *p.yardstick.notes]):
        p.run.say(note)
    start = p.run.frozen(p.run.prepare(start))
    judge = judge or Judge(start, tokenizer, p.run)
    if not o.predict:
        skills = skill_figures(p, start, judge)
        p.ended.setdefault("skills", {"models": [], "wall_s": 0.0})
        p.do("sl", learn_revisions, start, path)
        if not o.direct:
            p.do("pm", learn_preferences, start, path, judge)
    final, forward, backward = reinforce(p, start, path, judge)
    p.ended["skills"] |= {key: final[f"ref_{key}"] for key in ("reward", "length") if f"ref_{key}" in final}
    summary(p, start, judge, final)
    kept = ("reward", "win_rate", "kl", "length", "models", "models_asked", "wall_s", "step_ms", "accuracy", "gold_accuracy",
            "revisions", "labels")
    phases = [{"phase": name} | {key: f[key] for key in kept if key in f} for name, f in p.ended.items()]
    p.run.finish(final | skills | {"phases": phases}, forward, backward)


if __name__ == "__main__":
    main()

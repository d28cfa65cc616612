"""Reward model: one number for a response, learned from preferences by Bradley–Terry (InstructGPT, arXiv:2203.02155).

    P(y_w ≻ y_l | x) = σ(r_θ(x, y_w) - r_θ(x, y_l))
    L(θ) = - p log σ(Δ - m) - (1-p) log σ(m - Δ),    Δ = r_θ(x, y_w) - r_θ(x, y_l)

    paper         code                      shape
    y_w, y_l      chosen, rejected          responses with their end tokens
    r_θ(x, y)     reward_w, reward_l        (B,) the scalar head at the end token (of a cut answer, at its last token)
    m             margin                    (B,) column `margin`, 0 without one (Llama 2, arXiv:2307.09288)
    p             p                         (B,) column `p`, probability that chosen is better, 1 without one (soft labels)
    η             center_rewards            weight of (r_w + r_l)², which keeps scores near 0 (arXiv:2312.09244)

The trunk starts from the SFT checkpoint, the head's weights at a standard deviation of 1/√(width+1). After the training the
scores are shifted so that demonstrations average 0; only differences were learned, so that nothing else changes.

Models in memory: 1 (the reward model, trained). Data: (prompt, chosen, rejected).
Departures from the paper: 1. single pairs, not all pairs of 4 to 9 ranked answers; 2. a learning rate for toy models.

    python reward_model.py                                     reviews; makes out/reviews/sft.pt first where it is missing
    python reward_model.py --task exact                        how far its scores are from the known reward
    python reward_model.py --task my.jsonl.gz --init out/my/sft.pt        rows of {"prompt", "chosen", "rejected"}

It ends with the accuracy on held-out pairs beside what the labels' noise allows, and scores of two pairs to look at.
"""
import statistics
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

import common
import data
import memory
from common import Count, NonNegative, Positive, Whole
from evaluate import context, describe, open_checkpoint, printable
from gpt import CheckpointError, ScalarGPT, save


def bradley_terry_loss(reward_w, reward_l, margin=0.0, p=1.0):
    """Negative log-likelihood of a preference. reward_w, reward_l: (B,) scores, whose differences are log-odds. margin: () or (B,),
    by how much w should win. p: () or (B,) in [0, 1], the probability that w is preferred. Returns (B,) losses, nats."""
    assert reward_w.shape == reward_l.shape and reward_w.dim() == 1, "two (B,) tensors"
    delta = reward_w - reward_l - margin
    return -p * F.logsigmoid(delta) - (1 - p) * F.logsigmoid(-delta)


@dataclass
class Options(common.Options):
    center_rewards: NonNegative = 0.0  # η, weight of (r_w + r_l)² in the loss (TRL: 0.01)
    steps: Count = 300  # optimizer steps (default: %(default)s; of a file: one epoch)
    batch_size: Count = 32  # pairs an optimizer step
    pairs: Whole = 0  # size of the fixed set of preference pairs (0: fresh ones every step; of a file: all)
    lr: Positive = 1e-3  # AdamW learning rate at its peak; large models take 1e-6 to 1e-5
    max_new_tokens: Whole = 0  # refused: nothing is sampled here
    on_exact = dict(steps=1000, batch_size=4096, lr=2e-3, lr_schedule="linear")
    on_predict = dict(batch_size=2)


class HeldOut:
    """Held-out pairs, encoded before the training so that what does not fit is told then. On `exact` also every outcome."""

    def __init__(self, run, task, tokenizer, block_size, truncate, seed, n=2048):
        self.run, self.task, self.tokenizer = run, task, tokenizer
        self.texts = task.preferences(n, seed, split="test", graded=True)
        self.pairs, note = data.encode(self.texts, tokenizer, block_size, truncate)
        self.note = note and f"held out: {note}"
        self.gold = not common.is_file(task.name) and not note  # a cut answer was never judged
        if common.is_exact(task.name):
            self.world, _ = data.encode(task.rows, tokenizer, block_size)

    def measure(self, model, n=None):
        """-> the figures of the first n pairs; gold figures where the task knows its reward."""
        pairs = self.pairs[:n]
        reward = scores(model, data.sides(pairs), self.run)
        delta, p = torch.sub(*reward.chunk(2)), torch.tensor([pair[4] for pair in pairs], dtype=reward.dtype)
        figures = {"accuracy": torch.where(delta > 0, p, torch.where(delta < 0, 1 - p, 0.0)).mean(), "margin": delta.mean(),
                   "mean_reward": reward.mean(), "min_reward": reward.min(), "max_reward": reward.max()}  # fmt: skip
        if self.gold:
            agree = [self.task.preferred(*text[:3], {}) for text in self.texts[:n]]
            figures["accuracy_bound"] = statistics.fmean(max(p, 1 - p) for p in agree)
            figures["accuracy_bound_se"] = sum(p * (1 - p) for p in agree) ** 0.5 / len(agree)
        if common.is_exact(self.task.name):
            error = scores(model, self.world, self.run).double().view(self.task.r.shape) - torch.from_numpy(self.task.r)
            d = torch.from_numpy(self.task.d)
            error = error - (d * error).sum(1, keepdim=True)  # up to a constant a prompt
            figures["rms"] = (d * error**2).sum(1).mean().sqrt()
        elif self.gold:  # of one prompt's pairs alone, as on exact, a correlation over all prompts would say nothing
            gold = torch.tensor([self.task.reward(x, y) for x, y in data.sides(self.texts[:n])], dtype=reward.dtype)
            figures["correlation"] = torch.corrcoef(torch.stack([reward, gold]))[0, 1]
        return {k: float(x) for k, x in figures.items()} | {"pairs": len(pairs)}

    def report(self, title, f, model):
        bound = f" (the labels' noise allows {f['accuracy_bound']:.3f} ± {f['accuracy_bound_se']:.3f})" if "accuracy_bound" in f else ""
        rows = [
            ("held-out preference accuracy", "accuracy", bound),
            ("margin, chosen - rejected", "margin", ""), ("score, mean", "mean_reward", ""), ("  least", "min_reward", ""),
            ("  greatest", "max_reward", ""), ("correlation with the gold reward", "correlation", ""),
            ("rms distance to r, by d(y|x)", "rms", ""),
        ]  # fmt: skip
        print(f"\n{title}: {f['pairs']} held-out pairs")
        for name, key, note in rows:
            if key in f:
                print(f"{name:<34}{f[key]:>10.3f}{note}")
        for prompt, *answers in [pair[:3] for pair in self.pairs[:2]]:
            print("\n" + self.tokenizer.decode(prompt)[-400:])
            for name, y, score in zip(("chosen", "rejected"), answers, scores(model, [(prompt, y) for y in answers], self.run).tolist()):
                print(f"  {name:>8} {score:6.2f} | " + printable(self.tokenizer.decode(y)).replace("\n", "\n" + " " * 18 + "| "))
        print(flush=True)


@torch.no_grad()
def scores(model, rows, run):
    """(prompt ids, response ids) rows -> (len(rows),) scores, on the CPU"""
    out = []
    for i in range(0, len(rows), 512):
        batch = data.pad(rows[i : i + 512], run.device)
        with run.autocast():
            out.append(batch.spread(model.score(batch.ids, batch.mask)).cpu())
    return torch.cat(out)


@common.command(CheckpointError, data.DataError)
def main(argv=None):
    o = common.parse(Options, argv)
    task, fixed = data.task(o.task, o.eval_file, o.strict), o.pairs or (None if common.is_file(o.task) else 0)
    run = common.Run(o, "reward_model")
    if o.max_new_tokens:
        raise common.UserError("--max-new-tokens: a reward model samples nothing; leave it out")
    init = o.init or common.stage("sft.py", o)
    start, tokenizer, meta = open_checkpoint(init, o, task)
    run.say(f"the trunk starts from {init}: {describe(meta)}")
    task.template, block_size = meta["template"], context(o, start)
    batches = data.Batches(partial(task.preferences, graded=True), fixed, o.batch_size, o.seed, tokenizer, block_size, o.truncate)
    held_out = HeldOut(run, task, tokenizer, block_size, o.truncate, o.seed)
    demonstrations, _ = data.encode(task.demonstrations(1024, o.seed), tokenizer, block_size, o.truncate)
    for note in filter(None, [*task.notes, batches.note, held_out.note]):
        run.say(note)

    model = run.prepare(ScalarGPT(start.config, o.seed, trunk=start))
    model.trunk.checkpoint_activations = o.checkpoint_activations
    optimizer = common.adamw(model, o)
    run.begin(memory.Ledger(reward=model), batches, model=model, optimizer=optimizer)

    for step in run.steps():
        pairs = batches[step]
        n, extremes = run.total(len(pairs)), []
        for micro in run.micro_batches(pairs):
            batch = data.pad(data.sides(micro), run.device)
            with run.autocast():
                reward = batch.spread(model.score(batch.ids, batch.mask))  # (2B,)
            reward_w, reward_l = reward.chunk(2)
            margin, p = torch.tensor([row[3:] for row in micro], dtype=reward.dtype, device=run.device).unbind(1)
            losses = bradley_terry_loss(reward_w, reward_l, margin, p) + o.center_rewards * (reward_w + reward_l) ** 2
            loss = losses.sum() / n  # mean over the step's pairs
            loss.backward()

            reward, delta = reward.detach(), (reward_w - reward_l).detach()
            extremes += [reward.min(), reward.max()]
            run.tokens += batch.tokens
            run.add({"loss": loss, "accuracy": (delta > 0).sum() / n, "margin": delta.sum() / n, "mean_reward": reward.sum() / (2 * n)})
        run.add({"min_reward": min(extremes), "max_reward": max(extremes)})
        run.update(step, model, optimizer)
        if o.eval_every and (step + 1) % o.eval_every == 0:
            run.evaluated(step, held_out.measure(model, n=128))

    shift = scores(model, demonstrations, run).mean().item()
    with torch.no_grad():
        model.head.bias -= shift
    final = held_out.measure(model) | {"shift": shift}
    save(model, o.out, **run.facts(), tokenizer=tokenizer.meta, template=task.template, reference=init, shift=shift, reward=None)
    held_out.report(f"reward_model on {o.task}", final, model)
    run.finish(final, forward={"reward": 1}, backward={"reward": 1})


if __name__ == "__main__":
    main()

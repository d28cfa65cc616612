"""Measures a checkpoint on held-out prompts. Every script does so at its end; as a command:

    python evaluate.py out/reviews/dpo.pt              the same figures and samples again
    python evaluate.py out/reviews/dpo.pt --prompt "A drama, The Last Road:"
    python evaluate.py out/reviews/dpo.pt out/reviews/kto.pt     compared with another checkpoint

For each test prompt the policy samples one response (at temperature 1, from all tokens, with a
fixed seed), and so does the reference π_ref, the checkpoint that the method started from:

    reward       mean reward of the responses; ref_reward: of the reference's
    score        mean score of the reward model that the method was trained with; ref_score
    win_rate     share of prompts for which the policy has the higher reward; a tie counts ½
    kl           KL(π‖π_ref) per response, nats: mean of Σ_t log π/π_ref over the policy's samples
    length       tokens per response, the end token included; ended: the share that has one
    entropy      of the next-token distribution, mean over response tokens, nats
    accuracy     if no reward is known: share of held-out pairs whose chosen answer it prefers
    nll          if no reward is known, after SFT: nats per token of the held-out answers

On `exact` nothing is sampled. Each figure is a sum over all outcomes, and the policy is also
compared with the optimum π* ∝ π_ref exp(r/β):

    objective    J = E_π[r] - β KL(π‖π_ref), which π* maximises: J(π*) - J(π) = β KL(π‖π*)
    kl_star      KL(π‖π*), nats; tv_star: half of Σ |π - π*|; means over prompts

In these figures the π_ref of an SFT checkpoint is the checkpoint itself, whatever kl and win_rate
compare it with.
"""

import importlib
import os
import shutil
import statistics
import textwrap
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import torch
from tqdm import tqdm

import data
import training
from data import UserError, printable, say
from training import checkpoint, opt, parse
from training.held_out import share_error
from training.judge import Judge, completions
from training.options import flag

ROWS = 128  # sequences per forward pass


class Evaluator:
    """Measures a policy on held-out prompts, beside another model.

    judge: the judge that the method was trained with. compared_with: a frozen model, or the path of
    a checkpoint, which is in memory only while it is used; if None, the reference that the run
    holds, or else the checkpoint that the run starts from. held_out: computes the method's own loss
    on held-out rows, if no reward is known. is_reference: later stages call this policy π_ref.
    Prompts that do not fit are reported when an Evaluator is made, before training begins."""

    def __init__(
        self, run, task, judge=None, compared_with=None, held_out=None, is_reference=False
    ):
        self.run, self.task, self.judge = run, task, judge
        self.held_out, self.is_reference = held_out, is_reference
        held = run.models.get("ref", run.baseline)
        self.compared_with = held if compared_with is None else compared_with
        self.longest = task.longest(run.o.max_new_tokens, run.block_size)
        self.judges = {"reward": Judge(run, task, task.reward)} if task.has_reward else {}
        self.judges |= {judge.name: judge} if judge else {}
        self.shown = []  # what `report` prints below the figures
        self.world, self.prompts, self.rows = None, [], []
        if task.outcomes:
            from training.enumeration import Enumeration

            self.world = Enumeration(run, task)
            return
        o, limit = run.o, run.block_size - self.longest
        prompts = task.prompts(o.eval_prompts, o.seed, split="test")
        rows, note = data.encode_prompts(prompts, run.tokenizer, limit, o.truncate)
        say(note)
        self.prompts = list(rows)
        if held_out and not task.has_reward:
            self.rows = held_out.encode(run)

    @torch.no_grad()
    def measure(self, policy, prompts=0):
        """-> the figures of this file's docstring, on the first `prompts` prompts (0: on all)"""
        ref = self._reference()
        if self.world:
            figures, self.shown = self.world.measure(policy, ref, self.is_reference, not prompts)
            return figures
        figures = self._sample(policy, ref, prompts or len(self.prompts))
        if not prompts:
            self.shown = self._examples({"reference": ref, "policy": policy})
        del ref
        self.run.placement.collect_garbage()
        return figures

    def held_out_figures(self, policy):
        """-> only the figures of the held-out rows, which need no samples"""
        self.rows = self.rows or self.held_out.encode(self.run)
        ref = self._reference() if self.held_out.with_ref else None
        return self.held_out.measure(self.run, self.rows, policy, ref)

    def _reference(self):
        """-> the model to compare with, or None. If only its path is known, it is opened."""
        ref = self.compared_with
        if isinstance(ref, str):
            return self.run.open(ref) if ref else None
        return ref

    def facts(self, figures):
        """-> what the checkpoint keeps, so that evaluate.py can measure it again"""
        named = isinstance(self.compared_with, str) and not self.is_reference
        return {
            "template": self.task.template,
            "reference": self.compared_with if named else self.run.baseline,
            "max_new_tokens": self.longest,
            "held_out": self.held_out is not None,
            "reward": figures.get("reward"),
        }

    # ---- by sampling

    def _sample(self, policy, ref, n):
        seed = self.run.o.seed
        mine = self._respond(policy, n, seed, (policy, ref))
        figures = {name: statistics.fmean(x) for name, x in mine.earned.items()}
        for name, x in mine.earned.items():
            if len(x) > 1:
                figures[f"{name}_se"] = standard_error(x)
        theirs = None
        if ref is not None:
            theirs = self._respond(ref, n, seed + 1_000_003)
            figures["ref_length"] = theirs.tokens / len(theirs.texts)
            figures |= {f"ref_{name}": statistics.fmean(x) for name, x in theirs.earned.items()}
            if "reward" in figures:
                both = zip(mine.earned["reward"], theirs.earned["reward"])
                won = [(a > b) + 0.5 * (a == b) for a, b in both]
                figures |= {"win_rate": statistics.fmean(won), "win_rate_se": standard_error(won)}
            ratio = torch.cat(mine.log_ratio)
            figures["kl"] = ratio.mean().item()
            if len(ratio) > 1:
                figures["kl_se"] = (ratio.std() / len(ratio) ** 0.5).item()
        figures |= self.held_out.measure(self.run, self.rows, policy, ref) if self.rows else {}
        figures |= {"length": mine.tokens / len(mine.texts), "ended": statistics.fmean(mine.ended)}
        figures |= {"entropy": mine.entropy / mine.tokens, "prompts": len(mine.texts)}
        figures["sampling_difference"] = mine.difference
        return figures

    def _respond(self, model, n, seed, scored_by=None):
        """Samples one response to each of the first n prompts. -> texts, ended, tokens, rewards by
        name, and with scored_by = (policy, ref) log-ratios and entropies"""
        generator = torch.Generator().manual_seed(seed)
        found = SimpleNamespace(texts=[], ended=[], tokens=0, log_ratio=[], entropy=0.0)
        found.difference = 0.0
        found.earned = {name: [] for name in self.judges}
        prompts = self.prompts[:n]
        with tqdm(total=len(prompts), desc="answers", delay=2, leave=False, disable=None) as bar:
            for questions in [prompts[i : i + ROWS] for i in range(0, len(prompts), ROWS)]:
                rollout = self.run.sample(model, questions, self.longest, generator=generator)
                if scored_by:
                    score = partial(log_ratio_and_entropy, *scored_by)
                    log_ratio, entropy, difference = self.run.scores(rollout, score, ROWS).T
                    found.log_ratio.append(log_ratio)
                    found.entropy += entropy.sum().item()
                    found.difference = max(found.difference, difference.max().item())
                found.texts += completions(self.run.tokenizer, rollout)
                for name, judge in self.judges.items():
                    found.earned[name] += judge(questions, rollout).tolist()
                found.ended += rollout.finished.tolist()
                found.tokens += rollout.mask.sum().item()
                bar.update(len(questions))
        return found

    def _examples(self, models):
        """-> [(prompt, {name: (reward or None, response)})] for two prompts, if possible two whose
        responses differ. All models draw with the same random numbers."""
        prompts, rows = self.prompts[:8], {}
        for name, model in models.items():
            if model is not None:
                generator = torch.Generator().manual_seed(self.run.o.seed)
                rollout = self.run.sample(model, prompts, self.longest, generator=generator)
                known, texts = self.judges.get("reward"), completions(self.run.tokenizer, rollout)
                rewards = known(prompts, rollout).tolist() if known else [None] * len(texts)
                rows[name] = list(zip(rewards, texts))
        found = [dict(zip(rows, answers)) for answers in zip(*rows.values())]
        order = sorted(range(len(found)), key=lambda i: len(set(found[i].values())) == 1)
        decode = self.run.tokenizer.decode
        return [(decode(prompts[i][0]), found[i]) for i in order[:2]]

    # ---- for the reader

    def report(self, title, f):
        """Prints the figures, and samples of the policy below the reference's."""
        bound = self.judge.bound if self.judge else self.task.bound
        name = "pass@1" if bound == 1 else f"gold reward (of {bound:g})" if bound else "reward"
        rows = [
            (name, "reward"),
            ("score of the reward model", "score"),
            ("win rate against the reference", "win_rate"),
            ("held-out preference accuracy", "accuracy"),
            ("held-out loss, nats per token", "nll"),
            ("held-out loss, nats per pair", "held_out_loss"),
            ("KL(π‖π_ref), nats per response", "kl"),
            ("length, tokens", "length"),
            ("ended", "ended"),
            ("entropy, nats per token", "entropy"),
        ]
        outcomes = f", each with all its {f['outcomes']} outcomes" if "outcomes" in f else ""
        print(f"\n{title}: {f['prompts']} test prompts{outcomes}")
        print(f"{'':<34}{'reference' if 'kl' in f else '':>10}{'policy':>10}")
        for name, key in rows:
            if key in f:
                before = f"{f[f'ref_{key}']:.2f}" if f"ref_{key}" in f else ""
                spread = f" ± {f[f'{key}_se']:.2f}" if f"{key}_se" in f else ""
                spread += f" (n = {f['accuracy_n']})" if key == "accuracy" else ""
                print(f"{name:<34}{before:>10}{f[key]:>10.2f}{spread}")
        if self.world:
            print("", *self.shown, "", sep="\n", flush=True)
            return
        for prompt, answers in self.shown:
            print()
            side_by_side(prompt if len(prompt) < 400 else "… " + prompt[-400:], answers)
        print(flush=True)

    def what_next(self, out, record):
        """-> the commands that are useful next, as text"""
        return f"talk to it: python chat.py {out}\nits curves: python compare.py --records {record}"


def side_by_side(prompt, answers):
    """Prints the answers to a prompt, {name: (reward or None, text)}, wrapped at words."""
    width = min(100, shutil.get_terminal_size().columns) - 22
    print(printable(prompt))
    for name, (reward, text) in answers.items():
        head = f"  {name:>9} {'' if reward is None else f'{reward:.2f}':>6} | "
        for line in printable(text).split("\n"):
            for part in textwrap.wrap(line, max(20, width)) or [""]:
                print(head + part)
                head = " " * 19 + "| "


def standard_error(x):
    """-> the standard error of the mean of x. If all are verdicts (0, 1, or ½ for a tie), the mean
    is a share, and its error is computed as such."""
    if set(x) <= {0.0, 0.5, 1.0}:
        return share_error(statistics.fmean(x), len(x))
    return statistics.stdev(x) / len(x) ** 0.5


def log_ratio_and_entropy(policy, ref, rollout):
    """-> (rows, 3): for each response Σ_t log π/π_ref, the sum of its tokens' entropies, and the
    largest difference between a token's log-prob here and the one it was sampled with"""
    logp, entropy = policy.logprobs(rollout.ids, rollout.mask, entropy=True)
    ref_logp = logp if ref is None else ref.logprobs(rollout.ids, rollout.mask)
    difference = (logp - rollout.logp).abs().amax(1)
    return torch.stack([(logp - ref_logp).sum(1), entropy.sum(1), difference], 1)


# ---- the command


@dataclass
class Options:
    checkpoints: tuple = opt(..., "a language model, and one to compare it with", hub="model")
    prompt: str = opt("", "only answer this prompt (\\n is a new line)", text=True)
    task: str = opt("", "task to evaluate on (default: the one it was trained on)")
    eval_file: str = opt("", "JSONL file to evaluate on (default: the task's test split)")
    reference: str = opt(
        "", "checkpoint to compare with (default: the one it started from)", hub="model"
    )
    reward: str = opt(
        "", "the judge: task, rm, X.pt, FILE.py:function (default: its training's)", hub="model"
    )
    eval_prompts: int = opt(0, "test prompts (0: as many as at the end of its training)", low=0)
    max_new_tokens: int = opt(0, "longest response, in tokens (0: as in its training)", low=0)
    chat: bool = opt(True, "a plain prompt is a user message, if the checkpoint has a template")
    template_args: tuple = opt((), "for the chat template, such as enable_thinking=false")
    truncate: bool = opt(False, "cut the beginning of prompts that do not fit")
    seed: int = opt(0, "seed of the samples", low=0)
    device: str = opt("auto", "cpu, cuda, cuda:1, mps")
    dtype: str = opt("auto", "precision", choices=training.options.DTYPES[:-1])

    def check(self):
        """The first checkpoint is the policy, a second one the reference."""
        self.checkpoint, self.reference, *more = [*self.checkpoints, self.reference]
        if any(more):
            raise UserError("give one checkpoint to measure, and at most one to compare it with")


def answer(run, prompt):
    """Prints the reference's answer to a prompt, and the policy's."""
    n = run.o.max_new_tokens or min(256, run.block_size // 2)
    rows, _ = data.encode_prompts([(prompt,)], run.tokenizer, run.block_size - n, run.o.truncate)
    ref, found = run.open(run.reference) if run.reference else None, {}
    for name, model in (("reference", ref), ("policy", run.policy)):
        if model is not None:
            generator = torch.Generator().manual_seed(run.o.seed)
            rollout = run.sample(model, rows, n, generator=generator)
            found[name] = None, completions(run.tokenizer, rollout)[0]
    side_by_side(prompt, found)


def main(argv=None):
    from training.again import Again

    o = parse(Options, argv)
    run = Again(o)
    run.tokenizer = run.with_chat(run.tokenizer)
    if o.prompt:
        answer(run, o.prompt.replace("\\n", "\n"))
        return
    if not o.task and not run.meta["options"]:
        words = "was not trained by these scripts; give --task, or a --prompt"
        raise UserError(f"{o.checkpoint} {words}")
    eval_file = o.eval_file or ("" if o.task else run.meant(run.trained.eval_file))
    own_task = not o.task
    o.task = o.task or run.meant(run.meta["task"])
    for option, path in (("--task", o.task), ("--eval-file", eval_file)):
        if data.kind(path) == "file" and not os.path.exists(path):
            raise UserError(
                f"{path}, which {o.checkpoint} was trained on, is missing; give it with {option}"
            )
    task = data.task(o.task, eval_file)
    if task.outcomes and (unread := o.given & {"eval_prompts", "seed", "truncate"}):
        words = f"every outcome of {task.name} is counted, so nothing is sampled or cut"
        raise UserError(f"{flag(min(unread))}: {words}; leave it out")
    checkpoint.same_world(o.checkpoint, run.tokenizer, run.meta, task)
    task.template = run.meta["template"]
    judge = None
    if o.reward or own_task and "reward" in run.meta["options"]:
        from training.reward import load_judge
    if o.reward:
        judge = load_judge(o.reward, run, task)
    elif own_task and "reward" in run.meta["options"]:
        path, colon, name = run.trained.reward.partition(".py:")
        reward = run.meant(path + ".py") + ":" + name if colon else run.meant(path)
        try:
            judge = load_judge(reward, run, task)
        except UserError as e:
            print(f"not scored by the judge of its training ({e}); give another with --reward")
    held_out = None
    if run.meta.get("held_out"):
        script = importlib.import_module(run.meta["method"])
        held_out = script.held_out(task, run.trained)
    is_reference = run.meta["method"] == "sft"
    evaluator = Evaluator(run, task, judge, run.reference, held_out, is_reference)
    figures = evaluator.measure(run.policy)
    evaluator.report(f"{run.meta['method']} on {task.name}", figures)


if __name__ == "__main__":
    training.command(main)

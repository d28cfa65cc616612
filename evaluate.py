"""What a checkpoint does on held-out prompts. Every script calls this at its end; as a command:

    python evaluate.py out/reviews/dpo.pt              the same figures again, and samples
    python evaluate.py out/reviews/dpo.pt --prompt "A drama, The Last Road:"

One response is sampled to each test prompt (temperature 1, nothing cut off, a fixed seed), and one
from the reference π_ref, the checkpoint that the method started from:

    reward       mean reward of the responses; ref_reward: of the reference's
    score        mean score of the reward model that the method was trained with; ref_score
    win_rate     share of prompts whose response has the higher reward of the two, ties half
    kl           KL(π‖π_ref) per response, nats: mean of Σ_t log π/π_ref over the policy's samples
    length       tokens per response, the end token included; ended: the share that has one
    entropy      of the next-token distribution, mean over response tokens, nats
    accuracy     if no reward is known: share of held-out pairs whose chosen answer is preferred
    nll          if no reward is known, after SFT: nats per token of the held-out answers

On `exact` nothing is sampled: each figure is a sum over all outcomes, and the optimum
π* ∝ π_ref exp(r/β) stands beside it:

    objective    J = E_π[r] - β KL(π‖π_ref), which π* maximises: J(π*) - J(π) = β KL(π‖π*)
    kl_star      KL(π‖π*), nats; tv_star: half of Σ |π - π*|; means over prompts

For an SFT checkpoint π_ref is itself in these, whatever kl and win_rate compare it with.
"""

import importlib
import os
import statistics
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import torch
from tqdm import tqdm

import data
import training
from data import UserError, say
from gpt import response_scores
from training import Compute, checkpoint, load_judge, opt, parse
from training.options import flag
from training.reward import Judge, completions

ROWS = 128  # sequences per forward pass
# the options of a folder of Hugging Face, which no script of these has trained
FOLDER = {"block_size": 0, "truncate": False, "eval_file": "", "eval_prompts": 512}


class Evaluator:
    """Measures a policy on held-out prompts, beside another model.

    compared_with: a frozen model, or the path of a checkpoint, which is in memory only while it is
    measured with. judge: what the method was trained with. held_out: what the method's own loss
    says of held-out rows, if no reward is known. is_reference: the policy is what later stages call
    π_ref. What does not fit is said when this is made, before the training."""

    def __init__(
        self, run, task, compared_with=None, judge=None, held_out=None, is_reference=False
    ):
        self.run, self.task, self.compared_with, self.judge = run, task, compared_with, judge
        self.held_out, self.is_reference = held_out, is_reference
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
        """-> the figures of this file's docstring, of the first so many prompts; 0: of all"""
        ref = self.compared_with
        if isinstance(ref, str):
            ref = self.run.open(ref) if ref else None
        if self.world:
            figures, self.shown = self.world.measure(policy, ref, self.is_reference, not prompts)
            return figures
        figures = self._sample(policy, ref, prompts or len(self.prompts))
        del ref
        self.run.placement.collect_garbage()
        return figures

    def facts(self, figures):
        """-> what a checkpoint keeps, so that the command measures it again"""
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
                figures[f"{name}_se"] = statistics.stdev(x) / len(x) ** 0.5
        theirs = None
        if ref is not None:
            theirs = self._respond(ref, n, seed + 1_000_003)
            figures["ref_length"] = theirs.tokens / len(theirs.texts)
            figures |= {f"ref_{name}": statistics.fmean(x) for name, x in theirs.earned.items()}
            if "reward" in figures:
                both = zip(mine.earned["reward"], theirs.earned["reward"])
                figures["win_rate"] = statistics.fmean((a > b) + 0.5 * (a == b) for a, b in both)
            ratio = torch.cat(mine.log_ratio)
            figures["kl"] = ratio.mean().item()
            if len(ratio) > 1:
                figures["kl_se"] = (ratio.std() / len(ratio) ** 0.5).item()
        figures |= self.held_out.measure(self.run, self.rows, policy, ref) if self.rows else {}
        figures |= {"length": mine.tokens / len(mine.texts), "ended": statistics.fmean(mine.ended)}
        figures |= {"entropy": mine.entropy / mine.tokens, "prompts": len(mine.texts)}
        figures["sampling_difference"] = mine.difference
        self.shown = self._examples(mine.texts, theirs.texts if theirs else [])
        return figures

    def _respond(self, model, n, seed, scored_by=None):
        """One response to each of the first n prompts: texts, ended, tokens, rewards by name.
        scored_by: (policy, ref), which give log-ratios and entropies."""
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

    def _examples(self, texts, ref_texts):
        """-> (prompt, reference's response, policy's) of two prompts, whose responses differ if
        there are such"""
        ref_texts = ref_texts or [None] * len(texts)
        order = sorted(range(len(texts)), key=lambda i: texts[i] == ref_texts[i])
        return [(self.prompts[i][1], ref_texts[i], texts[i]) for i in order[:2]]

    # ---- to look at

    def report(self, title, f):
        """Prints the figures, and samples beside the reference's: people would rather look."""
        bound = self.judge.bound if self.judge else self.task.bound
        name = "pass@1" if bound == 1 else f"gold reward (of {bound:g})" if bound else "reward"
        rows = [
            (name, "reward"),
            ("score of the reward model", "score"),
            ("win rate against the reference", "win_rate"),
            ("held-out preference accuracy", "accuracy"),
            ("held-out loss, nats per token", "nll"),
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
        for prompt, *texts in self.shown:
            print(f"\n{printable(prompt if len(prompt) < 400 else '… ' + prompt[-400:])}")
            for name, text in zip(("reference", "policy"), texts):
                if text is not None:
                    print(f"  {name:>9} | " + printable(text).replace("\n", "\n" + " " * 12 + "| "))
        print(flush=True)


def log_ratio_and_entropy(policy, ref, rollout):
    """-> (rows, 3): Σ_t log π/π_ref of each response, the sum of its tokens' entropies, and the
    largest difference between the log-prob of a token and the one it was drawn with"""
    logp, entropy = policy.logprobs(rollout.ids, rollout.mask, entropy=True)
    ref_logp = logp if ref is None else ref.logprobs(rollout.ids, rollout.mask)
    difference = (logp - rollout.logp).abs().amax(1)
    return torch.stack([(logp - ref_logp).sum(1), entropy.sum(1), difference], 1)


# ---- held-out rows, if no reward is known


class HeldOut:
    """Held-out rows, and what a method's own loss says of them. A script names its figure: `nll`,
    `pair_accuracy` or `label_accuracy`."""

    def __init__(self, draw, score, figures, pad=data.pad, with_ref=False):
        """draw: a task's rows; score(policy, ref, batch) -> a number per row or pair; figures(they,
        rows) -> what is measured; with_ref: it cannot be measured without a reference"""
        self.draw, self.score, self.figures = draw, score, figures
        self.pad, self.with_ref = pad, with_ref

    def encode(self, run):
        o = run.o
        rows = self.draw(o.eval_prompts, o.seed, split="test")
        rows, note = data.encode(rows, run.tokenizer, run.block_size, o.truncate)
        say(note and f"held out: {note}")
        return rows

    def measure(self, run, rows, policy, ref):
        if self.with_ref and ref is None:
            return {}
        found = run.scores(rows, lambda x: self.score(policy, ref, self.pad(x, run.device)), 32)
        return self.figures(found, rows)


def nll(task, compute_loss):
    """-> the nats per token of demonstrations. compute_loss(policy, batch) -> losses, sums over the
    tokens of an answer; metrics"""

    def score(policy, ref, batch):
        return compute_loss(policy, batch)[0]

    def figures(losses, rows):
        return {"nll": losses.sum().item() / sum(len(y) for _, y in rows)}

    return HeldOut(task.demonstrations, score, figures)


def pair_accuracy(task, compute_loss, with_ref=False):
    """-> the share of pairs whose chosen answer has the higher implicit reward, as compute_loss
    logs it. It takes (policy, batch), or with_ref (policy, ref, batch)."""

    def score(policy, ref, batch):
        models = (policy, ref) if with_ref else (policy,)
        losses, metrics = compute_loss(*models, batch)
        return metrics["rewards/accuracies"].to(losses)

    def figures(right, rows):
        return share(right > 0)

    return HeldOut(task.preferences, score, figures, data.pad_pairs, with_ref)


def label_accuracy(task, compute_loss):
    """-> the share of pairs (a desirable answer, an undesirable one) whose desirable answer has the
    higher implicit reward. Of a file of pairs these are the pairs; of unpaired rows each desirable
    one makes a pair with each undesirable one. compute_loss(policy, ref, batch)"""

    def draw(n, seed, split):
        rows = task.feedback(n, seed, split=split)
        if task.unpaired and len({label for *_, label in rows}) < 2:
            left_out = "accuracy will be left out; --eval-file names others"
            say(f"the held-out rows all have the same label: {left_out}")
        return rows

    def score(policy, ref, batch):
        return compute_loss(policy, ref, batch)[1]["rewards"]

    def figures(rewards, rows):
        desirable = torch.tensor([row[2] for row in rows], device=rewards.device)
        chosen, rejected = rewards[desirable], rewards[~desirable]
        if not task.unpaired:  # rows of a file of pairs, one after the other
            return share(chosen > rejected)
        n = min(len(chosen), len(rejected))
        return share(chosen[:, None] > rejected, n) if n else {}

    return HeldOut(draw, score, figures, with_ref=True)


def share(found, n=0):
    """(…) bool -> the figures of an accuracy. n: how many of them are independent, if not all"""
    n, accuracy = n or found.numel(), found.float().mean().item()
    return {"accuracy": accuracy, "accuracy_se": standard_error(accuracy, n), "accuracy_n": n}


def standard_error(accuracy, n):
    return (accuracy * (1 - accuracy) / n) ** 0.5


def printable(text):
    """A text as one can look at it: a file, and a model that has learned little, may hold control
    characters, which a terminal would obey."""
    return "".join(c if c.isprintable() or c == "\n" else "·" for c in text.strip())


# ---- reward models


class RewardEvaluator:
    """Measures a reward model on held-out pairs, which are encoded before the training so that what
    does not fit is said then. On `exact` also every outcome."""

    def __init__(self, run, task):
        self.run, self.task = run, task
        o, fit = run.o, (run.tokenizer, run.block_size, run.o.truncate)
        self.texts = task.graded(o.eval_prompts, o.seed, split="test")
        self.pairs, note = data.encode(self.texts, *fit)
        say(note and f"held out: {note}")
        self.gold = task.size == 0 and not note  # a cut answer was never judged
        self.demonstrations, _ = data.encode(task.demonstrations(1024, o.seed), *fit)
        self.world = data.encode(task.rows, *fit)[0] if task.outcomes else []

    def scores(self, reward, rows):
        """(prompt ids, response ids) rows -> (len(rows),) scores, on the CPU"""
        pad = partial(data.pad, device=self.run.device, ends=True)
        return self.run.scores(rows, lambda x: response_scores(reward, pad(x)), 512).cpu()

    def center(self, reward):
        """Shifts the scores so that demonstrations average 0. -> what was subtracted"""
        shift = self.scores(reward, self.demonstrations).mean().item()
        with torch.no_grad():
            reward.head.bias -= shift
        return shift

    def measure(self, reward, n=None):
        """-> the figures of the first n pairs; gold figures if the task knows its reward"""
        pairs, texts = self.pairs[:n], self.texts[:n]
        score = self.scores(reward, [x[:2] for x in pairs] + [(x[0], x[2]) for x in pairs])
        delta = torch.sub(*score.chunk(2))
        p = torch.tensor([pair[4] for pair in pairs], dtype=score.dtype)
        agreed = torch.where(delta > 0, p, torch.where(delta < 0, 1 - p, 0.0))
        figures = {
            "accuracy": agreed.mean(),
            "accuracy_se": standard_error(agreed.mean(), len(pairs)),
            "margin": delta.mean(),
            "mean_reward": score.mean(),
            "min_reward": score.min(),
            "max_reward": score.max(),
        }
        if self.gold:
            known = [self.task.preferred(*text[:3], {}) for text in texts]
            figures["accuracy_bound"] = statistics.fmean(max(x, 1 - x) for x in known)
            noise = sum(x * (1 - x) for x in known) ** 0.5 / len(known)
            figures["accuracy_bound_se"] = noise
        if self.world:
            figures["rms"] = self._distance(reward)
        elif self.gold:
            rows = [x[:2] for x in texts] + [(x[0], x[2]) for x in texts]
            gold = torch.tensor([self.task.reward(*row) for row in rows], dtype=score.dtype)
            figures["correlation"] = torch.corrcoef(torch.stack([score, gold]))[0, 1]
        return {name: float(x) for name, x in figures.items()} | {"pairs": len(pairs)}

    def _distance(self, reward):
        """-> the rms distance of the scores to r, each outcome weighed by d(y|x), up to a constant
        per prompt"""
        error = self.scores(reward, self.world).double().view(self.task.r.shape)
        error = error - torch.from_numpy(self.task.r)
        d = torch.from_numpy(self.task.d)
        error = error - (d * error).sum(1, keepdim=True)
        return (d * error**2).sum(1).mean().sqrt()

    def facts(self, figures):
        facts = {"template": self.task.template, "reference": self.run.baseline, "reward": None}
        return facts | {"shift": figures["shift"]}

    def report(self, title, f):
        rows = [
            ("held-out preference accuracy", "accuracy"),
            ("margin, chosen - rejected", "margin"),
            ("score, mean", "mean_reward"),
            ("  least", "min_reward"),
            ("  greatest", "max_reward"),
            ("correlation with the gold reward", "correlation"),
            ("rms distance to r, by d(y|x)", "rms"),
        ]
        print(f"\n{title}: {f['pairs']} held-out pairs")
        for name, key in rows:
            note = ""
            if key == "accuracy" and "accuracy_bound" in f:
                bound = f"{f['accuracy_bound']:.3f} ± {f['accuracy_bound_se']:.3f}"
                note = f" (the labels' noise allows {bound})"
            if key in f:
                spread = f" ± {f['accuracy_se']:.3f}" if key == "accuracy" else ""
                print(f"{name:<34}{f[key]:>10.3f}{spread}{note}")
        for prompt, *answers in [pair[:3] for pair in self.pairs[:2]]:
            print("\n" + self.run.tokenizer.decode(prompt)[-400:])
            score = self.scores(self.run.models["reward"], [(prompt, y) for y in answers])
            for name, y, x in zip(("chosen", "rejected"), answers, score.tolist()):
                text = printable(self.run.tokenizer.decode(y)).replace("\n", "\n" + " " * 18 + "| ")
                print(f"  {name:>8} {x:6.2f} | {text}")
        print(flush=True)


class PreferenceEvaluator:
    """Measures a preference model that learned from an AI judge: its agreement with the judge, and
    with the gold reward. pairs: feedback.Pair, from held-out prompts"""

    def __init__(self, run, task, judge, pairs, facts):
        self.run, self.task, self.judge, self.pairs, self.facts = run, task, judge, pairs, facts

    def measure(self, reward):
        from training import feedback

        run, pairs = self.run, self.pairs
        if not pairs:
            return {}

        def margin(part):
            batch = data.pad_pairs(part, run.device, ends=True)
            return torch.sub(*response_scores(reward, batch).chunk(2))

        rows, _ = data.encode([x[:3] for x in pairs], run.tokenizer, run.block_size, truncate=True)
        a_wins = run.scores(rows, margin, ROWS) > 0
        return feedback.label_figures(self.task, pairs, *self.judge.compare(pairs), a_wins)

    def report(self, title, figures):
        from training import feedback

        feedback.show(f"{title}: {len(self.pairs)} held-out pairs", figures)


# ---- the command


@dataclass
class Options:
    checkpoint: str = opt(..., "the .pt file of a language model")
    prompt: str = opt("", "answer this prompt instead (\\n stands for a new line)")
    task: str = opt("", "the task to evaluate on (default: the one it was trained on)")
    eval_file: str = opt("", "JSONL file to evaluate on (default: the task's test split)")
    reference: str = opt("", "checkpoint to compare with (default: the one it started from)")
    reward: str = opt("", "the judge: task, rm, X.pt, FILE.py:function (default: its training's)")
    eval_prompts: int = opt(0, "test prompts (0: as many as after the training)", low=0)
    max_new_tokens: int = opt(0, "longest response (0: as at the end of the training)", low=0)
    chat: bool = opt(True, "a plain prompt is a user message, if the checkpoint has a template")
    template_args: tuple = opt((), "of the checkpoint's chat template: enable_thinking=false")
    truncate: bool = opt(False, "cut prompts that do not fit, from their left")
    seed: int = opt(0, "of the samples", low=0)
    device: str = opt("auto", "cpu, cuda, cuda:1, mps")
    dtype: str = opt("auto", "precision", choices=training.options.DTYPES[:-1])


class Again(Compute):
    """A trained checkpoint, opened to be measured."""

    def __init__(self, o):
        super().__init__(o)
        policy, self.tokenizer, self.meta = checkpoint.load(o.checkpoint)
        self.policy = self.freeze(self.place(policy))
        self.models = {"policy": self.policy}
        self.trained = SimpleNamespace(**FOLDER | self.meta["options"])
        self.block_size = self.trained.block_size or policy.config.block_size
        self.reference = self._find_reference()
        self.baseline = self.reference
        o.max_new_tokens = o.max_new_tokens or self.meta["max_new_tokens"]
        o.truncate = o.truncate or self.trained.truncate
        o.eval_prompts = o.eval_prompts or self.trained.eval_prompts

    def _find_reference(self):
        path, moved = self.o.reference, ""
        if not path and self.meta["reference"]:
            path = self.meant(self.meta["reference"])
            moved = os.path.join(os.path.dirname(self.o.checkpoint), os.path.basename(path))
            path = path if os.path.exists(path) else moved  # beside the checkpoint, if that moved
        if not path or not os.path.exists(path) and not self.o.reference:
            missing = f" ({path} is missing)" if path else ""
            left_out = "win rate and KL are left out; --reference names one"
            print(f"no reference{missing}: {left_out}")
            return ""
        model, tokenizer, _ = checkpoint.load(path)
        if tokenizer.vocabulary != self.tokenizer.vocabulary:
            words = f"{path} has another vocabulary than {self.o.checkpoint}"
            raise UserError(f"{words}; give another --reference")
        self.block_size = min(self.block_size, model.config.block_size)
        return path

    def meant(self, path):
        """-> what a path that the checkpoint keeps meant where it was trained; of what is no path
        of a file, itself"""
        if not path or path in ("task", "rm") or data.kind(path) in data.BUILT_IN:
            return path
        folder = os.path.dirname(os.path.realpath(self.o.checkpoint))
        return os.path.relpath(os.path.join(folder, self.meta["folder"], path))

    def reads(self, path, part="", may_change=False):
        """Nothing is written that it could be."""

    def keep(self):
        """Nothing is trained that could be lost."""

    def stage(self, method):
        return checkpoint.default_path(self.o.task, method)

    def answer(self, prompt):
        """Prints the reference's and the policy's answer to a prompt."""
        n = self.o.max_new_tokens or min(256, self.block_size // 2)
        limit = self.block_size - n
        rows, _ = data.encode_prompts([(prompt,)], self.tokenizer, limit, self.o.truncate)
        print(printable(prompt))
        ref = self.open(self.reference) if self.reference else None
        for name, model in (("reference", ref), ("policy", self.policy)):
            if model is not None:
                generator = torch.Generator().manual_seed(self.o.seed)
                rollout = self.sample(model, rows, n, generator=generator)
                print(f"  {name:>9} | {printable(completions(self.tokenizer, rollout)[0])}")


def main(argv=None):
    o = parse(Options, argv)
    run = Again(o)
    run.tokenizer = run.with_chat(run.tokenizer)
    if o.prompt:
        run.answer(o.prompt.replace("\\n", "\n"))
        return
    if not o.task and not run.meta["options"]:
        words = "was trained on no task of these scripts; give --task, or a --prompt"
        raise UserError(f"{o.checkpoint} {words}")
    eval_file = o.eval_file or ("" if o.task else run.meant(run.trained.eval_file))
    own_task = not o.task
    o.task = o.task or run.meant(run.meta["task"])
    for option, path in (("--task", o.task), ("--eval-file", eval_file)):
        if data.kind(path) == "file" and not os.path.exists(path):
            raise UserError(
                f"{path}, which {o.checkpoint} was trained with, is missing; name it with {option}"
            )
    task = data.task(o.task, eval_file)
    if task.outcomes and (unread := o.given & {"eval_prompts", "seed", "truncate"}):
        words = f"every outcome of {task.name} is counted, nothing is drawn or cut"
        raise UserError(f"{flag(min(unread))}: {words}; leave it out")
    checkpoint.same_world(o.checkpoint, run.tokenizer, run.meta, task)
    task.template = run.meta["template"]
    judge = None
    if o.reward:
        judge = load_judge(o.reward, run, task)
    elif own_task and "reward" in run.meta["options"]:
        path, colon, name = run.trained.reward.partition(".py:")
        reward = run.meant(path + ".py") + ":" + name if colon else run.meant(path)
        try:
            judge = load_judge(reward, run, task)
        except UserError as e:
            print(f"what it was trained with is left out ({e}); --reward names another")
    held_out = None
    if run.meta.get("held_out"):
        script = importlib.import_module(run.meta["method"])
        held_out = script.held_out(task, run.trained)
    is_reference = run.meta["method"] == "sft"
    evaluator = Evaluator(run, task, run.reference, judge, held_out, is_reference)
    figures = evaluator.measure(run.policy)
    evaluator.report(f"{run.meta['method']} on {task.name}", figures)


if __name__ == "__main__":
    training.command(main)

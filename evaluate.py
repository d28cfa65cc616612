"""What a checkpoint does on held-out prompts. Every script calls this at its end; as a command:

    python evaluate.py out/reviews/dpo.pt              the same figures again, and samples
    python evaluate.py out/reviews/dpo.pt --prompt "A drama, The Last Road:"

One response is sampled to each test prompt (temperature 1, nothing cut off, a fixed seed), and one
from the reference π_ref, the checkpoint that the method started from:

    reward       mean reward of the responses; ref_reward: of the reference's
    score        mean score of the reward model that the method was trained with; ref_score
    win_rate     share of prompts where the response has the higher reward of the two, ties half
    kl           KL(π‖π_ref) a response, in nats: mean of Σ_t log π/π_ref over the policy's samples
    length       tokens a response, its end token counted; ended: the share that has one
    entropy      of the next-token distribution, mean over response tokens, nats
    accuracy     without a known reward: share of held-out pairs with the chosen answer preferred
    nll          without a known reward, after SFT: nats a token of the held-out answers

On `exact` nothing is sampled: each figure is a sum over all outcomes, and the optimum
π* ∝ π_ref exp(r/β) stands beside it:

    objective    J = E_π[r] - β KL(π‖π_ref), which π* maximises: J(π*) - J(π) = β KL(π‖π*)
    kl_star      KL(π‖π*), nats; tv_star: half of Σ |π - π*|; means over prompts

For an SFT checkpoint π_ref is itself in these, whatever kl and win_rate compare it with.
"""

import importlib
import inspect
import math
import os
import statistics
import time
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace

import torch

import data
import training
from data import UserError
from data.exact import kl, star, tv
from training import Compute, checkpoint, load_judge, opt, parse
from training.options import flag
from training.reward import Judge, completions

ROWS = 128  # sequences a forward pass
LONG = 60  # seconds of an evaluation that are told before the training
SHORT = 2e12  # FLOPs of an evaluation whose time is not asked for
UNTOLD = {"block_size": 0, "truncate": False, "eval_file": "", "eval_prompts": 512}


class Evaluator:
    """reference: a frozen model, or the path of a checkpoint, which is in memory only while it is
    measured with. judge: what the method was trained with. held_out: a task's rows and the method's
    compute_loss, which scores them where no reward is known. is_reference: the policy is what later
    stages call π_ref. What does not fit is told when this is made, before the training."""

    def __init__(
        self, run, task, reference=None, judge=None, held_out=(None, None), is_reference=False
    ):
        self.run, self.task, self.reference, self.judge = run, task, reference, judge
        self.draw, self.compute_loss = held_out
        self.is_reference = is_reference
        self.longest = task.longest(run.o.max_new_tokens, run.block_size)
        self.judges = {"reward": Judge(run, task, task.reward)} if task.has_reward else {}
        self.judges |= {judge.name: judge} if judge else {}
        o, tokenizer = run.o, run.tokenizer
        if task.outcomes:
            rows, _ = data.encode(task.rows, tokenizer, run.block_size)
            self.world = data.pad(rows, run.device)
            return
        prompts = task.prompts(o.eval_prompts, o.seed, split="test")
        limit = run.block_size - self.longest
        rows, note = data.encode_prompts(prompts, tokenizer, limit, o.truncate)
        data.say(note)
        self.prompts = list(rows)
        self.rows = []
        if self.draw and not task.has_reward:
            rows = self.draw(o.eval_prompts, o.seed, split="test")
            self.rows, note = data.encode(rows, tokenizer, run.block_size, o.truncate)
            data.say(note and f"held out: {note}")
            if task.unpaired and self.draw == task.feedback and len({y for *_, y in self.rows}) < 2:
                self.rows = []
                left_out = "accuracy will be left out; --eval-file names others"
                data.say(f"the held-out rows all have the same label: {left_out}")
        if policy := run.models.get("policy"):
            self._tell_time(policy)

    def _tell_time(self, policy):
        """Says how long the closing evaluation takes, if it is long: by eight prompts' first token,
        and by a few after it"""
        n, few, times = len(self.prompts), min(5, self.longest), []
        models = 2 if self.reference else 1
        tokens = n * models * (self.longest + max(len(x) for x, *_ in self.prompts[:8]))
        if 2 * policy.matmul_parameters() * tokens < SHORT:
            return
        for longest in (1, few):
            start = time.perf_counter()
            generator = torch.Generator().manual_seed(0)
            self.run.sample(policy, self.prompts[:8], longest, generator=generator)
            times.append(time.perf_counter() - start)
        a_token = max(0.0, times[1] - times[0]) / max(1, few - 1)
        seconds = models * n / min(n, 8) * (times[0] + a_token * self.longest)
        if seconds > LONG:
            what = f"{n} prompts, {models} models, up to {self.longest} tokens"
            minutes = f"up to {seconds / 60:.0f} min"
            remedy = "--eval-prompts N shortens it"
            data.say(f"the closing evaluation takes {minutes} ({what}); {remedy}")

    @torch.no_grad()
    def measure(self, policy, prompts=0):
        """-> the figures of this file's docstring, of the first so many prompts; 0: of all"""
        ref = self.reference
        if isinstance(ref, str):
            ref = self.run.open(ref) if ref else None
        if self.task.outcomes:
            return self._enumerate(policy, ref, not prompts)
        figures = self._sample(policy, ref, prompts or len(self.prompts))
        del ref
        self.run.forget()
        return figures

    def facts(self, figures):
        """-> what a checkpoint keeps, so that the command measures it again"""
        compared = isinstance(self.reference, str) and not self.is_reference
        path = self.reference if compared else self.run.init
        return {
            "template": self.task.template,
            "reference": path,
            "max_new_tokens": self.longest,
            "held_out": self.draw.__name__ if self.draw else "",
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
        figures |= self._held_out(policy, ref) if self.rows else {}
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
        for i in range(0, min(n, len(self.prompts)), ROWS):
            questions = self.prompts[i : min(i + ROWS, n)]
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
        return found

    def _examples(self, texts, ref_texts):
        """-> (prompt, reference's response, policy's) of two prompts, whose responses differ if
        there are such"""
        ref_texts = ref_texts or [None] * len(texts)
        order = sorted(range(len(texts)), key=lambda i: texts[i] == ref_texts[i])
        return [(self.prompts[i][1], ref_texts[i], texts[i]) for i in order[:2]]

    def _held_out(self, policy, ref):
        """-> how the method's own loss sees held-out rows: the NLL of answers, or the share of
        pairs whose chosen answer has the higher implicit reward. Of unpaired rows each desirable
        one makes a pair with each undesirable one."""
        models = {"policy": policy, "ref": ref}
        takes = inspect.signature(self.compute_loss).parameters
        models = {role: model for role, model in models.items() if role in takes}
        if None in models.values():
            return {}
        pad = data.pad_pairs if self.draw.__name__ == "preferences" else data.pad
        kinds = set()

        def score(rows):
            batch = pad(rows, self.run.device)
            losses, metrics = self.compute_loss(**models, batch=batch)
            kinds.update(metrics)
            found = metrics.get("rewards/accuracies", metrics.get("rewards", losses))
            return found.to(losses)

        found = self.run.scores(self.rows, score, 32)
        if not kinds:
            return {"nll": found.sum().item() / sum(len(y) for _, y in self.rows)}
        if "rewards" not in kinds:
            return share(found > 0)
        desirable = torch.tensor([row[2] for row in self.rows], device=found.device)
        chosen, rejected = found[desirable], found[~desirable]
        if not self.task.unpaired:  # rows of a file of pairs, one after the other
            return share(chosen > rejected)
        return share(chosen[:, None] > rejected, min(len(chosen), len(rejected)))

    # ---- by enumeration

    def table(self, model):
        """-> log π(y|x) of every outcome, (4, 40), float64"""
        world = self.world
        with self.run.autocast():
            logp = model.logprobs(world.ids, world.mask, at=world.layout).sum(1)
        logp = logp.cpu().double().view(self.task.r.shape)
        total = logp.exp().sum(1)
        assert (total - 1).abs().max() <= 1e-5, f"the probabilities sum to {total.tolist()}"
        return logp

    def _enumerate(self, policy, ref, closing):
        log_p = self.table(policy)
        log_ref = None if ref is None else self.table(ref)
        r, beta = torch.from_numpy(self.task.r), self.task.world_beta
        figures = self._moments(log_p)
        if ref is not None:
            start = self._moments(log_ref)
            wins = (torch.sign(r[:, :, None] - r[:, None, :]) + 1) / 2  # (x, y, y'), a tie is ½
            won = torch.einsum("xy,xyz,xz->x", log_p.exp(), wins, log_ref.exp()).mean()
            figures |= {"ref_reward": start["reward"], "ref_length": start["length"]}
            figures |= {"kl": kl(log_p, log_ref).mean(), "win_rate": won}
        if self.is_reference:
            log_ref = log_p
        self.shown = []
        if log_ref is not None:
            log_star = star(log_ref, r, beta)

            def reward(log_q):
                return (log_q.exp() * r).sum(1)

            def objective(log_q):
                return reward(log_q) - beta * kl(log_q, log_ref)

            figures["objective"] = objective(log_p).mean()
            figures["kl_star"] = kl(log_p, log_star).mean()
            figures["tv_star"] = tv(log_p, log_star).mean()
            measures = {"E[r]": reward, "KL(·‖π_ref)": partial(kl, log_q=log_ref), "J": objective}
            measures |= {"KL(·‖π*)": partial(kl, log_q=log_star)}
            measures |= {"TV(·, π*)": partial(tv, log_q=log_star)}
            self.shown = self._lines(measures, {"π": log_p, "π_ref": log_ref, "π*": log_star})
        figures = {name: float(x) for name, x in figures.items()}
        if closing and log_ref is not None:  # (KL, E[r]) of π* at each β: no policy lies above
            stars = [star(log_ref, r, 10 ** (i / 20)) for i in range(-40, 41)]
            points = [(kl(log_q, log_ref).mean(), reward(log_q).mean()) for log_q in stars]
            figures["frontier"] = [[x.item(), y.item()] for x, y in points]
        return figures | {"prompts": len(log_p), "outcomes": log_p.size(1)}

    def _moments(self, log_p):
        """What needs no second policy; tokens are averaged over tokens, all else over prompts."""
        p, r = log_p.exp(), torch.from_numpy(self.task.r)
        length = self.world.length.view(r.shape).cpu()
        ends = [len(y) < self.task.max_new_tokens for y in self.task.outcomes]
        tokens = (p * length).sum()
        return {
            "reward": (p * r).sum(1).mean(),
            "length": tokens / len(p),
            "ended": (p * torch.tensor(ends)).sum(1).mean(),
            "entropy": -(p * log_p).sum() / tokens,
        }

    def _lines(self, measures, tables):
        """-> the measures of each policy by prompt, and where π is furthest from π*, as text"""
        task, log_ref = self.task, tables["π_ref"]
        n = log_ref.size(1)
        head = (*task.contexts, "mean")
        lines = [f"{f'β = {task.world_beta}, nats':<26}" + "".join(f"{x:>10}" for x in head)]
        for name, measure in measures.items():
            for of, log_q in tables.items():
                by_prompt = measure(log_q)
                itself = of == "π" and self.is_reference
                if by_prompt.abs().max() > 1e-12 and not itself:
                    row = [*by_prompt.tolist(), by_prompt.mean().item()]
                    lines.append(f"{name:<19}{of:<7}" + "".join(f"{x:>10.4f}" for x in row))
        entropy = -(log_ref.exp() * log_ref).sum(1).mean().item()
        far = f"KL(π_ref‖uniform) {math.log(n) - entropy:.3f}"
        lines.append(f"π_ref: entropy {entropy:.3f} of log {n} = {math.log(n):.3f} nats, {far}")
        head = "".join(f"{x:>10}" for x in (*tables, "r"))
        lines.append(f"\n{'the five outcomes furthest from π*':<34}{head}")
        columns = [log_q.exp() for log_q in tables.values()] + [torch.from_numpy(task.r)]
        for i in (columns[0] - columns[2]).abs().flatten().topk(5).indices.tolist():
            x, y = divmod(i, n)
            text = f"  {task.contexts[x]} -> {task.outcomes[y] or '(empty)'}"
            lines.append(f"{text:<34}" + "".join(f"{t[x, y].item():>10.4f}" for t in columns))
        return lines

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
            ("held-out loss, nats a token", "nll"),
            ("KL(π‖π_ref), nats a response", "kl"),
            ("length, tokens", "length"),
            ("ended", "ended"),
            ("entropy, nats a token", "entropy"),
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
        if self.task.outcomes:
            print("", *self.shown, "", sep="\n", flush=True)
            return
        for prompt, *texts in self.shown:
            print(f"\n{printable(prompt if len(prompt) < 400 else '… ' + prompt[-400:])}")
            for name, text in zip(("reference", "policy"), texts):
                if text is not None:
                    print(f"  {name:>9} | " + printable(text).replace("\n", "\n" + " " * 12 + "| "))
        print(flush=True)


def log_ratio_and_entropy(policy, ref, rollout):
    """-> (rows, 3): Σ_t log π/π_ref of each response, the sum of its tokens' entropies, and by how
    much the log-prob of a token is at most another one than it was drawn with"""
    logp, entropy = policy.logprobs(rollout.ids, rollout.mask, entropy=True)
    ref_logp = logp if ref is None else ref.logprobs(rollout.ids, rollout.mask)
    difference = (logp - rollout.logp).abs().amax(1)
    return torch.stack([(logp - ref_logp).sum(1), entropy.sum(1), difference], 1)


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
    chat: bool = opt(True, "a plain prompt is a user message, where a checkpoint has a template")
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
        self.trained = SimpleNamespace(**UNTOLD | self.meta["options"])
        self.block_size = self.trained.block_size or policy.config.block_size
        self.reference = self._find_reference()
        self.init = self.reference
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
    run.tokenizer = run.told(run.tokenizer)
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
    held_out = None, None
    if run.meta.get("held_out"):
        script = importlib.import_module(run.meta["method"])
        held_out = getattr(task, run.meta["held_out"]), partial(script.compute_loss, o=run.trained)
    is_reference = run.meta["method"] == "sft"
    evaluator = Evaluator(run, task, run.reference, judge, held_out, is_reference)
    figures = evaluator.measure(run.policy)
    evaluator.report(f"{run.meta['method']} on {task.name}", figures)


if __name__ == "__main__":
    training.command(main)

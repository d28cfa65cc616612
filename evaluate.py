"""The one yardstick: what a checkpoint does on held-out prompts. Every script calls it at its end; as a command:

    python evaluate.py out/reviews/dpo.pt                                        the same figures again, and samples
    python evaluate.py out/reviews/dpo.pt --prompt "A drama, The Last Road:"       an answer to your own prompt

One response is sampled to each test prompt (temperature 1, nothing cut off, a fixed seed), and one from the reference
π_ref, the checkpoint that the method started from:

    reward       mean gold reward of the responses, where the task has one, or of a user's function; ref_reward: the reference's
    score        mean score of the reward model that the method was trained with (after ppo.py of a response that did not end
                 --missing-end-score); ref_score: the reference's
    win_rate     share of prompts where the response has the higher reward of the two, ties half
    kl           KL(π‖π_ref) a response, in nats: mean of Σ_t log π/π_ref over the policy's samples; kl_se, its standard error
    length       tokens a response, its end token counted (ref_length: the reference's); ended: the share that has one
    entropy      of the next-token distribution, mean over response tokens, nats
    accuracy     without a known reward: share of held-out pairs whose chosen answer has the higher implicit reward
    nll          without a known reward, after SFT: nats a token of the held-out answers

On `exact` nothing is sampled: each figure is a sum over all outcomes, and the optimum π* ∝ π_ref exp(r/β) stands beside it:

    python evaluate.py out/exact/dpo.pt

    objective    J = E_π[r] - β KL(π‖π_ref), which π* maximises: J(π*) - J(π) = β KL(π‖π*)
    kl_star      KL(π‖π*), nats; tv_star: half of Σ |π - π*|; mean over prompts, as all others
    kl_optimum   KL(π‖the optimum of the method's own loss on fresh rows), where data/oracle.py knows it; for DPO with β = 0.5 it is
                 π*. tv_optimum: their TV; loss_gap: the population's loss at π minus its least value

For an SFT checkpoint π_ref is itself in these, whatever kl and win_rate compare it with.
"""
import contextlib
import os
import statistics
from dataclasses import dataclass
from typing import Literal

import torch

import common
import data
from common import Count, Whole
from gpt import GPT, CheckpointError, GPTConfig, Samples, ScalarGPT, load, sample

ROWS = 128  # sequences a forward pass
PROMPTS = 512


def open_checkpoint(path, o=None, task=None):
    """-> (model, tokenizer, meta). Raises where it is no language model, o.tokenizer names another than its own, or the task has
    a vocabulary of its own. With --predict the model is a shape without numbers, and nothing is read but that shape."""
    if o and o.predict:
        return outline(path, o, task)
    tokenizer = o.tokenizer if o else ""
    model, meta = load(path)
    if not isinstance(model, GPT):
        raise CheckpointError(f"{path} is a reward model; give a language model, such as sft.py writes")
    own = vocabulary(path, model, meta)
    if tokenizer and data.tokenizer(tokenizer).meta != own.meta:
        raise CheckpointError(f"--tokenizer {tokenizer} is not that of {path} ({own.meta['name']}); leave it out, or run sft.py with it")
    if task:
        same_world(path, own, meta, task)
    return model, own, meta


def vocabulary(path, model, meta):
    """-> the tokenizer that a checkpoint was trained with"""
    if "tokenizer" not in meta:
        raise CheckpointError(f"{path} does not say which tokenizer it was trained with; train it again")
    own = data.Tokenizer(meta["tokenizer"])
    if own.size != model.config.vocab_size:
        raise CheckpointError(f"{path} has a vocabulary of {model.config.vocab_size}, but its tokenizer {own.size}; train it again")
    return own


def outline(path, o, task):
    """-> (model, tokenizer, meta) of --predict: a model on no device. Its size is that of --predict, of the checkpoint at `path` if there
    is one, or the toy size; --n-layer and the like change it."""
    tokenizer, size, source = data.tokenizer(own=task.tokenizer), dict(common.SIZES.get(o.predict, {})), "not read; in its place:"
    if o.predict == "own":
        size = {"n_layer": 2, "n_embd": 64, "block_size": 8} if task.tokenizer else {}
        with contextlib.suppress(Exception):  # no file, or none of ours
            size = torch.load(path, map_location="meta", weights_only=True, mmap=True)["config"]
            source = "of it only the shape is read:"
        size = {"vocab_size": tokenizer.size, "block_size": (not path and o.block_size) or GPTConfig.block_size} | size
    size |= {name: getattr(o, name) for name in ("n_layer", "n_head", "n_embd", "vocab_size") if name in o.given and getattr(o, name)}
    if task.name.startswith("tokens"):
        size["block_size"] = max(task.prompt + task.max_new_tokens, size.get("block_size", 0))
    config = GPTConfig(**size)
    if config.n_embd % config.n_head:
        raise common.UserError(f"--n-embd {config.n_embd} is not a multiple of --n-head {config.n_head}")
    with torch.device("meta"):
        model = GPT(config)
    shape = f"{source} {config.n_layer} layers, {config.n_head} heads, width {config.n_embd}, vocabulary {config.vocab_size}"
    return model, tokenizer, {"shape": shape, "task": task.name, "template": data.TEMPLATE}


def same_world(path, tokenizer, meta, task):
    """Raises where the task, or the one that the checkpoint was trained on, has a vocabulary of its own that the other lacks."""
    if task.tokenizer != (tokenizer.meta if tokenizer.longest else None):
        owner = task.name if task.tokenizer else meta["task"]
        raise CheckpointError(f"{path} was trained on {meta['task']}, and {owner} has a vocabulary of its own; give a checkpoint that "
                              f"sft.py --task {task.name} makes")  # fmt: skip


def open_or_make(o, task):
    """-> (policy, tokenizer, template) of a script that needs no earlier stage: from --init, or random weights."""
    if o.init or o.predict:
        if given := sorted(o.given & {"n_layer", "n_head", "n_embd"} if not o.predict else ()):
            raise common.UserError(f"--{given[0].replace('_', '-')} shapes random weights; leave it out with --init")
        policy, tokenizer, meta = open_checkpoint(o.init, o, task)
        return policy, tokenizer, meta["template"]
    if o.n_embd % o.n_head:
        raise common.UserError(f"--n-embd {o.n_embd} is not a multiple of --n-head {o.n_head}")
    tokenizer = data.tokenizer(o.tokenizer, task.tokenizer)
    config = GPTConfig(tokenizer.size, o.block_size or GPTConfig.block_size, o.n_layer, o.n_head, o.n_embd)
    return GPT(config, o.seed), tokenizer, data.TEMPLATE


def find_reference(o, run, tokenizer, block_size):
    """-> the path of the checkpoint that such a script's policy is compared with: --init, else an earlier out/<task>/sft.pt; "", aloud,
    without one."""
    path = o.init or common.checkpoint_path(o.task, "sft")
    if o.predict:
        return ""
    try:
        ref, ref_tokenizer, _ = open_checkpoint(path)
        if ref_tokenizer.meta == tokenizer.meta and ref.config.block_size >= block_size:
            return path
        why = f"{path} has another vocabulary or a shorter context"
    except CheckpointError as e:
        why = "an earlier SFT checkpoint would be one" if not os.path.exists(path) else str(e)
    run.say(f"nothing to compare with ({why}): win rate and KL will be left out")
    return ""


def reopen(run, path):
    """-> the reference at `path` for an evaluation, None for ""; a method that trains without one does not hold it meanwhile."""
    return run.frozen(run.prepare(open_checkpoint(path)[0])) if path else None


def describe(meta):
    """One line on a checkpoint, so that a smoke test's two steps are not mistaken for training."""
    if "shape" in meta:
        return meta["shape"]
    reward = "" if meta["reward"] is None else f", reward {meta['reward']:.2f}"
    return f"{meta['method']} on {meta['task']}, {meta['steps']} steps{reward}"


def context(o, model):
    """-> the longest sequence of this run: --block-size, which may only shorten the model's own."""
    if 0 < o.block_size < 8:
        raise common.UserError(f"--block-size {o.block_size} leaves no room for a prompt and a response; 8 is the least")
    if o.block_size > model.config.block_size:
        own = model.config.block_size
        raise common.UserError(f"--block-size {o.block_size} is more than the checkpoint's {own}; it may only shorten it")
    return o.block_size or model.config.block_size


class Reward:
    """What responses earn. how: "task", the task's own reward; "rm", the score of a reward model; or a user's function,
    "FILE.py:function" (data/rewards.py). A wrong one is told at once; `open` does the rest, once the tokenizer is known."""

    def __init__(self, run, task, how="task"):
        self.run, self.task, self.how, self.model = run, task, how, None
        self.reads = None  # the vocabulary of a judge, which reads text
        self.unended = None  # the score of a response that did not end (ppo.py); None: the reward model's, at its last token
        self.bound = task.bound if how in ("task", "rm") else None
        if how not in ("task", "rm"):
            if common.is_exact(task.name):
                raise common.UserError(f"--reward {how}: {task.name} keeps its own rewards, whose optimum is known; give task or rm")
            self.earn = data.user_reward(how, task.prompts(1, 0)[0][1])
        elif how == "task" and not task.has_reward:
            raise common.UserError(f'--reward task: not every row of {task.name} has an "answer" to check against; give --reward rm, or a '
                                   "function of your own, --reward FILE.py:function")  # fmt: skip
        elif how == "task":
            self.earn = task.reward

    def open(self, tokenizer, reward_model="", block_size=0, judge=False):
        """reward_model: the path of its checkpoint. block_size: the longest sequence that it will read. judge: it was trained elsewhere,
        and reads text; what is longer than its context loses the prompt's beginning, then the response's end. -> this reward"""
        self.tokenizer = tokenizer
        if self.how == "rm":
            o = self.run.o if self.run.predict else None
            model, meta = open_reward_model(reward_model, None if judge else tokenizer, 0 if judge else block_size, o, self.task)
            self.model = self.run.frozen(self.run.prepare(model))
            if judge and not o:
                self.reads = vocabulary(reward_model, model, meta)
                same_world(reward_model, self.reads, meta, self.task)
            if not o:
                print(f"{reward_model} judges the responses: {describe(meta)}", flush=True)
        return self

    def __call__(self, rows, s):
        """rows: P of (ids, prompt, columns). s: the Samples of as many responses to each, in order. -> (B,) rewards"""
        if self.run.predicting and not self.model:
            return torch.arange(len(s.ids)) % 2.0  # no answer is there to be judged
        if self.model:
            with torch.no_grad(), self.run.autocast():
                parts = self._read(rows, s) if self.reads else [s.take(rows) for rows in torch.arange(len(s.ids)).split(ROWS)]
                score = torch.cat([self.model.score(part.ids, part.mask) for part in parts])
            return score if self.unended is None else torch.where(s.finished, score, self.unended)
        return torch.tensor([self.earn(*one, **columns) for one, columns in self._each(rows, s)], device=s.ids.device)

    def correct(self, rows, s):
        """-> (B,) bool: what the task calls correct; under another reward, what earns more than 0"""
        if self.run.predicting:
            self(rows, s)
            return torch.arange(len(s.ids)) % 2 > 0  # so that every group is mixed
        if self.how != "task":
            return self(rows, s) > 0
        return torch.tensor([self.task.correct(*one, **columns) for one, columns in self._each(rows, s)], device=s.ids.device)

    def _each(self, rows, s):
        """((prompt, completion, ended), columns) of each response"""
        texts = completions(self.tokenizer, s)
        rows = [row for row in rows for _ in range(len(texts) // len(rows))]
        return [((prompt, text, end), columns) for (_, prompt, columns), text, end in zip(rows, texts, s.finished.tolist())]

    def _read(self, rows, s):
        """-> what a judge reads: the texts, encoded by its own vocabulary, ROWS at a time"""
        texts = [(prompt, text if end else tuple(self.reads.encode(text))) for (prompt, text, end), _ in self._each(rows, s)]
        texts, _ = data.encode(texts, self.reads, self.model.config.block_size, truncate=True)
        batches = [data.pad(texts[i : i + ROWS], s.ids.device) for i in range(0, len(texts), ROWS)]
        return [Samples(batch.spread(batch.ids), batch.spread(batch.mask), None, None) for batch in batches]

    def state_dict(self):
        return {"unended": self.unended}

    def load_state_dict(self, state):
        self.unended = state["unended"]

    def probe(self, policy, rows, max_new_tokens):
        """Judges one response to each row: a function that does not work stops the run before anything is written."""
        if self.run.predict:
            return
        with self.run.autocast():
            s = sample(policy, [ids for ids, *_ in rows], max_new_tokens, self.tokenizer.end_id, generator=torch.Generator().manual_seed(0))
        self(rows, s)


def completions(tokenizer, s):
    """-> the samples' responses as text"""
    return [tokenizer.decode(ids[mask].tolist()) for ids, mask in zip(s.ids.cpu(), s.mask.cpu())]


def open_reward_model(path, tokenizer, block_size=0, o=None, task=None):
    """-> (a ScalarGPT, meta). Raises where it is none, or has another vocabulary than `tokenizer` (None: any will do) or a shorter
    context than the policy. With --predict it is a shape as large as the policy."""
    if o and o.predict:
        policy, _, meta = outline(o.init or common.stage("sft.py", o), o, task)
        with torch.device("meta"):
            return ScalarGPT(policy.config), meta
    model, meta = load(path)
    if not isinstance(model, ScalarGPT):
        raise CheckpointError(f"{path} is a language model; give a reward model, such as reward_model.py writes")
    if tokenizer and meta["tokenizer"] != tokenizer.meta:
        raise CheckpointError(f"{path} has another vocabulary than the policy; give a reward model that started from the same checkpoint")
    if model.config.block_size < block_size:
        own = model.config.block_size
        raise CheckpointError(f"{path} reads at most {own} tokens, and the policy {block_size}; --block-size {own} shortens the policy's")
    return model, meta


def choose_yardstick(run, task, *args, aim=("", {}), reward=None, **more):
    """-> what measures a policy on the task: `data.Enumeration` where its outcomes can be listed, else `Yardstick`. aim: the method
    and its options, which say what its loss aims at. reward: the Reward that it was trained with."""
    if common.is_exact(task.name):
        return data.Enumeration(run, task, *args, aim=aim, **more)
    return Yardstick(run, task, *args, reward=reward, **more)


class Yardstick:
    """Held-out prompts, encoded before the training so that what does not fit is told then. `implicit` says what the method takes for a
    reward: "sum" or "mean" (of log π/π_ref over the response), "logp mean" (of log π), "none", or "nll": held-out answers are scored."""

    def __init__(self, run, task, tokenizer, block_size, max_new_tokens=0, truncate=False, implicit="nll", seed=0, reward=None):
        self.run, self.task, self.tokenizer, self.implicit, self.seed = run, task, tokenizer, implicit, seed
        self.max_new_tokens = max_new_tokens or min(task.max_new_tokens, block_size // 2)
        how, self.rewards = reward.how if reward else "task", {}
        if how in ("task", "rm") and task.has_reward:
            self.rewards["reward"] = Reward(run, task).open(tokenizer)
        if how != "task":
            self.rewards["score" if how == "rm" else "reward"] = reward
        self.prompts = task.prompts(PROMPTS, seed, split="test")
        limit = block_size - self.max_new_tokens
        ids, note = data.encode_prompts([prompt for prompt, _ in self.prompts], tokenizer, limit, truncate)
        self.prompts = [(x, *prompt) for x, prompt in zip(ids, self.prompts)]
        self.rows, self.notes = [], [note]
        if not task.has_reward and implicit != "none":
            draw = task.demonstrations if implicit == "nll" else task.feedback if task.unpaired else task.preferences
            self.rows, note = data.encode(draw(PROMPTS, seed, split="test"), tokenizer, block_size, truncate)
            self.notes.append(note and f"held out: {note}")
            if implicit != "nll" and task.unpaired and len({row[2] for row in self.rows}) < 2:
                self.rows = []
                self.notes.append("the held-out rows all have the same label: accuracy will be left out; --eval-file names others")

    @torch.no_grad()
    def measure(self, policy, ref=None, n=PROMPTS):
        """-> (figures, samples): the figures of this file's docstring, and (prompt, reference's response, policy's) of two prompts."""
        figures = {}
        texts, ended, tokens, earned = self._respond(policy, n, self.seed, score := Scores(policy, ref))
        if ref is not None:
            ref_texts, _, ref_tokens, ref_earned = self._respond(ref, n, self.seed + 1_000_003)
            figures["ref_length"] = ref_tokens / len(ref_texts)
        for name in self.rewards:
            figures[name] = statistics.fmean(earned[name])
            if len(texts) > 1:
                figures[f"{name}_se"] = statistics.stdev(earned[name]) / len(texts) ** 0.5
            if ref is not None:
                figures[f"ref_{name}"] = statistics.fmean(ref_earned[name])
        if "reward" in figures and ref is not None:
            figures["win_rate"] = statistics.fmean((a > b) + 0.5 * (a == b) for a, b in zip(earned["reward"], ref_earned["reward"]))
        if self.rows and self.implicit == "nll":
            figures["nll"] = self._nll(policy)
        elif self.rows and (ref is not None or self.implicit == "logp mean"):
            figures["accuracy"] = self._accuracy(policy, ref)
        if ref is not None:
            kl = torch.cat(score.kl)
            figures["kl"] = kl.mean().item()
            if len(kl) > 1:
                figures["kl_se"] = (kl.std() / len(kl) ** 0.5).item()
        figures |= {"length": tokens / len(texts), "ended": statistics.fmean(ended), "entropy": score.entropy / tokens}
        figures["prompts"] = len(texts)
        order = sorted(range(len(texts)), key=lambda i: ref is not None and texts[i] == ref_texts[i])  # two that differ, if there are
        shown = [(self.prompts[i][1], ref_texts[i] if ref is not None else None, texts[i]) for i in order[:2]]
        return figures, shown

    def _respond(self, model, n, seed, score=None):
        """-> (texts, ended, tokens in all, rewards by name) of one response to each of the first n prompts."""
        generator, texts, ended, tokens, earned = torch.Generator().manual_seed(seed), [], [], 0, {name: [] for name in self.rewards}
        for i in range(0, min(n, len(self.prompts)), ROWS):
            rows = self.prompts[i : min(i + ROWS, n)]
            with self.run.autocast():
                s = sample(model, [ids for ids, *_ in rows], self.max_new_tokens, self.tokenizer.end_id, generator=generator)
                if score:
                    score.add(s)
            texts += completions(self.tokenizer, s)
            for name, reward in self.rewards.items():
                earned[name] += reward(rows, s).tolist()
            ended += s.finished.tolist()
            tokens += s.mask.sum().item()
        return texts, ended, tokens, earned

    def _logps(self, model, rows):
        """Summed response log-probs of (prompt, response) rows, and their lengths."""
        parts = []
        for i in range(0, len(rows), 32):
            batch = data.pad(rows[i : i + 32], self.run.device)
            with self.run.autocast():
                parts.append(batch.spread(model.logprobs(batch.ids, batch.mask, index=batch.index).sum(1)))
        return torch.cat(parts), torch.tensor([len(y) for _, y in rows], device=self.run.device)

    def _nll(self, policy):
        logp, length = self._logps(policy, self.rows)
        return (-logp.sum() / length.sum()).item()

    def _accuracy(self, policy, ref):
        """The share of pairs with the higher implicit reward on the chosen answer. Of unpaired rows each desirable one makes a
        pair with each undesirable one."""

        def implicit(rows):
            logp, length = self._logps(policy, rows)
            if self.implicit != "logp mean":
                logp = logp - self._logps(ref, rows)[0]
            return logp if self.implicit == "sum" else logp / length

        if isinstance(self.rows[0][2], bool):
            reward, label = implicit([row[:2] for row in self.rows]), torch.tensor([row[2] for row in self.rows])
            chosen, rejected = reward[label][:, None], reward[~label]
        else:
            chosen, rejected = implicit(data.sides(self.rows)).chunk(2)
        return (chosen > rejected).float().mean().item()


class Scores:
    """What the policy's samples say of it: Σ log π/π_ref of each response, and the summed entropy."""

    def __init__(self, policy, ref):
        self.policy, self.ref, self.kl, self.entropy = policy, ref, [], 0.0

    def add(self, s):
        logp, entropy = self.policy.logprobs(s.ids, s.mask, entropy=True)
        self.entropy += entropy.sum().item()
        if self.ref is not None:
            self.kl.append((logp - self.ref.logprobs(s.ids, s.mask)).sum(1))


def printable(text):
    """A response as one can look at it: a model that has learned little draws control characters, which a terminal would obey."""
    return "".join(c if c.isprintable() or c == "\n" else "·" for c in text.strip())


def report(title, figures, samples, bound=None):
    """Prints the figures, and the samples beside the reference's: people would rather look."""
    f, name = figures, "pass@1" if bound == 1 else f"gold reward (of {bound:g})" if bound else "reward"
    rows = [
        (name, f.get("ref_reward"), f.get("reward"), f" ± {f['reward_se']:.2f}" if "reward_se" in f else ""),
        ("score of the reward model", f.get("ref_score"), f.get("score"), f" ± {f['score_se']:.2f}" if "score_se" in f else ""),
        ("win rate against the reference", None, f.get("win_rate"), ""),
        ("held-out preference accuracy", None, f.get("accuracy"), ""),
        ("held-out loss, nats a token", None, f.get("nll"), ""),
        ("KL(π‖π_ref), nats a response", None, f.get("kl"), f" ± {f['kl_se']:.2f}" if "kl_se" in f else ""),
        ("length, tokens", f.get("ref_length"), f["length"], ""),
        ("ended", None, f["ended"], ""),
        ("entropy, nats a token", None, f["entropy"], ""),
    ]
    print(f"\n{title}: {f['prompts']} test prompts" + f", each with all its {f.get('outcomes')} outcomes" * ("outcomes" in f))
    print(f"{'':<34}{'reference' if 'kl' in f else '':>10}{'policy':>10}")
    for name, before, after, note in rows:
        if after is not None:
            print(f"{name:<34}{'' if before is None else format(before, '.2f'):>10}{after:>10.2f}{note}")
    if "outcomes" in f:
        print("", *samples, sep="\n")
        samples = []
    for prompt, before, after in samples:
        print(f"\n{prompt if len(prompt) < 400 else '… ' + prompt[-400:]}")
        for name, text in (("reference", before), ("policy", after)):
            if text is not None:
                print(f"  {name:>9} | " + printable(text).replace("\n", "\n" + " " * 12 + "| "))
    print(flush=True)


@dataclass
class Options:
    checkpoint: str  # the .pt file of a language model
    prompt: str = ""  # answer this prompt instead (\n stands for a new line)
    task: str = ""  # the task to evaluate on (default: the one it was trained on)
    eval_file: str = ""  # JSONL file to evaluate on (default: the task's test split)
    reference: str = ""  # checkpoint to compare with (default: the one it started from)
    reward: str = ""  # what judges a response: task, rm, or FILE.py:function, whose file is run (default: as in its training)
    prompts: Count = PROMPTS  # test prompts, at most 512
    max_new_tokens: Whole = 0  # longest sampled response, in tokens (0: as at the end of the training)
    truncate: bool = False  # cut prompts that do not fit, from their left
    seed: Whole = 0  # of the samples
    device: str = "auto"  # cpu, cuda, cuda:1, mps (default: cuda where there is one, else cpu)
    dtype: Literal["auto", "float32", "float64", "bfloat16"] = "auto"  # bfloat16: autocast (auto: on a GPU that has it)


@common.command(CheckpointError, data.DataError)
def main(argv=None):
    o = common.parse(Options, argv)
    run = common.Compute(o)
    policy, tokenizer, meta = open_checkpoint(o.checkpoint)
    policy = run.frozen(run.prepare(policy))
    ref, path, trained = None, o.reference or meta["reference"], meta["options"]
    block = trained["block_size"] or policy.config.block_size
    if path and not os.path.exists(path) and not o.reference:
        path = os.path.join(os.path.dirname(o.checkpoint), os.path.basename(path))  # the folder was moved
    if path and (o.reference or os.path.exists(path)):
        ref, ref_tokenizer, _ = open_checkpoint(path)
        block = min(block, ref.config.block_size)
        if ref_tokenizer.meta != tokenizer.meta:
            raise common.UserError(f"{path} has another vocabulary than {o.checkpoint}; give another --reference")
        ref = run.frozen(run.prepare(ref))
    else:
        words = f"win rate{', KL and accuracy' if meta['implicit'] in ('sum', 'mean') else ' and KL'} are left out; --reference names one"
        print(f"no reference{f' ({path} is missing)' if path else ''}: {words}")

    n, truncate = o.max_new_tokens or meta["max_new_tokens"], o.truncate or trained["truncate"]
    if o.prompt:
        ids, _ = data.encode_prompts([o.prompt.replace("\\n", "\n")], tokenizer, block - n, truncate)
        print(o.prompt.replace("\\n", "\n"))
        for name, model in (("reference", ref), ("policy", policy)):
            if model is not None:
                with run.autocast():
                    s = sample(model, ids, n, tokenizer.end_id, generator=torch.Generator().manual_seed(o.seed))
                print(f"  {name:>9} | {printable(tokenizer.decode(s.ids[s.mask].tolist()))}")
        return
    task = data.task(o.task or meta["task"], o.eval_file or ("" if o.task else trained["eval_file"]))
    if common.is_exact(task.name) and (unread := o.given & {"prompts", "seed", "truncate"}):
        raise common.UserError(f"--{min(unread)}: every outcome of {task.name} is counted, nothing is drawn or cut; leave it out")
    if common.is_exact(task.name) and o.reference:
        print(f"π_ref is {o.reference}: π* and the loss's optimum are those of this reference")
    same_world(o.checkpoint, tokenizer, meta, task)
    task.template = meta["template"]
    aim, reward, judge = (meta["method"], trained), None, bool(trained.get("judge"))
    if o.reward:
        rm = trained.get("reward_model") or common.checkpoint_path(task.name, "reward_model")
        reward = Reward(run, task, o.reward).open(tokenizer, rm, judge=judge)
    elif not o.task and trained.get("reward", "task") != "task":
        try:
            reward = Reward(run, task, trained["reward"]).open(tokenizer, trained["reward_model"], judge=judge)
        except (CheckpointError, data.DataError) as e:
            print(f"what it was trained with is left out ({e}); --reward names another")
    if reward and reward.model:
        reward.unended = meta.get("unended")
    yardstick = choose_yardstick(run, task, tokenizer, block, n, truncate, meta["implicit"], o.seed, aim=aim, reward=reward)
    for note in filter(None, yardstick.notes):
        print(note)
    figures, samples = yardstick.measure(policy, ref, o.prompts)
    report(f"{meta['method']} on {task.name}", figures, samples, reward.bound if reward else task.bound)


if __name__ == "__main__":
    main()

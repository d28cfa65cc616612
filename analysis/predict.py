"""Predicts the memory of a step at any size: runs the scripts' own losses on fake tensors.

A fake tensor has a shape, but no numbers. The models, the batch and AdamW's moments are made of
fake tensors, and training.memory counts one optimizer step, as it counts the second step of a run.
rows.py names the models that a script holds; this file knows what its loop makes around
compute_loss.
"""

import contextlib
import importlib
import inspect
import os
from dataclasses import asdict, replace
from functools import partial
from types import SimpleNamespace
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map_only

import data
from analysis.rows import EVERY, longest_context, options
from data import UserError
from dpo import ScoredPair
from gpt import GPT, GPTConfig, ScalarGPT, load
from hf import weights
from packing import last_token, pack
from training import Compute, Rollout, distributed, lora, memory, sampling, sharding
from training.adamw8bit import Outline
from training.checkpoint import is_checkpoint
from training.cut import lengths
from training.options import flag
from training.placement import Whole
from training.reward import ROWS

SIZES = {
    "1b": GPTConfig(50304, 2048, 24, 16, 2048),  # 1.3 billion parameters, GPT-3's third model
    "7b": GPTConfig(50304, 2048, 32, 32, 4096),  # 6.7 billion, its seventh
}
SETTINGS = [(on, dtype) for on in (False, True) for dtype in ("bfloat16", "bfloat16-pure")]
CARDS = (24, 40, 80, 141)  # GB
SPARE = 2.0  # GiB to leave free on a card: CUDA context, workspaces, fragmentation
ROLES = ("policy", "ref", "teacher", "critic", "reward")
LANGUAGE = ROLES[:3]  # the models with a vocabulary


def predict(row, o, config, ranks=1, shard=False):
    """Predicts an optimizer step of a row, with its script's options `o` and models of that config.
    -> models: the ledger's records; predicted: bytes at the peak by category; predicted_bytes:
    their sum; predicted_most: the largest size of each category. With several ranks, each takes a
    step with these options, and the bytes are those of one; shard: each holds parts of the models.
    """
    with pretended(ranks) if shard else contextlib.nullcontext():
        return _predict(row, o, config, ranks, shard)


@contextlib.contextmanager
def pretended(ranks):
    """Makes this process the first of `ranks` processes for the body of a with statement. Messages
    between them do nothing."""
    import torch.testing._internal.distributed.fake_pg as fake

    distributed.mesh.cache_clear()
    torch.distributed.init_process_group("fake", store=fake.FakeStore(), rank=0, world_size=ranks)
    try:
        with patch.object(distributed, "size", ranks):
            yield
    finally:
        torch.distributed.destroy_process_group()
        distributed.mesh.cache_clear()


def _predict(row, o, config, ranks, shard):
    method, compute = EVERY[row], Compute(o)
    compute_loss = importlib.import_module(method.script).compute_loss
    takes = inspect.signature(compute_loss).parameters
    models = outlines(method.models.split(), o, config, compute)
    if shard:
        compute.placement = sharding.Parts(compute.device, compute.weights)
        for model in models.values():
            sharding.cut(model, "cpu")
    arguments = {role: models.get(role) for role in ROLES if role in takes}
    task = data.task(o.task)
    tokenizer = data.tokenizer(own=task.tokenizer)
    block_size = o.block_size or config.block_size
    if method.samples:
        response = task.longest(o.max_new_tokens, block_size)  # each is as long as it may be
        texts = task.prompts(o.batch_size, o.seed)
        prompts, _ = data.encode_prompts(texts, tokenizer, block_size - response, o.truncate)
        step = Sampled(method, o, prompts, response, ranks)
    else:
        batches = labelled(method, o, task, tokenizer, block_size)

    with FakeTensorMode(allow_non_fake_inputs=True):
        for model in models.values():
            model.to_empty(device="cpu")
        if o.lora and "ref" in models and not shard:
            models["ref"] = lora.base(models["policy"])
            arguments |= {"ref": models["ref"]} if "ref" in arguments else {}
        trained = [p for model in models.values() for p in model.parameters() if p.requires_grad]
        plain = o.optimizer == "adamw"
        optimizer = torch.optim.AdamW(trained, fused=True) if plain else Outline(trained)
        for p in trained:
            p.grad = torch.zeros_like(p)
        optimizer.step()  # makes its moments
        optimizer.zero_grad()
        with memory.track(models, optimizer) as tracker:
            if method.samples:
                rollout, batches = step.passes(models, compute, tracker)
            for batch in batches:
                batch = fake(batch)
                with compute.autocast():
                    losses, metrics = compute_loss(**arguments, batch=batch, o=o)
                losses.sum().backward()
            optimizer.step()
    return {
        "models": memory.records(models, o.optimizer),
        "predicted_bytes": tracker.peak,
        "predicted": tracker.parts,
        "predicted_most": dict(tracker.most),
    }


def outlines(held, o, config, compute):
    """held: a list such as ["policy*", "ref"], in which * marks trained models -> {role: model},
    with shapes but no storage. There is a reward model only if the options make one the judge."""
    reward = getattr(o, "reward", "rm")
    models = {}
    for name in held:
        role = name.strip("*")
        if name != "reward" or reward == "rm" or is_checkpoint(reward):
            with torch.device("meta"):
                model = (GPT if role in LANGUAGE else ScalarGPT)(config)
            model.checkpoint_activations = o.checkpoint_activations
            trained = name.endswith("*")
            with patch.object(compute, "placement", Whole("meta", compute.weights)):
                model = compute.place(model, frozen=bool(o.lora) or not trained)
                model = compute.adapt(model) if trained else compute.freeze(model)
            models[role] = model.to("meta")  # the adapters too
    return models


def labelled(method, o, task, tokenizer, block_size):
    """-> the micro-batches of a step on rows of the task"""
    draw, fixed = getattr(task, method.data), getattr(o, "pairs", 0) or task.size
    if fixed:
        rows = data.Batches(draw, fixed, tokenizer, block_size, o)[1]
    else:
        texts = draw(o.batch_size, f"{o.seed} step 1")
        rows, _ = data.encode(texts, tokenizer, block_size, o.truncate)
    if getattr(o, "precompute_ref", False):
        rows = [ScoredPair(*pair, 0.0, 0.0) for pair in rows]
    pad = partial(data.pad_pairs if method.pairs else data.pad, ends=method.data == "graded")
    size = o.micro_batch or len(rows)
    return [pad(rows[i : i + size]) for i in range(0, len(rows), size)]


class Sampled:
    """A step of a script that samples: its prompts, responses of the greatest length, and the
    micro-batches of both."""

    def __init__(self, method, o, prompts, response, ranks):
        self.o, self.wide = o, method.columns.split()
        pairs, parts = method.pairs, getattr(o, "minibatches", 1)
        self.group = o.samples_per_prompt if pairs else o.group
        self.scored = method.judged  # whether log-probs of all responses are computed
        self.prompts, self.response = [row[0] for row in prompts], response
        drawn = self.rollout(2 if pairs else self.group)
        self.drawn = list(cut(drawn, o.micro_batch, o.micro_tokens))
        self.rollout_of_all = Rollout.cat([drawn] * ranks)
        self.on_policy = parts * getattr(o, "updates", 1) == 1
        minibatch = drawn
        if not self.on_policy:
            generator = torch.Generator().manual_seed(o.seed)
            minibatch = next(iter(self.rollout_of_all.minibatches(2, parts, generator)))
        share = next(cut(minibatch, len(drawn) // parts))
        size = 2 * o.micro_batch if pairs else o.micro_batch
        self.share = list(cut(share, size, o.micro_tokens))
        self.packed_prompts = sampling.encode_prompts(self.prompts, "cpu")[1]
        self.judged = list(cut(self.rollout(self.group), ROWS))
        self.packed_judged = [pack(x.ids, last_token(x.mask)) for x in self.judged]
        assert all(part.tokens for part in self.drawn + self.share)  # packed, of real numbers

    def rollout(self, group):
        """-> a Rollout with `group` responses per prompt, as sampling returns it"""
        digits = torch.Generator().manual_seed(0)
        answers = torch.randint(10, (group * len(self.prompts), self.response), generator=digits)
        prompts = [tuple(prompt) for prompt in self.prompts for _ in range(group)]
        batch = data.pad(list(zip(prompts, map(tuple, answers.tolist()))))
        ids, mask = batch.unfold(batch.ids), batch.unfold(batch.mask)
        return Rollout(ids=ids, mask=mask, logp=mask.float())

    def passes(self, models, compute, tracker):
        """Samples responses, judges and scores them. -> (the rollout of all processes, the
        micro-batches of an optimizer step)"""
        tracker.during("sampling")
        with torch.no_grad():
            self.sample(models["policy"], compute)
            judged = zip(self.judged, self.packed_judged)
            for part, packed in judged if "reward" in models else ():
                with compute.autocast():
                    models["reward"].score(fake(part).ids, fake(part).mask, fake(packed))
            rollout = fake(self.rollout_of_all)
            tracker.during(None)
            for part in self.drawn if self.scored else ():
                part = fake(part)
                for role, model in models.items():
                    with compute.autocast():
                        if role == "critic":
                            model.values_before(part.ids, part.mask, part.packed)
                        elif role != "reward":
                            model.logprobs(part.ids, part.mask, packed=part.packed)
        return rollout | self.columns(rollout), (self.batch(part) for part in self.share)

    def sample(self, policy, compute):
        """Allocates the tensors that `sampling.sample` holds at the last token."""
        n, lengths = len(self.prompts) * self.group, [len(prompt) for prompt in self.prompts]
        uniform = torch.empty(n, self.response)
        _kept = torch.zeros(n, self.response).long(), torch.ones(n, self.response)
        with compute.autocast():
            model = compute.to_sample(policy)
            with torch.inference_mode():
                packed = fake(self.packed_prompts)
                rows = sampling.Drawing(model, packed, lengths, self.group, uniform)
                rows.cache.width = rows.cache.mask.size(2) - 1
                rows.step()

    def batch(self, part):
        """-> a micro-batch with the columns that the script's loop has given it"""
        batch = fake(part)
        columns = self.columns(batch)
        batch.__dict__.update(columns | {"old_logp": None} if self.on_policy else columns)
        return batch

    def columns(self, rollout):
        wide = {name: torch.empty_like(rollout.logp) for name in self.wide}
        adv = torch.empty(len(rollout), 1)
        return {"old_logp": None, "ref_logp": None, "adv": adv} | wide


def fake(x):
    """-> the same structure, its tensors without numbers"""
    found = tree_map_only(torch.Tensor, torch.empty_like, x)
    if isinstance(x, Rollout):
        found = Rollout(**fake(vars(x)))
        if hasattr(x, "_packed"):
            found._packed = fake(x._packed)
    return found


def cut(rollout, size, tokens=0):
    """Yields at most `size` rows at a time (0: all), with at most so many tokens (0: any)."""
    for part in distributed.cut(len(rollout), size or len(rollout), lengths(rollout), tokens):
        yield rollout[part]


# ---- what to predict


def of_run(row, first):
    """The first line of a run's record -> the predicted figures of its step; {} if the task is a
    file, or if the checkpoint is gone"""
    o = SimpleNamespace(**first["options"] | {"device": "cpu"})
    o.dtype = first["dtype"] if o.dtype == "auto" else o.dtype
    if data.kind(o.task) == "file":
        return {}
    try:
        found = predict(row, o, load(o.out)[0].config)
    except ValueError:
        return {}
    return {name: x for name, x in found.items() if name != "models"}


def settings(o):
    """The options of compare.py -> (the task that gives the rows, the config of the models)"""
    n, micro = o.batch_size, o.micro_batch or o.batch_size
    if (n % 2 or micro % 2) and any(EVERY[row].pairs for row in o.methods):
        sizes = f"--batch-size {n} --micro-batch {micro}"
        raise UserError(f"{sizes}: sequences come in pairs; give even numbers")
    made_up = o.predict != "own" or data.kind(o.task) == "file"
    longest = 2048 if o.predict in ("own", *SIZES) else min(2048, of_folder(o).block_size)
    length = o.seq_len or (longest if made_up else 0)
    task = f"tokens:{length - length // 2}+{length // 2}" if length else o.task
    if o.predict == "own":
        sft = options("sft", "--task", task)
        size = data.tokenizer(own=data.task(task).tokenizer).size
        length = sft.block_size or longest_context(task)
        config = GPTConfig(size, length, sft.n_layer, sft.n_head, sft.n_embd)
    elif o.predict in SIZES:
        config = replace(SIZES[o.predict], block_size=length)
    else:
        config = of_folder(o)
    config = replace(config, **{x: getattr(o, x) for x in asdict(config) if x in o.given})
    if not config.head_dim and config.n_embd % config.n_head:
        raise UserError(f"--n-embd {config.n_embd} is not a multiple of --n-head {config.n_head}")
    return task, config


def of_folder(o):
    """-> the config of the checkpoint that --predict names, from its config.json"""
    if not os.path.isdir(o.predict):
        raise UserError(f"--predict {o.predict}: give own, 1b, 7b, or a checkpoint's folder")
    if sizes := o.given & {"n_layer", "n_head", "n_embd", "vocab_size"}:
        raise UserError(f"{flag(min(sizes))}: {o.predict} has its own sizes; leave it out")
    return weights.read_config(o.predict)


def arguments(row, recompute, dtype, n, micro=0, lora=0):
    """-> the command line of a row's script, without its task. n: sequences per step; micro:
    sequences per forward pass (0: all); lora: the adapters' rank"""
    micro, argv = micro or n, []
    if EVERY[row].pairs:
        n, micro = n // 2, micro // 2
    if row == "ppo":
        argv = ["--group", 1, "--reward", "rm"]
    elif EVERY[row].grouped:
        argv = ["--group", n]
        n = 1
    if EVERY[row].grouped and row != "rlaif":
        argv += ["--minibatches", 1, "--updates", 1]
    argv += ["--checkpoint-activations" if recompute else "--no-checkpoint-activations"]
    argv += ["--lora", lora] if lora else []
    return argv + ["--batch-size", n, "--micro-batch", micro, "--dtype", dtype]


def ask(
    row, task, config, recompute, dtype, n, micro=0, lora=0, ranks=1, shard=False, optimizer="adamw"
):
    """Predicts one cell of the table that --predict prints. -> its entry in compare.json. The
    arguments are those of `arguments`"""
    argv = arguments(row, recompute, dtype, n, micro, lora)
    o = options(row, "--task", task, *argv)
    o.optimizer = optimizer  # past the check: a prediction needs no package
    found = predict(row, o, config, ranks, shard)
    facts = {"method": row, "dtype": dtype, "checkpoint_activations": recompute}
    return facts | found | {"card": fits(found["predicted_bytes"])}


def fits_on(card, size):
    """Whether a step of that many bytes fits a card of that many GB, with room to spare"""
    return size / 2**30 + SPARE <= card


def fits(size):
    """Bytes -> the smallest card that has room for them"""
    return next((f"{card} GB" for card in CARDS if fits_on(card, size)), "none")

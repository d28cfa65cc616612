"""Collects the answers of several checkpoints to the same held-out prompts, side by side."""

import torch

import data
from training import Compute, checkpoint
from training.judge import Judge, completions

PROMPTS = 10


def answers(path, task, o, n=PROMPTS):
    """Samples one response of a checkpoint to each of n test prompts, at temperature 1 and --seed.
    -> [{"prompt", "text", "tokens", "ended", "reward"}]. tokens includes the end token; reward is
    that of the task, or None."""
    run = Compute(o)
    model, tokenizer, meta = checkpoint.load(path)
    run.tokenizer, longest = tokenizer.with_chat(None, {}), meta["max_new_tokens"]
    task.template = meta["template"]
    prompts = task.prompts(n, o.seed, split="test")
    limit = model.config.block_size - longest
    rows = list(data.encode_prompts(prompts, run.tokenizer, limit, truncate=True)[0])

    generator = torch.Generator().manual_seed(o.seed)
    rollout = run.sample(
        run.freeze(run.place(model, frozen=True)), rows, longest, generator=generator
    )
    rewards = [None] * len(rows)
    if task.has_reward:
        rewards = Judge(run, task, task.reward)(rows, rollout).tolist()
    columns = (
        [prompt for _, prompt, *_ in rows],
        completions(run.tokenizer, rollout),
        rollout.mask.sum(1).tolist(),
        rollout.finished.tolist(),
        rewards,
    )
    names = "prompt", "text", "tokens", "ended", "reward"
    return [dict(zip(names, row)) for row in zip(*columns)]


def side_by_side(paths, o):
    """paths: [(name, checkpoint), …], the reference first -> [(prompt, [(name, answer), …]), …]"""
    task = data.task(o.task)
    found = [(name, answers(path, task, o)) for name, path in paths]
    return [
        (each[0]["prompt"], [(name, one) for (name, _), one in zip(found, each)])
        for each in zip(*(said for _, said in found))
    ]

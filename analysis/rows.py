"""The rows of a comparison: which script, with which options, and the models that it holds; and the
commands that it runs."""

import re
from typing import NamedTuple

import data
from training.options import flag


class Row(NamedTuple):
    script: str
    models: str  # held, in the order of the record; * is trained
    arguments: str = ""  # what the row adds to the command line
    strength: str = ""  # the option that says how far the policy may move
    others: tuple = ()  # other values of it, for --sweep


TWO = "policy* ref"
BETAS = (0.03, 0.3, 1.0)
RLOO = "--adv-norm loo --agg sum --kl reward"

ROWS = {
    "sft": Row("sft", "policy*"),
    "dpo": Row("dpo", TWO, "", "beta", BETAS),
    "cdpo": Row("dpo", TWO, "--label-smoothing 0.1", "beta", BETAS),
    "ipo": Row("dpo", TWO, "--loss ipo", "beta", (0.3, 3.0, 10.0)),
    "simpo": Row("simpo", "policy*", "", "beta", (0.5, 5.0, 10.0)),
    "orpo": Row("orpo", "policy*", "--lr 3e-4 --warmup 20", "lam", BETAS),
    "kto": Row("kto", TWO, "", "beta", BETAS),
    "online_dpo": Row("online_dpo", TWO, "", "beta", BETAS),
    "ppo": Row("ppo", "policy* critic* ref reward", "", "beta", (0.02, 0.2, 0.5)),
    "grpo": Row("grpo", TWO, "", "beta", (0.01, 0.16, 0.64)),
    "rloo": Row("grpo", TWO, RLOO, "beta", (0.01, 0.16, 0.64)),
    "dapo": Row("dapo", "policy*"),  # it has no KL to the reference
    "rlaif": Row("rlaif", "policy* ref reward", "", "beta"),  # its last phase
}
MORE = {  # rows to be named with --methods; the prediction has the first two of itself
    "reward_model": Row("reward_model", "reward*"),
    "dpo-precomputed": Row("dpo", "policy*", "--precompute-ref --pairs 2000", "beta"),
    "dpo-few": Row("dpo", TWO, "--pairs 256", "beta"),
    "iterative_dpo": Row("online_dpo", TWO, "--rounds 3", "beta"),
}
EVERY = ROWS | MORE
QUICK = {
    "sft": ["--steps", 200],
    "reward_model": ["--steps", 30],
    "rlaif": "--skill-steps 40 --sl-steps 10 --pm-steps 10 --answers 64 --comparisons 128 "
    "--max-new-tokens 32".split(),
}
SAME = ("cdpo", "ipo", "rloo", "dpo-few", "iterative_dpo")  # rows that hold what another one holds
SAMPLED = ("ppo", "grpo", "rloo", "dapo", "rlaif")  # rows that learn from rewards of samples
SINGLE = ("sft", "kto")  # rows that learn from single answers; all others from pairs


def in_pairs(row):
    return row not in (*SINGLE, *SAMPLED)


def budget(task, quick):
    """-> the response sequences that a run trains on"""
    small = {"arithmetic": 2048, "exact": 2048, "tokens": 16}
    large = {"arithmetic": 25600, "exact": 192000, "tokens": 192}
    kind = data.kind(task)
    return small.get(kind, 1920) if quick else large.get(kind, 9600)


def shape(task, row):
    """-> (the options that set a step's batch, the response sequences that a step trains on)"""
    kind = data.kind(task)
    whole = ["--minibatches", "1"] if kind == "tokens" else []
    if row == "ppo":
        sizes = {"exact": (4, 64), "arithmetic": (256, 1), "tokens": (8, 1)}
        prompts, group = sizes.get(kind, (120, 1))
        options = ["--batch-size", prompts, "--group", group, "--updates", 2, *whole]
        return options, 2 * prompts * group
    if row in SAMPLED:
        sizes = {"exact": (4, 64), "arithmetic": (32, 8), "tokens": (2, 4)}
        prompts, group = sizes.get(kind, (16, 8))
        if row == "rlaif":
            prompts, group = 2 * prompts, group // 2
        options = ["--batch-size", prompts, "--group", group]
        return options + (whole if row == "dapo" else []), prompts * group
    pairs = {"exact": 128, "tokens": 4}.get(kind, 32)
    return ["--batch-size", 2 * pairs if row in SINGLE else pairs], 2 * pairs


def longest_context(task):
    """-> the context that `tokens:P+C` needs: at least 256, the longest response at most half"""
    found = re.fullmatch(r"tokens:(\d+)\+(\d+)", task)
    prompt, response = map(int, found.groups()) if found else (0, 0)
    return max(256, prompt + response, 2 * response)


# ---- the commands


class Item(NamedTuple):
    """A run: its name, its row, its command without the interpreter, whether it is of the sweep"""

    name: str
    row: str
    command: list
    swept: bool = False


def plan(o, folder):
    """-> (the stages, the runs), lists of Items"""
    stages, runs = [], []
    seeds = range(o.seed, o.seed + o.seeds)
    init = o.init or str(folder / f"sft-{o.seed}.pt")
    reward = str(folder / f"reward_model-{o.seed}.pt")
    judged = "ppo" in o.methods and needs_judge(o)
    sft = [*stage_options(o, "sft"), *model_size(o)]

    def item(row, seed, more, value=None):
        name = f"{row}-{seed}"
        strength = EVERY[row].strength
        if value is not None:
            name = f"{row}-{strength}-{value:g}-{seed}"
            more = [*more, flag(strength), value]
        where = ["--task", o.task, "--device", o.device, "--dtype", o.dtype]
        where += [*EVERY[row].arguments.split(), *more, "--seed", seed]
        command = [f"{EVERY[row].script}.py", *where, "--out", folder / f"{name}.pt"]
        return Item(name, row, [str(x) for x in command], value is not None)

    if not o.init:
        stages.append(item("sft", o.seed, sft))
    if judged or "reward_model" in o.methods:
        more = [*stage_options(o, "reward_model"), "--init", init]
        stages.append(item("reward_model", o.seed, more))
    for row in o.methods:
        if row == "sft":  # the stage itself, and the same with other seeds
            runs += [item(row, seed, sft) for seed in seeds[1:]]
        elif row != "reward_model":
            more = row_options(o, row, init)
            if row == "ppo" and judged:
                more += ["--reward", reward]
            runs += [item(row, seed, more) for seed in seeds]
            others = EVERY[row].others if o.sweep else ()
            runs += [item(row, o.seed, more, value) for value in others]
    return stages, runs


def needs_judge(o):
    """Whether PPO's reward is learned: where the task's own is no verifiable one"""
    return data.kind(o.task) not in ("exact", "arithmetic")


def stage_options(o, row):
    if data.kind(o.task) == "tokens":
        sft = ["--steps", 300, "--batch-size", 8, "--block-size", longest_context(o.task)]
        return {"sft": sft, "reward_model": ["--steps", 5, "--batch-size", 4]}[row]
    return QUICK[row] if o.quick else []


def row_options(o, row, init):
    """-> the options of a method's run: it spends the budget."""
    batch, per_step = shape(o.task, row)
    whole = o.budget or budget(o.task, o.quick)
    steps = max(1, round(whole / per_step))
    if steps * per_step != whole:
        spent = f"{steps} steps of {per_step} make {steps * per_step} response sequences"
        print(f"{row}: {spent}, not {whole}")
    more = [*batch, "--steps", steps]
    if row == "rlaif":  # from skills of its own; the budget is that of its last phase
        more += [*(QUICK[row] if o.quick else []), *model_size(o)]
    else:
        more += ["--init", init]
    if o.quick or data.kind(o.task) == "tokens":
        more += ["--warmup", max(1, steps // 5)]
    if o.course:
        more += ["--eval-every", max(1, steps // 20), "--log-every", 1]
    return more


def model_size(o):
    """-> the options that give the model's size"""
    return [
        x
        for name in ("n_layer", "n_head", "n_embd")
        if name in o.given
        for x in (flag(name), getattr(o, name))
    ]

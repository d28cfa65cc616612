"""The rows of a comparison, each with its script, its options and the models that it holds; and the
commands that a comparison runs."""

import importlib
import re
from typing import NamedTuple

import data
from training.options import flag, parse


class Row(NamedTuple):
    """A method, as tables and pictures show it. A new method needs a line in ROWS."""

    script: str
    data: str  # what it learns from: rows that the task draws, or samples of the policy
    models: str  # the models it holds, in the order of the record; * marks trained ones
    look: str  # colour and marker in the pictures
    arguments: str = ""  # the row's options on the command line
    strength: str = ""  # the option that limits how far the policy may move; --sweep varies it
    columns: str = ""  # the columns that the loop adds to a rollout, one number per token
    like: str = ""  # the row that holds the same models

    @property
    def samples(self):
        """Whether it learns from responses of the policy itself"""
        return self.data in (REWARDS, SAMPLED_PAIRS, STATES)

    @property
    def judged(self):
        """Whether these responses are judged"""
        return self.data in (REWARDS, SAMPLED_PAIRS)

    @property
    def grouped(self):
        """Whether a step has a group of responses to each of its prompts"""
        return self.data in (REWARDS, STATES)

    @property
    def pairs(self):
        """Whether an example is a pair of answers"""
        return self.data in (PAIRS, "graded", SAMPLED_PAIRS)


PAIRS = "preferences"
REWARDS, SAMPLED_PAIRS = "rewards of samples", "pairs of samples"
STATES = "a teacher at the states of samples"
TWO = "policy* ref"
RLOO = "--adv-norm loo --agg sum --kl reward"
OLD = "old_logp ref_logp"
PPO = f"{OLD} old_values rewards returns adv"
THREE = "policy* ref reward"
FOUR = "policy* critic* ref reward"

ROWS = {
    "sft": Row("sft", "demonstrations", "policy*", "C0 *"),
    "dpo": Row("dpo", PAIRS, TWO, "C1 o", "", "beta"),
    "cdpo": Row("dpo", PAIRS, TWO, "C2 s", "--label-smoothing 0.1", "beta", like="dpo"),
    "ipo": Row("dpo", PAIRS, TWO, "C3 D", "--loss ipo", "beta", like="dpo"),
    "simpo": Row("simpo", PAIRS, "policy*", "C4 ^", "", "beta"),
    "orpo": Row("orpo", PAIRS, "policy*", "C5 v", "--lr 3e-4 --warmup 20", "lam"),
    "kto": Row("kto", "feedback", TWO, "C6 <", "", "beta"),
    "online_dpo": Row("online_dpo", SAMPLED_PAIRS, TWO, "C7 p", "", "beta"),
    "ppo": Row("ppo", REWARDS, FOUR, "C8 >", "", "beta", PPO),
    "grpo": Row("grpo", REWARDS, TWO, "C9 P", "", "beta", OLD),
    "rloo": Row("grpo", REWARDS, TWO, "navy X", RLOO, "beta", OLD, like="grpo"),
    "dapo": Row("dapo", REWARDS, "policy*", "crimson h", columns="old_logp"),  # it has no KL
    "rlaif": Row("rlaif", REWARDS, THREE, "teal d", columns="ref_logp"),  # its last phase
}
MORE = {  # rows that only --methods shows; a prediction shows the first three anyway
    "reward_model": Row("reward_model", "graded", "reward*", "gold 8"),
    "distill": Row("distill", STATES, "policy* teacher", "sienna ^"),  # of PPO's checkpoint
    "dpo-precomputed": Row(
        "dpo", PAIRS, "policy*", "indigo H", "--precompute-ref --pairs 2000", "beta"
    ),
    "dpo-few": Row("dpo", PAIRS, TWO, "black s", "--pairs 256", "beta", like="dpo"),
    "iterative_dpo": Row(
        "online_dpo", SAMPLED_PAIRS, TWO, "olive D", "--rounds 3", "beta", like="online_dpo"
    ),
}
EVERY = ROWS | MORE
METHODS = tuple(dict.fromkeys(row.script for row in EVERY.values()))  # the scripts
QUICK = {
    "sft": ["--steps", 200],
    "reward_model": ["--steps", 30],
    "rlaif": "--skill-steps 40 --sl-steps 10 --pm-steps 10 --answers 64 --comparisons 128 "
    "--max-new-tokens 32".split(),
}


class Sizes(NamedTuple):
    """The length of a comparison's runs on a task, and the size of their steps"""

    budget: int  # the response sequences that a run trains on
    quick: int  # the same with --quick
    pairs: int  # pairs per step; single answers are twice as many
    groups: tuple  # for a step that samples: (its prompts, the responses to each)
    critic: tuple  # the same if a critic takes the place of groups


SIZES = {
    "arithmetic": Sizes(25_600, 2048, 32, (32, 8), (256, 1)),
    "exact": Sizes(192_000, 2048, 128, (4, 64), (4, 64)),
    "tokens": Sizes(192, 16, 4, (2, 4), (8, 1)),
}
REVIEWS = Sizes(9600, 1920, 32, (16, 8), (120, 1))  # and of a file


def sizes(task):
    return SIZES.get(data.kind(task), REVIEWS)


def budget(task, quick):
    """-> the response sequences that a run trains on"""
    return sizes(task).quick if quick else sizes(task).budget


def shape(task, row):
    """-> (the options that set a step's batch, the response sequences that a step trains on)"""
    size, method = sizes(task), EVERY[row]
    if not method.grouped:
        return ["--batch-size", size.pairs * (1 if method.pairs else 2)], 2 * size.pairs
    critic = "critic*" in method.models
    prompts, group = size.critic if critic else size.groups
    if row == "rlaif":
        prompts, group = 2 * prompts, group // 2
    options, updates = ["--batch-size", prompts, "--group", group], 1
    if critic:
        options, updates = [*options, "--updates", 2], 2
    if data.kind(task) == "tokens" and row in ("ppo", "dapo"):
        options += ["--minibatches", 1]
    return options, updates * prompts * group


def longest_context(task):
    """-> the context that `tokens:P+C` needs: at least 256, the prompt and the response together,
    and twice the response"""
    found = re.fullmatch(r"tokens:(\d+)\+(\d+)", task)
    prompt, response = map(int, found.groups()) if found else (0, 0)
    return max(256, prompt + response, 2 * response)


# ---- the commands


class Item(NamedTuple):
    """A run: its name, its row, its command without "python", and the strength that a sweep gives
    it, or None"""

    name: str
    row: str
    command: list
    swept: float = None


def plan(o, folder):
    """-> (the stages, the runs), lists of Items"""
    stages, runs = [], []
    seeds = range(o.seed, o.seed + o.seeds)
    init = o.init or str(folder / f"sft-{o.seed}.pt")
    reward = str(folder / f"reward_model-{o.seed}.pt")
    teaches = "distill" in o.methods  # PPO's checkpoint does
    judged = ("ppo" in o.methods or teaches) and needs_judge(o)
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
        return Item(name, row, [str(x) for x in command], value)

    if not o.init:
        stages.append(item("sft", o.seed, sft))
    if judged or "reward_model" in o.methods:
        more = [*stage_options(o, "reward_model"), "--init", init]
        stages.append(item("reward_model", o.seed, more))
    if teaches:
        more = [*row_options(o, "ppo", init), *(["--reward", reward] if judged else [])]
        stages.append(item("ppo", o.seed, more))
    for row in o.methods:
        if row == "sft":  # the first seed is the stage itself
            runs += [item(row, seed, sft) for seed in seeds[1:]]
        elif row != "reward_model":
            more = row_options(o, row, init)
            if row == "ppo" and judged:
                more += ["--reward", reward]
            if row == "distill":
                more += ["--teacher", str(folder / f"ppo-{o.seed}.pt")]
            made = seeds[:1] if row == "ppo" and teaches else ()  # a stage already
            runs += [item(row, seed, more) for seed in seeds if seed not in made]
            swept = range(o.seed, o.seed + o.sweep)
            runs += [item(row, seed, more, x) for x in strengths(row, o.task) for seed in swept]
    return stages, runs


def strengths(row, task):
    """-> a third of the row's default strength on a task, and three times that default"""
    if not EVERY[row].strength:
        return []
    default = getattr(options(row, "--task", task), EVERY[row].strength)
    return [float(f"{default * factor:.2g}") for factor in (1 / 3, 3)]


def options(row, *argv):
    """-> the options of a row's script, as its command line gives them, on a CPU"""
    script = importlib.import_module(EVERY[row].script)
    argv = [*EVERY[row].arguments.split(), *map(str, argv), "--device", "cpu"]
    return parse(script.Options, argv, script.PRESETS)


def needs_judge(o):
    """Whether PPO's reward is learned, because the task's own is not verifiable"""
    return data.kind(o.task) not in ("exact", "arithmetic")


def stage_options(o, row):
    if data.kind(o.task) == "tokens":
        sft = ["--steps", 300, "--batch-size", 8, "--block-size", longest_context(o.task)]
        return {"sft": sft, "reward_model": ["--steps", 5, "--batch-size", 4]}[row]
    return QUICK[row] if o.quick else []


def row_options(o, row, init):
    """-> the options of a method's run, with as many steps as the budget allows"""
    batch, per_step = shape(o.task, row)
    sequences = o.budget or budget(o.task, o.quick)
    steps = max(1, round(sequences / per_step))
    if steps * per_step != sequences:
        spent = f"{steps} steps of {per_step} make {steps * per_step} response sequences"
        print(f"{row}: {spent}, not {sequences}")
    more = [*batch, "--steps", steps]
    if row == "rlaif":  # it learns skills first; the budget is its last phase's
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

"""A script's command line: a dataclass of options, one line each, read by argparse."""

import argparse
import fnmatch
import math
import operator
import os
import sys
from dataclasses import dataclass, field, fields

import data
from data import UserError
from training.flags import flag

SAVED = "whole", "adapters"
DTYPES = ("auto", "float32", "float64", "float16", "bfloat16", "bfloat16-pure")
SCHEDULES = ("constant", "linear", "cosine")
OPTIMIZERS = ("adamw", "adamw8bit")
BOUNDS = {  # of a number: how it compares with the bound, in words
    "low": (operator.ge, "at least"),
    "above": (operator.gt, "more than"),
    "high": (operator.le, "at most"),
    "below": (operator.lt, "less than"),
}


def opt(default, help, **rules):
    """One option: its default (... if it must be given), its help text, and its rules.

    choices, low, high, above, below    the values that it allows
    like="eps"                          its default is the value of --eps
    only="loss=ipo", "loss=dpo|ipo"     it is read with --loss ipo only, and refused otherwise
    clips=True                          it bounds a ratio that is 1 at a rollout's first step
    file=True                           it names a file that the run reads
    hub="model", "config"               it may name a model of a hub, or one whose config is read
    text=True                           it names no path: a ~ at its beginning stays
    """
    return field(default=default, metadata={"help": help, **rules})


@dataclass
class Options:
    """The options of every training script."""

    shown = "loss accuracy margin grad_norm lr"  # figures beside the progress bar, the first three

    task: str = opt("reviews", "reviews, arithmetic:N, exact, tokens:P+C, or a .jsonl", file=True)
    init: str = opt(
        "", "checkpoint to start from (default: out/<task>/sft.pt)", file=True, hub="model"
    )
    reference: str = opt(
        "", "checkpoint for π_ref and comparisons (default: the start)", file=True, hub="model"
    )
    out: str = opt("", "checkpoint to write (default: out/<task>/<method>.pt)")
    name: str = opt("", "write out/<task>/<method>-NAME.pt, beside other runs", only="out=")
    eval_file: str = opt("", ".jsonl file to evaluate on (default: 5 % of the prompts)", file=True)
    steps: int = opt(300, "optimizer steps; with a file: one epoch", low=1)
    epochs: int = opt(0, "passes over a file or a fixed set, in place of --steps", low=1)
    batch_size: int = opt(32, "examples per optimizer step", low=1)
    micro_batch: int = opt(0, "examples per forward pass; fewer save memory (0: all)", low=0)
    micro_tokens: int = opt(0, "most tokens per forward pass, sorted by length (0: all)", low=0)
    lr: float = opt(1e-3, "AdamW learning rate at its peak", above=0)
    lr_schedule: str = opt("cosine", "constant, linear to 0, or cosine to 10 %", choices=SCHEDULES)
    warmup: int = opt(20, "steps over which the learning rate rises from 0", low=0)
    weight_decay: float = opt(0.0, "AdamW's decay of the weight matrices", low=0)
    optimizer: str = opt("adamw", "adamw8bit: AdamW's moments in 8 bits", choices=OPTIMIZERS)
    grad_clip: float = opt(1.0, "largest norm of a gradient; larger ones are scaled down", above=0)
    max_new_tokens: int = opt(0, "longest sampled response, in tokens (0: the task's)", low=0)
    block_size: int = opt(0, "longest sequence, in tokens (0: the checkpoint's)", low=0)
    lora: int = opt(0, "r: train only adapters of this rank (0: train all weights)", low=0)
    lora_alpha: float = opt(None, "α: adapters are scaled by α/r", above=0, like="lora")
    save: str = opt("whole", "whole: adapters are merged into the weights", choices=SAVED)
    chat: bool = opt(True, "read a plain prompt as a user message, if there is a chat template")
    template_args: tuple = opt((), "for the chat template, such as enable_thinking=false")
    truncate: bool = opt(False, "cut rows that do not fit: first the beginning of the prompt")
    strict: bool = opt(False, "refuse a file with useless rows, which are otherwise dropped")
    seed: int = opt(0, "seed of weights, data and samples", low=0, below=2**62)
    device: str = opt("auto", "cpu, cuda, cuda:1, mps")
    dtype: str = opt("auto", "bfloat16: autocast; bfloat16-pure: the weights too", choices=DTYPES)
    checkpoint_activations: bool = opt(False, "recompute blocks in the backward pass: saves memory")
    compile: bool = opt(False, "compile the blocks: a minute at the start, then faster steps")
    shard: bool = opt(False, "under torchrun: each process holds a part of each weight (FSDP2)")
    resume: bool = opt(False, "go on from the state that an interrupted run left beside --out")
    save_every: int = opt(100, "steps between saved states", low=1)
    keep_every: int = opt(0, "steps between checkpoints to keep, such as dpo-000200.pt", low=0)
    keep: int = opt(0, "of those checkpoints keep only the last I (0: all)", low=0)
    log_every: int = opt(10, "steps between lines of the .jsonl record", low=1)
    log_to: str = opt("", "also write the record as curves", choices=("tensorboard", "wandb"))
    eval_prompts: int = opt(512, "test prompts and held-out rows of the last evaluation", low=1)
    eval_every: int = opt(0, "steps between evaluations (0: at the end; exact: 20 per run)", low=0)
    loss_every: int = opt(0, "steps between held-out losses, without samples (0: none)", low=0)

    def endless(self):
        """Whether every step draws new rows, so that there are no passes over a fixed set"""
        return data.kind(self.task) != "file"

    def rows(self):
        """-> (how many rows an optimizer step has, the options that say so)"""
        return self.batch_size, f"--batch-size {self.batch_size}"

    def passes(self):
        """-> how often the rows of a step are trained on"""
        return 1

    def check(self):
        """Refuses options that cannot work together. `parse` calls it; a script may add to it."""
        if self.log_to:
            from training import loggers

            loggers.check(self.log_to)
        if self.optimizer == "adamw8bit":
            from training import adamw8bit

            adamw8bit.check(self)
        if self.epochs and self.endless():
            fresh = f"{self.task} makes fresh rows every step; give --steps"
            raise UserError(f"--epochs counts passes over a fixed set, but {fresh}")
        if data.kind(self.task) == "exact" and "eval_prompts" in self.given:
            raise UserError(f"--eval-prompts: {self.task} counts every outcome; leave it out")
        if "lora_alpha" in self.given and not self.lora:
            raise UserError("--lora-alpha is read with --lora R only; leave it out, or give both")
        if self.save == "adapters" and not self.lora:
            raise UserError("--save adapters needs --lora R; give both, or leave it out")
        rows, words = self.rows()
        if self.micro_batch and rows % self.micro_batch:
            raise UserError(f"--micro-batch {self.micro_batch} does not divide {words}")
        if self.shard:
            from training import distributed, sharding

            sharding.check(distributed.size)
        if self.compile:
            from training import compiler

            compiler.check()
        if 0 < self.block_size < 8:
            raise UserError(f"--block-size {self.block_size} leaves no room; give at least 8")


@dataclass
class ScratchOptions(Options):
    """The options of a script that may start from random weights."""

    init: str = opt(
        "", "checkpoint to start from (default: random weights)", file=True, hub="model"
    )
    tokenizer: str = opt("", "vocabulary file or tiktoken name", file=True, only="init=")
    n_layer: int = opt(4, "blocks, if weights start random", low=1, only="init=")
    n_head: int = opt(4, "attention heads per block, if weights start random", low=1, only="init=")
    n_embd: int = opt(128, "width, if weights start random", low=1, only="init=")

    def check(self):
        super().check()
        if self.n_embd % self.n_head:
            raise UserError(f"--n-embd {self.n_embd} is not a multiple of --n-head {self.n_head}")


@dataclass
class PairOptions(Options):
    """The options of a script that learns from labelled answers."""

    shown = "loss rewards/accuracies rewards/margins kl"

    pairs: int = opt(0, "size of a fixed set (0: fresh rows every step; with a file: all)", low=0)

    def endless(self):
        return super().endless() and not self.pairs


@dataclass
class JudgedOptions(Options):
    """The options of a script that samples responses and has them judged."""

    shown = "reward kl kept_fraction explained_variance entropy loss"

    reward: str = opt(
        "task", "the judge: task, rm, the X.pt of a reward model, FILE.py:function", hub="model"
    )
    loss_every: int = opt(0, "unused: there is no held-out loss", high=0)
    temperature: float = opt(1.0, "of the samples and of the trained log-probs", above=0)
    micro_tokens: int = opt(2**14, "most tokens per forward pass, sorted by length (0: all)", low=0)

    def endless(self):
        return False


@dataclass
class RolloutOptions(JudgedOptions):
    """The options of a script that makes one or more optimizer steps per rollout."""

    group: int = opt(8, "G: responses per prompt", low=1)
    updates: int = opt(1, "passes over a rollout", low=1)
    minibatches: int = opt(1, "optimizer steps per pass, over shuffled responses", low=1)

    def check(self):
        super().check()
        idle = {f.name for f in fields(self) if f.metadata.get("clips")} & self.given
        if idle and self.updates == self.minibatches == 1:
            words = f"ρ is 1, and {flag(min(idle))} changes nothing"
            data.say(f"one optimizer step per rollout: {words}; --minibatches 4 gives it an effect")

    def passes(self):
        return self.updates

    def rows(self):
        n, parts = self.batch_size * self.group, self.minibatches
        words = f"--batch-size {self.batch_size} × --group {self.group}"
        if n % parts:
            raise UserError(f"--minibatches {parts} does not divide {words} = {n} responses")
        return n // parts, f"{words} / --minibatches {parts} = {n // parts} responses"


def parse(cls, argv=None, presets=None):
    """The command line -> an instance of `cls`, with `given`: the names of the options on it.

    presets: {"any": …, "exact": …, "loss=ipo": …, "exact loss=ipo": …}, dicts of defaults.
    A preset applies if all words of its key are true. A word is the kind of the task or the value
    of an option. Later presets win over earlier ones, and the command line wins over all.
    """
    presets, argv = presets or {}, sys.argv[1:] if argv is None else argv
    if wanted := {"-h", "--help", "--help-all"} & {*argv}:
        from training import help

        help.show(cls, presets, "--help-all" in wanted)
        sys.exit()
    parser = _Parser(add_help=False, allow_abbrev=False)
    for f in fields(cls):
        how = {"default": argparse.SUPPRESS}
        text = str if f.metadata.get("text") else os.path.expanduser
        if f.default is ...:
            many = "+" if f.type is tuple else None
            parser.add_argument(f.name, type=text, nargs=many)
        elif f.type is bool:
            parser.add_argument(flag(f.name), action=argparse.BooleanOptionalAction, **how)
        elif f.type is tuple:
            how |= {"nargs": "+", "action": "extend"}
            parser.add_argument(flag(f.name), type=text, **how)
        else:
            read = _number(f) if f.type in (int, float) else text
            choices = f.metadata.get("choices")
            parser.add_argument(flag(f.name), type=read, choices=choices, **how)
    given, others = parser.parse_known_args(argv)
    if others:
        from training import help

        raise UserError(help.unknown(others, cls))
    given = vars(given)
    for name in [name for name, x in given.items() if x == ""]:
        raise UserError(f"{flag(name)} is empty; give a value, or leave it out")

    values = {f.name: f.default for f in fields(cls)} | presets.get("any", {}) | given
    for words, preset in presets.items():
        if words != "any" and all(_holds(word, values) for word in words.split()):
            values |= preset | given
    for f in fields(cls):
        model = f.metadata.get("like")
        if model and f.name not in given and (values[f.name] is None or model in given):
            values[f.name] = values[model]
        if "hub" in f.metadata and f.name in given:
            from training import fetch

            values[f.name] = fetch.path_of(given[f.name], f.metadata["hub"])
    o = cls(**values)
    o.given = set(given)
    _refuse_unread(o)
    if {"steps", "epochs"} <= o.given:
        raise UserError("--steps and --epochs both say how long to train; give one of them")
    if "epochs" in given or "steps" not in given and data.kind(values.get("task", "")) == "file":
        o.steps = 0  # the data say how many
    if hasattr(o, "check"):
        o.check()
    return o


def _holds(word, values):
    name, equals, value = word.partition("=")
    return values[name] == value if equals else data.kind(values["task"]) == word


def _refuse_unread(o):
    """Stops if an option was given that the chosen variant does not read."""
    for f in fields(o):
        if f.name not in o.given or "only" not in f.metadata:
            continue
        name, _, patterns = f.metadata["only"].partition("=")
        value = str(getattr(o, name))
        value += ".pt" if os.path.isdir(value) else ""  # a folder may take the place of a .pt
        if any(fnmatch.fnmatchcase(value, pattern) for pattern in patterns.split("|")):
            continue
        place = f"with {flag(name)} {patterns.replace('|', ' or ')} only, not with {value}"
        if patterns == "True":
            place = f"with {flag(name)} only"
        elif not patterns:
            place = f"without {flag(name)} only"
        raise UserError(f"{flag(f.name)} is read {place}; leave one of the two out")


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message} (--help lists the options)")


def _number(f):
    """-> a function that reads a number within the option's bounds"""

    def read(text):
        try:
            x = f.type(text)
            finite = math.isfinite(x)
        except (ValueError, OverflowError):
            finite = False
        if not finite:
            kind = "whole number" if f.type is int else "number"
            raise argparse.ArgumentTypeError(f"must be a {kind}, not {text!r}")
        for name in BOUNDS.keys() & f.metadata.keys():
            holds, words = BOUNDS[name]
            if not holds(x, bound := f.metadata[name]):
                raise argparse.ArgumentTypeError(f"must be {words} {bound}, not {text}")
        return x

    return read

"""What appears in no equation: options, device and precision, a run's files, progress, the ledger of models held."""
import argparse
import contextlib
import copy
import functools
import glob
import hashlib
import inspect
import json
import math
import os
import platform
import re
import shlex
import signal
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Literal, get_args, get_origin

import torch
from tqdm import tqdm


class UserError(Exception):
    """A mistake of the user's: the message is one line that says what is wrong and how to mend it. Exit code 2."""


class Stopped(Exception):
    """Training cannot go on (a loss that is not finite, a stage that failed). Exit code 1."""


# ------------------------------------------------------------------------------------------------ options

Count = Annotated[int, lambda x: x >= 1, "a whole number > 0"]
Whole = Annotated[int, lambda x: x >= 0, "a whole number >= 0"]
Positive = Annotated[float, lambda x: x > 0, "a number > 0"]
NonNegative = Annotated[float, lambda x: x >= 0, "a number >= 0"]
Number = Annotated[float, lambda x: True, "a number"]
Seed = Annotated[int, lambda x: 0 <= x < 2**62, "a whole number >= 0 and below 2^62"]
Share = Annotated[float, lambda x: 0 <= x <= 1, "a number in [0, 1]"]
BelowHalf = Annotated[float, lambda x: 0 <= x < 0.5, "a number in [0, 0.5)"]
Schedule = Literal["constant", "linear", "cosine"]
Precision = Literal["auto", "float32", "float64", "bfloat16", "bfloat16-pure"]

SIZES = {"1b": {"n_layer": 24, "n_head": 16, "n_embd": 2048, "vocab_size": 50304},  # 1.3 billion parameters, GPT-3's third model
         "7b": {"n_layer": 32, "n_head": 32, "n_embd": 4096, "vocab_size": 50304}}  # 6.7 billion, its seventh  # fmt: skip


@dataclass
class Options:
    """The options of every script; a script adds its own, and may give another default to one of these; `on_exact`,
    `on_arithmetic`, `on_file` and `on_predict` hold those of its defaults that are others on such a task or for such a size."""

    task: str = "reviews"  # reviews, arithmetic:N (digits), exact (40 outcomes), tokens:P+C (random), or a .jsonl or .jsonl.gz file
    init: str = ""  # checkpoint to start from (default: out/<task>/sft.pt, made first where it is missing; a file needs one)
    out: str = ""  # where the checkpoint goes, the record (.jsonl) beside it (default: out/<task>/<method>.pt)
    steps: Count = 300  # optimizer steps (default: %(default)s; of a file: one epoch)
    epochs: Whole = 0  # passes over a file or a fixed set, in place of --steps
    batch_size: Count = 32  # examples an optimizer step
    micro_batch: Whole = 0  # examples a forward pass: less memory, the same gradient (0: the batch; it must divide it)
    lr: Positive = 1e-3  # AdamW learning rate at its peak; toy models take 10 to 100 times what the papers give large ones
    lr_schedule: Schedule = "cosine"  # after the warmup: stay, fall to 0, or fall to a tenth
    warmup: Whole = 20  # steps over which the learning rate rises from 0
    weight_decay: NonNegative = 0.0  # of the weight matrices
    grad_clip: Positive = 1.0  # largest norm of the gradient
    max_new_tokens: Whole = 0  # longest sampled response, in tokens (0: the task's own: reviews 96, a file 256)
    block_size: Whole = 0  # longest sequence, prompt and response, in tokens (0: the checkpoint's; it may only be shortened)
    truncate: bool = False  # cut what does not fit: the prompt from its left, then the responses; otherwise the run stops
    strict: bool = False  # refuse a file's useless rows (an empty answer, two equal ones), which are dropped otherwise
    tokenizer: str = ""  # vocabulary file or tiktoken name (default: the checkpoint's; at random weights data/vocab.tiktoken)
    seed: Seed = 0  # of weights, data and samples
    device: str = "auto"  # cpu, cuda, cuda:1, mps (default: cuda where there is one, else cpu)
    dtype: Precision = "auto"  # bfloat16: autocast over float32 weights (auto: on a GPU with it); bfloat16-pure: bfloat16 weights
    checkpoint_activations: bool = False  # recompute each block in the backward pass: less memory, a third more time
    resume: bool = False  # go on from the state that an interrupted run left beside --out
    save_every: Count = 100  # steps between saved states
    log_every: Count = 10  # steps between lines of the record
    eval_every: Whole = 0  # steps between evaluations on 128 test prompts (0: at the end only; of exact: twenty in a run)
    eval_file: str = ""  # JSONL file to evaluate on (default: the 5 %% of --task's prompts with the lowest hashes)
    predict: Literal["", "own", "1b", "7b"] = ""  # print the memory of a step and stop: of the checkpoint's size, or of such a model
    seq_len: Whole = 0  # tokens of a sequence, half of them prompt, with --predict (0: the task's own rows; 1b, 7b or a file: 2048)
    n_layer: Whole = 0  # blocks, with --predict (0: the size's)
    n_head: Whole = 0  # attention heads a block, with --predict (0: the size's)
    n_embd: Whole = 0  # width, with --predict (0: the size's)
    vocab_size: Whole = 0  # tokens of the vocabulary, with --predict (0: the size's)
    force: bool = False  # train although the memory predicted is more than the GPU has free
    on_predict = {}  # of --predict 1b and 7b: about four sequences a step


def parse(cls, argv=None):
    """The command line -> an instance of the options dataclass `cls`, with `given`, the names that stood on it.

    Types come from the annotations, defaults from the fields (on --task exact from `cls.on_exact` first), the help from the
    trailing comments, and the description from the docstring of the module.
    """
    on_task = {kind: getattr(cls, f"on_{kind}", {}) for kind in ("exact", "arithmetic", "file", "predict")}
    module = sys.modules[cls.__module__]
    script = os.path.basename(module.__file__)
    positional = "".join(f" {f.name.upper()}" for f in fields(cls) if f.default is MISSING)
    parser = _Parser(prog=script, usage=f"python {script}{positional} [options]", description=module.__doc__, add_help=True,
                     allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    comments = {}
    for base in reversed(cls.__mro__[:-1]):
        comments |= dict(re.findall(r"^    (\w+): .*?  # (.+)$", inspect.getsource(base), re.M))
    for f in fields(cls):
        silent = "default" in comments[f.name] or f.default in ("", (), MISSING)
        word = (lambda x: "on" if x else "off") if f.type is bool else str
        note = comments[f.name] + ("" if silent else f" (default: {word(f.default)})")
        note += "".join(f" ({kind}: {word(own[f.name])})" for kind, own in on_task.items() if f.name in own)
        how = {"help": note, "default": argparse.SUPPRESS}
        if f.type is bool:
            how |= {"action": argparse.BooleanOptionalAction}
        elif get_origin(f.type) is Literal:
            how |= {"choices": get_args(f.type)}
        elif get_origin(f.type) is Annotated:
            how |= {"type": _number(*get_args(f.type)), "metavar": "N" if get_args(f.type)[0] is int else "X"}
        else:
            how |= {"type": str, "metavar": "S"} | ({"nargs": "+"} if f.type is tuple else {})
        how["help"] = how["help"].replace("%(default)s", str(f.default))
        if f.default is MISSING:
            parser.add_argument(f.name, help=comments[f.name])
        else:
            parser.add_argument("--" + f.name.replace("_", "-"), **how)
    given = vars(parser.parse_args(argv))
    task = given.get("task", "")
    size = given.get("predict", "")
    kind = "predict" if size in SIZES else "file" if is_file(task) else task.partition(":")[0]
    o = cls(**(on_task.get(kind, {}) | given))
    o.given = set(given)
    if size and issubclass(cls, Options):
        _predicted(o)
    elif unread := sorted(o.given & {f.name for f in fields(cls) if issubclass(cls, Options) and "with --predict" in comments[f.name]}):
        raise UserError(f"--{unread[0].replace('_', '-')} is read with --predict only; leave one of the two out")
    return o


def _predicted(o):
    """The options of --predict: a task that is made up where no rows of its own shape are asked for, and no file that is read."""
    if not type(o).n_layer:  # not one that may start from random weights
        o.init = o.init or checkpoint_path(o.task, "sft")
    if o.predict in SIZES or o.seq_len or is_file(o.task):
        length = o.seq_len or 2048
        if length < 4:
            raise UserError(f"--seq-len {length} leaves no room for a prompt and a response; 4 is the least")
        o.task, o.block_size = f"tokens:{length - length // 2}+{length // 2}", 0
    o.eval_file = o.tokenizer = ""
    if getattr(o, "reward", "rm") not in ("rm", "task"):
        o.reward = "task"


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message} (--help lists the options)")


def _number(kind, ok, words):
    def read(text):
        with contextlib.suppress(ValueError, OverflowError):
            x = kind(text)
            if math.isfinite(x) and ok(x):
                return x
        raise argparse.ArgumentTypeError(f"must be {words}, not {text!r}")

    return read


def refuse_unread(o, choice, reads):
    """Stops where an option was given that the chosen variant does not read. reads: variant -> the names that it reads, of those that
    not all read."""
    variant = getattr(o, choice)
    for name in sorted(o.given & set().union(*reads.values()) - reads.get(variant, set())):
        users = " or ".join(f"--{choice} {v}" for v in reads if name in reads[v])
        raise UserError(f"--{name.replace('_', '-')} is read by {users} only, not by --{choice} {variant}; leave one of the two out")


def command(*errors):
    """Decorates main(argv): a user's mistake (UserError or one of `errors`) ends in one line and exit code 2, Ctrl-C in 130."""

    def decorate(main):
        @functools.wraps(main)
        def run(argv=None):
            argv = sys.argv[1:] if argv is None else argv
            script = os.path.basename(main.__code__.co_filename)
            _stop_with_parent()
            try:
                return main(argv)
            except (UserError, *errors) as e:
                code, message = 2, str(e)
            except Stopped as e:
                code, message = 1, str(e)
            except torch.OutOfMemoryError as e:
                code, message = 1, f"out of memory ({str(e).splitlines()[0]}): try a smaller --micro-batch, or --checkpoint-activations"
            except KeyboardInterrupt as e:
                again = shlex.join(["python", sys.argv[0], *argv] + ["--resume"] * ("--resume" not in argv))
                resumes = hasattr(main.__globals__["Options"], "resume")
                code, message = 130, "interrupted" + f"; this goes on from {str(e) or 'the last saved step'}: {again}" * resumes
            print(f"{script}: {message}", file=sys.stderr)
            sys.exit(code)

        return run

    return decorate


# ------------------------------------------------------------------------------------------------ stages and places


def checkpoint_path(task, method):
    """-> the default checkpoint of a method: out/<task>/<method>.pt"""
    name = os.path.basename(task).removesuffix(".gz").removesuffix(".jsonl").replace(":", "-")
    return os.path.join("out", name, f"{method}.pt")


def is_exact(task):
    return not is_file(task) and task.partition(":")[0] == "exact"


def is_file(task):
    return task.endswith((".jsonl", ".jsonl.gz")) or "/" in task or os.path.isfile(task)


def stage(script, o, option="--init"):
    """-> the default checkpoint of an earlier stage of the same task; its script is run first where there is none."""
    path = checkpoint_path(o.task, script.removesuffix(".py"))
    if o.predict:
        return path
    if is_file(o.task):
        rows = "prompt, completion" if script == "sft.py" else "prompt, chosen, rejected"
        raise UserError(f"{option} is needed with a file as the task: a checkpoint such as python {script} --task FILE makes, of {rows}")
    if not os.path.exists(path):
        print(f"{path} does not exist yet: running {script} first (about half a minute on a laptop)", flush=True)
        args = [sys.executable, Path(__file__).with_name(script), "--task", o.task, "--device", o.device, "--dtype", o.dtype]
        args += ["--resume"] * os.path.exists(path.removesuffix(".pt") + ".state")
        start, interrupted = time.time(), False
        process = subprocess.Popen(args, env={**os.environ, "NANOPO_PARENT": str(os.getpid())})
        while process.poll() is None:
            try:
                process.wait()
            except KeyboardInterrupt:  # the stage has heard it too, and saves its state
                interrupted = True
        if interrupted or process.returncode == 130:
            raise KeyboardInterrupt(f"where {script} stopped")
        if process.returncode:
            raise Stopped(f"{script}, which makes {path}, failed with exit code {process.returncode}")
        print(f"{path} is made, in {time.time() - start:.0f} s\n", flush=True)
    return path


def _stop_with_parent():
    """A stage that another script started ends with it, also where that one was killed."""
    parent = os.environ.pop("NANOPO_PARENT", None)

    def watch():
        while os.getppid() == int(parent):
            time.sleep(0.2)
        os._exit(1)

    if parent:
        threading.Thread(target=watch, daemon=True).start()


# ------------------------------------------------------------------------------------------------ optimization


def adamw(model, o):
    """AdamW with betas (0.9, 0.95), weight decay on the matrices only."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    rest = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": o.weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=o.lr, betas=(0.9, 0.95), fused=matrices[0].device.type in ("cpu", "cuda"))


def lr_at(step, o):
    """The learning rate of the optimizer step that is number `step` from 0."""
    if step < o.warmup:
        return o.lr * (step + 1) / o.warmup
    done = (step - o.warmup) / max(1, o.steps - o.warmup)
    return o.lr * {"constant": 1.0, "linear": 1 - done, "cosine": 0.55 + 0.45 * math.cos(math.pi * done)}[o.lr_schedule]


# ------------------------------------------------------------------------------------------------ a run


class Compute:
    """Where and how precisely a script computes: --device and --dtype."""

    def __init__(self, o):
        self.device, self.dtype = _device(o)
        self.pure = o.dtype == "bfloat16-pure"  # the weights themselves are bfloat16
        self.weights = torch.bfloat16 if self.pure else torch.promote_types(self.dtype, torch.float32)
        self.predict, self.predicting = getattr(o, "predict", ""), False  # predicting: a step has sizes, but no numbers

    def prepare(self, model):
        """Moves a model to the device, as float32 master weights (--dtype float64 and bfloat16-pure: as such)."""
        if next(model.parameters()).device.type == "meta":  # only its shape is asked for
            return model.to(self.weights)
        return model.to(self.device, self.weights)

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16 and not self.pure)

    def frozen(self, model):
        """A frozen copy: no gradient, linear weights in the compute dtype, so that it agrees with the original to the bit; a scalar
        head, which reads in float32, stays."""
        model = copy.deepcopy(model).requires_grad_(False).eval()
        if self.dtype == torch.bfloat16 and not self.pure:
            for name, module in model.named_modules():
                if isinstance(module, torch.nn.Linear) and name != "head":
                    module.to(torch.bfloat16)
        return model


def _device(o):
    """-> (device, compute dtype)"""
    kind = o.dtype.removesuffix("-pure")
    if getattr(o, "predict", "") in SIZES:
        return torch.device("cpu"), getattr(torch, "bfloat16" if kind == "auto" else kind)  # as on a GPU; nothing is computed
    name = o.device if o.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise UserError(f"--device {name} is not to be had on this machine; --device cpu always is") from None
    if device.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"--device {name}: give cpu, cuda, cuda:N or mps")
    if device.type == "mps" and o.dtype not in ("auto", "float32"):
        raise UserError(f"--dtype {o.dtype}: on mps these scripts run in float32 only")
    modern = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 8
    return device, getattr(torch, ("bfloat16" if modern else "float32") if kind == "auto" else kind)


class Run(Compute):
    """One training run: where it computes, what it writes, where it goes on.

        run = Run(o, "dpo")                        refuses what cannot work, before anything is written
        run.begin(held, batches, policy=policy, optimizer=optimizer)
        for step in run.steps():                   shows progress, records, saves; resumes, and stops at Ctrl-C
            rows = batches[step]
            for micro in run.micro_batches(rows):  … backward(); run.add({"loss": …})
            run.update(step, policy, optimizer)    learning rate, clipping, step
        run.finish(final)
    """

    def __init__(self, o, method):
        super().__init__(o)
        self.o, self.method = o, method
        o.out = o.out or checkpoint_path(o.task, method)
        self.out, stem = o.out, o.out.removesuffix(".pt")
        self.record_path, self.state_path = f"{stem}.jsonl", f"{stem}.state"
        if {"steps", "epochs"} <= o.given:
            raise UserError("--steps and --epochs both say how long to train; give one of them")
        whole, sampled = o.batch_size, hasattr(o, "group")  # of one optimizer step
        words = f"--batch-size {o.batch_size}"
        if sampled:
            whole, words = whole * o.group, words + f" × --group {o.group}"
            parts = getattr(o, "minibatches", 1)
            if whole % parts:
                raise UserError(f"--minibatches {parts} does not divide {words} = {whole} responses")
            whole, words = whole // parts, words + f" / --minibatches {parts} = {whole // parts} responses"
        o.micro_batch = o.micro_batch or whole
        if whole % o.micro_batch:
            raise UserError(f"--micro-batch {o.micro_batch} does not divide {words}")
        if o.epochs and not (is_file(o.task) or hasattr(o, "reward") or sampled or getattr(o, "pairs", 0)):
            raise UserError(f"--epochs counts passes over a fixed set, but {o.task} makes fresh rows every step; give --steps")
        if is_exact(o.task) and o.max_new_tokens:
            raise UserError(f"--max-new-tokens {o.max_new_tokens}: the responses of {o.task} have a length of their own; leave it out")
        self.tracker = self.peak = self.predicted = None  # who counts bytes; (the peak, the most of each) by category, found and foreseen
        if o.predict:
            return
        if o.out.endswith((".jsonl", ".state", ".gz", "/")) or os.path.isdir(o.out):
            raise UserError(f"--out {o.out} is no place for a checkpoint; give a path like {checkpoint_path(o.task, method)}")
        init = o.init or ("" if method == "sft" or method.startswith("rlaif") else checkpoint_path(o.task, "sft"))
        reward = getattr(o, "reward", "task")
        judge = o.reward_model or checkpoint_path(o.task, "reward_model") if reward == "rm" else reward.rpartition(":")[0]
        written = {os.path.realpath(path) for path in (self.out, self.record_path, self.state_path)}
        more = (getattr(o, "judge", ""), getattr(o, "constitution", ""))
        for path in filter(None, (o.task, o.eval_file, o.tokenizer, init, judge, *more)):
            if os.path.realpath(path) in written:
                raise UserError(f"--out {o.out} would overwrite {path}, which this run reads; give another path")
        try:
            os.makedirs(os.path.dirname(o.out) or ".", exist_ok=True)
            self._clean()
            with open(f"{o.out}.{os.getpid()}.tmp", "w"):
                os.unlink(f"{o.out}.{os.getpid()}.tmp")
        except OSError as e:
            raise UserError(f"--out {o.out} cannot be written ({e.strerror}); give another path") from None

    def _clean(self):
        """Removes what a killed run of the same --out left half written."""
        for path in Path(self.out).absolute().parent.glob(glob.escape(Path(self.out).stem) + ".*.tmp"):
            with contextlib.suppress(ValueError, PermissionError):
                try:
                    os.kill(int(path.name.split(".")[-2]), 0)
                except ProcessLookupError:
                    path.unlink(missing_ok=True)

    def prepare(self, model):
        size = sum(p.numel() for p in model.parameters()) * self.weights.itemsize
        if self._free() and size > self._free() and not self.o.force:
            raise UserError(f"a model of {size / 2**30:.1f} GiB does not fit on {self.device}; --predict own prints what the run needs")
        return super().prepare(model)

    # ---- the global batch

    def micro_batches(self, rows):
        """The one place where a step's global batch is cut."""
        return [rows[i : i + self.o.micro_batch] for i in range(0, len(rows), self.o.micro_batch)]

    @torch.no_grad()
    def whole(self, s, f):
        """-> f(ids, mask), (rows, T-1), of all the samples s, a micro-batch at a time"""
        parts = []
        for rows in self.micro_batches(torch.arange(len(s.ids))):
            ids, mask, *_ = s.take(rows)
            with self.autocast():
                x = f(ids, mask)
            parts.append(torch.nn.functional.pad(x, (0, s.logp.size(1) - x.size(1))))
        return torch.cat(parts)

    def total(self, count):
        """The one place where a count of the global batch (its pairs, its tokens) is summed; a loss is divided by it."""
        return count

    # ---- the loop

    def begin(self, held, batches, **state):
        """held: the memory.Ledger. batches: the data, whose epochs set the steps. state: what is saved beside --out and restored by
        --resume: name = object with state_dict and load_state_dict; one is the optimizer."""
        o, self.state, self.held, self.models = self.o, state, held, held.records()
        if o.epochs or (is_file(o.task) and "steps" not in o.given):
            o.steps = (o.epochs or 1) * batches.per_epoch
        if is_exact(o.task) and "eval_every" not in o.given:
            o.eval_every = max(1, o.steps // 20)
        self.first, self.wall, self.tokens, self.times, self.lines, self.saved = 0, time.time(), 0, [], [], False
        self.parts, self.before, self.steps_done = {}, 0, 0  # before: tokens until the interruption that this run goes on from
        if o.predict:
            return
        self.start = _digest(held.models.values(), batches.rows)
        self.options = self._chosen()
        if o.warmup > o.steps:
            last = lr_at(o.steps - 1, o)
            self.say(f"--warmup {o.warmup} outlasts the {o.steps} steps: the learning rate ends at {last:.3g}, not {o.lr:g}")
        self.say(held.text())
        if self.pure:
            self.say("bfloat16-pure: an update below 1/256 of a weight is rounded away, as most are at the learning rates of large models")
        versions = {"python": platform.python_version(), "torch": torch.__version__}
        self.header = {"method": self.method, "task": o.task, "options": asdict(o), "device": str(self.device),
                       "dtype": str(self.dtype)[6:], "commit": _commit(), "versions": versions, "models": self.models}  # fmt: skip

    def _chosen(self):
        """-> the options that set a run's bits"""
        kept = {k: v for k, v in asdict(self.o).items() if k not in ("resume", "log_every", "save_every", "out", "device")}
        return kept | {"device": self.device.type}

    def finished(self, strict=True):
        """Whether --out is there, made by this very run, and no state says that it was begun again. strict: the checkpoint of another
        run in its place is a mistake."""
        if os.path.exists(self.state_path):
            return False
        found, mine = None, (self.method, self._chosen())
        with contextlib.suppress(Exception):  # whatever stands at --out, it is no finished run
            meta = torch.load(self.out, map_location="cpu", weights_only=True)["meta"]
            found = meta["method"], meta["options"]
        if found and found != mine and strict:
            other = f"with {self._others(found[1])}" if found[0] == self.method else f"of {found[0]}.py"
            raise UserError(f"--resume: {self.out} is a finished run {other}; start without --resume, or give another --out")
        return found == mine

    def past(self):
        """-> the closing figures of a run that has ended"""
        return json.loads(Path(self.record_path).read_text().splitlines()[-1])["final"]

    def steps(self):
        """Yields the number of each step from 0; between two of them the step is recorded, shown and saved."""
        o, interrupted = self.o, []
        if o.predict or self._free():
            yield from self._predict()
        if not (o.resume and self._restore()):
            if os.path.exists(self.state_path):
                self.say(f"an interrupted run's {self.state_path} will be replaced at the first save; --resume would go on with it")
            self.record = open(self.record_path, "wb", buffering=0)
            self.write(self.header)
        measured = min(self.first + 1, o.steps - 1)  # AdamW's moments are there
        before = signal.getsignal(signal.SIGINT)
        with contextlib.suppress(ValueError):  # not the main thread: Ctrl-C is somebody else's
            signal.signal(signal.SIGINT, lambda *_: (interrupted.append(1), signal.signal(signal.SIGINT, before)))
        bar = tqdm(total=o.steps, initial=self.first, desc=self.method, disable=not sys.stderr.isatty(), dynamic_ncols=True)
        try:
            for step in range(self.first, o.steps):
                self.started, self.sums, self.spent, self.elapsed = time.perf_counter(), {}, {}, None
                self.cursor = self._drawn()
                try:
                    with self._measured() if step == measured else contextlib.nullcontext():
                        yield step
                except GeneratorExit:  # an error in the loop, in a user's reward say: nothing is lost if no weight has moved since
                    if self.elapsed is None and step > self.first:
                        self._save(step, **self.cursor)
                        self.say(f"step {step} is saved in {self.state_path}" + "; --resume goes on from there" * (step < o.steps))
                    raise
                done, self.steps_done = step + 1, self.steps_done + 1
                if step != measured or done == o.steps:  # counting takes time
                    self.times.append(self.elapsed)
                for name, seconds in self.spent.items():
                    self.parts.setdefault(name, []).append(seconds)
                self.last = self.sums
                if done % o.log_every == 0 or done == o.steps:
                    line = self._log(done)
                    text = ", ".join(f"{k.split('/')[-1]} {line[k]:.3g}" for k in self.shown if k in line)
                    bar.set_postfix_str(text)
                    tenth = done * 10 // o.steps > (done - o.log_every) * 10 // o.steps
                    if bar.disable and not o.eval_every and (tenth or done == o.steps):
                        self.say(f"{self.method} step {done}/{o.steps}: {text}")
                bar.update()
                if done % o.save_every == 0 or done == o.steps or interrupted:
                    self._save(done)
                if interrupted:
                    raise KeyboardInterrupt(f"step {done}, in {self.state_path}")
        finally:
            bar.close()
            with contextlib.suppress(ValueError):
                signal.signal(signal.SIGINT, before)

    def _predict(self):
        """Two steps as the script has them, under weights that are fake: the second's peak is what the run will need. Nothing that
        they touch is left changed. With --predict that is all, and the process ends."""
        o, device, tokens, every, drawn = self.o, self.device, self.tokens, self.o.eval_every, self._drawn()
        self.device, self.predicting, o.eval_every = torch.device("cpu"), True, 0
        with self.held.tracked(self.state["optimizer"], shadow=True) as self.tracker:
            for step in (0, 1):
                self.started, self.sums, self.spent, self.elapsed = time.perf_counter(), {}, {}, None
                self.tracker.start()
                yield step
        self.predicted, self.peak, self.tracker = self.peak, None, None
        self.device, self.predicting, o.eval_every, self.tokens, self.parts = device, False, every, tokens, {}
        for name, state in drawn.items():
            self.state[name].load_state_dict(state)
        if o.predict:
            self._predicted()
        self.say(f"predicted peak: {self.held.peak_text(*self.predicted)}")
        need, free = sum(self.predicted[0].values()), self._free()
        if need > free and not o.force:
            raise UserError(f"a step needs {need / 2**30:.3g} GiB, but {self.device} has {free / 2**30:.3g} GiB free: a smaller "
                            "--micro-batch or --checkpoint-activations need less, --force goes on")  # fmt: skip

    def _drawn(self):
        """-> the states that a step moves before any weight has moved"""
        return {name: x.state_dict() for name, x in self.state.items() if name in ("prompts", "round")}

    def _free(self):
        """-> the bytes that this run may take of a GPU, those included that it holds already; 0 on other devices"""
        if self.device.type != "cuda":
            return 0
        return torch.cuda.mem_get_info(self.device)[0] + torch.cuda.memory_reserved(self.device)

    def _predicted(self):
        """Ends --predict: the ledger, the peak, and with --out the record."""
        o = self.o
        names = [name for name in ("batch_size", "group", "minibatches", "micro_batch") if hasattr(o, name)]
        shape = " ".join(f"--{name.replace('_', '-')} {getattr(o, name)}" for name in names)
        autocast = ", bfloat16 autocast" * (self.dtype == torch.bfloat16 and not self.pure)
        self.say(f"{self.method}, --predict {o.predict}: {o.task}, {shape}, {str(self.weights)[6:]} weights{autocast}"
                 + ", activations checkpointed" * o.checkpoint_activations)  # fmt: skip
        self.say(f"{self.held.text()}\npredicted peak: {self.held.peak_text(*self.predicted)}")
        if "out" in o.given:
            path = f"{o.out.removesuffix('.pt')}.predicted.jsonl"
            try:
                os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
                self.record = open(path, "wb", buffering=0)
            except OSError as e:
                raise UserError(f"{path} cannot be written ({e.strerror}); give another --out") from None
            self.write({"method": self.method, "task": o.task, "options": asdict(o)})
            self.write({"final": {"models": self.models, **self.held.peak_figures("predicted", self.predicted)}})
        sys.exit(0)

    @contextlib.contextmanager
    def _measured(self):
        """Counts the bytes of one whole step: on a CPU those of its tensors, on a GPU those that its allocator gave out."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        with self.held.tracked(self.state["optimizer"]) if self.device.type == "cpu" else contextlib.nullcontext() as self.tracker:
            yield
        if self.device.type == "cuda":
            self.peak = {"all": self.allocated}, {}
        self.tracker = None

    shown = ("loss", "reward", "rewards/margins", "rewards/accuracies", "accuracy", "margin", "nll_loss", "kl", "entropy",
             "explained_variance", "frac_reward_zero_std", "kept_fraction", "lr")

    def add(self, metrics):
        """Adds a micro-batch's shares of the step's metrics: tensors or numbers that are divided by the global count already."""
        for name, value in metrics.items():
            self.sums[name] = self.sums.get(name, 0.0) + (value.detach() if torch.is_tensor(value) else value)

    @contextlib.contextmanager
    def clock(self, part):
        """Times a part of the step; the medians of the parts stand in the record as <part>_ms."""
        self._wait()
        start = time.perf_counter()
        if self.tracker:
            self.tracker.during("sampling" if part == "sample" else None)
        yield
        if self.tracker:
            self.tracker.during(None)
        self._wait()
        self.spent[part] = self.spent.get(part, 0.0) + time.perf_counter() - start

    def _wait(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def update(self, step, model, optimizer, share=1.0):
        """An optimizer step: learning rate, clipped gradient, AdamW. Stops at a loss or gradient that is not finite. share: 1 / the
        number of optimizer steps in a step of the run, whose metrics are means over them."""
        lr, first, self.elapsed = lr_at(step, self.o), self.elapsed is None, 0.0  # first: no weight has moved since the step began
        for group in optimizer.param_groups:
            group["lr"] = lr
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), self.o.grad_clip)
        if not torch.isfinite(norm + self.sums["loss"]):
            if not self.saved and first and all(torch.isfinite(p).all() for p in model.parameters()):
                self._save(step, **self.cursor)
            kept = f"the last good state is kept in {self.state_path}" if self.saved else "there is no earlier state"
            raise Stopped(f"step {step + 1}: the loss is {float(self.sums['loss'])}, the gradient's norm {float(norm)}; {kept}. "
                          "Start again with a smaller --lr or a longer --warmup")  # fmt: skip
        optimizer.step()
        optimizer.zero_grad()
        self.add({"grad_norm": norm * share})
        self.sums["lr"] = lr
        if self.tracker:
            self.peak = self.tracker.parts, dict(self.tracker.most)
        elif self.device.type == "cuda":
            self.allocated = torch.cuda.max_memory_allocated(self.device)
        self.elapsed = time.perf_counter() - self.started

    def _log(self, step):
        """Records the step that was done last. -> its line"""
        line = {"step": step, **{k: float(v) for k, v in self.last.items()}}
        self.write(line)
        return line

    def cut_short(self, step, why):
        """Ends the training before the step number `step`; where nothing was learned yet, with an error."""
        if step == 0:
            raise Stopped(why)
        self.say(f"{why}. The run ends after step {step} of {self.o.steps}, with what it has learned")
        if step > self.first and step % self.o.log_every:
            self._log(step)
        self.o.steps = step

    def evaluated(self, step, figures):
        """Records and shows an evaluation during the training."""
        self.write({"step": step + 1, "eval": figures})
        loss, shown = float(self.sums["loss"]), ("reward", "score", "kl", "kl_star", "accuracy", "rms", "nll")
        text = ", ".join(f"{k} {figures[k]:.3f}" for k in shown if k in figures)
        self.say(f"{self.method} step {step + 1}/{self.o.steps}: loss {loss:.4f}, {text}")

    # ---- files

    def say(self, text):
        tqdm.write(text)
        sys.stdout.flush()

    def write(self, line):
        """Appends to the record: one write a line, so that a killed run leaves whole lines."""
        self.lines.append(json.dumps(line) + "\n")
        self.record.write(self.lines[-1].encode())

    def _save(self, step, **earlier):
        """earlier: states to save in place of the present ones."""
        state = {"options": self.options, "start": self.start, "step": step, "tokens": self.tokens, "wall": time.time() - self.wall,
                 "record": self.lines, "rng": torch.get_rng_state()}  # fmt: skip
        state |= {name: x.state_dict() for name, x in self.state.items()} | earlier
        temporary = f"{self.state_path}.{os.getpid()}.tmp"
        torch.save(state, temporary)
        os.replace(temporary, self.state_path)
        self.saved = True

    def _restore(self):
        """Goes on from the saved state; False, aloud, where there is none. Ends the process where the run had finished."""
        if self.finished():
            self.say(f"--resume: this run has finished, {self.out} is its checkpoint")
            sys.exit(0)
        if not os.path.exists(self.state_path):
            self.say(f"--resume: there is no {self.state_path} yet, so this run starts afresh")
            return False
        try:
            state = torch.load(self.state_path, map_location=self.device, weights_only=True)
            saved = state["options"]
        except Exception as e:  # torch raises a zoo of types for a broken file
            raise UserError(f"{self.state_path} is no whole training state ({type(e).__name__}); start without --resume") from None
        if saved != self.options:
            raise UserError(f"--resume: the interrupted run had {self._others(saved)}; give the same options, or start without --resume")
        if state["start"] != self.start:
            raise UserError("--resume: the checkpoint or the data that the run started from has changed; start without --resume")
        for name, x in self.state.items():
            x.load_state_dict(state[name])
        torch.set_rng_state(state["rng"].cpu())
        self.first, self.wall, self.lines, self.saved = state["step"], time.time() - state["wall"], state["record"], True
        self.tokens = self.before = state["tokens"]
        self.record = open(self.record_path, "wb", buffering=0)
        self.record.write("".join(self.lines).encode())  # cut back to the saved step
        self.say(f"resumed after step {self.first} of {self.o.steps}")
        return True

    def _others(self, saved):
        """The options of a saved run that are not this one's, as text"""
        return ", ".join(f"--{k.replace('_', '-')} {saved.get(k)}" for k, x in self._chosen().items() if x != saved.get(k))

    def facts(self):
        """What a checkpoint keeps of the run that made it; nothing in it changes from one run to the same run again."""
        return {"method": self.method, "task": self.o.task, "options": self.options, "steps": self.o.steps}

    def finish(self, final, forward, backward):
        """Completes the figures of evaluate.py with the run's own, ends the record with them, and drops the state. forward, backward:
        the passes of each role's model over a token that is trained on."""
        forward, backward = ({role: passes.get(role, 0) for role in self.held.models} for passes in (forward, backward))
        final |= {"models": self.models, "forward_passes": sum(forward.values()), "backward_passes": sum(backward.values()),
                  "flops_per_token": self.held.flops(forward, backward, self.o.checkpoint_activations),
                  "trained_tokens": self.tokens * getattr(self.o, "updates", 1),
                  "wall_s": round(time.time() - self.wall, 2)}  # fmt: skip
        if self.times:
            tokens = (self.tokens - self.before) / self.steps_done  # a step
            final |= {"step_ms": 1000 * statistics.median(self.times), "tokens_per_s": tokens / statistics.fmean(self.times)}
            final |= {f"{part}_ms": 1000 * statistics.median(times) for part, times in self.parts.items()}
        final |= self.held.peak_figures("peak", self.peak) | self.held.peak_figures("predicted", self.predicted)
        self.write({"final": final})
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.state_path)
        self.say(self.held.text())
        parts = ", ".join(f"{part} {final[f'{part}_ms']:.0f}" for part in self.parts)
        speed = f", {final['step_ms']:.0f} ms a step{f' ({parts})' if parts else ''}" if self.times else ""
        speed += f", {final['tokens_per_s']:,.0f} tokens/s" if self.times else ""
        peak = f"\nmemory at a step's peak: {self.held.peak_text(*self.peak)}" if self.peak else ""
        self.say(f"time: {final['wall_s']:.0f} s{speed}{peak}\ncheckpoint {self.out}, record {self.record_path}")


def _digest(models, rows):
    """A fingerprint of the weights and of the fixed set that a run starts from."""
    h = hashlib.sha256(repr(rows).encode())
    for p in (p for model in models for p in model.parameters()):
        h.update(p.detach().cpu().contiguous().view(torch.uint8).numpy())
    return h.hexdigest()


def _commit():
    """-> the git commit of these scripts, or "" where there is none"""
    with contextlib.suppress(OSError):
        return subprocess.run(["git", "-C", Path(__file__).parent, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    return ""

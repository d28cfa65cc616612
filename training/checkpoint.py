"""Opens checkpoints with their tokenizer and chat template, and runs the stage that makes one."""

import os
import runpy
import sys
import time
from functools import partial
from pathlib import Path

import data
import gpt
from data import Stopped, UserError
from training import distributed, locks
from training.files import from_checkpoint


def default_path(task, method):
    """-> out/<task>/<method>.pt"""
    return os.path.join("out", default_folder(task), f"{method}.pt")


def is_checkpoint(path):
    """Whether an option's value is the path of a checkpoint: a .pt, or a folder"""
    return path.endswith(".pt") or os.path.isdir(path)


def default_folder(task):
    """-> the name of a task's folder. For a file it follows from the path, my/pairs for
    my/pairs.jsonl, so that no two data sets share a folder, with each other or a built-in task."""
    if data.kind(task) != "file":
        return task.replace(":", "-")
    try:
        task = os.path.relpath(task)
    except ValueError:  # on another drive
        task = os.path.splitdrive(os.path.abspath(task))[1].lstrip(os.sep)
    *folders, name = task.replace(os.pardir, "__up__").split(os.sep)
    stem, dot, end = name.partition(".jsonl")
    if dot and end in ("", ".gz") and (folders or stem.partition("-")[0] not in data.BUILT_IN):
        name = stem + end
    return os.path.join(*folders, name if dot else f"{name}.file")


def load(path, task=None, mapped=False):
    """-> (GPT, Tokenizer, meta). Raises UserError if it is no language model, or if the task
    or the checkpoint has a vocabulary of its own that the other lacks. mapped: the weights stay in
    their files until they are read."""
    kind = "a reward model; give a language model, such as sft.py writes"
    return _open(path, task, gpt.GPT, kind, mapped)


def start(path, task, o, scalar):
    """-> (GPT, Tokenizer, meta), mapped, of the checkpoint that a policy starts from. With --lora,
    adapters that it has are not merged into the weights, because they are trained further."""
    model, tokenizer, meta = load(path, task, True)
    model.dtypes = {name: p.dtype for name, p in model.named_parameters()}
    if o.lora and hasattr(model, "given") and not scalar:
        model.given.keep(model, o)
    return model, tokenizer, meta


def load_scalar(path, task=None, mapped=False):
    """-> (ScalarGPT, Tokenizer, meta), for a reward model"""
    kind = "a language model; give a reward model, such as reward_model.py writes"
    return _open(path, task, gpt.ScalarGPT, kind, mapped)


def load_any(path):
    """-> (GPT or ScalarGPT, Tokenizer, meta)"""
    return _open(path, None, (gpt.GPT, gpt.ScalarGPT), "")


def _open(path, task, wanted, otherwise, mapped=False):
    try:
        model, meta = _load(path, mapped)
    except ValueError as e:
        from data import near

        why = str(e) if os.path.exists(path) else near.missing(path)
        raise UserError(why) from None
    if not isinstance(model, wanted):
        raise UserError(f"{path} is {otherwise}")
    if "tokenizer" not in meta:
        raise UserError(f"{path} does not say which tokenizer it was trained with; train it again")
    tokenizer = tokenizer_of(meta)
    if tokenizer.template:
        meta["template"] = meta["template"] | {"before": "", "reads": tokenizer.reads}
    size = model.config.vocab_size
    if not tokenizer.fits(size):
        words = f"{path} has a vocabulary of {size}, but its tokenizer {tokenizer.size}"
        raise UserError(f"{words}; {tokenizer.remedy}")
    if task:
        same_world(path, tokenizer, meta, task)
    return model, tokenizer, meta


def _load(path, mapped):
    if os.path.isdir(path):
        from hf import peft, weights

        return _adapted(path, mapped) if peft.holds(path) else weights.load(path, mapped)
    data.refuse_pointer(path)
    try:
        return gpt.load(path, mapped=mapped)
    except ValueError:
        if os.path.isfile(path):
            from hf import remedies
            from training import adapters

            if adapters.holds(path):
                return _adapted(path, mapped)
            remedies.refuse_part(path)
        raise


def _adapted(path, mapped):
    from training import adapters

    found = adapters.Adapters(path)
    return found.on(*_load(found.base, mapped), mapped)


def tokenizer_of(meta):
    """-> the tokenizer that a checkpoint names"""
    if "files" not in meta["tokenizer"]:
        return data.Tokenizer(meta["tokenizer"])
    from hf.tokenizer import HFTokenizer  # which needs a package that is optional

    return HFTokenizer(meta["tokenizer"])


def facts(run):
    """-> what a checkpoint keeps of the run that made it"""
    meta = {"method": run.method, "task": run.o.task, "options": run.state.options}
    meta |= {"steps": run.o.steps, "tokenizer": run.tokenizer.meta}
    return meta | {"files": run.files.digests, "folder": from_checkpoint(run.o.out)}


def write(run, policy, path, meta):
    """Writes a policy's checkpoint. meta: what it keeps beside the weights"""
    if run.o.lora:
        from training import adapters

        adapters.write(run, policy, path, meta)
        return
    policy = run.placement.model_to_save(policy)
    if distributed.is_first:
        gpt.save(policy, path, **meta)


def same_world(path, tokenizer, meta, task):
    """Refuses a task or a checkpoint with a vocabulary of its own that the other lacks."""
    if task.tokenizer != (tokenizer.meta if tokenizer.longest else None):
        owner = task.name if task.tokenizer else meta["task"]
        raise UserError(
            f"{path} was trained on {meta['task']}, and {owner} has a vocabulary of its own; give "
            f"a checkpoint that sft.py --task {task.name} makes"
        )


def find_reference(run):
    """-> the path of the checkpoint that a policy is compared with: the one that it started from,
    else an earlier out/<task>/sft.pt, else "". Prints why if that one cannot be compared with."""
    path = run.baseline or default_path(run.task.name, "sft")
    try:
        ref, own, _ = load(path)
        fits = ref.config.block_size >= run.block_size
        if own.vocabulary == run.tokenizer.vocabulary and fits:
            return path
        why = f"{path} has another vocabulary or a shorter context"
    except UserError as e:
        if not os.path.exists(path):
            return ""  # the first SFT run of a task
        why = str(e)
    data.say(f"no reference checkpoint ({why}): win rate and KL are not reported")
    return ""


def describe(meta):
    """-> a description of a checkpoint, so that a test of two steps is not mistaken for training"""
    if "steps" not in meta:
        return meta["method"]
    reward = "" if meta["reward"] is None else f", reward {meta['reward']:.2f}"
    return f"{meta['method']} on {meta['task']}, {meta['steps']} steps{reward}"


def make_if_missing(path, method, o, *more):
    """-> the path, the default checkpoint of an earlier stage of the same task. If there is none,
    the stage's script runs first, in this process, with its own defaults, or with `more`."""
    if o.init and not os.path.exists(path):
        load(o.init)  # a wrong one is refused before anything is trained
    if data.kind(o.task) == "file":
        rows = "prompt, completion" if method == "sft" else "prompt, chosen, rejected"
        option = "--init" if method == "sft" else "--reward X.pt"
        made = f"a checkpoint such as python {method}.py --task FILE makes from rows of {rows}"
        raise UserError(f"{option} is needed with a file as the task: {made}")
    there = partial(os.path.exists, path)
    if distributed.of_first(there):
        return path
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with locks.given_back():
        if distributed.is_first:
            locks.wait(path, f"this one waits for it, and goes on when {path} is there")
        if not distributed.of_first(there):
            _make(path, method, "--task", o.task, "--device", o.device, "--dtype", o.dtype, *more)
    return path


def _make(path, method, *options):
    """Runs the script of a stage, or resumes it."""
    script = method.partition("-")[0]
    data.say(f"{path} does not exist yet: running {script}.py first (a minute on a laptop)")
    argv, start = sys.argv, time.time()
    file = str(Path(gpt.__file__).with_name(f"{script}.py"))
    sys.argv = [file, *options]
    state = path.removesuffix(".pt") + ".state"
    if distributed.of_first(partial(os.path.exists, state)):
        sys.argv.append("--resume")
    try:
        runpy.run_path(file, run_name="__main__")
    except SystemExit as e:
        if e.code == 130:
            stopped = f"where {script}.py stopped" if os.path.exists(state) else ""
            raise KeyboardInterrupt(stopped) from None
        if e.code:
            words = f"{script}.py, which makes {path}, failed with exit code {e.code}"
            raise Stopped(words) from None
    finally:
        sys.argv = argv
    data.say(f"{path} was made in {time.time() - start:.0f} s\n")

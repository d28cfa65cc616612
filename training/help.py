"""Prints --help and --help-all, and suggests an option if the command line has an unknown one."""

import difflib
import re
import sys
import textwrap
from dataclasses import fields
from itertools import chain, groupby

from training.flags import flag

GROUPS = {  # title -> options that all scripts share; those behind the bar are in --help-all alone
    "data": "task pairs epochs truncate | eval_file strict block_size chat template_args",
    "model": "init reference n_layer n_embd lora | tokenizer n_head lora_alpha",
    "optimization": "steps batch_size lr seed | micro_batch micro_tokens lr_schedule warmup"
    " weight_decay optimizer grad_clip",
    "sampling": "reward temperature max_new_tokens",
    "output": "out name resume eval_every | eval_prompts loss_every save save_every keep_every keep"
    " log_every log_to",
    "machine": "device dtype | checkpoint_activations compile shard",
}
USUAL = """
batch-size: per-device-batch-size per-device-train-batch-size train-batch-size
beta: kl-coef | checkpoint-activations: gradient-checkpointing | dtype: bf16 fp16
block-size: max-length max-seq-length | epochs: num-epochs num-train-epochs | eps: epsilon
eps-high: epsilon-high | eval-every: eval-steps | grad-clip: max-grad-norm | group: num-generations
init: model model-name model-name-or-path | log-every: logging-steps | log-to: report-to
lora: lora-r use-peft | lr: learning-rate | lr-schedule: lr-scheduler-type
max-new-tokens: max-completion-length | micro-batch: gradient-accumulation-steps
out: output output-dir | reference: ref-model | resume: resume-from-checkpoint
save-every: save-steps | steps: max-steps | task: data dataset dataset-name train-file
updates: num-iterations | warmup: warmup-steps
"""  # our option: its names in other libraries
WIDTH, COLUMN = 80, 25
KINDS = {int: "I", float: "F", str: "S", tuple: "S ..."}


def show(cls, presets, full):
    """Prints the help of a script. full: with the whole docstring and all options"""
    module = sys.modules[cls.__module__]
    text = module.__doc__.strip()
    print(text if full else head(text))
    known, short = {f.name: f for f in fields(cls)}, hasattr(cls, "shown")  # of a training script
    own = [name for name in known if not any(name in words.split() for words in GROUPS.values())]
    mine = "the method's own" if short else "its own"
    for title, words in ({mine: " ".join(own)} | GROUPS).items():
        if full or not short:
            words = words.replace(" | ", " ")
        names = [name for name in words.partition(" | ")[0].split() if name in known]
        if names:
            print(f"\n{title}:")
        for name in names:
            print(entry(known[name], presets))
    if not full:
        others = "lists the other options, and " if short else ""
        print(f"\n--help-all {others}has the whole docstring")


def head(text):
    """-> a docstring's title, equations and commands, at most 80 columns wide"""
    above = re.split(r"\n\n    paper  +code", text)[0]
    commands = [x for x in text.splitlines() if x.startswith("    python ") and x not in above]
    found = []
    for block in [*above.split("\n\n"), *(["\n".join(commands)] if commands else [])]:
        rows = groupby(block.splitlines(), lambda x: x.startswith("    "))
        for set_off, lines in [(key, list(rows)) for key, rows in rows]:
            found += chain(*map(fit, lines)) if set_off else wrapped(" ".join(lines), 0, 0)
        found.append("")
    return "\n".join(found[:-1])


def fit(line):
    """-> the lines of an equation or a command, broken between its columns. An equation of one
    column that is as wide as the screen begins at the left."""
    if len(line) <= WIDTH:
        return [line]
    lines = [""]
    for column in re.split(r"(?<=\S) {2,}", line.strip()):
        last = f"{lines[-1]}  {column}" if lines[-1] else f"    {column}"
        if len(last) <= WIDTH or not lines[-1]:
            lines[-1] = last
        else:
            lines.append(f"        {column}")
    return chain(*map(unbroken, lines))


def unbroken(x):
    if len(x) <= WIDTH:
        return [x]
    x = x.strip()
    return [x] if " = " in x and len(x) <= WIDTH else wrapped(x, 8, 8)


def entry(f, presets):
    """-> the lines of an option. For a switch they show the form that changes its default."""
    on = f.type is bool and default_of(f, presets)
    choices = f.metadata.get("choices")
    form = flag(f.name) if f.default is not ... else f.name
    if on:
        form = form.replace("--", "--no-", 1)
    elif f.type is not bool and f.default is not ...:
        form += f" {'{' + ','.join(choices) + '}' if choices else KINDS[f.type]}"
    text = ("turns off: " if on else "") + described(f, presets)
    if len(form) + 4 > COLUMN:
        lines = [f"  {form}"] if len(form) + 2 <= WIDTH else wrapped(form, 2, 6)
        return "\n".join([*lines, *wrapped(text, COLUMN, COLUMN)])
    lines = wrapped(text, COLUMN, COLUMN)
    return "\n".join([f"  {form}".ljust(COLUMN) + lines[0].lstrip(), *lines[1:]])


def wrapped(text, first, rest):
    how = {"initial_indent": " " * first, "subsequent_indent": " " * rest}
    return textwrap.wrap(text, WIDTH, break_long_words=False, break_on_hyphens=False, **how)


def described(f, presets):
    """-> the help text of an option, with its default and the defaults of some tasks or variants"""
    text, default, found = f.metadata["help"], default_of(f, presets), []
    said = "default" in text or default == 0 and "(0:" in text
    if default not in ("", (), None, ...) and not said and f.type is not bool:
        found.append(f"default: {default}")
    if "like" in f.metadata:
        found.append(f"default: that of {flag(f.metadata['like'])}")
    for words, preset in presets.items():
        if words != "any" and f.name in preset:
            x = preset[f.name]
            found.append(f"{words}: {('off', 'on')[x] if f.type is bool else x}")
    return text + (f" ({'; '.join(found)})" if found else "")


def default_of(f, presets):
    """-> the default of an option, for any task"""
    return presets.get("any", {}).get(f.name, f.default)


def unknown(words, cls):
    """-> the message about words on the command line that belong to no option"""
    names = [flag(f.name) for f in fields(cls)]
    names += [flag(f"no_{f.name}") for f in fields(cls) if f.type is bool]
    usual, found = {}, ""
    for row in re.split(r"\n(?=\S+:)| \| ", USUAL.strip()):
        ours, _, theirs = row.partition(":")
        usual |= dict.fromkeys(theirs.split(), ours)
    for word in words:
        given = word.partition("=")[0].replace("_", "-")
        other = "--" + usual.get(given.lstrip("-"), "")
        close = [other] if other in names else difflib.get_close_matches(given, names, 1)
        if word.startswith("-") and close:
            found = f"; did you mean {close[0]}?"
            break
    return f"unrecognized arguments: {' '.join(words)}{found} (--help lists the options)"

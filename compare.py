"""The methods side by side: models held, memory, passes, time, reward and KL, from one SFT checkpoint with equal budgets.

    python compare.py                                  every method on reviews, one seed; table and pictures in out/compare/reviews
    python compare.py --seeds 3 --sweep                three seeds, and each method's strength (β, τ, γ, λ) at other values
    python compare.py --methods dpo simpo --task exact
    python compare.py --methods dpo-few dpo iterative_dpo online_dpo --course        how reward, KL and loss move over the training
    python compare.py --quick                          a smoke pass of all methods, under four minutes
    python compare.py --task tokens:128+128            sequences of one length: memory and step time alone
    python compare.py --predict 7b                     the memory of a 7B model's step, predicted without hardware

The budget is a number of response sequences that are trained on: a pair is two, and a sequence that is trained on twice counts
twice. Each run is a process of its own through its script's own command line. A run that is there with the same command is kept,
so an interrupted comparison goes on where it stopped; a run that failed is a row that says so, and the exit code is 1.
"""
import contextlib
import hashlib
import json
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import common
from common import Count, Seed, Whole

HERE, LOCK = Path(__file__).parent, threading.Lock()

# row: (script, what it adds to the command line, the option that is its strength, other values of it)
ROWS = {
    "sft": ("sft.py", "", "", ()),
    "dpo": ("dpo.py", "", "--beta", (0.03, 0.3, 1.0)),
    "cdpo": ("dpo.py", "--label-smoothing 0.1", "--beta", (0.03, 0.3, 1.0)),
    "ipo": ("dpo.py", "--loss ipo", "--tau", (0.3, 3.0, 10.0)),
    "simpo": ("simpo.py", "", "--beta", (0.5, 5.0, 10.0)),
    "orpo": ("orpo.py", "--lr 3e-4 --warmup 20", "--lam", (0.03, 0.3, 1.0)),
    "kto": ("kto.py", "", "--beta", (0.03, 0.3, 1.0)),
    "online_dpo": ("online_dpo.py", "", "--beta", (0.03, 0.3, 1.0)),
    "ppo": ("ppo.py", "", "--beta", (0.02, 0.2, 0.5)),
    "grpo": ("grpo.py", "", "--beta", (0.01, 0.16, 0.64)),
    "rloo": ("grpo.py", "--adv-norm loo --agg const --kl reward", "--beta", (0.01, 0.16, 0.64)),
    "dapo": ("dapo.py", "", "", ()),  # it has no KL to the reference
    "rlaif": ("rlaif.py", "", "--beta", ()),  # from skills of its own, on reviews only; the budget is that of its last phase
}  # fmt: skip
MORE = {  # rows to be named with --methods; the prediction has the first two of itself
    "reward_model": ("reward_model.py", "", "", ()),
    "dpo-precomputed": ("dpo.py", "--precompute-ref --pairs 2000", "--beta", ()),
    "dpo-few": ("dpo.py", "--pairs 256", "--beta", ()),
    "iterative_dpo": ("online_dpo.py", "--rounds 3", "--beta", ()),
}
SAME = ("cdpo", "ipo", "rloo", "dpo-few", "iterative_dpo")  # rows that hold what another one holds
SAMPLED = ("ppo", "grpo", "rloo", "dapo", "rlaif")
CARDS = (24, 40, 80, 141)  # GB
DTYPES = {"bfloat16": "autocast", "bfloat16-pure": "pure bf16"}  # of --predict
SPARE = 2.0  # GiB that stay free on a card, for the CUDA context, workspaces and fragmentation


@dataclass
class Options:
    task: str = "reviews"  # reviews, arithmetic:N, exact, tokens:P+C, or a file with --init
    methods: tuple = ()  # rows of the table, such as dpo simpo (default: all but reward_model, dpo-precomputed, dpo-few, iterative_dpo)
    seeds: Count = 1  # runs of each method, with seeds 0, 1, …; all start from one SFT checkpoint
    budget: Whole = 0  # response sequences trained on (0: reviews 9600, arithmetic 25600, exact 192000, tokens 192; quick 1920 or 16)
    sweep: bool = False  # each method with other strengths too (β, τ, γ, λ), seed 0
    course: bool = False  # evaluate every run twenty times: a table and a picture of reward, KL and loss over the training
    quick: bool = False  # a smoke pass: short stages, a small budget
    init: str = ""  # SFT checkpoint that all methods but rlaif start from (default: made first)
    out: str = ""  # folder (default: out/compare/<task>)
    jobs: Count = 1  # runs at a time, each with its share of the threads; two or more disturb each other's times (default: 1; quick: 2)
    n_layer: Whole = 0  # blocks of the model that is made (0: the task's)
    n_head: Whole = 0  # its attention heads a block
    n_embd: Whole = 0  # its width
    predict: Literal["", "own", "1b", "7b"] = ""  # train nothing: print the memory of a step at that size
    batch_size: Count = 4  # sequences a step, with --predict; a pair is two
    micro_batch: Whole = 0  # sequences a forward pass, with --predict (0: all)
    seq_len: Whole = 0  # tokens of a sequence, with --predict (0: 2048, own: the task's)
    device: str = "auto"  # cpu, cuda, cuda:1, mps
    dtype: common.Precision = "auto"  # of the runs
    seed: Seed = 0  # the first of the seeds


# ------------------------------------------------------------------------------------------------ the runs


def shape(task, row):
    """-> (the options that set a step's batch, the response sequences that a step trains on)"""
    kind = task.partition(":")[0]
    prompts, group = {"exact": (4, 64), "arithmetic": (32, 8), "tokens": (2, 4)}.get(kind, (16, 8))
    pairs = {"exact": 128, "tokens": 4}.get(kind, 32)
    small = " --minibatches 1" * (kind == "tokens")
    if row == "ppo":
        prompts, group = {"exact": (4, 64), "arithmetic": (256, 1), "tokens": (8, 1)}.get(kind, (120, 1))
        return f"--batch-size {prompts} --group {group} --updates 2{small}", 2 * prompts * group
    if row == "rlaif":
        prompts, group = 2 * prompts, group // 2
    if row in SAMPLED:
        return f"--batch-size {prompts} --group {group}{small * (row == 'dapo')}", prompts * group
    if row in ("sft", "kto"):
        return f"--batch-size {2 * pairs}", 2 * pairs
    return f"--batch-size {pairs}", 2 * pairs


def model_size(o):
    """-> the options that give the model's size"""
    names = [name for name in ("n_layer", "n_head", "n_embd") if name in o.given]
    return [x for name in names for x in (f"--{name.replace('_', '-')}", str(getattr(o, name)))]


def plan(o, folder):
    """-> (the stages, the runs), each a list of (name, row, command), commands without the interpreter"""
    kind = o.task.partition(":")[0]
    budget = {"arithmetic": 25600, "exact": 192000, "tokens": 192}.get(kind, 9600)
    budget = o.budget or ({"arithmetic": 2048, "exact": 2048, "tokens": 16}.get(kind, 1920) if o.quick else budget)
    where = ["--task", o.task, "--device", o.device, "--dtype", o.dtype]
    short = {"sft": " --steps 200", "reward_model": " --steps 30", "rlaif": "--skill-steps 40 --sl-steps 10 --pm-steps 10 --answers 64 "
             "--comparisons 128 --max-new-tokens 32"} if o.quick else {}  # fmt: skip
    if kind == "tokens":
        room = re.fullmatch(r"tokens:(\d+)\+(\d+)", o.task)  # the longest response is half of the context, unless it is given
        room = max(256, int(room[1]) + int(room[2]), 2 * int(room[2])) if room else 256
        short = {"sft": f" --steps 300 --batch-size 8 --block-size {room}", "reward_model": " --steps 5 --batch-size 4"}

    def command(row, name, seed, more):
        script, own, *_ = (ROWS | MORE)[row]
        return [script, *where, *own.split(), *more, "--seed", str(seed), "--out", str(folder / f"{name}.pt")]

    first = f"sft-{o.seed}"
    init = o.init or str(folder / f"{first}.pt")
    stages, runs = [], []
    if not o.init:
        stages.append((first, "sft", command("sft", first, o.seed, [*short.get("sft", "").split(), *model_size(o)])))
    learned = "ppo" in o.methods and kind not in ("exact", "arithmetic")
    if learned or "reward_model" in o.methods:
        name, own = f"reward_model-{o.seed}", short.get("reward_model", "").split()
        stages.append((name, "reward_model", command("reward_model", name, o.seed, [*own, "--init", init])))
    for row in o.methods:
        batch, per_step = shape(o.task, row)
        steps = max(1, round(budget / per_step))
        if steps * per_step != budget:
            print(f"{row}: {steps} steps of {per_step} make {steps * per_step} response sequences, not {budget}")
        more = [*batch.split(), "--steps", str(steps)]
        more += [*short.get("rlaif", "").split(), *model_size(o)] if row == "rlaif" else ["--init", init]
        more += ["--warmup", str(max(1, steps // 5))] * (o.quick or kind == "tokens")
        more += ["--reward", "rm", "--reward-model", str(folder / f"reward_model-{o.seed}.pt")] * (row == "ppo" and learned)
        more += ["--eval-every", str(max(1, steps // 20)), "--log-every", "1"] * o.course
        option, strengths = (ROWS | MORE)[row][2:]
        for seed in range(o.seed, o.seed + o.seeds):
            if row == "sft":  # the stage itself, and the same with other seeds
                if seed > o.seed and not o.init:
                    runs.append((f"sft-{seed}", row, command(row, f"sft-{seed}", seed, [*short.get("sft", "").split(), *model_size(o)])))
            elif row != "reward_model":
                runs.append((f"{row}-{seed}", row, command(row, f"{row}-{seed}", seed, more)))
        for x in strengths if o.sweep else ():
            name = f"{row}{option[1:]}-{x:g}-{o.seed}"
            runs.append((name, row, command(row, name, o.seed, [*more, option, f"{x:g}"])))
    return stages, runs


def final(folder, name):
    """-> (options, closing figures) of a record, None where the run has not ended"""
    try:
        first, *_, last = (folder / f"{name}.jsonl").read_text().splitlines()
        return json.loads(first)["options"], json.loads(last)["final"]
    except (OSError, ValueError, KeyError):
        return None


def child(command, threads=0):
    """Runs a script. -> (its exit code, the last line of its errors). Ctrl-C reaches it too: it saves and ends first."""
    env = {**os.environ, "NANOPO_PARENT": str(os.getpid())} | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    process = subprocess.Popen([sys.executable, HERE / command[0], *command[1:]], env=env, stdout=subprocess.DEVNULL,
                               stderr=subprocess.PIPE, text=True)  # fmt: skip
    errors = process.communicate()[1].strip().splitlines()
    if process.returncode in (130, -signal.SIGINT):
        raise KeyboardInterrupt
    return process.returncode, (errors or ["killed"])[-1]


def inputs(command):
    """-> a digest of the checkpoints that a command reads"""
    given = [Path(path) for option, path in zip(command, command[1:]) if option in ("--init", "--reward-model")]
    return hashlib.sha256(b"".join(path.read_bytes() for path in given if path.exists())).hexdigest()


def run(folder, done, threads, item):
    """Runs one command, if it has not ended before. done: name -> what made it, kept in commands.json. -> (exit code, what went wrong)"""
    name, _, command = item
    made = {"command": command, "inputs": inputs(command)}
    files = [folder / f"{name}{end}" for end in (".pt", ".jsonl", ".state")]
    with LOCK:
        if done.get(name) != made:  # what stands there is another run's
            for path in files[1:]:
                path.unlink(missing_ok=True)
            done[name] = made
            write(folder / "commands.json", json.dumps(done, indent=1))
    if final(folder, name) and files[0].exists():
        return 0, ""
    start = time.time()
    code, error = child([*command, *["--resume"] * files[2].exists()], threads)
    error = f"exit code {code}: {error}" if code else ""
    print(f"{name:<24} {time.time() - start:5.0f} s" + f"   failed, {error}" * bool(code), flush=True)
    return code, error


def write(path, text):
    path.with_suffix(".tmp").write_text(text)
    os.replace(path.with_suffix(".tmp"), path)


def run_all(o, folder):
    """-> (name -> what went wrong, the stages and runs)"""
    stages, runs = plan(o, folder)
    try:
        done = json.loads((folder / "commands.json").read_text())
    except (OSError, ValueError):
        done = {}
    threads, errors, missing = max(1, os.cpu_count() // o.jobs) if o.jobs > 1 else 0, {}, set()
    with ThreadPoolExecutor(o.jobs) as pool:
        for item in stages:
            code, errors[item[0]] = pool.submit(run, folder, done, 0, item).result()
            if code and item[1] == "sft":
                raise (common.UserError if code == 2 else common.Stopped)(f"{item[0]}, from which all start: {errors[item[0]]}")
            missing |= {str(folder / f"{item[0]}.pt")} if code else set()
        begun = [item for item in runs if not missing & set(item[2])]
        errors |= {name: "its reward model failed" for name, *_ in runs}
        for (name, *_), (_, error) in zip(begun, pool.map(partial(run, folder, done, threads), begun)):
            errors[name] = error
    return errors, stages + runs


# ------------------------------------------------------------------------------------------------ the table


def predicted(folder, item):
    """-> what --predict own says to a run's command, or {}"""
    name, _, command = item
    made = {"command": command, "inputs": inputs(command)}
    path = folder / "predicted" / f"{name}.json"
    with contextlib.suppress(OSError, ValueError):
        if (known := json.loads(path.read_text()))["made"] == made:
            return known["figures"]
    child([*command, "--predict", "own", "--out", str(path.with_suffix(".pt"))], threads=1)
    ended = final(path.parent, f"{name}.predicted")
    figures = {key: x for key, x in ended[1].items() if key.startswith("predicted")} if ended else {}
    if figures:
        write(path, json.dumps({"made": made, "figures": figures}))
    return figures


COURSE = ("loss", "reward", "kl", "kl_star")  # of the evaluations during the training
MEANS = ("reward", "score", "win_rate", "kl", "length", "entropy", "step_ms", "sample_ms", "logprobs_ms", "update_ms", "wall_s",
         "trained_tokens", "sampled_tokens", "kl_star", "objective", "accuracy", "nll")  # fmt: skip
KEPT = ("models", "phases", "forward_passes", "backward_passes", "flops_per_token", "peak_bytes", "peak", "peak_most", "frontier")


def summary(o, folder, errors, items):
    """-> the rows of compare.json: one for each method, and one for each strength of the sweep"""
    out = []
    for row in o.methods:
        mine = [item for item in items if item[1] == row]
        main = [item for item in mine if item[0].removeprefix(row + "-").isdecimal()]
        for group in [main, *([item] for item in mine if item not in main)]:
            failed = {name: errors[name] for name, *_ in group if errors.get(name)}
            ended = [(item, *final(folder, item[0])) for item in group if item[0] not in failed and final(folder, item[0])]
            line = {"method": row, "runs": len(ended), "command": " ".join(["python", *group[0][2]]) if group else ""}
            if failed:
                line["failed"] = failed
            if ended:
                options, last = ended[0][1:]
                strength = (ROWS | MORE)[row][2].removeprefix("--").replace("-", "_")
                line |= {key: last[key] for key in KEPT if key in last}
                logged = steps_of(folder, ended[0][0][0])
                steps = max((x["step"] for x in logged), default=options["steps"])  # DAPO ends where it finds no mixed groups any more
                line |= {"strength": strength, "value": options.get(strength), "swept": group is not main, "steps": steps,
                         "planned": options["steps"], "labels": labels(row, options, last), "updates": options.get("updates", 1),
                         "parameters": sum(m["parameters"] for m in last["models"])}  # fmt: skip
                for key in MEANS:
                    xs = [figures[key] for *_, figures in ended if key in figures]
                    if len(xs) == len(ended):
                        line[key] = statistics.fmean(xs)
                        line[f"{key}_sd"] = statistics.stdev(xs) if len(xs) > 1 else 0.0
                if group is main and not common.is_file(o.task):  # of a file --predict knows no row
                    line |= predicted(folder, group[0])
                if o.course and group is main:
                    line["evals"] = evaluations([steps_of(folder, item[0]) for item, *_ in ended], shape(o.task, row)[1])
                if row in ("grpo", "dapo") and group is main:
                    line["course"] = course(logged)
            out.append(line)
    simpo = next((line for line in out if line["method"] == "simpo" and "step_ms" in line), None)
    for line in out:
        if simpo and "step_ms" in line:
            line["step_over_simpo"] = line["step_ms"] / simpo["step_ms"]
            line["flops_over_simpo"] = flops_a_step(line) / flops_a_step(simpo)
    return out


def steps_of(folder, name):
    """-> the lines of a record between its first and its last"""
    return [json.loads(text) for text in (folder / f"{name}.jsonl").read_text().splitlines()[1:-1]]


def flops_a_step(line):
    return line["flops_per_token"] * line["trained_tokens"] / line["updates"] / line["steps"]


def course(lines):
    """-> entropy and reward of each recorded step: where DAPO logs ±1, the share of correct responses in its place"""
    return [{key: line[key] for key in ("step", "entropy", "reward", "accuracy") if key in line} for line in lines if "entropy" in line]


def evaluations(runs, per_step):
    """runs: the lines of a row's records. -> its evaluations during the training, each figure a list, one of each run; the loss is the mean
    of the steps since the evaluation before"""
    out = {}
    for lines in runs:
        losses = []
        for x in lines:
            losses += [x["loss"]] if "loss" in x else []
            if "eval" in x and losses:
                figures = {"loss": statistics.fmean(losses)} | {key: x["eval"][key] for key in COURSE if key in x["eval"]}
                one, losses = out.setdefault(x["step"], {"step": x["step"], "sequences": x["step"] * per_step}), []
                for key, value in figures.items():
                    one.setdefault(key, []).append(value)
    return list(out.values())


def labels(row, options, last):
    """-> how many labels of pairs or answers a run has asked for; None where a reward is computed for every response"""
    if row == "sft" or row in SAMPLED:
        return None
    asked = options["steps"] * options["batch_size"]
    return last.get("labels", min(options.get("pairs") or asked, asked))


def pm(line, key, digits=2):
    """A mean, ± the standard deviation where there are seeds, as text"""
    if key not in line:
        return ""
    spread = f" ± {line[key + '_sd']:.{digits}f}" if line["runs"] > 1 else ""
    return f"{line[key]:.{digits}f}{spread}".replace("-", "−")


def thousands(n):
    """A count in thousands, as text, to three digits where it is small; "" for none"""
    return "" if n is None else f"{n / 1e3:.0f}" if n >= 1e5 else f"{n / 1e3:.3g}"


def table(rows, head):
    """-> a table in Markdown, whose columns are padded so that it can be read as it is"""
    cells = [[*head], *[[str(cell) for cell in row] for row in rows]]
    width = [max(len(row[i]) for row in cells) for i in range(len(head))]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, width)) + " |" for row in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in width) + "|", *lines[1:]])


def tables(lines):
    """-> the three tables of a comparison, as Markdown"""
    results, costs, budgets = [], [], []
    for line in lines:
        name = line["method"] + (f", {line['strength']} {line['value']:g}" if line.get("swept") else "")
        if line["runs"] == 0:
            results.append([name, "failed: " + "; ".join(line.get("failed", {"": "it was not begun"}).values()), *[""] * 6])
            continue
        note = f"ended after {line['steps']} of {line['planned']} steps" if line["steps"] < line["planned"] else ""
        note = f"of {line['runs'] + len(line['failed'])} runs {len(line['failed'])} failed" if "failed" in line else note
        keys = (("reward", 2), ("win_rate", 2), ("kl", 2), ("length", 1), ("entropy", 2), ("kl_star" if "kl_star" in line else "score", 3))
        results.append([name, note, *(pm(line, key, digits) for key, digits in keys)])
        if line.get("swept"):
            continue
        held = [phase["models"] for phase in line.get("phases", ())] + [line["models"]]  # one after another
        models = "; ".join(", ".join(m["role"] + "*" * m["trainable"] for m in phase) for phase in held)
        ratio = [f"{line[key]:.2f}" if key in line else "" for key in ("step_over_simpo", "flops_over_simpo")]
        passes = f"{line['forward_passes']} / {line['backward_passes']}"
        sizes = [f"{line[key] / 1e6:.1f}" if line.get(key) else "" for key in ("predicted_bytes", "peak_bytes")]
        costs.append([name, models, f"{line['parameters'] / 1e6:.2f}", *sizes, passes, f"{line['flops_per_token'] / 1e6:.2f}",
                      pm(line, "step_ms", 1), *ratio])  # fmt: skip
        counts = [thousands(line.get(key)) for key in ("trained_tokens", "sampled_tokens", "labels")]
        budgets.append([name, line["steps"], *counts, pm(line, "wall_s", 0)])
    last = "KL(π‖π*)" if any("kl_star" in line for line in lines) else "score of the reward model"
    return [
        table(results, ("method", "", "reward", "win rate", "KL, nats", "length", "entropy", last)),
        table(costs, ("method", "models held (* trained)", "M parameters", "predicted MB", "peak MB", "passes forward / backward",
                      "MFLOP a token", "step, ms", "step / SimPO", "FLOPs / SimPO")),
        table(budgets, ("method", "steps", "trained k tokens", "sampled k tokens", "k labels", "seconds")),
        *([course_table(lines)] if any("evals" in line for line in lines) else []),
    ]  # fmt: skip


def course_table(lines):
    """-> loss / reward / KL after a tenth, a quarter … of each row's training, means over its runs, as Markdown"""
    rows, star = [], any("kl_star" in x for line in lines for x in line.get("evals", ()))
    for line in lines:
        evals = line.get("evals", [])
        last = max((x["step"] for x in evals), default=0)
        shown = [min(evals, key=lambda x: abs(x["step"] - share * last)) for share in (0.1, 0.25, 0.5, 0.75, 1) if evals]
        cells = [" / ".join(f"{statistics.fmean(x[key]):.2f}" for key in COURSE if key in x) for x in shown]
        if cells:
            rows.append([line["method"], thousands(line.get("labels")), *(x.replace("-", "−") for x in cells)])
    what = f"loss / reward / KL{', KL(π‖π*)' * star} after"
    return table(rows, ("method", "k labels", f"{what} 10 %", "25 %", "50 %", "75 %", "100 %"))


# ------------------------------------------------------------------------------------------------ the prediction


def ask(folder, o, row, dtype, recompute):
    """-> (options, models, bytes at the peak, most bytes) of one step of a row at --predict's size, the last two by category; as text what
    went wrong"""
    n, micro = o.batch_size, o.micro_batch or o.batch_size
    pairs = row not in ("sft", "kto", *SAMPLED)
    if pairs and (n % 2 or micro % 2):
        raise common.UserError(f"--batch-size {n} --micro-batch {micro}: sequences come in pairs; give even numbers")
    if row in SAMPLED[1:]:
        batch = ["--batch-size", "1", "--group", str(n)]
    else:
        batch = ["--batch-size", str(n // 2 if pairs else n)]
    batch += ["--minibatches", "1", "--updates", "1"] * (row in SAMPLED[:4]) + ["--group", "1", "--reward", "rm"] * (row == "ppo")
    script, own, *_ = (ROWS | MORE)[row]
    name = f"{row}-{dtype}{'-checkpointed' * recompute}"
    command = [script, *own.split(), "--predict", o.predict, *batch, "--micro-batch", str(micro // 2 if pairs else micro), "--dtype", dtype,
               "--task", o.task, "--out", str(folder / f"{name}.pt"), *["--seq-len", str(o.seq_len)] * bool(o.seq_len),
               *["--checkpoint-activations"] * recompute]  # fmt: skip
    code, error = child([*command, *model_size(o)], threads=1)
    if code:
        return error
    options, last = final(folder, f"{name}.predicted")
    return options, last["models"], last["predicted"], last["predicted_most"]


def fits(size):
    """Bytes -> the smallest card that holds them"""
    return next((f"{card} GB" for card in CARDS if size / 2**30 + SPARE <= card), "none")


def predict(o, folder):
    """Prints the table of --predict, and writes it to README.md and compare.json. -> the rows that failed"""
    folder.mkdir(parents=True, exist_ok=True)
    settings = [(row, recompute, dtype) for row in o.methods for recompute in (False, True) for dtype in DTYPES]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = dict(zip(settings, pool.map(lambda s: ask(folder, o, s[0], s[2], s[1]), settings)))
    failed = {row: answer for (row, *_), answer in found.items() if isinstance(answer, str)}
    asked = {setting: answer for setting, answer in found.items() if setting[0] not in failed}
    rows, out = [[row, "", f"failed: {why}", *[""] * (len(HATCH) + 2)] for row, why in failed.items()], []
    unit, symbol = (2**30, "GiB") if max((sum(x[2].values()) for x in asked.values()), default=0) >= 2**30 else (1e6, "MB")
    for row, recompute, _ in list(asked)[:: len(DTYPES)]:
        both = [asked[row, recompute, dtype] for dtype in DTYPES]
        totals = [sum(peak.values()) for _, _, peak, _ in both]
        parts = [{**peak, **{name: most.get(name, 0) for name in ("logits", "sampling")}} for _, _, peak, most in both]
        models = [", ".join(f"{m['role']} {m['bytes'] / unit:.1f}" for m in models) for _, models, _, _ in both]
        cells = [[f"{x.get(name, 0) / unit:.1f}" for x in parts] for name in HATCH]
        cells = [[f"{x / unit:.1f}" for x in totals], *cells, models, [fits(x) for x in totals]]
        rows.append([row, "yes" if recompute else "no", *(" / ".join(pair) for pair in cells)])
        for dtype, (_, models, peak, most) in zip(DTYPES, both):
            out.append({"method": row, "dtype": dtype, "checkpoint_activations": recompute, "models": models, "predicted": peak,
                        "predicted_most": most, "predicted_bytes": sum(peak.values()), "card": fits(sum(peak.values()))})  # fmt: skip
    task = next((options["task"] for options, *_ in asked.values()), "")
    text = (f"Memory of a step at its peak, {symbol}, predicted: --predict {o.predict}, {task}, {o.batch_size} sequences a step (a pair "
            f"is two), {o.micro_batch or o.batch_size} a forward pass. In each cell: float32 weights with bfloat16 autocast / bfloat16 "
            "weights and moments. Logits and sampling are the most that they take by themselves, which may be at another time than the "
            f"peak, so the cells of a row need not add up. A card fits what leaves it {SPARE:g} GiB.\n\n")  # fmt: skip
    text += table(rows, ("method", "checkpointed", "peak", *HATCH, "by model", "fits on"))
    print(text)
    write(folder / "compare.json", json.dumps({"predict": o.predict, "task": task, "methods": out, "failed": failed}, indent=1))
    plt = plots()
    if plt:
        shown = [(f"{x['method']}, {DTYPES[x['dtype']]}", x["predicted"]) for x in out if x["checkpoint_activations"]]
        marks = CARDS if symbol == "GiB" else ()
        bars(plt, shown, unit, f"{symbol}, predicted, activations checkpointed", folder / "memory.png", marks)
    write(folder / "README.md", f"# {o.line}\n\n{text}\n" + "\n![memory](memory.png)\n" * bool(plt))
    return list(failed)


def compare(o, folder):
    """Runs what has not been run, prints the tables, and writes README.md, compare.json and the pictures. -> the runs that failed"""
    folder.mkdir(parents=True, exist_ok=True)
    start = time.time()
    errors, items = run_all(o, folder)
    if not common.is_file(o.task):
        first = [item for item in items if item[0] == f"{item[1]}-{o.seed}" and item[1] in o.methods]
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # summary finds them there
            list(pool.map(partial(predicted, folder), first))
    lines = summary(o, folder, errors, items)
    machine = f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    text = "\n\n".join(tables(lines))
    print("\n" + text)
    record = {"command": o.line, "task": o.task, "machine": machine, "seconds": round(time.time() - start), "methods": lines}
    write(folder / "compare.json", json.dumps(record, indent=1))
    pictures = draw(o, lines, folder)
    shown = "".join(f"\n![{path.stem}]({path.name})\n" for path in pictures)
    write(folder / "README.md", f"# {o.line}\n\n{machine}; {record['seconds']} s.\n\n{text}\n{shown}")
    print(f"\n{folder}/README.md, compare.json" + "".join(f", {path.name}" for path in pictures))
    return [name for name, error in errors.items() if error]


UNREAD = {True: {"seeds", "budget", "sweep", "course", "quick", "init", "jobs", "device", "dtype", "seed"},
          False: {"batch_size", "micro_batch", "seq_len"}}  # fmt: skip


@common.command()
def main(argv=None):
    o, known = common.parse(Options, argv), ROWS | MORE
    o.line = " ".join(["python compare.py", *(sys.argv[1:] if argv is None else argv)])
    every = [row for row in known if row not in SAME] if o.predict else [row for row in ROWS if row != "rlaif" or o.task == "reviews"]
    o.methods = list(dict.fromkeys(o.methods or every))
    if unknown := [row for row in o.methods if row not in known]:
        raise common.UserError(f"--methods {unknown[0]}: no such row; there are {', '.join(known)}")
    if unread := sorted(o.given & UNREAD[bool(o.predict)]):
        word = "without" if o.predict else "with"
        raise common.UserError(f"--{unread[0].replace('_', '-')} is read {word} --predict only; leave one of the two out")
    if "rlaif" in o.methods and not o.predict and o.task != "reviews":
        raise common.UserError(f"--methods rlaif learns its skills on reviews only, not on {o.task}; leave it out")
    if o.init and not os.path.isfile(o.init):
        raise common.UserError(f"--init {o.init}: no such file; leave it out to make one")
    if o.quick and "jobs" not in o.given:
        o.jobs = 2
    if o.init:
        o.methods = [row for row in o.methods if row != "sft"]
    if common.is_file(o.task) and not (o.init or o.predict):
        raise common.UserError("--init is needed with a file as the task: the SFT checkpoint that all methods start from")
    name = f"predict-{o.predict}" if o.predict else Path(common.checkpoint_path(o.task, "x")).parent.name
    folder = Path(o.out or f"out/compare/{name}")
    if folder.exists() and not folder.is_dir():
        raise common.UserError(f"--out {o.out} is a file; give a folder")
    try:
        failed = (predict if o.predict else compare)(o, folder)
    except KeyboardInterrupt:
        print("\nthe same command goes on where this one stopped", file=sys.stderr)
        raise
    if failed:
        raise common.Stopped(f"failed: {', '.join(failed)}")


# ------------------------------------------------------------------------------------------------ the pictures

COLOURS = [*(f"C{i}" for i in range(10)), "navy", "crimson", "teal", "gold", "indigo", "black", "olive"]
STYLE = {row: style for row, *style in zip(ROWS | MORE, COLOURS, "*osD^v<p>PXhd8HsD", strict=True)}  # a colour and a marker each
HATCH = {"weights": "", "casts": "xx", "gradients": "//", "optimizer": "..", "activations": "\\\\", "logits": "++", "sampling": "oo"}


def plots():
    """-> matplotlib.pyplot, or None with a line that says so"""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        print("\nno pictures: they need matplotlib (pip install matplotlib)")
        return None
    plt.switch_backend("Agg")
    plt.rcParams.update({"font.size": 12, "axes.grid": True, "grid.alpha": 0.3, "axes.spines.top": False, "axes.spines.right": False})
    return plt


def draw(o, lines, folder):
    """-> the paths of the pictures"""
    plt = plots()
    if not plt:
        return []
    ended = [line for line in lines if line["runs"]]
    found = [scatter(plt, o, ended, folder / "frontier.png", "kl", "KL(π‖π_ref), nats a response"),
             scatter(plt, o, ended, folder / "length.png", "length", "length, tokens a response"),
             bars(plt, [(line["method"], line["peak"]) for line in ended if "peak" in line], 1e6, "MB, measured over one step",
                  folder / "memory.png"),
             courses(plt, ended, folder / "entropy.png"), trends(plt, ended, folder / "course.png")]  # fmt: skip
    return [path for path in found if path]


def scatter(plt, o, lines, path, x, name):
    """Reward against x, a point for each strength of each method, joined in their order, and the main one's spread over seeds."""
    figure, axes = plt.subplots(figsize=(7, 5))
    if x == "kl" and (bound := next((line["frontier"] for line in lines if "frontier" in line), None)):
        axes.plot(*zip(*bound), color="black", linewidth=1)
        axes.text(0.6, 0.6, "black line: π* of every β;\nno policy lies above it", transform=axes.transAxes, fontsize=10)
    some, places = False, []
    for row in dict.fromkeys(line["method"] for line in lines):
        mine = [line for line in lines if line["method"] == row and x in line and "reward" in line]
        mine.sort(key=lambda line: line["value"] or 0)
        if not mine:
            continue
        some, (colour, marker) = True, STYLE[row]
        axes.plot([line[x] for line in mine], [line["reward"] for line in mine], color=colour, linewidth=0.8, marker=marker, markersize=5)
        main = next((line for line in mine if not line["swept"]), mine[0])
        axes.errorbar(main[x], main["reward"], xerr=main[f"{x}_sd"], yerr=main["reward_sd"], color=colour, marker=marker, markersize=11,
                      markeredgecolor="black", linestyle="", label=row)  # fmt: skip
        places.append((row, main[x], main["reward"]))
    if not some:
        plt.close(figure)
        return None
    axes.set(xlabel=name, ylabel="reward", title=f"{o.task}: large points are the defaults, small ones other strengths")
    axes.title.set_size(11)
    if x == "kl":
        axes.set_xlim(left=-0.02 * axes.get_xlim()[1])
    label(figure, axes, places)
    axes.legend(fontsize=9, ncols=2)
    return saved(plt, figure, path)


def label(figure, axes, places):
    """Writes each name beside its point, where no earlier name stands."""
    boxes = []
    for name, x, y in places:
        for dx, dy in ((8, 6), (8, -15), (-8 - 7 * len(name), 6), (-8 - 7 * len(name), -15), (8, 20), (8, -29), (-8 - 7 * len(name), 20)):
            text = axes.annotate(name, (x, y), (dx, dy), textcoords="offset points", fontsize=10)
            box = text.get_window_extent(figure.canvas.get_renderer())
            if not any(box.overlaps(other) for other in boxes):
                break
            text.remove()
        boxes.append(box)


def bars(plt, rows, unit, name, path, marks=()):
    """rows: (label, bytes by category): a stacked bar each. marks: sizes to draw a line at."""
    if not rows:
        return None
    figure, axes = plt.subplots(figsize=(7, 0.8 + 0.36 * len(rows)))
    left = [0.0] * len(rows)
    for i, (category, hatch) in enumerate(HATCH.items()):
        sizes = [parts.get(category, 0) / unit for _, parts in rows]
        if any(sizes):
            axes.barh([label for label, _ in rows], sizes, left=left, color=f"C{i}", hatch=hatch, edgecolor="white", label=category)
            left = [a + b for a, b in zip(left, sizes)]
    for i, size in enumerate(left):
        axes.text(size, i, f" {size:.1f}", va="center", fontsize=9)
    for mark in marks:
        axes.axvline(mark, color="black", linewidth=0.8, linestyle="--")
        axes.text(mark, -0.7, mark, ha="center", va="bottom", fontsize=9, backgroundcolor="white")
    axes.set(xlabel=name + f"; dashed: cards of {', '.join(map(str, marks))} GB" * bool(marks), xlim=(0, 1.1 * max(left)))
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.legend(fontsize=9, ncols=4, loc="lower center", bbox_to_anchor=(0.45, 1.0))
    return saved(plt, figure, path)


def courses(plt, lines, path):
    """Reward against entropy over the steps of GRPO and DAPO."""
    mine = [line for line in lines if line.get("course")]
    if not mine:
        return None
    figure, panels = plt.subplots(1, len(mine), figsize=(1 + 4 * len(mine), 4), squeeze=False, sharex=True)
    for line, axes in zip(mine, panels[0]):
        colour, marker = STYLE[line["method"]]
        xs, ys = [step["entropy"] for step in line["course"]], [step.get("accuracy", step["reward"]) for step in line["course"]]
        axes.plot(xs, ys, color=colour, marker=marker)
        axes.annotate("start", (xs[0], ys[0]), (5, 5), textcoords="offset points", fontsize=10)
        axes.annotate("end", (xs[-1], ys[-1]), (5, 5), textcoords="offset points", fontsize=10)
        what = "share of correct responses" if "accuracy" in line["course"][0] else "mean reward"
        axes.set(title=line["method"], xlabel="entropy, nats a token", ylabel=f"{what} of a rollout")
    figure.tight_layout()
    return saved(plt, figure, path)


def trends(plt, lines, path):
    """Loss, reward and KL over the sequences trained on: means over seeds, and the spread between the least and the greatest."""
    mine = [line for line in lines if line.get("evals")]
    keys = [key for key in COURSE if any(key in x for line in mine for x in line["evals"])]
    if not mine:
        return None
    names = {"loss": "loss on what is trained on", "reward": "reward", "kl": "KL(π‖π_ref), nats", "kl_star": "KL(π‖π*), nats"}
    figure, panels = plt.subplots(1, len(keys), figsize=(4.2 * len(keys), 4), squeeze=False)
    for key, axes in zip(keys, panels[0]):
        for line in mine:
            colour, marker = STYLE[line["method"]]
            evals = [x for x in line["evals"] if key in x]
            xs = [x["sequences"] / 1000 for x in evals]
            axes.plot(xs, [statistics.fmean(x[key]) for x in evals], color=colour, marker=marker, markersize=5, label=line["method"])
            axes.fill_between(xs, [min(x[key]) for x in evals], [max(x[key]) for x in evals], color=colour, alpha=0.15, linewidth=0)
        axes.set(xlabel="thousand sequences trained on", title=names[key])
    panels[0][0].legend(fontsize=9)
    figure.tight_layout()
    return saved(plt, figure, path)


def saved(plt, figure, path):
    figure.savefig(path, dpi=160, bbox_inches="tight")
    plt.close(figure)
    return path


if __name__ == "__main__":
    main()

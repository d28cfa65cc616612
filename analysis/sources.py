"""The commands behind the figures of the pages, and what is kept of each. See analysis/publish.py.

A Source is one or more commands. A comparison is one command of compare.py, of which its rows and
answers are kept. A series is one script with several seeds, of which the closing figures and the
evaluations are kept. Of a command that prints a finished text, the text is kept.
"""

import json
import os
import re
import shutil
import statistics
from functools import partial
from pathlib import Path
from typing import NamedTuple

from analysis import digest, tables
from analysis.break_it import BUGS
from analysis.questions import QUESTIONS


class Source(NamedTuple):
    commands: tuple  # without "python", made one after the other
    group: str  # sources of one group share checkpoints, and are made one after the other
    take: object  # (what each command prints, the folder in which they ran) -> what is kept
    begins: tuple = ()  # where the code that counts begins, if not in the commands: see digest.py
    threads: int = 1
    alone: bool = False  # it is timed, so nothing runs beside it
    needs: str = ""  # a package that requirements-dev.txt does not install, and its file
    prepare: object = None  # a function: the folder -> what it lacks, as text, or ""

    @property
    def digest(self):
        return digest.digest(self.begins or tuple(map(digest.begins, self.commands)))


# ---- what is kept


def text(said, folder):
    """-> what the last command prints"""
    return said[-1]


def rows(name, more, said, folder):
    """-> the rows of the compare.json in out/compare/<name>, its answers, the seconds of its runs,
    and what `more` takes from the same folder"""
    folder = folder / "out/compare" / name
    found = json.loads((folder / "compare.json").read_text("utf-8"))
    ends = [json.loads(path.read_text().splitlines()[-1]) for path in folder.glob("*.jsonl")]
    kept = {"methods": list(map(smaller, found["methods"])), "answers": found.get("answers", [])}
    seconds = sum(end["final"]["wall_s"] for end in ends if "final" in end)
    return kept | {"seconds": round(seconds)} | (more(folder) if more else {})


COURSE = 20  # evaluations that are kept of a run
UNREAD = "models phases peak peak_most course predicted predicted_most".split()


def smaller(row):
    """A row of compare.json, without what no page shows, at seven digits -> the row"""
    row = {key: x for key, x in row.items() if key not in UNREAD}
    row["command"] = re.sub(r" (--device|--dtype|--init|--out|--seed) \S+", "", row["command"])
    return rounded(row)


def rounded(x):
    if isinstance(x, dict):
        return {key: rounded(value) for key, value in x.items()}
    if isinstance(x, list):
        return [rounded(value) for value in x]
    return float(f"{x:.7g}") if isinstance(x, float) else x


def report(folder):
    """Copies the page that the comparison has written. -> the closing figures of the reward model
    and of each phase of rlaif, and the last step that the runs of three methods have logged"""
    shutil.copy(folder / "report.html", digest.ROOT / "docs/report.html")
    judge = numbers(tables.parsed(folder / "reward_model-0.jsonl")[-1]["final"])
    return {
        "reward_model": judge,
        "last": {name: last_steps(folder, name) for name in ("dpo", "ppo", "dapo")},
        "rlaif": [phases(path) for path in sorted(folder.glob("rlaif-[0-9].jsonl"))],
    }


def last_steps(folder, method):
    """-> the figures of the last logged step of each seed"""
    paths = sorted(folder.glob(f"{method}-[0-9].jsonl"))
    logged = [[x for x in tables.parsed(path) if "loss" in x] for path in paths]
    return [numbers(steps[-1]) for steps in logged]


def phases(path):
    """-> the closing figures of each phase of a run of rlaif.py"""
    found = {}
    for name in ("skills", "sl", "pm", ""):
        other = path.with_stem(f"{path.stem}-{name}" if name else path.stem)
        found[name or "rl"] = numbers(tables.parsed(other)[-1]["final"])
    return found


def numbers(final):
    """-> the figures of a line of a record; of its models, the bytes of the first"""
    found = {key: x for key, x in final.items() if isinstance(x, (int, float))}
    held = {"policy_bytes": final["models"][0]["bytes"]} if final.get("models") else {}
    return rounded(found | held)


def records(names, said, folder):
    """-> for each name of a run its closing figures, those of its first and last logged step, their
    means over all logged steps, and some evaluations"""
    kept = []
    for name in names:
        [path] = folder.glob(f"out/*/{name}.jsonl")
        _, *steps, final = tables.parsed(path)
        evals = [{"step": x["step"]} | numbers(x["eval"]) for x in steps if "eval" in x]
        logged = [numbers(x) for x in steps if "loss" in x]
        means = {
            key: statistics.fmean(x[key] for x in logged if key in x)  # some steps may lack it
            for key in logged[0]
        }
        figures = {"final": numbers(final["final"]), "mean": rounded(means)}
        figures |= {"first": logged[0], "last": logged[-1]}
        kept.append(figures | {"evals": evals[:: len(evals) // COURSE + 1]})
    return kept


DISTANCES = "KL(π‖own optimum)", "TV(π, own optimum)", "loss above its least value"


def optima(names, said, folder):
    """-> the same, with the distances that analysis.optima prints of each"""
    kept = records(names, said, folder)
    for run, line in zip(kept, said[-1].strip().splitlines()):
        found = {name: re.search(rf"{re.escape(name)} (\S+?)(?:,|$)", line) for name in DISTANCES}
        run["optimum"] = {name: float(x[1]) for name, x in found.items() if x}
    return kept


def predicted(name, said, folder):
    """-> the rows of a prediction in the folder of that name, with activations checkpointed"""
    keys = "method dtype predicted_bytes card predicted checkpoint_activations setting".split()
    found = json.loads((folder / name / "compare.json").read_text("utf-8"))["methods"]
    shown = [x for x in found if x.get("checkpoint_activations", True)]
    return [{key: x[key] for key in keys if key in x} for x in shown]


def megabytes(said, folder):
    """-> what each command of analysis.resident prints"""
    return [int(re.search(r"(\d+) MB$", text.strip())[1]) for text in said]


def real_model(folder):
    """Links a checkpoint and the files of data into the folder, and writes the reward function of
    docs/real-models.md into it. -> what is not there, as text, or "" """
    model, files = (os.environ.get(f"NANOPO_{name}", "") for name in ("MODEL", "DATA"))
    if not model or not files:
        return "NANOPO_MODEL must name a folder of SmolLM2-135M-Instruct, NANOPO_DATA that of gsm8k"
    page = (digest.ROOT / "docs/real-models.md").read_text("utf-8")
    [reward] = re.findall(r"```python\n(import re\n[^`]*my_rewards\.py[^`]*)```", page)
    (folder / "my_rewards.py").write_text(reward)
    for path in [Path(model), *Path(files).glob("gsm8k_*.jsonl.gz")]:
        link = folder / ("SmolLM2" if path.is_dir() else path.name)
        if not link.exists():
            link.symlink_to(path.resolve())
    return ""


# ---- how they are made


def comparison(name, options, group, more=None, threads=1):
    command = f"compare.py {options} --out out/compare/{name}"
    return Source((command,), group, partial(rows, name, more), threads=threads)


def series(command, group, seeds=1, take=records):
    """A script's command, with as many seeds; with `optima`, the distances of its policies too"""
    script, *options = re.sub(r"[^\w.]+", " ", command.replace(".py", "", 1)).split()
    names = ["-".join([*options, str(seed)]) for seed in range(seeds)]
    commands = [f"{command} --seed {seed} --name {name}" for seed, name in enumerate(names)]
    runs = [f"{script}-{name}" for name in names]
    if take is optima:
        task = re.search(r"--task (\S+)", command)[1].replace(":", "-")
        paths = " ".join(f"out/{task}/{run}.pt" for run in runs)
        commands.append(f"-m analysis.optima {paths}")
    return Source(tuple(commands), group, partial(take, runs))


def prediction(name, options):
    command = f"compare.py --predict 7b {options} --out {name}"
    return Source((command,), "memory", partial(predicted, name))


def printed(group, *commands, **more):
    return Source(commands, group, text, **more)


PROCESSES = (1, ""), (2, ""), (4, ""), (2, "--shard"), (4, "--shard")  # under torchrun


def torchrun(command):
    """-> the command for each of PROCESSES"""
    run = "-m torch.distributed.run --standalone --nproc-per-node"
    return [f"{run} {count} {command} {more}".rstrip() for count, more in PROCESSES]


def on_processes(method, options):
    """A script that trains a model of 41.5 M weights, made first, under torchrun"""
    big = "sft.py --n-layer 13 --n-embd 512 --n-head 8 --steps 1 --eval-prompts 2 --out big.pt"
    names = [f"{count}{more[1:]}" for count, more in PROCESSES]  # such as 2-shard
    runs = torchrun(f"{method}.py --init big.pt {options} --eval-prompts 2")
    commands = big, *(f"{run} --name {name}" for run, name in zip(runs, names))
    take = partial(records, [f"{method}-{name}" for name in names])
    return Source(commands, "scaling", take, ((f"{method}.py", ""),))


def on_a_real_model(name, command):
    script = command.partition(".py")[0]
    take = partial(records, [f"{script}-{name}"])
    return Source((f"{command} --name {name}",), "lesson", take, prepare=real_model)


def resident(command):
    """A command of a real model under torchrun, of which the memory of a process is kept"""
    commands = tuple(f"-m analysis.resident {run}" for run in torchrun(command))
    code = ("analysis/resident.py", ""), (command.partition(" ")[0], "")
    return Source(commands, "resident", megabytes, code, prepare=real_model)


# ---- all of them

LABELLED = "sft reward_model dpo dpo-precomputed simpo orpo kto online_dpo ppo grpo dapo"
FIXED = "--methods dpo-few dpo iterative_dpo online_dpo --seeds 3 --course"
SIZED = f"--task tokens:32+96 --budget 48 --methods {LABELLED}"
BENCH = "-m analysis.bench --peers"
PEERS = "trl: requirements-peers.txt"
SMALL = "--n-layer 2 --n-head 2 --n-embd 64"
SOURCES = {
    "reviews": comparison("reviews", "--seeds 5 --sweep 3", "reviews", report),
    "threads": comparison("threads", "--methods dpo kto ppo grpo --seeds 2", "threads", threads=2),
    "learning": comparison("learning", "--methods dpo kto ppo grpo --course", "learning"),
    "fixed/reviews": comparison("fixed", FIXED, "fixed"),
    "fixed/exact": comparison("fixed-exact", f"{FIXED} --task exact", "enumerated"),
    "frontier/exact": comparison("exact", "--task exact --sweep 1", "enumerated"),
    "memory/steps": comparison("steps", SIZED, "memory"),
    "memory/small": comparison("small", f"{SIZED} {SMALL}", "memory"),
    "exact/world": printed("exact", "sft.py --task exact", "evaluate.py out/exact/sft.pt"),
    "memory/7b": prediction("7b", ""),
    "memory/adapters": prediction("adapters", "--methods dpo simpo ppo --lora 16"),
    "memory/adamw8bit": prediction("adamw8bit", "--methods dpo simpo ppo --optimizer adamw8bit"),
    "memory/card": prediction("card", "--methods dpo simpo --card 24"),
    "scaling/8": prediction("ranks", "--methods sft dpo grpo ppo --ranks 8"),
    "scaling/8-shard": prediction("shard", "--methods sft dpo grpo ppo --ranks 8 --shard"),
    "scaling/dpo": on_processes("dpo", "--steps 3 --batch-size 4"),
    "scaling/ppo": on_processes(
        "ppo", "--reward task --steps 2 --batch-size 8 --minibatches 2 --max-new-tokens 32"
    ),
    "scaling/resident": resident(
        "dpo.py --task gsm8k_preferences.jsonl.gz --init SmolLM2 --truncate --block-size 256 "
        "--lr 1e-6 --steps 2 --batch-size 4 --micro-batch 1 --eval-prompts 2 --max-new-tokens 2 "
        "--checkpoint-activations"
    ),
    "parity": printed("parity", "-m analysis.parity", needs=PEERS),
    "speed/steps": printed("speed", f"{BENCH} --repeats 1", needs=PEERS, alone=True),
}

# exact: one loss, or one estimator, in each row
EXACT = {
    "dpo": "dpo.py",
    "cdpo": "dpo.py --label-smoothing 0.1",
    "ipo": "dpo.py --loss ipo",
    "norm": "dpo.py --loss norm",
    "apo": "dpo.py --loss apo",
    "length": "dpo.py --length-penalty 0.3",
    "online": "online_dpo.py",
    "argmax": "online_dpo.py --label argmax",
    "online-ipo": "online_dpo.py --loss ipo",
    "simpo": "simpo.py",
    "orpo": "orpo.py",
    "kto": "kto.py",
    "ppo": "ppo.py --reward task --gamma 1 --lam 1",
    "reward": "grpo.py --adv-norm loo --agg sum --kl reward",
    "k3": "grpo.py --adv-norm loo --agg const --kl k3",
    "k3-ratio": "grpo.py --adv-norm loo --agg const --kl k3-ratio",
    "batch": "grpo.py --adv-norm batch --agg sum --kl reward",
    "cispo": "grpo.py --adv-norm loo --agg sum --kl reward --clip weight --minibatches 4",
    "std-reward": "grpo.py --adv-norm std --agg const --kl reward",
    "std-k3": "grpo.py --adv-norm std --agg const --kl k3",
    "std-k3-ratio": "grpo.py --adv-norm std --agg const --kl k3-ratio",
}
ONE_TOKEN = "reward k3 k3-ratio std-reward std-k3 std-k3-ratio".split()
PAIRED = "dpo cdpo ipo norm apo length online argmax online-ipo simpo orpo kto".split()
TAUGHT = "--init out/exact/sft.pt --teacher out/exact/dpo-task-exact-0.pt"
SOURCES |= {
    f"exact/{name}": series(
        command.replace(".py", ".py --task exact"),
        "exact" if name in PAIRED else "exact-rewards",
        take=optima,
    )
    for name, command in EXACT.items()
}
SOURCES |= {
    f"exact-1/{name}": series(
        EXACT[name].replace(".py", ".py --task exact:1"), "exact-rewards", take=optima
    )
    for name in ONE_TOKEN
}
SOURCES |= {
    f"distill/{loss}": series(f"distill.py --task exact --loss {loss} {TAUGHT}", "exact")
    for loss in ("reverse", "forward", "jsd", "sampled")
}
SOURCES["exact/few-pairs"] = series("dpo.py --task exact --pairs 300 --epochs 200", "exact-rewards")

VERIFIED = {
    "grpo": "grpo.py",
    "minibatches": "grpo.py --minibatches 4 --steps 137",
    "updates": "grpo.py --updates 2 --minibatches 4 --steps 100",
    "ppo": "ppo.py",
    "dapo": "dapo.py",
}
SOURCES |= {
    f"verifier/{name}": series(command.replace(".py", ".py --task arithmetic:2"), "verifier", 3)
    for name, command in VERIFIED.items()
}
SOURCES |= {
    f"exploit/{beta}": series(f"ppo.py --beta {beta} --steps 60 --eval-every 10", "exploit", 3)
    for beta in ("0", "0.01")
}
BITS = "requirements-gpu.txt"
SOURCES |= {
    f"optimizer/{name}": series(f"dpo.py --optimizer {name}", "optimizer")._replace(needs=needs)
    for name, needs in (("adamw", ""), ("adamw8bit", f"bitsandbytes: {BITS}"))
}
HELD_OUT = "--truncate --eval-prompts 24 --max-new-tokens 96"
PREFERRED = f"--task gsm8k_preferences.jsonl.gz --init SmolLM2 {HELD_OUT} --warmup 4 --pairs 32"
LESSON = {  # on a real model
    "sft": f"sft.py --task gsm8k_sft.jsonl.gz --init SmolLM2 {HELD_OUT} --warmup 4 --steps 30 "
    "--batch-size 8 --micro-batch 4 --block-size 384 --lr 2e-5",
    "dpo": f"dpo.py {PREFERRED} --epochs 4 --batch-size 4 --micro-batch 2 --block-size 320 "
    "--lr 5e-6",
    "lora": f"dpo.py {PREFERRED} --epochs 4 --batch-size 4 --micro-batch 2 --block-size 320 "
    "--lr 2e-4 --lora 8",
    "kto": f"kto.py --task gsm8k_feedback.jsonl.gz --init SmolLM2 {HELD_OUT} --warmup 4 "
    "--pairs 64 --epochs 3 --batch-size 8 --micro-batch 4 --block-size 320 --lr 5e-6",
    "grpo": f"grpo.py --task gsm8k_sft.jsonl.gz --init SmolLM2 {HELD_OUT} --warmup 2 --steps 10 "
    "--batch-size 2 --group 8 --micro-batch 8 --block-size 384 --lr 3e-6 --log-every 1 "
    "--reward my_rewards.py:steps",
}
SOURCES |= {f"lesson/{name}": on_a_real_model(name, command) for name, command in LESSON.items()}
EXPERIMENT = "analysis/experiment.py", ""
SOURCES |= {
    f"questions/{name}": printed(
        "questions",
        f"-m analysis.questions {name}",
        begins=((f"{answer.__module__.replace('.', '/')}.py", answer.__name__), EXPERIMENT),
    )
    for name, answer in QUESTIONS.items()
}
SOURCES |= {
    f"break-it/{name}": printed("break-it", f"-m analysis.break_it {name}") for name in BUGS
}

"""The parts that analysis.card measures. A part is a generator of (row, column, a function that
gives cells of the row). All rows of the part share what it sets up before the first one, and each
row can fail alone. o: the Options of the card. The process of a part runs in a folder for the files
of its runs.
"""

import contextlib
import gc
import importlib
import io
import operator
import time
import warnings
from collections import Counter
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile, supported_activities

import data
import sft
from analysis import bench, predict
from analysis.against_trl import peers
from analysis.rows import METHODS
from analysis.tables import read
from gpt import GPT, GPTConfig, load
from training import Compute, Run, locks, parse
from training.figures import clock_of
from training.optimizer import adamw

ONLY_CUDA = "CUDA only"
PEAKS = {  # part of a card's name -> its dense TFLOP/s in bfloat16, from NVIDIA's data sheets
    **{"A100": 312, "L40S": 362, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200": 989},
    **{"B200": 2250},
}
SETTINGS = {"compiled": " --dtype float32 --compile"}  # -> what a script's run is given
SETTINGS = {x: f" --dtype {x}" for x in ("float32", "bfloat16", "float16")} | SETTINGS
SHORT = "--steps 4 --batch-size 8 --log-every 1 --warmup 1 --eval-prompts 8 "
START = "--init start.pt --max-new-tokens 20"
CASES = dict.fromkeys(METHODS, START) | {  # what a script is given besides
    "sft": "--max-new-tokens 20 --n-layer 2 --n-head 2 --n-embd 64",
    "reward_model": "--init start.pt",
    "ppo": START + " --group 1 --minibatches 2 --reward judge.pt",
    "grpo": START + " --batch-size 2 --group 4 --minibatches 2 --reward judge.pt",
    "online_dpo": START + " --reward judge.pt",
    "distill": START + " --batch-size 2 --group 4 --minibatches 2 --teacher skilled-skills.pt",
    "dapo": START + " --batch-size 2 --group 4 --task tokens:8+12 --max-rounds 40",
    "rlaif": "--init skilled-skills.pt --sl-steps 3 --pm-steps 3 --answers 24 --comparisons 24"
    " --max-new-tokens 20",
}
SKILLS = "--skill-steps 30 --skill-lr 0.03 --n-layer 1 --n-head 2 --n-embd 16"
GPT2 = "--dtype bfloat16 --warmup 1 --eval-prompts 2 "


def ran(name, arguments, path, device):
    """Runs a script in this process, without output. -> its record: the first line, the lines of
    its steps, its closing figures"""
    gc.collect()  # what an earlier run held is not in the peak of this one
    argv = [*arguments.split(), "--device", str(device), "--out", path]
    with contextlib.redirect_stdout(io.StringIO()), locks.given_back():
        importlib.import_module(name).main(argv)
    return read(Path(path).parent, Path(path).stem)


def milliseconds(o, f):
    """-> the time that f takes, a mean of five"""
    now = clock_of(o.place)
    f()
    began = now()
    for _ in range(5):
        f()
    return 200 * (now() - began)


# ---- the parts: each yields (row, column, a function that gives the row's cells)


def scripts(o):
    make_starts()
    for setting, how in SETTINGS.items():
        for name, arguments in CASES.items():
            yield name, setting, partial(beside_cpu, o, name, SHORT + arguments + how, setting)


def make_starts():
    """Writes the checkpoints that the runs start from: a small model that ends some responses
    early, a reward model, and a model with RLAIF's skills."""
    if not Path("skilled.pt").exists():
        ran("sft", f"{SHORT} {CASES['sft']} --steps 100", "start.pt", "cpu")
        ran("reward_model", SHORT + CASES["reward_model"], "judge.pt", "cpu")
        skills = CASES["rlaif"].replace("--init skilled-skills.pt", SKILLS)
        ran("rlaif", SHORT + skills, "skilled.pt", "cpu")


def beside_cpu(o, name, arguments, setting):
    """-> a cell: exit code, largest difference of a step's loss to the CPU's, relative to the
    largest loss of the run, ms per step"""
    _, expected, _ = ran(name, arguments.replace("--compile", ""), f"{name}-cpu.pt", "cpu")
    _, steps, final = ran(name, arguments, f"{name}.pt", o.place)
    a, b = ([x["loss"] for x in run if "loss" in x] for run in (steps, expected))
    apart = max(map(abs, map(operator.sub, a, b))) / max(map(abs, b))
    return {setting: f"0; {apart:.2g}; {final['step_ms']:.0f}"}


def waits(o):
    make_starts()
    for name, arguments in CASES.items():
        how = partial(waits_of, o, name, f"{SHORT}{arguments} --dtype float32")
        yield name, "waits", how if o.cuda else partial(dict, waits=ONLY_CUDA)


def waits_of(o, name, arguments):
    with in_step(2, debugged) as found:
        ran(name, arguments, f"{name}.pt", o.place)
    said = [x for x in found[-1] if "called a synchronizing" in str(x.message)]
    places = Counter(f"{Path(x.filename).name}:{x.lineno}" for x in said)
    return {"waits": len(said), "where": dict(places.most_common(4))}


@contextlib.contextmanager
def in_step(number, watching):
    """Enters a context manager in a step of each loop that runs inside, until the next step begins.
    -> a list of what it has given"""
    found, plain = [], Run.steps

    def steps(self, *args, **more):
        with contextlib.ExitStack() as stack:
            for step in plain(self, *args, **more):
                stack.close()
                if step + 1 == number:
                    found.append(stack.enter_context(watching()))
                yield step

    with patch.object(Run, "steps", steps):
        yield found


@contextlib.contextmanager
def debugged():
    """-> a list of warnings, including torch's warnings that the host waits"""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        yield said
        torch.cuda.set_sync_debug_mode("default")


def sampling(o):
    toy = (500, 64, 1, 2, 32) if o.small else (data.tokenizer().size, 256, 4, 4, 128)
    for size, config in {"toy": toy, "124M": o.config}.items():
        for rows in (1, 8, 64):
            draw = partial(drawn, o, GPTConfig(*config), rows)
            graph = partial(draw, "graph", True) if o.cuda else partial(dict, graph=ONLY_CUDA)
            row = f"{size}, a batch of {rows}"
            yield row, "step by step", partial(draw, "step by step", False)
            yield row, "graph", graph


def drawn(o, config, rows, column, static):
    """-> tokens per second of responses to prompts of 32 tokens, in bfloat16"""
    compute = Compute(parse(sft.Options, ["--device", str(o.place), "--dtype", "bfloat16"]))
    model = compute.to_sample(compute.place(GPT(config), frozen=True))
    job = {"prompts": rows, "group": 1, "prompt": 32, "ends": False}
    draw = bench.generator(config, job | {"response": 8 if o.small else 96}, model, static)
    with compute.autocast():
        return {column: bench.tokens_per_second(draw, 1 if o.small else 3, time.perf_counter)}


def gpt2(o):
    start, n = make_big(o), 512 if o.small else 8192
    for dtype in (torch.float32, torch.bfloat16):
        rate = bench.rate(n, dtype, o.place, clock_of(o.place)) / 1e12
        yield f"a product in {str(dtype)[6:]}", "TFLOP/s", partial(dict, {"TFLOP/s": rate})
    peak = next((x for name, x in PEAKS.items() if name in o.about), rate)
    yield "the peak of MFU", "TFLOP/s", partial(dict, {"TFLOP/s": peak})

    bench.write_ragged(Path())
    file, prompt, (least, most) = bench.RAGGED
    shape, mean = (o.prompt, o.response), (prompt, (least + most) // 2)
    for row, sizes, task in (
        *(("sft", shape, ""), ("dpo", shape, ""), ("dpo, one shape", mean, "")),
        (f"dpo, {prompt} + {least}…{most}, new shapes", mean, file),
    ):
        job = job_of(o, row[:3], *sizes, task)
        for way, step in WAYS.items():
            if sizes == shape or way in ("", ", cuDNN attends"):
                yield row + way, "ms", partial(speed, o, peak, step, job, start)
    yield "AdamW alone", "ms", partial(adamw_alone, o, start)


def make_big(o):
    """-> the path of an untrained model of the part's size"""
    if not Path("big.pt").exists():
        V, context, L, H, C = o.config
        words = bench.write_vocabulary(Path(), V)
        size = f"--tokenizer {words} --block-size {context} --n-layer {L} --n-head {H} --n-embd {C}"
        ran("sft", f"{GPT2} --task tokens:8+8 --steps 1 --batch-size 2 {size}", "big.pt", o.place)
    return "big.pt"


def job_of(o, name, prompt, response, task=""):
    """-> a measurement as those of the bench, with 2 · o.pairs sequences per step"""
    job = {"name": name, "prompt": prompt, "response": response, "config": o.config, "steps": 8}
    return job | {"sequences": 2 * o.pairs, "task": task or f"tokens:{prompt}+{response}"}


def speed(o, peak, step, job, start):
    """-> cells of step(o, job, start), which gives the ms of a step, or says why it cannot. MFU:
    the FLOPs of each pass over each token of padded rows, 2N + 4LTC, by the time and the peak,
    which is in TFLOP/s: a data sheet's, or of a card that is not in PEAKS the large product's."""
    ms = step(o, job, start)
    if isinstance(ms, str):
        return {"ms": ms}
    tokens = job["sequences"] * (job["prompt"] + job["response"])
    return {"ms": ms, "tokens/s": 1000 * tokens / ms, "MFU": bench.floor(job, 1e12 * peak) / ms}


def our_step(o, job, start):
    return ran(job["name"], command(o, job, start), "speed.pt", o.place)[2]["step_ms"]


def command(o, job, start):
    size = o.pairs if job["name"] == "dpo" else 2 * o.pairs
    how = f"{GPT2} --init {start} --steps {job['steps']} --log-every 10 --max-new-tokens 8"
    return f"{how} --task {job['task']} --batch-size {size}"


def cudnn_step(o, job, start):
    """The same with cuDNN's attention, which gpu.py turns off, and off again in the next run"""
    torch.backends.cuda.enable_cudnn_sdp(True)
    with patch("torch.backends.cuda.enable_cudnn_sdp"):
        return our_step(o, job, start) if o.cuda else ONLY_CUDA


def trl_step(o, job, start):
    if not all(map(find_spec, ("trl", "transformers", "datasets"))):
        return "not installed"
    with contextlib.redirect_stdout(io.StringIO()):
        return peers.step(job, clock_of(o.place), use_cpu=not o.cuda, bf16=True)["ms"]


def plain_step(o, job, start):
    """A loop without packing: every token goes through every layer, and the head computes logits
    for all of them."""
    model, ref = (load(start)[0].to(o.place) for _ in range(2))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-5, fused=True)
    P, dpo = job["prompt"], job["name"] == "dpo"
    ids = torch.randint(250, (job["sequences"], P + job["response"]), device=o.place)

    def logprobs(model):
        logits = model(ids)[:, P - 1 : -1].float().mT
        return -F.cross_entropy(logits, ids[:, P:], reduction="none").sum(1)

    def step():
        with torch.autocast(o.place.type, torch.bfloat16):
            logp = logprobs(model)
            with torch.no_grad():
                ref_logp = logprobs(ref) if dpo else None
        loss = -F.logsigmoid(0.1 * torch.sub(*(logp - ref_logp).chunk(2))) if dpo else -logp
        loss.mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return milliseconds(o, step)


WAYS = {"": our_step, ", plain loop": plain_step, ", TRL": trl_step, ", cuDNN attends": cudnn_step}


def adamw_alone(o, start):
    """-> how long AdamW's step takes with a gradient for every weight"""
    model = load(start)[0].to(o.place)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    return {"ms": milliseconds(o, adamw([model], parse(sft.Options, []), o.place).step)}


def memory(o):
    n, together = o.pairs, "--updates 1 --minibatches 1 --reward task"
    how = f"{GPT2} --init {make_big(o)} --task tokens:{o.prompt}+{o.response} --steps 3"
    rows = {
        "dpo": f"--batch-size {n}",
        "dpo --lora 8": f"--batch-size {n} --lora 8",
        "ppo": f"--batch-size {2 * n} --group 1 {together}",
        "grpo": f"--batch-size 2 --group {n} {together}",
    }
    for row, more in rows.items():
        yield row, "measured", partial(peak_of, o, row.split()[0], f"{how} {more}")


def peak_of(o, name, arguments):
    first, _, final = ran(name, arguments, "memory.pt", o.place)
    a, b = final["peak_bytes"] / 1e6, predict.of_run(name, first)["predicted_bytes"] / 1e6
    return {"measured": a, "predicted": b, "measured / predicted": a / b}


def kernels(o):
    there = ProfilerActivity.CUDA in supported_activities()
    kind, spent = ("CUDA", "device") if there else ("CPU", "cpu")
    watching = partial(profile, activities=[getattr(ProfilerActivity, kind)])
    with in_step(3, watching) as found:
        job = job_of(o, "dpo", o.prompt, o.response)
        ran("dpo", command(o, job, make_big(o)), "kernels.pt", o.place)
    events = found[-1].key_averages()  # of make_big there are none: it has one step
    ms = {f"`{x.key[:90]}`": getattr(x, f"self_{spent}_time_total") / 1000 for x in events}
    longest = sorted(ms, key=ms.get, reverse=True)
    column = "ms" if there else "ms of the CPU's operators; kernels: CUDA only"
    for name in longest[:12]:
        yield name, column, partial(dict, {column: ms[name], "share": ms[name] / sum(ms.values())})
    attend = [x for x in longest if any(word in x.lower() for word in ("flash", "fmha", "sdpa"))]
    yield "attention", column, partial(dict, {column: [*attend, "by math"][0]})

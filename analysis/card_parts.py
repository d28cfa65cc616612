"""What analysis.card measures. A part is a function that yields (row, column, a function that gives
cells of the row): what is set up before the first row is all parts' own, and each row can fail
alone. o: the Options of the card. A part's process runs in a folder for what its runs write.
"""

import contextlib
import gc
import importlib
import io
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
from gpt import GPT, GPTConfig, load, save
from training import Compute, Run, locks, parse
from training.figures import clock_of
from training.optimizer import adamw

ONLY_CUDA = "CUDA only"
PEAKS = {  # part of a card's name -> its dense bfloat16 FLOP/s, from NVIDIA's data sheets
    **{"A100": 312e12, "L40S": 362e12, "H100 PCIe": 756e12, "H100 NVL": 835e12},
    **{"H100": 989e12, "H200": 989e12, "B200": 2250e12},
}
SETTINGS = {  # column of the scripts' table -> what a run is given
    "float32": "--dtype float32",
    "bfloat16": "--dtype bfloat16",
    "float16": "--dtype float16",
    "compiled": "--dtype float32 --compile",
}
SHORT = "--steps 4 --log-every 1 --warmup 1 --eval-prompts 8 --max-new-tokens 12"
EIGHT = f"{SHORT} --batch-size 8 --init start.pt"
SHAPE = "--n-layer 2 --n-head 2 --n-embd 64"
CASES = dict.fromkeys(METHODS, EIGHT) | {
    "sft": f"{SHORT} --batch-size 8 {SHAPE}",
    "reward_model": EIGHT.replace("--max-new-tokens 12", ""),
    "ppo": f"{EIGHT} --group 1 --minibatches 2 --reward judge.pt",
    "grpo": f"{EIGHT} --batch-size 2 --group 4 --minibatches 2 --reward judge.pt",
    "online_dpo": f"{EIGHT} --reward judge.pt",
    "dapo": f"{EIGHT} --batch-size 2 --group 4 --task tokens:8+12 --max-rounds 40",
    "rlaif": f"{SHORT} --batch-size 4 --init skilled-skills.pt --sl-steps 3 --pm-steps 3"
    " --answers 24 --comparisons 24 --max-new-tokens 16",
}


def ran(name, arguments, path, device):
    """Runs a script in this process, in silence. -> its record: the first line, the lines of its
    steps, its closing figures"""
    gc.collect()  # what an earlier run held is not in the peak of this one
    argv = [*arguments.split(), "--device", str(device), "--out", path]
    with contextlib.redirect_stdout(io.StringIO()), locks.given_back():
        importlib.import_module(name).main(argv)
    return read(Path(path).parent, Path(path).stem)


def seconds(o, f, times=5, warm=2):
    """-> how long f takes, a mean"""
    now = clock_of(o.place)
    for _ in range(warm):
        f()
    began = now()
    for _ in range(times):
        f()
    return (now() - began) / times


# ---- the parts: each yields (row, column, a function that gives the row's cells)


def scripts(o):
    make_starts()
    for setting, how in SETTINGS.items():
        for name, arguments in CASES.items():
            yield name, setting, partial(beside_cpu, o, name, f"{arguments} {how}", setting)


def make_starts():
    """Writes what the runs start from: a small model that ends one response in a few early, a
    reward model, and a model with RLAIF's skills."""
    if not Path("start.pt").exists():
        ran("sft", f"{CASES['sft']} --steps 1", "first.pt", "cpu")
        model, meta = load("first.pt")
        with torch.no_grad():  # the logit of the end token grows by 5
            model.norm.bias += 1.0
            model.wte.weight[-1] += 5 / model.config.n_embd
        save(model, "start.pt", **meta)
    if not Path("judge.pt").exists():
        ran("reward_model", CASES["reward_model"], "judge.pt", "cpu")
    if not Path("skilled.pt").exists():
        own = "--skill-steps 30 --skill-lr 0.03 --n-layer 1 --n-head 2 --n-embd 16"
        learning = CASES["rlaif"].replace("--init skilled-skills.pt", own)
        ran("rlaif", learning, "skilled.pt", "cpu")


def beside_cpu(o, name, arguments, setting):
    """-> a cell: exit code, largest difference of a step's loss to the CPU's, ms per step"""
    eager = arguments.replace("--compile", "")
    expected, found = (
        ran(name, how, f"{name}-{device}-{setting}.pt", device)
        for how, device in ((eager, "cpu"), (arguments, o.place))
    )
    return {setting: f"0; {apart(found[1], expected[1]):.0e}; {found[2]['step_ms']:.0f}"}


def apart(steps, others):
    """-> the largest difference of two runs' losses, relative to the largest loss of the second"""
    a, b = (torch.tensor([x["loss"] for x in run if "loss" in x]) for run in (steps, others))
    return ((a - b).abs().amax() / b.abs().amax()).item()


def waits(o):
    make_starts()
    for name, arguments in CASES.items():
        how = partial(waits_of, o, name, f"{arguments} --dtype float32")
        yield name, "waits", how if o.cuda else partial(dict, waits=ONLY_CUDA)


def waits_of(o, name, arguments):
    with in_step(2, debugged) as found:
        ran(name, arguments, f"{name}-waits.pt", o.place)
    n, most = sum(found[-1].values()), found[-1].most_common(4)
    return {"waits": n, "where": ", ".join(f"{n} × {line}" for line, n in most)}


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
    """-> Counter of the places where torch says that the host waits"""
    places = Counter()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        yield places
        torch.cuda.set_sync_debug_mode("default")
    waits = [x for x in said if "called a synchronizing" in str(x.message)]
    places.update(f"{Path(x.filename).name}:{x.lineno}" for x in waits)


def sampling(o):
    toy = (500, 64, 1, 2, 32) if o.small else (data.tokenizer().size, 256, 4, 4, 128)
    for size, config in {"toy": toy, "124M": o.config}.items():
        for rows in (1, 8, 64):
            draw = partial(drawn, o, GPTConfig(*config), rows)
            graph = partial(draw, "graph", True) if o.cuda else partial(dict, graph=ONLY_CUDA)
            row = f"{size}, {rows} row{'s' * (rows > 1)}"
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
    start, peak = make_big(o), 0
    for dtype in (torch.float32, torch.bfloat16):
        rate = bench.rate(512 if o.small else 8192, dtype, o.place, clock_of(o.place)) / 1e12
        yield f"a product in {str(dtype)[6:]}", "TFLOP/s", partial(dict, {"TFLOP/s": rate})
    card = torch.cuda.get_device_name(o.place) if o.cuda else ""
    peak = next((x for name, x in PEAKS.items() if name in card), 0)
    row = "the peak of MFU, " + ("a data sheet's" if peak else "that of the product")
    yield row, "TFLOP/s", partial(dict, {"TFLOP/s": peak or rate})
    measured = partial(speed, o, 1e12 * (peak or rate), start)

    for name in ("sft", "dpo"):
        job = job_of(o, name, o.prompt, o.response)
        yield name, "ms", partial(measured, job, our_step)
        yield f"{name}, plain loop", "ms", partial(measured, job, plain_step)
        yield f"{name}, TRL", "ms", partial(measured, job, trl_step)
    yield "dpo, cuDNN attends", "ms", partial(measured, job, cudnn_step)
    bench.write_ragged(Path())
    file, prompt, (least, most) = bench.RAGGED
    shape = prompt, (least + most) // 2
    for row, task in (("one shape", ""), (f"{prompt} + {least}…{most}, new shapes", file)):
        job = job_of(o, "dpo", *shape, task)
        yield f"dpo, {row}", "ms", partial(measured, job, our_step)
        yield f"dpo, {row}, cuDNN attends", "ms", partial(measured, job, cudnn_step)
    yield "AdamW alone", "ms", partial(adamw_alone, o, start)


def make_big(o):
    """-> the path of an untrained model of the part's size"""
    if not Path("big.pt").exists():
        V, context, L, H, C = o.config
        words = bench.write_vocabulary(Path(), V)
        size = f"--tokenizer {words} --block-size {context} --n-layer {L} --n-head {H} --n-embd {C}"
        how = "--task tokens:8+8 --steps 1 --batch-size 2 --eval-prompts 2 --dtype float32"
        ran("sft", f"{how} {size}", "big.pt", o.place)
    return "big.pt"


def job_of(o, name, prompt, response, task=""):
    """-> a measurement as those of the bench, with 2 · o.pairs sequences per step"""
    job = {"name": name, "prompt": prompt, "response": response, "config": o.config, "steps": 8}
    return job | {"sequences": 2 * o.pairs, "task": task or f"tokens:{prompt}+{response}"}


def speed(o, peak, start, job, step):
    """-> cells of step(o, job, start), which gives the ms of a step and its bytes at the peak, or
    says why it cannot. MFU: the FLOPs of each pass over each token of padded rows, 2N + 4LTC, by
    the time and the peak in FLOP/s."""
    try:
        ms, size = step(o, job, start)
    except LookupError as e:
        return {"ms": e.args[0]}
    tokens = job["sequences"] * (job["prompt"] + job["response"])
    found = {"ms": ms, "tokens/s": 1000 * tokens / ms, "MFU": bench.floor(job, peak) / ms}
    return found | {"GiB": size / 2**30 if size else ONLY_CUDA}


def our_step(o, job, start):
    final = ran(job["name"], command(o, job, start), "speed.pt", o.place)[2]
    return final["step_ms"], final["peak_bytes"]


def command(o, job, start):
    n = o.pairs if job["name"] == "dpo" else 2 * o.pairs
    how = f"--init {start} --dtype bfloat16 --steps {job['steps']} --warmup 1 --log-every 10"
    return f"{how} --task {job['task']} --batch-size {n} --eval-prompts 2 --max-new-tokens 8"


def cudnn_step(o, job, start):
    """The same with cuDNN's attention, which gpu.py turns off"""
    if not o.cuda:
        raise LookupError(ONLY_CUDA)
    torch.backends.cuda.enable_cudnn_sdp(True)
    try:
        with patch.object(torch.backends.cuda, "enable_cudnn_sdp"):
            return our_step(o, job, start)
    finally:
        torch.backends.cuda.enable_cudnn_sdp(False)


def trl_step(o, job, start):
    if not all(map(find_spec, ("trl", "transformers", "datasets"))):
        raise LookupError("not installed")
    with contextlib.redirect_stdout(io.StringIO()):
        found = peers.step(job, clock_of(o.place), use_cpu=not o.cuda, bf16=True)
    return found["ms"], found["bytes"]


def plain_step(o, job, start):
    """A loop that computes every token of padded rows, and all their logits"""
    policy, ref = (load(start)[0].to(o.place) for _ in range(2))
    optimizer = torch.optim.AdamW(policy.parameters(), 1e-5, fused=True)
    rows, T = job["sequences"], job["prompt"] + job["response"]
    ids = torch.randint(2, 250, (rows, T), device=o.place)
    mask = (torch.arange(T, device=o.place) >= job["prompt"]).expand_as(ids)

    def step():
        with torch.autocast(o.place.type, torch.bfloat16):
            logp = padded_logprobs(policy, ids, mask)
            if job["name"] == "dpo":
                with torch.no_grad():
                    ref_logp = padded_logprobs(ref, ids, mask)
                w, l = (logp - ref_logp).chunk(2)
                loss = -F.logsigmoid(0.1 * (w - l)).mean()
            else:
                loss = -logp.sum() / mask.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    if o.cuda:
        torch.cuda.reset_peak_memory_stats(o.place)
    ms = 1000 * seconds(o, step)
    return ms, torch.cuda.max_memory_allocated(o.place) if o.cuda else 0


def padded_logprobs(model, ids, mask):
    """ids, mask (B, T) -> (B,) log-probs of the tokens that the mask marks, sums in nats"""
    H, K, D = model.config.heads()
    x = model.wte(ids) + model.wpe(torch.arange(ids.size(1), device=ids.device))
    for block in model.blocks:
        qkv = block.attention.qkv(block.norm_1(x)).unflatten(2, (H + 2 * K, D)).transpose(1, 2)
        y = F.scaled_dot_product_attention(*qkv.split((H, K, K), 1), is_causal=True)
        x = x + block.attention.proj(y.transpose(1, 2).flatten(2))
        x = x + block.down(F.gelu(block.up(block.norm_2(x)), approximate="tanh"))
    logits = F.linear(model.norm(x), model.head)[:, :-1].float()
    nll = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return -(nll.view(len(ids), -1) * mask[:, 1:]).sum(1)


def adamw_alone(o, start):
    """-> how long AdamW's step takes with a gradient for every weight"""
    model = load(start)[0].to(o.place)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    return {"ms": 1000 * seconds(o, adamw([model], parse(sft.Options, []), o.place).step)}


def memory(o):
    start = make_big(o)
    n, together = o.pairs, "--updates 1 --minibatches 1 --reward task"
    task = f"--init {start} --task tokens:{o.prompt}+{o.response} --dtype bfloat16 --steps 3"
    rows = {
        "dpo": f"--batch-size {n}",
        "dpo --lora 8": f"--batch-size {n} --lora 8",
        "ppo": f"--batch-size {2 * n} --group 1 {together}",
        "grpo": f"--batch-size 2 --group {n} {together}",
    }
    for row, how in rows.items():
        yield row, "measured", partial(peak_of, o, row.split()[0], f"{task} {how}")


def peak_of(o, name, arguments):
    first, _, final = ran(name, f"{arguments} --eval-prompts 2", "memory.pt", o.place)
    sizes = final["peak_bytes"], predict.of_run(name, first)["predicted_bytes"]
    found = {"measured": sizes[0] / 1e6, "predicted": sizes[1] / 1e6}
    return found | {"measured / predicted": sizes[0] / sizes[1]}


def kernels(o):
    job, kind = job_of(o, "dpo", o.prompt, o.response), ProfilerActivity.CUDA
    there = kind in supported_activities()
    kind, spent = (kind, "device") if there else (ProfilerActivity.CPU, "cpu")
    with in_step(3, partial(profile, activities=[kind])) as found:
        ran("dpo", command(o, job, make_big(o)), "kernels.pt", o.place)
    events = found[0].key_averages()
    ms = {x.key: getattr(x, f"self_{spent}_time_total") / 1000 for x in events}
    longest = sorted(ms, key=ms.get, reverse=True)
    column = "ms" if there else "ms of the CPU's operators, kernels: CUDA only"
    for name in longest[:12]:
        cells = {column: ms[name], "share": ms[name] / sum(ms.values())}
        yield f"`{name[:90]}`", column, partial(dict, cells)
    attend = [x for x in longest if any(word in x.lower() for word in ("flash", "fmha", "sdpa"))]
    said = ", ".join(f"`{name[:90]}`" for name in attend[:3])
    yield "attention", column, partial(dict, {column: said or "by math: no kernel of its own"})

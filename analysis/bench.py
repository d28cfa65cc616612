"""Measures the CPU time and memory of each script's step, beside the floor of its arithmetic.

    python -m analysis.bench                       every script, sampling, long prompts
    python -m analysis.bench --n-embd 256          the same with a wider model
    python -m analysis.bench --vocab-size 50257    the same with the vocabulary of GPT-2
    python -m analysis.bench --only head           only the head; or ragged, rollout, decode
    python -m analysis.bench --peers               TRL and transformers on the same shapes, in turn

The floor is the time that the matrix products of a step would take at the rate of a large float32
product, which is measured first. It counts attention and, for N weights, 2N FLOPs per token in the
forward pass and 4N in the backward pass, before anything is shared or skipped. A small product
never reaches that rate, but a step that shares prompts can stay below its floor. Times are CPU time
of one thread, as medians of --repeats processes, which take turns so that a noisy machine disturbs
all of them alike. --peers needs trl and transformers.
"""

import base64
import contextlib
import importlib
import io
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
import training
from analysis import against_trl, processor
from analysis.against_trl import peers
from analysis.tables import markdown
from data import Stopped, UserError, say
from gpt import GPT, GPTConfig, ScalarGPT
from head import target_logprobs
from training import memory, opt, parse, sampling

HERE = Path(__file__).parent.parent
TOGETHER = "--updates 1 --minibatches 1"
ROWS = {  # row -> (passes over the policy's N per token, sequences per step, arguments)
    "sft": (3, 8, "--batch-size 8"),
    "reward_model": (3, 16, "--batch-size 8"),
    "dpo": (4, 16, "--batch-size 8"),
    "simpo": (3, 16, "--batch-size 8"),
    "orpo": (3, 16, "--batch-size 8"),
    "kto": (6, 8, "--batch-size 8"),
    "online_dpo": (5, 16, "--batch-size 8 --samples-per-prompt 2 --reward task"),
    "ppo": (10, 8, f"--batch-size 8 --group 1 --reward task {TOGETHER}"),
    "grpo": (4, 8, f"--batch-size 2 --group 4 --kl none {TOGETHER}"),
    "dapo": (4, 8, f"--batch-size 2 --group 4 {TOGETHER}"),
}
LONG = {  # row with a long prompt -> (script, prompt, response, sequences, arguments)
    "dpo 256+128": ("dpo", 256, 128, 16, "--batch-size 8"),
    "grpo 384+128": ("grpo", 384, 128, 16, f"--batch-size 2 --group 8 --kl none {TOGETHER}"),
}
ROLLOUTS = {  # row -> (script, prompt, response, sequences, arguments)
    "grpo 16 × 8": ("grpo", 32, 96, 128, f"--batch-size 16 --group 8 --kl none {TOGETHER}"),
    "grpo 64 × 16": ("grpo", 32, 96, 1024, f"--batch-size 64 --group 16 --kl none {TOGETHER}"),
}
RAGGED = "ragged.jsonl", 16, (40, 320)  # a file of pairs: tokens of a prompt, of a response
HEADS = {  # row -> states, vocabulary, width
    "768 states, V 50,257, C 768": (768, 50257, 768),
    "512 states, V 151,936, C 1,024": (512, 151936, 1024),
    "2,048 states, V 49,152, C 576": (2048, 49152, 576),
}
GPT2 = (50257, 128, 12, 12, 768)
SMOLLM2 = (49152, 128, 30, 9, 576, True, 3, 0, 1536)
DECODING = {  # row -> (sizes of the model, rows)
    f"{name}, {rows} rows": (config, rows)
    for name, config in (("GPT-2", GPT2), ("SmolLM2-135M", SMOLLM2))
    for rows in (1, 8, 64)
}
SAMPLING = {  # row -> (prompts, group, whether responses end: then after 24 tokens on average)
    "1 row": (1, 1, False),
    "8 rows": (8, 1, False),
    "64 rows": (64, 1, False),
    "64 rows with ends": (64, 1, True),
    "8 prompts × 8, with ends": (8, 8, True),
}


TABLES = ("all", "steps", "long", "sampling", "ragged", "rollout", "head", "decode")


@dataclass
class Options:
    methods: tuple = opt((), f"which scripts, of {' '.join(ROWS)} (default: all)")
    n_layer: int = opt(4, "blocks of the model", low=1)
    n_head: int = opt(4, "its attention heads per block", low=1)
    n_embd: int = opt(128, "its width", low=1)
    vocab_size: int = opt(0, "tokens of its vocabulary (0: the built-in one)", low=257)
    steps: int = opt(8, "optimizer steps per process", low=3)
    repeats: int = opt(3, "processes per row", low=1)
    peers: bool = opt(False, "measure TRL and transformers too")
    only: str = opt("all", "print one of the tables (all: the first three)", choices=TABLES)
    worker: str = opt("", "one measurement, as JSON: the bench starts its processes with it")

    def check(self):
        for row in self.methods:
            if row not in ROWS:
                raise UserError(f"--methods {row}: no such row; give some of {', '.join(ROWS)}")
        if self.n_embd % self.n_head:
            raise UserError(f"--n-embd {self.n_embd} is not a multiple of --n-head {self.n_head}")
        if self.peers:
            against_trl.check("--peers")

    def config(self, context):
        """-> the sizes of the model that has this context"""
        size = self.vocab_size or data.tokenizer().size
        return size, context, self.n_layer, self.n_head, self.n_embd


# ---- one measurement, in a process of its own


def measure(job):
    """job: the measurement that --worker gives -> its figures"""
    if job["what"] == "rate":
        return {"rate": rate()}
    if job["what"] == "head":
        return head(*job["sizes"])
    if job["what"] == "sample":
        how = peers.generator if job["peer"] else generator
        return {"tokens": tokens_per_second(how(GPTConfig(*job["config"]), job))}
    return peers.step(job) if job["peer"] else step(job)


def rate(n=1536, dtype=torch.float32, device="cpu", now=time.process_time):
    """-> FLOP/s of the product of two (n, n) matrices"""
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    seconds = []
    for _ in range(6):
        start = now()
        a @ b
        seconds.append(now() - start)
    return 2 * n**3 / min(seconds)


def head(M, V, C):
    """Measures only the head, forward and backward pass. -> CPU ms and bytes at the peak, of this
    head and of the formula by autograd"""
    h, W = torch.randn(M, C, requires_grad=True), (0.02 * torch.randn(V, C)).requires_grad_()
    target, found = torch.randint(V, (M,)), {}
    ways = {
        "": lambda: target_logprobs(h, W, target)[0],
        "plain ": lambda: -F.cross_entropy(F.linear(h, W), target, reduction="none"),
    }
    for name, logprobs in ways.items():
        with memory.Tracker() as tracker:
            logprobs().sum().backward()
        found |= {name + "bytes": tracker.peak, name + "ms": []}
        h.grad = W.grad = None
    for _ in range(3):  # in turn
        for name, logprobs in ways.items():
            start = time.process_time()
            logprobs().sum().backward()
            found[name + "ms"].append(1000 * (time.process_time() - start))
            h.grad = W.grad = None
    return found | {name + "ms": statistics.median(found[name + "ms"]) for name in ways}


def step(job):
    """Runs a script with CPU time for its clock. -> CPU ms per step, bytes at the peak"""
    name, *arguments = job["command"]
    script = importlib.import_module(name)
    with patch("training.figures.time.perf_counter", time.process_time):
        with contextlib.redirect_stdout(io.StringIO()):
            script.main([*arguments, "--out", f"{os.getpid()}.pt"])
    final = json.loads(Path(f"{os.getpid()}.jsonl").read_text().splitlines()[-1])["final"]
    names = {"step_ms": "ms", "peak_bytes": "bytes", "sample_ms": "sample_ms"}
    return {ours: final[name] for name, ours in names.items() if name in final}


def generator(config, job, model=None, static=None):
    """-> a function that draws responses, and returns the number of their tokens. model: that of
    the config, or else a new one; static: as sampling.sample takes it"""
    model = model or GPT(config)
    if job["ends"]:
        peers.end_often(model.norm.bias, model.wte.weight)
    prompts = torch.randint(2, config.vocab_size, (job["prompts"], job["prompt"])).tolist()
    how = dict(group=job["group"], generator=torch.Generator().manual_seed(0), static=static)
    end = 1 if job["ends"] else -1
    return lambda: sampling.sample(model, prompts, job["response"], (end,), **how).mask.sum()


def tokens_per_second(draw, runs=5, now=time.process_time):
    found = []
    for _ in range(runs + 1):
        start = now()
        tokens = int(draw())
        found.append(tokens / (now() - start))
    return statistics.median(found[1:])


# ---- all of them, in turn


def jobs(o):
    """-> {(table, row, whether a peer does it): the measurement}"""
    found, methods = {}, o.methods or ROWS
    if o.only in ("all", "steps"):
        for row in methods:
            found["steps", row] = step_job(o, row, 32, 96, *ROWS[row][1:])
    if o.only in ("all", "long"):
        for row, (name, *sizes) in LONG.items():
            if name in methods:
                found["long", row] = step_job(o, name, *sizes)
    if o.only in ("all", "sampling"):
        for row, (prompts, group, ends) in SAMPLING.items():
            job = {"what": "sample", "name": "generate", "prompt": 32, "response": 96}
            job |= {"prompts": prompts, "group": group, "ends": ends, "config": o.config(256)}
            found["sampling", row] = job
    if o.only == "ragged":
        file, prompt, (least, most) = RAGGED
        job = step_job(o, "dpo", prompt, most, 16, "--batch-size 8", file)
        found["ragged", "dpo 16 + 40…320"] = job | {"response": (least + most) // 2}
    if o.only == "rollout":
        found |= {("rollout", row): step_job(o, *job) for row, job in ROLLOUTS.items()}
    if o.only == "head":
        for row, sizes in HEADS.items():
            found["head", row] = {"what": "head", "name": "head", "sizes": sizes}
    if o.only == "decode":
        for row, (config, rows) in DECODING.items():
            job = {"what": "sample", "name": "generate", "prompt": 32, "response": 32}
            job |= {"prompts": rows, "group": 1, "ends": False, "config": config}
            found["decode", row] = job
    both = {}
    for key, job in found.items():
        both[(*key, False)] = job | {"peer": False}
        if o.peers and key[0] in TABLES[:4] and job["name"] in peers.SHAPES:
            both[(*key, True)] = job | {"peer": True}
    return both


def step_job(o, name, prompt, response, sequences, arguments, task=""):
    """-> the measurement of a script's steps"""
    context = max(256, prompt + response)
    task = task or f"tokens:{prompt}+{response}"
    command = f"{name} --task {task} --device cpu --dtype float32 {arguments}"
    command += f" --steps {o.steps} --warmup 1 --init {context}.pt --eval-prompts 4"
    job = {"what": "step", "name": name, "prompt": prompt, "response": response}
    job |= {"command": command.split(), "sequences": sequences, "steps": o.steps}
    return job | {"config": o.config(context)}


def run_all(o, folder):
    """-> (the jobs, {key of a job, or "rate": its figures of each repeat})"""
    todo = jobs(o)
    if o.only == "ragged":
        write_ragged(folder)
    found = {"rate": []} | {key: [] for key in todo}
    for context in {job["config"][1] for job in todo.values() if job["what"] == "step"}:
        size = f"--n-layer {o.n_layer} --n-head {o.n_head} --n-embd {o.n_embd}"
        task = f"--task tokens:{context // 2}+{context // 2} --block-size {context}"
        how = f"{task} {size} --steps 1 --batch-size 2 --eval-prompts 4 --device cpu".split()
        if o.vocab_size:
            how += ["--tokenizer", write_vocabulary(folder, o.vocab_size)]
        run([sys.executable, HERE / "sft.py", *how, "--out", f"{context}.pt"], folder)
    with tqdm(total=o.repeats * len(todo), desc="bench", disable=None) as bar:
        for _ in range(o.repeats):
            found["rate"].append(worker({"what": "rate"}, folder))
            for key, job in todo.items():
                found[key].append(worker(job, folder))
                bar.update()
    return todo, found


def write_vocabulary(folder, size):
    """Writes a vocabulary of that many tokens: the bytes, strings that occur in no text, and last
    the end token. -> the name of the file"""
    words = [bytes([b]) for b in range(256)]
    words += [b"\xff" + i.to_bytes(3, "big") for i in range(size - 257)]
    lines = (f"{base64.b64encode(word).decode()} {rank}\n" for rank, word in enumerate(words))
    Path(folder, "words.tiktoken").write_text("".join(lines))
    return "words.tiktoken"


def write_ragged(folder):
    """Writes pairs whose responses have many lengths. A digit is a token."""
    file, prompt, lengths = RAGGED
    rng, rows = random.Random(0), []

    def digits(n):
        return "".join(rng.choices("0123456789", k=n))

    for _ in range(64):
        chosen, rejected = (digits(rng.randint(*lengths) - 1) for _ in range(2))
        rows.append({"prompt": digits(prompt), "chosen": chosen, "rejected": rejected})
    text = "".join(json.dumps(row) + "\n" for row in rows)
    Path(folder, file).write_text(text)


def worker(job, folder):
    command = [sys.executable, "-m", "analysis.bench", "--worker", json.dumps(job)]
    return json.loads(run(command, folder).splitlines()[-1])


def run(command, folder):
    """-> what the command prints"""
    done = process(command, folder)
    if done.returncode:
        raise Stopped(f"{' '.join(map(str, command[1:]))}: {last_line(done)}")
    return done.stdout


def process(command, folder, limit=None):
    """Runs a command as a process of one thread, with a limit in seconds. -> the process"""
    paths = [str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    env |= {"PYTHONPATH": os.pathsep.join(paths)} | against_trl.OFFLINE
    how = dict(capture_output=True, text=True, timeout=limit)
    return subprocess.run(command, cwd=folder, env=env, **how)


def last_line(done):
    """A process that has failed -> the last line of its output"""
    return (done.stderr.strip().splitlines() or ["it was killed"])[-1]


# ---- tables


def floor(job, rate):
    """-> the ms that the matrix products of a step would take at that rate, in FLOP/s"""
    config = GPTConfig(*job["config"])
    with torch.device("meta"):
        model = (ScalarGPT if job["name"] == "reward_model" else GPT)(config)
    T = job["prompt"] + job["response"]
    forward = 2 * model.matmul_parameters() + 4 * config.n_layer * T * config.n_embd  # per token
    return 1000 * ROWS[job["name"]][0] * forward * job["sequences"] * T / rate


def middle(figures, name):
    return statistics.median(x[name] for x in figures)


def ratio(ours, theirs, name):
    """-> the median of theirs / ours over the repeats"""
    return statistics.median(b[name] / a[name] for a, b in zip(ours, theirs))


def measured(table, todo, found):
    """Yields (row, job, our figures, the peer's figures or None) for each row of a table"""
    for (kind, row, peer), job in todo.items():
        if kind == table and not peer:
            yield row, job, found[kind, row, False], found.get((kind, row, True))


def steps_table(o, todo, found, table, rate):
    """-> lines of cells"""
    head = ["", "ms per step", "sampling, ms", "floor, ms", "floor / step", "MB at the peak"]
    yield head + (["TRL, ms", "TRL / ours", "TRL, MB"] if o.peers else [])
    for row, job, ours, theirs in measured(table, todo, found):
        ms, least = middle(ours, "ms"), floor(job, rate)
        sampled = f"{middle(ours, 'sample_ms'):.0f}" if "sample_ms" in ours[0] else ""
        cells = [row, f"{ms:.0f}", sampled, f"{least:.0f}", f"{least / ms:.2f}"]
        cells.append(f"{middle(ours, 'bytes') / 1e6:.0f}")
        if theirs:
            cells += [f"{middle(theirs, 'ms'):.0f}", f"{ratio(ours, theirs, 'ms'):.2f}"]
            cells.append(f"{middle(theirs, 'bytes') / 1e6:.0f}")
        elif o.peers:
            cells += ["", "", ""]
        yield cells


def sampling_table(o, todo, found, table, title):
    """-> lines of cells"""
    peer = ["generate", "ours / generate"] if o.peers else []
    yield [title, "tokens per second", *peer]
    for row, _, ours, theirs in measured(table, todo, found):
        cells = [row, f"{middle(ours, 'tokens'):,.0f}"]
        if theirs:
            cells.append(f"{middle(theirs, 'tokens'):,.0f}")
            cells.append(f"{ratio(theirs, ours, 'tokens'):.2f}")
        yield cells


def head_table(o, todo, found, rate):
    """-> lines of cells"""
    yield ["", "ms", "plain, ms", "ours / plain", "floor / ours", "MB", "plain, MB"]
    for row, job, ours, _ in measured("head", todo, found):
        M, V, C = job["sizes"]
        ms, plain = middle(ours, "ms"), middle(ours, "plain ms")
        cells = [row, f"{ms:.0f}", f"{plain:.0f}", f"{ms / plain:.2f}"]
        cells.append(f"{1000 * 6 * M * V * C / rate / ms:.2f}")
        yield cells + [f"{middle(ours, name) / 1e6:.0f}" for name in ("bytes", "plain bytes")]


def report(o, todo, found):
    """-> the tables as Markdown"""
    rate = max(x["rate"] for x in found["rate"])
    where = f"{processor()}, one thread, torch {torch.__version__}"
    size = f"{o.n_layer} layers × {o.n_embd}, medians of {o.repeats} processes"
    yield f"{where}. {size}. A large product: {rate / 1e9:.0f} GFLOP/s."
    tables = {
        "32 + 96 tokens": steps_table(o, todo, found, "steps", rate),
        "Long prompts": steps_table(o, todo, found, "long", rate),
        "Sampling": sampling_table(o, todo, found, "sampling", "32 + 96 tokens"),
        "Rows of many lengths": steps_table(o, todo, found, "ragged", rate),
        "Rollouts": steps_table(o, todo, found, "rollout", rate),
        "The head alone": head_table(o, todo, found, rate),
        "Decoding": sampling_table(o, todo, found, "decode", "32 + 32 tokens"),
    }
    for title, lines in tables.items():
        lines = list(lines)
        if len(lines) > 1:
            yield f"\n{title}\n"
            yield from markdown(lines)


def main(argv=None):
    o = parse(Options, argv)
    torch.set_num_threads(1)
    if o.worker:
        print(json.dumps(measure(json.loads(o.worker))))
        return
    with tempfile.TemporaryDirectory() as folder:
        todo, found = run_all(o, Path(folder))
    say("\n".join(report(o, todo, found)))


if __name__ == "__main__":
    training.command(main, torchrun=False)

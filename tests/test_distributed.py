"""Many processes are one: the same weights and figures, whatever their number."""

import json
import os
import subprocess
import sys

import many
import pytest
import torch
from conftest import ROOT, lines

from gpt import uniforms

TINY = "--steps 3 --batch-size 4 --log-every 1 --warmup 1 --device cpu --eval-prompts 6".split()
SHORT = [*TINY, "--init", "ends.pt"]
WIDE = [*SHORT, "--max-new-tokens", 6, "--dtype", "float64"]
ROLLOUT = ["--group", 4, "--reward", "judge.py:odd"]
BITS = {  # in float32, of two micro-batches a step: a + b is b + a
    "sft": ["sft", *SHORT, "--micro-batch", 2],
    "dpo": ["dpo", *SHORT, "--micro-batch", 2],
    "grpo": ["grpo:rollout.pt", *SHORT, *ROLLOUT, "--micro-batch", 8, "--beta", 0.1],
}
CLOSE = {  # in float64
    "grpo-sampling": ["grpo", *WIDE, *ROLLOUT, "--minibatches", 2, "--updates", 2],
    "dapo": ["dapo", *WIDE, *ROLLOUT, "--max-rounds", 20],
    "kto": ["kto", *WIDE],
    "ppo": ["ppo", *WIDE, "--reward", "judge.pt", "--minibatches", 2],
    "online": ["online_dpo", *WIDE, "--reward", "judge.pt", "--samples-per-prompt", 4],
    "reward": ["reward_model", *SHORT, "--dtype", "float64"],
    "lora": ["dpo", *WIDE, "--lora", 2],
    "lora-ppo": ["ppo", *WIDE, "--reward", "judge.py:odd", "--lora", 2, "--minibatches", 2],
    "uneven": ["dpo", *WIDE, "--pairs", 7, "--micro-batch", 2, "--precompute-ref"],
}
SHARDED = ("uneven", "ppo", "lora", "lora-ppo", "online")  # which run once more with --shard


def torchrun(folder, *args, n=2, ok=True, **more):
    """-> the finished torchrun of n processes, each on one thread"""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(n), *args]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, **more)
    if ok:
        assert done.returncode == 0, done.stdout + done.stderr
    return done


def write_cases(folder, cases):
    listed = [[script, *map(str, args), "--out", name] for name, (script, *args) in cases.items()]
    (folder / "cases.json").write_text(json.dumps(listed))


@pytest.fixture(scope="module")
def both(ends, tmp_path_factory):
    """A folder with what the cases write in two processes, and in one"""
    folder = tmp_path_factory.mktemp("many")
    for name in ("ends.pt", "judge.pt", "judge.py"):
        (folder / name).write_bytes((ends / name).read_bytes())
    sharded = {f"{name}-shard": [*CLOSE[name], "--shard"] for name in SHARDED}
    write_cases(folder, BITS | CLOSE | sharded)
    store_rollout(folder)
    torchrun(folder, ROOT / "tests/many.py", "cases.json")
    with pytest.MonkeyPatch.context() as m:
        m.chdir(folder)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        write_cases(folder, BITS | CLOSE)
        many.main(["cases.json"])
        torch.set_num_threads(threads)
    return folder


def store_rollout(folder):
    from gpt import load, sample

    model, meta = load(folder / "ends.pt")
    prompts = [[1, 2, 3], [4, 5], [6, 7, 8, 9], [3]]
    rollout = sample(
        model, prompts, 6, model.config.vocab_size - 1, group=4, uniform=uniforms(16, 6)
    )
    torch.save(vars(rollout), folder / "rollout.pt")


def weights(path):
    return torch.load(path, weights_only=True)["model"]


@pytest.mark.parametrize("name", BITS)
def test_two_processes_give_the_bits_of_one(name, both):
    one, two = weights(both / f"{name}-1.pt"), weights(both / f"{name}-2.pt")
    assert all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize("name", [*CLOSE, *(f"{name}-shard" for name in SHARDED)])
def test_two_processes_give_the_weights_of_one(name, both):
    one = weights(both / f"{name.removesuffix('-shard')}-1.pt")
    two = weights(both / f"{name}-2.pt")
    assert max((one[key] - two[key]).abs().max() for key in one) <= 1e-11


TIMES = ("_ms", "_s", "_bytes", "peak", "peak_most", "models")


@pytest.mark.parametrize("name", CLOSE)
def test_two_processes_record_the_figures_of_one(name, both):
    one, two = (lines(both / f"{name}-{n}.jsonl")[1:] for n in (1, 2))
    assert len(one) == len(two)
    for a, b in zip(one, two):
        a, b = a.get("final", a), b.get("final", b)
        assert a.keys() == b.keys()
        for key in a:
            if not key.endswith(TIMES):
                assert a[key] == pytest.approx(b[key], abs=1e-12, rel=1e-12), key

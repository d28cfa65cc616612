"""Whole runs as a user sees them: figures, files, gradients, interruptions."""

import json
import math
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, TINY, TRAIN, documented, files_in, killed, lines, main, run
from house import METHODS

import data
import dpo
import reward_model
import sft
from data import Stopped
from gpt import GPT, GPTConfig, ScalarGPT, load, response_scores
from training import Compute, Run, checkpoint, lora, parse
from training.device import choose_device
from training.figures import Figures
from training.state import State

CPU = SimpleNamespace(device="cpu", dtype="float32")


def snapshot(folder):
    """-> {file: content} of all but locks, which stay behind"""
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"]
    return {path: path.read_bytes() for path in files}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def shop(ends, tmp_path):
    """A folder of its own with what `ends` has."""
    (tmp_path / "out/reviews").mkdir(parents=True)
    for name in ("out/reviews/sft.pt", "ends.pt", "judge.pt", "judge.py"):
        shutil.copy(ends / name, tmp_path / name)
    return tmp_path


# ---- from the command to the figures

FIGURES = """reward ref_reward win_rate kl kl_se length entropy ended step_ms tokens_per_s wall_s
flops_per_token""".split()
SAMPLED = "sampled_tokens sample_ms logprobs_ms update_ms".split()
HELD = {  # the models in memory; * is trained
    "dpo": "policy* ref",
    "simpo": "policy*",
    "orpo": "policy*",
    "kto": "policy* ref",
    "grpo": "policy* ref",
    "dapo": "policy*",
    "ppo": "policy* critic* ref",
}
FORWARD = {  # passes over a token: of the policy's sampling, π_old and each update; of the others
    "dpo": 2,
    "simpo": 1,
    "orpo": 1,
    "kto": 4,  # of both models, for ẑ and for the loss
    "grpo": 2 + 1,
    "dapo": 3,  # of many minibatches, π_old is a pass of its own; dropped groups do not count
    "ppo": 4 + 3 + 1,
}
SAMPLING = ("grpo", "dapo", "ppo")


def whole_and_apart(folder, before):
    """What was there is as it was, and nothing is half written."""
    assert all(path.read_bytes() == content for path, content in before.items())
    assert not list(folder.rglob("*.tmp"))


def quick(scripts, *kept):
    """The machinery is one: those that are not kept are tested among the slow."""
    return [x if x in kept else pytest.param(x, marks=pytest.mark.slow) for x in scripts]


@pytest.mark.parametrize("name", HELD)
def test_end_to_end(name, shop, call):
    """Exit code, documented finite figures, the ledger's models, an unchanged reference, a policy
    that has changed, and a checkpoint that evaluates to the same."""
    before = snapshot(shop)
    small = "--n-layer 1 --n-embd 16".split() if name == "orpo" else []
    if name in SAMPLING:
        small = "--init ends.pt --group 4 --reward judge.py:odd".split()
    said = call(name, *TINY, *small, "--eval-every", 2, cwd=shop)
    held = [(role.strip("*"), role.endswith("*")) for role in HELD[name].split()]
    assert "reward" in said and "\n  reference " in said and f"models held: {len(held)}" in said
    whole_and_apart(shop, before)
    folder = shop / "out/reviews"
    assert files_in(folder) == sorted([f"{name}.jsonl", f"{name}.pt", "sft.pt"])

    first, *steps, last = lines(folder / f"{name}.jsonl")
    assert first["versions"]["torch"] == torch.__version__ and first["options"]["seed"] == 0
    assert [line["step"] for line in steps] == [1, 2, 2, 3]
    final, start = last["final"], steps[0]
    keys = FIGURES + (SAMPLED if name in SAMPLING else [])
    assert all(math.isfinite(final[key]) for key in keys)
    assert [(model["role"], model["trainable"]) for model in final["models"]] == held
    assert final["forward_passes"] == pytest.approx(FORWARD[name])
    assert final["backward_passes"] == (4 if name == "ppo" else 1)  # of two models, two updates
    documented(steps, final)
    if name == "dpo":  # π = π_ref
        assert "gold reward" in said and "sft on reviews, 3 steps" in said
        assert start["loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert start["rewards/accuracies"] == 0.0 and first["options"]["beta"] == 0.1
    if name == "kto":  # rewards and ẑ are 0, the loss is λ/2
        assert start["loss"] == pytest.approx(0.5) and start["kl"] == 0.0
    if name == "ppo":
        assert start["kl"] == 0.0 and start["rlhf_reward"] == pytest.approx(start["reward"])
    assert name != "grpo" or start["clip_ratio/low_mean"] == 0.0
    assert name != "dapo" or start["kept_fraction"] > 0
    if name in SAMPLING:
        parts = final["sample_ms"] + final["logprobs_ms"] + final["update_ms"]
        assert parts < 1.5 * final["step_ms"]
        tokens = [line["sampled_tokens"] for line in steps if "loss" in line]
        assert 0 < tokens[0] < tokens[1] < tokens[2] == final["sampled_tokens"]

    policy, meta = load(folder / f"{name}.pt")
    init = "ends.pt" if name in SAMPLING else "out/reviews/sft.pt"
    assert meta["reference"] == init and meta["method"] == name
    if name != "orpo":
        before = load(shop / init)[0].parameters()
        assert any(not torch.equal(a, b) for a, b in zip(policy.parameters(), before))
    again = call("evaluate", f"out/reviews/{name}.pt", "--device", "cpu", cwd=shop)
    assert re.search(rf"KL\(π‖π_ref\), nats per response +{final['kl']:.2f} ", again)


def test_reward_model_end_to_end(shop, call, capsys):
    """Documented finite figures, a checkpoint that reloads, demonstrations that average 0."""
    before = snapshot(shop)
    said = call("reward_model", *TRAIN, "--eval-every", 2, cwd=shop)
    assert "held-out preference accuracy" in said and "the labels' noise allows 0.8" in said
    whole_and_apart(shop, before)
    _, *steps, last = lines(shop / "out/reviews/reward_model.jsonl")
    final = last["final"]
    names = "accuracy accuracy_bound correlation margin mean_reward min_reward max_reward shift"
    assert all(math.isfinite(final[name]) for name in [*names.split(), "flops_per_token"])
    assert final["min_reward"] < final["mean_reward"] < final["max_reward"]
    assert [(model["role"], model["trainable"]) for model in final["models"]] == [("reward", True)]
    documented(steps, final)

    model, meta = load(shop / "out/reviews/reward_model.pt")
    assert isinstance(model, ScalarGPT) and meta["shift"] == final["shift"]
    assert meta["reference"] == "out/reviews/sft.pt"
    tokenizer = data.Tokenizer(meta["tokenizer"])
    rows, _ = data.encode(data.task("reviews").demonstrations(1024, 0), tokenizer, 256)
    batch = data.pad(list(rows), ends=True)
    assert abs(response_scores(model, batch).mean()) < 1e-4
    assert abs(model.head.bias.item()) > 1e-4
    assert main("evaluate", "out/reviews/reward_model.pt") == 2
    assert "is a reward model" in capsys.readouterr().err


def test_exact_figures_are_documented(tmp_path, call):
    """And its defaults reach the run: shape, β, and twenty evaluations."""
    short = "--task exact --steps 3 --batch-size 8 --device cpu".split()
    for name in ("sft", "dpo", "reward_model"):
        call(name, *short, cwd=tmp_path)
    keys = {"dpo": "kl_star tv_star objective kl win_rate frontier", "reward_model": "rms"}
    for name in keys:
        _, *steps, last = lines(tmp_path / f"out/exact/{name}.jsonl")
        assert set(keys[name].split()) <= set(last["final"])
        assert [line["step"] for line in steps if "eval" in line] == [1, 2, 3]
        documented(steps, last["final"])
    assert load(tmp_path / "out/exact/sft.pt")[0].config == GPTConfig(4, 8, 2, 4, 64)
    assert lines(tmp_path / "out/exact/dpo.jsonl")[0]["options"]["beta"] == 0.5


# ---- files of one's own


def test_real_text(tmp_path, call):
    """sft.py then dpo.py on JSONL files: held-out loss and accuracy, rows cut aloud, epochs."""
    rows = [{"prompt": f"{i} plus {i}?", "completion": f"It is {2 * i}."} for i in range(60)]
    write(tmp_path / "s.jsonl", rows)
    wrong = [{"rejected": "No idea at all" * (1 + i % 9)} for i in range(60)]
    pairs = [{"prompt": f"What is {i}?", "chosen": f"It is {i}."} | wrong[i] for i in range(60)]
    write(tmp_path / "p.jsonl", pairs)
    shape = "--n-layer 1 --n-embd 16 --block-size 64".split()
    assert "held-out loss" in call("sft", "--task", "s.jsonl", *TINY, *shape, cwd=tmp_path)
    on_pairs = "--task p.jsonl --init out/s/sft.pt --truncate".split()
    said = call("dpo", *on_pairs, *TINY, cwd=tmp_path)
    assert "held-out preference accuracy" in said
    assert re.search(r"\d+ of \d+ rows are cut to 64 tokens", said)
    final = lines(tmp_path / "out/p/dpo.jsonl")[-1]["final"]
    assert 0 <= final["accuracy"] <= 1 and "reward" not in final

    options = "--batch-size 8 --max-new-tokens 4 --loss ipo --out ipo.pt".split()
    held_out = data.task(str(tmp_path / "p.jsonl")).prompts(None, 0, split="test")
    n = 60 - len(held_out)
    for passes in ("--epochs 2 --precompute-ref", "--log-every 1"):  # a file's default is one pass
        said = call("dpo", *on_pairs, *options, *passes.split(), cwd=tmp_path)
        assert ("models held: 1" in said) == ("--precompute-ref" in passes)
        steps = (2 if "2" in passes else 1) * (n // 8 + (n % 8 > 1))
        assert lines(tmp_path / "ipo.jsonl")[-2]["step"] == steps


def test_margin_and_soft_label_columns(shop, call):
    """Columns `margin` and `p` reach the loss: with p = 0 throughout, the model learns to prefer
    the rejected answers."""
    row = {"chosen": "yes yes", "rejected": "no", "p": 0.0, "margin": 0.5}
    write(shop / "soft.jsonl", [{"prompt": f"question {i}"} | row for i in range(60)])
    assert data.task(str(shop / "soft.jsonl")).graded(None, 0)[0][3:] == (0.5, 0.0)
    args = (
        "--task soft.jsonl --init out/reviews/sft.pt --steps 40 --warmup 0 --lr 0.01 --device cpu"
    )
    call("reward_model", *args.split(), "--log-every", 1, cwd=shop)
    first, *_, last = lines(shop / "out/soft/reward_model.jsonl")[1:]
    final = last["final"]
    # -log σ(m - Δ) at Δ near 0
    assert first["loss"] == pytest.approx(math.log(1 + math.exp(-0.5)), abs=0.2)
    assert final["margin"] < 0 and final["accuracy"] == 1.0 and "correlation" not in final


INIT = ["--init", "out/reviews/sft.pt", *TINY]


def test_kto_warns_of_imbalance(shop, call):
    """λ_D n_D / (λ_U n_U): 40 to 20 is 2, outside [1, 4/3]; with --w-undesirable 1.6 it is 1.25,
    with --w-desirable 0.6 it is 1.2, and with 3 it is 6, of which 1.15 is 3 · 1.15/6."""
    rows = [{"prompt": f"q{i}", "completion": "a b c", "label": i % 3 > 0} for i in range(60)]
    write(shop / "l.jsonl", rows)
    write(shop / "e.jsonl", [row | {"prompt": f"e{i}"} for i, row in enumerate(rows)])
    file = [*"--task l.jsonl --eval-file e.jsonl".split(), *INIT]
    count = "warning: 40 desirable and 20 undesirable examples make λ_D n_D / (λ_U n_U) = "
    for args, words in (
        (file, f"{count}2, outside [1, 4/3]"),
        ([*file, "--w-undesirable", 1.6], ""),
        ([*file, "--w-desirable", 0.6], ""),
        ([*file, "--w-desirable", 3], f"{count}6, outside"),
        (TINY, ""),
    ):
        said = call("kto", *args, cwd=shop)
        assert words in said and ("warning" in said) == bool(words)
        assert ("--w-desirable 0.57 would balance it" in said) == bool(words)
    assert 0 <= lines(shop / "out/l/kto.jsonl")[-1]["final"]["accuracy"] <= 1


def test_kto_says_where_a_batch_holds_one_prompt(shop, call):
    """Nothing is mismatched there, so ẑ is 0 by construction; and how much is read, it says too."""
    poems = [{"prompt": "Poem.", "completion": f"{i}", "label": i % 2 == 0} for i in range(60)]
    others = [row | {"prompt": f"{i}?"} for i, row in enumerate(poems[:4])]
    write(shop / "k.jsonl", poems + others)
    write(shop / "e.jsonl", [row | {"prompt": f"e{i}"} for i, row in enumerate(poems)])
    said = call("kto", *"--task k.jsonl --eval-file e.jsonl".split(), *INIT, cwd=shop)
    found = re.search(r"warning: (\d+) of 16 batches hold one prompt only, and ẑ is 0 there", said)
    assert 10 <= int(found[1]) < 16
    assert "3 steps read 12 of 64 training rows; --epochs 1 reads all" in said


def test_odd_but_legal_feedback(shop, call):
    """Held-out rows of one label, training rows of one class, a labelled --eval-file for pairs:
    each runs, and says what is left out."""
    rows = [{"prompt": f"q{i}", "completion": f"answer {i}"} for i in range(30)]
    write(shop / "good.jsonl", [row | {"label": True} for row in rows])
    write(shop / "both.jsonl", [row | {"label": i % 2 == 0} for i, row in enumerate(rows)])
    pair = {"chosen": "a", "rejected": "b", "label": "a column of one's own"}
    write(shop / "pairs.jsonl", [{"prompt": f"p{i}"} | pair for i in range(30)])
    said = call("kto", "--task", "good.jsonl", *INIT, cwd=shop)
    assert "accuracy is not reported" in said and "examples are desirable" in said
    record = lines(shop / "out/good/kto.jsonl")
    assert "accuracy" not in record[-1]["final"] and "rewards/chosen" in record[1]
    assert "rewards/rejected" not in record[1]
    args = "--task pairs.jsonl --eval-file both.jsonl --pairs 8".split()
    said = call("kto", *args, *INIT, cwd=shop)
    assert "4 pairs are split into 8 examples (train split)" in said
    assert "held-out preference accuracy" in said
    for name in ("dpo", "simpo", "orpo"):
        said = call(name, "--task", "pairs.jsonl", *INIT, cwd=shop)
        assert "held-out preference accuracy" in said and "split into" not in said
    said = call("sft", "--task", "both.jsonl", *INIT, cwd=shop)
    assert "its desirable answers are the demonstrations" in said


# ---- the loop's loss and gradient


def test_micro_batches_of_a_filtered_rollout_give_the_same_gradient(ends, monkeypatch):
    """64 ragged responses at once and in eights, those that did not end left out: at the second of
    two optimizer steps gradients and figures agree. (All else is cut in test_steps.py.)"""
    monkeypatch.chdir(ends)
    args = "--overlong-filter --batch-size 32 --group 4 --minibatches 2 --lr 0.01 --warmup 0"
    args += " --init ends.pt --reward judge.py:odd --max-new-tokens 8 --dtype float64"
    seen, calls, update = [], [], Run.update

    def stop(self, optimizer):
        calls.append(1)
        if len(calls) % 2:
            return update(self, optimizer)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        seen.append((torch.cat([p.grad.flatten() for p in parameters]), self.figures.means()))
        raise Stopped("seen")

    monkeypatch.setattr(Run, "update", stop)
    for micro in (64, 8):
        assert main("dapo", *args.split(), "--micro-batch", micro, "--out", "micro/x.pt") == 1
    (a, metrics), (b, again) = seen
    assert a.norm() > 1e-6 and (a - b).norm() <= 1e-6 * a.norm()
    assert metrics == pytest.approx(again, rel=1e-6)


def test_bfloat16_on_cpu_and_policy_equals_reference(tiny, monkeypatch):
    """Under autocast with float32 master weights, policy and frozen bfloat16 reference agree to the
    bit at step 0: the loss is log 2."""
    monkeypatch.chdir(tiny)
    assert main("dpo", *TINY, "--dtype", "bfloat16", "--out", "bf/dpo.pt") == 0
    first, step, *_ = lines(tiny / "bf/dpo.jsonl")
    assert step["rewards/margins"] == 0.0 and step["loss"] == pytest.approx(math.log(2), abs=1e-6)
    policy, ref = first["models"]
    assert ref["weight_bytes"] < policy["weight_bytes"]
    assert all(p.dtype == torch.float32 for p in load("bf/dpo.pt")[0].parameters())


def test_a_frozen_reward_model_scores_as_its_original_in_bfloat16():
    """Its head stays in float32: bfloat16 would round its weights, and the shift in its bias."""
    compute = Compute(SimpleNamespace(device="cpu", dtype="bfloat16"))
    model, ids = ScalarGPT(GPTConfig(99, 64, 2, 2, 16), 0), torch.arange(48).view(4, 12)
    model.head.bias.data.fill_(-1.2345678)
    frozen = compute.freeze(model)
    with torch.no_grad(), compute.autocast():
        assert torch.equal(model.score(ids, ids >= 0), frozen.score(ids, ids >= 0))
    assert frozen.trunk.blocks[0].up.weight.dtype == torch.bfloat16
    assert frozen.head.weight.dtype == torch.float32


def test_the_seed_is_that_of_weights_adapters_and_draws(shop, monkeypatch):
    monkeypatch.chdir(shop)
    task, path = data.task("reviews"), "out/reviews/sft.pt"
    how = ["--seed", "3", "--device", "cpu"]
    run = Run("sft", parse(sft.Options, [*how, "--n-layer", "1"], sft.PRESETS))
    policy = run.create(task)
    assert run.generator.initial_seed() == 3
    assert torch.equal(policy.wte.weight, GPT(policy.config, 3).wte.weight)
    run = Run("reward_model", parse(reward_model.Options, [*how, "--lora", "2"]))
    reward = run.load(path, task, scalar=True)
    assert torch.equal(reward.head.weight, ScalarGPT(reward.config, 3).head.weight)
    for seed in (3, 0):
        expected = load(path)[0]
        lora.adapt(expected, 2, 2.0, seed)
        same = torch.equal(reward.trunk.blocks[1].up.A, expected.blocks[1].up.A)
        assert same == (seed == 3)


def test_log_probs_of_the_end_token_are_trained():
    """The mask that sft.py trains on holds the end token, so that a model ends its samples."""
    tokenizer, how = data.tokenizer(), SimpleNamespace(seed=0, batch_size=4, truncate=False)
    batch = data.pad(data.Batches(data.task("reviews").demonstrations, 0, tokenizer, 128, how)[0])
    last = batch.mask.size(1) - 1 - batch.mask.flip(1).int().argmax(1)
    assert (batch.ids[torch.arange(4), last] == tokenizer.end_id).all()


# ---- earlier stages


@pytest.mark.parametrize("script, stages", [("dpo", ["sft"]), ("ppo", ["sft", "reward_model"])])
def test_missing_checkpoints_are_made_first(script, stages, tmp_path, monkeypatch):
    """dpo.py runs sft.py of the same task itself, and ppo.py reward_model.py too, passing on the
    device and precision only."""
    monkeypatch.chdir(tmp_path)
    calls = []

    def run_path(path, run_name):
        calls.append(sys.argv)
        small = [*"--n-layer 1 --n-head 1 --n-embd 8".split(), *TINY]
        stage = Path(path).stem
        sys.exit(main(stage, *small) if stage == "sft" else main(stage, *TRAIN))

    monkeypatch.setattr(checkpoint.runpy, "run_path", run_path)
    before = sys.argv
    assert main(script, *TINY) == 0
    passed = "--task reviews --device cpu --dtype auto".split()
    assert sorted(calls) == sorted([str(ROOT / f"{stage}.py"), *passed] for stage in stages)
    assert sys.argv is before


@pytest.mark.parametrize("code, mine", [(2, 1), (130, 130)])
def test_a_stage_that_fails_ends_the_run(code, mine, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(checkpoint.runpy, "run_path", lambda *_, **more: sys.exit(code))
    (tmp_path / "out/reviews").mkdir(parents=True)
    (tmp_path / "out/reviews/sft.state").touch()  # without one there is nothing to go on from
    assert main("dpo", *TINY) == mine
    words = {2: "sft.py, which makes out/reviews/sft.pt, failed with exit code 2"}
    assert words.get(code, "this goes on from where sft.py stopped: ") in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.jsonl"))


def start(script, args, folder):
    """Starts a script, as from a shell; -> the process"""
    pipe = subprocess.PIPE
    command = [sys.executable, str(ROOT / script), *args]
    return subprocess.Popen(command, cwd=folder, stdout=pipe, stderr=pipe, text=True)


def press_ctrl_c(process, record, after=1):
    """When the record has more lines than `after`; -> what the process said, and its last line."""
    deadline = time.time() + 120
    while not record.exists() or len(record.read_text().splitlines()) <= after:
        assert time.time() < deadline and process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, said = process.communicate(timeout=60)
    assert process.returncode == 130
    return out, said.strip().splitlines()[-1]


@pytest.mark.slow
def test_a_stage_ends_with_its_parent_and_goes_on_with_it(tmp_path):
    """Ctrl-C while sft.py, which dpo.py runs in its own process, trains: both end, and the command
    that is printed goes on with the stage where it stopped."""
    args = "--task exact:1 --device cpu --steps 2 --batch-size 8".split()
    record, done = tmp_path / "out/exact-1/sft.jsonl", 1
    again = shlex.join(["python", str(ROOT / "dpo.py"), *args, "--resume"])
    for more, words in ([], "running sft.py first"), (["--resume"], "resumed after step "):
        out, said = press_ctrl_c(start("dpo.py", args + more, tmp_path), record, done)
        assert said == f"dpo.py: interrupted; this goes on from where sft.py stopped: {again}"
        assert words in out and record.with_suffix(".state").exists()
        assert not record.with_name("dpo.jsonl").exists()
        done = len(record.read_text().splitlines())


# ---- interruptions


def step_lines(path):
    """Whole JSON lines only, each step once, one header and one final line. -> the step lines"""
    record = lines(path)
    steps = [line for line in record if "step" in line]
    numbers = [(line["step"], "eval" in line) for line in steps]
    assert len(set(numbers)) == len(numbers) == len(record) - 2
    assert [step for step, _ in numbers] == sorted(step for step, _ in numbers)
    assert "options" in record[0] and "final" in record[-1]
    return steps


def same_run(a, b):
    """Two checkpoints of the same bits, whose records agree but for times and peaks."""
    assert a.read_bytes() == b.read_bytes()
    a, b = a.with_suffix(".jsonl"), b.with_suffix(".jsonl")
    assert step_lines(a) == step_lines(b)
    finals = [lines(path)[-1]["final"] for path in (a, b)]
    for key in finals[0].keys() | finals[1].keys():
        timed = key.endswith(("_ms", "_s")) or key.startswith("peak")
        assert timed or finals[0][key] == finals[1][key], key
    assert finals[0]["trained_tokens"] > 0


SCRIPTS = [script for script in METHODS if script != "rlaif"]
ROLLOUTS = "--init ends.pt --reward judge.py:odd --group 4 --updates 2 --minibatches 2"
# The second of two rounds has the steps 2 and 3 of three: a state after step 2 holds its pairs.
ROUNDS = "--init ends.pt --reward judge.py:odd --rounds 2 --ref-update per-round"
SMALL = {  # what makes a run of the script small
    **dict.fromkeys(("sft", "orpo"), "--n-layer 1 --n-embd 16"),
    **dict.fromkeys(("dpo", "simpo", "kto", "reward_model"), "--pairs 10"),
    **dict.fromkeys(("grpo", "dapo"), ROLLOUTS),
    "distill": "--init ends.pt --teacher out/reviews/sft.pt --group 4 --loss sampled --updates 2",
    "online_dpo": f"{ROUNDS} --samples-per-prompt 3",
    "ppo": "--init ends.pt --reward judge.pt --group 4 --minibatches 2",  # with its four models
}
SMALL = {script: options.split() for script, options in SMALL.items()}


@pytest.mark.parametrize("script", quick(SCRIPTS, "dpo", "ppo"))
def test_resume_gives_the_same_bits(script, shop, monkeypatch, capsys):
    """And what else --resume finds: other options, a finished run, another script's, none."""
    monkeypatch.chdir(shop)
    args = [*(TRAIN if script == "reward_model" else TINY), *SMALL.get(script, ())]
    cut = [*args, "--out", "cut/x.pt", "--resume"]
    assert main(script, *args, "--out", "whole/x.pt") == 0
    save = State.save

    def save_and_die(self, *rest):
        save(self, *rest)
        self.run.files.record({"step": self.run.step + 2, "line": "after the saved state"})
        raise Stopped("killed")

    with monkeypatch.context() as m:
        m.setattr(State, "save", save_and_die)
        assert main(script, *args, "--save-every", 2, "--out", "cut/x.pt") == 1
    assert main(script, *cut, "--lr", "0.5") == 2
    assert "cut/x.state belongs to an interrupted run with --lr" in capsys.readouterr().err
    assert main(script, *cut) == 0
    assert "resumed after step 2 of 3" in capsys.readouterr().out
    same_run(shop / "cut/x.pt", shop / "whole/x.pt")
    assert len(step_lines(shop / "cut/x.jsonl")) == 3
    before = snapshot(shop)
    assert main(script, *cut) == 0
    assert "this run has finished" in capsys.readouterr().out
    assert main(script, *cut, "--lr", "0.5") == 2
    assert "cut/x.pt belongs to a finished run with --lr" in capsys.readouterr().err
    other = "sft" if script == "dpo" else "dpo"
    assert main(other, *TINY, "--out", "cut/x.pt", "--resume") == 2
    assert f"cut/x.pt belongs to a finished run of {script}.py" in capsys.readouterr().err
    assert snapshot(shop) == before
    assert main(script, *args, "--out", "fresh/x.pt", "--resume") == 0
    assert "starts afresh" in capsys.readouterr().out


@pytest.mark.parametrize(
    "command, changed",
    [("dpo --init ends.pt", "ends.pt"), ("sft --task s.jsonl", "s.jsonl")]
    + [("sft --task s.jsonl --eval-file t.jsonl", "t.jsonl"), ("dpo", "out/reviews/sft.pt")]
    + [("grpo --init ends.pt --reward judge.pt", "judge.pt")],
)
def test_a_start_that_has_changed_is_not_resumed(command, changed, shop, monkeypatch, capsys):
    """A byte more in a file that the run reads is enough."""
    monkeypatch.chdir(shop)
    rows = [{"prompt": f"{i}", "completion": f"{i}"} for i in range(60)]
    write(shop / "s.jsonl", rows)
    write(shop / "t.jsonl", rows)
    script, *args = [*command.split(), *TINY, "--save-every", "1", "--out", "cut/x.pt"]
    killed(3, script, args, monkeypatch)
    before = (shop / changed).read_bytes()
    (shop / changed).write_bytes(before + b"\n")
    assert main(script, *args, "--resume") == 2
    said = capsys.readouterr().err
    assert (
        f"belongs to an interrupted run that read another {changed}; start without --resume" in said
    )
    (shop / changed).write_bytes(before)
    assert main(script, *args, "--resume") == 0


def test_an_older_run_s_state_is_never_resumed(shop, monkeypatch, capsys):
    """A fresh run that is killed before its first save leaves no state; that it replaces one, it
    says."""
    monkeypatch.chdir(shop)
    args = [*TINY, "--out", "cut/x.pt"]
    killed(3, "dpo", [*args, "--save-every", 1], monkeypatch)
    assert (shop / "cut/x.state").exists()
    killed(2, "dpo", args, monkeypatch)
    assert (
        "the state that an interrupted run left in cut/x.state is replaced"
        in capsys.readouterr().out
    )
    assert not (shop / "cut/x.state").exists()
    assert main("dpo", *args, "--resume") == 0
    assert "starts afresh" in capsys.readouterr().out


@pytest.mark.parametrize("script", quick(SAMPLING, "ppo"))
def test_resume_from_the_middle_of_a_rollout(script, ends, monkeypatch):
    """Killed between two optimizer steps of the third rollout, after new responses were drawn: the
    same bits as without."""
    monkeypatch.chdir(ends)
    args = [*TINY, *ROLLOUTS.split(), "--save-every", 1]
    assert main(script, *args, "--out", "whole/y.pt") == 0
    killed(2 * 4 + 3, script, [*args, "--out", "cut/y.pt"], monkeypatch)
    assert torch.load("cut/y.state", weights_only=True)["step"] == 2
    assert main(script, *args, "--out", "cut/y.pt", "--resume") == 0
    same_run(ends / "cut/y.pt", ends / "whole/y.pt")


def test_resume_from_the_middle_of_a_round(ends, monkeypatch):
    """Killed in the second step of a round, after the round's pairs were drawn; and in its first,
    whose state is that before the draw."""
    monkeypatch.chdir(ends)
    args = [*TINY, *SMALL["online_dpo"], *"--steps 6 --warmup 0 --save-every 1".split()]
    assert main("online_dpo", *args, "--out", "whole/z.pt") == 0
    for at in (5, 4):
        cut = [*args, "--out", f"cut{at}/z.pt"]
        killed(at, "online_dpo", cut, monkeypatch)
        state = torch.load(f"cut{at}/z.state", weights_only=True)
        assert state["step"] == at - 1 and state["round"]["first"] == (3 if at == 5 else 0)
        assert main("online_dpo", *cut, "--resume") == 0
        same_run(ends / f"cut{at}/z.pt", ends / "whole/z.pt")


FRAGILE = """
calls = 0

def odd(prompt, completion):
    global calls
    calls += 1
    assert calls < LIMIT, "out of service"
    return 1.0 if len(completion) % 2 else -1.0
"""


@pytest.mark.parametrize("script", quick([*SAMPLING, "online_dpo"], "ppo"))
def test_a_reward_that_raises_costs_no_step_that_was_done(script, shop, monkeypatch, capsys):
    """It raises in the third step: what was learned until then is kept, although no save was due.
    Once it is mended, --resume gives the bits of a run in which it never raised."""
    monkeypatch.chdir(shop)
    monkeypatch.setattr("sys.dont_write_bytecode", True)
    args = [*TINY, *"--init ends.pt --reward fragile.py:odd".split()]
    args += "--minibatches 2 --group 4".split() if script in SAMPLING else []
    once = 4 * (4 if script in SAMPLING else 2)  # calls a step; four more before the training
    fragile = shop / "fragile.py"
    fragile.write_text(FRAGILE.replace("LIMIT", "10**9"))
    assert main(script, *args, "--out", "whole/x.pt") == 0
    fragile.write_text(FRAGILE.replace("LIMIT", str(4 + 2 * once + 2)))
    assert main(script, *args, "--out", "cut/x.pt") == 2
    said = capsys.readouterr()
    assert "--reward fragile.py:odd raised AssertionError (out of service, line 7) at" in said.err
    step = re.search(r"step (\d) is saved in cut/x.state; --resume goes on from there", said.out)[1]
    assert step == "2" or script == "dapo" and step == "1"  # which samples until groups are mixed
    fragile.write_text(FRAGILE.replace("LIMIT", "10**9") + "\n# mended\n")
    assert main(script, *args, "--out", "cut/x.pt", "--resume") == 0
    assert f"resumed after step {step} of 3" in capsys.readouterr().out
    same_run(shop / "cut/x.pt", shop / "whole/x.pt")


def test_a_loss_that_is_not_finite_keeps_the_last_good_state(shop, monkeypatch, capsys):
    """And it can be resumed, as if nothing had been wrong."""
    monkeypatch.chdir(shop)
    assert main("dpo", *TINY, "--out", "whole/dpo.pt") == 0
    loss, calls = dpo.dpo_loss, []

    def broken(*args):
        calls.append(1)
        return loss(*args) * (float("nan") if len(calls) > 2 else 1.0)

    with monkeypatch.context() as m:
        m.setattr(dpo, "dpo_loss", broken)
        assert main("dpo", *TINY, "--out", "nan/dpo.pt") == 1
    said = capsys.readouterr().err
    assert (
        "step 3: the loss is nan" in said and "the last good state is kept in nan/dpo.state" in said
    )
    state = torch.load(shop / "nan/dpo.state", weights_only=True)
    assert state["step"] == 2 and all(torch.isfinite(p).all() for p in state["policy"].values())
    assert not (shop / "nan/dpo.pt").exists()
    assert main("dpo", *TINY, "--out", "nan/dpo.pt", "--resume") == 0
    same_run(shop / "nan/dpo.pt", shop / "whole/dpo.pt")


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_ten_kills(script, shop):
    """kill -9 at ten random moments, each followed by --resume: the checkpoint is that of a run
    left alone, bit for bit."""
    args = "--steps 40 --batch-size 4 --log-every 1 --save-every 3 --device cpu".split()
    args += SMALL.get(script, []) + ([] if script == "reward_model" else ["--max-new-tokens", "4"])
    cut, began = [*args, "--out", "cut/x.pt", "--resume"], time.time()
    run(f"{script}.py", *args, "--out", "whole/x.pt", cwd=shop)
    wall, rng, kills = time.time() - began, random.Random(0), 0
    while kills < 10:
        process, began = start(f"{script}.py", cut, shop), time.time()
        try:
            process.communicate(timeout=rng.uniform(0.5, 1.0) * wall)
            wall = time.time() - began  # the machine is less busy than it was
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            kills += 1
        if (shop / "cut/x.pt").exists() and not (shop / "cut/x.state").exists():
            assert (shop / "cut/x.pt").read_bytes() == (shop / "whole/x.pt").read_bytes()
            shutil.rmtree(shop / "cut")  # it got through: once more from the start
    run(f"{script}.py", *cut, cwd=shop)
    same_run(shop / "cut/x.pt", shop / "whole/x.pt")
    assert files_in(shop / "cut") == ["x.jsonl", "x.pt"]


# ---- a device that is not here


def test_a_device_becomes_the_current_one(monkeypatch):
    """Streams and graphs are those of the current device, and not of cuda:0."""
    chosen = []
    monkeypatch.setattr(torch, "zeros", lambda *_, device: None)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert [choose_device(name, "float32")[0].index for name in ("cuda:1", "cuda")] == [1, None]
    assert chosen == [1, 0]


def test_no_clock_is_read_before_the_device_is_done(monkeypatch):
    waits, now = [], []
    monkeypatch.setattr(torch.mps, "synchronize", lambda: waits.append(len(now)))
    monkeypatch.setattr("time.perf_counter", lambda: now.append(0) or float(len(now)))
    figures = Figures(torch.device("mps"))
    waits.clear(), now.clear()
    figures.begin_step()
    with figures.clock("sample"):
        pass
    figures.end_update()
    figures.end_step(timed=True)
    assert (
        waits == [0, 1, 2, 3]
        and figures.seconds == 3.0
        and figures.times == [{"step": 3.0, "sample": 1.0}]
    )


def test_a_first_step_is_not_timed_if_a_later_one_is():
    figures = Figures(torch.device("cpu"))
    figures.times = [{"step": 100.0, "sample": 50.0, "update": 9.0}, {"step": 1.0, "update": 0.5}]
    figures.times.append({"step": 3.0, "update": 1.5})
    figures.tokens = 30
    expected = {"step_ms": 2e3, "update_ms": 1e3, "sample_ms": 5e4, "tokens_per_s": 5.0}
    assert figures.medians(3, 1) == expected
    del figures.times[1:]
    assert figures.medians(1, 1)["step_ms"] == 1e5

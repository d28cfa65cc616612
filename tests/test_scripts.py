"""The scripts as their user meets them: figures, files, gradients, mistakes."""
import argparse
import ast
import dataclasses
import json
import math
import os
import re
import shutil
import sys

import pytest
import torch
from conftest import ROOT, TINY, TRAIN, documented, lines, main, run

import common
import dapo
import data
import dpo
import grpo
import kto
import online_dpo
import orpo
import ppo
import reward_model
import rlaif
import sft
import simpo
from gpt import GPT, GPTConfig, ScalarGPT, load, save

METHODS = {"sft": sft, "reward_model": reward_model, "ppo": ppo, "dpo": dpo, "simpo": simpo, "orpo": orpo, "kto": kto,
           "online_dpo": online_dpo, "grpo": grpo, "dapo": dapo, "rlaif": rlaif}  # fmt: skip
OURS = {p.stem for p in ROOT.glob("*.py")} | {"data"}


def snapshot(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# ---- the house


def imports(path):
    out = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            out |= {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            out.add(node.module.split(".")[0])
    return out


def test_imports_go_down_the_floors():
    ground = {"gpt.py": {"torch"}, "common.py": {"torch", "tqdm"}, "memory.py": {"torch"}}
    below = {"evaluate.py": {"gpt", "data", "common"}, "compare.py": {"common"}}
    methods = {"gpt", "common", "memory", "data", "evaluate"}
    for path in [*ROOT.glob("*.py"), *ROOT.glob("data/*.py")]:
        found = {name for name in imports(path) if name not in sys.stdlib_module_names}
        ours, others = found & OURS, found - OURS
        assert others <= {"torch", "tiktoken", "tqdm", "numpy"} | ({"matplotlib"} if path.name == "compare.py" else set())
        if path.parent.name == "data":
            assert ours <= {"data"} and others <= {"torch", "numpy", "tiktoken"}, path
        elif path.name in ground:
            assert not ours and others <= ground[path.name], path
        else:
            assert ours <= below.get(path.name, methods), path


@pytest.mark.parametrize("name", METHODS)
def test_every_option_is_read_and_explained(name, capsys):
    source = "".join((ROOT / f"{file}.py").read_text() for file in (name, "common", "evaluate"))
    for field in dataclasses.fields(METHODS[name].Options):
        assert re.search(rf"\bo\.{field.name}\b", source) or f'"{field.name}"' in source, f"--{field.name} is never read"
    assert main(name, "--help") == 0
    text = capsys.readouterr().out
    for field in dataclasses.fields(METHODS[name].Options):
        assert f"--{field.name.replace('_', '-')}" in text
    assert "%(" not in text and "%%" not in text


def test_readme_agrees_with_the_files():
    readme = (ROOT / "README.md").read_text()
    assert len(readme.splitlines()) < 250
    for name in METHODS:
        code = len((ROOT / f"{name}.py").read_text().splitlines())
        row = re.search(rf"^\| \[?`{name}\.py`.*$", readme, re.M)
        assert row and int(re.findall(r"\d+", row[0].split("|")[-2])[0]) == code, f"{name}.py has {code} lines"
    for command in re.findall(r"^python (\w+)\.py([^#\n]*)", readme, re.M):
        assert (ROOT / f"{command[0]}.py").exists()
        if command[0] in METHODS:
            names = {f"--{f.name.replace('_', '-')}" for f in dataclasses.fields(METHODS[command[0]].Options)}
            assert set(re.findall(r"--[\w-]+", command[1])) <= names, command


# ---- runs


def test_dpo_end_to_end(tiny, tmp_path):
    """Exit code, documented finite figures, a checkpoint that reloads, a changed policy, an unchanged reference, evaluate.py."""
    shutil.copytree(tiny / "out", tmp_path / "out")
    before = snapshot(tmp_path)
    done = run("dpo.py", *TINY, "--eval-every", 2, cwd=tmp_path)
    assert "gold reward" in done.stdout and "reference |" in done.stdout and "sft on reviews, 3 steps" in done.stdout
    assert all((p.read_bytes() == content) for p, content in before.items()) and not list(tmp_path.rglob("*.tmp"))
    folder = tmp_path / "out/reviews"
    assert sorted(p.name for p in folder.iterdir()) == ["dpo.jsonl", "dpo.pt", "sft.jsonl", "sft.pt"]

    first, *steps, last = lines(folder / "dpo.jsonl")
    assert first["options"]["beta"] == 0.1 and first["versions"]["torch"] == torch.__version__
    assert [line["step"] for line in steps] == [1, 2, 2, 3]
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=1e-6) and steps[0]["rewards/accuracies"] == 0.0  # π = π_ref
    final = last["final"]
    figures = {"reward", "ref_reward", "win_rate", "kl", "kl_se", "length", "entropy", "ended", "step_ms", "tokens_per_s", "wall_s",
               "flops_per_token"}  # fmt: skip
    assert figures <= set(final) and all(math.isfinite(final[k]) for k in figures)
    assert [(m["role"], m["trainable"]) for m in final["models"]] == [("policy", True), ("ref", False)]
    documented(steps, final)

    policy, meta = load(folder / "dpo.pt")
    start, _ = load(folder / "sft.pt")
    assert meta["reference"] == "out/reviews/sft.pt" and meta["method"] == "dpo"
    assert any(not torch.equal(a, b) for a, b in zip(policy.parameters(), start.parameters()))
    again = run("evaluate.py", "out/reviews/dpo.pt", "--device", "cpu", cwd=tmp_path).stdout
    assert re.search(rf"KL\(π‖π_ref\), nats a response +{final['kl']:.2f} ", again)
    answer = run("evaluate.py", "out/reviews/dpo.pt", "--prompt", "A drama, The Last Road:", "--device", "cpu", cwd=tmp_path).stdout
    assert "A drama, The Last Road:" in answer and "policy |" in answer


@pytest.mark.parametrize("script, stages", [("dpo", ["sft"]), ("ppo", ["sft", "reward_model"])])
def test_missing_checkpoints_are_made_first(script, stages, tmp_path, monkeypatch):
    """dpo.py starts sft.py of the same task itself, and ppo.py reward_model.py too, passing on the device and precision only."""
    monkeypatch.chdir(tmp_path)
    calls = []

    class Process:
        def __init__(self, args, **more):
            calls.append([str(a) for a in args[1:]])
            shape = ["--n-layer", 1, "--n-head", 1, "--n-embd", 8, *TINY] if len(calls) == 1 else TRAIN
            self.returncode = main(stages[len(calls) - 1], *shape)

        def poll(self):
            return self.returncode

    monkeypatch.setattr(common, "_commit", lambda: "")
    monkeypatch.setattr(common.subprocess, "Popen", Process)
    assert main(script, *TINY) == 0
    assert calls == [[str(ROOT / f"{stage}.py"), "--task", "reviews", "--device", "cpu", "--dtype", "auto"] for stage in stages]


def test_reward_model_end_to_end(tiny, tmp_path):
    """Documented finite figures, a checkpoint that reloads, demonstrations that average 0, an SFT checkpoint left as it was."""
    shutil.copytree(tiny / "out", tmp_path / "out")
    before = snapshot(tmp_path)
    done = run("reward_model.py", *TRAIN, "--eval-every", 2, cwd=tmp_path)
    assert "held-out preference accuracy" in done.stdout and "the labels' noise allows 0.8" in done.stdout
    assert all((p.read_bytes() == content) for p, content in before.items()) and not list(tmp_path.rglob("*.tmp"))
    first, *steps, last = lines(tmp_path / "out/reviews/reward_model.jsonl")
    final = last["final"]
    names = {"accuracy", "accuracy_bound", "correlation", "margin", "mean_reward", "min_reward", "max_reward", "shift", "flops_per_token"}
    assert names <= set(final) and all(math.isfinite(final[k]) for k in names)
    assert final["min_reward"] < final["mean_reward"] < final["max_reward"]
    assert [(m["role"], m["trainable"]) for m in final["models"]] == [("reward", True)]
    documented(steps, final)

    model, meta = load(tmp_path / "out/reviews/reward_model.pt")
    assert isinstance(model, ScalarGPT) and meta["shift"] == final["shift"] and meta["reference"] == "out/reviews/sft.pt"
    task, tokenizer = data.task("reviews"), data.Tokenizer(meta["tokenizer"])
    rows, _ = data.encode(task.demonstrations(1024, 0), tokenizer, 256)
    cpu = common.Compute(argparse.Namespace(device="cpu", dtype="float32"))
    assert abs(reward_model.scores(model, rows, cpu).mean()) < 1e-4 < abs(model.head.bias.item())
    refused = run("evaluate.py", "out/reviews/reward_model.pt", cwd=tmp_path, ok=False)
    assert refused.returncode == 2 and "is a reward model" in refused.stderr


def test_margin_and_soft_label_columns(tiny, tmp_path, call):
    """Columns `margin` and `p` reach the loss: with p = 0 throughout, the model learns to prefer the rejected answers."""
    shutil.copytree(tiny / "out", tmp_path / "out")
    rows = [{"prompt": f"question {i}", "chosen": "yes yes", "rejected": "no", "p": 0.0, "margin": 0.5} for i in range(60)]
    (tmp_path / "soft.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert data.task(str(tmp_path / "soft.jsonl")).preferences(None, 0, graded=True)[0][3:] == (0.5, 0.0)
    call("reward_model", "--task", "soft.jsonl", "--init", "out/reviews/sft.pt", "--steps", 40, "--warmup", 0, "--lr", 0.01,
        "--device", "cpu", "--log-every", 1, cwd=tmp_path)  # fmt: skip
    first, *_, final = lines(tmp_path / "out/soft/reward_model.jsonl")[1:]
    assert first["loss"] == pytest.approx(math.log(1 + math.exp(-0.5)), abs=0.2)  # -log σ(m - Δ) at Δ near 0
    assert final["final"]["margin"] < 0 and final["final"]["accuracy"] == 1.0 and "correlation" not in final["final"]


HELD = {"simpo": [("policy", True)], "orpo": [("policy", True)], "kto": [("policy", True), ("ref", False)]}


@pytest.mark.parametrize("name", HELD)
def test_simpo_orpo_and_kto_end_to_end(name, tiny, tmp_path):
    """Exit code, documented finite figures, the ledger's models, a checkpoint that reloads and evaluates to the same figures."""
    shutil.copytree(tiny / "out", tmp_path / "out")
    before = snapshot(tmp_path)
    shape = ["--n-layer", 1, "--n-embd", 16] if name == "orpo" else []
    done = run(f"{name}.py", *TINY, *shape, "--eval-every", 2, cwd=tmp_path)
    assert "gold reward" in done.stdout and "reference |" in done.stdout and f"models held: {len(HELD[name])}" in done.stdout
    assert all((p.read_bytes() == content) for p, content in before.items()) and not list(tmp_path.rglob("*.tmp"))
    first, *steps, last = lines(tmp_path / f"out/reviews/{name}.jsonl")
    final = last["final"]
    figures = {"reward", "ref_reward", "win_rate", "kl", "kl_se", "length", "entropy", "ended", "step_ms", "flops_per_token"}
    assert figures <= set(final) and all(math.isfinite(final[k]) for k in figures)
    assert [(m["role"], m["trainable"]) for m in final["models"]] == HELD[name]
    documented(steps, final)
    if name == "kto":  # at step 0 π = π_ref: rewards and ẑ are 0, the loss is λ/2
        assert steps[0]["loss"] == pytest.approx(0.5) and steps[0]["kl"] == 0.0
    again = run("evaluate.py", f"out/reviews/{name}.pt", "--device", "cpu", cwd=tmp_path).stdout
    assert re.search(rf"KL\(π‖π_ref\), nats a response +{final['kl']:.2f} ", again)


@pytest.mark.parametrize("name, held", [("grpo", [("policy", True), ("ref", False)]), ("dapo", [("policy", True)]),
                                        ("ppo", [("policy", True), ("critic", True), ("ref", False)])])  # fmt: skip
def test_ppo_grpo_and_dapo_end_to_end(name, held, ends, tmp_path):
    """Exit code, documented finite figures, the ledger's models, the step's time by part, a checkpoint that evaluates to the same."""
    for name_ in ("ends.pt", "judge.py"):
        shutil.copy(ends / name_, tmp_path)
    before = snapshot(tmp_path)
    args = ["--init", "ends.pt", *TINY, "--group", 4, "--eval-every", 2, "--reward", "judge.py:odd"]
    done = run(f"{name}.py", *args, cwd=tmp_path, env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"})
    assert "reward  " in done.stdout and "reference |" in done.stdout and f"models held: {len(held)}" in done.stdout
    assert all((p.read_bytes() == content) for p, content in before.items()) and not list(tmp_path.rglob("*.tmp"))
    first, *steps, last = lines(tmp_path / f"out/reviews/{name}.jsonl")
    final = last["final"]
    figures = {"reward", "ref_reward", "win_rate", "kl", "kl_se", "length", "entropy", "ended", "step_ms", "flops_per_token",
               "sampled_tokens", "sample_ms", "logprobs_ms", "update_ms"}  # fmt: skip
    assert figures <= set(final) and all(math.isfinite(final[k]) for k in figures)
    assert [(m["role"], m["trainable"]) for m in final["models"]] == held
    assert final["sample_ms"] + final["logprobs_ms"] + final["update_ms"] < 1.5 * final["step_ms"]
    documented(steps, final)
    log = [line for line in steps if "loss" in line]
    assert log[0]["sampled_tokens"] < log[1]["sampled_tokens"] < log[2]["sampled_tokens"] == final["sampled_tokens"]
    assert name != "grpo" or log[0]["clip_ratio/low_mean"] == 0.0
    assert name != "dapo" or log[0]["kept_fraction"] > 0
    assert name != "ppo" or log[0]["kl"] == 0.0 and log[0]["rlhf_reward"] == pytest.approx(log[0]["reward"])  # π = π_ref
    again = run("evaluate.py", f"out/reviews/{name}.pt", "--device", "cpu", cwd=tmp_path).stdout
    assert re.search(rf"KL\(π‖π_ref\), nats a response +{final['kl']:.2f} ", again)


def test_kto_s_reference_point_sees_the_whole_batch(tiny, monkeypatch):
    """ẑ is one number for the step, from mismatched pairs of all 64 rows, whatever the micro-batch. Not clamped here, lest all be 0."""
    monkeypatch.chdir(tiny)
    seen = []
    loss = kto.kto_loss
    monkeypatch.setattr(kto, "kto_kl", lambda logp, ref_logp: (logp - ref_logp).mean())
    monkeypatch.setattr(kto, "kto_loss", lambda *args: (seen.append(args[3].item()), loss(*args))[1])
    common_args = ["--steps", 2, "--warmup", 0, "--lr", 0.01, "--max-new-tokens", 4, "--dtype", "float64", "--device", "cpu"]
    for micro in (64, 16):
        assert main("kto", *common_args, "--micro-batch", micro, "--out", "z/kto.pt") == 0
    whole, cut = seen[:2], seen[2:]
    assert len(cut) == 8 and cut[:4] == [0.0] * 4 and len(set(cut[4:])) == 1
    assert cut[4] == pytest.approx(whole[1], rel=1e-6) and abs(whole[1]) > 1e-3


def means(model, rows, prompt_too=False):
    """(prompt, response) rows -> log π(y|x) a token by the plain formula; with the prompt, of all tokens but the first."""
    out = []
    for x, y in rows:
        logp = model(torch.tensor([[*x, *y]]))[0, :-1].log_softmax(-1).gather(1, torch.tensor([*x, *y])[1:, None])[:, 0]
        out.append(logp.mean() if prompt_too else logp[-len(y) :].mean())
    return torch.stack(out)


@pytest.mark.parametrize("name, options", [("simpo", ["--beta", 3, "--gamma-beta-ratio", 0.4]), ("simpo", ["--sft-weight", 0.5]),
                                           ("orpo", ["--lam", 2]), ("orpo", ["--prompt-loss"])])  # fmt: skip
def test_the_first_step_s_loss_is_the_equation_s(name, options, tiny, monkeypatch):
    """The loop's loss on its first 8 pairs, against the equation in the file's docstring with log-probs from plain logits."""
    monkeypatch.chdir(tiny)
    args = ["--init", "out/reviews/sft.pt", "--steps", 1, "--batch-size", 8, "--max-new-tokens", 4, "--dtype", "float64", "--log-every", 1]
    assert main(name, *args, *options, "--device", "cpu", "--out", "first/x.pt") == 0
    logged = lines(tiny / "first/x.jsonl")[1]
    model, meta = load("out/reviews/sft.pt")
    tokenizer = data.Tokenizer(meta["tokenizer"])
    pairs = data.Batches(data.task("reviews").preferences, 0, 8, 0, tokenizer, 256)[0]
    with torch.no_grad():
        w, l = (means(model.double(), [(row[0], row[i]) for row in pairs]) for i in (1, 2))
        whole = means(model, [(row[0], row[1]) for row in pairs], prompt_too=True)
    if name == "simpo":
        beta, gamma, sft_weight = (3, 1.2, 0) if "--beta" in options else (2, 1, 0.5)
        loss = torch.log1p(torch.exp(gamma - beta * (w - l))) - sft_weight * w
    else:
        odds_w, odds_l = (p / (1 - p) for p in (w.exp(), l.exp()))
        loss = (-whole if "--prompt-loss" in options else -w) + (2 if "--lam" in options else 0.1) * torch.log(1 + odds_l / odds_w)
    assert logged["loss"] == pytest.approx(loss.mean().item(), rel=1e-9)


def test_kto_warns_of_imbalance(tiny, tmp_path, call):
    """λ_D n_D / (λ_U n_U): 40 to 20 is 2, outside [1, 4/3]; with --w-undesirable 1.6 it is 1.25."""
    shutil.copytree(tiny / "out", tmp_path / "out")
    rows = [{"prompt": f"q{i}", "completion": "a b c", "label": i % 3 > 0} for i in range(60)]
    (tmp_path / "l.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    args = ["--task", "l.jsonl", "--init", "out/reviews/sft.pt", "--eval-file", "l.jsonl", *TINY]
    done = call("kto", *args, cwd=tmp_path)
    assert "warning: 40 desirable and 20 undesirable examples make λ_D n_D / (λ_U n_U) = 2, outside [1, 4/3]" in done
    assert 0 <= lines(tmp_path / "out/l/kto.jsonl")[-1]["final"]["accuracy"] <= 1
    assert "warning" not in call("kto", *args, "--w-undesirable", 1.6, cwd=tmp_path)
    assert "warning" not in call("kto", *TINY, cwd=tmp_path)


def test_odd_but_legal_feedback(tiny, tmp_path, call):
    """Held-out rows of one label, training rows of one class, a labelled --eval-file for pairs: each runs, and says what is left out."""
    shutil.copytree(tiny / "out", tmp_path / "out")
    rows = [{"prompt": f"q{i}", "completion": f"answer {i}", "label": True} for i in range(30)]
    (tmp_path / "good.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (tmp_path / "both.jsonl").write_text("".join(json.dumps(r | {"label": i % 2 == 0}) + "\n" for i, r in enumerate(rows)))
    pairs = [{"prompt": f"p{i}", "chosen": "a", "rejected": "b", "label": "a column of one's own"} for i in range(30)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in pairs))
    init = ["--init", "out/reviews/sft.pt", *TINY]
    done = call("kto", "--task", "good.jsonl", *init, cwd=tmp_path)
    assert "accuracy will be left out" in done and "examples are desirable" in done
    record = lines(tmp_path / "out/good/kto.jsonl")
    assert "accuracy" not in record[-1]["final"] and "rewards/rejected" not in record[1] and "rewards/chosen" in record[1]
    done = call("kto", "--task", "pairs.jsonl", "--eval-file", "both.jsonl", *init, "--pairs", 8, cwd=tmp_path)
    assert "4 pairs are split into 8 examples (train split)" in done and "held-out preference accuracy" in done
    call("dpo", "--task", "pairs.jsonl", *init, cwd=tmp_path)
    assert "its desirable answers are the demonstrations" in call("sft", "--task", "both.jsonl", *init, cwd=tmp_path)


def test_files_of_pairs_train_the_whole_family(tiny, tmp_path, call):
    """simpo.py, orpo.py and kto.py on one file of pairs, each with a held-out accuracy; KTO says that it splits them."""
    shutil.copytree(tiny / "out", tmp_path / "out")
    rows = [{"prompt": f"What is {i}?", "chosen": f"It is {i}.", "rejected": "No idea"} for i in range(60)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    for name in HELD:
        done = call(name, "--task", "p.jsonl", "--init", "out/reviews/sft.pt", *TINY, cwd=tmp_path)
        assert "held-out preference accuracy" in done
        assert ("pairs are split into" in done) == (name == "kto")
        assert 0 <= lines(tmp_path / f"out/p/{name}.jsonl")[-1]["final"]["accuracy"] <= 1


def test_exact_figures_are_documented(tmp_path, call):
    call("sft", "--task", "exact", "--steps", 3, "--batch-size", 8, "--device", "cpu", cwd=tmp_path)
    call("dpo", "--task", "exact", "--steps", 3, "--batch-size", 8, "--device", "cpu", cwd=tmp_path)
    call("reward_model", "--task", "exact", "--steps", 3, "--batch-size", 8, "--device", "cpu", cwd=tmp_path)
    for name, keys in {"dpo": {"kl_star", "tv_star", "kl_optimum", "objective", "kl", "win_rate"}, "reward_model": {"rms"}}.items():
        first, *steps, last = lines(tmp_path / f"out/exact/{name}.jsonl")
        assert keys <= set(last["final"]) and (first["options"]["n_embd"] == 64 if name == "sft" else True)
        documented(steps, last["final"])
    assert load(tmp_path / "out/exact/sft.pt")[0].config == GPTConfig(4, 8, 2, 4, 64)
    assert lines(tmp_path / "out/exact/dpo.jsonl")[0]["options"]["beta"] == 0.5


def test_real_text(tmp_path, call):
    """sft.py then dpo.py on JSONL files: held-out loss, held-out accuracy, rows cut aloud."""
    rows = [{"prompt": f"What is {i} plus {i}?", "completion": f"It is {2 * i}."} for i in range(60)]
    (tmp_path / "s.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    rows = [{"prompt": f"What is {i}?", "chosen": f"It is {i}.", "rejected": "No idea at all" * (1 + i % 9)} for i in range(60)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    done = call("sft", "--task", "s.jsonl", *TINY, "--n-layer", 1, "--n-embd", 16, "--block-size", 64, cwd=tmp_path)
    assert "held-out loss, nats a token" in done
    done = call("dpo", "--task", "p.jsonl", "--init", "out/s/sft.pt", *TINY, "--truncate", cwd=tmp_path)
    assert "held-out preference accuracy" in done and re.search(r"\d+ of \d+ rows are cut to 64 tokens", done)
    final = lines(tmp_path / "out/p/dpo.jsonl")[-1]["final"]
    assert 0 <= final["accuracy"] <= 1 and "reward" not in final
    epoch = call("dpo", "--task", "p.jsonl", "--init", "out/s/sft.pt", "--truncate", "--batch-size", 8, "--epochs", 2, "--precompute-ref",
                "--max-new-tokens", 4, "--loss", "ipo", "--out", "out/ipo.pt", cwd=tmp_path)  # fmt: skip
    assert "models held: 1" in epoch
    record = lines(tmp_path / "out/ipo.jsonl")
    n = 60 - len({r["prompt"] for r in rows} & test_prompts(tmp_path / "p.jsonl"))
    assert record[-2]["step"] == 2 * (n // 8 + (n % 8 > 1))


def test_prompts(path):
    return {p for p, _ in data.task(str(path)).prompts(None, 0, split="test")}


test_prompts.__test__ = False


@pytest.mark.parametrize("script, options", [("sft", []), ("dpo", []), ("dpo", ["--loss", "ipo"]), ("dpo", ["--sft-weight", "0.5"]),
                                             ("reward_model", ["--center-rewards", "0.1"]), ("simpo", ["--sft-weight", "0.5"]),
                                             ("orpo", ["--lam", "0.5"]), ("orpo", ["--prompt-loss"]), ("kto", []),
                                             ("grpo", ["--agg", "seq_mean"]), ("grpo", ["--agg", "token_mean", "--kl", "k3-ratio"]),
                                             ("grpo", ["--agg", "const", "--kl", "reward"]), ("grpo", ["--ratio", "seq"]),
                                             ("dapo", []), ("dapo", ["--overlong-filter"]), ("ppo", []),
                                             ("online_dpo", ["--label", "argmax"]), ("online_dpo", ["--loss", "ipo"])])  # fmt: skip
def test_micro_batches_give_the_same_gradient(script, options, ends, monkeypatch):
    """64 ragged rows at once and in eights, float64: the gradients agree to 1e-6 of their norm, and so do the metrics. Of ppo, grpo and
    dapo the second of two optimizer steps, where the ratio is not 1 and π is not π_ref."""
    monkeypatch.chdir(ends)
    seen, step_, late = [], common.Run.update, script in ("ppo", "grpo", "dapo")
    if script == "online_dpo":
        options = [*options, "--init", "ends.pt", "--reward", "judge.py:odd", "--max-new-tokens", 8]
    if late:
        options = [*options, "--init", "ends.pt", "--reward", "judge.py:odd", "--group", 4, "--minibatches", 2, "--updates", 1,
                   "--lr", 0.01, "--warmup", 0, "--max-new-tokens", 8, "--batch-size", 32]  # fmt: skip

    def update(self, step, model, optimizer, share=1.0):
        if late and not seen[-1:] == ["first"]:
            seen.append("first")
            return step_(self, step, model, optimizer, share)
        if late:
            seen.pop()
        seen.append((torch.cat([p.grad.flatten() for p in model.parameters()]), {k: float(v) for k, v in self.sums.items()}))
        raise common.Stopped("seen")

    monkeypatch.setattr(common.Run, "update", update)
    for micro in (64, 8):
        code = main(script, "--batch-size", 64, *options, "--micro-batch", micro, "--dtype", "float64", "--out", "micro/x.pt")
        assert code == 1
    (a, metrics), (b, again) = seen
    assert a.dtype == torch.float64 and a.norm() > 1e-6 and (a - b).norm() <= 1e-6 * a.norm()
    assert metrics == pytest.approx(again, rel=1e-6 if late else 1e-9)  # counts over tokens are float32


def test_bfloat16_on_cpu_and_policy_equals_reference(tiny, monkeypatch):
    """Under autocast with float32 master weights, policy and frozen bfloat16 reference agree to the bit at step 0: the loss is log 2."""
    monkeypatch.chdir(tiny)
    assert main("dpo", *TINY, "--dtype", "bfloat16", "--out", "bf/dpo.pt") == 0
    first, step, *_ = lines(tiny / "bf/dpo.jsonl")
    assert step["rewards/margins"] == 0.0 and step["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["models"][1]["weight_bytes"] < first["models"][0]["weight_bytes"]
    assert all(p.dtype == torch.float32 for p in load("bf/dpo.pt")[0].parameters())


def test_a_frozen_reward_model_scores_as_its_original_in_bfloat16():
    """Its head stays in float32: bfloat16 would round its weights, and the shift in its bias."""
    compute = common.Compute(argparse.Namespace(device="cpu", dtype="bfloat16"))
    model, ids = ScalarGPT(GPTConfig(99, 64, 2, 2, 16), 0), torch.arange(48).view(4, 12)
    model.head.bias.data.fill_(-1.2345678)
    frozen = compute.frozen(model)
    with torch.no_grad(), compute.autocast():
        assert torch.equal(model.score(ids, ids >= 0), frozen.score(ids, ids >= 0))
    assert frozen.trunk.blocks[0].up.weight.dtype == torch.bfloat16 and frozen.head.weight.dtype == torch.float32


def test_precomputed_reference_changes_no_loss(tiny, monkeypatch):
    monkeypatch.chdir(tiny)
    logs = []
    for extra in ([], ["--precompute-ref"]):
        assert main("dpo", *TINY, "--pairs", 12, "--out", "pre/dpo.pt", *extra) == 0
        logs.append([line["loss"] for line in lines(tiny / "pre/dpo.jsonl") if "loss" in line])
    assert logs[0] == pytest.approx(logs[1], abs=1e-5) and len(logs[0]) == 3


def test_log_probs_of_the_end_token_are_trained(tiny):
    """After SFT on whole responses the model ends its samples; the mask that sft.py trains on holds the end token."""
    tokenizer = data.tokenizer()
    batches = data.Batches(data.task("reviews").demonstrations, 0, 4, 0, tokenizer, 128)
    batch = data.pad(batches[0])
    last = batch.ids[torch.arange(4), batch.mask.shape[1] - 1 - batch.mask.flip(1).int().argmax(1)]
    assert (last == tokenizer.end_id).all()


# ---- mistakes


def files(folder):
    """What the table below names."""
    (folder / "empty.jsonl").write_text("")
    good = json.dumps({"prompt": "p", "chosen": "a", "rejected": "b"})
    (folder / "broken.jsonl").write_text("\n".join([good] * 16 + ['{"prompt": ', good]))
    (folder / "array.jsonl").write_text(good + "\n[1]\n")
    (folder / "nocolumn.jsonl").write_text("".join(json.dumps({"prompt": f"{i}", "chosen": "a"}) + "\n" for i in range(9)))
    (folder / "number.jsonl").write_text("".join(json.dumps({"prompt": f"{i}", "chosen": "a", "rejected": 3}) + "\n" for i in range(9)))
    (folder / "noprompt.jsonl").write_text(json.dumps({"prompt": " ", "chosen": "a", "rejected": "b"}))
    (folder / "role.jsonl").write_text(json.dumps({"prompt": [{"role": "robot", "content": "x"}], "chosen": "a", "rejected": "b"}))
    (folder / "same.jsonl").write_text("".join(json.dumps({"prompt": f"{i}", "chosen": "a", "rejected": "a"}) + "\n" for i in range(9)))
    for name, column in {"p2": {"p": 2}, "pnull": {"p": None}, "margin": {"margin": "big"}, "huge": {"margin": 10**400}}.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"prompt": f"{i}", "chosen": "a", "rejected": "b", **column}) + "\n"
                                                      for i in range(9)))  # fmt: skip
    for name, label in {"label": lambda i: i % 2 == 0, "badlabel": lambda i: 1, "oneprompt": lambda i: i % 2 == 0}.items():
        row = (lambda i: "1") if name == "oneprompt" else str
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"prompt": row(i), "completion": f"{i}", "label": label(i)}) + "\n"
                                                      for i in range(60)))  # fmt: skip
    (folder / "one.jsonl").write_text(good)
    (folder / "long.jsonl").write_text("".join(json.dumps({"prompt": f"{i}" * 400, "chosen": "a", "rejected": "b"}) + "\n"
                                               for i in range(9)))  # fmt: skip
    (folder / "ok.jsonl").write_text("".join(json.dumps({"prompt": f"{i}", "chosen": "a", "rejected": "b"}) + "\n" for i in range(50)))
    (folder / "surrogate.jsonl").write_text(r'{"prompt": "\ud83d", "chosen": "a", "rejected": "b"}')
    (folder / "junk.jsonl").write_bytes(bytes(range(256)))
    (folder / "junk.jsonl.gz").write_bytes(b"no gzip")
    (folder / "a_file").write_text("")
    sft_pt = (folder / "out/reviews/sft.pt").read_bytes()
    (folder / "cut.pt").write_bytes(sft_pt[:5000])
    torch.save({"a": [1]}, folder / "pickle.pt")
    (folder / "text.pt").write_text("hello")
    small = GPT(GPTConfig(vocab_size=99, block_size=64, n_layer=1, n_head=1, n_embd=8))
    meta = load(folder / "out/reviews/sft.pt")[1]
    save(small, folder / "vocab.pt", **meta)
    world = data.task("exact")
    save(GPT(GPTConfig(4, 8, 1, 1, 8)), folder / "exact.pt", **(meta | {"tokenizer": world.tokenizer, "task": "exact"}))
    save(ScalarGPT(small.config), folder / "rm.pt", **meta)
    save(ScalarGPT(GPTConfig(4, 8, 1, 1, 8)), folder / "exact_rm.pt", **(meta | {"tokenizer": world.tokenizer, "task": "exact"}))
    (folder / "good.py").write_text("def f(prompt, completion): return 1")
    (folder / "syntax.py").write_text("def f(:")
    (folder / "wants.py").write_text("def f(prompt, completion, answer): return 1")
    (folder / "raises.py").write_text("def f(prompt, completion): raise KeyError('x')")
    (folder / "returns.py").write_text("def none(p, c): pass\ndef text(p, c): return '1'\ndef infinite(p, c): return float('inf')\n"
                                        "def one(completion): return 1\n"
                                        "def swapped(completion, prompt): return 1")  # fmt: skip
    (folder / "bad.tiktoken").write_text("not a vocabulary")
    (folder / "other.tiktoken").write_text((ROOT / "data/vocab.tiktoken").read_text().rsplit("\n", 2)[0] + "\n")


FILE = ["--init", "out/reviews/sft.pt", "--task"]
MISTAKES = [  # script, arguments, what the line must say
    ("dpo", ["--betta", "1"], "--betta"),
    ("dpo", ["--be", "1"], "--be"),
    ("dpo", ["--steps", "many"], "--steps: must be a whole number > 0, not 'many'"),
    ("dpo", ["--steps", "1.5"], "--steps"),
    ("dpo", ["--steps"], "--steps"),
    ("dpo", ["--beta", "0"], "--beta: must be a number > 0, not '0'"),
    ("dpo", ["--beta", "nan"], "--beta"),
    ("dpo", ["--lr", "-1"], "--lr"),
    ("dpo", ["--lr", "inf"], "--lr"),
    ("dpo", ["--label-smoothing", "0.5"], "--label-smoothing"),
    ("dpo", ["--loss", "kto"], "--loss"),
    ("dpo", ["--loss", "ipo", "--beta", "0.2"], "--beta is read by --loss dpo or --loss robust only"),
    ("dpo", ["--tau", "0.2"], "--tau is read by --loss ipo only"),
    ("dpo", ["--steps", "3", "--epochs", "2"], "--steps and --epochs"),
    ("dpo", ["--epochs", "2"], "--epochs"),
    ("dpo", ["--precompute-ref"], "--pairs"),
    ("dpo", ["--micro-batch", "5"], "--micro-batch 5 does not divide --batch-size 32"),
    ("dpo", ["--task", "reviewz"], "no such task"),
    ("dpo", ["--task", "arithmetic:x"], "arithmetic:1"),
    ("dpo", ["--eval-file", "ok.jsonl"], "--eval-file"),
    ("dpo", ["--device", "cuda:99"], "--device cpu always is"),
    ("dpo", ["--device", "abacus"], "--device"),
    ("dpo", ["--dtype", "int8"], "--dtype"),
    ("dpo", ["--out", "a_file/x.pt"], "--out a_file/x.pt cannot be written"),
    ("dpo", ["--out", "out"], "--out"),
    ("dpo", ["--out", "out/reviews/sft.pt", "--init", "out/reviews/sft.pt"], "would overwrite out/reviews/sft.pt"),
    ("dpo", ["--out", "out/reviews/sft.pt"], "would overwrite out/reviews/sft.pt"),
    ("sft", ["--task", "ok.jsonl", "--out", "ok.pt"], "would overwrite ok.jsonl"),
    ("dpo", ["--out", "new/"], "--out new/ is no place for a checkpoint"),
    ("dpo", ["--seed", "99999999999999999999"], "--seed"),
    ("sft", ["--block-size", "1"], "--block-size 1 leaves no room"),
    ("dpo", [*FILE, "surrogate.jsonl"], "surrogate.jsonl:1: not UTF-8 text"),
    ("dpo", ["--init", "none.pt"], "none.pt: no such file"),
    ("dpo", ["--init", "out"], "out is a directory"),
    ("dpo", ["--init", "cut.pt"], "not a whole checkpoint"),
    ("dpo", ["--init", "text.pt"], "not a whole checkpoint"),
    ("dpo", ["--init", "pickle.pt"], "not a checkpoint of these scripts"),
    ("dpo", ["--init", "vocab.pt"], "vocabulary of 99"),
    ("dpo", ["--tokenizer", "other.tiktoken"], "--tokenizer other.tiktoken is not that of"),
    ("dpo", ["--block-size", "512"], "--block-size 512 is more than the checkpoint's 256"),
    ("dpo", ["--block-size", "16"], "do not fit in 16 tokens"),
    ("dpo", ["--max-new-tokens", "255"], "--max-new-tokens"),
    ("dpo", ["--task", "ok.jsonl"], "--init is needed with a file"),
    ("dpo", [*FILE, "none.jsonl"], "none.jsonl: no such file"),
    ("dpo", [*FILE, "empty.jsonl"], "empty.jsonl is empty"),
    ("dpo", [*FILE, "broken.jsonl"], "broken.jsonl:17: not JSON"),
    ("dpo", [*FILE, "array.jsonl"], "array.jsonl:2: a row must be a JSON object, not a list"),
    ("dpo", [*FILE, "nocolumn.jsonl"], 'no column "rejected" (it has prompt, chosen)'),
    ("dpo", [*FILE, "number.jsonl"], '"rejected" must be a string or a list of messages, not a number'),
    ("dpo", [*FILE, "noprompt.jsonl"], "noprompt.jsonl:1: the prompt is empty"),
    ("dpo", [*FILE, "role.jsonl"], "role.jsonl:1:"),
    ("dpo", [*FILE, "same.jsonl"], "no usable row"),
    ("dpo", [*FILE, "same.jsonl", "--strict"], "--strict"),
    ("dpo", [*FILE, "one.jsonl"], "--eval-file"),
    ("dpo", [*FILE, "long.jsonl"], "do not fit in 256 tokens"),
    ("dpo", [*FILE, "junk.jsonl"], "junk.jsonl:1: not"),
    ("dpo", [*FILE, "junk.jsonl.gz"], "junk.jsonl.gz: cannot be read"),
    ("dpo", [*FILE, "data.jsonl"], "data.jsonl is a directory"),
    ("dpo", [*FILE, "ok.jsonl", "--eval-file", "none.jsonl"], "none.jsonl: no such file"),
    ("sft", ["--pairs", "3"], "--pairs"),
    ("sft", ["--init", "out/reviews/sft.pt", "--out", "out/x.pt", "--n-layer", "2"], "--n-layer"),
    ("sft", ["--n-embd", "30", "--n-head", "4"], "--n-embd 30 is not a multiple"),
    ("sft", ["--tokenizer", "none"], "--tokenizer none: no such file"),
    ("sft", ["--tokenizer", "bad.tiktoken"], "bad.tiktoken is no vocabulary file"),
    ("sft", ["--task", "number.jsonl", "--init", "vocab.pt"], "vocabulary of 99"),
    ("simpo", ["--gamma-beta-ratio", "-1"], "--gamma-beta-ratio"),
    ("simpo", ["--gamma", "1"], "--gamma"),
    ("simpo", ["--beta", "0"], "--beta"),
    ("simpo", ["--task", "ok.jsonl"], "--init is needed with a file"),
    ("simpo", [*FILE, "nocolumn.jsonl"], 'no column "rejected"'),
    ("simpo", ["--out", "out/reviews/sft.pt"], "would overwrite out/reviews/sft.pt"),
    ("simpo", ["--init", "rm.pt"], "rm.pt is a reward model"),
    ("orpo", ["--lam", "-0.1"], "--lam"),
    ("orpo", ["--init", "out/reviews/sft.pt", "--n-embd", "32"], "--n-embd shapes random weights"),
    ("orpo", ["--n-embd", "30"], "--n-embd 30 is not a multiple"),
    ("orpo", ["--task", "label.jsonl"], 'no column "chosen"'),
    ("orpo", ["--micro-batch", "5"], "--micro-batch 5 does not divide"),
    ("orpo", ["--task", "broken.jsonl"], "broken.jsonl:17: not JSON"),
    ("kto", ["--batch-size", "1"], "--batch-size 1: ẑ needs the answer to another prompt"),
    ("kto", ["--pairs", "1"], "the training rows have one prompt only"),
    ("kto", [*FILE, "oneprompt.jsonl", "--eval-file", "label.jsonl"], "the training rows have one prompt only"),
    ("kto", ["--w-desirable", "0"], "--w-desirable"),
    ("kto", ["--task", "label.jsonl"], "--init is needed with a file"),
    ("kto", [*FILE, "badlabel.jsonl"], '"label" must be true or false'),
    ("kto", [*FILE, "nocolumn.jsonl"], 'no column "label" (it has prompt, chosen); dpo.py, simpo.py or orpo.py can read such rows'),
    ("kto", ["--epochs", "2"], "--epochs"),
    ("dpo", [*FILE, "label.jsonl"], 'no column "chosen" (it has prompt, completion, label); kto.py can read such rows'),
    ("dpo", ["--task", "exact:2"], "no such task"),
    ("dpo", ["--task", "exact", "--init", "out/reviews/sft.pt"], "exact has a vocabulary of its own"),
    ("dpo", ["--task", "exact:1", "--init", "exact.pt"], "exact:1 has a vocabulary of its own"),
    ("dpo", ["--init", "exact.pt"], "exact.pt was trained on exact, and exact has a vocabulary of its own"),
    ("dpo", ["--task", "exact", "--init", "exact.pt", "--max-new-tokens", "5"], "--max-new-tokens 5: the responses of exact"),
    ("sft", ["--task", "exact", "--tokenizer", "other.tiktoken"], "exact has a vocabulary of its own; leave it out"),
    ("dpo", ["--init", "rm.pt"], "rm.pt is a reward model"),
    ("reward_model", ["--center-rewards", "-1"], "--center-rewards"),
    ("reward_model", ["--beta", "0.1"], "--beta"),
    ("reward_model", ["--max-new-tokens", "5"], "a reward model samples nothing"),
    ("reward_model", [*FILE, "huge.jsonl"], '"margin" must be a number, not 1000'),
    ("evaluate", ["exact.pt", "--seed", "3"], "--seed: every outcome of exact is counted"),
    ("reward_model", ["--out", "out/reviews/sft.pt"], "would overwrite out/reviews/sft.pt"),
    ("reward_model", ["--init", "rm.pt"], "rm.pt is a reward model"),
    ("reward_model", ["--init", "none.pt"], "none.pt: no such file"),
    ("reward_model", ["--task", "exact", "--init", "out/reviews/sft.pt"], "exact has a vocabulary of its own"),
    ("reward_model", ["--task", "ok.jsonl"], "--init is needed with a file"),
    ("reward_model", ["--epochs", "2"], "--epochs"),
    ("reward_model", ["--micro-batch", "5"], "--micro-batch 5 does not divide"),
    ("reward_model", [*FILE, "p2.jsonl"], 'p2.jsonl:1: "p" must be a number in [0, 1], not 2'),
    ("reward_model", [*FILE, "pnull.jsonl"], '"p" must be a number in [0, 1], not null'),
    ("reward_model", [*FILE, "margin.jsonl"], '"margin" must be a number, not "big"'),
    ("reward_model", [*FILE, "broken.jsonl"], "broken.jsonl:17: not JSON"),
    ("reward_model", [*FILE, "same.jsonl"], "no usable row"),
    ("reward_model", [*FILE, "long.jsonl"], "do not fit in 256 tokens"),
    ("grpo", ["--group", "1"], "--group 1: a response is compared with the others"),
    ("grpo", ["--minibatches", "7"], "--minibatches 7 does not divide --batch-size 16 × --group 8 = 128 responses"),
    ("grpo", ["--micro-batch", "7"], "--micro-batch 7 does not divide --batch-size 16 × --group 8 / --minibatches 1 = 128 responses"),
    ("grpo", ["--kl", "none", "--beta", "0.1"], "--beta is read by --kl k3 or --kl k3-ratio or --kl reward only"),
    ("grpo", ["--kl", "k2"], "--kl"),
    ("grpo", ["--temperature", "0"], "--temperature"),
    ("grpo", ["--eps", "-1"], "--eps"),
    ("grpo", ["--adv-norm", "mean"], "--adv-norm"),
    ("grpo", ["--steps", "3", "--epochs", "2"], "--steps and --epochs"),
    ("grpo", ["--max-new-tokens", "250"], "test prompts are longer than the 6 tokens that --max-new-tokens leaves"),
    ("grpo", ["--task", "exact", "--init", "exact.pt", "--max-new-tokens", "2"], "--max-new-tokens 2: the responses of exact"),
    ("grpo", ["--task", "ok.jsonl", "--reward", "good.py:f"], "--init is needed with a file"),
    ("grpo", [*FILE, "ok.jsonl"], '--reward task: not every row of ok.jsonl has an "answer" to check'),
    ("grpo", [*FILE, "ok.jsonl", "--reward", "rm"], "--reward-model is needed with a file"),
    ("grpo", [*FILE, "long.jsonl", "--reward", "good.py:f"], "are longer than the 128 tokens"),
    ("grpo", [*FILE, "noprompt.jsonl", "--reward", "good.py:f"], "noprompt.jsonl:1: the prompt is empty"),
    ("grpo", ["--reward", "gold"], "--reward gold: give task, rm, or a function of your own as FILE.py:function"),
    ("grpo", ["--reward", "returns.py:swapped"], "must take (prompt, completion, …)"),
    ("grpo", ["--reward", "none.py:f"], "none.py is no file"),
    ("grpo", ["--reward", "good.py:g"], "good.py has no function 'g'"),
    ("grpo", ["--reward", "syntax.py:f"], "syntax.py cannot be run (SyntaxError"),
    ("grpo", ["--reward", "wants.py:f"], "--reward wants.py:f takes 'answer', which is no column of the rows"),
    ("grpo", ["--reward", "raises.py:f"], "raised KeyError ('x', line 1) at the prompt 'A "),
    ("grpo", ["--reward", "returns.py:one"], "must take (prompt, completion, …)"),
    ("grpo", ["--reward", "returns.py:none"], "returned None at the prompt 'A "),
    ("grpo", ["--reward", "returns.py:text"], "returned '1' at the prompt 'A "),
    ("grpo", ["--reward", "returns.py:infinite"], "returned inf at the prompt 'A "),
    ("grpo", ["--reward", "rm", "--reward-model", "none.pt"], "none.pt: no such file"),
    ("grpo", ["--reward", "rm", "--reward-model", "out/reviews/sft.pt"], "is a language model; give a reward model"),
    ("grpo", ["--reward", "rm", "--reward-model", "exact_rm.pt"], "has another vocabulary than the policy"),
    ("grpo", ["--reward-model", "rm.pt"], "--reward-model is read by --reward rm only"),
    ("grpo", ["--task", "exact", "--init", "exact.pt", "--reward", "good.py:f"], "exact keeps its own rewards"),
    ("grpo", ["--out", "out/reviews/sft.pt"], "would overwrite out/reviews/sft.pt"),
    ("grpo", ["--init", "rm.pt"], "rm.pt is a reward model"),
    ("ppo", ["--gamma", "1.5"], "--gamma: must be a number in [0, 1], not '1.5'"),
    ("ppo", ["--lam", "-1"], "--lam"),
    ("ppo", ["--group", "0"], "--group"),
    ("ppo", ["--eps-high", "0.3"], "--eps-high"),
    ("ppo", ["--missing-end-score", "nan"], "--missing-end-score: must be a number, not 'nan'"),
    ("ppo", ["--missing-end-score", "-1", "--reward", "task"], "--missing-end-score is read by --reward rm only"),
    ("ppo", ["--task", "arithmetic:2", "--missing-end-score", "-1"], "--missing-end-score is read by --reward rm only"),
    ("ppo", ["--task", "exact", "--reward", "rm", "--missing-end-score", "-1"], "a missing end costs nothing on exact"),
    ("ppo", ["--task", "exact", "--init", "exact.pt", "--reward", "good.py:f"], "exact keeps its own rewards"),
    ("ppo", ["--reward-model", "rm.pt", "--reward", "task"], "--reward-model is read by --reward rm only"),
    ("ppo", ["--reward-model", "none.pt"], "none.pt: no such file"),
    ("ppo", ["--reward-model", "out/reviews/sft.pt"], "is a language model; give a reward model"),
    ("ppo", ["--reward-model", "exact_rm.pt"], "has another vocabulary than the policy"),
    ("ppo", ["--minibatches", "7"], "--minibatches 7 does not divide --batch-size 128 × --group 1 = 128 responses"),
    ("ppo", ["--micro-batch", "7"], "--micro-batch 7 does not divide --batch-size 128 × --group 1 / --minibatches 4 = 32 responses"),
    ("ppo", ["--steps", "3", "--epochs", "2"], "--steps and --epochs"),
    ("ppo", ["--reward", "raises.py:f"], "raised KeyError ('x', line 1) at the prompt 'A "),
    ("ppo", [*FILE, "ok.jsonl"], '--reward task: not every row of ok.jsonl has an "answer" to check'),
    ("ppo", [*FILE, "ok.jsonl", "--reward", "rm"], "--reward-model is needed with a file"),
    ("ppo", ["--task", "ok.jsonl", "--reward", "good.py:f"], "--init is needed with a file"),
    ("ppo", ["--max-new-tokens", "250", "--reward", "task"], "test prompts are longer than the 6 tokens that --max-new-tokens leaves"),
    ("ppo", ["--out", "out/reviews/reward_model.pt"], "would overwrite out/reviews/reward_model.pt"),
    ("ppo", ["--init", "rm.pt"], "rm.pt is a reward model"),
    ("dapo", ["--group", "1"], "--group 1: a response is compared with the others"),
    ("dapo", ["--batch-size", "1", "--group", "2"], "--minibatches 8 does not divide --batch-size 1 × --group 2 = 2 responses"),
    ("dapo", ["--beta", "0.1"], "--beta"),
    ("dapo", ["--max-rounds", "0"], "--max-rounds"),
    ("dapo", ["--no-overlong", "--overlong-cache", "4"], "--overlong-cache"),
    ("dapo", ["--overlong-cache", "97"], "--overlong-cache 97 goes with --overlong, and is at most a response's 96 tokens"),
    ("dapo", ["--reward", "raises.py:f"], "raised KeyError ('x', line 1) at the prompt 'A "),
    ("dapo", [*FILE, "ok.jsonl"], '--reward task: not every row of ok.jsonl has an "answer" to check'),
    ("dapo", ["--micro-batch", "5"], "--micro-batch 5 does not divide"),
    ("online_dpo", ["--samples-per-prompt", "1"], "--samples-per-prompt 1: a response is compared with another"),
    ("online_dpo", ["--ref-update", "per-round"], "--ref-update per-round goes with --rounds N"),
    ("online_dpo", ["--rounds", "11", "--steps", "10", "--reward", "good.py:f"], "--rounds 11 are more than the 10 steps"),
    ("online_dpo", ["--judge", "rm.pt", "--reward", "task"], "both say what judges a response; give one of them"),
    ("online_dpo", ["--judge", "none.pt"], "none.pt: no such file"),
    ("online_dpo", ["--judge", "out/reviews/sft.pt"], "is a language model; give a reward model"),
    ("online_dpo", ["--judge", "exact_rm.pt"], "exact has a vocabulary of its own"),
    ("online_dpo", ["--task", "exact", "--init", "exact.pt", "--judge", "rm.pt"], "rm.pt has a vocabulary of 99, but its tokenizer 748"),
    ("online_dpo", ["--reward-model", "rm.pt"], "--reward-model is read by --reward rm only"),
    ("online_dpo", ["--missing-eos-penalty", "2"], "--missing-eos-penalty is read by --reward rm only"),
    ("online_dpo", ["--tau", "0.2"], "--tau is read by --loss ipo only"),
    ("online_dpo", ["--loss", "ipo", "--beta", "0.2"], "--beta is read by --loss dpo only"),
    ("online_dpo", ["--label", "hard"], "--label"),
    ("online_dpo", ["--pairs", "9"], "--pairs"),
    ("online_dpo", ["--micro-batch", "5"], "--micro-batch 5 does not divide --batch-size 32"),
    ("online_dpo", ["--reward", "raises.py:f"], "raised KeyError ('x', line 1) at the prompt 'A "),
    ("online_dpo", ["--max-new-tokens", "250"], "test prompts are longer than the 6 tokens that --max-new-tokens leaves"),
    ("online_dpo", ["--task", "exact", "--init", "exact.pt", "--reward", "good.py:f"], "exact keeps its own rewards"),
    ("online_dpo", [*FILE, "ok.jsonl"], '--reward task: not every row of ok.jsonl has an "answer" to check'),
    ("online_dpo", ["--task", "ok.jsonl", "--reward", "good.py:f"], "--init is needed with a file"),
    ("online_dpo", ["--out", "out/reviews/sft.pt"], "would overwrite out/reviews/sft.pt"),
    ("online_dpo", ["--init", "rm.pt"], "rm.pt is a reward model"),
    ("rlaif", ["--group", "1"], "--group 1: a response is compared with the others"),
    ("rlaif", ["--task", "exact"], "exact has a vocabulary of its own, in which nothing can be asked"),
    ("rlaif", ["--task", "arithmetic:2"], "--task arithmetic:2: how to criticise, revise and compare is demonstrated on reviews only"),
    ("rlaif", ["--task", "ok.jsonl"], "ok.jsonl: how to criticise, revise and compare is demonstrated on reviews only; give --init"),
    ("rlaif", ["--constitution", "none.txt"], "--constitution none.txt cannot be read (FileNotFoundError)"),
    ("rlaif", ["--constitution", "a_file"], "--constitution a_file holds no principle"),
    ("rlaif", ["--constitution", "good.py"], "the grammar demonstrates Be kind., Be fair., Be warm., Be specific. only, not 'def f("),
    ("rlaif", ["--judge", "none.pt"], "none.pt: no such file"),
    ("rlaif", ["--judge", "rm.pt"], "rm.pt is a reward model; give a language model"),
    ("rlaif", ["--judge", "exact.pt"], "the vocabulary of exact has the symbols"),
    ("rlaif", ["--direct", "--clamp", "0.4"], "--clamp: with --direct there are no labels and no preference model"),
    ("rlaif", ["--clamp", "0.5"], "--clamp"),
    ("rlaif", ["--init", "out/reviews/sft.pt", "--skill-steps", "5"], "--skill-steps shapes the first phase, in whose place --init stands"),
    ("rlaif", ["--init", "out/reviews/sft.pt", "--n-embd", "32"], "--n-embd shapes the first phase"),
    ("rlaif", ["--n-embd", "30"], "--n-embd 30 is not a multiple"),
    ("rlaif", ["--init", "none.pt"], "none.pt: no such file"),
    ("rlaif", ["--init", "rm.pt"], "rm.pt is a reward model"),
    ("rlaif", ["--init", "out/reviews/sft.pt", "--out", "out/reviews/sft.pt"], "would overwrite out/reviews/sft.pt"),
    ("rlaif", ["--judge", "out/reviews/sft.pt", "--out", "out/reviews/sft.pt"], "would overwrite out/reviews/sft.pt"),
    ("rlaif", ["--micro-batch", "7"], "--micro-batch 7 does not divide --batch-size 32"),
    ("rlaif", ["--block-size", "64"], "a dialogue of critique and revision takes up to"),
    ("rlaif", ["--max-new-tokens", "250"], "test prompts are longer than the 6 tokens that --max-new-tokens leaves"),
    ("rlaif", ["--reward", "task"], "--reward"),
    ("rlaif", ["--pairs", "9"], "--pairs"),
    ("rlaif", ["--steps", "3", "--epochs", "2"], "--steps and --epochs"),
    ("evaluate", ["exact.pt", "--task", "reviews"], "exact has a vocabulary of its own"),
    ("evaluate", ["exact.pt", "--prompt", "xyz"], "'xyz' in 'xyz'"),
    ("evaluate", ["rm.pt"], "rm.pt is a reward model"),
    ("evaluate", ["none.pt"], "none.pt: no such file"),
    ("evaluate", ["out/reviews/sft.pt", "--max-new-tokens", "300"], "--max-new-tokens"),
    ("evaluate", [], "checkpoint"),
]


@pytest.fixture(scope="module")
def workshop(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mistakes")
    shutil.copytree(tiny / "out", folder / "out")
    (folder / "data.jsonl").mkdir()
    files(folder)
    return folder


@pytest.mark.parametrize("script, args, words", MISTAKES, ids=[" ".join([m[0], *m[1]]) for m in MISTAKES])
def test_a_mistake_is_one_line_and_exit_code_2(script, args, words, workshop, monkeypatch, capsys):
    monkeypatch.chdir(workshop)
    before = snapshot(workshop)
    assert main(script, *args) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and said[0].startswith(f"{script}.py: ") and words in said[0], said
    assert snapshot(workshop) == before


def test_a_mistake_has_no_traceback_from_the_shell(workshop):
    done = run("dpo.py", "--beta", "0", cwd=workshop, ok=False)
    assert done.returncode == 2 and done.stdout == "" and len(done.stderr.strip().splitlines()) == 1


def test_a_loss_that_is_not_finite_keeps_the_last_good_state(tiny, monkeypatch, capsys):
    monkeypatch.chdir(tiny)
    monkeypatch.setattr(dpo, "dpo_loss", lambda *logps, beta, label_smoothing: logps[0] * (float("nan") if broken() else -1.0))
    calls = []

    def broken():
        calls.append(1)
        return len(calls) > 2

    assert main("dpo", *TINY, "--out", "nan/dpo.pt") == 1
    assert "step 3: the loss is nan" in capsys.readouterr().err
    state = torch.load(tiny / "nan/dpo.state", weights_only=True)
    assert state["step"] == 2 and all(torch.isfinite(p).all() for p in state["policy"].values())
    assert not (tiny / "nan/dpo.pt").exists()

"""memory.py: bytes counted by hand, and the bytes predicted against the bytes measured; compare.py: what it starts, keeps and tells."""
import json
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import lines, main, run

import common
import compare
import data
import rlaif
from gpt import GPT, GPTConfig, KVCache, ScalarGPT, load, sample, save
from memory import Ledger, Tracker

METHODS = ["sft", "reward_model", "dpo", "simpo", "orpo", "kto", "online_dpo", "ppo", "grpo", "dapo", "rlaif"]
SAMPLED = {"ppo": ["--group", 1, "--minibatches", 2], "grpo": ["--group", 4], "dapo": ["--group", 4, "--minibatches", 2],
           "online_dpo": ["--samples-per-prompt", 3], "rlaif": ["--group", 4]}  # fmt: skip


# ------------------------------------------------------------------------------------------------ the tracker, by hand


def test_a_storage_counts_once_and_until_its_end():
    x, w = torch.ones(8, 16), torch.ones(16, 4)  # there before: not counted, and their views neither
    with Tracker() as t:
        y = x @ w.mT.mT  # 8 × 4 × 4 bytes
        assert t.total == t.peak == 128
        view = y.view(4, 8)[1:].T
        y.add_(1).mul_(2)
        assert t.total == 128
        z = y + 1
        assert t.total == t.peak == 256
        del y
        assert t.total == 256  # a view holds it
        del view
        assert t.total == 128 and t.peak == 256
        t.start()
        assert t.peak == 128
        del z
        assert t.total == 0


def test_what_the_backward_pass_keeps_is_seen():
    x = torch.ones(10, 10, requires_grad=True)
    with Tracker() as t:
        y = (x * 2).exp().sum()  # exp keeps its result, and x * 2 is free once it is read
        assert t.total == 400 + 4 and t.peak == 800
        del y
        assert t.total == 0
        y = (x * 2).sin().sum()  # sin keeps x * 2, and nobody its result
        assert t.total == 400 + 4 and t.peak == 800 + 4
        y.backward()
        assert x.grad is not None and t.total == 400 + 4  # the graph is free, .grad is there
    with Tracker() as t, torch.no_grad():
        y = (x * 2).sin().sum()
        assert t.total == 4 and t.peak == 800


class Net(torch.nn.Module):
    """16 -> 4, 68 parameters"""

    def __init__(self):
        super().__init__()
        self.linear, self.config = torch.nn.Linear(16, 4), GPTConfig(vocab_size=1000)


@pytest.mark.parametrize("trained", [True, False])
def test_a_linear_layers_step(trained):
    """Weights 272 bytes, gradients as many, moments twice and 4 for each of two step counts; 8 × 4 outputs are 128 bytes."""
    net = Net().requires_grad_(trained)
    optimizer = torch.optim.AdamW([torch.nn.Parameter(p.detach()) if not trained else p for p in net.parameters()], fused=True)
    x = torch.ones(8, 16)
    with Ledger(policy=net).tracked(optimizer) as t:
        assert t.parts == {"weights": 272} and t.total == 272
        y = net.linear(x)
        assert t.parts == {"weights": 272, "activations": 128}
        if trained:
            y.sum().backward()
            del y
            assert t.total == 272 + 272 and t.now["gradients"] == 272 and t.now["activations"] == 0
            optimizer.step()
            assert t.parts == {"weights": 272, "activations": 0, "gradients": 272, "optimizer": 2 * 272 + 2 * 4} and t.total == t.peak
            optimizer.zero_grad()
            assert t.total == 272 + 2 * 272 + 2 * 4
        else:
            del y
            assert t.total == 272 and t.peak == 272 + 128


def test_logits_casts_and_sampling_are_told_apart():
    config = GPTConfig(vocab_size=64, block_size=8, n_layer=1, n_head=1, n_embd=16)  # 64 is also the width of the MLP
    model = GPT(config)
    ids, mask = torch.zeros(2, 8, dtype=torch.int64), torch.ones(2, 8, dtype=torch.bool)
    with Ledger(policy=model).tracked(torch.optim.AdamW(model.parameters())) as t:
        model.logprobs(ids, mask).sum().backward()
        assert t.most["logits"] == 3 * 14 * 64 * 4  # of 14 tokens: logits, log-softmax, gradient
        assert t.now["logits"] == 0 and "casts" not in t.most
        with torch.autocast("cpu", torch.bfloat16):
            model.logprobs(ids, mask)
        matrices = sum(p.numel() for name, p in model.named_parameters() if name != "wpe.weight" and "norm" not in name)
        assert t.most["casts"] == 2 * matrices  # all that linear layers read, biases too
        t.during("sampling")
        model(ids)
        assert t.most["sampling"] > 2 * 8 * 64 * 4 and t.most["logits"] == 3 * 14 * 64 * 4


def test_ledger_and_flops_by_hand():
    """One block, width 4, 10 tokens of vocabulary, 6 places: 40 + 24 + 12·16 + 13·4 + 2·4 parameters, of which 232 multiply a token."""
    config = GPTConfig(vocab_size=10, block_size=6, n_layer=1, n_head=1, n_embd=4)
    policy, ref, reward = GPT(config), GPT(config).requires_grad_(False).bfloat16(), ScalarGPT(config).requires_grad_(False)
    ledger = Ledger(policy=policy, critic=None, ref=ref, reward=reward)
    n = 40 + 24 + 12 * 16 + 13 * 4 + 2 * 4
    a, b, c = ledger.records()
    assert (a["role"], a["trainable"], a["parameters"], a["bytes"]) == ("policy", True, n, 16 * n)
    assert (b["role"], b["trainable"], b["parameters"], b["bytes"]) == ("ref", False, n, 2 * n)
    assert (c["role"], c["parameters"], c["bytes"]) == ("reward", n + 5, 4 * (n + 5))
    passes = {"policy": 3, "ref": 1, "reward": 1}
    N, R = 12 * 16 + 40, 12 * 16 + 4  # a reward model has no vocabulary head
    assert ledger.flops(passes, {"policy": 2, "ref": 0, "reward": 0}) == (2 * 3 + 4 * 2) * N + 2 * N + 2 * R
    assert ledger.flops(passes, {"policy": 2, "ref": 0, "reward": 0}, recompute=True) == (2 * 3 + 6 * 2) * N + 2 * N + 2 * R


# ------------------------------------------------------------------------------------------------ the prediction


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_shadow_computes_sizes_and_leaves_all_as_it_was(device, monkeypatch):
    """Within it weights are fake and AdamW is fused, whatever device they came from; whole numbers and masks are real."""
    with torch.device(device):
        model = GPT(GPTConfig(vocab_size=64, block_size=8, n_layer=1, n_head=1, n_embd=16))
    before, optimizer = dict(model.named_parameters()), torch.optim.AdamW(model.parameters())
    groups = [dict(group) for group in optimizer.param_groups]
    ids, mask = torch.zeros(2, 8, dtype=torch.int64), torch.ones(2, 8, dtype=torch.bool)
    with Ledger(policy=model).tracked(optimizer, shadow=True) as t:
        assert optimizer.param_groups[0]["fused"] and all(p.device.type == "cpu" for p in model.parameters())
        logp = model.logprobs(ids, mask)
        assert logp.shape == (2, 7) and float(logp.detach().sum()) == 1.0 and logp[mask[:, 1:]].shape == (14,)
        assert int(mask.sum()) == 16 and torch.zeros(3, dtype=torch.int64).tolist() == [0, 0, 0]
        logp.sum().backward()
        optimizer.step()
        moments = 2 * sum(4 * p.numel() for p in before.values())
        assert t.now["gradients"] == moments / 2 and t.now["optimizer"] == moments + 4 * len(before)
        widths, advance = [], KVCache.advance
        monkeypatch.setattr(KVCache, "advance", lambda self, T: (advance(self, T), widths.append(self.width))[0])
        s = sample(model, [[1], [2, 3]], 5, end_id=63, group=2)  # as long as it can be, read in two steps
        assert widths == [2, 2 + 5 - 1] and s.mask.sum(1).tolist() == [5] * 4 and s.finished.all() and s.stop.tolist() == [6, 6, 7, 7]
    assert all(p is before[name] and p.grad is None for name, p in model.named_parameters())
    assert optimizer.param_groups == groups and not optimizer.state


@pytest.fixture(scope="session")
def endless(tiny):
    """`tiny` with endless.pt, a policy that never draws the end token, and judge.pt, a reward model."""
    model, meta = load(tiny / "out/reviews/sft.pt")
    with torch.no_grad():
        model.norm.bias += 1.0
        model.wte.weight[-1] -= 4.0
    save(model, tiny / "endless.pt", **meta)
    save(ScalarGPT(model.config, seed=3), tiny / "endless-judge.pt", **meta)
    return tiny


def both(script, folder, tmp_path, monkeypatch, capsys, *more):
    """-> the closing figures of a run of three steps, and of --predict own with the same options"""
    monkeypatch.chdir(folder)
    monkeypatch.setattr("evaluate.PROMPTS", 8)
    args = ["--task", "tokens:6+10", "--init", "endless.pt", "--batch-size", 4, "--steps", 3, "--warmup", 1]
    args += [*SAMPLED.get(script, ()), *more]
    own = ["--reward-model", "endless-judge.pt"] if script == "ppo" else ["--sl-steps", 1, "--pm-steps", 1] if script == "rlaif" else []
    if script == "rlaif":  # its policy ends no answer, so that none could be revised or compared
        monkeypatch.setattr(rlaif.Pipeline, "revise", lambda *_: [data.Revision("123456", "1", "Be 1.", "2", "34", {})] * 4)
        monkeypatch.setattr(rlaif.Pipeline, "pairs", lambda *_: [data.Pair("123456", "12", "34", "Be 1.", {})] * 4)
    for name, extra in (("run", own), ("predicted", ["--predict", "own"])):
        assert main(script, *args, *extra, "--device", "cpu", "--out", tmp_path / f"{name}.pt") == 0, capsys.readouterr()
    return lines(tmp_path / "run.jsonl")[-1]["final"], lines(tmp_path / "predicted.predicted.jsonl")[-1]["final"]


@pytest.mark.parametrize("script", METHODS)
def test_predicted_is_measured(script, endless, tmp_path, monkeypatch, capsys):
    """Within 0.1 % where nothing is sampled, 2 % where it is: the same models, the same peak, the same categories."""
    ran, predicted = both(script, endless, tmp_path, monkeypatch, capsys)
    assert ran["models"] == predicted["models"]
    assert predicted["predicted_bytes"] == pytest.approx(ran["peak_bytes"], rel=0.02 if script in SAMPLED else 1e-3)
    for name in set(ran["peak"]) - {"activations"}:
        assert predicted["predicted"].get(name, 0) == pytest.approx(ran["peak"][name], rel=0.05, abs=2000), name
    weights = sum(m["weight_bytes"] for m in ran["models"])
    assert ran["peak"]["weights"] == weights and ran["peak_bytes"] > weights + sum(m["optimizer_bytes"] for m in ran["models"])
    if script in SAMPLED:  # the cache: keys and values of two layers, 4 sequences × group, 16 tokens, 16 wide, 4 bytes
        rows = 4 * SAMPLED[script][1]
        assert 2 * 2 * rows * 16 * 16 * 4 < predicted["predicted_most"]["sampling"]
        assert predicted["predicted_most"]["sampling"] == pytest.approx(ran["peak_most"]["sampling"], rel=0.05)


@pytest.mark.parametrize("script, more", [
    ("dpo", ["--checkpoint-activations"]), ("dpo", ["--dtype", "bfloat16"]), ("dpo", ["--micro-batch", 2]),
    ("grpo", ["--checkpoint-activations", "--dtype", "bfloat16-pure"]),
])  # fmt: skip
def test_predicted_is_measured_in_other_settings(script, more, endless, tmp_path, monkeypatch, capsys):
    ran, predicted = both(script, endless, tmp_path, monkeypatch, capsys, *more)
    assert predicted["predicted_bytes"] == pytest.approx(ran["peak_bytes"], rel=0.05)
    if more[-1] == "bfloat16-pure":
        assert {m["weight_bytes"] / m["parameters"] for m in ran["models"]} == {2}
        assert next(iter(load(tmp_path / "run.pt")[0].parameters())).dtype == torch.bfloat16


def test_prediction_of_rounds_samples_too(tmp_path, monkeypatch, capsys):
    """Whether a round lasts one step or all of them, and with a single step: the peak is that of sampling 64 responses a prompt."""
    monkeypatch.chdir(tmp_path)
    found = []
    for more in ([], ["--rounds", 3], ["--steps", 1], ["--reward", "rm", "--label", "argmax"]):
        assert main("online_dpo", "--predict", "own", "--batch-size", 4, "--samples-per-prompt", 64, *more) == 0
        found.append(capsys.readouterr().out.split("sampling ")[1].split(",")[0])
    assert len(set(found)) == 1 and float(found[0]) > 100, found


def test_predict_reads_writes_and_allocates_nothing(tmp_path, monkeypatch, capsys):
    """A 7B model's step in an empty folder: the ledger by hand, and less memory than one of its matrices takes."""
    import resource

    monkeypatch.chdir(tmp_path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    more = ["--n-layer", 2, "--dtype", "bfloat16-pure", "--checkpoint-activations", "--init", "missing.pt", "--task", "missing.jsonl"]
    assert main("dpo", "--predict", "7b", "--seq-len", 512, *more) == 0
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    said, C, V = capsys.readouterr().out, 4096, 50304
    n = V * C + 512 * C + 2 * (12 * C**2 + 13 * C) + 2 * C
    assert f"policy   trained  {n / 1e6:,.2f} M parameters, {8 * n / 2**30:.1f} GiB" in said  # 2 weights, 2 gradients, 4 moments
    assert f"ref      frozen   {n / 1e6:,.2f} M parameters, {2 * n / 2**30:.1f} GiB" in said
    assert "tokens:256+256, --batch-size 2 --micro-batch 2, bfloat16 weights, activations checkpointed" in said
    assert not list(tmp_path.iterdir()) and grown * 1024 < V * C * 2


@pytest.mark.parametrize("args, said", [
    (["--seq-len", 64], "--seq-len is read with --predict only"), (["--n-layer", 4], "--n-layer is read with --predict only"),
    (["--predict", "2b"], "invalid choice"), (["--predict", "1b", "--seq-len", 2], "4 is the least"),
    (["--predict", "own", "--n-embd", 30], "--n-embd 30 is not a multiple of --n-head 4"),
])  # fmt: skip
def test_mistakes_with_predict(args, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main("dpo", *args) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_too_little_free_memory_stops_before_anything_is_lost(tiny, tmp_path, monkeypatch, capsys):
    """On a GPU, here one that is made up: exit code 2 and the old files untouched; --force goes on to the same bits as without."""
    monkeypatch.chdir(tiny)
    monkeypatch.setattr("evaluate.PROMPTS", 100)
    args = ["--steps", 3, "--batch-size", 4, "--warmup", 1, "--eval-every", 1, "--device", "cpu", "--out", tmp_path / "grpo.pt"]
    args += ["--max-new-tokens", 4, "--group", 4, "--minibatches", 2]
    assert main("grpo", *args) == 0
    weights, record = load(tmp_path / "grpo.pt")[0].state_dict(), (tmp_path / "grpo.jsonl").read_text()
    monkeypatch.setattr(common.Run, "_free", lambda self: 2**19)
    capsys.readouterr()
    assert main("grpo", *args) == 2
    assert "GiB, but cpu has 0.000488 GiB free: a smaller --micro-batch or --checkpoint-activations" in capsys.readouterr().err
    assert (tmp_path / "grpo.jsonl").read_text() == record
    assert main("grpo", *args, "--force") == 0
    final = lines(tmp_path / "grpo.jsonl")[-1]["final"]
    assert all(torch.equal(x, weights[k]) for k, x in load(tmp_path / "grpo.pt")[0].state_dict().items())
    assert final["predicted_bytes"] == pytest.approx(final["peak_bytes"], rel=0.05)
    assert final["predicted_most"]["logits"] == pytest.approx(final["peak_most"]["logits"], rel=0.1)  # not those of the evaluations
    assert sum("eval" in line for line in lines(tmp_path / "grpo.jsonl")) == 3
    before = json.loads(record.splitlines()[-1])["final"]
    assert all(final[key] == before[key] for key in ("reward", "kl", "sampled_tokens", "trained_tokens", "peak_bytes"))


# ------------------------------------------------------------------------------------------------ the comparison

STUB = """
import json, os, signal, sys
name, options = os.path.basename(sys.argv[0]), dict(zip(sys.argv[1::2], sys.argv[2::2]))
out = options["--out"]
with open(os.path.join(os.path.dirname(out), "calls"), "a") as f:
    f.write(name + "\\n")
if "--predict" in options:
    sys.exit(1)
if name == "dpo.py" and not os.path.exists("mended"):
    os.kill(os.getpid(), signal.SIGKILL)
models = [{"role": "policy", "trainable": True, "parameters": 10, "bytes": 160}]
steps = int(options.get("--steps", 100))
final = {"models": models, "forward_passes": 1, "backward_passes": 1, "flops_per_token": 60, "trained_tokens": 100 * steps,
         "reward": 1.0 + int(options["--seed"]), "step_ms": 5.0 if name == "simpo.py" else 10.0, "wall_s": 1, "kl": 2.0}
open(out, "w").write(" ".join(sys.argv))
with open(out[:-3] + ".jsonl", "w") as f:
    f.write(json.dumps({"options": {"steps": steps, "beta": 0.1, "batch_size": 32}}) + "\\n" + json.dumps({"final": final}) + "\\n")
"""


@pytest.fixture
def stubs(tmp_path, monkeypatch):
    """Scripts that write what compare.py reads at once; dpo.py is killed until there is a file `mended`."""
    for script in {script for script, *_ in compare.ROWS.values()}:
        (tmp_path / script).write_text(STUB)
    monkeypatch.setattr(compare, "HERE", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_killed_method_is_a_row_and_the_rest_is_kept(stubs, capsys):
    args = ["--methods", "dpo", "simpo", "--seeds", "2", "--task", "arithmetic:2"]
    with pytest.raises(SystemExit) as stop:
        compare.main(args)
    said, folder = capsys.readouterr(), stubs / "out/compare/arithmetic-2"
    assert stop.value.code == 1 and "failed: dpo-0, dpo-1" in said.err
    assert "| dpo    | failed: exit code -9: killed; exit code -9: killed" in said.out
    dpo, simpo = json.loads((folder / "compare.json").read_text())["methods"]
    assert dpo["runs"] == 0 and dpo["failed"] == {"dpo-0": "exit code -9: killed", "dpo-1": "exit code -9: killed"}
    assert simpo["runs"] == 2 and simpo["reward"] == 1.5 and simpo["reward_sd"] == pytest.approx(0.5**0.5)
    assert simpo["steps"] == 400 and simpo["trained_tokens"] == 40_000  # 25,600 responses, 32 pairs a step
    (stubs / "mended").touch()
    (folder / "calls").write_text("")
    compare.main(args)
    assert (folder / "calls").read_text().split() == ["dpo.py", "dpo.py"]  # what had ended is not run again
    dpo, simpo = json.loads((folder / "compare.json").read_text())["methods"]
    assert dpo["runs"] == 2 and dpo["step_over_simpo"] == 2.0 and dpo["flops_over_simpo"] == 1.0
    assert "1.50 ± 0.71" in (folder / "README.md").read_text()


def test_another_start_runs_anew_and_a_failure_is_not_taken_for_the_run_before(stubs, capsys):
    """The stage's checkpoint changes, so what started from it is run again; killed, it has no figures, though older ones were there."""
    simpo = ["--methods", "simpo", "--task", "exact"]
    compare.main(simpo)
    calls = stubs / "out/compare/exact/calls"
    calls.write_text("")
    compare.main(simpo)
    assert "simpo.py" not in calls.read_text()
    compare.main([*simpo, "--n-layer", "1"])
    assert calls.read_text().split()[:2] == ["sft.py", "simpo.py"]
    (stubs / "mended").touch()
    compare.main(["--methods", "dpo", "--task", "exact", "--budget", "256"])
    (stubs / "mended").unlink()
    for _ in range(2):
        assert main("compare", "--methods", "dpo", "--task", "exact", "--budget", "512") == 1
        assert "| dpo    | failed: exit code -9: killed" in capsys.readouterr().out


@pytest.mark.parametrize("args, said", [
    (["--methods", "dpo", "ddpo"], "--methods ddpo: no such row"), (["--batch-size", "8"], "--batch-size is read with --predict only"),
    (["--predict", "7b", "--jobs", "2"], "--jobs is read without --predict only"), (["--init", "missing.pt"], "missing.pt: no such file"),
    (["--task", "my.jsonl"], "--init is needed with a file"), (["--out", "sft.py"], "--out sft.py is a file; give a folder"),
])  # fmt: skip
def test_mistakes_of_a_comparison(args, said, stubs, capsys):
    before = sorted(stubs.iterdir())
    assert main("compare", *args) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert sorted(stubs.iterdir()) == before


def test_plan_spends_the_budget(tmp_path):
    """Every row trains on 9,600 response sequences of reviews, the default, and on 1,920 with --quick."""
    for quick, budget in ((False, 9600), (True, 1920)):
        o = compare.Options(methods=list(compare.ROWS), quick=quick)
        o.given = set()
        for _, row, command in compare.plan(o, tmp_path)[1]:
            steps = int(command[command.index("--steps") + 1])
            assert steps * compare.shape("reviews", row)[1] == budget, row


def test_other_options_run_anew(stubs):
    for budget in (256, 512):
        compare.main(["--methods", "simpo", "--task", "exact", "--budget", str(budget), "--sweep"])
    calls = (stubs / "out/compare/exact/calls").read_text().split()
    assert calls == ["sft.py", *["simpo.py"] * 4, *["simpo.py"] * 4]
    runs = json.loads((stubs / "out/compare/exact/compare.json").read_text())["methods"]
    assert [line["swept"] for line in runs] == [False, True, True, True] and [line["steps"] for line in runs] == [2] * 4


@pytest.mark.parametrize("row", compare.ROWS)
@pytest.mark.parametrize("task", ["reviews", "arithmetic:2", "exact", "tokens:4+4"])
def test_budgets_are_equal(row, task):
    """What a step trains on, counted from its options: pairs twice, passes times."""
    words, n = compare.shape(task, row)
    o = dict(zip(words.split()[::2], map(int, words.split()[1::2])))
    answers = 2 if row in ("dpo", "cdpo", "ipo", "simpo", "orpo", "online_dpo") else 1
    rows = o["--batch-size"] * o.get("--group", answers) * o.get("--updates", 1)
    assert rows == n and o["--batch-size"] * o.get("--group", 1) % o.get("--minibatches", 1) == 0


def test_no_matplotlib_is_one_line(stubs, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    compare.main(["--methods", "simpo", "--task", "exact"])
    assert "no pictures: they need matplotlib (pip install matplotlib)" in capsys.readouterr().out
    assert not list((stubs / "out/compare/exact").glob("*.png"))


def test_pictures(tmp_path):
    pytest.importorskip("matplotlib")
    line = {"method": "dpo", "runs": 3, "swept": False, "value": 0.1, "reward": 1.0, "reward_sd": 0.1, "kl": 2.0, "kl_sd": 0.2,
            "length": 9.0, "length_sd": 1.0, "peak": {"weights": 10, "logits": 5}, "frontier": [[0.0, 0.0], [1.0, 1.0], [2.0, 1.2]]}
    grpo = line | {"method": "grpo", "course": [{"step": 1, "entropy": 1.0, "reward": 0.1}, {"step": 2, "entropy": 0.5, "reward": 0.4}]}
    evals = [{"step": i, "sequences": 64 * i, "loss": [0.7, 0.6], "reward": [0.1 * i, 0.2], "kl": [0.1, 0.2 * i]} for i in (1, 2)]
    online = line | {"method": "online_dpo", "evals": evals}
    lines = [line, grpo, online, {"method": "kto", "runs": 0, "failed": {}}]
    paths = compare.draw(SimpleNamespace(task="exact"), lines, tmp_path)
    assert [path.name for path in paths] == ["frontier.png", "length.png", "memory.png", "entropy.png", "course.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


def test_a_course_is_the_evaluations_and_the_loss_between_them():
    """Of two runs: each figure a list, the loss a mean since the evaluation before; in the table means over runs, nearest to a share."""
    def record(seed):
        out = []
        for step in (1, 2, 3, 4):
            out.append({"step": step, "loss": step + 10.0 * seed})
            if step % 2 == 0:
                out.append({"step": step, "eval": {"reward": -step - seed, "kl": 0.5, "length": 3.0}})
        return out

    evals = compare.evaluations([record(0), record(1)], 64)
    assert evals == [{"step": 2, "sequences": 128, "loss": [1.5, 11.5], "reward": [-2, -3], "kl": [0.5, 0.5]},
                     {"step": 4, "sequences": 256, "loss": [3.5, 13.5], "reward": [-4, -5], "kl": [0.5, 0.5]}]  # fmt: skip
    text = compare.course_table([{"method": "dpo", "labels": 4800, "evals": evals}, {"method": "kto"}]).splitlines()
    assert len(text) == 3 and text[0].split(" | ")[2].startswith("loss / reward / KL after 10 %")
    cells = ["6.50 / −2.50 / 0.50"] * 4 + ["8.50 / −4.50 / 0.50"]  # at 75 % the two are equally near
    assert [x.strip() for x in text[2].split("|")[1:-1]] == ["dpo", "4.8", *cells]


def test_labels_that_were_asked_for():
    """A pair a row and step, of few fixed pairs each once, of one's own pairs as many as were not equal; none for rewards."""
    options = {"steps": 100, "batch_size": 32}
    assert compare.labels("dpo", options | {"pairs": 0}, {}) == 3200 and compare.labels("dpo-few", options | {"pairs": 256}, {}) == 256
    assert compare.labels("kto", options, {}) == 3200 and compare.labels("online_dpo", options, {"labels": 3111}) == 3111
    assert compare.labels("grpo", options, {}) is None and compare.labels("sft", options, {}) is None


@pytest.mark.slow
def test_quick_end_to_end(tmp_path):
    done = run("compare.py", "--quick", cwd=tmp_path)
    assert "failed" not in done.stdout
    found = json.loads((tmp_path / "out/compare/reviews/compare.json").read_text())["methods"]
    assert [line["method"] for line in found] == list(compare.ROWS) and all(line["runs"] == 1 for line in found)
    held = {line["method"]: [m["role"] for m in line["models"]] for line in found}
    assert held["ppo"] == ["policy", "critic", "ref", "reward"] and held["simpo"] == held["orpo"] == held["dapo"] == ["policy"]
    assert held["dpo"] == held["kto"] == held["online_dpo"] == held["grpo"] == ["policy", "ref"]
    trained = {line["method"]: line["trained_tokens"] for line in found if line["method"] != "sft"}
    assert max(trained.values()) < 3 * min(trained.values())
    assert all(line["peak_bytes"] > 0 and line["predicted_bytes"] > 0 for line in found)

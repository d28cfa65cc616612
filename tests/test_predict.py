"""The predictions of analysis/predict.py: for every script the predicted bytes equal the measured
ones, rows.py names the models that the script holds, and a prediction allocates, writes and changes
nothing."""

import json
import resource
from types import SimpleNamespace

import pytest
import torch
from conftest import EIGHT, TRAIN, few_prompts, lines, main, needs_bitsandbytes

import compare
import data
import rlaif
import training
from analysis import predict
from analysis.rows import EVERY
from gpt import GPT, GPTConfig, ScalarGPT, load, save
from training import Compute

pytestmark = pytest.mark.machine

SAMPLES = {
    "ppo": ["--group", 1, "--minibatches", 2],
    "grpo": ["--group", 4],
    "dapo": ["--group", 4, "--minibatches", 2],
    "online_dpo": ["--samples-per-prompt", 3],
    "distill": ["--group", 4],
    "rlaif": ["--group", 4],
}
SETTINGS = [name for name, row in EVERY.items() if not row.like]
SHORT = [*TRAIN, "--task", "tokens:6+10"]


@pytest.fixture(scope="session")
def endless(tiny):
    """`tiny` with endless.pt, a policy that never draws the end token, and judge.pt, a reward
    model."""
    model, meta = load(tiny / "out/reviews/sft.pt")
    write(tiny, model, meta)
    return tiny


def write(folder, model, meta):
    with torch.no_grad():
        model.norm.bias += 1.0
        model.wte.weight[-1] -= 4.0
    save(model, folder / "endless.pt", **meta)
    save(ScalarGPT(model.config, seed=3), folder / "endless-judge.pt", **meta)


def last_phase(o):
    """RL-CAI, with what the phases before it leave"""
    task = data.task(o.task)
    run = training.Run("rlaif", o)
    run.load("endless.pt", task)
    phases = {name: SimpleNamespace(o=SimpleNamespace(out=path)) for name, path in EARLIER.items()}
    prompts = data.Prompts(task, run.tokenizer, run.block_size, o)
    p = SimpleNamespace(task=task, prompts=prompts, runs=phases, start="endless.pt")
    rlaif.reinforce(p, run, {})


EARLIER = {"sl": "endless.pt", "pm": "endless-judge.pt"}


def both(row, folder, monkeypatch, capsys, *more):
    """-> the closing figures of a run of three steps, and what is predicted from its record"""
    monkeypatch.chdir(folder)
    few_prompts(monkeypatch, 8)  # verdicts that always are mixed

    def verdict(self, prompt, completion, ended=True):
        return sum(map(ord, completion)) % 2 == 0

    monkeypatch.setattr("data.tokens.Tokens.correct", verdict)
    args = [*SHORT, *EVERY[row].arguments.split(), *SAMPLES.get(row, ()), *more]
    args += ["--reward", "endless-judge.pt"] if row == "ppo" else []
    args += ["--teacher", "endless.pt"] if row == "distill" else []
    args += ["--init", "endless.pt"]
    name = f"{row}-measured"
    out = ["--out", f"{name}.pt"]
    if row == "rlaif":
        last_phase(training.parse(rlaif.Options, [str(x) for x in args + out], rlaif.PRESETS))
    else:
        assert main(EVERY[row].script, *args, *out) == 0, capsys.readouterr()
    first, *_, last = lines(folder / f"{name}.jsonl")
    o = SimpleNamespace(**first["options"] | {"dtype": first["dtype"]})
    if "bfloat16-pure" in more:
        o.dtype = "bfloat16-pure"
    return last["final"], predict.predict(row, o, load(o.out)[0].config)


@pytest.mark.parametrize("row", SETTINGS)
def test_predicted_is_measured(row, endless, monkeypatch, capsys):
    """Within 0.1 % where nothing is sampled, 2 % where it is: the same peak, the same
    categories."""
    ran, predicted = both(row, endless, monkeypatch, capsys)
    near = 0.02 if row in SAMPLES else 1e-3
    assert predicted["predicted_bytes"] == pytest.approx(ran["peak_bytes"], rel=near)
    for name in set(ran["peak"]) - {"activations"}:
        found = predicted["predicted"].get(name, 0)
        assert found == pytest.approx(ran["peak"][name], rel=0.05, abs=2000), name
    weights = sum(m["weight_bytes"] for m in ran["models"])
    held = weights + sum(m["optimizer_bytes"] for m in ran["models"])
    assert ran["peak"]["weights"] == weights and ran["peak_bytes"] > held
    if row in SAMPLES:  # the cache: keys and values of two layers, 16 tokens, 16 wide, 4 bytes
        cache = 2 * 2 * 4 * SAMPLES[row][1] * 16 * 16 * 4
        found = predicted["predicted_most"]["sampling"]
        assert cache < found == pytest.approx(ran["peak_most"]["sampling"], rel=0.05)


@needs_bitsandbytes
def test_moments_of_8_bits_are_predicted_and_measured(endless, monkeypatch, capsys):
    """The embedding and the MLPs have 8 bits; the ledger leaves out two tables of 256 numbers."""
    ran, predicted = both("dpo", endless, monkeypatch, capsys, *EIGHT)
    assert predicted["predicted_bytes"] == pytest.approx(ran["peak_bytes"], rel=1e-3)
    assert predicted["predicted"] == pytest.approx(ran["peak"], rel=0.05, abs=2000)
    moments = sum(m["optimizer_bytes"] for m in ran["models"])
    assert predicted["models"] == ran["models"]
    assert ran["peak"]["optimizer"] == predicted["predicted"]["optimizer"] == moments + 2048
    assert moments < ran["models"][0]["gradient_bytes"]


@pytest.mark.slow
@pytest.mark.parametrize("row", SETTINGS)
def test_what_rows_say_is_what_scripts_hold(row, endless, monkeypatch, capsys):
    """Roles, which are trained, parameters and bytes: run.hold's ledger. Under autocast frozen
    models hold bfloat16 linear weights, and the step is predicted as well."""
    ran, predicted = both(row, endless, monkeypatch, capsys, "--dtype", "bfloat16")
    held = [m["role"] + ("*" if m["trainable"] else "") for m in ran["models"]]
    assert held == EVERY[row].models.split() and predicted["models"] == ran["models"]
    assert predicted["predicted_bytes"] == pytest.approx(ran["peak_bytes"], rel=0.05)


def test_a_judge_that_is_no_model_is_not_held():
    config = GPTConfig(64, 64, 1, 1, 16)
    for row, more, held in (
        ("ppo", ["--reward", "task"], ["policy", "critic", "ref"]),
        ("ppo", ["--reward", "mine.py:number"], ["policy", "critic", "ref"]),
        ("ppo", ["--reward", "rm"], ["policy", "critic", "ref", "reward"]),
        ("grpo", [], ["policy", "ref"]),
    ):
        o = predict.options(row, "--task", "tokens:6+10", "--batch-size", 8, *more)
        assert [m["role"] for m in predict.predict(row, o, config)["models"]] == held


@pytest.mark.slow
@pytest.mark.parametrize(
    "row, more",
    [
        ("dpo", ["--checkpoint-activations"]),
        ("dpo", ["--dtype", "bfloat16"]),
        ("dpo", ["--micro-batch", 2]),
        ("grpo", ["--checkpoint-activations", "--dtype", "bfloat16-pure"]),
        ("grpo", ["--micro-batch", 4, "--minibatches", 2]),
        ("ppo", ["--micro-batch", 1, "--dtype", "bfloat16"]),
        ("online_dpo", ["--micro-batch", 2, "--rounds", 2]),
        ("rlaif", ["--micro-batch", 4]),
        ("dpo", ["--lora", 4]),
        ("ppo", ["--lora", 4, "--dtype", "bfloat16"]),
        ("grpo", ["--lora", 4, "--checkpoint-activations"]),
    ],
)
def test_predicted_is_measured_in_other_settings(row, more, endless, monkeypatch, capsys):
    ran, predicted = both(row, endless, monkeypatch, capsys, *more)
    assert predicted["predicted_bytes"] == pytest.approx(ran["peak_bytes"], rel=0.05)
    if more[-1] == "bfloat16-pure":
        assert {m["weight_bytes"] / m["parameters"] for m in ran["models"]} == {2}
        model = load(endless / f"{row}-measured.pt")[0]
        assert next(iter(model.parameters())).dtype == torch.bfloat16


@pytest.fixture(scope="session")
def sizes(tiny, tmp_path_factory):
    """Folders with an endless policy and a judge of three sizes: task -> folder"""
    _, meta = load(tiny / "out/reviews/sft.pt")
    found = []
    for _, layers, width in TOYS:
        found.append(tmp_path_factory.mktemp("sized"))
        config = GPTConfig(data.tokenizer().size, 256, layers, 4, width)
        write(found[-1], GPT(config), meta)
    return found


TOYS = [("tokens:32+96", 2, 64), ("tokens:32+96", 4, 128), ("tokens:16+16", 8, 256)]


@pytest.mark.slow
@pytest.mark.parametrize("row", SETTINGS)
@pytest.mark.parametrize("i", range(3))
def test_predicted_is_measured_at_three_sizes(i, row, sizes, monkeypatch, capsys):
    """Within 0.5 % where nothing is sampled, 3 % where it is"""
    more = ["--task", TOYS[i][0], "--batch-size", 2]
    ran, predicted = both(row, sizes[i], monkeypatch, capsys, *more)
    near = 0.03 if row in SAMPLES else 0.005
    assert predicted["predicted_bytes"] == pytest.approx(ran["peak_bytes"], rel=near)


@pytest.mark.parametrize("row", ["dpo", "ppo"])
def test_nothing_that_is_predicted_has_numbers(row):
    """Adapters neither: a tensor on the CPU could not become a fake one with torch 2.6."""
    o = predict.options(row, "--lora", 2, "--task", "tokens:6+10", "--batch-size", 8)
    held = EVERY[row].models.split()
    models = predict.outlines(held, o, GPTConfig(64, 64, 1, 1, 16), Compute(o))
    assert all(p.is_meta for model in models.values() for p in model.parameters())


def test_prediction_of_rounds_samples_too():
    """Whether a round lasts one step or all of them, and with a single step: the most of sampling
    is that of 64 responses per prompt; a judge adds nothing that is larger."""
    config = GPTConfig(512, 256, 4, 4, 128)
    found = []
    for more in ([], ["--rounds", 3], ["--steps", 1], ["--reward", "rm", "--label", "argmax"]):
        argv = ["--batch-size", 4, "--samples-per-prompt", 64, *more]
        figures = predict.predict("online_dpo", predict.options("online_dpo", *argv), config)
        found.append(figures["predicted_most"]["sampling"])
    assert len(set(found)) == 1 and found[0] > 1e8, found


def table_of(*args):
    """--predict's table as compare.json has it: (method, checkpointed, dtype) -> figures"""
    assert main("compare", *args, "--out", "predicted") == 0
    with open("predicted/compare.json") as file:
        rows = json.load(file)["methods"]
    return {(x["method"], x["checkpoint_activations"], x["dtype"]): x for x in rows}


def test_predict_allocates_nothing_and_leaves_all_as_it_was(tmp_path, monkeypatch, capsys):
    """A 7B model's step in an empty folder: the ledger by hand, and less memory than one of its
    matrices takes."""
    monkeypatch.chdir(tmp_path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    sizes = ["--n-layer", 2, "--seq-len", 512]
    found = table_of("--predict", "7b", "--methods", "dpo", *sizes)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    C, V = 4096, 50304
    n = V * C + 512 * C + 2 * (12 * C**2 + 13 * C) + 2 * C
    policy, ref = found["dpo", True, "bfloat16-pure"]["models"]
    assert policy["parameters"] == ref["parameters"] == n and policy["trainable"]
    assert policy["bytes"] == 8 * n and ref["bytes"] == 2 * n  # 2 weights, 2 gradients, 4 moments
    policy, ref = found["dpo", True, "bfloat16"]["models"]
    linear = 2 * (12 * C**2 + 9 * C)  # with their biases
    assert policy["bytes"] == 16 * n and ref["bytes"] == 4 * n - 2 * linear
    assert grown * 1024 < V * C * 2
    assert [path.name for path in tmp_path.iterdir()] == ["predicted"]
    said = " ".join(capsys.readouterr().out.split())
    assert (
        "--predict 7b, tokens:256+256, 4 sequences per step (a pair is two), 4 per forward" in said
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "method, pure, mixed",
    [
        ("simpo", 50.4, 100.8),
        ("dpo", 62.8, 113.6),
        ("ppo", 125.1, 225.6),
        ("reward_model", 50.1, 99.5),
        ("rlaif", 75.2, 126.4),
    ],
)
def test_the_figures_of_a_7b_model(method, pure, mixed, tmp_path, monkeypatch, capsys):
    """4 sequences of 2,048 tokens, activations checkpointed, GiB"""
    task, config = predict.settings(training.parse(compare.Options, ["--predict", "7b"]))
    for dtype, size in (("bfloat16-pure", pure), ("bfloat16", mixed)):
        found = predict.ask(method, task, config, True, dtype, n=4)
        assert round(found["predicted_bytes"] / 2**30, 1) == size


@pytest.mark.slow
def test_the_table_has_every_row_and_both_precisions(tmp_path, monkeypatch, capsys):
    """Of a small model; the other sizes reach it, a pair is two, and the card leaves 2 GiB."""
    monkeypatch.chdir(tmp_path)
    sizes = ["--n-layer", 1, "--n-head", 2, "--n-embd", 32, "--vocab-size", 1000, "--seq-len", 64]
    found = table_of("--predict", "own", *sizes, "--batch-size", 8, "--micro-batch", 4)
    dtypes = "bfloat16", "bfloat16-pure"
    every = [(row, on, x) for row in SETTINGS for on in (False, True) for x in dtypes]
    assert list(found) == every
    text = (tmp_path / "predicted/README.md").read_text()
    assert (
        text.count("\n| ") == 2 + len(every) // 2 and "tokens:32+32, 8 sequences per step" in text
    )
    n = 1000 * 32 + 256 * 32 + 12 * 32**2 + 13 * 32 + 2 * 32
    for (row, *_), x in found.items():
        assert x["models"][0]["parameters"] == n + (33 if row == "reward_model" else 0)
        assert x["predicted_bytes"] == sum(x["predicted"].values()) and x["card"] == "24 GB"
    uncut = table_of("--predict", "own", "--methods", "dpo", *sizes, "--batch-size", 8)
    for key, x in uncut.items():
        assert x["predicted_bytes"] > found[key]["predicted_bytes"]
    cards = {21: "24 GB", 22.5: "40 GB", 77: "80 GB", 100: "141 GB", 200: "none"}
    assert all(predict.fits(size * 2**30) == card for size, card in cards.items())


def test_a_run_is_predicted_from_its_record(endless, monkeypatch, capsys):
    """As compare.py does it; nothing of a file's rows, nor where the checkpoint is gone."""
    ran, _ = both("dpo", endless, monkeypatch, capsys)
    first = lines(endless / "dpo-measured.jsonl")[0]
    found = predict.of_run("dpo", first)
    assert found.keys() == {"predicted", "predicted_bytes", "predicted_most"}
    assert found["predicted_bytes"] == pytest.approx(ran["peak_bytes"], rel=1e-3)
    for change in ({"task": "my.jsonl"}, {"out": "gone.pt"}):
        assert predict.of_run("dpo", first | {"options": first["options"] | change}) == {}


@pytest.mark.parametrize(
    "args, said",
    [
        (["--seq-len", 64], "--seq-len is read with --predict only"),
        (["--vocab-size", 64], "--vocab-size is read with --predict only"),
        (["--predict", "2b"], "give own, 1b, 7b, or a checkpoint's folder"),
        (["--predict", "1b", "--seq-len", 2], "must be at least 4"),
        (["--predict", "own", "--n-embd", 30], "--n-embd 30 is not a multiple of --n-head 4"),
        (["--predict", "own", "--batch-size", 3], "sequences come in pairs; give even numbers"),
    ],
)
def test_mistakes_with_predict(args, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main("compare", *args) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())

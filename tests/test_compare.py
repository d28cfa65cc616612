"""The comparison of compare.py: the runs that it starts, the files that it keeps, and the tables
that it prints."""

import importlib
import itertools
import json
import os
import sys

import pytest
from conftest import main, run

import compare
from analysis import plots, rows, tables
from training import parse

STUB = """
import json, os, signal, sys
name, options = os.path.basename(sys.argv[0]), dict(zip(sys.argv[1::2], sys.argv[2::2]))
out = options["--out"]
with open(os.path.join(os.path.dirname(out), "calls"), "a") as f:
    f.write(name + "\\n")
if name == "dpo.py" and not os.path.exists("mended"):
    os.kill(os.getpid(), signal.SIGKILL)
models = [{"role": "policy", "trainable": True, "parameters": 10, "bytes": 160}]
steps = int(options.get("--steps", 100))
final = {"models": models, "forward_passes": 1, "backward_passes": 1, "flops_per_token": 60,
         "trained_tokens": 100 * steps, "reward": 1.0 + int(options["--seed"]), "wall_s": 1,
         "step_ms": 5.0 if name == "simpo.py" else 10.0, "kl": 2.0}
open(out, "w").write("PK nanopo " + " ".join(sys.argv))
made = {"steps": steps, "beta": float(options.get("--beta", 0.1)), "batch_size": 32}
made |= {"out": out, "task": "exact", "dtype": "auto"}
first = {"method": "x", "task": "exact", "options": made, "dtype": "float32"}
with open(out[:-3] + ".jsonl", "w") as f:
    f.write(json.dumps(first) + "\\n" + json.dumps({"final": final}) + "\\n")
"""
KILLED = "exit code -9: killed"


@pytest.fixture
def stubs(tmp_path, monkeypatch):
    """Scripts that write what compare.py reads at once; dpo.py is killed until there is a file
    `mended`."""
    for row in rows.EVERY.values():
        (tmp_path / f"{row.script}.py").write_text(STUB)
    monkeypatch.setattr(compare, "HERE", tmp_path)
    monkeypatch.setattr(compare.answers, "side_by_side", lambda paths, o: [])  # no checkpoints
    monkeypatch.chdir(tmp_path)
    return tmp_path


def rows_of(folder):
    """-> the rows of compare.json"""
    return json.loads((folder / "compare.json").read_text())["methods"]


def test_a_killed_method_is_a_row_and_the_rest_is_kept(stubs, capsys):
    args = ["--methods", "dpo", "simpo", "--seeds", "2", "--task", "arithmetic:2"]
    assert main("compare", *args) == 1
    said = capsys.readouterr()
    folder = stubs / "out/compare/arithmetic-2"
    assert "failed: dpo-0, dpo-1" in said.err
    assert f"| dpo    | failed: {KILLED}; {KILLED}" in said.out
    dpo, simpo = rows_of(folder)
    assert dpo["runs"] == 0 and dpo["failed"] == {"dpo-0": KILLED, "dpo-1": KILLED}
    assert simpo["runs"] == 2 and simpo["reward"] == 1.5
    assert simpo["reward_sd"] == pytest.approx(0.5**0.5)
    assert simpo["steps"] == 400  # 25,600 responses, 32 pairs a step
    assert simpo["trained_tokens"] == 40_000
    (stubs / "mended").touch()
    (folder / "calls").write_text("")
    assert main("compare", *args) == 0
    calls = (folder / "calls").read_text().split()
    assert calls == ["dpo.py", "dpo.py"]  # what had ended is not run again
    dpo, simpo = rows_of(folder)
    assert dpo["runs"] == 2 and dpo["step_over_simpo"] == 2.0 and dpo["flops_over_simpo"] == 1.0
    assert "1.50 ± 0.50" in (folder / "README.md").read_text()


def test_another_start_runs_anew_and_a_failure_is_not_taken_for_the_run_before(stubs, capsys):
    """The stage's checkpoint changes, so what started from it is run again; killed, it has no
    figures, though older ones were there."""
    simpo = ["--methods", "simpo", "--task", "exact"]
    compare.main(simpo)
    calls = stubs / "out/compare/exact/calls"
    calls.write_text("")
    compare.main(simpo)
    assert calls.read_text() == ""
    compare.main([*simpo, "--n-layer", "1"])
    assert calls.read_text().split() == ["sft.py", "simpo.py"]
    (stubs / "mended").touch()
    compare.main(["--methods", "dpo", "--task", "exact", "--budget", "256"])
    (stubs / "mended").unlink()
    for _ in range(2):
        assert main("compare", "--methods", "dpo", "--task", "exact", "--budget", "512") == 1
        assert f"| dpo    | failed: {KILLED}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name",
    "README.md compare.json commands.json report.html time.png sft-0.jsonl dpo-0.state dpo-0.pt"
    " curves.html curves.png memory.png".split(),
)
def test_what_no_script_wrote_is_not_replaced(name, stubs, tiny, capsys):
    """It is refused before anything runs, and for its name alone."""
    how = ["--methods", "dpo", "--task", "exact"]
    how = ["--records", tiny / "out/reviews/sft.jsonl"] if name[:6] == "curves" else how
    how = ["--predict", "own"] if name == "memory.png" else how
    (stubs / "c").mkdir()
    (stubs / "c" / name).write_text("mine")
    assert main("compare", *how, "--out", "c") == 2
    assert f"--out c would overwrite c/{name}, which" in capsys.readouterr().err
    assert (stubs / "c" / name).read_text() == "mine"
    assert {x.name for x in (stubs / "c").iterdir()} == {name, "compare.lock"}


def test_a_moved_folder_is_kept_and_other_rows_run_anew(stubs):
    """What a comparison reads counts by its content, and not by its place."""
    (stubs / "rows.jsonl").write_text("{}")
    (stubs / "s.pt").write_text("start")

    def runs(task, init, out):
        how = ["--methods", "simpo", "--task", task, "--init", init, "--out", out]
        assert main("compare", *how) == 0
        return len((stubs / out / "calls").read_text().split())

    assert runs("rows.jsonl", "s.pt", "a") == 1
    for name, moved in {"rows.jsonl": "other.jsonl", "s.pt": "t.pt", "a": "b"}.items():
        os.rename(name, moved)
    assert runs("other.jsonl", "t.pt", "b") == 1
    (stubs / "other.jsonl").write_text("[]")
    assert runs("other.jsonl", "t.pt", "b") == 2


def test_other_options_run_anew(stubs):
    for budget in (256, 512):
        args = ["--methods", "simpo", "--task", "exact", "--budget", str(budget), "--sweep", "1"]
        compare.main(args)
    calls = (stubs / "out/compare/exact/calls").read_text().split()
    assert calls == ["sft.py", *["simpo.py"] * 6]
    found = rows_of(stubs / "out/compare/exact")
    assert [line["swept"] for line in found] == [False, True, True]
    assert [line["steps"] for line in found] == [2] * 3
    assert [line["value"] for line in found] == [0.1, 0.67, 6.0]


@pytest.mark.parametrize(
    "args, said",
    [
        (["--methods", "dpo", "ddpo"], "--methods ddpo: no such row; there is dpo, "),
        (["--batch-size", "8"], "--batch-size is read with --predict only"),
        (["--predict", "7b", "--jobs", "2"], "--jobs is read without --predict only"),
        (["--predict", "7b", "--sweep", "1"], "--sweep is read without --predict only"),
        (["--init", "missing.pt"], "missing.pt: no such file"),
        (["--task", "my.jsonl"], "--init is needed with a file"),
        (["--task", "exact", "--methods", "rlaif"], "rlaif learns its skills on reviews only"),
        (["--out", "sft.py"], "--out sft.py is a file; give a folder"),
        (["--records", "none.jsonl"], "--records none.jsonl is not the record of a run"),
        (["--records", "a.jsonl", "--seeds", "2"], "--records only draws"),
    ],
)
def test_mistakes_of_a_comparison(args, said, stubs, capsys):
    before = sorted(stubs.iterdir())
    assert main("compare", *args) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
    assert sorted(stubs.iterdir()) == before


# ---- the plan


def planned(tmp_path, *args):
    """-> (the stages, the runs) of a command line"""
    o = parse(compare.Options, list(args))
    o.methods = compare.rows_of(o)
    return rows.plan(o, tmp_path)


@pytest.mark.parametrize("more, budget", [([], 9600), (["--quick"], 1920)])
def test_plan_spends_the_budget(more, budget, tmp_path):
    """Every row trains on 9,600 response sequences of reviews, the default, and on 1,920 with
    --quick."""
    runs = planned(tmp_path, *more, "--methods", *rows.ROWS)[1]
    assert {item.row for item in runs} == set(rows.ROWS) - {"sft"}
    for item in runs:
        steps = int(item.command[item.command.index("--steps") + 1])
        assert steps * rows.shape("reviews", item.row)[1] == budget, item.row


@pytest.mark.parametrize("row", rows.ROWS)
@pytest.mark.parametrize("task", ["reviews", "arithmetic:2", "exact", "tokens:4+4"])
def test_budgets_are_equal(row, task):
    """What a step trains on, counted from its options: pairs twice, passes times."""
    words, n = rows.shape(task, row)
    o = dict(zip(words[::2], map(int, words[1::2])))
    answers = 2 if rows.EVERY[row].pairs else 1
    responses = o["--batch-size"] * o.get("--group", 1)
    each = o.get("--updates", 1) * (1 if "--group" in o else answers)
    assert responses * each == n and responses % o.get("--minibatches", 1) == 0


def test_strengths_and_judges_are_the_scripts_options(tmp_path):
    """IPO's τ is --beta, RLOO sums over tokens, PPO gets the reward model that is made first, and
    every command is one that its script reads."""
    stages, runs = planned(tmp_path, "--sweep", "2", "--seeds", "2", "--n-layer", "2")
    assert [item.name for item in stages] == ["sft-0", "reward_model-0"]
    commands = {item.name: item.command for item in stages + runs}
    assert len(commands) == len(stages + runs) and "sft-1" in commands and "dpo-1" in commands
    assert commands["ipo-beta-3-1"][-4:-2] == ["--seed", "1"] and "3.0" in commands["ipo-beta-3-1"]
    assert "--adv-norm loo --agg sum --kl reward" in " ".join(commands["rloo-0"])
    judge = f"--reward {tmp_path}/reward_model-0.pt"
    assert judge in " ".join(commands["ppo-0"]) and judge in " ".join(commands["ppo-beta-0.15-0"])
    assert "--n-layer 2" in " ".join(commands["rlaif-0"]) and "rlaif-1" in commands
    for command in commands.values():
        script = __import__(command[0].removesuffix(".py"))
        parse(script.Options, command[1:], script.PRESETS)
    assert all(
        " --init " in " ".join(c) for name, c in commands.items() if name[:3] in ("dpo", "ppo")
    )
    tasks = ("exact", "--methods", "ppo"), ("arithmetic:2", "--methods", "ppo")
    for task in tasks:
        stages, runs = planned(tmp_path, "--task", *task)
        assert [item.row for item in stages] == ["sft"] and "--reward" not in runs[0].command


# ---- tables and pictures


def test_no_matplotlib_is_one_line(stubs, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    compare.main(["--methods", "simpo", "--task", "exact"])
    said = capsys.readouterr().out
    assert said.count("no pictures: they need matplotlib (pip install matplotlib)") == 1
    assert not list((stubs / "out/compare/exact").glob("*.png"))


LINE = {"method": "dpo", "runs": 3, "swept": False, "value": 0.1, "reward": 1.0, "reward_sd": 0.1}
LINE |= {"kl": 2.0, "kl_sd": 0.2, "length": 9.0, "length_sd": 1.0}
LINE |= {"step_ms": 9.0, "sample_ms": 5.0, "update_ms": 4.0}
LINE |= {"peak": {"weights": 10, "logits": 5}, "frontier": [[0.0, 0.0], [1.0, 1.0], [2.0, 1.2]]}


def test_pictures(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    steps = [(1, 1.0, 0.1), (2, 0.5, 0.4)]
    course = [{"step": step, "entropy": x, "reward": y} for step, x, y in steps]
    evals = []
    for i in (1, 2):
        found = {"loss": [0.7, 0.6], "reward": [0.1 * i, 0.2], "kl": [0.1, 0.2 * i]}
        evals.append({"step": i, "sequences": 64 * i} | found)
    grpo = LINE | {"method": "grpo", "course": course}
    online = LINE | {"method": "online_dpo", "evals": evals}
    failed = {"method": "kto", "runs": 0, "failed": {}, "swept": False}
    paths = plots.draw("exact", [LINE, grpo, online, failed], tmp_path)
    names = [path.name for path in paths]
    assert names == [f"{x}.png" for x in "frontier length memory time entropy course".split()]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    many = [LINE | {"method": row, "evals": evals} for row in rows.ROWS]
    said = [("x", [(name, {"text": "y"}) for name in ("reference", *rows.ROWS)])]
    monkeypatch.setattr(plots, "saved", lambda plt, folder, found: [x for x in found if found[x]])
    assert plots.draw("exact", many, tmp_path, said)[:2] == ["learning", "frontier"]


def test_a_picture_of_all_methods_leaves_some_out():
    """Not if they are few, and never a method that is new."""
    lines = [{"method": row} for row in (*rows.ROWS, "new")]
    shown = [line["method"] for line in plots.few(lines)]
    assert len(shown) == plots.FEW + 1 and "new" in shown and "cdpo" not in shown
    assert plots.few(lines[:8]) == lines[:8]


def test_labels_lie_on_no_point_and_on_no_other_label():
    """Thirty points in a small field, a name at each of twelve"""
    plt = pytest.importorskip("matplotlib.pyplot")
    figure, axes = plt.subplots()
    points = [(0.1 * (i % 6), 0.07 * i % 0.5) for i in range(30)]
    axes.plot(*zip(*points), marker="o", linestyle="")
    names = [(f"method_{i}", *points[i]) for i in range(12)]
    plots.label(figure, axes, names, points)
    figure.canvas.draw()
    alone = importlib.import_module("matplotlib.text").Text  # without the lines to the points
    boxes = [alone.get_window_extent(text) for text in axes.texts]
    assert len(boxes) == 12 and not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    for x, y in axes.transData.transform(points):
        assert not any(box.contains(x, y) for box in boxes)
    plt.close(figure)


def test_a_row_of_the_memory_picture_has_both_precisions(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    drawn = []
    monkeypatch.setattr(plots, "stacked", lambda plt, rows, *_: drawn.extend(rows))
    found = []
    for method, on, dtype in itertools.product(("dpo", "ppo"), (False, True), plots.PRECISIONS):
        parts = {"weights": 2**30 * (1 + on)}
        facts = {"method": method, "checkpoint_activations": on, "dtype": dtype}
        found.append(facts | {"predicted": parts})
    assert plots.draw_prediction(found, "GiB", tmp_path) == []
    bars = [("autocast", {"weights": 2**31}), ("pure bf16", {"weights": 2**31})]
    assert drawn == [("dpo", bars), ("ppo", bars)]


def test_a_prediction_fits_100_columns_and_its_file_has_all(tmp_path, monkeypatch, capsys):
    sizes = dict.fromkeys([*tables.PARTS], 2**36)
    x = {"checkpoint_activations": False, "dtype": "bfloat16", "card": "no card"} | {
        "predicted_bytes": 2**38, "predicted": sizes, "predicted_most": sizes,
        "models": [{"role": role, "bytes": 2**37} for role in ("policy", "critic", "reward")],
    }  # fmt: skip
    monkeypatch.setattr("analysis.predict.ask", lambda method, *_: x | {"method": method})
    monkeypatch.chdir(tmp_path)
    assert main("compare", "--predict", "7b", "--methods", "online_dpo", "dpo-precomputed") == 0
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= 100 and "README.md has the other columns" in said
    written = next(tmp_path.rglob("README.md")).read_text()
    assert "critic 128.0" in written and "critic 128.0" not in said


def test_a_course_is_the_evaluations_and_the_loss_between_them():
    """Of two runs: each figure a list, the loss a mean since the evaluation before; in the table
    means over runs, nearest to a share."""

    def record(seed):
        out = []
        for step in (1, 2, 3, 4):
            out.append({"step": step, "loss": step + 10.0 * seed})
            if step % 2 == 0:
                figures = {"reward": -step - seed, "kl": 0.5, "length": 3.0}
                out.append({"step": step, "eval": figures})
        return out

    evals = tables.evaluations([record(0), record(1)], 64)
    two = {"step": 2, "sequences": 128, "loss": [1.5, 11.5], "reward": [-2, -3], "kl": [0.5, 0.5]}
    four = {"step": 4, "sequences": 256, "loss": [3.5, 13.5], "reward": [-4, -5], "kl": [0.5, 0.5]}
    assert evals == [two, four]
    found = tables.course_rows([{"method": "dpo", "labels": 4800, "evals": evals}])
    (row,), text = found, tables.table(found).splitlines()
    assert len(text) == 3 and text[0].split(" | ")[2] == "loss / reward / KL after 10 %"
    cells = ["6.50 / −2.50 / 0.50"] * 4 + ["8.50 / −4.50 / 0.50"]  # at 75 % both are equally near
    assert list(row.values()) == ["dpo", "4.8", *cells]
    assert tables.course_rows([{"method": "kto"}]) == []


def test_labels_that_were_asked_for():
    """A pair a row and step, of few fixed pairs each once, of one's own pairs as many as were not
    equal; none for rewards."""
    options = {"steps": 100, "batch_size": 32}
    assert tables.labels("dpo", options | {"pairs": 0}, {}) == 3200
    assert tables.labels("dpo-few", options | {"pairs": 256}, {}) == 256
    assert tables.labels("kto", options, {}) == 3200
    assert tables.labels("online_dpo", options, {"labels": 3111}) == 3111
    assert tables.labels("grpo", options, {}) is None and tables.labels("sft", options, {}) is None


@pytest.mark.slow
def test_quick_end_to_end(tmp_path):
    done = run("compare.py", "--quick", cwd=tmp_path)
    assert "failed" not in done.stdout
    found = rows_of(tmp_path / "out/compare/reviews")
    assert [line["method"] for line in found] == list(rows.ROWS)
    assert all(line["runs"] == 1 for line in found)
    for line in found:
        held = [m["role"] + ("*" if m["trainable"] else "") for m in line["models"]]
        assert held == rows.ROWS[line["method"]].models.split(), line["method"]
    trained = {line["method"]: line["trained_tokens"] for line in found if line["method"] != "sft"}
    assert max(trained.values()) < 3 * min(trained.values())
    assert all(line["peak_bytes"] > 0 and line["predicted_bytes"] > 0 for line in found)

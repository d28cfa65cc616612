"""analysis/publish.py: every printed figure has a source, and the pages show what is kept of it."""

import json
import re
import subprocess
import sys

import pytest
from conftest import main

from analysis import digest, places, publish, sources, tables
from analysis.places import PICTURES, PLACES, Place
from analysis.sources import SOURCES, Source
from data import UserError

PAGES = {page: page.read_text("utf-8") for page in publish.pages()}
FOUND = [
    (page, name, text[begin:end])
    for page, text in PAGES.items()
    for name, begin, end in publish.places(text)
]
BLOCKS = re.compile(r"^```(\w*)\n(.*?)^```$|(?:^\|[^\n]*\n)+", re.M | re.S)
COMMAND = re.compile("(OMP_NUM_THREADS=1 )?(python|pip|pytest|torchrun|ruff|git|tail|echo) ")
MEASURED = re.compile(r"\| −?\d+\.\d")  # a cell that begins with a figure
UNMEASURED = "departures.md", "data.md", "metrics.md", "add-a-method.md"  # they quote no run


def test_every_place_has_one_block():
    assert sorted(name for _, name, _ in FOUND) == sorted(PLACES)


def test_every_source_is_read():
    read = {name for place in [*PLACES.values(), *PICTURES.values()] for name in place.sources}
    assert read <= {*SOURCES}
    for name in {*SOURCES} - read:
        assert any(f"runs/{name}.json" in text for text in PAGES.values()), f"no page has {name}"


@pytest.mark.parametrize("page", [path for path in PAGES if path.name not in UNMEASURED])
def test_no_figure_is_unmarked(page):
    """Tables with more than three cells of figures, and what commands print, have a source."""
    text = PAGES[page]
    marked = {begin for _, begin, _ in publish.places(text)}
    for block in BLOCKS.finditer(text):
        table = block[0].startswith("|") and len(MEASURED.findall(block[0])) > 3
        printed = block[2] and not block[1] and page.name in ("questions.md", "break-it.md")
        if table or (printed and not COMMAND.match(block[2])):
            assert block.start() in marked, f"write <!-- from: NAME --> above\n{block[0][:200]}"


@pytest.mark.parametrize("page, name, block", FOUND, ids=[name for _, name, _ in FOUND])
def test_a_page_shows_the_run_that_is_kept(page, name, block):
    shown = publish.block_of(name)
    assert not shown or block == shown, "python -m analysis.publish writes the pages"


def test_a_cheap_figure_is_that_of_todays_code(capsys):
    """It takes half a minute to make it again: python -m analysis.publish --only memory/card"""
    assert main("analysis.publish", "--check", "--only", "memory/card") == 0
    assert "1 of 1 sources are printed by the code of today" in capsys.readouterr().out


def test_pictures_are_those_of_the_kept_runs():
    for name in PICTURES:
        assert publish.is_drawn(name) is not False, "python -m analysis.publish draws them"


def test_kept_runs_say_where_they_were_made():
    kept = [path for path in publish.RUNS.rglob("*.json")]
    assert sum(path.stat().st_size for path in kept) <= 1_000_000
    for path in kept:
        run = json.loads(path.read_text("utf-8"))
        keys = "commands seconds threads machine torch commit digest result"
        assert [*run] == keys.split()
        assert str(path.relative_to(publish.RUNS).with_suffix("")) in SOURCES


# ---- a project of two scripts


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with tell.py, which imports figure.py, and a page with its place"""
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text("a\n\n<!-- from: x/tell -->\n```\nold\n```\n\nb\n")
    (tmp_path / "figure.py").write_text('"""A figure."""\n\nif True:\n    x = 4  # first\n')
    (tmp_path / "tell.py").write_text("import figure\n\nprint(figure.x)\n")
    monkeypatch.chdir(tmp_path)
    for module in (publish, digest):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(digest, "NAME_SCRIPTS", (tmp_path,))
    monkeypatch.setattr(publish, "RUNS", tmp_path / "docs/runs")
    source = Source(("tell.py",), "x", sources.text)
    monkeypatch.setattr(publish, "SOURCES", {"x/tell": source})
    monkeypatch.setattr(publish, "PLACES", {"x/tell": Place(("x/tell",), places.fenced)})
    monkeypatch.setattr(publish, "PICTURES", {})
    forget()
    yield tmp_path
    forget()


def forget():
    digest.read.cache_clear()
    digest.digest.cache_clear()


def test_a_run_is_made_once_and_written(project, capsys):
    assert main("analysis.publish") == 0
    assert "1 sources made, 0 were there" in capsys.readouterr().out
    assert (project / "README.md").read_text().endswith("-->\n```\n4\n```\n\nb\n")
    (project / "README.md").write_text("<!-- from: x/tell -->\n```\nlost\n```\n")
    assert main("analysis.publish") == 0 and main("analysis.publish", "--check") == 0
    assert "0 sources made, 1 were there" in capsys.readouterr().out
    assert "```\n4\n```" in (project / "README.md").read_text()


def test_what_changes_no_figure_makes_no_run_old(project):
    main("analysis.publish")
    (project / "figure.py").write_text('"""Other."""\n\nif True:\n    x = 4  # second\n')
    forget()
    assert main("analysis.publish", "--check") == 0
    (project / "figure.py").write_text("x = 5\n")
    forget()
    assert main("analysis.publish", "--check") == 1
    main("analysis.publish")
    assert "```\n5\n```" in (project / "README.md").read_text()


def test_the_message_of_an_error_makes_no_run_old(project):
    text = "x = 4\nif x > {}:\n    raise {}\n"
    digests = []
    for bound, error in (
        (4, "ValueError('too large')"),
        (4, "ValueError('at most 4')"),
        (5, "E()"),
    ):
        (project / "figure.py").write_text(text.format(bound, error))
        forget()
        digests.append(publish.SOURCES["x/tell"].digest)
    assert digests[0] == digests[1] != digests[2]


def test_a_run_that_fails_keeps_what_was_there(project, capsys):
    main("analysis.publish")
    (project / "tell.py").write_text("raise SystemExit('no figure')\n")
    forget()
    assert main("analysis.publish") == 1
    assert "x/tell: no figure" in capsys.readouterr().err
    assert "```\n4\n```" in (project / "README.md").read_text()


@pytest.mark.parametrize("args", [["--only", "nothing"], ["--jobs", 0]])
def test_a_mistake_is_one_line(args, capsys):
    assert main("analysis.publish", *args) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_mark_without_a_block_is_refused(project):
    (project / "README.md").write_text("<!-- from: x/tell -->\n\nno block\n")
    with pytest.raises(UserError, match="no block below it"):
        list(publish.places((project / "README.md").read_text()))


def test_a_block_ends_where_it_ends():
    text = "<!-- from: a -->\n| x |\n|---|\n| 1 |\n\nb\n\n| y |\n\n"
    text += "<!-- from: c -->\n```\nd\n```\n\n```\n"
    found = [(name, text[begin:end]) for name, begin, end in publish.places(text)]
    assert found == [("a", "| x |\n|---|\n| 1 |\n"), ("c", "```\nd\n```\n")]


def test_only_what_a_command_uses_makes_its_run_old(project):
    """tell.py uses one function of figure.py, and a script that a string names."""
    figure = "import json\n\nX = 1\nY = 2\n\n\ndef f():\n    return X\n\n\ndef g():\n    return Y\n"
    (project / "figure.py").write_text(figure)
    (project / "tell.py").write_text("from figure import f\n\nprint(f(), 'other.py --x')\n")
    (project / "other.py").write_text("x = 1\n")
    main("analysis.publish")

    def is_old(name, text):
        before = (project / name).read_text()
        (project / name).write_text(text)
        forget()
        old = publish.is_old("x/tell")
        (project / name).write_text(before)
        return old

    assert not is_old("figure.py", figure.replace("Y = 2", "Y = 3"))
    assert not is_old("figure.py", figure.replace("return Y", "return 0"))
    assert is_old("figure.py", figure.replace("X = 1", "X = 3"))
    assert is_old("figure.py", figure.replace("return X", "return 0"))
    assert is_old("figure.py", figure + "print()\n"), "an import runs it"
    assert is_old("other.py", "x = 2\n")


def test_a_series_is_kept_by_seed(tmp_path):
    """Of two seeds: the closing figures, the means of the logged steps, and 1 of 1 evaluations"""
    source = sources.series("dpo.py --task exact", "x", 2, take=sources.optima)
    assert source.commands[1] == "dpo.py --task exact --seed 1 --name task-exact-1"
    assert source.commands[2].split()[2:] == [f"out/exact/dpo-task-exact-{i}.pt" for i in (0, 1)]
    (tmp_path / "out/exact").mkdir(parents=True)
    lines = [{"method": "dpo"}, {"step": 5, "eval": {"kl": 1}}, {"step": 9, "loss": 3.0}]
    lines += [{"step": 10, "loss": 1.0}, {"final": {"kl": 2.0, "models": []}}]
    for seed in (0, 1):
        path = tmp_path / f"out/exact/dpo-task-exact-{seed}.jsonl"
        path.write_text("\n".join(map(json.dumps, lines)))
    said = "a: KL(π‖own optimum) 0.5, TV(π, own optimum) 1e-05, KL(π‖π*) 3\n"
    said += "b: no optimum of this loss is known for these options, KL(π‖π*) 4\n"
    first, second = source.take(["", "", said], tmp_path)
    assert first["optimum"] == {"KL(π‖own optimum)": 0.5, "TV(π, own optimum)": 1e-5}
    assert second["optimum"] == {} and second["final"] == {"kl": 2.0}
    assert second["mean"] == {"step": 9.5, "loss": 2.0}
    assert second["evals"] == [{"step": 5, "kl": 1}]


def test_tables_by_hand():
    """GiB of 2^30 bytes, pure bf16 first"""
    entry = {"method": "dpo", "predicted_bytes": 3 * 2**29, "card": "24 GB", "dtype": "bfloat16"}
    pure = {"predicted_bytes": 2**30, "card": "no card", "dtype": "bfloat16-pure"}
    found = [entry, entry | pure]
    assert places.both_precisions(", LoRA", "mixed", found) == (
        "| method | 7B, GiB: pure bf16 | fits | 7B, GiB: mixed | fits |\n|---|---|---|---|---|\n"
        "| DPO, LoRA | 1.0 | none | 1.5 | 24 GB |\n"
    )
    assert places.fitting([entry | {"setting": "full"}]).endswith("|\n| dpo | full | 1.5 |\n")
    assert places.ranks(found, found).endswith("| dpo | 1.5 / 1.0 | 1.5 / 1.0 |\n")


def test_tables_of_processes():
    """Runs with 1, 2 and 4 processes, then with --shard on 2 and 4; MB of 10^6 bytes"""
    runs = [{"final": {"policy_bytes": 1e6 * i, "peak_bytes": 1e7 * i}} for i in range(1, 6)]
    assert places.processes(runs, runs).splitlines()[2:6] == [
        "| DPO | 1 | 1.0 | 10.0 |  |  |",
        "| DPO | 2 | 2.0 | 20.0 | 4.0 | 40.0 |",
        "| DPO | 4 | 3.0 | 30.0 | 5.0 | 50.0 |",
        "| PPO | 1 | 1.0 | 10.0 |  |  |",
    ]
    assert places.resident([3000, 200, 100, 20, 10]).splitlines()[2:] == [
        "| 1 | 3,000 |  |",
        "| 2 | 200 | 20 |",
        "| 4 | 100 | 10 |",
    ]
    said = ["a\nlargest process: 12 MB\n", "largest process: 3 MB\n"]
    assert sources.megabytes(said, None) == [12, 3]


def test_the_lesson_shows_what_each_method_holds_out():
    """Nats, a share of pairs, and a reward before and after; GiB of 2^30 bytes"""
    ends = [{"nll": 0.5}, *[{"accuracy": 0.75, "accuracy_se": 0.25}] * 3]
    ends += [{"ref_reward": 0.0, "reward": 0.5, "reward_se": 0.125}]
    found = []
    for end in ends:
        final = end | {"kl": -0.5, "kl_se": 0.25, "peak_bytes": 3 * 2**29}
        figures = {"first": {"loss": 2.0, "reward": 0.1}, "last": {"loss": 1.0, "reward": 0.2}}
        found.append([figures | {"final": final}])
    sft, dpo, *_, grpo = places.lesson(*found).splitlines()[2:]
    assert sft == "| SFT | 2.000 → 1.000 | 0.50 nats per token | −0.50 ± 0.25 | 1.5 |"
    assert "| accuracy 0.75 ± 0.25 |" in dpo
    assert "| reward 0.100 → 0.200 | reward 0.00 → 0.50 ± 0.12 |" in grpo


def test_a_real_model_is_named_by_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv("NANOPO_MODEL", raising=False)
    assert "NANOPO_MODEL must name a folder" in sources.real_model(tmp_path)
    for name in ("model", "data", "runs"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(f"NANOPO_{name.upper()}", str(tmp_path / name))
    (tmp_path / "data/gsm8k_sft.jsonl.gz").write_text("")
    assert sources.real_model(tmp_path / "runs") == ""
    found = sorted(path.name for path in (tmp_path / "runs").iterdir())
    assert found == ["SmolLM2", "gsm8k_sft.jsonl.gz", "my_rewards.py"]


def test_means_have_the_standard_error_of_their_runs():
    """1, 2, 3, 4, 5: the deviation is √2.5, and divided by √5 it is √0.5"""
    assert places.mean(range(1, 6), 2) == "3.00 ± 0.71" and places.mean([2], 1) == "2.0"
    assert tables.pm({"runs": 5, "x": -3.0, "x_sd": 2.5**0.5}, "x") == "−3.00 ± 0.71"


def test_answers_are_cut_into_lines():
    names = "reference", *places.SHOWN
    said = [(name, {"text": "a " * 60, "reward": -1.5, "tokens": 60}) for name in names]
    kind = [(name, {"text": "b", "reward": 1.5, "tokens": 90}) for name in names]
    block = places.answers({"answers": [["Other:", kind], ["A film:", said]]})
    lines = block.splitlines()
    assert lines[:2] == ["```", "A film:"] and lines[2].startswith("  reference  −1.50 | a a")
    assert lines[3].startswith(f"{'':>18} | a") and max(map(len, lines)) <= 103


def row(name, **figures):
    line = {"method": name, "swept": False, "runs": 2, "labels": 1500}
    return line | {"win_rate": 0.5, "win_rate_sd": 0.0} | figures


def test_a_course_shows_a_tenth_a_half_and_the_end():
    """Of 10 evaluations those after steps 10 and 50; then the closing figures, ± their error"""
    evals = [
        {"step": 10 * i, "loss": [1 / i, 1 / i], "kl_star": [float(i), float(i + 2)]}
        for i in range(1, 11)
    ]
    line = row("dpo", evals=evals, kl_star=9.0, kl_star_sd=2**0.5)
    block = places.course(("loss", "kl_star"), {"methods": [line]})
    assert block.splitlines()[2] == (
        "| dpo | 1.5 | 1.00, 0.20, 0.10 | 2.00, 6.00, 9.00 ± 1.00 | 0.50 ± 0.00 |"
    )


def test_the_table_of_verifiers_counts_mixed_groups():
    """GRPO logs the share of groups without a difference, DAPO that of those it keeps."""
    final = {"sampled_tokens": 9000, "reward": 0.5, "entropy": 0.25}
    clipped = {"clip_ratio/low_mean": 0.01, "clip_ratio/high_mean": 0.02}
    runs = {
        "grpo": clipped | {"frac_reward_zero_std": 0.75},
        "ppo": {"policy/clipfrac_avg": 0.03},
        "dapo": clipped | {"kept_fraction": 0.5},
    }
    found = [
        [{"final": final, "last": {"step": 7}, "mean": runs.get(name, runs["grpo"])}]
        for name in sources.VERIFIED
    ]
    lines = places.verifier(*found).splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]]
    assert cells[0][1:] == ["7", "9", "0.500", "0.250", "1.00", "2.00", "25"]
    assert cells[3][1:] == ["7", "9", "0.500", "0.250", "3.00", "", ""]
    assert cells[4][-1] == "50" and {len(line) for line in cells} == {8}


def test_a_loss_without_a_minimum_has_another_distance():
    optimum = {"KL(π‖own optimum)": 0.25, "TV(π, own optimum)": 0.1}
    optimum |= {"loss above its least value": 0.5}
    assert places.own("dpo", {"optimum": optimum}) == "0.250"
    assert places.own("kto", {"optimum": optimum}) == "TV 0.100, loss 0.5000 above its infimum"
    assert places.own("argmax", {"optimum": {}}).startswith("none: ")


def test_score_and_gold_reward_stand_side_by_side():
    evals = [{"step": n, "score": n / 10, "reward": -n / 10} for n in range(10, 60, 10)]
    run = {"evals": evals, "final": {"score": 9.0, "reward": -1.0, "kl": 12.4}}
    lines = places.exploit([run], [run, run]).splitlines()
    assert lines[2].startswith("| 0 | 0 | 1.0 / −1.0 | 2.0 / −2.0 |")
    assert lines[2].endswith("| 9.0 / −1.0 | 12 |") and lines[4].startswith("| 0.01 | 1 |")


def test_the_report_is_that_of_the_kept_runs():
    """docs/report.html has the rewards of README.md's table and the answers of seed 0."""
    page = (publish.ROOT / "docs/report.html").read_text("utf-8")
    found = publish.kept("reviews")["result"]
    for line in places.main_rows(found):
        assert f">{tables.pm(line, 'reward')}</td>" in page, line["method"]
    for prompt, said in found["answers"]:
        assert prompt in page
        shown = [" ".join(answer["text"].split()) for _, answer in said]
        assert all(text in " ".join(page.split()) for text in shown if text.isascii())


# ---- analysis.resident


def resident(*words):
    """Runs analysis.resident in a process of its own -> the finished process"""
    command = [sys.executable, "-m", "analysis.resident", *words]
    return subprocess.run(command, cwd=publish.ROOT, capture_output=True, text=True)


def megabytes(*words):
    return int(re.search(r"largest process: (\d+) MB$", resident(*words).stdout.strip())[1])


@pytest.mark.skipif(sys.platform == "win32", reason="Windows does not count it")
def test_the_memory_of_the_largest_process():
    """A process of the command's process holds 600 MB; python alone has some 10 MB more."""
    held = "b'x' * 600_000_000"
    inner = f'import sys, subprocess; subprocess.run([sys.executable, "-c", "{held}"])'
    assert 600 < megabytes("-c", inner) < 640


def test_a_command_that_fails_has_no_memory():
    said = resident("-c", "raise SystemExit(3)")
    assert said.returncode == 1 and "exit code 3" in said.stderr
    assert resident().returncode == 2

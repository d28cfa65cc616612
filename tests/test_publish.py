"""analysis/publish.py: every printed figure has a source, and the pages show what is kept of it."""

import json
import re

import pytest
from conftest import main

from analysis import publish
from analysis.publish import SOURCES, Source
from data import UserError

PAGES = {page: page.read_text("utf-8") for page in publish.pages()}
PLACES = [
    (page, name, text[begin:end])
    for page, text in PAGES.items()
    for name, begin, end in publish.places(text)
]


def test_every_source_has_one_place():
    assert sorted(name for _, name, _ in PLACES) == sorted(SOURCES)


@pytest.mark.parametrize("page", ["questions.md", "break-it.md"])
def test_no_printed_block_is_unmarked(page):
    [text] = [text for path, text in PAGES.items() if path.name == page]
    marked = {begin for _, begin, _ in publish.places(text)}
    blocks = list(re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S))
    shown = [x for x in blocks if not x[1] and not re.match("python |pytest |tail ", x[2])]
    assert shown and all(x.start() in marked for x in shown), "write <!-- from: NAME --> above it"


@pytest.mark.parametrize("page, name, block", PLACES, ids=[name for _, name, _ in PLACES])
def test_a_page_shows_the_run_that_is_kept(page, name, block):
    if publish.kept(name):
        assert block == publish.block_of(name), "python -m analysis.publish writes the pages"


def test_kept_runs_say_where_they_were_made():
    kept = [path for path in publish.RUNS.rglob("*.json")]
    assert sum(path.stat().st_size for path in kept) <= 1_000_000
    for path in kept:
        run = json.loads(path.read_text("utf-8"))
        assert {*run} == {*"command seconds machine torch commit digest result".split()}
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
    monkeypatch.setattr(publish, "ROOT", tmp_path)
    monkeypatch.setattr(publish, "RUNS", tmp_path / "docs/runs")
    monkeypatch.setattr(publish, "SOURCES", {})
    publish.SOURCES["x/tell"] = Source(("tell.py",), "x", publish.text_of, publish.fenced)
    forget()
    yield tmp_path
    forget()


def forget():
    publish.tree.cache_clear()
    publish.digest.cache_clear()


def test_a_run_is_made_once_and_written(project, capsys):
    assert main("analysis.publish") == 0
    assert "1 runs made, 0 were there" in capsys.readouterr().out
    assert (project / "README.md").read_text().endswith("-->\n```\n4\n```\n\nb\n")
    (project / "README.md").write_text("<!-- from: x/tell -->\n```\nlost\n```\n")
    assert main("analysis.publish") == 0 and main("analysis.publish", "--check") == 0
    assert "0 runs made, 1 were there" in capsys.readouterr().out
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


def test_tables_by_hand(tmp_path):
    """GiB of 2^30 bytes, pure bf16 first, and only with activations checkpointed"""
    entry = {"method": "dpo", "predicted_bytes": 3 * 2**29, "card": "24 GB"}
    rows = [
        entry | {"dtype": dtype, "checkpoint_activations": on}
        for dtype in ("bfloat16", "bfloat16-pure")
        for on in (False, True)
    ]
    rows[3] |= {"predicted_bytes": 2**30, "card": "no card"}
    (tmp_path / "p").mkdir()
    (tmp_path / "p/compare.json").write_text(json.dumps({"methods": rows}))
    found = publish.peaks("dpo 3 s\np/README.md, compare.json\n", tmp_path)
    assert found == [["dpo", "bfloat16", 1.5, "24 GB"], ["dpo", "bfloat16-pure", 1.0, "no card"]]
    assert publish.both_precisions(", LoRA", "mixed", found) == (
        "| method | 7B, GiB: pure bf16 | fits | 7B, GiB: mixed | fits |\n|---|---|---|---|---|\n"
        "| DPO, LoRA | 1.0 | none | 1.5 | 24 GB |\n"
    )
    assert publish.fitting([["dpo", "full", 1.26]]).endswith(
        "|---|---|---|\n| dpo | full | 1.3 |\n"
    )

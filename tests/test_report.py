"""The pages report.html and curves.html: what they show, that they load nothing from elsewhere, and
that their tables sort."""

import json
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
from conftest import ROOT, lines, main
from test_compare import stubs  # noqa: F401

import compare
from analysis import answers, report, tables

EVIL = "<script>alert(1)</script>\x1b[2J & \"quoted\" 'text'"
SHOWN = "&lt;script&gt;alert(1)&lt;/script&gt;·[2J &amp; &#34;quoted&#34; &#39;text&#39;"


def read_answers(reward, text="Fine."):
    return {"prompt": EVIL, "text": text, "tokens": 3, "ended": True, "reward": reward}


@pytest.fixture
def made(stubs, monkeypatch):  # noqa: F811
    """-> (the page of a comparison in which dpo.py failed, its text); the answers are evil"""
    said = [(EVIL, [("reference", read_answers(-1.0)), ("simpo", read_answers(2.0, EVIL))])]
    monkeypatch.setattr(compare.answers, "side_by_side", lambda paths, o: said)
    out = stubs / "deep/folder"
    args = ["--methods", "simpo", "dpo", "kto", "--task", "exact", "--seeds", "2", "--out", out]
    assert main("compare", *args) == 1
    page = out / "report.html"
    return page, page.read_text("utf-8")


def test_the_page_has_every_row_and_why_one_failed(made):
    _, page = made
    body = page[page.index("<tbody>") :]
    assert re.findall(r"<tr><td class=\"text\">(\w+)</td>", body) == ["simpo", "dpo", "kto"]
    assert "dpo-0: exit code -9: killed" in page
    assert "1.50 ± 0.50" in page and "reward −1.00, 3 tokens" in page
    assert page.index("<b>reference</b>") < page.index("<b>simpo</b>")
    answered = json.loads((made[0].parent / "compare.json").read_text())["answers"]
    assert answered[0][0] == EVIL


def test_what_a_model_wrote_is_shown_as_text(made):
    _, page = made
    assert f"<p>{SHOWN}</p>" in page
    assert page.count("<script>") == 1 and "\x1b" not in page


def test_no_text_becomes_html():
    """Nor does it end an attribute: each of these 16, and the title twice, is shown."""
    curve = {"name": EVIL, "ends": EVIL, "lines": [[(1, 2.0)]], "last": 1, "low": 2.0, "high": 2.0}
    parts = {
        "about": EVIL,
        "facts": [(EVIL, EVIL)],
        "failures": [EVIL],
        "table": {"columns": [EVIL], "rows": [[(EVIL, EVIL)]], "texts": []},
        "pictures": [{"name": EVIL, "png": ""}],
        "answers": [(EVIL, [(EVIL, read_answers(None, EVIL))])],
        "curves": [(EVIL, [curve])],
    }
    page = report.page(EVIL, [("", *part) for part in parts.items()])
    assert page.count(SHOWN) == 16 + 2
    assert "<script>alert" not in page and "\x1b" not in page


def test_the_page_loads_nothing_and_names_no_folder(made):
    path, page = made
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", page)
    assert "http" not in page.replace("http-equiv", "")
    for part in path.parent.parts[1:-1]:
        assert part not in page, part


def test_without_jinja2_nothing_is_run(stubs, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setitem(sys.modules, "jinja2", None)
    assert main("compare", "--methods", "simpo", "--task", "exact") == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert "the package jinja2" in said and "pip install jinja2" in said
    assert not (stubs / "out").exists()


def test_folders_are_taken_off_and_nothing_else():
    words = "python dpo.py --out /home/me/out/x.pt --kl 1/2 'a b/c.pt' failed: C:\\x\\y.pt: no"
    assert report.bare(words) == "python dpo.py --out x.pt --kl 2 'a c.pt' failed: C:y.pt: no"
    assert report.bare("exit code 2: dpo.py: loss / nan") == "exit code 2: dpo.py: loss / nan"


def test_cells_are_sorted_by_the_number_that_they_begin_with():
    found = report.table([{"KL": "−1.5 ± 0.7", "note": "of 3 runs"}, {"step": 3}])["rows"]
    assert [[x for _, x in row] for row in found] == [["-1.5", "", ""], ["", "", "3"]]


def test_rewards_have_one_scale_and_each_loss_its_own():
    found = {"dpo": {"loss": [[(1, 5.0)]], "reward": [[(1, 0.0)]]}}
    found["kto"] = {"loss": [[(1, 7.0)]], "reward": [[(1, 4.0)]]}
    spans = [(x["low"], x["high"]) for _, charts in report.curves(found) for x in charts]
    assert spans == [(5.0, 5.0), (0.0, 4.0), (7.0, 7.0), (0.0, 4.0)]


def test_a_curve_has_few_points_which_are_means():
    points = [(step, float(step % 2)) for step in range(1, 1001)]
    found = report.thinned(points, 80)
    assert len(found) <= 80 and found[0] == (7.0, 7 / 13)
    assert report.thinned(points[:3]) == points[:3]


def test_curves_are_of_evaluations_where_there_are_such(tmp_path):
    steps = [{"step": 1, "loss": 2.0, "kl": 9.0}, {"step": 1, "eval": {"kl": 0.5}}]
    record = [{"options": {}}, *steps, {"final": {}}]
    for seed in (0, 1):
        text = "\n".join(map(json.dumps, record))
        (tmp_path / f"dpo-{seed}.jsonl").write_text(text)
    items = [SimpleNamespace(name=f"dpo-{seed}", row="dpo", swept=None) for seed in (0, 1)]
    loss, kl = [(1, 2.0)], [(1, 0.5)]
    assert tables.curves(tmp_path, items) == {"dpo": {"loss": [loss, loss], "KL": [kl, kl]}}


def test_answers_are_of_the_same_prompts(tiny):
    """Of one checkpoint twice they are equal; a third model has others, to the same prompts"""
    sft = str(tiny / "out/reviews/sft.pt")
    o = SimpleNamespace(device="cpu", dtype="auto", task="reviews", seed=0)
    found = answers.side_by_side([("reference", sft), ("same", sft)], o)
    assert len(found) == answers.PROMPTS == len({prompt for prompt, _ in found})
    for prompt, said in found:
        (one, a), (two, b) = said
        assert (one, two) == ("reference", "same") and a == b and a["prompt"] == prompt
        assert 1 <= a["tokens"] <= 4 and -3 <= a["reward"] <= 3


def test_records_in_one_page(tiny, tmp_path, monkeypatch, capsys):
    """Records of one name in two folders get names of their own, and show what they differ in; one
    that has not ended says so. Without matplotlib there is a table, and a line that says why."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        shutil.copy(tiny / "out/reviews/sft.jsonl", tmp_path / name / "sft.jsonl")
    record = (tmp_path / "b/sft.jsonl").read_text().splitlines()[:-1]
    record[0] = record[0].replace('"seed": 0', '"seed": 7')
    (tmp_path / "b/sft.jsonl").write_text("\n".join(record))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("analysis.plots.pyplot", lambda: None)
    assert main("compare", "--records", "a/sft.jsonl", "b/sft.jsonl", "--out", "c") == 0
    said = capsys.readouterr().out
    assert re.search(r"\| a/sft +\| 3 +\| 0 ", said)
    assert re.search(r"\| b/sft +\| 3 +\| 7 .*it has not ended", said)
    page = (tmp_path / "c/curves.html").read_text()
    assert "a/sft" in page and "--seed" in page and "<img" not in page
    assert lines(tmp_path / "a/sft.jsonl")  # what is read stays


def test_records_are_drawn(tiny, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    assert main("compare", "--records", tiny / "out/reviews/sft.jsonl", "--out", "c") == 0
    assert (tmp_path / "c/curves.png").read_bytes().startswith(b"\x89PNG")
    assert "data:image/png;base64," in (tmp_path / "c/curves.html").read_text()


def test_the_readme_has_the_answers_of_the_report():
    """Of one prompt, word for word and with their rewards; the page is small enough to keep."""
    page = (ROOT / "docs/report.html").read_text("utf-8")
    assert len(page) < 1.5e6
    block = next(x for x in (ROOT / "README.md").read_text().split("```") if "reference  " in x)
    prompt, *rows = block.strip().splitlines()
    card = page[page.index(f". {prompt}</h3>") :].split("</h3>")[1]
    for said in re.sub(r"\n +\| ", " ", "\n".join(rows)).splitlines():
        method, reward, text = re.fullmatch(r" *(\w+) +(\S+) \| (.*)", said).groups()
        found = card[card.index(f"<b>{method}</b>") :]
        assert found.index(f"reward {reward}, ") < found.index(f"<p>{text}</p>") < 200, method


# ---- in a browser


def opened(page, fragment=""):
    """-> the page's DOM in headless Chromium, once its script has run"""
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if not browser:
        pytest.skip("chromium is not installed")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    address = page.as_uri() + fragment
    done = subprocess.run([browser, *flags, address], capture_output=True, timeout=120)
    return done.stdout.decode()


def column(dom, slug):
    """-> (method, cell) of each row of the table, as it stands"""
    heads = re.findall(r'data-slug="([^"]*)"', dom)
    rows = re.findall(r"<tr><td.*?</tr>", dom[dom.index("<tbody>") :])
    cells = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in rows]
    return [(row[0], row[heads.index(slug)]) for row in cells]


@pytest.mark.docs
def test_a_browser_sorts_by_the_fragment(made):
    page, _ = made
    text = page.read_text("utf-8").replace('data-value="10.0">10.0', 'data-value="7.5">7.5')
    page.write_text(text, "utf-8")  # kto's step, so that no two are equal
    plain = [method for method, _ in column(opened(page), "method")]
    assert plain == ["simpo", "dpo", "kto"]
    up = column(opened(page, "#sort=step-ms"), "step-ms")
    down = column(opened(page, "#sort=-step-ms"), "step-ms")
    assert [x[0] for x in up] == ["simpo", "kto", "dpo"]
    assert [x[0] for x in down] == ["kto", "simpo", "dpo"]  # without a number: last, both ways
    assert [x[0] for x in column(opened(page, "#sort=method"), "method")] == ["dpo", "kto", "simpo"]
    assert [x[0] for x in column(opened(page, "#sort=none"), "method")] == plain


@pytest.mark.docs
def test_a_browser_runs_no_text_of_a_model(made):
    dom = opened(made[0])
    assert "&lt;script&gt;alert(1)" in dom and dom.count("<script>") == 1

"""The notebook docs/walk.ipynb: its cells print the output that it keeps, and it stays small."""

import json
import re

import pytest

from analysis.walk import NOTEBOOK, code_cells, printed, run

NUMBER = r"-?\d+\.?\d*(?:e-?\d+)?"


def test_the_notebook_is_small_and_has_its_outputs():
    notebook = json.loads(NOTEBOOK.read_text("utf-8"))
    assert NOTEBOOK.stat().st_size <= 300_000
    cells = code_cells(notebook)
    assert [cell["execution_count"] for cell in cells] == [*range(1, len(cells) + 1)]
    pictures = [x for cell in cells for x in cell["outputs"] if "data" in x]
    assert len(pictures) == 1 and sum(map(bool, map(printed, cells))) >= 7
    text = "".join(line for cell in notebook["cells"] for line in cell["source"])
    for link in re.findall(r"\]\((\S+?)\)", text):
        assert (NOTEBOOK.parent / link).exists(), link


@pytest.mark.docs
def test_its_cells_print_what_it_keeps(tmp_path, monkeypatch):
    """Sampled answers may differ on another machine, and figures of runs by a quarter or 0.03;
    everything before the first run is exact."""
    monkeypatch.chdir(tmp_path)
    cells = code_cells(json.loads(NOTEBOOK.read_text("utf-8")))
    trained = False
    for cell, (text, picture) in zip(cells, run(cells), strict=True):
        trained |= "import sft" in "".join(cell["source"])
        kept = printed(cell)
        assert bool(picture) == any("data" in x for x in cell["outputs"])
        if not trained:
            assert text == kept
        else:
            text, kept = (x.partition("\nA drama")[0] for x in (text, kept))
            assert re.sub(NUMBER, "#", text) == re.sub(NUMBER, "#", kept)
            for a, b in zip(re.findall(NUMBER, text), re.findall(NUMBER, kept)):
                assert float(a) == pytest.approx(float(b), rel=0.25, abs=0.03)

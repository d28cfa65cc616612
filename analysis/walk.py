"""Runs docs/walk.ipynb and keeps what its cells print and draw: python -m analysis.walk

A notebook is JSON, and its cells are run by exec in one namespace, so that no Jupyter is needed.
"""

import base64
import contextlib
import io
import json
import os
import tempfile
from pathlib import Path

NOTEBOOK = Path(__file__).parent.parent / "docs/walk.ipynb"


def code_cells(notebook):
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def printed(cell):
    """-> the text that a cell has printed, as the notebook keeps it"""
    streams = [x["text"] for x in cell["outputs"] if x["output_type"] == "stream"]
    return "".join(line for text in streams for line in text)


def run(cells):
    """Runs the cells in the working folder. Yields (the text that each prints, its picture as a PNG
    or b"")."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = {"__name__": "walk"}
    for i, cell in enumerate(cells, 1):
        said, picture = io.StringIO(), io.BytesIO()
        with contextlib.redirect_stdout(said):
            exec(compile("".join(cell["source"]), f"cell {i} of walk.ipynb", "exec"), names)
        if plt.get_fignums():
            plt.savefig(picture, dpi=80)
            plt.close("all")
        yield said.getvalue(), picture.getvalue()


def outputs(text, picture):
    """-> the outputs of a cell, as a notebook holds them"""
    found = []
    if text:
        lines = text.splitlines(keepends=True)
        found.append({"name": "stdout", "output_type": "stream", "text": lines})
    if picture:
        png = {"image/png": base64.b64encode(picture).decode()}
        found.append({"data": png, "metadata": {}, "output_type": "display_data"})
    return found


def main():
    notebook = json.loads(NOTEBOOK.read_text("utf-8"))
    cells, home = code_cells(notebook), os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            for i, (cell, found) in enumerate(zip(cells, run(cells)), 1):
                cell |= {"execution_count": i, "outputs": outputs(*found)}
                print(found[0])
        finally:
            os.chdir(home)
    text = json.dumps(notebook, indent=1, ensure_ascii=False)
    NOTEBOOK.write_text(text + "\n", "utf-8")


if __name__ == "__main__":
    main()

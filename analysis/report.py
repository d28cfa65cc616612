"""Writes one HTML page with all results: figures, pictures and answers.

The page loads nothing: the pictures and the script that sorts the table are embedded. This file
collects the contents of the page as lists and dicts. report.html.jinja writes them, and escapes
every text that comes from a model or a file. Only the last part of a path is shown.
"""

import base64
import datetime
import re
import statistics
from pathlib import Path

import torch

from analysis import tables
from data import printable, user_errors

POINTS = 80  # per curve, at most; each is a mean over neighbouring steps


def comparison(record, lines, paths, found, said):
    """-> the page of a comparison. record: its command, task, machine …; lines: the rows of
    compare.json; paths: the pictures' files; found: curves; said: answers side by side"""
    rows, failed, commands = [], [], []
    for line in lines:
        row = tables.results(line)
        commands += [(row["method"], bare(line["command"]))] if "command" in line else []
        failed += [f"{name}: {bare(why)}" for name, why in line.get("failed", {}).items()]
        if line["runs"] and not line["swept"]:
            row |= tables.costs(line) | tables.budget(line)
        rows.append(row | {"note": bare(row.pop(""))})  # the last column
    seconds = sum(line["wall_s"] * line["runs"] for line in lines if "wall_s" in line)
    ran = [
        ("command", bare(record["command"])),
        ("task", bare(record["task"])),
        ("sequences per run", f"{record['budget']:,}"),
        ("seeds per row", record["seeds"]),
        ("machine", record["machine"]),
        ("torch", torch.__version__),
        ("seconds of training", f"{seconds:.0f}"),
        ("date", datetime.date.today().isoformat()),
    ]
    sections = [
        ("What is seen here", "about", bare(record["task"])),
        ("What was run", "facts", ran),
        failed and ("What failed", "failures", failed),
        ("Figures", "figures", table(rows)),
        ("Pictures", "pictures", pictures(paths)),
        said and ("Answers", "answers", said),
        found and ("Training", "curves", curves(found)),
        ("Commands", "facts", commands),
    ]
    return page(f"nanoPO: the methods on {bare(record['task'])}", sections)


def records(rows, paths):
    """-> the page of some records: how they differ and ended, and their curves"""
    sections = [("Figures", "table", table(rows)), ("Curves", "pictures", pictures(paths))]
    return page("nanoPO: curves of runs", sections)


def page(title, sections):
    """sections: (heading, the part of the template that writes it, its data); empty ones are left
    out -> the page, as text"""
    kept = [section for section in sections if section]
    return template().render(title=title, sections=kept, points=POINTS)


def template():
    """-> the template of the page, from this file's folder. Jinja comes with torch."""
    needs = "report.html needs the package jinja2, which torch usually installs"
    with user_errors(needs, "pip install jinja2"):
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=shown,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"slug": slug, "minus": tables.minus}
    return environment.get_template("report.html.jinja")


def shown(x):
    """-> x as the template writes it, before it is escaped; HTML of its own macros stays HTML"""
    return x if hasattr(x, "__html__") else printable(str(x))


def slug(name):
    """-> a name that can be part of an address: "KL, nats" becomes kl-nats"""
    return re.sub(r"\W+", "-", name.lower()).strip("-")


def bare(words):
    """-> a command or an error, without the folders of its paths"""
    return re.sub(r"[^\s'\"=:;,()]*[/\\](?=[^\s/\\])", "", str(words))


def table(rows):
    """rows: {column: cell}, as for tables.table -> the columns, those of them that hold no number,
    and the cells in their order, each with the number that it is sorted by, or "" """
    columns = list(dict.fromkeys(name for row in rows for name in row))
    cells = [[str(row.get(name, "")) for name in columns] for row in rows]
    texts = [name for name in columns if not any(number(str(row.get(name, ""))) for row in rows)]
    rows = [[(x, number(x)) for x in row] for row in cells]
    return {"columns": columns, "rows": rows, "texts": texts}


def number(cell):
    found = re.match(r"[−-]?\d[\d.]*", cell)
    return found.group().replace("−", "-") if found else ""


def pictures(paths):
    encode = base64.b64encode
    return [{"name": path.stem, "png": encode(path.read_bytes()).decode()} for path in paths]


# ---- curves


def thinned(points, n=POINTS):
    """[(x, y)] -> at most n points, each the mean of neighbours, always the same number of them"""
    size = -(-len(points) // n)
    parts = [points[i : i + size] for i in range(0, len(points), size)]
    return [tuple(map(statistics.fmean, zip(*part))) for part in parts]


def curves(rows):
    """rows: {method: {name of a curve: [points of each seed]}} -> [(method, its charts), …]. The
    rewards of all methods share one scale, and so do their KLs; each loss has its own."""
    heights = {}  # of all curves that share a scale

    def scale(method, name):
        return heights.setdefault((method, name) if name == "loss" else name, [])

    for method, found in rows.items():
        for name, lines in found.items():
            scale(method, name).extend(y for line in lines for _, y in thinned(line))
    return [
        (method, [chart(f"{x} of {method}", found[x], scale(method, x)) for x in found])
        for method, found in rows.items()
    ]


def chart(name, lines, heights):
    """lines: [[(step, y), …], …], one for each seed; heights: all y on the same scale -> the
    contents of a small picture"""
    return {
        "name": name,
        "lines": [thinned(line) for line in lines],
        "last": max(x for line in lines for x, _ in line),
        "ends": ", ".join(f"{line[-1][1]:.3g}" for line in lines),
        "low": min(heights),
        "high": max(heights),
    }

"""One page that holds everything: figures, pictures and answers, opened from a file.

Nothing is loaded from elsewhere: pictures are embedded, the script that sorts the table is at the
end. Every text that a model or a file wrote is escaped; paths lose all but their last part.
"""

import base64
import datetime
import html
import re
import statistics

import torch

from analysis import tables
from data import printable

POINTS = 80  # of a curve, at most; each is a mean over the steps that it stands for
LEFT, WIDTH, HEIGHT = 34, 240, 90  # of a curve's frame, in the units of its picture

STYLE = """
:root { color-scheme: light dark; --line: #d0d0d0; --soft: #f4f4f2; --mark: #0b5cad; }
@media (prefers-color-scheme: dark) { :root { --line: #444; --soft: #24262a; --mark: #7db8f5; } }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.4rem; } h2 { margin-top: 2.5rem; } h3 { margin: 1.5rem 0 .5rem; }
code { overflow-wrap: anywhere; } a { color: var(--mark); }
nav a { margin-right: .7rem; white-space: nowrap; }
.wide { overflow-x: auto; width: fit-content; max-width: 100%; border: 1px solid var(--line); }
table { border-collapse: collapse; font-size: .85rem; white-space: nowrap; }
td, th { padding: .25rem .6rem; border-bottom: 1px solid var(--line); text-align: right; }
td.text { text-align: left; }
thead th { background: var(--soft); } thead a { color: inherit; text-decoration: none; }
thead th[aria-sort] { color: var(--mark); }
th:first-child, td:first-child { position: sticky; left: 0; text-align: left; background: Canvas; }
.pictures { display: grid; gap: 1rem; }
.pictures { grid-template-columns: repeat(auto-fill, minmax(min(100%, 30rem), 1fr)); }
figure { margin: 0; } figure.broad { grid-column: 1 / -1; }
img { width: 100%; background: #fff; border-radius: .3rem; }
figcaption, .note { font-size: .85rem; opacity: .8; }
.grid { display: grid; gap: .7rem; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); }
.card { border: 1px solid var(--line); border-radius: .4rem; padding: .5rem .7rem; }
.card p { margin: .2rem 0 0; white-space: pre-wrap; overflow-wrap: anywhere; }
.first { background: var(--soft); } .failed { border-left: .3rem solid #c33; padding-left: .7rem; }
.card header { display: flex; justify-content: space-between; gap: .5rem; font-size: .85rem; }
svg { width: 100%; height: auto; display: block; } svg text { font-size: 9px; fill: currentColor; }
svg polyline { fill: none; stroke: var(--mark); stroke-width: 1.3; }
svg rect { fill: none; stroke: var(--line); }
"""

SORT = """
const table = document.querySelector("table.sort"), heads = [...table.tHead.rows[0].cells];
function sort() {
  const [, down, slug] = location.hash.match(/^#sort=(-?)(.+)$/) || [];
  const column = heads.findIndex(head => head.dataset.slug === slug);
  if (column < 0) return;
  const value = row => row.cells[column].dataset.value ?? row.cells[column].textContent;
  const number = x => x === "" ? NaN : Number(x);
  const rows = [...table.tBodies[0].rows].sort((a, b) => {
    const [x, y] = [value(a), value(b)], [n, m] = [number(x), number(y)];
    if (isNaN(n) && isNaN(m)) return (down ? -1 : 1) * x.localeCompare(y);
    if (isNaN(n) || isNaN(m)) return isNaN(n) ? 1 : -1;  // cells without a number come last
    return down ? m - n : n - m;
  });
  table.tBodies[0].append(...rows);
  for (const head of heads) {
    const mine = head.dataset.slug === slug;
    mine ? head.setAttribute("aria-sort", down ? "descending" : "ascending")
         : head.removeAttribute("aria-sort");
    head.firstChild.href = "#sort=" + (mine && down ? "" : "-") + head.dataset.slug;
  }
}
addEventListener("hashchange", sort);
sort();
"""


SAID = {  # below the pictures
    "frontier": "Reward against KL from the start. Higher reward at less KL is better. Large points"
    " are the defaults, small ones other strengths (--sweep).",
    "length": "Reward against the length of a response.",
    "memory": "Memory at the peak of one step, by category, measured.",
    "time": "Time of a step, and its parts where a method samples.",
    "entropy": "Reward against entropy over the training.",
    "course": "Loss, reward and KL against the sequences that were trained on.",
    "curves": "The curves of the records.",
}
FIGURES = (
    "A click on a column's name sorts by it. ± is the standard deviation of seeds. Reward, win"
)
FIGURES += " rate and KL are of held-out prompts."
ANSWERS = "One sample each, temperature 1, the same seed. The reference is the model that all start"
ANSWERS += " from. A length counts the end token."
TRAINING = "Reward and KL are of held-out prompts where a run was evaluated on its way (--course),"
TRAINING += " else of its own samples. All rewards have one scale, and so have the KLs. Each point"
TRAINING += f" is a mean of neighbours, so that a curve has at most {POINTS}."
NONE = "There are none: they need matplotlib (pip install matplotlib)."


def comparison(record, lines, paths, found, said):
    """The page of a comparison. record: its command, task, machine …; lines: the rows of
    compare.json; paths: of pictures; found: curves; said: answers side by side"""
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
        ("sequences that a row trains on", f"{record['budget']:,}"),
        ("seeds of a row", record["seeds"]),
        ("machine", record["machine"]),
        ("torch", torch.__version__),
        ("seconds of training", f"{seconds:.0f}"),
        ("date", datetime.date.today().isoformat()),
    ]
    sections = [
        ("What was run", facts(ran)),
        ("What failed", "".join(f'<p class="failed">{text(x)}</p>' for x in failed)),
        ("Figures", note(FIGURES) + table(rows)),
        ("Pictures", pictures(paths) or note(NONE)),
        ("Answers", said and note(ANSWERS) + answers(said)),
        ("Training", found and note(TRAINING) + curves(found)),
        ("Commands", facts(commands)),
    ]
    return page(f"nanoPO: the methods on {bare(record['task'])}", sections)


def note(words):
    return f'<p class="note">{text(words)}</p>'


def records(rows, paths):
    """The page of some records: how they differ and ended, and their curves"""
    sections = [("Figures", table(rows)), ("Curves", pictures(paths) or note(NONE))]
    return page("nanoPO: curves of runs", sections)


def page(title, sections):
    """sections: (heading, HTML), those without HTML are left out -> the page, as text"""
    safe = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
    safe += "script-src 'unsafe-inline'"
    sections = [(heading, body) for heading, body in sections if body]
    links = " ".join(f'<a href="#{slug(name)}">{text(name)}</a>' for name, _ in sections)
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f'<meta http-equiv="Content-Security-Policy" content="{safe}">',
        f"<title>{text(title)}</title><style>{STYLE}</style></head><body>",
        f"<h1>{text(title)}</h1><nav>{links}</nav>",
    ]
    parts += [f'<h2 id="{slug(name)}">{text(name)}</h2>{body}' for name, body in sections]
    sorts = any('class="sort"' in body for _, body in sections)
    parts += [f"<script>{SORT}</script>"] if sorts else []
    return "\n".join([*parts, "</body></html>", ""])


def text(x):
    return html.escape(printable(str(x)))


def slug(name):
    """-> a name as it may stand in an address: "KL, nats" is kl-nats"""
    return re.sub(r"\W+", "-", name.lower()).strip("-")


def bare(words):
    """A command or an error, without the folders of its paths"""
    return re.sub(r"[^\s'\"=:;,()]*[/\\](?=[^\s/\\])", "", str(words))


def facts(pairs):
    """(name, value) -> a list of them"""
    rows = [f"<li>{text(name)}: <code>{text(x)}</code></li>" for name, x in pairs if x]
    return f"<ul>{''.join(rows)}</ul>"


def table(rows):
    """Dicts of cells by column, as tables.table has them -> a table that can be sorted"""
    names = list(dict.fromkeys(name for row in rows for name in row))
    heads, body = [], []
    for name in names:
        heads.append(f'<th data-slug="{slug(name)}"><a href="#sort=-{slug(name)}">{text(name)}</a>')
    for row in rows:
        cells = []
        for name in names:
            shown = str(row.get(name, ""))
            found = re.match(r"[−-]?\d[\d.]*", shown)
            kind = ""
            if found:
                kind = f' data-value="{found.group()}"'.replace("−", "-")
            elif shown:
                kind = ' class="text"'
            cells.append(f"<td{kind}>{text(shown)}</td>")
        body.append(f"<tr>{''.join(cells)}</tr>")
    head = f"<thead><tr>{''.join(heads)}</tr></thead>"
    filled = f"{head}<tbody>{''.join(body)}</tbody>"
    return f'<div class="wide"><table class="sort">{filled}</table></div>'


def pictures(paths):
    shown = []
    for path in paths:
        inside = base64.b64encode(path.read_bytes()).decode()
        words = text(SAID.get(path.stem, path.stem))
        picture = f'<img alt="{words}" src="data:image/png;base64,{inside}">'
        broad = ' class="broad"' if path.stem in ("course", "curves") else ""
        shown.append(f"<figure{broad}>{picture}<figcaption>{words}</figcaption></figure>")
    return shown and f'<div class="pictures">{"".join(shown)}</div>'


# ---- curves


def thinned(points, n=POINTS):
    """[(x, y)] -> at most n points, each the means of as many neighbours"""
    size = -(-len(points) // n)
    parts = [points[i : i + size] for i in range(0, len(points), size)]
    return [tuple(map(statistics.fmean, zip(*part))) for part in parts]


def chart(name, lines, low, high):
    """A small picture of curves. lines: [[(step, y), …], …], one for each seed; low, high: what
    its height means"""
    last = max(x for line in lines for x, _ in line)
    room, drawn = (high - low) or 1.0, []
    for line in lines:
        points = [
            f"{LEFT + WIDTH * x / last:.1f},{1 + HEIGHT * (high - y) / room:.1f}"
            for x, y in thinned(line)
        ]
        drawn.append(f'<polyline points="{" ".join(points)}"/>')
    ends = ", ".join(f"{line[-1][1]:.3g}" for line in lines)
    size = f"0 0 {LEFT + WIDTH + 1} {HEIGHT + 13}"
    shown = f'viewBox="{size}" role="img" aria-label="{text(name)}"'
    right = 'text-anchor="end"'
    marks = [
        f'<rect x="{LEFT}" y="1" width="{WIDTH}" height="{HEIGHT}"/>',
        f'<text x="{LEFT - 3}" y="9" {right}>{high:.3g}</text>',
        f'<text x="{LEFT - 3}" y="{HEIGHT}" {right}>{low:.3g}</text>',
        f'<text x="{LEFT}" y="{HEIGHT + 12}">0</text>',
        f'<text x="{LEFT + WIDTH}" y="{HEIGHT + 12}" {right}>step {last:g}</text>',
    ]
    head = f"<header><b>{text(name)}</b><span>ends at {ends}</span></header>"
    return f'<div class="card">{head}<svg {shown}>{"".join(marks + drawn)}</svg></div>'


def curves(rows):
    """rows: method -> {name of a curve: [points of each seed]}. All methods' rewards have one
    scale, and so have their KLs; each loss has its own."""
    spans = {}

    def scale(method, name):
        return (method, name) if name == "loss" else name

    for method, found in rows.items():
        for name, lines in found.items():
            ys = [y for line in lines for _, y in thinned(line)]
            key = scale(method, name)
            low, high = spans.get(key, (min(ys), max(ys)))
            spans[key] = min(low, *ys), max(high, *ys)
    shown = []
    for method, found in rows.items():
        charts = []
        for name, lines in found.items():
            span = spans[scale(method, name)]
            charts.append(chart(f"{name} of {method}", lines, *span))
        shown.append(f'<h3>{text(method)}</h3><div class="grid">{"".join(charts)}</div>')
    return "".join(shown)


# ---- answers


def answers(prompts):
    """[(prompt, [(method, answer), …])], the reference's first -> them side by side"""
    shown = []
    for i, (prompt, said) in enumerate(prompts):
        cards = []
        for j, (method, one) in enumerate(said):
            reward = "" if one["reward"] is None else f"reward {one['reward']:.2f}, "
            length = f"{one['tokens']} tokens" + ("" if one["ended"] else ", cut")
            head = f"<b>{text(method)}</b><span>{(reward + length).replace('-', '−')}</span>"
            first = "" if j else " first"
            body = f"<header>{head}</header><p>{text(one['text'])}</p>"
            cards.append(f'<div class="card{first}">{body}</div>')
        head = f"<h3>{i + 1}. {text(prompt)}</h3>"
        shown.append(f'{head}<div class="grid">{"".join(cards)}</div>')
    return "".join(shown)

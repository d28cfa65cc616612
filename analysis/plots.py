"""Draws pictures from the records of runs."""

import itertools
import math
import statistics
import textwrap

from analysis.predict import CARDS
from analysis.rows import EVERY
from analysis.tables import COURSE, PARTS, points_of

HATCH = dict(zip(PARTS, ("", "xx", "//", "..", "\\\\", "++", "oo"), strict=True))
HATCH["gathered"] = "--"
SPENT = {"sampling": "", "log-probs": "xx", "update": "//", "whole step": ".."}  # a step's time
TOGETHER = 5  # methods whose curves are drawn in one panel
FEW = 8  # methods in a picture of all; if there are more, LESS are left out
LESS = "sft", "cdpo", "ipo", "orpo", "rlaif"
HALO = {"facecolor": "white", "alpha": 0.8, "linewidth": 0, "pad": 0.5}  # behind text
STROKES = "-", "--", ":", "-."
CURVES = {  # a key of the record -> its unit
    "loss": "",
    "rewards/margins": "",
    "rewards/accuracies": "",
    "reward": "",
    "kl": "nats",
    "entropy": "nats per token",
    "grad_norm": "",
    "step_ms": "ms",
}
OURS = {"Software": "nanopo"}  # what a picture says of itself: see data/ours.py
NAMES = "learning", "frontier", "length", "memory", "time", "entropy", "course"  # of a comparison
PRECISIONS = {"bfloat16": "autocast", "bfloat16-pure": "pure bf16"}


def style(row):
    """-> the colour and the marker of a row, as matplotlib's arguments"""
    colour, marker = EVERY[row].look.split()
    return {"color": colour, "marker": marker}


def pyplot():
    """-> matplotlib.pyplot; None, after a printed line, if it is not installed"""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        print("\nno pictures: they need matplotlib (pip install matplotlib)")
        return None
    plt.switch_backend("Agg")
    look = {"font.size": 12, "axes.grid": True, "grid.alpha": 0.3}
    plt.rcParams.update(look | {"axes.spines.top": False, "axes.spines.right": False})
    return plt


def draw(task, lines, folder, said=()):
    """-> the paths of the pictures of a comparison. said: answers side by side"""
    plt, lines = pyplot(), [line for line in lines if line["runs"]]
    if not plt:
        return []
    bars = [(line["method"], [("", line["peak"])]) for line in lines if "peak" in line]
    figures = {
        "learning": learning(plt, lines, said),
        "frontier": scatter(plt, task, lines, "kl", "KL(π‖π_ref), nats per response"),
        "length": scatter(plt, task, lines, "length", "length, tokens per response"),
        "memory": stacked(plt, bars, 1e6, "MB, measured over one step"),
        "time": stacked(plt, times(lines), 1, "ms, median time of a step", parts=SPENT),
        "entropy": entropy(plt, [line for line in lines if line.get("course")]),
        "course": trends(plt, [line for line in lines if line.get("evals")]),
    }
    return saved(plt, folder, figures)


def draw_prediction(found, symbol, folder):
    """-> [the path of the picture of a prediction]: memory at the peak with activations
    checkpointed, one row per method, with a bar for each of the two precisions"""
    plt = pyplot()
    return saved(plt, folder, {"memory": prediction(plt, found, symbol)}) if plt else []


def prediction(plt, found, symbol):
    rows, unit = {}, {"GiB": 2**30, "MB": 1e6}[symbol]
    for x in found:
        if x["checkpoint_activations"]:
            bar = PRECISIONS[x["dtype"]], x["predicted"]
            rows.setdefault(x["method"], []).append(bar)
    name = f"{symbol}, predicted, activations checkpointed"
    marks = ()
    if symbol == "GiB":
        marks = CARDS
        name += f"; dashed: cards of {', '.join(map(str, CARDS))} GB"
    return stacked(plt, list(rows.items()), unit, name, marks)


def draw_records(runs, folder):
    """-> [the path of the picture of some records' curves]"""
    plt = pyplot()
    return saved(plt, folder, {"curves": curves(plt, runs)}) if plt else []


def saved(plt, folder, figures):
    """Saves the figures that are not None. -> their paths"""
    paths = []
    for name, figure in figures.items():
        if figure:
            paths.append(folder / f"{name}.png")
            figure.savefig(paths[-1], dpi=160, bbox_inches="tight", metadata=OURS)
            plt.close(figure)
    return paths


def few(lines):
    """-> all lines; of more than FEW methods, those of the methods that LESS does not name"""
    many = len({line["method"] for line in lines}) > FEW
    return [line for line in lines if not (many and line["method"] in LESS)]


def scatter(plt, task, lines, x, name):
    """Reward against x: a large point for each method at its default strength, small ones for other
    strengths, joined in their order, and a dot for each seed. The axis ends where the large points
    do; a strength beyond it is an arrow at the border."""
    lines = few([line for line in lines if x in line and "reward" in line])
    if not lines:
        return None
    figure, axes = plt.subplots(figsize=(8, 5.5))
    main = [line for line in lines if not line["swept"]]
    most = 1.2 * max(line[x] for line in main or lines)
    seen = [line["reward"] for line in lines if line[x] <= most]  # what lies within the axis
    for line in main:
        runs = zip(line.get(f"{x}_runs", ()), line.get("reward_runs", ()))
        seen += [reward for place, reward in runs if place <= most]
    room = 0.1 * (max(seen) - min(seen)) + 0.05
    bottom, top = min(seen) - room, max(seen) + room
    for row in EVERY:
        mine = [line for line in lines if line["method"] == row]
        mine.sort(key=lambda line: line["value"] or 0)
        points = [line[x] for line in mine], [line["reward"] for line in mine]
        axes.plot(*points, **style(row), linewidth=0.8, markersize=5)
        for line in [line for line in mine if line[x] > most]:
            arrow = style(row) | {"marker": ">", "clip_on": False}
            axes.plot(most, min(top, max(bottom, line["reward"])), **arrow, markersize=6)
    for line in main:
        large = style(line["method"]) | {"markeredgecolor": "black", "markersize": 11}
        axes.plot(line[x], line["reward"], **large, linestyle="")
        if f"{x}_runs" in line:
            runs = line[f"{x}_runs"], line["reward_runs"]
            axes.plot(*runs, ".", color=large["color"], markersize=4)
    said = ["large: the defaults"]
    said += ["small: other strengths"] if len(lines) > len(main) else []
    said += ["dots: seeds"] if any(f"{x}_runs" in line for line in main) else []
    said += ["arrows: beyond the axis"] if any(line[x] > most for line in lines) else []
    axes.set_title(f"{task}; {', '.join(said)}", fontsize=11)
    low = min(0, *(line[x] for line in lines)) - 0.02 * most
    axes.set(xlabel=name, ylabel="reward", xlim=(low, most), ylim=(bottom, top))
    names = [(line["method"], line[x], line["reward"]) for line in main]
    for line in main[:1] if x == "kl" else ():
        if "frontier" in line:
            curve = [point for point in line["frontier"] if point[0] <= most]
            axes.plot(*zip(*curve), color="black", linewidth=1)
            above = [point for point in curve if point[0] < 0.55 * most]
            names.append(("π* of every β: no policy is above", *max(above)))
    label(figure, axes, names, [(line[x], line["reward"]) for line in lines])
    return figure


def learning(plt, lines, said):
    """The reward of four methods over their training, and the answer that each then gives to one
    prompt. said: [(prompt, [(method, answer)])], the reference's answer first"""
    prompt, answers = (said[0][0], dict(said[0][1])) if said else ("", {})
    shown = [line for line in few(lines) if line["method"] in answers and line.get("evals")]
    shown = [line for line in shown if "reward" in line["evals"][0]]
    best = [line for line in shown if line["method"] in ("dpo", "kto", "ppo", "grpo")]
    shown = best or shown[:4]
    if not shown:
        return None
    figure, axes = plt.subplots(figsize=(11, 4.6))
    ends = []
    for line in shown:
        evals, look = line["evals"], style(line["method"])
        start = [line["ref_reward"]] if "ref_reward" in line else []
        ys = start + [statistics.fmean(x["reward"]) for x in evals]
        xs = [100 * x["step"] / evals[-1]["step"] for x in evals]
        axes.plot([0.0] * len(start) + xs, ys, color=look["color"], linewidth=2)
        ends.append((ys[-1], line["method"], look["color"]))
    low, high = axes.get_ylim()
    low -= 0.35 * (high - low)  # room for the answer before the training
    line_height, top = (high - low) / 14, high
    for y, name, colour in sorted(ends, reverse=True):
        text = textwrap.shorten(" ".join(answers[name]["text"].split()), 130, placeholder=" …")
        text = textwrap.fill(f"{name}: {text}", 44)
        half = line_height * (text.count("\n") + 1) / 2
        middle = min(y, top - half)  # below the text above it
        top = middle - half - line_height / 3
        place, how = (104, middle), {"color": colour, "fontsize": 11}
        arrow = {"arrowstyle": "-", "color": colour, "linewidth": 0.8, "relpos": (0, 0.5)}
        axes.annotate(text, (100, y), place, **how, va="center", annotation_clip=False,
                      arrowprops=arrow)  # fmt: skip
    start = textwrap.fill(f"before: {' '.join(answers['reference']['text'].split())}", 70)
    axes.text(2, low + line_height / 3, start, fontsize=11, va="bottom", bbox=HALO)
    axes.set(xlim=(0, 100), ylim=(low, high))
    axes.set(xlabel="% of the training", ylabel="reward of new answers")
    axes.set_title(f"What {len(shown)} methods make of “{prompt}”", fontsize=12, loc="left")
    return figure


def label(figure, axes, names, points):
    """Writes each name beside its point, at the nearest place without a point or another name, and
    draws a line between the two. Sizes are in pixels; a typographic point has `scale` of them."""
    from matplotlib.text import Text
    from matplotlib.transforms import Bbox

    figure.canvas.draw()
    renderer, scale = figure.canvas.get_renderer(), figure.dpi / 72
    taken = [Bbox.from_bounds(x - 9, y - 9, 18, 18) for x, y in axes.transData.transform(points)]
    taken += [text.get_window_extent() for text in axes.texts]
    for name, *place in names:
        how = {"textcoords": "offset points", "ha": "center", "va": "center", "fontsize": 10}
        how["arrowprops"] = {"arrowstyle": "-", "linewidth": 0.7, "color": "0.4"}
        text = axes.annotate(name, place, (0, 0), **how, bbox=HALO)
        wide = Text.get_window_extent(text).width / 2
        for i in range(300):
            radius = 14 + 6 * (i // 12)
            angle = i % 12 * math.pi / 6
            offset = (radius + wide) * math.cos(angle), radius * math.sin(angle)
            text.set_position([x / scale for x in offset])
            text.update_positions(renderer)
            box = Text.get_window_extent(text)  # without the line
            if not any(map(box.overlaps, taken)):
                break
        taken.append(box)


def times(lines):
    """-> the bars of a step's time, divided into its parts if the method samples"""
    rows = []
    for line in [line for line in lines if "step_ms" in line and not line["swept"]]:
        keys = dict(zip(SPENT, ("sample_ms", "logprobs_ms", "update_ms", "step_ms")))
        parts = {name: line[key] for name, key in keys.items() if key in line}
        if len(parts) > 1:
            del parts["whole step"]
        rows.append((line["method"], [("", parts)]))
    return rows


def stacked(plt, rows, unit, name, marks=(), parts=HATCH):
    """rows: (method, [(note, sizes by category), …]): one stacked bar for each note, the bars of a
    method close together. marks: sizes to draw a line at. parts: {category: hatching}"""
    if not rows:
        return None
    count = len(rows[0][1])
    seen = 0.004 * max(sum(sizes.values()) for _, bars in rows for _, sizes in bars) / unit
    figure, axes = plt.subplots(figsize=(9, 1 + (0.2 + 0.22 * count) * len(rows)))
    thick = 0.8 / count
    keys, most = {}, 0.0
    for i, (_, bars) in enumerate(rows):
        for j, (note, sizes) in enumerate(bars):
            y = i + (j + 0.5) * thick - 0.4
            left = 0.0
            for k, (category, hatch) in enumerate(parts.items()):
                size = sizes.get(category, 0) / unit
                look = {"color": f"C{k}", "hatch": hatch, "edgecolor": "white", "linewidth": 0.5}
                bar = axes.barh(y, size, 0.9 * thick, left=left, **look)
                keys |= {category: bar} if size > seen else {}  # wide enough to be seen
                left += size
            axes.text(left, y, f" {left:.1f} {note}", va="center", fontsize=9, bbox=HALO)
            most = max(most, left)
    for mark in marks:
        axes.axvline(mark, color="black", linewidth=0.8, linestyle="--", zorder=0)
    axes.set(xlabel=name, xlim=(0, 1.2 * most))
    axes.set_yticks(range(len(rows)), [row for row, _ in rows])
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.legend(keys.values(), keys, fontsize=9, ncols=4, loc=(0, 1.01))
    return figure


def entropy(plt, lines):
    """Plots reward against entropy over the steps of GRPO and DAPO"""
    if not lines:
        return None
    figure, axes = plt.subplots(figsize=(6, 4.5))
    names, all_points = [], []
    for line in lines:
        what = "accuracy" if "accuracy" in line["course"][0] else "reward"
        points = [(x["entropy"], x.get(what, x["reward"])) for x in line["course"]]
        axes.plot(*zip(*points), **style(line["method"]), markersize=4, linewidth=0.8)
        names += [(f"{line['method']}, start", *points[0]), ("end", *points[-1])]
        all_points += points
    axes.set(xlabel="entropy, nats per token", ylabel="reward of a rollout; DAPO: share correct")
    label(figure, axes, names, all_points)
    return figure


def trends(plt, lines):
    """Plots loss, reward and KL over the sequences trained on: means over seeds, and a band from
    the smallest to the largest."""
    if not lines:
        return None
    names = ("loss on what is trained on", "reward", "KL(π‖π_ref), nats", "KL(π‖π*), nats")
    known = {key for line in lines for key in line["evals"][0]}
    shown = [(key, name) for key, name in zip(COURSE, names) if key in known]
    if len(lines) > TOGETHER:
        return multiples(plt, lines, dict(shown))
    figure, panels = grid(plt, len(shown), 2, (4.6, 3.6))
    for (key, name), axes in zip(shown, panels):
        for line in lines:
            evals = [x for x in line["evals"] if key in x]
            xs = [x["sequences"] / 1000 for x in evals]
            ys = [x[key] for x in evals]
            look = style(line["method"])
            means = list(map(statistics.fmean, ys))
            axes.plot(xs, means, **look, markersize=5, label=line["method"])
            low, high = list(map(min, ys)), list(map(max, ys))
            axes.fill_between(xs, low, high, color=look["color"], alpha=0.15, linewidth=0)
        axes.set(xlabel="thousand sequences trained on", title=name)
    figure.tight_layout()
    where = {"loc": "lower center", "bbox_to_anchor": (0.5, 1.0), "ncols": 4, "fontsize": 11}
    figure.legend(*axes.get_legend_handles_labels(), **where)
    return figure


def multiples(plt, lines, names):
    """Reward, then KL: a panel for each method, with those of all others in grey"""
    found = {key: {} for key in ("reward", "kl") if key in names}
    for key, line in itertools.product(found, lines):
        if key in line["evals"][-1]:
            points = [(x["sequences"] / 1000, x[key]) for x in line["evals"] if key in x]
            found[key][line["method"]] = [(x, statistics.fmean(ys)) for x, ys in points]
    shown = [(key, method) for key, rows in found.items() for method in rows]
    figure, panels = grid(plt, len(shown), 4, (2.6, 2.1))
    for (key, method), axes in zip(shown, panels):
        for other in found[key].values():
            axes.plot(*zip(*other), color="0.85", linewidth=1)
        axes.plot(*zip(*found[key][method]), color=style(method)["color"], linewidth=2)
        axes.set_title(f"{method}: {names[key].partition('(')[0]}", fontsize=11)
        axes.tick_params(labelsize=10)
    for axes in panels[-4:]:
        axes.set_xlabel("k sequences", fontsize=10)
    figure.tight_layout()
    return figure


def grid(plt, n, across, size):
    """-> a figure of n panels, at most `across` beside each other, each of a size in inches; the
    panels"""
    across = min(across, n)
    down = -(-n // across)
    shape = {"figsize": (size[0] * across, size[1] * down), "squeeze": False}
    figure, panels = plt.subplots(down, across, **shape)
    for axes in panels.flat[n:]:
        axes.set_visible(False)
    return figure, panels.flat[:n]


def curves(plt, runs, keys=CURVES):
    """runs: {name: the lines of its steps} -> the curves of all runs, one panel for each key that a
    run has"""
    found = {key: {name: points_of(steps, key) for name, steps in runs.items()} for key in keys}
    found = {key: lines for key, lines in found.items() if any(lines.values())}
    if not found:
        return None
    figure, panels = grid(plt, len(found), 3, (4.6, 3.3))
    for (key, lines), axes in zip(found.items(), panels):
        for i, (name, points) in enumerate(lines.items()):
            if points:
                axes.plot(*zip(*points), f"C{i % 10}{STROKES[i // 10 % 4]}", label=name)
        axes.set_title(", ".join(filter(None, (key, CURVES.get(key)))), fontsize=11)
        axes.set_xlabel("step", fontsize=10)
    figure.tight_layout()
    marks = {line.get_label(): line for axes in panels for line in axes.lines}
    where = {"loc": "lower center", "bbox_to_anchor": (0.5, 1.0), "ncols": 4, "fontsize": 10}
    figure.legend(marks.values(), marks, **where)
    return figure

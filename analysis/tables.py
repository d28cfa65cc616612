"""Turns the records of runs into the rows of compare.json, and these into Markdown."""

import json
import os
import statistics
from pathlib import Path

from analysis.predict import of_run
from analysis.rows import EVERY, shape
from data import UserError
from training.memory import size_unit
from training.options import flag

COURSE = ("loss", "reward", "kl", "kl_star")  # figures of evaluations during training
MEANS = (
    "reward score win_rate kl length entropy kl_star kl_teacher objective ref_reward accuracy nll "
    "step_ms sample_ms logprobs_ms update_ms wall_s trained_tokens sampled_tokens"
).split()
POINTS = ("reward", "kl", "length")  # of which a picture shows each run
ENDS = ("reward", "win_rate", "kl", "kl_star", "length", "accuracy", "nll", "step_ms", "wall_s")
KEPT = (
    *("models", "phases", "forward_passes", "backward_passes", "flops_per_token"),
    *("peak_bytes", "peak", "peak_most", "frontier"),
)
PARTS = ("weights", "casts", "gradients", "optimizer", "activations", "logits", "sampling")


# ---- from records


def read(folder, name):
    """-> (the first line, the lines of steps, the closing figures) of a record; None if the run has
    not ended"""
    try:
        first, *steps, last = parsed(folder / f"{name}.jsonl")
        return first, steps, last["final"]
    except (OSError, ValueError, KeyError):
        return None


def parsed(path):
    """-> the lines of a record"""
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def summary(o, folder, items, errors):
    """-> the rows of compare.json: one per method, and one per strength of the sweep. items: the
    runs; errors: {name: what went wrong}"""
    out = []
    for row in o.methods:
        mine = [item for item in items if item.row == row]
        main = [item for item in mine if item.swept is None]
        line, records = row_of(row, main, folder, errors)
        if records:
            line |= of_run(row, records[0][0])
            line["course"] = course(records[0][1]) if row in ("grpo", "dapo") else []
            if o.course:
                per_step = shape(o.task, row)[1]
                line["evals"] = evaluations([steps for _, steps, _ in records], per_step)
        out.append(line)
        for value in dict.fromkeys(item.swept for item in mine if item.swept is not None):
            swept = [item for item in mine if item.swept == value]
            out.append(row_of(row, swept, folder, errors)[0])
    timed = [line for line in out if "step_ms" in line]
    for simpo in [line for line in timed if line["method"] == "simpo"][:1]:
        for line in timed:
            line["step_over_simpo"] = line["step_ms"] / simpo["step_ms"]
            line["flops_over_simpo"] = flops_a_step(line) / flops_a_step(simpo)
    return out


def row_of(row, group, folder, errors):
    """-> (a row of runs that differ in their seeds, the records of those that ended)"""
    failed = {item.name: errors[item.name] for item in group if errors.get(item.name)}
    records = [read(folder, item.name) for item in group if item.name not in failed]
    records = [record for record in records if record]
    line = {"method": row, "runs": len(records), "swept": any(item.swept for item in group)}
    line |= {"command": " ".join(["python", *group[0].command])} if group else {}
    line |= {"failed": failed} if failed else {}
    if not records:
        return line, []
    first, steps, final = records[0]
    options = first["options"]
    strength = EVERY[row].strength
    line |= {key: final[key] for key in KEPT if key in final}
    line |= {
        "strength": strength,
        "value": options.get(strength),
        "steps": max((x["step"] for x in steps), default=options["steps"]),
        "planned": options["steps"],  # DAPO ends earlier if it finds too few mixed groups
        "labels": labels(row, options, final),
        "updates": options.get("updates", 1),
        "parameters": sum(m["parameters"] for m in final["models"]),
    }
    for key in MEANS:
        xs = [final[key] for *_, final in records if key in final]
        if len(xs) == len(records):
            spread = statistics.stdev(xs) if len(xs) > 1 else 0.0
            line |= {key: statistics.fmean(xs), f"{key}_sd": spread}
            line |= {f"{key}_runs": xs} if key in POINTS and len(xs) > 1 else {}
    return line, records


def flops_a_step(line):
    return line["flops_per_token"] * line["trained_tokens"] / line["updates"] / line["steps"]


def course(steps):
    """-> entropy and reward of each recorded step, and for DAPO, whose reward is ±1, the share of
    correct responses"""
    keys = ("step", "entropy", "reward", "accuracy")
    return [{key: x[key] for key in keys if key in x} for x in steps if "entropy" in x]


def evaluations(runs, per_step):
    """runs: the lines of steps of each run of a row -> the evaluations of the row, each figure a
    list with one entry per run. The loss is the mean over the steps since the last evaluation."""
    out = {}
    for steps in runs:
        losses = []
        for x in steps:
            losses += [x["loss"]] if "loss" in x else []
            if "eval" in x and losses:
                start = {"step": x["step"], "sequences": x["step"] * per_step}
                one = out.setdefault(x["step"], start)
                figures = {"loss": statistics.fmean(losses)} | x["eval"]
                for key in COURSE:
                    if key in figures:
                        one.setdefault(key, []).append(figures[key])
                losses = []
    return list(out.values())


def curves(folder, items):
    """-> {row: {"loss" or "reward" or "KL": [[(step, figure), …] for each run]}}"""
    out = {}
    for item in items:
        record = read(folder, item.name)
        for name, key in (("loss", "loss"), ("reward", "reward"), ("KL", "kl")):
            points = points_of(record[1], key) if record and item.swept is None else []
            if points:
                out.setdefault(item.row, {}).setdefault(name, []).append(points)
    return out


def points_of(steps, key):
    """The lines of a record's steps -> [(step, figure), …], from evaluations if there are any"""
    own = [(x["step"], x[key]) for x in steps if key in x]
    evals = [(x["step"], x["eval"][key]) for x in steps if key in x.get("eval", ())]
    return evals or own


def run_of(path):
    """The record of any run -> (its options, the lines of its steps, its closing figures, {} if it
    has not ended)"""
    try:
        first, *rest = parsed(path)
        final = rest[-1].get("final", {}) if rest else {}
        return first["options"], [line for line in rest if "step" in line], final
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        why = "is not the record of a run; give the .jsonl beside a checkpoint"
        raise UserError(f"--records {path} {why}") from None


def short(paths):
    """Paths of records -> short names that differ: the last part of each path, or as many of the
    last parts as are needed"""
    parts = [os.path.splitext(path)[0].replace(os.sep, "/").split("/") for path in paths]
    for n in range(1, max(map(len, parts)) + 1):
        names = ["/".join(x[-n:]) for x in parts]
        if len(set(names)) == len(names):
            break
    return names


def records(runs):
    """runs: {name: (options, steps, closing figures)} -> one row per run: the options in which the
    runs differ, and how each ended"""
    given = {}  # option -> its values in the runs that have it
    for options, *_ in runs.values():
        for key in options.keys() - {"out", "resume", "log_to"}:
            given.setdefault(key, []).append(options[key])
    differ = [key for key, xs in sorted(given.items()) if any(x != xs[0] for x in xs)]
    rows = []
    for name, (options, steps, final) in runs.items():
        row = {"record": name, "steps": max((x["step"] for x in steps), default=0)}
        row |= {flag(key): options.get(key, "") for key in differ}
        shown = {key: f"{final[key]:.3f}" for key in ENDS if key in final}
        rows.append(row | {key: minus(x) for key, x in shown.items()})
        rows[-1] |= {} if final else {"": "it has not ended"}
    return rows


def labels(row, options, final):
    """-> the number of labels of pairs or answers that the run has used; None if it learns from
    demonstrations, from a reward of every response, or from a teacher"""
    if EVERY[row].data == "demonstrations" or EVERY[row].grouped:
        return None
    drawn = options["steps"] * options["batch_size"]
    return final.get("labels", min(options.get("pairs") or drawn, drawn))


# ---- to Markdown


def table(rows):
    """rows: [{column: cell}, …] -> a Markdown table, padded so that it is readable as plain text"""
    head = list(dict.fromkeys(name for row in rows for name in row))
    cells = [head, *([str(row.get(name, "")) for name in head] for row in rows)]
    width = [max(map(len, column)) for column in zip(*cells)]
    cells.insert(1, ["-" * w for w in width])
    return "\n".join(f"| {' | '.join(map(str.ljust, row, width))} |" for row in cells)


def markdown(lines):
    """lines: lists of cells, the head first -> the lines of a Markdown table, without padding"""
    head, *rest = lines
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rest)]


def tables(lines):
    """lines: the rows of compare.json -> the tables of a comparison"""
    main = [line for line in lines if line["runs"] and not line["swept"]]
    found = [map(results, lines), map(costs, main), map(budget, main), course_rows(main)]
    return [table(rows) for rows in map(list, found) if rows]


def results(line):
    name, note = line["method"], ""
    failed = line.get("failed", {})
    if not line["runs"]:
        return {"method": name, "": f"failed: {'; '.join(failed.values()) or 'it was not started'}"}
    if line["swept"]:
        name += f", {line['strength']} {line['value']:g}"
    if failed:
        note = f"{len(failed)} of {line['runs'] + len(failed)} runs failed"
    elif line["steps"] < line["planned"]:
        note = f"ended after {line['steps']} of {line['planned']} steps"
    cells = {
        "method": name,
        "": note,
        "reward": pm(line, "reward"),
        "win rate": pm(line, "win_rate"),
        "KL, nats": pm(line, "kl"),
        "length": pm(line, "length", 1),
        "entropy": pm(line, "entropy"),
    }
    last = {
        "kl_star": "KL(π‖π*)",
        "kl_teacher": "KL to the teacher",
        "score": "score of the reward model",
    }
    return cells | {name: pm(line, key, 3) for key, name in last.items() if key in line}


def costs(line):
    held = [phase["models"] for phase in line.get("phases", ())] + [line["models"]]
    roles = [[m["role"] + ("*" if m["trainable"] else "") for m in models] for models in held]
    return {
        "method": line["method"],
        "models held (* trained)": "; ".join(", ".join(x) for x in roles),  # one after another
        "M parameters": mega(line, "parameters", 2),
        "predicted MB": mega(line, "predicted_bytes"),
        "peak MB": mega(line, "peak_bytes"),
        "passes forward / backward": f"{line['forward_passes']:g} / {line['backward_passes']:g}",
        "MFLOP per token": mega(line, "flops_per_token", 2),
        "step, ms": pm(line, "step_ms", 1),
        "step / SimPO": f"{line['step_over_simpo']:.2f}" if "step_over_simpo" in line else "",
        "FLOPs / SimPO": f"{line['flops_over_simpo']:.2f}" if "flops_over_simpo" in line else "",
    }


def budget(line):
    return {
        "method": line["method"],
        "steps": line["steps"],
        "trained k tokens": thousands(line["trained_tokens"]),
        "sampled k tokens": thousands(line.get("sampled_tokens")),
        "k labels": thousands(line["labels"]),
        "seconds": pm(line, "wall_s", 0),
    }


def course_rows(lines):
    """-> loss / reward / KL after a tenth, a quarter … of each row's training, mean over runs"""
    rows = []
    for line in lines:
        evals = line.get("evals")
        if evals:
            cells = {"method": line["method"], "k labels": thousands(line["labels"])}
            what = "loss / reward / KL, KL(π‖π*)" if "kl_star" in evals[0] else "loss / reward / KL"
            what += " after "
            for percent in (10, 25, 50, 75, 100):
                wanted = evals[-1]["step"] * percent / 100
                x = min(evals, key=lambda x: abs(x["step"] - wanted))
                means = [f"{statistics.fmean(x[key]):.2f}" for key in COURSE if key in x]
                cells[f"{what}{percent} %"] = minus(" / ".join(means))
                what = ""
            rows.append(cells)
    return rows


def pm(line, key, digits=2):
    """-> a mean as text, ± its standard error if there are several runs"""
    if key not in line:
        return ""
    error = line.get(f"{key}_sd", 0) / line["runs"] ** 0.5
    spread = f" ± {error:.{digits}f}" if line["runs"] > 1 else ""
    return minus(f"{line[key]:.{digits}f}{spread}")


def mega(line, key, digits=1):
    return f"{line[key] / 1e6:.{digits}f}" if line.get(key) else ""


def minus(text):
    return text.replace("-", "−")


def thousands(n):
    """-> a count in thousands, as text, with three digits if it is small; "" for None"""
    if n is None:
        return ""
    return f"{n / 1e3:.0f}" if n >= 1e5 else f"{n / 1e3:.3g}"


def predictions(found):
    """found: the entries of a prediction, the two precisions of a setting one after the other ->
    (the table, one of fewer columns for a terminal, the unit of its figures)"""
    unit, symbol = size_unit(max(x["predicted_bytes"] for x in found))
    gathered = ["gathered"] if any("gathered" in x["predicted_most"] for x in found) else []

    def cells(x):
        """-> {column: text} of one entry; logits and sampling are shown at their own maximum"""
        parts = dict.fromkeys([*PARTS, *gathered], 0)
        sizes = {"peak": x["predicted_bytes"]} | parts | x["predicted"]
        sizes |= {name: x["predicted_most"].get(name, 0) for name in PARTS[-2:]}
        models = ", ".join(f"{m['role']} {m['bytes'] / unit:.1f}" for m in x["models"])
        shown = {name: f"{size / unit:.1f}" for name, size in sizes.items()}
        return shown | {"by model": models, "fits on": x["card"]}

    rows = []
    for x, other in zip(found[::2], found[1::2]):
        both = zip(cells(x).items(), cells(other).values())
        checkpointed = "yes" if x["checkpoint_activations"] else "no"
        row = {"method": x["method"], "checkpointed": checkpointed}
        rows.append(row | {name: f"{a} / {b}" for (name, a), b in both})
    most = ("method", "checkpointed", "peak", "weights", "optimizer", "activations")
    return table(rows), table([{name: row[name] for name in most} for row in rows]), symbol

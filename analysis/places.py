"""The blocks of the pages and the pictures, each made from what is kept of its sources.

PLACES has the printed texts and the tables: a name stands in a page as <!-- from: NAME -->.
PICTURES has those of docs/figures.
"""

import hashlib
import json
import re
import statistics
import textwrap
from functools import partial
from typing import NamedTuple

from analysis import digest, plots, tables
from analysis.rows import EVERY
from analysis.sources import EXACT, LESSON, PAIRED, SOURCES, VERIFIED
from analysis.tables import minus, thousands


class Place(NamedTuple):
    sources: tuple  # their names
    block: object  # a function: what is kept of each -> the block


class Picture(NamedTuple):
    sources: tuple
    figure: object  # a function: pyplot, and what is kept of each source -> a figure

    def key(self, found):
        """-> a digest of what is kept and of the code that draws it, which the picture carries"""
        code = digest.digest((("analysis/plots.py", ""),))
        return hashlib.sha256((code + json.dumps(found)).encode()).hexdigest()

    def draw(self, path, key, *found):
        if plt := plots.pyplot():
            about = plots.OURS | {"Description": key}
            how = {"dpi": 130, "bbox_inches": "tight", "metadata": about}
            self.figure(plt, *found).savefig(path, **how)


def fenced(text):
    return f"```\n{text.strip(chr(10))}\n```\n"


def markdown(*lines):
    return "".join(line.replace(" --- ", "---") + "\n" for line in tables.markdown(lines))


def main_rows(found):
    return [row for row in found["methods"] if not row["swept"]]


def number(x, digits=3):
    """-> a figure as text, without a minus before a zero"""
    return minus(f"{round(x, digits) + 0.0:.{digits}f}")


def mean(xs, digits=3):
    """-> a mean over runs as text, ± its standard error if there are several"""
    xs = list(xs)
    error = f" ± {statistics.stdev(xs) / len(xs) ** 0.5:.{digits}f}" if len(xs) > 1 else ""
    return number(statistics.fmean(xs), digits) + error


# ---- reviews

SHOWN = "dpo", "kto", "ppo", "grpo"  # whose answers README.md has


def telling(found):
    """-> the answers side by side to the prompt to which the reference has the longest answer of a
    reward below 0"""

    def length(x):
        before = dict(x[1])["reference"]
        return before["tokens"] if before["reward"] < 0 else 0

    return max(found["answers"], key=length)


def answers(found):
    """-> the answers of four methods to one prompt, and that of the reference"""
    prompt, said = telling(found)
    said = dict(said)
    lines = [f"{prompt}"]
    for name in ("reference", *SHOWN):
        first, *rest = textwrap.wrap(" ".join(said[name]["text"].split()), 82) or [""]
        reward = minus(f"{said[name]['reward']:.2f}")
        lines.append(f"{name:>11} {reward:>6} | {first}")
        lines += [f"{'':>18} | {line}" for line in rest]
    return fenced("\n".join(lines))


def methods(found, sizes):
    """-> the table of README.md, with the predicted GiB of a 7B model in pure bfloat16"""
    sizes = {x["method"]: gib(x) for x in sizes if x["dtype"] == "bfloat16-pure"}
    lines = [["method", "gold reward", "win rate", "KL, nats", "length", "7B, GiB"]]
    for row in main_rows(found):
        figures = [
            tables.pm(row, "reward"),
            tables.pm(row, "win_rate"),
            tables.pm(row, "kl"),
            tables.pm(row, "length", 1),
        ]
        lines.append([row["method"], *figures, sizes[EVERY[row["method"]].like or row["method"]]])
    return markdown(*lines)


def gib(x):
    return f"{x['predicted_bytes'] / 2**30:.1f}"


def reviews(found):
    """-> the table of results.md"""
    head = ["method", "command", "steps", "k tokens trained", "k tokens sampled", "gold reward"]
    lines = [[*head, "win rate", "KL, nats", "length", "entropy", "FLOPs of a step / SimPO"]]
    for row in main_rows(found):
        early = row["steps"] < row["planned"]
        steps = f"{row['steps']} of {row['planned']}" if early else f"{row['steps']}"
        tokens = [thousands(row["trained_tokens"]), thousands(row.get("sampled_tokens"))]
        figures = [tables.pm(row, key) for key in ("reward", "win_rate", "kl")]
        figures += [
            tables.pm(row, "length", 1),
            tables.pm(row, "entropy"),
            f"{row['flops_over_simpo']:.2f}",
        ]
        script = f"`{EVERY[row['method']].script}.py {EVERY[row['method']].arguments}".rstrip()
        lines.append([row["method"], f"{script}`", steps, *tokens, *figures])
    return markdown(*lines)


def principles(found):
    """-> the table of the phases of rlaif.py"""
    head = ["seed", "gold reward: skills, SL-CAI, RL-CAI", "win rate: SL-CAI, RL-CAI"]
    head += ["KL: SL-CAI, RL-CAI", "AI label agrees with gold: both orders, one order"]
    head += ["both orders agree", "PM agrees with the label, with gold"]
    lines = [head]
    for seed, run in enumerate(found["rlaif"]):
        skills, sl, pm, rl = (run[name] for name in ("skills", "sl", "pm", "rl"))
        cells = [
            (skills["reward"], sl["reward"], rl["reward"]),
            (sl["win_rate"], rl["win_rate"]),
            (sl["kl"], rl["kl"]),
            (pm["label_agreement"], pm["one_order_agreement"]),
            (pm["order_consistency"],),
            (pm["accuracy"], pm["gold_accuracy"]),
        ]
        texts = [minus(", ".join(f"{x:.2f}" for x in cell)) for cell in cells]
        lines.append([str(seed), *texts])
    return markdown(*lines)


# ---- fixed pairs, a verifier, a reward that is exploited


def course(keys, found):
    """-> rows with the loss and other figures after 10 and 50 % of the training and at its end"""
    names = {"loss": "loss", "reward": "gold reward", "kl": "KL", "kl_star": "KL(π‖π\\*)"}
    lines = [["row", "k labels", *(names[key] for key in keys), "win rate"]]
    for row in main_rows(found):
        evals = row["evals"]
        cells = []
        for key in keys:
            values = [number(statistics.fmean(x[key]), 2) for x in on_the_way(evals)]
            end = (
                f"{statistics.fmean(evals[-1][key]):.2f}" if key == "loss" else tables.pm(row, key)
            )
            cells.append(", ".join([*values, end]))
        lines.append([row["method"], thousands(row["labels"]), *cells, tables.pm(row, "win_rate")])
    return markdown(*lines)


def on_the_way(evals):
    """-> the evaluations nearest to 10 and 50 % of the training"""
    end = evals[-1]["step"]
    return [min(evals, key=lambda x: abs(x["step"] - share * end)) for share in (0.1, 0.5)]


def verifier(*found):
    """-> the runs on arithmetic:2, a mean over seeds in each cell"""
    head = ["command, with `--task arithmetic:2`", "rollouts", "k tokens sampled", "pass@1"]
    lines = [[*head, "entropy", "% of tokens clipped: low", "high", "% of groups mixed"]]
    for name, runs in zip(VERIFIED, found):
        low = ["clip_ratio/low_mean", "policy/clipfrac_avg"][name == "ppo"]
        cells = [f"`python {VERIFIED[name]}`", f"{runs[0]['last']['step']}"]
        cells += [thousands(statistics.fmean(x["final"]["sampled_tokens"] for x in runs))]
        cells += [mean(x["final"][key] for x in runs) for key in ("reward", "entropy")]
        cells += [mean((100 * x["mean"][low] for x in runs), 2)]
        if name != "ppo":
            cells += [mean((100 * x["mean"]["clip_ratio/high_mean"] for x in runs), 2)]
            cells += [mean(map(mixed, runs), 0)]
        lines.append([*cells, *[""] * (len(lines[0]) - len(cells))])
    return markdown(*lines)


def mixed(run):
    """-> the percentage of groups that have right and wrong answers"""
    figures = run["mean"]
    if "kept_fraction" in figures:
        return 100 * figures["kept_fraction"]
    return 100 * (1 - figures["frac_reward_zero_std"])


def exploit(*found):
    """-> score / gold reward over the training, a row for each β and seed"""
    shown = 10, 20, 30, 40, 50, 60
    lines = [["β", "seed", *(f"after {n}" for n in shown), "KL at the end"]]
    for beta, runs in zip(("0", "0.01"), found):
        for seed, run in enumerate(runs):
            at = {x["step"]: x for x in run["evals"]} | {60: run["final"]}
            cells = [minus(f"{at[n]['score']:.1f} / {at[n]['reward']:.1f}") for n in shown]
            lines.append([beta, str(seed), *cells, f"{run['final']['kl']:.0f}"])
    return markdown(*lines)


# ---- exact

RANGE = ("reward", "kl", "objective", "kl_star")
NO_MINIMUM = "apo", "kto"


def losses(world, *found):
    """-> each loss on exact, with the distance to its own optimum"""
    head = ["command", "E[r]", "KL(π‖π_ref)", "J", "KL(π‖π\\*)", "KL(π‖own optimum)"]
    words = [line.split() for line in world.splitlines()]  # a figure, of which policy, its values
    words = [line for line in words if len(line) > 2 and line[1] in ("π_ref", "π*")]
    at = {(line[0], line[1]): minus(f"{float(line[-1]):.3f}") for line in words}
    lines = [head, ["π_ref", at["E[r]", "π_ref"], "0", at["J", "π_ref"], at["KL(·‖π*)", "π_ref"]]]
    lines[1].append("")
    lines += [["π\\*", at["E[r]", "π*"], at["KL(·‖π_ref)", "π*"], at["J", "π*"], "0", ""]]
    for name, runs in zip((*PAIRED, "ppo"), found):
        run = runs[0]
        figures = [number(run["final"][key]) for key in RANGE]
        command = EXACT[name].replace(".py", ".py --task exact")
        lines.append([f"`python {command}`", *figures, own(name, run)])
    return markdown(*lines)


def own(name, run):
    found = run["optimum"]
    if name in NO_MINIMUM:
        gap = found["loss above its least value"]
        return f"TV {found['TV(π, own optimum)']:.3f}, loss {gap:.4f} above its infimum"
    if "KL(π‖own optimum)" not in found:
        return "none: the log-ratio grows without bound"
    return number(found["KL(π‖own optimum)"])


def taught(*found):
    lines = [["loss", "E[r]", "KL(π‖π_ref)", "J", "KL(π‖π\\*)", "KL(π‖π_T)"]]
    for loss, [run] in zip(TAUGHT, found):
        figures = [number(run["final"][key]) for key in (*RANGE, "kl_teacher")]
        lines.append([f"`{loss}`", *figures])
    return markdown(*lines)


TAUGHT = "reverse", "forward", "jsd", "sampled"
TERMS = "reward", "k3", "k3-ratio"


def terms(*found):
    lines = [["`--kl`", "E[r]", "KL(π‖π_ref)", "J", "KL(π‖π\\*)", "KL(π‖own point)"]]
    for name, [run] in zip(TERMS, found):
        figures = [number(run["final"][key]) for key in RANGE]
        lines.append([f"`{name}`", *figures, number(run["optimum"]["KL(π‖own optimum)"])])
    return markdown(*lines)


def divided(*found):
    """-> the same with advantages divided by the group's deviation, and on exact:1"""
    head = ["`--kl`", "π\\*, with `--adv-norm std`", "`exact:1`: π\\*", "`exact:1`: own point"]
    lines = [[*head, "`exact:1`: π\\*, with `--adv-norm std`"]]
    found = dict(zip(DIVIDED, found))
    for name in TERMS:
        [std], [one], [both] = (found[x] for x in divided_of(name))
        star = [number(run["final"]["kl_star"]) for run in (std, one, both)]
        point = number(one["optimum"]["KL(π‖own optimum)"])
        lines.append([f"`{name}`", *star[:2], point, star[2]])
    return markdown(*lines)


def divided_of(name):
    return f"exact/std-{name}", f"exact-1/{name}", f"exact-1/std-{name}"


DIVIDED = [source for name in TERMS for source in divided_of(name)]


# ---- memory

TITLES = {"dpo": "DPO", "simpo": "SimPO", "ppo": "PPO"}
COSTS = {
    "sft": "SFT",
    "reward_model": "reward model",
    "dpo": "DPO, cDPO, IPO",
    "dpo-precomputed": "DPO `--precompute-ref`",
    "simpo": "SimPO",
    "orpo": "ORPO",
    "kto": "KTO",
    "ppo": "PPO, K = 2",
    "online_dpo": "online DPO",
    "grpo": "GRPO, RLOO",
    "dapo": "DAPO",
    "distill": "distillation, teacher of the same size",
    "rlaif": "Constitutional AI, RL-CAI",
}


def precisions(found):
    """-> {method: (the prediction in pure bfloat16, that under autocast)}"""
    by = {}
    for x in found:
        by.setdefault(x["method"], {})[x["dtype"]] = x
    return {method: (x["bfloat16-pure"], x["bfloat16"]) for method, x in by.items()}


def both_precisions(note, mixed, found):
    """note: behind a method's name; mixed: the name of the other precision"""
    head = ["method", "7B, GiB: pure bf16", "fits", f"7B, GiB: {mixed}", "fits"]
    cells = [
        [TITLES[method] + note]
        + [text for x in both for text in (gib(x), x["card"].replace("no card", "none"))]
        for method, both in precisions(found).items()
    ]
    return markdown(head, *cells)


def costs(found, steps):
    """-> the GiB of a 7B model's step, and the FLOPs of small ones"""
    flops = {row["method"]: row for row in main_rows(steps)}
    head = ["method", "7B, GiB: pure bf16", "7B, GiB: float32 + autocast"]
    lines = [[*head, "FLOPs per token / SFT", "FLOPs per step / SimPO"]]
    for method, both in ((name, precisions(found)[name]) for name in COSTS):
        cells = [COSTS[method], *map(gib, both), "", ""]
        if row := flops.get(method):
            share = row["flops_per_token"] / flops["sft"]["flops_per_token"]
            cells[3:] = [f"{share:.2f}", f"{row['flops_over_simpo']:.2f}"]
        lines.append(cells)
    return markdown(*lines)


def fitting(found):
    cells = [[x["method"], x["setting"], gib(x)] for x in found]
    return markdown(["method", "setting", "GiB"], *cells)


def measured(small, steps):
    """-> predicted / measured MB of a step, for two sizes of the model"""
    lines = [["method", "2 × 64, 0.2 M", "4 × 128, 0.9 M"]]
    for rows in zip(main_rows(small), main_rows(steps)):
        cells = [f"{x['predicted_bytes'] / 1e6:.1f} / {x['peak_bytes'] / 1e6:.1f}" for x in rows]
        lines.append([rows[0]["method"], *cells])
    return markdown(*lines)


def optimizers(*found):
    head = ["", "loss of the last step", "gold reward", "KL, nats", "peak, MB"]
    lines = [head]
    for name, [run] in zip(("adamw", "adamw8bit"), found):
        final = run["final"]
        both = [minus(f"{final[key]:.2f} ± {final[f'{key}_se']:.2f}") for key in ("reward", "kl")]
        peak = f"{final['peak_bytes'] / 1e6:.1f}"
        lines.append([f"`{name}`", f"{run['last']['loss']:.3f}", *both, peak])
    return markdown(*lines)


def ranks(replicas, sharded):
    """-> GiB of one of eight cards, under autocast / in pure bfloat16"""
    lines = [["method", "8 cards, replicas", "8 cards, `--shard`"]]
    replicas, sharded = precisions(replicas), precisions(sharded)
    for method in replicas:
        cells = [f"{gib(x[method][1])} / {gib(x[method][0])}" for x in (replicas, sharded)]
        lines.append([method, *cells])
    return markdown(*lines)


def processes(*found):
    """-> the MB of a policy and of a step's peak, on 1, 2 and 4 processes"""
    head = ["method", "processes", "policy, MB", "peak, MB", "policy with `--shard`, MB"]
    lines = [[*head, "peak with `--shard`, MB"]]
    for method, runs in zip(("DPO", "PPO"), found):
        sizes = [[f"{x['final'][key] / 1e6:.1f}" for key in HELD] for x in runs]
        one, two, four, *shard = sizes
        lines += [[method, "1", *one, "", ""], [method, "2", *two, *shard[0]]]
        lines.append([method, "4", *four, *shard[1]])
    return markdown(*lines)


def lesson(*found):
    """-> the runs on a real model: losses, what is held out, the KL, and the bytes of a step"""
    head = ["method", "training loss, first → last logged", "held out", "KL, nats"]
    lines = [[*head, "GiB at a step's peak"]]
    for name, [run] in zip(LESSON, found):
        first, last, final = run["first"], run["last"], run["final"]
        key = "reward" if name == "grpo" else "loss"
        course = f"{'reward ' if name == 'grpo' else ''}{first[key]:.3f} → {last[key]:.3f}"
        kl = minus(f"{final['kl']:.2f} ± {final['kl_se']:.2f}")
        lines.append(
            [LESSON_TITLES[name], course, held_out(final), kl, f"{final['peak_bytes'] / 2**30:.1f}"]
        )
    return markdown(*lines)


def held_out(final):
    if "accuracy" in final:
        return f"accuracy {final['accuracy']:.2f} ± {final['accuracy_se']:.2f}"
    if "nll" in final:
        return f"{final['nll']:.2f} nats per token"
    return f"reward {final['ref_reward']:.2f} → {final['reward']:.2f} ± {final['reward_se']:.2f}"


LESSON_TITLES = {
    "sft": "SFT",
    "dpo": "DPO, 32 pairs",
    "lora": "DPO, 32 pairs, `--lora 8`",
    "kto": "KTO, 64 rows",
    "grpo": "GRPO, 20 questions",
}
HELD = "policy_bytes", "peak_bytes"


def resident(megabytes):
    """-> the MB of the largest process, for 1, 2 and 4 processes"""
    one, two, four, *shard = (f"{x:,}" for x in megabytes)
    lines = [["1", one, ""], ["2", two, shard[0]], ["4", four, shard[1]]]
    return markdown(["processes", "replicas", "`--shard`"], *lines)


# ---- printed


def bug(said):
    """-> the table of analysis.break_it, without the lines of code above it"""
    return fenced(said[said.index(f"{'':<24}{'healthy':>10}") :].partition("\n\n")[0])


def table_of(n, said):
    """-> the n-th table of what a command prints as Markdown"""
    return list(re.finditer(r"(^\|.*\n)+", said, re.M))[n][0]


# ---- all of them

PLACES = {
    "answers": Place(("reviews",), answers),
    "methods": Place(("reviews", "memory/7b"), methods),
    "reviews": Place(("reviews",), reviews),
    "principles": Place(("reviews",), principles),
    "fixed/reviews": Place(("fixed/reviews",), partial(course, ("loss", "reward", "kl"))),
    "fixed/exact": Place(("fixed/exact",), partial(course, ("loss", "kl_star"))),
    "verifier": Place(tuple(f"verifier/{name}" for name in VERIFIED), verifier),
    "exploit": Place(("exploit/0", "exploit/0.01"), exploit),
    "exact/losses": Place(("exact/world", *(f"exact/{name}" for name in (*PAIRED, "ppo"))), losses),
    "exact/teacher": Place(tuple(f"distill/{loss}" for loss in TAUGHT), taught),
    "exact/terms": Place(tuple(f"exact/{name}" for name in TERMS), terms),
    "exact/divided": Place(tuple(DIVIDED), divided),
    "memory/card": Place(("memory/card",), fitting),
    "memory/methods": Place(("memory/7b", "memory/steps"), costs),
    "memory/adapters": Place(
        ("memory/adapters",), partial(both_precisions, ", LoRA", "bf16 autocast")
    ),
    "memory/adamw8bit": Place(
        ("memory/adamw8bit",), partial(both_precisions, "", "float32 + autocast")
    ),
    "memory/optimizer": Place(("optimizer/adamw", "optimizer/adamw8bit"), optimizers),
    "memory/measured": Place(("memory/small", "memory/steps"), measured),
    "scaling/8": Place(("scaling/8", "scaling/8-shard"), ranks),
    "scaling/processes": Place(("scaling/dpo", "scaling/ppo"), processes),
    "scaling/resident": Place(("scaling/resident",), resident),
    "lesson": Place(tuple(f"lesson/{name}" for name in LESSON), lesson),
    "parity": Place(("parity",), partial(table_of, 0)),
    "speed/steps": Place(("speed/steps",), partial(table_of, 0)),
    "speed/long": Place(("speed/steps",), partial(table_of, 1)),
    "speed/sampling": Place(("speed/steps",), partial(table_of, 2)),
}
PLACES |= {name: Place((name,), fenced) for name in SOURCES if name.startswith("questions/")}
PLACES |= {name: Place((name,), bug) for name in SOURCES if name.startswith("break-it/")}


# ---- pictures


def scatter(task, plt, found):
    return plots.scatter(plt, task, found["methods"], "kl", "KL(π‖π_ref), nats per response")


def learning(plt, found):
    return plots.learning(plt, found["methods"], [telling(found)])


def trends(plt, found):
    return plots.trends(plt, found["methods"])


def memory(plt, found):
    return plots.prediction(plt, found, "GiB")


PICTURES = {
    "learning-reviews": Picture(("learning",), learning),
    "frontier-reviews": Picture(("reviews",), partial(scatter, "reviews")),
    "frontier-exact": Picture(("frontier/exact",), partial(scatter, "exact")),
    "course-reviews": Picture(("fixed/reviews",), trends),
    "course-exact": Picture(("fixed/exact",), trends),
    "memory-7b": Picture(("memory/7b",), memory),
}

"""Questions about methods that learn from labelled answers.

Each function -> (rows of a table, {claim: a bool for each seed})."""

from functools import partial

import torch

import data
from analysis import optima
from analysis.experiment import SEEDS, STARTS, World, each, rows_read, run
from data.exact import kl

DPO = "dpo.py --task exact --steps 300 --lr 2e-3"
BETA = 0.5  # its β, dpo.py's default on exact


def cancels():
    """Why does DPO need neither a reward model nor a critic, and what cancels?"""
    world = World()
    p, prompts = world.log_ref.exp(), world.task.contexts

    def row(quantity, r, constant):
        spread = (p * (r - (p * r).sum(1, keepdim=True)) ** 2).sum(1).sqrt().mean()
        constants = {f"c({x})": c for x, c in zip(prompts, constant.tolist())}
        return {"quantity": quantity, "std within a prompt": spread.item()} | constants

    log_z = BETA * (world.log_ref + world.r / BETA).logsumexp(1)
    known, rows = row("r, with c = β log Z", world.r, log_z), []
    for seed in SEEDS:
        implicit = BETA * (world.log_probs(run(DPO, seed).path) - world.log_ref)
        rest = world.r - implicit
        rows.append(row(f"r - r_θ, seed {seed}", rest, (p * rest).sum(1)))

    def constants(x):
        return torch.tensor([x[f"c({prompt})"] for prompt in prompts])

    return [known, *rows], {
        "within a prompt r - r_θ is nearly constant: its std is below a quarter of r's": each(
            lambda x: 4 * x["std within a prompt"] < known["std within a prompt"], rows
        ),
        "this constant equals β log Z(x), within 0.2": each(
            lambda x: (constants(x) - constants(known)).abs().max() < 0.2, rows
        ),
        "the constants of two prompts differ by more than 0.5": each(
            lambda x: constants(x).max() - constants(x).min() > 0.5, rows
        ),
    }


def implicit_reward():
    """What is β log π_θ/π_ref?"""
    world, rows = World(), []
    for seed in SEEDS:
        log_p = world.log_probs(run(DPO, seed).path)
        implicit = BETA * (log_p - world.log_ref)
        row = {"seed": seed}
        for name, x in {"r_θ": implicit, "log π": log_p, "log π_ref": world.log_ref}.items():
            row[f"correlation of {name}"] = within(x, world.r) / spread(x) / spread(world.r)
        rows.append(row | {"slope of r_θ": within(implicit, world.r) / spread(world.r) ** 2})
    return rows, {
        "r_θ = β log π/π_ref correlates with r above 0.95 within a prompt": each(
            lambda x: x["correlation of r_θ"] > 0.95, rows
        ),
        "log π alone correlates less": each(
            lambda x: x["correlation of r_θ"] > x["correlation of log π"], rows
        ),
        "r_θ has the scale of r: the slope is between 0.8 and 1.2": each(
            lambda x: 0.8 < x["slope of r_θ"] < 1.2, rows
        ),
    }


def within(a, b):
    """-> the covariance of two (4, 40) tables within each prompt, averaged over prompts"""
    return ((a - a.mean(1, keepdim=True)) * (b - b.mean(1, keepdim=True))).mean().item()


def spread(x):
    return within(x, x) ** 0.5


def gradient(loss, model):
    """-> the gradient of a loss, one tensor per parameter"""
    return torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True)


def norm(gradients):
    return torch.cat([x.flatten() for x in gradients]).norm().item()


def beta_doubled():
    """Does the gradient double when β doubles?"""
    world, rows = World(), []
    for seed in SEEDS:
        row = {"seed": seed}
        for when, path in {"start": world.reference, "end": run(DPO, seed).path}.items():
            model = world.open(path)
            for beta in (BETA, 2 * BETA):
                loss = optima.dpo(world.table(model), world.log_ref, world.pairs, beta)
                row[f"{when}: norm, β {beta:g}"] = norm(gradient(loss, model))
            once, twice = list(row.values())[-2:]
            row[f"{when}: ratio"] = twice / once
        rows.append(row)
    return rows, {
        "at π = π_ref the norm doubles: the ratio is 2": each(
            lambda x: abs(x["start: ratio"] - 2) < 1e-6, rows
        ),
        "after the training the ratio is above 3": each(lambda x: x["end: ratio"] > 3, rows),
    }


BETAS = "dpo.py --task exact --steps 100 --lr 2e-3 --beta {}"


def beta_extremes():
    """What does β do if it is too small, and if it is too large?"""
    world, rows = World(), []
    for beta in (0.01, BETA, 5):
        for seed in SEEDS:
            done = run(BETAS.format(beta), seed)
            row = {"β": str(beta), "seed": seed, "KL(π‖π_ref)": done.final["kl"]}
            p, y = world.log_probs(done.path)[1].exp().max(0)
            row |= {"win rate": done.final["win_rate"], "E[r]": done.final["reward"]}
            rows.append(row | {"likeliest after bb": world.task.outcomes[y], "its π": p.item()})
    small, middle, large = rows[:3], rows[3:6], rows[6:]
    return rows, {
        "β 0.01 has more than 1.5 times the KL of β 0.5": each(
            lambda a, b: a["KL(π‖π_ref)"] > 1.5 * b["KL(π‖π_ref)"], small, middle
        ),
        "it gains less than 0.1 of win rate for that": each(
            lambda a, b: a["win rate"] < b["win rate"] + 0.1, small, middle
        ),
        "with β 5 the policy hardly moves: its KL is below 0.1": each(
            lambda x: x["KL(π‖π_ref)"] < 0.1, large
        ),
        "its win rate is below 0.6": each(lambda x: x["win rate"] < 0.6, large),
    }


def one_network():
    """What happens if one network is both policy and reference?"""
    world, rows = World(), []
    references = {
        "frozen copy": lambda log_p: world.log_ref,
        "itself, detached": lambda log_p: log_p.detach(),
        "itself": lambda log_p: log_p,
    }
    for name, reference in references.items():

        def loss_of(log_p, reference=reference):
            return optima.dpo(log_p, reference(log_p), world.pairs, BETA)

        for step, log_p, loss, size in descend(world, loss_of):
            row = {"reference": name, "step": step, "loss": f"{loss:.6f}", "gradient": size}
            row |= {"E[r]": world.expected(log_p)}
            rows.append(row | {"KL(π‖start)": kl(log_p, world.log_ref).mean().item()})
    copy, detached, itself = rows[1::2]
    return rows, {
        "if it is its own reference, detached or not, the loss stays log 2": each(
            lambda x: x["loss"] == "0.693147", rows[2:]
        ),
        "with gradients through both, nothing moves": [itself["KL(π‖start)"] < 1e-3],
        "with a detached reference, it goes further than with a frozen copy": [
            detached["KL(π‖start)"] > copy["KL(π‖start)"]
        ],
        "it also ends with less reward": [detached["E[r]"] < copy["E[r]"]],
    }


def descend(world, loss_of, steps=100):
    """Runs Adam from π_ref on a loss of the table log π. -> [(step, the table, its loss, the norm
    of the gradient)] before the first step and after the last"""
    model, found = world.open(world.reference), []
    descent = torch.optim.Adam(model.parameters(), lr=1e-3)
    for step in range(steps + 1):
        log_p = world.table(model)
        loss = loss_of(log_p)
        gradients = gradient(loss, model)
        if step in (0, steps):
            found.append((step, log_p.detach(), loss.item(), norm(gradients)))
        for p, g in zip(model.parameters(), gradients):
            p.grad = g
        descent.step()
    return found


FIXED = "dpo.py --task exact --pairs 64 --epochs 160 --batch-size 64 --lr 1e-3"
OWN = "online_dpo.py --task exact --steps 160 --batch-size 64 --lr 1e-3"
SOURCES = {  # where the pairs come from -> the command
    "64 fixed": FIXED,
    "own, 3 rounds": f"{OWN} --rounds 3",
    "own, online": OWN,
}


def few_pairs():
    """What do many epochs on few pairs do, and why does the loss not show it?"""
    rows = []
    for pairs, command in SOURCES.items():
        for seed in SEEDS:
            done = run(command, seed)
            row = {"pairs": pairs, "seed": seed, "labels": int(done.final.get("labels", 64))}
            row["sampled tokens"] = done.final.get("sampled_tokens", 0)
            for step in (40, 160):
                row[f"loss, {step}"] = done.steps[step // 10 - 1]["loss"]
            for step in (40, 160):
                row[f"KL(π‖π*), {step}"] = done.evals[step // 8 - 1]["kl_star"]
            rows.append(row)
    fixed, rounds, online = rows[:3], rows[3:6], rows[6:]
    return rows, {
        "on 64 pairs the loss falls below 0.2": each(lambda x: x["loss, 160"] < 0.2, fixed),
        "there π ends further from π* than it began (1.53)": each(
            lambda x: x["KL(π‖π*), 160"] > 1.53, fixed
        ),
        "on its own pairs the loss stays above 0.4": each(
            lambda x: x["loss, 160"] > 0.4, rounds + online
        ),
        "online, π ends within 0.6 of π*": each(lambda x: x["KL(π‖π*), 160"] < 0.6, online),
        "in three rounds, π ends within 0.8 of π*": each(
            lambda x: x["KL(π‖π*), 160"] < 0.8, rounds
        ),
    }


def thumbs():
    """Can KTO learn from thumbs up and down alone, if most are down?"""
    world, rows = World(), []
    for name, up, weight in (("1/2", 0.5, 1.0), ("1/5", 0.2, 1.0), ("1/5", 0.2, 4.6)):
        labels = world.labels * torch.tensor([1 - up, up]) / world.labels.sum((0, 1))
        loss_of = partial(optima.kto, log_ref=world.log_ref, labels=labels, beta=BETA)
        for step, log_p, loss, _ in descend(world, partial(loss_of, w_desirable=weight)):
            row = {"thumbs up": name, "λ_D": f"{weight:g}", "step": step, "loss": loss}
            row |= {"E[r]": world.expected(log_p)}
            rows.append(row | {"KL(π‖π_ref)": kl(log_p, world.log_ref).mean().item()})
    half, fifth, weighted = rows[1::2]
    return rows, {
        "KTO learns from all three kinds of labels: E[r] ends above 0.8": [
            x["E[r]"] > 0.8 for x in (half, fifth, weighted)
        ],
        "with a fifth up and λ_D 1 it takes three times the KL for less reward": [
            fifth["KL(π‖π_ref)"] > 3 * half["KL(π‖π_ref)"] and fifth["E[r]"] < half["E[r]"]
        ],
        "λ_D 4.6 then brings more reward at less KL": [
            weighted["KL(π‖π_ref)"] < fifth["KL(π‖π_ref)"] and weighted["E[r]"] > fifth["E[r]"]
        ],
    }


def orpo():
    """Does ORPO, which has no SFT stage, reach what SFT followed by DPO reaches?"""
    world, rows = World(), []
    mean = world.expected(world.demonstrated)
    sft = rows_read(run(STARTS["exact"]))
    commands = {"SFT, DPO": BETAS.format(BETA), "ORPO": "orpo.py --task exact --steps 119"}
    for name, command in commands.items():
        for seed in SEEDS:
            done = run(command, seed)
            log_p = world.log_probs(done.path)
            responses = 2 * rows_read(done) + (sft if name == "SFT, DPO" else 0)
            row = {"": name, "seed": seed, "responses": responses, "E[r]": world.expected(log_p)}
            row["KL(π‖demonstrations)"] = kl(log_p, world.demonstrated).mean().item()
            rows.append(row)
    both, one = rows[:3], rows[3:]
    return rows, {
        "both train on as many responses, within 1 %": each(
            lambda a, b: abs(a["responses"] / b["responses"] - 1) < 0.01, both, one
        ),
        "ORPO ends with less reward": each(lambda a, b: a["E[r]"] > b["E[r]"], both, one),
        "its reward is above the demonstrations' mean by more than 0.2": each(
            lambda x: x["E[r]"] > mean + 0.2, one
        ),
        "it stays nearer to the demonstrations": each(
            lambda a, b: a["KL(π‖demonstrations)"] > b["KL(π‖demonstrations)"], both, one
        ),
    }


def most(holds, *rows):
    """-> whether a claim holds for more than half of the seeds, as a claim of one value"""
    found = each(holds, *rows)
    return [2 * sum(found) > len(found)]


def length():
    """Why do DPO's answers grow longer and SimPO's not, although the reward ignores length?"""
    task, rows = data.task("reviews"), []
    for seed in SEEDS:
        _, chosen, rejected = zip(*task.preferences(20_000, seed))
        row = {"seed": seed}
        for name, answers in {"chosen len": chosen, "rejected len": rejected}.items():
            row[name] = sum(len(y.split()) for y in answers) / len(answers)
        penalty = "dpo.py --steps 80 --length-penalty 0.02"
        runs = {"dpo": "dpo.py --steps 80", "r-dpo": penalty, "simpo": "simpo.py --steps 80"}
        for method, command in runs.items():
            final = run(command, seed).final
            row |= {"sft len": final["ref_length"], "sft r": final["ref_reward"]}
            row |= {f"{method} len": final["length"], f"{method} r": final["reward"]}
        rows.append(row)
    return rows, {
        "chosen answers are as long as rejected ones, within 2 %": each(
            lambda x: abs(x["chosen len"] / x["rejected len"] - 1) < 0.02, rows
        ),
        "DPO's answers are longer than SFT's": each(lambda x: x["dpo len"] > x["sft len"], rows),
        "R-DPO's answers, with α 0.02, are shorter than SFT's": each(
            lambda x: x["r-dpo len"] < x["sft len"], rows
        ),
        "SimPO's answers are shorter than SFT's, in most seeds": most(
            lambda x: x["simpo len"] < x["sft len"], rows
        ),
        "DPO and R-DPO gain more than 0.5 of gold reward": each(
            lambda x: min(x["dpo r"], x["r-dpo r"]) > x["sft r"] + 0.5, rows
        ),
        "SimPO gains more than 0.5 too, in most seeds": most(
            lambda x: x["simpo r"] > x["sft r"] + 0.5, rows
        ),
    }

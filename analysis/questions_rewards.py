"""Questions about memory, rewards, and methods that sample.

Each function -> (rows of a table, {claim: a bool for each seed})."""

from statistics import fmean

import torch

import data
from analysis import predict
from analysis.experiment import SEEDS, World, each, run
from analysis.questions_pairs import DPO, FIXED, most
from grpo import group_advantages, grpo_loss, token_weight
from ppo import gae
from rlaif import ai_label
from training import Rollout

GIB = 2**30


def memory():
    """PPO holds four models in memory and DPO two: how many bytes is that at 7B?"""
    rows, of_7b = [], ("tokens:1024+1024", predict.SIZES["7b"], True)
    for precision, dtype in {"autocast": "bfloat16", "pure bf16": "bfloat16-pure"}.items():
        predicted = {row: predict.ask(row, *of_7b, dtype, n=4) for row in ("dpo", "ppo")}
        for model in predicted["ppo"]["models"]:
            star = "*" if model["trainable"] else ""
            rows.append({"precision": precision, "what": model["role"] + star})
            for part in ("weight", "gradient", "optimizer", ""):
                size = model[f"{part}_bytes".strip("_")]
                rows[-1][f"{part or 'all'}, B"] = size / model["parameters"]
            rows[-1]["GiB"] = model["bytes"] / GIB
        for row, found in predicted.items():
            models = sum(model["bytes"] for model in found["models"])
            peak = {"peak, GiB": found["predicted_bytes"] / GIB, "fits on": found["card"]}
            rows.append({"precision": precision, "what": row, "GiB": models / GIB} | peak)
    cells = {(row["precision"], row["what"]): row for row in rows}
    trained, frozen = cells["autocast", "policy*"], cells["autocast", "ref"]
    pairs = [(cells[x, "dpo"], cells[x, "ppo"]) for x in ("autocast", "pure bf16")]
    return rows, {
        "under autocast a trained parameter costs 16 bytes, not 14": [
            round(trained["all, B"], 2) == 16
        ],
        "a frozen one costs between 2 and 2.1 bytes": [2 <= frozen["all, B"] < 2.1],
        "in pure bf16 a trained one costs 8 bytes": [
            round(cells["pure bf16", "policy*"]["all, B"], 2) == 8
        ],
        "PPO's models take twice the bytes of DPO's, in both precisions": [
            abs(ppo["GiB"] / dpo["GiB"] - 2) < 0.01 for dpo, ppo in pairs
        ],
        "in pure bf16 DPO fits on a card of 80 GB, and PPO does not": [
            pairs[1][0]["fits on"] == "80 GB" != pairs[1][1]["fits on"]
        ],
    }


def critic():
    """What does GRPO give up with the critic, and what does it gain?"""
    rows = []
    values = torch.tensor([[0.8, 0.8, 0.1]])  # of a critic that sees a mistake in token 2 of 3
    mask = torch.ones(1, 3, dtype=torch.bool)
    rewards = torch.zeros(1, 3)  # the response was wrong
    for name, right in {"half right": 4, "all wrong": 0}.items():
        reward = torch.tensor([[0.0] * (8 - right) + [1.0] * right])
        adv = group_advantages(reward)[:, :1]  # of the first response, a wrong one
        losses = grpo_loss(rewards, rewards, None, adv, beta=0)  # π is π_old: -A of each token
        rows.append(line(f"GRPO, {name}", -losses[0]))
    for lam in (0.0, 0.95, 1.0):
        adv, _ = gae(rewards, values, mask, lam=lam)
        rows.append(line(f"PPO, λ {lam:g}", adv[0]))
    group, equal, *ppo = rows
    return rows, {
        "GRPO gives each token the same advantage": [
            group["token 1"] == group["token 2"] == group["token 3"] < 0
        ],
        "it gives 0 if all rewards of a group are equal": [equal["token 1"] == 0],
        "PPO with λ 0 blames the second token more than five times as much as the third": [
            ppo[0]["token 2"] < 5 * ppo[0]["token 3"] < ppo[0]["token 1"]
        ],
        "PPO with λ 1 blames the first token as much as the second": [
            ppo[2]["token 1"] == ppo[2]["token 2"]
        ],
    }


def line(name, adv):
    return {"advantage of": name} | {f"token {i}": x for i, x in enumerate(adv.tolist(), 1)}


def group_std():
    """What does the division by the standard deviation do in GRPO?"""
    rows = []
    for right in (7, 4, 1):
        reward = torch.tensor([[1.0] * right + [0.0] * (8 - right)])
        row = {"right of 8": right}
        for name, norm in {"std": "std", "no std": "none"}.items():
            adv = group_advantages(reward, norm=norm)
            row |= {f"{name}: right": adv[0, 0].item(), f"{name}: wrong": adv[0, -1].item()}
            row[f"{name}: rms"] = adv.square().mean().sqrt().item()
        rows.append(row)
    easy, mixed, hard = rows
    return rows, {
        "with std, groups with 7, 4 and 1 right answers weigh the same": [
            abs(x["std: rms"] - mixed["std: rms"]) < 1e-3 for x in (easy, hard)
        ],
        "without std, the group with 4 right answers weighs most": [
            x["no std: rms"] < mixed["no std: rms"] for x in (easy, hard)
        ],
        "with std, a lone wrong answer counts more than twice as much as one of four": [
            -easy["std: wrong"] > -2 * mixed["std: wrong"]
        ],
    }


def response_mean():
    """What does GRPO's mean over the tokens of each response do?"""
    lengths, longest = torch.tensor([[10], [100]]), 200  # two wrong answers, A = -1
    mask = torch.arange(100) < lengths
    answers, rows = Rollout(ids=mask, mask=mask, logp=mask.float()), []
    for agg in ("seq_mean", "token_mean", "const"):
        weight = token_weight(answers, answers, longest, agg).amax(1)
        short, long = (-1000 * weight).tolist()
        both = {"1000 × token of 10": short, "1000 × token of 100": long, "ratio": short / long}
        rows.append({"--agg": agg} | both)
    mean, token, const = rows
    return rows, {
        "GRPO punishes a token of the long wrong answer a tenth as much": [
            abs(mean["ratio"] - 10) < 1e-3
        ],
        "DAPO and Dr. GRPO punish each token the same": [
            abs(x["ratio"] - 1) < 1e-6 for x in (token, const)
        ],
    }


SHORT = "--steps 60 --batch-size 16 --group 8 --lr 1e-3"
DAPO = f"dapo.py --task exact {SHORT} --minibatches 1 --log-every 1"


def dynamic_sampling():
    """What does DAPO's dynamic sampling remove, and what does it cost?"""
    rows, keys = [], {"right": "accuracy", "mixed": "kept_fraction", "rounds": "num_gen_batches"}
    for seed in SEEDS:
        steps, before = run(DAPO, seed).steps, 0
        for part in (steps[:20], steps[20:40], steps[40:]):
            row = {"seed": seed, "steps": f"to {part[-1]['step']}"}
            row |= {name: fmean(x[key] for x in part) for name, key in keys.items()}
            sampled = int(part[-1]["sampled_tokens"])
            rows.append(row | {"sampled tokens": sampled - before})
            before = sampled
    first, last = rows[::3], rows[2::3]
    return rows, {
        "in the last 20 steps fewer groups are mixed than in the first 20": each(
            lambda a, b: a["mixed"] > b["mixed"], first, last
        ),
        "a step then takes more rounds of sampling": each(
            lambda a, b: a["rounds"] > b["rounds"], last, first
        ),
        "the last 20 steps sample more than 1.5 times the tokens of the first 20": each(
            lambda a, b: b["sampled tokens"] > 1.5 * a["sampled tokens"], first, last
        ),
    }


GRPO = f"grpo.py --task exact --kl none {SHORT}"


def verifier():
    """When is PPO or GRPO worth it?"""
    world, rows = World(), []
    right = (world.r > 0).double()

    def row(name, seed, judged, path):
        log_p = world.log_probs(path)
        share = (log_p.exp() * right).sum(1).mean().item()
        rows.append({"": name, "seed": seed, "judged": judged, "right": share})
        rows[-1]["E[r]"] = world.expected(log_p)

    row("SFT, the start", "", "", world.reference)
    for seed in SEEDS:
        row("DPO", seed, "64 pairs", run(FIXED, seed).path)
    for seed in SEEDS:
        row("fresh DPO", seed, f"{300 * 4096} pairs", run(DPO, seed).path)  # its batch is 4096
    for seed in SEEDS:
        row("GRPO", seed, f"{60 * 128} rewards", run(GRPO, seed).path)
    for seed in SEEDS:
        done = run(DAPO, seed)
        rounds = sum(x["num_gen_batches"] for x in done.steps)
        row("DAPO", seed, f"{128 * rounds:.0f} verdicts", done.path)
    few, fresh, grpo, dapo = (rows[i : i + 3] for i in (1, 4, 7, 10))
    return rows, {
        "GRPO gets more right than DPO on 64 pairs": each(
            lambda a, b: a["right"] > b["right"], grpo, few
        ),
        "so does DAPO, which sees only right or wrong": each(
            lambda a, b: a["right"] > b["right"], dapo, few
        ),
        "GRPO and DAPO get more than 0.9 right": each(lambda x: x["right"] > 0.9, grpo + dapo),
        "DPO has more reward with fresh pairs than with 64": each(
            lambda a, b: a["E[r]"] > b["E[r]"], fresh, few
        ),
    }


TEACHER = "grpo.py --steps 60 --batch-size 16 --group 4 --max-new-tokens 48 --eval-prompts 128"
SMALL = "sft.py --steps 250 --n-layer 2 --n-embd 32 --eval-prompts 128"
TAUGHT = (
    "--batch-size 16 --group 4 --lr 2e-3 --max-new-tokens 48 --eval-prompts 256 --init small.pt"
)


def teacher():
    """When is a teacher better than a reward?"""
    rows = []
    for seed in SEEDS:
        taught, small = run(TEACHER, seed), run(SMALL, seed)
        done = {"teacher": taught}
        done["GRPO"] = run(f"grpo.py --steps 40 {TAUGHT}", seed, init=small.path)
        for loss in ("reverse", "forward"):
            command = f"distill.py --steps 40 {TAUGHT} --teacher teacher.pt --loss {loss}"
            done[loss] = run(command, seed, init=small.path, teacher=taught.path)
        for name, x in done.items():
            rows.append({"": name, "seed": seed, "reward": x.final["reward"]})
            gain = "" if name == "teacher" else x.final["reward"] - small.final["reward"]
            rows[-1] |= {"gain": gain}
            rows[-1] |= {"entropy": x.final["entropy"], "length": x.final["length"]}
            rows[-1] |= {"KL(π‖π_T)": x.final.get("kl_teacher", "")}
    guide, grpo, reverse, forward = (rows[i::4] for i in range(4))
    return rows, {
        "GRPO's student has more reward, from as many samples": each(
            lambda a, b: a["reward"] > b["reward"], grpo, reverse
        ),
        "the teacher's student (reverse) gains more than half a point without any reward": each(
            lambda a: a["gain"] > 0.5, reverse
        ),
        "its answers have the teacher's length within 3 tokens, and GRPO's are shorter": each(
            lambda a, b, c: abs(a["length"] - b["length"]) < 3 < b["length"] - c["length"],
            *(reverse, guide, grpo),
        ),
        "the reverse KL makes the student more certain than the forward KL": each(
            lambda a, b: a["entropy"] < b["entropy"], reverse, forward
        ),
        "it also ends nearer to the teacher in KL(π‖π_T), which it minimises": each(
            lambda a, b: a["KL(π‖π_T)"] < b["KL(π‖π_T)"], reverse, forward
        ),
    }


WEAK = "reward_model.py --pairs 64 --epochs 20 --batch-size 32 --eval-prompts 256"
FEW = "--steps 24 --batch-size 16 --group 4 --lr 1e-3 --warmup 5 --eval-prompts 128"
RLOO = f"grpo.py --reward rm --adv-norm loo --agg sum --kl reward {FEW} --max-new-tokens 48"


def hacking():
    """How can the score rise while the gold reward falls, and what does β change?"""
    rows = []
    for beta in ("0", "1"):
        for seed in SEEDS:
            judge = run(WEAK, seed)
            final = run(f"{RLOO} --beta {beta}", seed, reward=judge.path).final
            row = {"β": beta, "seed": seed, "correlation": judge.final["correlation"]}
            for key in ("score", "reward"):
                name = key.replace("reward", "gold")
                row |= {f"{name} before": final[f"ref_{key}"], f"{name} after": final[key]}
            rows.append(row | {"KL": final["kl"], "tokens": final["length"]})
    free, held = rows[:3], rows[3:]
    return rows, {
        "with β 0 the score rises by more than 3": each(
            lambda x: x["score after"] > x["score before"] + 3, free
        ),
        "with β 0 the gold reward falls by more than 0.5, in most seeds": most(
            lambda x: x["gold after"] < x["gold before"] - 0.5, free
        ),
        "with β 1 the gold reward falls by less than 0.5": each(
            lambda x: x["gold after"] > x["gold before"] - 0.5, held
        ),
        "with β 1 it ends more than 0.5 higher than with β 0, in most seeds": most(
            lambda a, b: a["gold after"] > b["gold after"] + 0.5, held, free
        ),
        "β 1 takes less KL than β 0": each(lambda a, b: a["KL"] < b["KL"], held, free),
        "β 1 takes less than half the KL of β 0, in most seeds": most(
            lambda a, b: a["KL"] < b["KL"] / 2, held, free
        ),
        "the reward model ranks β 0 above β 1, and the gold reward β 1 above β 0": each(
            lambda a, b: a["score after"] < b["score after"] and a["gold after"] > b["gold after"],
            held,
            free,
        ),
    }


def judge():
    """What is an AI judge worth, and what does the order of the two answers change?"""
    task, rows = data.task("reviews"), []
    for seed in SEEDS:
        draw = torch.Generator().manual_seed(seed)
        pairs = task.preferences(2000, seed)
        r = torch.tensor([[task.reward(x, y) for y in both] for x, *both in pairs])
        first = torch.where(torch.rand(len(r), generator=draw) < 0.5, 1, -1)
        better = first * (r[:, 0] - r[:, 1])  # either may be the first answer
        taste = torch.randn(len(r), generator=draw)  # likes that do not depend on the order
        for bias in (0.0, 1.0, 2.0):
            ab = options(better + taste + bias)  # the first answer stands as A
            ba = options(-better - taste + bias)
            both = ai_label(ab, ba)
            one, differ = ab.softmax(1)[:, 0], better != 0
            row = {"seed": seed, "liking for A": f"{bias:g}"}
            row["mean P(A) - ½"] = (ab.softmax(1) + ba.softmax(1))[:, 0].mean().item() / 2 - 0.5
            for name, p in {"one order": one, "both orders": both}.items():
                row[f"agrees, {name}"] = ((p > 0.5) == (better > 0))[differ].float().mean().item()
            rows.append(row)
    without, _, strong = rows[::3], rows[1::3], rows[2::3]
    return rows, {
        "a judge with a liking of 2 for A says A too often, by more than 0.1": each(
            lambda x: x["mean P(A) - ½"] > 0.1, strong
        ),
        "read in one order, it then agrees less with the gold reward": each(
            lambda a, b: a["agrees, one order"] > b["agrees, one order"], without, strong
        ),
        "the mean of both orders agrees as often as without the liking": each(
            lambda a, b: abs(a["agrees, both orders"] - b["agrees, both orders"]) < 0.01,
            without,
            strong,
        ),
    }


def options(logit):
    """-> (N, 2) log-probs of the options A and B"""
    return torch.stack([logit, torch.zeros_like(logit)], 1).log_softmax(1)


def mt_bench():
    """What do scores of 7.34 and 6.86 on MT-Bench say about two models?"""
    gap, n, sd = 7.34 - 6.86, 80, 2.0  # questions; the sd of a question's score is an assumption
    rows = []
    for seed in SEEDS:
        draw = torch.Generator().manual_seed(seed)
        for rho in (0.0, 0.5):
            common, *own = torch.randn(3, 20_000, n, generator=draw)
            a, b = (sd * (rho**0.5 * common + (1 - rho) ** 0.5 * x) for x in own)
            difference = (a - b).mean(1)
            rows.append({"seed": seed, "correlation": str(rho)})  # of two models' scores
            rows[-1] |= {"se of one mean": a.mean(1).std().item()}
            rows[-1] |= {"se of the difference": difference.std().item()}
            rows[-1]["equal, yet 0.48 apart"] = (difference.abs() >= gap).double().mean().item()
            rows[-1]["truly 0.48 apart, reversed"] = (difference + gap < 0).double().mean().item()
    apart, paired = rows[::2], rows[1::2]
    return rows, {
        "one mean has a standard error of 0.22": each(
            lambda x: abs(x["se of one mean"] - sd / n**0.5) < 0.01, rows[::2]
        ),
        "without correlation, equal models are 0.48 apart in more than a tenth of the tests": each(
            lambda x: x["equal, yet 0.48 apart"] > 0.1, apart
        ),
        "with correlation 0.5, they are so in fewer than a twentieth": each(
            lambda x: x["equal, yet 0.48 apart"] < 0.05, paired
        ),
    }

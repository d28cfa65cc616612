"""Questions about memory, rewards, and methods that sample.

Each function -> (rows of a table, {claim: a bool for each seed})."""

from types import SimpleNamespace

import torch

import data
from analysis import predict
from analysis.experiment import SEEDS, World, each, higher, run
from analysis.questions_pairs import FIXED
from grpo import group_advantages, token_weight
from ppo import gae
from rlaif import ai_label
from training import Rollout

GIB = 2**30


def memory():
    """PPO holds four models and DPO two: what is that in bytes at 7B?"""
    o = dict(predict="7b", task="", methods=("dpo", "ppo"), batch_size=4, micro_batch=0, seq_len=0)
    o = SimpleNamespace(**o, lora=0, ranks=1, shard=False, given=set())  # as compare.py's
    rows = []
    for precision, dtype in {"autocast": "bfloat16", "pure bf16": "bfloat16-pure"}.items():
        asked = {row: predict.ask(row, o, recompute=True, dtype=dtype) for row in o.methods}
        for model in asked["ppo"]["models"]:
            star = "*" if model["trainable"] else ""
            rows.append({"precision": precision, "what": model["role"] + star})
            for part in ("weight", "gradient", "optimizer", ""):
                size = model[f"{part}_bytes".strip("_")]
                rows[-1][f"{part or 'all'}, B"] = size / model["parameters"]
            rows[-1]["GiB"] = model["bytes"] / GIB
        for row, found in asked.items():
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
        "a frozen one costs 2, and less than 0.1 more": [2 <= frozen["all, B"] < 2.1],
        "in pure bf16 a trained one costs 8": [
            round(cells["pure bf16", "policy*"]["all, B"], 2) == 8
        ],
        "PPO's models are twice DPO's, in both precisions": [
            abs(ppo["GiB"] / dpo["GiB"] - 2) < 0.01 for dpo, ppo in pairs
        ],
        "on a card of 80 GB DPO fits in pure bf16, and PPO does not": [
            pairs[1][0]["fits on"] == "80 GB" != pairs[1][1]["fits on"]
        ],
    }


def critic():
    """What does GRPO give up with the critic, and what does it gain?"""
    rows = []
    values = torch.tensor([[0.8, 0.8, 0.1]])  # a critic's: the second of three tokens was a mistake
    mask = torch.ones(1, 3, dtype=torch.bool)
    rewards = torch.zeros(1, 3)  # the answer was wrong
    for name, right in {"half right": 4, "all wrong": 0}.items():
        reward = torch.tensor([[0.0] * (8 - right) + [1.0] * right])
        adv = group_advantages(reward)[0, 0].item()
        rows.append(line(f"GRPO, {name}", [adv] * 3))
    for lam in (0.0, 0.95, 1.0):
        adv = gae(rewards, values, mask, lam=lam)[0]
        rows.append(line(f"PPO, λ {lam:g}", adv[0].tolist()))
    group, equal, *ppo = rows
    return rows, {
        "GRPO: each token has the same advantage": [group["token 1"] == group["token 3"]],
        "a group of equal rewards teaches it nothing": [equal["token 1"] == 0],
        "PPO with λ 0 blames the second token alone for most of it": [
            ppo[0]["token 2"] < 5 * ppo[0]["token 3"] < ppo[0]["token 1"]
        ],
        "PPO learns from the answer with any λ": [x["token 2"] < -0.5 for x in ppo],
    }


def line(name, adv):
    return {"advantage of": name} | {f"token {i}": x for i, x in enumerate(adv, 1)}


def group_std():
    """What does the division by std in GRPO do?"""
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
        "with std easy, mixed and hard groups weigh the same": [
            abs(x["std: rms"] - mixed["std: rms"]) < 1e-3 for x in (easy, hard)
        ],
        "without it the mixed group weighs most": [
            x["no std: rms"] < mixed["no std: rms"] for x in (easy, hard)
        ],
        "with std the rare answer has the largest advantage": [
            -easy["std: wrong"] == max(abs(v) for x in rows for k, v in x.items() if "std:" in k)
        ],
    }


def response_mean():
    """What does GRPO's mean over each response do?"""
    lengths, longest = torch.tensor([[10], [100]]), 200  # two wrong answers, A = -1
    mask = torch.arange(100) < lengths
    answers, rows = Rollout(ids=mask, mask=mask), []
    for agg in ("seq_mean", "token_mean", "const"):
        weight = token_weight(answers, answers, longest, agg).amax(1)
        short, long = (-1000 * weight).tolist()
        both = {"1000 × a token of 10": short, "of 100": long, "ratio": short / long}
        rows.append({"--agg": agg} | both)
    mean, token, const = rows
    return rows, {
        "GRPO: a token of the long wrong answer costs a tenth": [abs(mean["ratio"] - 10) < 1e-3],
        "DAPO, Dr. GRPO: each token costs the same": [
            abs(x["ratio"] - 1) < 1e-6 for x in (token, const)
        ],
    }


DAPO = "dapo.py --task exact --steps 60 --batch-size 16 --group 8 --minibatches 1 --lr 1e-3"


def dynamic_sampling():
    """What does DAPO's dynamic sampling remove, and what does it cost?"""
    rows = []
    for seed in SEEDS:
        before = 0
        for x in run(DAPO, seed).steps[1::2]:  # each tenth step is in the record
            row = {"seed": seed, "step": x["step"], "right": x["accuracy"]}
            row |= {"mixed groups": x["kept_fraction"], "rounds": int(x["num_gen_batches"])}
            row["tokens of 20 steps"] = int(x["sampled_tokens"]) - before
            rows.append(row)
            before = int(x["sampled_tokens"])
    first, last = rows[::3], rows[2::3]
    return rows, {
        "as answers get right, fewer groups are mixed": higher(first, last, "mixed groups"),
        "a step takes more rounds": higher(last, first, "rounds"),
        "and 20 steps more than twice the tokens": [
            b["tokens of 20 steps"] > 2 * a["tokens of 20 steps"] for a, b in zip(first, last)
        ],
    }


GRPO = "grpo.py --task exact --kl none --steps 60 --batch-size 16 --group 8 --lr 1e-3"


def verifier():
    """When is PPO or GRPO worth it?"""
    world, rows = World(), []
    right = (world.r > 0).double()

    def row(name, seed, asked, path):
        log_p = world.log_probs(path)
        share = (log_p.exp() * right).sum(1).mean().item()
        rows.append({"": name, "seed": seed, "judged": asked, "right": share})
        rows[-1]["E[r]"] = world.expected(log_p)

    row("SFT, the start", "", "", world.reference)
    for name, command in {"DPO": FIXED, "GRPO": GRPO, "DAPO": DAPO}.items():
        judged = {"DPO": "64 pairs", "GRPO": "7680 rewards", "DAPO": "verdicts"}[name]
        for seed in SEEDS:
            row(name, seed, judged, run(command, seed).path)
    dpo, grpo, dapo = rows[1:4], rows[4:7], rows[7:]
    return rows, {
        "GRPO has more right than DPO on 64 pairs": higher(grpo, dpo, "right"),
        "DAPO, which is told right or wrong alone, too": higher(dapo, dpo, "right"),
        "and both above 0.9": each(grpo + dapo, lambda x: x["right"] > 0.9),
    }


WEAK = "reward_model.py --task exact --pairs 24 --epochs 40 --batch-size 24"
PPO = "ppo.py --task exact --reward rm --steps 30 --lr 2e-3 --log-every 1"


def hacking():
    """How does the score rise while the gold reward falls, and what does β do?"""
    rows = []
    for beta in ("0", "2"):
        for seed in SEEDS:
            done = run(f"{PPO} --beta {beta}", seed, reward=run(WEAK, seed).path)
            score = {x["step"]: x["reward"] for x in done.steps}
            gold = {x["step"]: x["reward"] for x in done.evals}  # after that rollout
            row = {"β": beta, "seed": seed}
            for name, course in {"score": score, "gold": gold}.items():
                row |= {f"{name}, {step}": course[step] for step in (1, 10, 30)}
            row["most gold"] = max(gold.values())
            rows.append(row | {"KL": done.final["kl"]})
    free, held = rows[:3], rows[3:]
    return rows, {
        "β 0: the score rises by more than 4": each(
            free, lambda x: x["score, 30"] > x["score, 1"] + 4
        ),
        "the gold reward by less than a tenth of that": each(
            free,
            lambda x: x["gold, 30"] - x["gold, 1"] < (x["score, 30"] - x["score, 1"]) / 10,
        ),
        "β 2: less than half the KL": [a["KL"] < b["KL"] / 2 for a, b in zip(held, free)],
        "and more gold a nat": [
            a["gold, 30"] / a["KL"] > b["gold, 30"] / b["KL"] for a, b in zip(held, free)
        ],
    }


def judge():
    """What is an AI judge worth, and what does the place of an answer do?"""
    task, rows = data.task("reviews"), []
    for seed in SEEDS:
        draw = torch.Generator().manual_seed(seed)
        pairs = task.preferences(2000, seed)
        r = torch.tensor([[task.reward(x, y) for y in both] for x, *both in pairs])
        first = torch.where(torch.rand(len(r), generator=draw) < 0.5, 1, -1)
        better = first * (r[:, 0] - r[:, 1])  # either may be the first answer
        taste = torch.randn(len(r), generator=draw)  # what it likes besides, in either order
        for bias in (0.0, 1.0, 2.0):
            ab = options(better + taste + bias)  # the first answer stands as A
            ba = options(-better - taste + bias)
            both = ai_label(ab, ba)
            one, told = ab.softmax(1)[:, 0], better != 0
            row = {"seed": seed, "liking for A": f"{bias:g}"}
            row["mean P(A) - ½"] = (ab.softmax(1) + ba.softmax(1))[:, 0].mean().item() / 2 - 0.5
            for name, p in {"one order": one, "both orders": both}.items():
                row[f"{name} ~ gold"] = ((p > 0.5) == (better > 0))[told].float().mean().item()
            rows.append(row)
    without, _, strong = rows[::3], rows[1::3], rows[2::3]
    return rows, {
        "a judge that likes A says A more often": each(strong, lambda x: x["mean P(A) - ½"] > 0.1),
        "one order then agrees less with the gold reward": higher(
            without, strong, "one order ~ gold"
        ),
        "the mean of both orders agrees as it did": [
            abs(a["both orders ~ gold"] - b["both orders ~ gold"]) < 0.01
            for a, b in zip(without, strong)
        ],
    }


def options(logit):
    """-> (N, 2) log-probs of the options A and B"""
    return torch.stack([logit, torch.zeros_like(logit)], 1).log_softmax(1)


def mt_bench():
    """What can 7.34 against 6.86 on MT-Bench say?"""
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
            rows[-1]["0.48 apart, yet reversed"] = (difference + gap < 0).double().mean().item()
    apart, paired = rows[::2], rows[1::2]
    return rows, {
        "one mean has a standard error of 0.22": each(
            rows[::2], lambda x: abs(x["se of one mean"] - sd / n**0.5) < 0.01
        ),
        "equal models are 0.48 apart in more than a tenth of such tests": each(
            apart, lambda x: x["equal, yet 0.48 apart"] > 0.1
        ),
        "in fewer than a twentieth, if questions are as hard for both": each(
            paired, lambda x: x["equal, yet 0.48 apart"] < 0.05
        ),
    }

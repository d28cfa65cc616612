"""The evaluation in evaluate.py, compared with figures counted by hand."""

import io
import json
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import lines
from tqdm import tqdm

import data
import dpo
import kto
import sft
import simpo
from data import printable
from evaluate import Evaluator, log_ratio_and_entropy, standard_error
from gpt import GPT, GPTConfig
from training import Compute
from training.order import RewardEvaluator
from training.sampling import sample

TOKENIZER = data.tokenizer()


def evaluator(task, tokens=0, context=64, **more):
    """On a CPU; a response has so many tokens, 0: as many as the task says"""
    o = SimpleNamespace(
        device="cpu",
        dtype="float32",
        seed=0,
        truncate=False,
        max_new_tokens=tokens,
        eval_prompts=512,
    )
    run = Compute(o)
    run.models, run.baseline = {}, ""
    run.tokenizer, run.block_size = data.tokenizer(own=task.tokenizer), context
    return Evaluator(run, task, **more)


def model(seed):
    m = GPT(GPTConfig(TOKENIZER.size, 64, 1, 1, 8), seed)
    with torch.no_grad():
        m.wte.weight *= 10
    return m


def test_rewards_and_win_rate_by_hand(monkeypatch):
    """Rewards 3, -3, 1, -3 against 1, 3, 1, -3 (the last two do not end): one win, one
    loss, two ties: win rate (1 + 0 + ½ + ½) / 4; means -2/4 and 2/4. The deviations of the first
    from their mean are 3.5, -2.5, 1.5 and -2.5: the variance is 27/3, the standard error 3/√4."""
    good, bad, mild = "The plot is superb.", "The plot is dreadful.", "The jokes are never wooden."
    texts = {True: [good, bad, mild, ""], False: [mild, good, mild, good]}
    policy, ref, reward = model(0), model(1), data.task("reviews").reward
    measured = evaluator(data.task("reviews"), 4, compared_with=ref)

    def respond(m, n, seed, scored_by=None):
        mine = m is policy
        ended = [True, True, True, False]
        rows = zip(measured.prompts, texts[mine], ended)
        earned = [reward(prompt, text, end) for (_, prompt, _), text, end in rows]
        ratios = [torch.tensor([1.0, 2.0, 3.0, 6.0])]
        found = {"texts": texts[mine], "ended": ended, "tokens": 40 if mine else 80}
        found |= {"earned": {"reward": earned}, "log_ratio": ratios, "entropy": 20.0}
        return SimpleNamespace(**found, difference=0.0)

    monkeypatch.setattr(measured, "_respond", respond)
    figures = measured.measure(policy)
    assert figures["reward"] == pytest.approx(-2 / 4)
    assert figures["reward_se"] == pytest.approx(3 / 2)
    assert figures["ref_reward"] == pytest.approx(2 / 4)
    assert figures["win_rate"] == 0.5 and figures["win_rate_se"] == pytest.approx(wilson(0.5, 4))
    assert figures["kl"] == pytest.approx(3.0)
    assert figures["kl_se"] == pytest.approx((14 / 3) ** 0.5 / 2)  # deviations -2 -1 0 3; √4
    assert figures["length"] == 10 and figures["ref_length"] == 20
    assert figures["entropy"] == 0.5 and figures["ended"] == 0.75
    shown = [answers for _, answers in measured.shown]
    assert [list(x) for x in shown] == [["reference", "policy"]] * 2
    rewards = {text: r for answers in shown for r, text in answers.values()}
    assert all(r == reward("", text, True) for text, r in rewards.items() if r > -3)


def test_every_prompt_is_answered_once_at_temperature_1(monkeypatch):
    """Ten prompts four at a time, by the policy and then by the reference: each question is judged
    with its own response, whose log-probs are those that it was drawn with."""
    monkeypatch.setattr("evaluate.ROWS", 4)
    measured, seen = evaluator(data.task("reviews"), 6, compared_with=model(1)), []

    def judge(questions, rollout):
        for (ids, *_), row, mask in zip(questions, rollout.ids.tolist(), rollout.mask):
            assert row[: int(mask.int().argmax())] == list(ids)
        seen.extend(prompt for _, prompt, _ in questions)
        return torch.arange(len(seen) - len(questions), len(seen)) * 1.0

    bars = []

    class Bar(tqdm):
        def __init__(self, **more):
            bars.append(self)
            super().__init__(**more | {"disable": False, "file": io.StringIO()})

    monkeypatch.setattr("evaluate.tqdm", Bar)
    measured.judges = {"reward": judge}
    figures = measured.measure(model(0), 10)
    assert [(bar.n, bar.total) for bar in bars] == [(10, 10), (10, 10)]  # of both models
    assert seen == 2 * [prompt for _, prompt, _ in measured.prompts[:10]]
    assert figures["prompts"] == 10 and figures["sampling_difference"] < 1e-4
    assert figures["reward"] == 4.5 and figures["ref_reward"] == 14.5 and figures["win_rate"] == 0


def test_kl_is_that_of_the_samples():
    """Against itself a policy is at KL 0 to the bit; against another its mean is positive by more
    than noise."""
    policy = model(0)
    measured = evaluator(data.task("reviews"), 6, compared_with=policy)
    figures = measured.measure(policy, 256)
    assert figures["kl"] == 0.0 and figures["kl_se"] == 0.0
    assert figures["ref_length"] != figures["length"]  # the two draw independently
    assert measured.measure(policy, 256) == figures  # a fixed seed
    figures = evaluator(data.task("reviews"), 6, compared_with=model(1)).measure(policy, 256)
    assert figures["kl"] > 5 * figures["kl_se"] > 0


def test_the_answers_that_are_shown_are_drawn_with_the_same_numbers(capsys):
    """So that of equal models they are equal. They stand side by side, wrapped at words."""
    policy, task = model(0), data.task("reviews")
    same = evaluator(task, 30, compared_with=policy)
    figures = same.measure(policy)
    assert len(same.shown) == 2
    assert all(answers["policy"] == answers["reference"] for _, answers in same.shown)
    other = evaluator(task, 30, compared_with=model(1))
    other.measure(policy)
    assert all(answers["policy"] != answers["reference"] for _, answers in other.shown)
    same.report("x", figures)
    said = capsys.readouterr().out.split("entropy")[1].splitlines()[2:]
    assert {line[19] for line in said if "|" in line} == {"|"} and max(map(len, said)) <= 80
    assert said[0].startswith("A ") and re.match(r" +reference +-?\d\.\d\d \| ", said[1])


def plain(x, y, implicit, policy, ref):
    """The implicit reward of one row, by the plain formula."""
    answer = [*TOKENIZER.encode(y), TOKENIZER.end_id]
    ids, n, total = torch.tensor([[*TOKENIZER.encode(x), *answer]]), len(answer), 0.0
    for sign, m in ((1, policy),) if implicit == "logp mean" else ((1, policy), (-1, ref)):
        logp = m(ids)[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
        total += sign * logp[-n:].sum().item()
    return total if implicit == "sum" else total / n


def written(folder, **files):
    """Writes {name: rows} as files of a task -> the task of train and test"""
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return data.task(str(folder / "train.jsonl"), str(folder / "test.jsonl"))


def test_log_ratios_and_entropies_are_sums_over_a_response():
    """By the plain formula, row by row: Σ_t log π/π_ref, Σ_t of the entropies, and how far a
    token's log-prob is at most from the one that it was drawn with."""
    policy, ref = model(0), model(1)
    draws = torch.Generator().manual_seed(0)
    rollout = sample(policy, [[1, 2, 3], [4, 5]], 6, TOKENIZER.ends, generator=draws, group=2)
    rollout.logp[1, 4] += 0.5
    found = log_ratio_and_entropy(policy, ref, rollout).tolist()
    alone = log_ratio_and_entropy(policy, None, rollout)[:, 0]
    assert not alone.any()
    for i, (ids, mask) in enumerate(zip(rollout.ids, rollout.mask)):
        log_p, log_q = (m(ids[None])[0, :-1].log_softmax(-1) for m in (policy, ref))
        places = mask[1:].nonzero()[:, 0]
        ratio = (log_p - log_q)[places, ids[places + 1]].sum().item()
        entropy = -(log_p.exp() * log_p).sum(-1)[places].sum().item()
        assert found[i] == pytest.approx([ratio, entropy, 0.5 if i == 1 else 0.0], abs=1e-4)
        assert len(places) > 1


DPO = {"beta": 0.1, "label_smoothing": 0.0, "length_penalty": 0.0, "ipo_sum": False}
DPO |= {"sft_weight": 0.0}


def wilson(p, n):
    """Half of the interval whose bounds q are one error of q away from p: (p - q)² = q(1 - q)/n"""
    a, b, c = 1 + 1 / n, -(2 * p + 1 / n), p * p
    return math.sqrt(b * b - 4 * a * c) / (2 * a)


LOSSES = {
    "sum": (dpo, DPO | {"loss": "dpo"}),
    "mean": (dpo, DPO | {"loss": "ipo"}),
    "logp mean": (simpo, {"beta": 2.0, "gamma_beta_ratio": 0.5, "sft_weight": 0.0}),
}
KTO = SimpleNamespace(beta=0.1, w_desirable=1.0, w_undesirable=1.0)


@pytest.mark.parametrize("implicit", LOSSES)
def test_held_out_accuracy_is_that_of_the_implicit_reward(implicit, tmp_path):
    """The share of held-out pairs whose chosen log-ratio, summed or averaged, is higher, row by row
    with the plain formula. Some chosen answers stand twice."""
    files = {}
    for name in ("train", "test"):
        rows = data.task("reviews").preferences(30, 0, split=name)
        rows[10:20] = [(x, w, rows[29][2]) for x, w, _ in rows[:10]]
        files[name] = [dict(zip(("prompt", "chosen", "rejected"), row)) for row in rows]
    task = written(tmp_path, **files)
    policy, ref = model(0), model(1)

    def score(x, y):
        return plain(x, y, implicit, policy, ref)

    pairs = task.preferences(None, 0, split="test")
    expected = sum(score(x, w) > score(x, l) for x, w, l in pairs) / 30
    script, options = LOSSES[implicit]
    held_out = script.held_out(task, SimpleNamespace(**options))
    figures = evaluator(task, 4, compared_with=ref, held_out=held_out).measure(policy)
    assert figures["accuracy"] == pytest.approx(expected) and 0 < expected < 1
    alone = evaluator(task, 4, held_out=held_out).measure(policy)
    assert ("accuracy" in alone) == (implicit == "logp mean")  # which needs no reference


def test_held_out_accuracy_of_unpaired_rows(tmp_path):
    """The share of (desirable, undesirable) couples with the higher log-ratio on the desirable."""
    rows = data.task("reviews").feedback(24, 0)
    rows = [dict(zip(("prompt", "completion", "label"), row)) for row in rows]
    task, policy, ref = written(tmp_path, train=rows, test=rows), model(0), model(1)
    scores = {True: [], False: []}
    for row in rows:
        score = plain(row["prompt"], row["completion"], "sum", policy, ref)
        scores[row["label"]].append(score)
    couples = [a > b for a in scores[True] for b in scores[False]]
    expected = sum(couples) / len(couples)
    held_out = kto.held_out(task, KTO)
    figures = evaluator(task, 4, compared_with=ref, held_out=held_out).measure(policy)
    assert figures["accuracy"] == pytest.approx(expected)
    assert 0 < expected < 1 and expected != 0.5
    n = min(map(len, scores.values()))  # so many couples have no row in common
    assert figures["accuracy_n"] == n > 1
    assert figures["accuracy_se"] == pytest.approx(wilson(expected, n))


def test_held_out_accuracy_of_a_file_of_pairs_that_is_split(tmp_path):
    """KTO's: the share of pairs whose chosen answer has the higher log-ratio."""
    rows = data.task("reviews").preferences(25, 0)
    files = [dict(zip(("prompt", "chosen", "rejected"), row)) for row in rows]
    task, policy, ref = written(tmp_path, train=files, test=files), model(0), model(1)
    higher = []
    for x, *answers in rows:
        w, l = (plain(x, y, "sum", policy, ref) for y in answers)
        higher.append(w > l)
    held_out = kto.held_out(task, KTO)
    figures = evaluator(task, 4, compared_with=ref, held_out=held_out).measure(policy)
    assert figures["accuracy"] == pytest.approx(sum(higher) / 25)
    assert 0.2 < figures["accuracy"] < 0.8 and figures["accuracy_n"] == 25


def test_held_out_loss_counts_every_row(tmp_path):
    """Rows that stand twice in the file count twice: nats per token, by the plain formula."""
    rows = data.task("reviews").demonstrations(6, 0)
    rows = [dict(zip(("prompt", "completion"), row)) for row in rows]
    task = written(tmp_path, train=rows[:3], test=[*rows, *rows[:2], rows[0]])
    policy, nats, tokens = model(0), 0.0, 0
    for x, y in task.demonstrations(None, 0, split="test"):
        n = len(TOKENIZER.answer(y))
        nats -= n * plain(x, y, "logp mean", policy, None)
        tokens += n
    held_out = sft.held_out(task, None)
    found = evaluator(task, 4, held_out=held_out).measure(policy)["nll"]
    assert found == pytest.approx(nats / tokens)


def test_held_out_figures_of_a_reward_model_by_hand(monkeypatch):
    """Margins 1, -1, 0, 2 of labels p = 0.8, 0.3, 0.9, 1: the model agrees with 0.8, 0.7, 0 (a tie)
    and 1. The gold labels 0.9, 0.2, 0.5, 1 allow 0.9, 0.8, 0.5 and 1; their noise is
    √(0.09 + 0.16 + 0.25) / 4. Of the world: r - r_θ = (3, 1) at d = (¼, ¾) less its mean 1.5 is
    (1.5, -0.5), whose mean square is ¼ 9/4 + ¾ 1/4 = ¾."""
    found = RewardEvaluator.__new__(RewardEvaluator)
    found.run, found.world, found.gold = None, ["outcomes"], True
    found.texts = [("x", i, i) for i in range(4)]
    found.pairs = [((1,), (2,), (3,), 0.0, p) for p in (0.8, 0.3, 0.9, 1.0)]
    gold = dict(enumerate((0.9, 0.2, 0.5, 1.0)))
    found.task = SimpleNamespace(preferred=lambda x, w, l, columns: gold[w])
    found.task.r, found.task.d = np.array([[1.0, 2.0]]), np.array([[0.25, 0.75]])
    scores = {8: [2.0, 0.0, 1.0, 5.0, 1.0, 1.0, 1.0, 3.0], 1: [4.0, 3.0]}
    given = lambda model, rows: torch.tensor(scores[len(rows)])  # noqa: E731
    monkeypatch.setattr(found, "scores", given)
    figures = found.measure(None)
    expected = {"accuracy": 0.625, "accuracy_se": wilson(0.625, 4), "margin": 0.5}
    expected |= {"mean_reward": 14 / 8, "min_reward": 0.0, "max_reward": 5.0, "pairs": 4}
    expected |= {"accuracy_bound": 0.8, "accuracy_bound_se": math.sqrt(0.5) / 4}
    assert figures == pytest.approx(expected | {"rms": math.sqrt(0.75)})


def test_the_error_of_a_share_is_not_0_if_all_are_right():
    assert standard_error([1.0] * 16) == pytest.approx(wilson(1.0, 16)) and wilson(1.0, 16) > 0.02
    assert standard_error([1.0, 0.5, 0.0, 0.0]) == pytest.approx(wilson(0.375, 4))
    assert standard_error([1.0, 2.0, 3.0]) == pytest.approx(1 / math.sqrt(3))


def test_control_characters_do_not_reach_the_terminal():
    assert printable(" a\x1b[2Jb\x00\x07\nnaïve 🎬 ") == "a·[2Jb··\nnaïve 🎬"


# ---- by enumeration


def test_the_table_is_the_model_s_distribution():
    """Outcome by outcome the product of the plain next-token probabilities; all 40 sum to 1."""
    world, policy = data.task("exact"), GPT(GPTConfig(4, 8, 1, 1, 16))
    measured = evaluator(world, context=8)
    table, tokenizer = measured.world.table(policy), measured.run.tokenizer
    assert table.exp().sum(1).tolist() == pytest.approx([1.0] * 4, abs=1e-5)
    for i, x in enumerate(world.contexts):
        for j in (0, 2, 11, 39):
            ids, y = tokenizer.encode(x), tokenizer.answer(world.outcomes[j])
            probs = policy(torch.tensor([ids + y]))[0].softmax(-1)[len(ids) - 1 : -1]
            product = math.prod(p[t].item() for p, t in zip(probs, y))
            assert table[i, j].exp().item() == pytest.approx(product, rel=1e-4)


def test_probabilities_that_do_not_sum_to_one_are_noticed():
    class Leaky(GPT):
        def logprobs(self, *args, **more):
            return super().logprobs(*args, **more) * 1.01

    with pytest.raises(AssertionError, match="sum to"):
        evaluator(data.task("exact"), context=8).world.table(Leaky(GPTConfig(4, 8, 1, 1, 16)))


def test_figures_by_enumeration(monkeypatch):
    """exact:1 with π = (1/2, 1/4, 1/8, 1/8), π_ref = 1/4 each, and r = (0, 1, 1, -1) for "", a, b,
    c at each prompt. E[r] = 1/4; KL = log 4 - H, H = 7/4 log 2; of the 16 (y, y') of equal π_ref:
    "" wins over c, draws with itself: win rate 1/2 (1 + 1/2)/4 + (1/4 + 1/8)(1 + 1 + 1/2 + 1/2)/4 +
    1/8 (1/2)/4 = 0.484375. Length 1: a symbol or the end."""
    world = data.task("exact:1")
    world.r[:] = [0, 1, 1, -1]
    policy, ref = object(), object()
    measured = evaluator(world, context=8, compared_with=ref)
    p = torch.tensor([[0.5, 0.25, 0.125, 0.125]] * 4).double()
    tables = {policy: p.log(), ref: torch.full((4, 4), 0.25).double().log()}
    monkeypatch.setattr(measured.world, "table", tables.get)
    figures = measured.measure(policy)
    kl, h = math.log(4) - 1.75 * math.log(2), 1.75 * math.log(2)
    expected = {"reward": 0.25, "ref_reward": 0.25, "kl": kl, "win_rate": 0.484375, "length": 1}
    expected |= {"ref_length": 1, "ended": 0.5, "entropy": h, "objective": 0.25 - 0.5 * kl}
    z = 1 + 2 * math.exp(2) + math.exp(-2)  # π* = exp(2r)/z
    star = torch.tensor([1, math.exp(2), math.exp(2), math.exp(-2)]).double() / z
    expected["kl_star"] = -h - (p[0] * star.log()).sum().item()
    expected["tv_star"] = (p[0] - star).abs().sum().item() / 2
    assert len(figures.pop("frontier")) == 81
    assert figures == pytest.approx(expected | {"prompts": 4, "outcomes": 4})
    best = math.log(z / 4) * 0.5  # J(π*) = β log Z
    assert best - figures["objective"] == pytest.approx(0.5 * figures["kl_star"])
    text = "\n".join(measured.shown)
    assert f"{expected['kl_star']:.4f}" in text and "-> (empty)" in text
    assert f"{math.log(4):.3f} nats" in text


def test_moments_of_longer_responses_by_a_plain_loop(monkeypatch):
    """Responses of 1 to 3 tokens. Entropy is per token, Σ_x H(π(·|x)) / Σ_x E[|y|], and J the mean
    over prompts of E[r] - β KL(π‖π_ref)."""
    world, policy, ref = data.task("exact"), object(), object()
    measured = evaluator(world, context=8, compared_with=ref)
    draws, tables = torch.Generator().manual_seed(0), {}
    for model in (policy, ref):
        logits = 2 * torch.randn(4, 40, generator=draws, dtype=torch.float64)
        tables[model] = logits.log_softmax(1)
    monkeypatch.setattr(measured.world, "table", tables.get)
    figures = measured.measure(policy)
    p, q = (tables[model].exp().tolist() for model in (policy, ref))
    sums = dict.fromkeys(("reward", "length", "ended", "kl", "win_rate", "H", "ref_reward"), 0.0)
    for x in range(4):
        for y, text in enumerate(world.outcomes):
            tokens = min(len(text) + 1, 3)  # of the longest none is the end
            sums["reward"] += p[x][y] * world.r[x, y] / 4
            sums["ref_reward"] += q[x][y] * world.r[x, y] / 4
            sums["length"] += p[x][y] * tokens / 4
            sums["ended"] += p[x][y] * (len(text) < 3) / 4
            sums["kl"] += p[x][y] * math.log(p[x][y] / q[x][y]) / 4
            sums["H"] -= p[x][y] * math.log(p[x][y]) / 4
            for z in range(40):
                win = (world.r[x, y] > world.r[x, z]) + (world.r[x, y] == world.r[x, z]) / 2
                sums["win_rate"] += p[x][y] * q[x][z] * win / 4
    sums["entropy"] = sums.pop("H") / sums["length"]
    sums["objective"] = sums["reward"] - 0.5 * sums["kl"]
    assert {key: figures[key] for key in sums} == pytest.approx(sums)
    assert 1.5 < sums["length"] < 2.9


def test_of_sft_the_reference_is_the_policy_itself(monkeypatch):
    """J is then E[r], and KL(π‖π*) = log Z - E[r]/β: Z is the mean of exp(r/β) under π."""
    world, policy = data.task("exact"), object()
    measured = evaluator(world, context=8, is_reference=True)
    log_p = torch.randn(4, 40, generator=torch.Generator().manual_seed(0)).double().log_softmax(1)
    monkeypatch.setattr(measured.world, "table", {policy: log_p}.get)
    figures, p, r = measured.measure(policy), log_p.exp(), torch.from_numpy(world.r)
    assert set(figures) >= {"objective", "kl_star", "tv_star"}
    assert figures["objective"] == figures["reward"] == pytest.approx((p * r).sum(1).mean().item())
    log_z = (p * (r / 0.5).exp()).sum(1).log().mean().item()
    assert figures["kl_star"] == pytest.approx(log_z - figures["reward"] / 0.5)


def test_evaluate_prints_the_table(world, call):
    short = "--task exact --steps 60 --batch-size 512 --warmup 5 --device cpu".split()
    call("dpo", *short, "--out", "out/exact/short.pt", cwd=world)
    final = lines(world / "out/exact/short.jsonl")[-1]["final"]
    assert final["kl_star"] < 1 and final["objective"] > final["ref_reward"]
    assert "kl_se" not in final
    text = call("evaluate", "out/exact/short.pt", "--device", "cpu", cwd=world)
    assert f"{final['kl_star']:.4f}" in text and "KL(π_ref‖uniform)" in text
    assert text.count(" -> ") == 5 and text.count("E[r]") == 3


def test_no_policy_lies_above_the_frontier():
    """The record's curve of (KL, E[r]) is π*'s: of 500 policies none lies above a line that touches
    it, and it has the slope β."""
    world, policy = data.task("exact"), GPT(GPTConfig(4, 8, 1, 1, 16))
    measured = evaluator(world, context=8, compared_with=policy)
    curve = torch.tensor(measured.measure(policy)["frontier"], dtype=torch.float64)
    beta = 10 ** (torch.arange(-40, 41) / 20)
    slope = curve.diff(dim=0)[:, 1] / curve.diff(dim=0)[:, 0]
    assert ((slope >= beta[:-1]) & (slope <= beta[1:])).all() and (curve.diff(dim=0) < 0).all()
    log_ref, r = measured.world.table(policy), torch.from_numpy(world.r)
    best = curve[:, 1] - beta * curve[:, 0]  # J of π* at each β
    generator = torch.Generator().manual_seed(0)
    for strength in torch.linspace(0.1, 10, 500):
        noise = torch.randn(r.shape, generator=generator, dtype=torch.float64)
        tilt = r * torch.rand(1, generator=generator) + noise
        log_q = (log_ref + strength * tilt).log_softmax(1)
        kl = (log_q.exp() * (log_q - log_ref)).sum(1).mean()
        reward = (log_q.exp() * r).sum(1).mean()
        assert (reward - beta * kl <= best + 1e-9).all()


def test_a_second_checkpoint_is_the_reference(ends, call):
    """Its answers and its KL are those of --reference; the other way round they are not."""
    how = ["--eval-prompts", 8, "--max-new-tokens", 6, "--device", "cpu"]
    one, other = "ends.pt", "out/reviews/sft.pt"
    said = call("evaluate", one, other, *how, cwd=ends)
    assert said == call("evaluate", one, "--reference", other, *how, cwd=ends)
    assert said != call("evaluate", other, one, *how, cwd=ends)
    answers = call("evaluate", one, other, "--prompt", "A drama:", *how[2:], cwd=ends).splitlines()
    alone = call("evaluate", other, "--prompt", "A drama:", *how[2:], cwd=ends).splitlines()
    assert answers[1].replace("reference", "   policy") in alone

"""The yardstick against figures counted by hand."""

import json
from functools import partial
from types import SimpleNamespace

import pytest
import torch

import data
import dpo
import kto
import sft
import simpo
from evaluate import Evaluator, printable
from gpt import GPT, GPTConfig
from training import Compute

TOKENIZER = data.tokenizer()


def evaluator(task, tokens, **more):
    """On a CPU, in a context of 64, whose responses have so many tokens"""
    o = SimpleNamespace(
        device="cpu", dtype="float32", seed=0, truncate=False, max_new_tokens=tokens
    )
    run = Compute(o)
    run.tokenizer, run.block_size = TOKENIZER, 64
    return Evaluator(run, task, **more)


def model(seed):
    m = GPT(GPTConfig(TOKENIZER.size, 64, 1, 1, 8), seed)
    with torch.no_grad():
        m.wte.weight *= 10
    return m


def test_rewards_and_win_rate_by_hand(monkeypatch):
    """Rewards 3, -3, 1, -3 against 1, 3, 1, -3 (the last two do not end or are empty): one win, one
    loss, two ties: win rate (1 + 0 + ½ + ½) / 4; means -2/4 and 2/4."""
    good, bad, mild = "The plot is superb.", "The plot is dreadful.", "The jokes are never wooden."
    texts = {True: [good, bad, mild, ""], False: [mild, good, mild, good]}
    policy, ref, reward = model(0), model(1), data.task("reviews").reward
    measured = evaluator(data.task("reviews"), 4, reference=ref)

    def respond(m, n, seed, scored_by=None):
        mine = m is policy
        ended = [True, True, True, mine]
        rows = zip(measured.prompts, texts[mine], ended)
        earned = [reward(prompt, text, end) for (_, prompt, _), text, end in rows]
        ratios = [torch.tensor([1.0, 2.0, 3.0, 6.0])]
        found = {"texts": texts[mine], "ended": ended, "tokens": 40 if mine else 80}
        found |= {"earned": {"reward": earned}, "log_ratio": ratios, "entropy": 20.0}
        return SimpleNamespace(**found)

    monkeypatch.setattr(measured, "_respond", respond)
    figures = measured.measure(policy)
    assert figures["reward"] == pytest.approx(-2 / 4)
    assert figures["ref_reward"] == pytest.approx(2 / 4)
    assert figures["win_rate"] == 0.5
    assert figures["kl"] == pytest.approx(3.0)
    assert figures["kl_se"] == pytest.approx((14 / 3) ** 0.5 / 2)  # deviations -2 -1 0 3; √4
    assert figures["length"] == 10 and figures["ref_length"] == 20
    assert figures["entropy"] == 0.5 and figures["ended"] == 1.0
    assert measured.shown[0][1:] == (texts[False][0], texts[True][0])


def test_kl_is_that_of_the_samples():
    """Against itself a policy is at KL 0 to the bit; against another its mean is positive by more
    than noise."""
    policy = model(0)
    measured = evaluator(data.task("reviews"), 6, reference=policy)
    figures = measured.measure(policy, 256)
    assert figures["kl"] == 0.0 and figures["kl_se"] == 0.0
    assert measured.measure(policy, 256) == figures  # a fixed seed
    figures = evaluator(data.task("reviews"), 6, reference=model(1)).measure(policy, 256)
    assert figures["kl"] > 5 * figures["kl_se"] > 0


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


LOSSES = {
    "sum": (dpo, {"loss": "dpo", "beta": 0.1, "label_smoothing": 0.0, "sft_weight": 0.0}),
    "mean": (dpo, {"loss": "ipo", "beta": 0.1, "ipo_sum": False, "sft_weight": 0.0}),
    "logp mean": (simpo, {"beta": 2.0, "gamma_beta_ratio": 0.5, "sft_weight": 0.0}),
}


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
    held_out = task.preferences, partial(script.compute_loss, o=SimpleNamespace(**options))
    figures = evaluator(task, 4, reference=ref, held_out=held_out).measure(policy)
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
    o = SimpleNamespace(beta=0.1, w_desirable=1.0, w_undesirable=1.0)
    held_out = task.feedback, partial(kto.compute_loss, o=o)
    figures = evaluator(task, 4, reference=ref, held_out=held_out).measure(policy)
    assert figures["accuracy"] == pytest.approx(expected)
    assert 0 < expected < 1 and expected != 0.5


def test_held_out_loss_counts_every_row(tmp_path):
    """Rows that stand twice in the file count twice: nats a token, by the plain formula."""
    rows = data.task("reviews").demonstrations(6, 0)
    rows = [dict(zip(("prompt", "completion"), row)) for row in rows]
    task = written(tmp_path, train=rows[:3], test=[*rows, *rows[:2], rows[0]])
    policy, nats, tokens = model(0), 0.0, 0
    for x, y in task.demonstrations(None, 0, split="test"):
        n = len(TOKENIZER.answer(y))
        nats -= n * plain(x, y, "logp mean", policy, None)
        tokens += n
    held_out = task.demonstrations, partial(sft.compute_loss, o=None)
    found = evaluator(task, 4, held_out=held_out).measure(policy)["nll"]
    assert found == pytest.approx(nats / tokens)


def test_control_characters_do_not_reach_the_terminal():
    assert printable(" a\x1b[2Jb\x00\x07\nnaïve 🎬 ") == "a·[2Jb··\nnaïve 🎬"

"""The yardstick against figures counted by hand."""
import argparse
import json

import pytest
import torch

import common
import data
from evaluate import Yardstick, printable
from gpt import GPT, GPTConfig

CPU = common.Compute(argparse.Namespace(device="cpu", dtype="float32"))
TOKENIZER = data.tokenizer()


def model(seed):
    m = GPT(GPTConfig(TOKENIZER.size, 64, 1, 1, 8), seed)
    with torch.no_grad():
        m.wte.weight *= 10
    return m


def test_rewards_and_win_rate_by_hand(monkeypatch):
    """Rewards 3, -3, 1, -3 against 1, 3, 1, -3 (the last two do not end or are empty): one win, one loss, two ties:
    win rate (1 + 0 + ½ + ½) / 4; means -2/4 and 2/4."""
    texts = {
        True: ["The plot is superb.", "The plot is dreadful.", "The jokes are never wooden.", ""],
        False: ["The jokes are never wooden.", "The plot is superb.", "The jokes are never wooden.", "The plot is superb."],
    }
    policy, ref, reward = model(0), model(1), data.task("reviews").reward
    yardstick = Yardstick(CPU, data.task("reviews"), TOKENIZER, 64, 4)

    def respond(m, n, seed, score=None):
        if score:
            score.kl.append(torch.tensor([1.0, 2.0, 3.0, 6.0]))
            score.entropy = 20.0
        ended = [True, True, True, m is policy]
        earned = [reward(prompt, text, end) for (_, prompt, _), text, end in zip(yardstick.prompts, texts[m is policy], ended)]
        return texts[m is policy], ended, 40 if m is policy else 80, {"reward": earned}

    monkeypatch.setattr(yardstick, "_respond", respond)
    figures, samples = yardstick.measure(policy, ref)
    assert figures["reward"] == pytest.approx(-2 / 4) and figures["ref_reward"] == pytest.approx(2 / 4)
    assert figures["win_rate"] == 0.5
    assert figures["kl"] == pytest.approx(3.0)  # its standard error: deviations -2 -1 0 3, √(14/3) / √4
    assert figures["kl_se"] == pytest.approx((14 / 3) ** 0.5 / 2)
    assert figures["length"] == 10 and figures["ref_length"] == 20 and figures["entropy"] == 0.5 and figures["ended"] == 1.0
    assert samples[0][1:] == (texts[False][0], texts[True][0])


def test_kl_is_that_of_the_samples():
    """Against itself a policy is at KL 0 to the bit; against another its mean is positive by more than noise."""
    yardstick = Yardstick(CPU, data.task("reviews"), TOKENIZER, 64, 6)
    policy = model(0)
    figures, _ = yardstick.measure(policy, policy, n=256)
    assert figures["kl"] == 0.0 and figures["kl_se"] == 0.0
    assert yardstick.measure(policy, policy, n=256)[0] == figures  # a fixed seed
    figures, _ = yardstick.measure(policy, model(1), n=256)
    assert figures["kl"] > 5 * figures["kl_se"] > 0


def plain(x, y, implicit, policy, ref):
    """The implicit reward of one row, by the plain formula."""
    ids = torch.tensor([[*TOKENIZER.encode(x), *TOKENIZER.encode(y), TOKENIZER.end_id]])
    n, terms = len(TOKENIZER.encode(y)) + 1, ((1, policy),) if implicit == "logp mean" else ((1, policy), (-1, ref))
    total = sum(s * m(ids)[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[-n:].sum().item() for s, m in terms)
    return total if implicit == "sum" else total / n


@pytest.mark.parametrize("implicit", ["sum", "mean", "logp mean"])
def test_held_out_accuracy_is_that_of_the_implicit_reward(implicit, tmp_path):
    """The share of held-out pairs whose chosen log-ratio, summed or averaged, is higher, row by row with the plain formula."""
    for name in ("train", "test"):
        rows = data.task("reviews").preferences(30, 0, split=name)
        rows[10:20] = [(x, w, rows[29][2]) for x, w, _ in rows[:10]]  # the same chosen answers once more: rows that stand twice
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps(dict(zip(("prompt", "chosen", "rejected"), row))) for row in rows))
    task = data.task(str(tmp_path / "train.jsonl"), str(tmp_path / "test.jsonl"))
    policy, ref = model(0), model(1)

    def score(x, y):
        return plain(x, y, implicit, policy, ref)

    expected = sum(score(x, w) > score(x, l) for x, w, l in task.preferences(None, 0, split="test")) / 30
    figures, _ = Yardstick(CPU, task, TOKENIZER, 64, 4, implicit=implicit).measure(policy, ref)
    assert figures["accuracy"] == pytest.approx(expected) and 0 < expected < 1
    alone = Yardstick(CPU, task, TOKENIZER, 64, 4, implicit=implicit).measure(policy)[0]
    assert ("accuracy" in alone) == (implicit == "logp mean")  # which needs no reference


def test_held_out_accuracy_of_unpaired_rows(tmp_path):
    """The share of (desirable, undesirable) couples with the higher log-ratio on the desirable one."""
    rows = [dict(zip(("prompt", "completion", "label"), row)) for row in data.task("reviews").feedback(24, 0)]
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task, policy, ref = data.task(str(tmp_path / "train.jsonl"), str(tmp_path / "test.jsonl")), model(0), model(1)
    good, bad = ([plain(r["prompt"], r["completion"], "sum", policy, ref) for r in rows if r["label"] is side] for side in (True, False))
    expected = sum(a > b for a in good for b in bad) / (len(good) * len(bad))
    figures, _ = Yardstick(CPU, task, TOKENIZER, 64, 4, implicit="sum").measure(policy, ref)
    assert figures["accuracy"] == pytest.approx(expected) and 0 < expected < 1 and expected != 0.5


def test_held_out_loss_counts_every_row(tmp_path):
    """Rows that stand twice in the file count twice: nats a token, by the plain formula."""
    rows = [dict(zip(("prompt", "completion"), row)) for row in data.task("reviews").demonstrations(6, 0)]
    for name, some in (("train", rows[:3]), ("test", [*rows, *rows[:2], rows[0]])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, some)))
    task, policy, nats, tokens = data.task(str(tmp_path / "train.jsonl"), str(tmp_path / "test.jsonl")), model(0), 0.0, 0
    for x, y in task.demonstrations(None, 0, split="test"):
        y = [*TOKENIZER.encode(y), TOKENIZER.end_id]
        ids = torch.tensor([[*TOKENIZER.encode(x), *y]])
        nats -= policy(ids)[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[-len(y) :].sum().item()
        tokens += len(y)
    assert Yardstick(CPU, task, TOKENIZER, 64, 4).measure(policy)[0]["nll"] == pytest.approx(nats / tokens)


def test_control_characters_do_not_reach_the_terminal():
    assert printable(" a\x1b[2Jb\x00\x07\nnaïve 🎬 ") == "a·[2Jb··\nnaïve 🎬"

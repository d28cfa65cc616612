"""The judges in training/reward.py: the task, users' functions, and learned rewards of any
vocabulary; also what a response that does not end loses."""

import json
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import ENDS, TINY, documented, lines, main

import data
import grpo
import online_dpo
import ppo
from data.make_vocab import main as make_vocab
from gpt import GPTConfig, ScalarGPT, load, save
from training import Rollout, Run, checkpoint, parse
from training.function import UserReward
from training.reward import load_judge

WORDS = data.tokenizer()
RM = [*ENDS, "--reward", "judge.pt"]
PROMPT = "A drama, The Last Road:"


@pytest.fixture
def judge(tmp_path, monkeypatch):
    """judge(how, task): what --reward means for a policy of the standard vocabulary"""
    monkeypatch.chdir(tmp_path)

    def judge(how, task="reviews"):
        run = Run("grpo", parse(grpo.Options, ["--device", "cpu"]))
        run.tokenizer = WORDS
        return load_judge(how, run, data.task(task))

    return judge


def question(prompt, **columns):
    return WORDS.encode(prompt), prompt, columns


def rollout(*rows):
    """(prompt, completion, ended) each -> their Rollout"""
    encoded = [WORDS.answer(y) if ended else WORDS.encode(y) for _, y, ended in rows]
    texts = [(tuple(WORDS.encode(x)), tuple(y)) for (x, *_), y in zip(rows, encoded)]
    batch = data.pad(texts)
    assert len(batch.ids) == len(rows)
    finished = torch.tensor([ended for *_, ended in rows])
    return Rollout(ids=batch.ids, mask=batch.mask, finished=finished)


def test_each_response_is_judged_with_its_own_prompt(judge, tmp_path):
    """Prompts 12+34= and 50+50=, two responses each: 46 and 100; 100 without an end, and 100."""
    (tmp_path / "r.py").write_text("def f(prompt, completion): return len(completion) - 2")
    rows = [question("12+34=", answer="46"), question("50+50=", answer="100")]
    s = rollout(
        ("12+34=", "46", True),
        ("12+34=", "100", True),
        ("50+50=", "100", False),
        ("50+50=", "100", True),
    )
    task = judge("task", "arithmetic:2")
    assert task(rows, s).tolist() == [1.0, 0.0, 0.0, 1.0] and task.bound == 1
    assert task.correct(rows, s).tolist() == [True, False, False, True]
    user = judge("r.py:f", "arithmetic:2")
    assert user(rows, s).tolist() == [0.0, 1.0, 1.0, 1.0] and user.model is None
    assert user.correct(rows, s).tolist() == [False, True, True, True]
    user(rows[:1], s[:1])  # the largest reward of all rollouts is kept, not that of the last
    assert user.run.largest_reward == 1.0


# ---- a user's function


NAMED = """
def named(prompt, completion, answer, weight=1): return weight * (completion == answer)
def every(prompt, completion, **more): return sorted(more) == ["answer", "ended", "reference"]
def ended(prompt, completion, ended): return ended
def rest(prompt, completion, *more): return 1
"""


def reward(name, columns):
    """-> the user's function, on rows of these columns"""
    task = SimpleNamespace(columns=lambda: list(columns), lacks=lambda column: "")
    return UserReward(name, task)


def test_a_user_s_function_gets_the_columns_it_names(tmp_path, capsys):
    (tmp_path / "r.py").write_text(NAMED)
    columns = {"answer": "4", "reference": "it is 4"}
    names = ("named", "every", "ended", "rest")
    named, every, ended, rest = (reward(f"{tmp_path}/r.py:{name}", columns) for name in names)
    assert named("p", "4", True, **columns) == 1.0 and named("p", "5", True, **columns) == 0.0
    said = "named takes 'weight', which is no column of the rows: it is always 1\n"
    assert capsys.readouterr().out == f"--reward {tmp_path}/r.py:{said}"
    assert named("p", "4", weight=3, **columns) == 3.0
    reward(f"{tmp_path}/r.py:named", columns | {"weight": 3})
    assert not capsys.readouterr().out
    assert every("p", "4", True, **columns) == 1.0 == rest("p", "c", True, **columns)
    assert (ended("p", "4", True), ended("p", "4", False)) == (1.0, 0.0)


MEDDLER = """
import os, random
import numpy as np
import torch
import helper

os.chdir("there")
torch.set_grad_enabled(False)

def plain(completion, keys):
    return len(completion) % 3 + helper.NUMBER

def meddles(completion, keys):
    os.chdir("..")
    os.chdir("there")
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    torch.set_grad_enabled(False)
    keys.pop()
    return plain(completion, keys)
"""


def test_what_a_function_draws_changes_and_leaves_changes_nothing_in_the_run(ends, tmp_path, call):
    """It sets every seed, empties its column, and goes elsewhere, where its next call finds itself:
    the record is that of a function that does nothing of it. It imports what lies beside it."""
    rows = [json.dumps({"prompt": f"What is {i}?", "keys": ["a"]}) + "\n" for i in range(60)]
    (tmp_path / "q.jsonl").write_text("".join(rows))
    (tmp_path / "r.py").write_text(MEDDLER)
    (tmp_path / "helper.py").write_text("NUMBER = 1")
    (tmp_path / "there").mkdir()
    shutil.copy(ends / "ends.pt", tmp_path)
    shutil.copy(ends / "out/reviews/sft.pt", tmp_path / "ref.pt")
    args = ["--task", "q.jsonl", "--init", "ends.pt", "--reference", "ref.pt", *TINY, "--group", 4]
    for name in ("plain", "meddles"):
        call("grpo", *args, "--reward", f"r.py:{name}", "--out", f"{name}.pt", cwd=tmp_path)
    (*plain, a), (*meddled, b) = (
        lines(tmp_path / f"{name}.jsonl")[1:] for name in ("plain", "meddles")
    )
    assert plain == meddled and len(plain) == 3
    assert [a["final"][key] for key in ("kl", "reward")] == [
        b["final"][x] for x in ("kl", "reward")
    ]


def test_rewards_are_float64_until_the_group_s_mean_is_off(judge, tmp_path):
    (tmp_path / "r.py").write_text("def f(completion): return 1e9 + len(completion)")
    rows = [question("12+34=", answer="46")]
    s = rollout(("12+34=", "46", True), ("12+34=", "1000", True))
    rewards = judge("r.py:f", "arithmetic:2")(rows, s).view(1, 2)
    assert rewards.diff().item() == 2
    assert grpo.group_advantages(rewards, norm="none").tolist() == [[-1.0, 1.0]]


def test_a_reward_that_is_too_large_is_named(ends, monkeypatch, capsys):
    """PPO squares what its critic is wrong by, which 1e25 takes beyond float32."""
    monkeypatch.chdir(ends)
    (ends / "large.py").write_text("def f(completion): return 1e25 * len(completion)")
    assert main("ppo", *ENDS, *TINY, "--reward", "large.py:f", "--out", "large/x.pt") == 1
    said = capsys.readouterr().err
    assert "a reward is as large as" in said and "--lr" not in said


CHECK = """
def check(prompt, completion, reference, size):
    assert reference == prompt.replace("What", "It").replace("?", ".")
    return size if len(completion) % 2 else 0.0
"""


def test_a_reward_on_a_file_is_its_mean_on_the_test_prompts(ends, tmp_path, call):
    """The columns reach the function by name, `completion` as `reference`; the record's `reward` is
    its mean on the test prompts, and evaluate.py finds the function again."""
    rows = [(f"What is {i}?", f"It is {i}.") for i in range(60)]
    rows = [{"prompt": x, "completion": y, "size": 2.0} for x, y in rows]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "r.py").write_text(CHECK)
    args = ["--task", "q.jsonl", "--init", ends / "ends.pt", *TINY, "--group", 4]
    said = call("grpo", *args, "--reward", "r.py:check", cwd=tmp_path)
    final = lines(tmp_path / "out/q/grpo.jsonl")[-1]["final"]
    assert (final["reward"] * final["prompts"] / 2) % 1 == pytest.approx(0)
    assert 0 <= final["ref_reward"] <= 2
    assert "reward  " in said and "gold" not in said.split("test prompts")[1]
    ask = ["evaluate", "out/q/grpo.pt", "--device", "cpu"]
    both = f"{final['ref_reward']:.2f} +{final['reward']:.2f}"
    assert re.search(rf"^reward +{both} ± ", call(*ask, cwd=tmp_path), re.M)
    (tmp_path / "r.py").unlink()
    assert "r.py is no file" in call(*ask, cwd=tmp_path)


LATE = """
calls = []
def late(prompt, completion):
    calls.append(1)
    return 1.0 if len(calls) < 30 else 1 / 0
"""


def test_a_function_that_fails_later_names_the_prompt(ends, monkeypatch, capsys):
    """It works on what is tried before the training, and raises later: one line with the prompt,
    the completion and the function's line, exit code 2."""
    monkeypatch.chdir(ends)
    (ends / "late.py").write_text(LATE)
    args = [*ENDS, *TINY, "--group", 4, "--reward", "late.py:late", "--out", "late/x.pt"]
    assert main("grpo", *args) == 2
    out, said = capsys.readouterr()
    (said,) = said.strip().splitlines()
    words = "raised ZeroDivisionError (division by zero, line 5) at the prompt 'A "
    assert words in said and "and the completion '" in said
    assert "late.py:late" in said and "step 1 is saved" in out
    assert torch.load("late/x.state", weights_only=True)["step"] == 1


# ---- a learned reward


@pytest.mark.machine
def test_a_missing_reward_model_is_made_first(ends, tmp_path, monkeypatch, judge):
    """--reward rm runs reward_model.py of the same task, and the ledger holds it."""
    shutil.copytree(ends / "out", tmp_path / "out")
    calls = []

    def run_path(path, run_name):
        calls.append((path, *checkpoint.sys.argv[1:]))
        short = "--steps 2 --batch-size 4 --device cpu --warmup 1".split()
        assert main("reward_model", *short) == 0

    monkeypatch.setattr(checkpoint.runpy, "run_path", run_path)
    assert main("grpo", *TINY, "--group", 4, "--reward", "rm") == 0
    command = f"{checkpoint.Path(grpo.__file__).with_name('reward_model.py')} --task reviews"
    assert [" ".join(x) for x in calls] == [f"{command} --device cpu --dtype auto"]
    final = lines(tmp_path / "out/reviews/grpo.jsonl")[-1]["final"]
    held = {model["role"]: model["trainable"] for model in final["models"]}
    assert held == {"policy": True, "reward": False, "ref": False}
    s = rollout((PROMPT, " Skip it.", True))
    values = load("out/reviews/reward_model.pt")[0].values(s.ids)
    found = judge("rm")([question(PROMPT)], s)
    assert found.item() == pytest.approx(values[0, -1].item(), abs=1e-5)  # at the end token


ANSWERS = (" The plot is fine.", True), (" Skip it", False)


@pytest.fixture
def elsewhere(ends, judge, tmp_path):
    """elsewhere.pt, a reward model of 64 tokens of context and a vocabulary of 260, where the
    policy's is 748. -> (the model, its tokenizer)"""
    shutil.copy(ends / "ends.pt", tmp_path)
    row = {"prompt": "A drama", "completion": "The plot is fine."}
    (tmp_path / "text.jsonl").write_text(f"{json.dumps(row)}\n" * 20)
    make_vocab(["text.jsonl", "--size", "260", "--out", "own.tiktoken"])
    own = data.tokenizer("own.tiktoken")
    model = ScalarGPT(GPTConfig(own.size, 64, 1, 1, 8), seed=5)
    with torch.no_grad():
        model.head.weight *= 100
    facts = dict(method="reward_model", task="text.jsonl", steps=1, reward=None)
    save(model, "elsewhere.pt", **facts, tokenizer=own.meta)
    return model, own


def test_a_judge_reads_text_with_its_own_vocabulary(elsewhere, judge):
    """The score is that of the text in the judge's own tokens, with an end token where the response
    ended; of what is too long it reads the end."""
    model, own = elsewhere
    found = judge("elsewhere.pt")
    assert not found.reads_tokens

    def score(x, y, ended):
        ids = (own.encode(x) + (own.answer(y) if ended else own.encode(y)))[-64:]
        return model.values(torch.tensor([ids]))[0, -1].item()

    rows = [(PROMPT, *answer) for answer in ANSWERS]
    expected = [score(*row) for row in rows]
    assert found([question(PROMPT)], rollout(*rows)).tolist() == pytest.approx(expected, rel=1e-5)
    long = ("A drama, " * 30 + "The Last Road:", *ANSWERS[0])
    scored = found([question(long[0])], rollout(long)).item()
    assert len(own.encode(long[0])) > 64 and scored == pytest.approx(score(*long), rel=1e-5)


def test_a_judge_of_the_same_vocabulary_and_a_shorter_context_reads_the_end(ends, judge, tmp_path):
    short = ScalarGPT(GPTConfig(WORDS.size, 32, 1, 1, 8))
    save(short, "short.pt", **load(ends / "judge.pt")[1])
    long = "A drama, " * 30 + "The Last Road:"
    ids = (WORDS.encode(long) + WORDS.answer(" Skip it."))[-32:]
    expected = short.values(torch.tensor([ids]))[0, -1].item()
    found = judge("short.pt")([question(long)], rollout((long, " Skip it.", True)))
    assert found.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("script", ["grpo", "dapo", "ppo", "online_dpo"])
def test_every_script_takes_a_judge_of_another_vocabulary(script, elsewhere, tmp_path, call):
    """PPO's critic starts from the policy then; evaluate.py finds the judge again."""
    args = [*ENDS, *TINY, "--reward", "elsewhere.pt"]
    args += [] if script == "online_dpo" else ["--group", 4]
    said = call(script, *args, "--steps", 1, cwd=tmp_path)
    assert said.count("elsewhere.pt judges the responses") == 1
    final = lines(tmp_path / f"out/reviews/{script}.jsonl")[-1]["final"]
    held = {model["role"]: model["parameters"] for model in final["models"]}
    assert held["reward"] < held["policy"] and held.get("critic", held["policy"]) >= held["policy"]
    for more in ([], ["--reward", "elsewhere.pt"]):
        again = call("evaluate", f"out/reviews/{script}.pt", "--device", "cpu", *more, cwd=tmp_path)
        both = f"{final['ref_score']:.2f} +{final['score']:.2f}"
        assert re.search(rf"^score of the reward model +{both}", again, re.M)


@pytest.mark.parametrize(
    "module, name, n", [(ppo, "token_rewards", 32), (online_dpo, "choose", 16)]
)
def test_a_response_that_does_not_end_loses_the_penalty(module, name, n, ends, monkeypatch):
    """A learned reward's score less --missing-eos-penalty: in PPO's rewards, and where online DPO
    chooses; the evaluations' score is the reward model's own."""
    monkeypatch.chdir(ends)
    rm, use, draw = load("judge.pt")[0], getattr(module, name), Run.sample
    used, drawn, scores = [], [], []

    def keep(x, *more):
        used.append(x.flatten())
        return use(x, *more)

    def watch(self, *args, generator=None):
        rollout = draw(self, *args, generator=generator)
        drawn.extend([] if generator else [rollout])
        return rollout

    monkeypatch.setattr(module, name, keep)
    monkeypatch.setattr(Run, "sample", watch)
    for penalty in (0, 5):
        args = [*RM, "--missing-eos-penalty", penalty, "--steps", 1, "--batch-size", n]
        assert main(module.__name__, *args, "--log-every", 1, "--out", "end/x.pt") == 0
        record, x, s = lines(ends / "end/x.jsonl"), used[-1], drawn[-1]
        assert 0 < s.finished.sum() < len(s) == 32
        torch.testing.assert_close(x, rm.score(s.ids, s.mask) - penalty * ~s.finished)
        assert record[1]["reward"] == pytest.approx(x.mean().item())
        scores.append(record[-1]["final"]["ref_score"])
    assert scores[0] == scores[1]


def test_score_and_gold_reward_stand_side_by_side(ends, monkeypatch):
    monkeypatch.chdir(ends)
    args = "--batch-size 32 --steps 4 --eval-every 2 --out gold/x.pt".split()
    assert main("ppo", *TINY, *RM, *args) == 0
    record = lines(ends / "gold/x.jsonl")
    final = record[-1]["final"]
    figures = [line["eval"] for line in record if "eval" in line] + [final]
    keys = {"score", "ref_score", "reward", "ref_reward", "kl"}
    assert len(figures) == 3 and all(keys <= set(found) for found in figures)
    for line in (line for line in record if "kl" in line):
        expected = line["reward"] - 0.05 * line["kl"]
        assert line["rlhf_reward"] == pytest.approx(expected, abs=1e-5)
    assert [model["role"] for model in final["models"]] == ["policy", "critic", "ref", "reward"]
    policy, critic = (load(name)[0].matmul_parameters() for name in ("ends.pt", "judge.pt"))
    # sampling, old log-probs, the reference's; old values, the score; two passes
    expected = (2 + 2 + 2 + 2 * 6) * policy + (2 + 2 + 2 * 6) * critic
    assert final["flops_per_token"] == expected
    documented(record[1:-1], final)

"""The speed measurements of analysis/bench.py: the work that the floor counts, the figures that a
measurement gives, and the text of the tables."""

import json
import shutil

import pytest
import torch
from conftest import main

import data
from analysis import bench
from gpt import GPTConfig

pytestmark = pytest.mark.machine


@pytest.fixture
def job(tiny, tmp_path, monkeypatch):
    """A measurement of dpo.py on short rows, in a folder of its own"""
    shutil.copy(tiny / "out/reviews/sft.pt", tmp_path / "256.pt")
    monkeypatch.chdir(tmp_path)
    o = bench.parse(bench.Options, ["--methods", "dpo", "--steps", "3", "--only", "steps"])
    found = bench.jobs(o)["steps", "dpo", False]
    command = [x.replace("32+96", "6+10") for x in found["command"]]
    return found | {"command": command, "prompt": 6, "response": 10}


def test_a_floor_by_hand(job):
    """DPO: three passes of the policy and one of the reference, 16 rows of 16 tokens; 2 layers of
    12 C², the head, and attention's 4 L T C."""
    V, C, L, T = 100, 8, 2, 16
    forward = 2 * (L * 12 * C**2 + V * C) + 4 * L * T * C
    found = bench.floor(job | {"config": [V, 64, L, 2, C]}, 1e9)
    assert found == pytest.approx(1000 * 4 * 16 * T * forward / 1e9)
    scalar = bench.floor(job | {"config": [V, 64, L, 2, C], "name": "reward_model"}, 1e9)
    reward = 2 * (L * 12 * C**2 + C) + 4 * L * T * C
    assert scalar == pytest.approx(1000 * 3 * 16 * T * reward / 1e9)


def test_a_measurement_is_the_script_s_own_record(job):
    found = bench.measure(job)
    assert 0 < found["ms"] < 5000 and 1e6 < found["bytes"] < 1e9
    assert bench.measure({"what": "rate"})["rate"] > 1e9


def test_responses_end_after_24_tokens_on_average():
    job = {"prompts": 256, "group": 1, "prompt": 3, "response": 96, "ends": True}
    config = GPTConfig(data.tokenizer().size, 128, 4, 4, 128)
    torch.manual_seed(0)
    assert 20 < bench.generator(config, job)() / 256 < 28
    assert bench.generator(config, job | {"ends": False, "prompts": 8})() == 8 * 96


def test_the_tables(job):
    o = bench.parse(bench.Options, [])
    o.peers = True
    ours = [{"ms": x, "bytes": 2e6, "tokens": 10 * x} for x in (10.0, 30.0, 20.0)]
    theirs = [{"ms": x, "bytes": 4e6, "tokens": 5 * x} for x in (30.0, 60.0, 50.0)]
    todo, found = {}, {"rate": [{"rate": 1e9}]}
    for key in (("steps", "dpo"), ("sampling", "1 row")):
        todo[(*key, False)] = job
        found |= {(*key, False): ours, (*key, True): theirs}
    text = "\n".join(bench.report(o, todo, found))
    least = bench.floor(job, 1e9)
    assert f"| dpo | 20 |  | {least:.0f} | {least / 20:.2f} | 2 | 50 | 2.50 | 4 |" in text
    assert "| 1 row | 200 | 250 | 0.80 |" in text and "1 GFLOP/s" in text
    assert "Long prompts" not in text


def test_wrong_options_are_told(capsys):
    for argv, words in (
        (["--methods", "rlaif"], "no such row"),
        (["--n-embd", "30"], "multiple"),
        (["--vocab-size", "256"], "at least 257"),
    ):
        assert main("analysis.bench", *argv) == 2
        assert words in capsys.readouterr().err


def test_a_vocabulary_of_any_size(tmp_path):
    """Its texts have the tokens of bytes alone, so that a task of tokens keeps its lengths."""
    name = bench.write_vocabulary(tmp_path, 70_000)
    tokenizer = data.tokenizer(str(tmp_path / name))
    assert tokenizer.size == 70_000 and tokenizer.encode("a é") == list("a é".encode())
    o = bench.parse(bench.Options, ["--vocab-size", "70000"])
    assert o.config(64)[0] == 70_000 and bench.parse(bench.Options, []).config(64)[0] < 1000


def test_a_head_alone(monkeypatch):
    found = bench.head(64, 40_000, 4)
    table = 64 * 40_000 * 4
    assert table < found["bytes"] < 1.6 * table < found["plain bytes"]
    assert found["ms"] > 0 < found["plain ms"]


def test_ragged_rows_have_the_lengths_that_are_said(tmp_path):
    bench.write_ragged(tmp_path)
    rows = [json.loads(x) for x in (tmp_path / "ragged.jsonl").read_text().splitlines()]
    encode = data.tokenizer().encode
    assert {len(encode(row["prompt"])) for row in rows} == {16}
    lengths = [len(encode(row[name])) for row in rows for name in ("chosen", "rejected")]
    assert min(lengths) >= 39 and 250 < max(lengths) <= 319


@pytest.mark.parametrize("only, rows", [("ragged", 1), ("rollout", 2), ("head", 3), ("decode", 6)])
def test_the_other_tables_have_jobs(only, rows):
    o = bench.parse(bench.Options, ["--only", only])
    assert len(bench.jobs(o)) == rows


@pytest.mark.slow
def test_the_whole_of_it(capsys):
    argv = ["--repeats", 1, "--steps", 3, "--methods", "sft", "dpo"]
    assert not main("analysis.bench", *argv)
    said = capsys.readouterr().out
    assert said.count("\n| ") > 10 and "| dpo 256+128 |" in said and "| 64 rows with ends |" in said

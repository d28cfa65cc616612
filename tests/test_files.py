"""Files of public data sets: data.gsm8k, and the recipes of docs/real-models.md."""

import gzip
import json
import re
import sys
from types import ModuleType

import pytest
from conftest import ROOT

import data
from data import gsm8k

PAGE = (ROOT / "docs/real-models.md").read_text()


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def published(tmp_path, monkeypatch):
    """A folder with 20 rows of the shapes of GSM8K's two files; the i-th question has i % 5 right
    solutions, the first ones."""
    monkeypatch.chdir(tmp_path)
    train = [
        {"question": f"How many are {i}?", "answer": f"They are {i}.\n#### {i}"} for i in range(20)
    ]
    solved = []
    for i in range(20):
        row = {"question": f"What is {i}?", "ground_truth": f"A: {i}"}
        for j, name in enumerate(gsm8k.WRITERS):
            row[name] = {"solution": f"{i} by {name}", "is_correct": j < i % 5}
        solved.append(row)
    write(tmp_path / "train.jsonl", train)
    write(tmp_path / "solved.jsonl", solved)
    return tmp_path


def rows(path):
    return [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]


def test_gsm8k_becomes_three_files(published, capsys):
    """Of four solutions 1 or 3 right ones make one pair, 2 make two, 0 and 4 none: 16 of 20."""
    gsm8k.main(["train.jsonl", "solved.jsonl", "--to", "made"])
    said = capsys.readouterr().out
    assert [re.findall(r"\d+ rows", x)[0] for x in said.splitlines()] == [
        "20 rows",
        "16 rows",
        "80 rows",
    ]
    sft, pairs, labelled = (
        rows(published / f"made/gsm8k_{x}.jsonl.gz") for x in ("sft", "preferences", "feedback")
    )
    assert sft[3] == {"prompt": "How many are 3?", "completion": "They are 3.\n#### 3"}
    said = [(x["chosen"][0]["content"], x["rejected"][0]["content"]) for x in pairs[1:3]]
    assert said == [
        ("2 by 6b_finetuning", "2 by 175b_finetuning"),
        ("2 by 6b_verification", "2 by 175b_verification"),
    ]
    assert pairs[0]["prompt"] == [{"role": "user", "content": "What is 1?"}]
    assert sum(x["label"] for x in labelled) == 4 * (0 + 1 + 2 + 3 + 4) and len(labelled) == 80
    for name, draw in (
        ("sft", "demonstrations"),
        ("preferences", "preferences"),
        ("feedback", "feedback"),
    ):
        task = data.task(f"made/gsm8k_{name}.jsonl.gz")
        assert getattr(task, draw)(None, 0)
    assert all(x.read_bytes()[4:8] == bytes(4) for x in (published / "made").iterdir())  # no clock
    before = {x.name: x.read_bytes() for x in (published / "made").iterdir()}
    gsm8k.main(["solved.jsonl", "train.jsonl", "--to", "again"])
    assert before == {x.name: x.read_bytes() for x in (published / "again").iterdir()}


def test_train_alone_makes_the_first_of_them(published, monkeypatch):
    monkeypatch.setattr(gsm8k, "SFT", 7)
    gsm8k.main(["train.jsonl"])
    assert [x.name for x in published.glob("*.gz")] == ["gsm8k_sft.jsonl.gz"]
    assert len(rows(published / "gsm8k_sft.jsonl.gz")) == 7


@pytest.mark.parametrize(
    "row, words",
    [({"question": "a"}, "other.jsonl:1 is no row of GSM8K"), (None, "exists already")],
)
def test_what_is_no_gsm8k_is_refused(row, words, published, capsys):
    path = write(published / "other.jsonl", [row]) if row else "train.jsonl"
    if not row:
        gsm8k.main([path])
    with pytest.raises(SystemExit) as e:
        gsm8k.main([path])
    assert e.value.code == 2 and words in capsys.readouterr().err.splitlines()[-1]


CHAT = [{"role": "user", "content": "{i}?"}, {"role": "assistant", "content": "{i}"}]
OTHER = [CHAT[0], {"role": "assistant", "content": "no {i}"}]
PUBLISHED = {  # a data set -> a row of its shape, {i} its number, and what a reader makes of it
    "HuggingFaceH4/ultrafeedback_binarized": {
        "prompt": "{i}?",
        "chosen": CHAT,
        "rejected": OTHER,
        "messages": CHAT,
        "score_chosen": 8.0,
        "score_rejected": 3.0,
    },
    "Anthropic/hh-rlhf": {
        "chosen": "\n\nHuman: {i}?\n\nAssistant: {i}",
        "rejected": "\n\nHuman: {i}?\n\nAssistant: no {i}",
    },
    "trl-lib/tldr-preference": {
        "prompt": "{i}?\n\nTL;DR:",
        "chosen": " {i}",
        "rejected": " no {i}",
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_writes_a_file_of_pairs(name, tmp_path, monkeypatch):
    """The page's lines, run with a stand-in for `datasets` that has 20 rows of the set's shape."""
    monkeypatch.chdir(tmp_path)

    class Rows(list):
        column_names = list(PUBLISHED[name])

        def select_columns(self, columns):
            return Rows({key: row[key] for key in columns} for row in self)

        def to_json(self, path):
            write(tmp_path / path, self)

    def load_dataset(found, split):
        assert found == name and split.startswith("train")
        text = json.dumps(PUBLISHED[name])
        return Rows(json.loads(text.replace("{i}", str(i))) for i in range(20))

    stand_in = ModuleType("datasets")
    stand_in.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", stand_in)
    (recipe,) = [x for x in re.findall(r"```python\n(.*?)```", PAGE, re.S) if f'"{name}"' in x]
    assert len(recipe.splitlines()) <= 4
    exec(recipe, {})
    (path,) = tmp_path.glob("*.jsonl")
    pairs = data.task(str(path)).preferences(None, 0)
    assert len(pairs) > 10
    for prompt, chosen, rejected in pairs:
        number = chosen.strip()
        assert rejected.strip() == f"no {number}" and f"{number}?" in prompt

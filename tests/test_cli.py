"""Mistakes at the command line: each one gets a message of one line and exit code 2, and nothing is
written."""

import gzip
import json
import shutil

import pytest
import torch
from conftest import ROOT, main, run

import data
from gpt import GPT, GPTConfig, ScalarGPT, load, save

# A command, where FILE stands for --init out/reviews/sft.pt --task, and what the line must say.
MISTAKES = """
dpo --betta 1 | --betta
dpo --be 1 | --be
dpo --steps many | --steps: must be a whole number, not 'many'
dpo --steps 1.5 | --steps
dpo --steps | --steps
dpo --beta 0 | --beta: must be more than 0, not 0
dpo --epochs 0 | --epochs: must be at least 1, not 0
dpo --init= | --init is empty; give a value, or leave it out
evaluate out/reviews/sft.pt --prompt= | --prompt is empty
dpo --beta nan | --beta
dpo --lr -1 | --lr
dpo --lr inf | --lr
dpo --label-smoothing 0.5 | --label-smoothing
dpo --loss kto | --loss
dpo --force | --force
dpo --steps 3 --epochs 2 | --steps and --epochs
dpo --epochs 2 | --epochs
dpo --precompute-ref | --pairs
dpo --micro-batch 5 | --micro-batch 5 does not divide --batch-size 32
dpo --task reviewz | no such task
dpo --task arithmetic:x | arithmetic:1
dpo --eval-file ok.jsonl | --eval-file
dpo --device cuda:99 | give --device cpu
dpo --device abacus | --device
dpo --dtype int8 | --dtype
dpo --out a_file/x.pt | --out a_file/x.pt cannot be written
dpo --out out | --out
dpo --out out/reviews/sft.pt --init out/reviews/sft.pt | would overwrite out/reviews/sft.pt
dpo --out out/reviews/sft.pt | would overwrite out/reviews/sft.pt
sft --task ok.jsonl --out ok.pt | would overwrite ok.jsonl
dpo --out /dev/null | --out /dev/null is no place for a checkpoint
dpo --out new/ | --out new/ is no place for a checkpoint
dpo --seed 99999999999999999999 | --seed
sft --block-size 1 | --block-size 1 leaves no room
dpo FILE surrogate.jsonl | surrogate.jsonl:1: half a character
dpo --init none.pt | none.pt: no such file
dpo --init out/reviews/stf.pt | no such file; did you mean out/reviews/sft.pt?
dpo FILE okk.jsonl | okk.jsonl: no such file; did you mean ok.jsonl?
dpo --init out | out is a directory
dpo --init cut.pt | not a whole checkpoint
dpo --init text.pt | not a whole checkpoint
dpo --init pickle.pt | not a checkpoint of these scripts
dpo --init vocab.pt | vocabulary of 99
dpo --tokenizer other.tiktoken | unrecognized arguments: --tokenizer
sft --init out/reviews/sft.pt --out x.pt --tokenizer other.tiktoken | --tokenizer is read without
    --init only
dpo --block-size 512 | --block-size 512 is more than the checkpoint's 256
dpo --block-size 16 | do not fit in 16 tokens
dpo --max-new-tokens 255 | --max-new-tokens
dpo --task ok.jsonl | --init is needed with a file
dpo FILE none.jsonl | none.jsonl: no such file
dpo FILE empty.jsonl | empty.jsonl is empty
dpo FILE broken.jsonl | broken.jsonl:17: not JSON
dpo FILE array.jsonl | array.jsonl:2: a row must be a JSON object, not a list
dpo FILE nocolumn.jsonl | no column "rejected" (it has prompt, chosen)
dpo FILE number.jsonl | "rejected" must be a string or a list of messages, not a number
dpo FILE noprompt.jsonl | noprompt.jsonl:1: the prompt is empty
dpo FILE role.jsonl | role.jsonl:1:
dpo FILE same.jsonl | no usable row
dpo FILE same.jsonl --strict | --strict
dpo FILE one.jsonl | --eval-file
dpo FILE long.jsonl | do not fit in 256 tokens
dpo FILE junk.jsonl | junk.jsonl:1: not
dpo FILE junk.jsonl.gz | junk.jsonl.gz: cannot be read
dpo FILE list.json | list.json is a JSON array; write one object per line: jq -c '.[]' list.json >
    list.new.jsonl
dpo FILE ok.jsonl --eval-file list.json | list.json is a JSON array
dpo FILE list.jsonl | jq -c '.[]' list.jsonl > list.new.jsonl
dpo FILE wide.json | wide.json is JSON, but not one object per line; write it so: jq -c . wide.json
dpo FILE table.csv | table.csv is a CSV file; write it as JSONL: pandas.read_csv('table.csv', dtype
dpo FILE ./table.tsv.gz | is a TSV file
dpo FILE a.parquet | a.parquet is a Parquet file; write it as JSONL: pandas.read_parquet(
dpo FILE parquet.jsonl | parquet.jsonl is a Parquet file
dpo FILE gzipped.jsonl | gzipped.jsonl is compressed; give it a name that ends with .jsonl.gz
dpo FILE pointer.jsonl | pointer.jsonl is a pointer of Git LFS, not the file itself; run git
    lfs pull
sft --tokenizer pointer.jsonl | pointer.jsonl is a pointer of Git LFS
dpo FILE data.jsonl | data.jsonl is a directory
dpo FILE ok.jsonl --eval-file none.jsonl | none.jsonl: no such file
sft --pairs 3 | --pairs
sft --init out/reviews/sft.pt --out out/x.pt --n-layer 2 | --n-layer
sft --n-embd 30 --n-head 4 | --n-embd 30 is not a multiple
sft --tokenizer none | --tokenizer none: no such file
sft --tokenizer bad.tiktoken | bad.tiktoken is no vocabulary file
sft --task number.jsonl --init vocab.pt | vocabulary of 99
simpo --gamma-beta-ratio -1 | --gamma-beta-ratio
simpo --gamma 1 | --gamma
simpo --beta 0 | --beta
simpo --task ok.jsonl | --init is needed with a file
simpo FILE nocolumn.jsonl | no column "rejected"
simpo --out out/reviews/sft.pt | would overwrite out/reviews/sft.pt
simpo --init rm.pt | rm.pt is a reward model
orpo --lam -0.1 | --lam
orpo --init out/reviews/sft.pt --n-embd 32 | --n-embd is read without --init only
orpo --n-embd 30 | --n-embd 30 is not a multiple
orpo --task label.jsonl | no column "chosen"
orpo --micro-batch 5 | --micro-batch 5 does not divide
orpo --task broken.jsonl | broken.jsonl:17: not JSON
kto --batch-size 1 | --batch-size: must be at least 2, not 1
kto --pairs 1 | the training rows have one prompt only
kto FILE oneprompt.jsonl --eval-file label.jsonl | the training rows have one prompt only
kto --w-desirable 0 | --w-desirable
kto --task label.jsonl | --init is needed with a file
kto FILE badlabel.jsonl | badlabel.jsonl:1: "label" must be true or false, not "yes"
sft FILE badlabel.jsonl | badlabel.jsonl:1: "label" must be true or false, not "yes"
sft FILE labelled.jsonl | labelled.jsonl:61: no column "label", which labelled.jsonl:1 has
dpo FILE text.jsonl | text.jsonl:1: no column "prompt" (it has text); split each text into
sft FILE nan.jsonl | nan.jsonl:1: not JSON (NaN is not a finite number)
sft FILE wide.jsonl | wide.jsonl:1: not JSON (1e999 is not a finite number)
sft FILE talk.jsonl | talk.jsonl:1: "messages" must be a list of messages, not a string
sft FILE monologue.jsonl | monologue.jsonl:1: "messages" begins with the answer
sft FILE question.jsonl | question.jsonl:1: no column "completion" (it has prompt)
dpo FILE otherchat.jsonl | otherchat.jsonl:1: "chosen" and "rejected" must be one message, or the
    whole chat with its prompt
dpo FILE twice.jsonl | twice.jsonl:2: the key "chosen" occurs twice in one object; rename one
dpo FILE twiceinside.jsonl | twiceinside.jsonl:1: the key "a" occurs twice in one object
sft FILE picture.jsonl | picture.jsonl:1: "prompt" has a part of the kind 'image_url'; a model here
    reads {"type": "text", "text"} only
sft FILE bareparts.jsonl | bareparts.jsonl:1: "completion" has a part of the kind 'a string'
kto FILE nocolumn.jsonl | no column "label" (it has prompt, chosen); sft.py can read such rows
kto --epochs 2 | --epochs
dpo FILE label.jsonl | no column "chosen" (it has prompt, completion, label); kto.py can read such
    rows
dpo --task exact:2 | no such task
dpo --task exact --init out/reviews/sft.pt | exact has a vocabulary of its own
dpo --task exact:1 --init exact.pt | exact:1 has a vocabulary of its own
dpo --init exact.pt | exact.pt was trained on exact, and exact has a vocabulary of its own
dpo --task exact --init exact.pt --max-new-tokens 5 | --max-new-tokens 5: the responses of exact
sft --task exact --tokenizer other.tiktoken | exact has a vocabulary of its own; leave it out
dpo --init rm.pt | rm.pt is a reward model
reward_model --center-rewards -1 | --center-rewards
reward_model --beta 0.1 | --beta
reward_model --max-new-tokens 5 | --max-new-tokens: must be at most 0, not 5
reward_model FILE huge.jsonl | "margin" must be a number, not 1000
evaluate exact.pt --seed 3 | --seed: every outcome of exact is counted
reward_model --out out/reviews/sft.pt | would overwrite out/reviews/sft.pt
reward_model --init rm.pt | rm.pt is a reward model
reward_model --init none.pt | none.pt: no such file
reward_model --task exact --init out/reviews/sft.pt | exact has a vocabulary of its own
reward_model --task ok.jsonl | --init is needed with a file
reward_model --epochs 2 | --epochs
reward_model --micro-batch 5 | --micro-batch 5 does not divide
reward_model FILE p2.jsonl | p2.jsonl:1: "p" must be a number in [0, 1], not 2
reward_model FILE pnull.jsonl | "p" must be a number in [0, 1], not null
reward_model FILE margin.jsonl | "margin" must be a number, not "big"
reward_model FILE broken.jsonl | broken.jsonl:17: not JSON
reward_model FILE same.jsonl | no usable row
reward_model FILE long.jsonl | do not fit in 256 tokens
grpo --group 1 | --group: must be at least 2, not 1
grpo --minibatches 7 | --minibatches 7 does not divide --batch-size 16 × --group 8 = 128 responses
grpo --micro-batch 7 | --micro-batch 7 does not divide --batch-size 16 × --group 8 / --minibatches
    1 = 128 responses
grpo --kl none --beta 0.1 | --beta is read with --kl k3 or k3-ratio or reward only, not with none
grpo --kl k2 | --kl
grpo --temperature 0 | --temperature
grpo --eps -1 | --eps
grpo --adv-norm mean | --adv-norm
grpo --steps 3 --epochs 2 | --steps and --epochs
grpo --max-new-tokens 250 | training prompts are longer than the 6 tokens that --max-new-tokens
    leaves
grpo --task exact --init exact.pt --max-new-tokens 2 | --max-new-tokens 2: the responses of exact
grpo --task ok.jsonl --reward good.py:f | --init is needed with a file
grpo FILE ok.jsonl | --reward task: not every row of ok.jsonl has an "answer" to check
grpo FILE ok.jsonl --reward rm | --reward X.pt is needed with a file
grpo FILE long.jsonl --reward good.py:f | are longer than the 128 tokens
grpo FILE noprompt.jsonl --reward good.py:f | noprompt.jsonl:1: the prompt is empty
grpo --reward gold | give task, rm, the X.pt of a reward model, or a function as FILE.py:function
grpo --reward good.py | give task, rm, the X.pt of a reward model, or a function as FILE.py:function
grpo --reward returns.py:positional | takes 'p', which is no column of the rows (there are prompt,
    completion, ended)
grpo FILE someanswer.jsonl --reward wants.py:f | takes 'answer', which someanswer.jsonl:51 lacks
grpo FILE someanswer.jsonl --reward task | "answer" to check against (someanswer.jsonl:51
grpo --reward kinds.py:later | returned <coroutine object later
grpo --reward kinds.py:many | returned <generator object many
grpo --reward kinds.py:Scorer | returned <user_reward.Scorer object
grpo --reward kinds.py:scorer | kinds.py has no function 'scorer'
grpo --reward none.py:f | none.py is no file
grpo --reward good.py:g | good.py has no function 'g'
grpo --reward syntax.py:f | syntax.py cannot be run (SyntaxError
grpo --reward wants.py:f | --reward wants.py:f takes 'answer', which is no column of the rows
grpo --reward raises.py:f | raised KeyError ('x', line 1) at the prompt 'A
grpo --reward returns.py:none | returned None at the prompt 'A
grpo --reward returns.py:text | returned '1' at the prompt 'A
grpo --reward returns.py:infinite | returned inf at the prompt 'A
grpo --reward wrong.py:long | raised ValueError (aaaaaaaaaa
grpo --reward wrong.py:big | returned 1000
grpo --reward wrong.py:wide | returned 1e
grpo --reward wrong.py:leave | raised SystemExit
grpo --reward wrong.py:nan | returned nan
grpo --reward none.pt | none.pt: no such file
grpo --reward out/reviews/sft.pt | is a language model; give a reward model
grpo --reward exact_rm.pt | exact_rm.pt was trained on exact, and exact has a vocabulary of its own
grpo --task exact --init exact.pt --reward good.py:f | exact keeps its own rewards
grpo --out out/reviews/sft.pt | would overwrite out/reviews/sft.pt
grpo --init rm.pt | rm.pt is a reward model
ppo --gamma 1.5 | --gamma: must be at most 1, not 1.5
ppo --lam -1 | --lam
ppo --group 0 | --group
ppo --eps-high 0.3 | --eps-high
ppo --missing-eos-penalty nan | --missing-eos-penalty: must be a number, not 'nan'
ppo --missing-eos-penalty 1 --reward task | --missing-eos-penalty is read with --reward rm or *.pt
    only, not with task
ppo --task arithmetic:2 --missing-eos-penalty 1 | --missing-eos-penalty is read with --reward rm or
    *.pt only, not with task
ppo --task exact --reward rm --missing-eos-penalty 1 | a missing end costs nothing on exact
ppo --task exact --init exact.pt --reward good.py:f | exact keeps its own rewards
ppo --reward none.pt | none.pt: no such file
ppo --reward out/reviews/sft.pt | is a language model; give a reward model
ppo --reward exact_rm.pt | exact_rm.pt was trained on exact, and exact has a vocabulary of its own
ppo --minibatches 7 | --minibatches 7 does not divide --batch-size 128 × --group 1 = 128 responses
ppo --micro-batch 7 | --micro-batch 7 does not divide --batch-size 128 × --group 1 / --minibatches
    4 = 32 responses
ppo --steps 3 --epochs 2 | --steps and --epochs
ppo --reward raises.py:f | raised KeyError ('x', line 1) at the prompt 'A
ppo FILE ok.jsonl | --reward task: not every row of ok.jsonl has an "answer" to check
ppo FILE ok.jsonl --reward rm | --reward X.pt is needed with a file
ppo --task ok.jsonl --reward good.py:f | --init is needed with a file
ppo --max-new-tokens 250 --reward task | training prompts are longer than the 6 tokens that
    --max-new-tokens leaves
ppo --out out/reviews/reward_model.pt | would overwrite out/reviews/reward_model.pt
ppo --init rm.pt | rm.pt is a reward model
dapo --group 1 | --group: must be at least 2, not 1
dapo --batch-size 1 --group 2 | --minibatches 8 does not divide --batch-size 1 × --group 2 = 2
    responses
dapo --beta 0.1 | --beta
dapo --max-rounds 0 | --max-rounds
dapo --no-overlong --overlong-cache 4 | --overlong-cache is read with --overlong only
dapo --overlong-cache 97 | --overlong-cache 97 must be at most L_max = 96
dapo --reward raises.py:f | raised KeyError ('x', line 1) at the prompt 'A
dapo FILE ok.jsonl | --reward task: not every row of ok.jsonl has an "answer" to check
dapo --micro-batch 5 | --micro-batch 5 does not divide
online_dpo --samples-per-prompt 1 | --samples-per-prompt: must be at least 2, not 1
online_dpo --ref-update per-round | --ref-update per-round needs --rounds N
online_dpo --task exact --reward rm --missing-eos-penalty 1 | a missing end costs nothing on exact
online_dpo --rounds 11 --steps 10 --reward good.py:f | --rounds 11 is more than the 10 steps
online_dpo --reward none.pt | none.pt: no such file
online_dpo --reward out/reviews/sft.pt | is a language model; give a reward model
online_dpo --reward exact_rm.pt | exact has a vocabulary of its own
online_dpo --task exact --init exact.pt --reward rm.pt | rm.pt has a vocabulary of 99, but its
    tokenizer 748
online_dpo --missing-eos-penalty 2 | --missing-eos-penalty is read with --reward rm or *.pt only
online_dpo --label hard | --label
online_dpo --pairs 9 | --pairs
online_dpo --micro-batch 5 | --micro-batch 5 does not divide --batch-size 32
online_dpo --reward raises.py:f | raised KeyError ('x', line 1) at the prompt 'A
online_dpo --max-new-tokens 250 | training prompts are longer than the 6 tokens that
    --max-new-tokens leaves
online_dpo --task exact --init exact.pt --reward good.py:f | exact keeps its own rewards
online_dpo FILE ok.jsonl | --reward task: not every row of ok.jsonl has an "answer" to check
online_dpo --task ok.jsonl --reward good.py:f | --init is needed with a file
online_dpo --out out/reviews/sft.pt | would overwrite out/reviews/sft.pt
online_dpo --init rm.pt | rm.pt is a reward model
rlaif --group 1 | --group: must be at least 2, not 1
rlaif --task exact | exact has a vocabulary of its own, without words for a critique
rlaif --task arithmetic:2 | --task arithmetic:2: how to criticise, revise and compare is
    demonstrated on reviews only
rlaif --task ok.jsonl | ok.jsonl: how to criticise, revise and compare is demonstrated on reviews
    only; give --init
rlaif --constitution none.txt | --constitution none.txt cannot be read (FileNotFoundError)
rlaif --constitution a_file | --constitution a_file holds no principle
rlaif --constitution good.py | the grammar demonstrates Be kind., Be fair., Be warm., Be specific.
    only, not 'def f(
rlaif --judge none.pt | none.pt: no such file
rlaif --judge rm.pt | rm.pt is a reward model; give a language model
rlaif --judge exact.pt | the vocabulary of exact has the symbols
rlaif --clamp 0.5 | --clamp
rlaif --init out/reviews/sft.pt --skill-steps 5 | --skill-steps is read without --init only
rlaif --init out/reviews/sft.pt --n-embd 32 | --n-embd is read without --init only
rlaif --n-embd 30 | --n-embd 30 is not a multiple
rlaif --init none.pt | none.pt: no such file
rlaif --init rm.pt | rm.pt is a reward model
rlaif --init out/reviews/sft.pt --out out/reviews/sft.pt | would overwrite out/reviews/sft.pt
rlaif --judge out/reviews/sft.pt --out out/reviews/sft.pt | would overwrite out/reviews/sft.pt
rlaif --micro-batch 7 | --micro-batch 7 does not divide --batch-size 32
rlaif --block-size 64 | a dialogue of critique and revision takes up to
rlaif --max-new-tokens 250 | test prompts are longer than the 6 tokens that --max-new-tokens
    leaves
rlaif --reward task | --reward
rlaif --pairs 9 | --pairs
rlaif --steps 3 --epochs 2 | --steps and --epochs
evaluate exact.pt --task reviews | exact has a vocabulary of its own
evaluate exact.pt --prompt xyz | 'xyz' in 'xyz'
evaluate rm.pt | rm.pt is a reward model
evaluate none.pt | none.pt: no such file
evaluate out/reviews/sft.pt --max-new-tokens 300 | --max-new-tokens
evaluate | checkpoint
evaluate a.pt b.pt c.pt | give one checkpoint to measure, and at most one to compare it with
evaluate a.pt b.pt --reference c.pt | give one checkpoint to measure, and at most one
evaluate out/reviews/sft.pt --reward gold | give task, rm, the X.pt of a reward model
evaluate out/reviews/sft.pt --reward none.pt | none.pt: no such file
"""
ROWS = [row.split(" | ") for row in MISTAKES.replace("\n    ", " ").strip().splitlines()]

PAIR = {"prompt": "{i}", "chosen": "a", "rejected": "b"}
LABELLED = {"prompt": "{i}", "completion": "{i}", "label": True}
ASKED, ANSWER = ({"role": role, "content": role} for role in ("user", "assistant"))
GOOD = json.dumps(PAIR)
TABLES = {  # file -> rows of it, their columns, and more lines; {i} is the row's number
    "array": (1, PAIR, "[1]"),
    "broken": (16, PAIR, '{"prompt": ', GOOD),
    "someanswer": (50, PAIR | {"answer": "a"}, GOOD),
    "labelled": (60, LABELLED, '{"prompt": "p", "completion": "c"}'),
    "wide": (0, {}, '{"prompt": "p", "completion": "c", "x": 1e999}'),
    "surrogate": (0, {}, r'{"prompt": "\ud83d", "chosen": "a", "rejected": "b"}'),
    "empty": (0, {}),
    "nocolumn": (9, {"prompt": "{i}", "chosen": "a"}),
    "number": (9, PAIR | {"rejected": 3}),
    "noprompt": (1, PAIR | {"prompt": " "}),
    "role": (1, PAIR | {"prompt": [{"role": "robot", "content": "x"}]}),
    "same": (9, PAIR | {"rejected": "a"}),
    "p2": (9, PAIR | {"p": 2}),
    "pnull": (9, PAIR | {"p": None}),
    "margin": (9, PAIR | {"margin": "big"}),
    "huge": (9, PAIR | {"margin": 10**400}),
    "label": (60, LABELLED),
    "badlabel": (60, LABELLED | {"label": "yes"}),
    "text": (9, {"text": "a"}),
    "nan": (9, {"prompt": "{i}", "completion": float("nan")}),
    "talk": (9, {"messages": "{i}"}),
    "monologue": (9, {"messages": [ANSWER]}),
    "question": (9, {"messages": [{"role": "user", "content": "{i}"}]}),
    "otherchat": (9, PAIR | {"chosen": [ASKED, ANSWER], "rejected": [ASKED, ANSWER]}),
    "oneprompt": (60, LABELLED | {"prompt": "1"}),
    "one": (1, PAIR),
    "long": (9, PAIR | {"prompt": "{i}" * 400}),
    "twice": (1, PAIR, '{"prompt": "p", "chosen": "a", "rejected": "b", "chosen": "c"}'),
    "twiceinside": (0, {}, '{"prompt": "p", "completion": "c", "more": [{"a": 1, "a": 1}]}'),
    "picture": (9, {"prompt": [{"role": "user", "content": [{"type": "image_url"}]}]}),
    "bareparts": (9, {"prompt": "{i}", "completion": [{"role": "assistant", "content": ["a"]}]}),
    "pointer": (0, {}, "version https://git-lfs.github.com/spec/v1", "oid sha256:4d7a", "size 9"),
    "ok": (50, PAIR),
}
FUNCTIONS = {
    "good": "def f(prompt, completion): return 1",
    "syntax": "def f(:",
    "wants": "def f(prompt, completion, answer): return 1",
    "raises": "def f(prompt, completion): raise KeyError('x')",
    "returns": """
def none(prompt, completion): pass
def text(prompt, completion): return '1'
def infinite(prompt, completion): return float('inf')
def positional(p, c): return 1""",
    "wrong": """
from __future__ import annotations
import dataclasses
@dataclasses.dataclass
class Looks:
    up: int = 1  # its module, by name
def long(prompt, completion): raise ValueError("a" * 999 + "\\n" + "b")
def big(prompt, completion): return 10**400
def wide(prompt, completion): return 1e39
def leave(prompt, completion): raise SystemExit(3)
def nan(prompt, completion): return float("nan")""",
    "kinds": """
async def later(completion): return 1
def many(completion): yield 1
class Scorer: pass
scorer = Scorer()""",
}


def files(folder):
    """What the table names."""
    for name, (n, columns, *more) in TABLES.items():
        lines = [json.dumps(columns).replace("{i}", str(i)) for i in range(n)]
        if columns.get("label") is True:  # both kinds
            lines[1::2] = [line.replace("true", "false") for line in lines[1::2]]
        (folder / f"{name}.jsonl").write_text("\n".join(lines + more))
    (folder / "junk.jsonl").write_bytes(bytes(range(256)))
    (folder / "gzipped.jsonl").write_bytes(gzip.compress(GOOD.encode()))
    (folder / "table.tsv.gz").write_bytes(gzip.compress(b"prompt\tcompletion\n"))
    for name in ("a.parquet", "parquet.jsonl"):
        (folder / name).write_bytes(b"PAR1\x15\x04\xff")
    texts = {"list.json": f"\n[{GOOD}]", "list.jsonl": "[\n", "table.csv": "prompt,completion\n"}
    texts |= {"wide.json": json.dumps(PAIR, indent=1)}
    texts |= {"junk.jsonl.gz": "no gzip", "a_file": "", "text.pt": "hello", "bad.tiktoken": "none"}
    texts |= {f"{name}.py": text for name, text in FUNCTIONS.items()}
    vocabulary = (ROOT / "data/vocab.tiktoken").read_text()
    texts["other.tiktoken"] = vocabulary.rsplit("\n", 2)[0] + "\n"
    for name, text in texts.items():
        (folder / name).write_text(text)
    (folder / "data.jsonl").mkdir()

    sft = folder / "out/reviews/sft.pt"
    (folder / "cut.pt").write_bytes(sft.read_bytes()[:5000])
    torch.save({"a": [1]}, folder / "pickle.pt")
    meta = load(sft)[1]
    exact = meta | {"tokenizer": data.task("exact").tokenizer, "task": "exact"}
    small, tiny = GPTConfig(99, 64, 1, 1, 8), GPTConfig(4, 8, 1, 1, 8)
    save(GPT(small), folder / "vocab.pt", **meta)
    save(GPT(tiny), folder / "exact.pt", **exact)
    save(ScalarGPT(small), folder / "rm.pt", **meta)
    save(ScalarGPT(tiny), folder / "exact_rm.pt", **exact)


@pytest.fixture(scope="module")
def workshop(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mistakes")
    shutil.copytree(tiny / "out", folder / "out")
    files(folder)
    return folder


def snapshot(folder):
    """-> {file: content} of all but locks, which stay behind"""
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"]
    return {path: path.read_bytes() for path in files}


@pytest.mark.parametrize("command, words", ROWS)
def test_a_mistake_is_one_line_and_exit_code_2(command, words, workshop, monkeypatch, capsys):
    monkeypatch.chdir(workshop)
    monkeypatch.setattr("sys.dont_write_bytecode", True)
    before = snapshot(workshop)
    script, *argv = command.replace("FILE", "--init out/reviews/sft.pt --task").split()
    assert main(script, *argv) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert (
        len(said) == 1
        and len(said[0]) < 600
        and said[0].startswith(f"{script}.py: ")
        and words in said[0]
    ), said
    assert snapshot(workshop) == before


def test_a_mistake_has_no_traceback_from_the_shell(workshop):
    done = run("dpo.py", "--beta", "0", cwd=workshop, ok=False)
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1

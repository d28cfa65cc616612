"""The command line: the defaults of each task and variant, the bounds of options, and the help
text."""

import importlib.util
import re
from dataclasses import asdict, fields
from importlib import import_module

import pytest
from conftest import ROOT, main
from house import METHODS

from data import UserError
from training import distributed, parse
from training.help import GROUPS
from training.options import flag

COMMON = """init= reference= out= name= eval_file= steps=300 epochs=0 batch_size=32 micro_batch=0
lr=0.001 warmup=20 optimizer=adamw
lr_schedule=cosine weight_decay=0.0 grad_clip=1.0 max_new_tokens=0 block_size=0 truncate=False
lora=0 lora_alpha=0 chat=True template_args=() eval_prompts=512
strict=False seed=0 device=auto dtype=auto checkpoint_activations=False compile=False
shard=False resume=False save_every=100
log_every=10 log_to= eval_every=0"""
# What a command trains with, as the scripts of version 3a1338c had it: a script's first row names
# what differs from COMMON, the others what differs from the first. Meant to differ: PPO's
# missing_eos_penalty, and RLOO's --agg sum.
EFFECTIVE = """
sft | steps=500 lr=0.004 warmup=50 tokenizer= n_layer=4 n_head=4 n_embd=128
sft --task arithmetic:2 | steps=1600 batch_size=64 lr=0.002
sft --n-layer 13 --n-embd 512 --n-head 8 --steps 1 --eval-prompts 2 --out big.pt |
    steps=1 eval_prompts=2 out=big.pt n_layer=13
    n_embd=512 n_head=8
sft --task exact | steps=1000 batch_size=4096 lr=0.002 lr_schedule=linear block_size=8 n_layer=2
    n_embd=64
sft --task exact --steps 300 --batch-size 512 | steps=300 batch_size=512 lr=0.002 lr_schedule=linear
    block_size=8 n_layer=2 n_embd=64
sft --steps 250 | steps=250
sft --task my_sft.jsonl --block-size 1024 --truncate | steps=0 block_size=1024 truncate=True
sft --task my_sft.jsonl --tokenizer my.tiktoken | steps=0 tokenizer=my.tiktoken
sft --task gsm8k_sft.jsonl.gz --init SmolLM2 --truncate --eval-prompts 24 --max-new-tokens 96
    --warmup 4 --steps 30 --batch-size 8 --micro-batch 4 --block-size 384 --lr 2e-5 |
    truncate=True eval_prompts=24 max_new_tokens=96 warmup=4 steps=30 batch_size=8 micro_batch=4
    block_size=384 lr=2e-05
reward_model | eval_prompts=2048 center_rewards=0.0 pairs=0
reward_model --task exact | steps=1000 batch_size=4096 lr=0.002 lr_schedule=linear
reward_model --pairs 64 --epochs 20 --batch-size 32 --eval-prompts 256 | steps=0 epochs=20 pairs=64
    eval_prompts=256
dpo | steps=150 lr=0.0003 beta=0.1 loss=dpo label_smoothing=0.0 ipo_sum=False sft_weight=0.0
    precompute_ref=False pairs=0
dpo --beta 0.1 |
dpo --optimizer adamw8bit --name adamw8bit | optimizer=adamw8bit name=adamw8bit
dpo --log-to tensorboard | log_to=tensorboard
dpo --label-smoothing 0.1 | label_smoothing=0.1
dpo --loss robust | loss=robust label_smoothing=0.1
dpo --loss robust --label-smoothing 0.2 | loss=robust label_smoothing=0.2
dpo --loss ipo | beta=1.0 loss=ipo
dpo --loss ipo --beta 0.5 | beta=0.5 loss=ipo
dpo --loss norm | beta=5.0 loss=norm
dpo --loss apo | loss=apo
dpo --length-penalty 0.02 | length_penalty=0.02
dpo --task exact --loss norm | steps=2000 batch_size=4096 lr=0.0005 lr_schedule=linear beta=1.0
    loss=norm
dpo --task exact --loss apo | steps=2000 batch_size=4096 lr=0.0005 lr_schedule=linear beta=0.5
    loss=apo
dpo --task exact --length-penalty 0.3 | steps=2000 batch_size=4096 lr=0.0005 lr_schedule=linear
    beta=0.5 length_penalty=0.3
dpo --pairs 2000 --epochs 4 --precompute-ref | steps=0 epochs=4 precompute_ref=True pairs=2000
dpo --task my_pairs.jsonl --init out/my_sft/sft.pt --truncate | steps=0 truncate=True
dpo --task my_pairs.jsonl --init out/my_sft/sft.pt --steps 7 | steps=7
dpo --task exact | steps=2000 batch_size=4096 lr=0.0005 lr_schedule=linear beta=0.5
dpo --task exact --label-smoothing 0.1 | steps=2000 batch_size=4096 lr=0.0005 lr_schedule=linear
    beta=0.5 label_smoothing=0.1
dpo --task exact --loss robust | steps=2000 batch_size=4096 lr=0.0005 lr_schedule=linear beta=0.5
    loss=robust label_smoothing=0.1
dpo --task exact --loss ipo | steps=2000 batch_size=4096 lr=0.0005 lr_schedule=linear beta=0.3
    loss=ipo
dpo --task exact --loss ipo --beta 0.7 --steps 9 | steps=9 batch_size=4096 lr=0.0005 beta=0.7
    lr_schedule=linear loss=ipo
dpo --task exact --pairs 300 --epochs 200 | steps=0 epochs=200 batch_size=4096 lr=0.0005 beta=0.5
    lr_schedule=linear pairs=300
dpo --task exact --pairs 64 --epochs 160 --batch-size 64 --lr 1e-3 | steps=0 epochs=160
    batch_size=64 lr=0.001 beta=0.5 lr_schedule=linear pairs=64
dpo --task exact --steps 300 --lr 2e-3 | steps=300 batch_size=4096 lr=0.002 lr_schedule=linear
    beta=0.5
dpo --task exact --steps 100 --lr 2e-3 --beta 0.01 | steps=100 batch_size=4096 lr=0.002
    lr_schedule=linear beta=0.01
dpo --task exact --steps 100 --lr 2e-3 --beta 0.5 | steps=100 batch_size=4096 lr=0.002
    lr_schedule=linear beta=0.5
dpo --task exact --steps 100 --lr 2e-3 --beta 5 | steps=100 batch_size=4096 lr=0.002
    lr_schedule=linear beta=5.0
dpo --steps 80 | steps=80
dpo --steps 80 --length-penalty 0.02 | steps=80 length_penalty=0.02
dpo --task gsm8k_preferences.jsonl.gz --init sft_adapters --lora 16 --truncate --lr 1e-4 |
    steps=0 truncate=True lr=0.0001 lora=16 lora_alpha=16
dpo --task gsm8k_preferences.jsonl.gz --init SmolLM2 --truncate --lr 1e-6 |
    truncate=True steps=0 lr=1e-06
dpo --task ultrafeedback.jsonl --init SmolLM2 --truncate --lr 1e-6 |
    truncate=True steps=0 lr=1e-06
dpo --task gsm8k_preferences.jsonl.gz --init SmolLM2 --truncate --eval-prompts 24 --max-new-tokens
    96 --warmup 4 --pairs 32 --epochs 4 --batch-size 4 --micro-batch 2 --block-size 320 --lr 5e-6
    | truncate=True eval_prompts=24 max_new_tokens=96 warmup=4 pairs=32 epochs=4 batch_size=4
    micro_batch=2 block_size=320 lr=5e-06 steps=0
dpo --task gsm8k_preferences.jsonl.gz --init SmolLM2 --truncate --eval-prompts 24 --max-new-tokens
    96 --warmup 4 --pairs 32 --epochs 4 --batch-size 4 --micro-batch 2 --block-size 320 --lr 2e-4
    --lora 8 | truncate=True eval_prompts=24 max_new_tokens=96 warmup=4 pairs=32 epochs=4
    batch_size=4 micro_batch=2 block_size=320 lr=0.0002 lora=8 steps=0 lora_alpha=8
dpo --task gsm8k_preferences.jsonl.gz --init HuggingFaceTB/SmolLM2-135M-Instruct --truncate
    --lr 1e-6 | truncate=True steps=0 lr=1e-06
dpo --task my_pairs.jsonl --init HuggingFaceTB/SmolLM2-135M-Instruct --lora 8 --truncate |
    lora=8 truncate=True
    steps=0 lora_alpha=8
simpo | steps=150 lr=0.0003 beta=2.0 gamma_beta_ratio=0.5 sft_weight=0.0 pairs=0
simpo --task exact | steps=2000 batch_size=4096 lr=0.0005 lr_schedule=linear gamma_beta_ratio=0.25
simpo --steps 80 | steps=80
simpo --task my_pairs.jsonl --init out/my_sft/sft.pt --truncate | steps=0 truncate=True
orpo | steps=500 lr=0.004 warmup=50 tokenizer= n_layer=4 n_head=4 n_embd=128 lam=0.1
    prompt_loss=False pairs=0
orpo --task exact | steps=2000 batch_size=4096 lr=0.002 lr_schedule=linear block_size=8 n_layer=2
    n_embd=64 lam=0.25
orpo --task exact --steps 119 | steps=119 batch_size=4096 lr=0.002 lr_schedule=linear block_size=8
    n_layer=2 n_embd=64 lam=0.25
kto | steps=150 batch_size=64 lr=0.0003 beta=0.1 w_desirable=1.0 w_undesirable=1.0 pairs=0
kto --task exact | steps=2000 batch_size=4096 lr=0.0005 lr_schedule=linear beta=0.5
kto --task gsm8k_feedback.jsonl.gz --init SmolLM2 --truncate --eval-prompts 24 --max-new-tokens 96
    --warmup 4 --pairs 64 --epochs 3 --batch-size 8 --micro-batch 4 --block-size 320 --lr 5e-6 |
    truncate=True eval_prompts=24 max_new_tokens=96 warmup=4 pairs=64 epochs=3 batch_size=8
    micro_batch=4 block_size=320 lr=5e-06 steps=0
ppo | steps=60 batch_size=128 lr=0.0002 lr_schedule=linear warmup=10 save_every=20 reward=rm
    group=1 beta=0.05 gamma=1.0 lam=0.95 eps=0.2 eps_v=0.2 vf_coef=0.1 temperature=1.0 updates=2
    minibatches=4 missing_eos_penalty=3.0
ppo --task arithmetic:2 | steps=100 batch_size=256 reward=task
ppo --task exact | steps=300 batch_size=4 lr=0.0005 reward=task group=64 beta=0.5
    missing_eos_penalty=0.0
ppo --beta 0 --steps 60 --eval-every 10 | steps=60 eval_every=10 beta=0.0
ppo --task exact --reward task --gamma 1 --lam 1 | steps=300 batch_size=4 lr=0.0005 reward=task
    group=64 beta=0.5 lam=1.0 missing_eos_penalty=0.0
ppo --task gsm8k.jsonl.gz --init out/gsm8k.gz/sft.pt | steps=0 reward=task
grpo | steps=100 batch_size=16 lr=0.0002 save_every=20 reward=task group=8 adv_norm=std
    agg=seq_mean ratio=token eps=0.2 eps_high=0.2 kl=k3 beta=0.04 temperature=1.0 updates=1
    minibatches=1
grpo --task arithmetic:2 | steps=200 batch_size=32
grpo --task exact | steps=1500 batch_size=4 lr=0.0003 lr_schedule=linear group=64 beta=0.5
grpo --task exact --kl none --steps 60 --batch-size 16 --group 8 --lr 1e-3 | steps=60 batch_size=16
    lr=0.001 lr_schedule=linear group=8 beta=0.5 kl=none
grpo --task arithmetic:2 --minibatches 4 --steps 137 | steps=137 batch_size=32 minibatches=4
grpo --task arithmetic:2 --updates 2 --minibatches 4 --steps 100 | batch_size=32 updates=2
    minibatches=4
grpo --minibatches 4 --steps 137 | steps=137 minibatches=4
grpo --updates 2 --minibatches 4 --steps 100 | updates=2 minibatches=4
grpo --adv-norm loo --agg sum --kl reward | adv_norm=loo agg=sum kl=reward
grpo --adv-norm none --agg const --kl none | adv_norm=none agg=const kl=none
grpo --ratio seq --kl none --minibatches 4 | ratio=seq eps=0.0003 eps_high=0.0004 kl=none
    minibatches=4
grpo --steps 60 --batch-size 16 --group 4 --max-new-tokens 48 --eval-prompts 128 | steps=60
    group=4 max_new_tokens=48 eval_prompts=128
grpo --steps 40 --batch-size 16 --group 4 --lr 2e-3 --max-new-tokens 48 --eval-prompts 256 --init
    small.pt | steps=40 lr=0.002 group=4 max_new_tokens=48 eval_prompts=256
grpo --ratio seq --eps 0.1 | ratio=seq eps=0.1 eps_high=0.1
grpo --ratio seq --eps-high 0.1 | ratio=seq eps=0.0003 eps_high=0.1
grpo --eps 0.1 | eps=0.1 eps_high=0.1
grpo --clip weight --minibatches 4 --steps 137 | clip=weight eps=1.0 eps_high=4.0 minibatches=4
    steps=137
grpo --tis 2 | tis=2.0
grpo --task exact --adv-norm batch --agg sum --kl reward | steps=1500 batch_size=4 lr=0.0003
    lr_schedule=linear group=64 beta=0.5 adv_norm=batch agg=sum kl=reward
grpo --task exact --adv-norm loo --agg sum --kl reward --clip weight --minibatches 4 | steps=1500
    batch_size=4 lr=0.0003 lr_schedule=linear group=64 beta=0.5 adv_norm=loo agg=sum kl=reward
    clip=weight eps=1.0 eps_high=4.0 minibatches=4
dapo --clip weight --tis 2 | clip=weight eps=1.0 eps_high=4.0 tis=2.0
simpo --gamma-beta-ratio 0 --sft-weight 1 | gamma_beta_ratio=0.0 sft_weight=1.0
grpo --eps-high 0.3 | eps_high=0.3
grpo --task exact --adv-norm loo --agg sum --kl reward | steps=1500 batch_size=4 lr=0.0003
    lr_schedule=linear group=64 beta=0.5 adv_norm=loo agg=sum kl=reward
grpo --task exact --adv-norm loo --agg const --kl k3 | steps=1500 batch_size=4 lr=0.0003
    lr_schedule=linear group=64 beta=0.5 adv_norm=loo agg=const
grpo --task exact --adv-norm loo --agg const --kl k3-ratio | steps=1500 batch_size=4 lr=0.0003
    lr_schedule=linear group=64 beta=0.5 adv_norm=loo agg=const kl=k3-ratio
grpo --reward rm --adv-norm loo --agg sum --kl reward --steps 24 --batch-size 16 --group 4 --lr 1e-3
    --warmup 5 --eval-prompts 128 --max-new-tokens 48 --beta 0 | steps=24 group=4 lr=0.001
    warmup=5 eval_prompts=128 max_new_tokens=48 adv_norm=loo agg=sum kl=reward beta=0.0
grpo --reward rm --adv-norm loo --agg sum --kl reward --steps 24 --batch-size 16 --group 4 --lr 1e-3
    --warmup 5 --eval-prompts 128 --max-new-tokens 48 --beta 1 | steps=24 group=4 lr=0.001
    warmup=5 eval_prompts=128 max_new_tokens=48 adv_norm=loo agg=sum kl=reward beta=1.0
grpo --task gsm8k_sft.jsonl.gz --init out/gsm8k_sft.gz/sft.pt --truncate
    --reward my_rewards.py:number | steps=0 truncate=True
grpo --task gsm8k_sft.jsonl.gz --init SmolLM2 --truncate --eval-prompts 24 --max-new-tokens 96
    --warmup 2 --steps 10 --batch-size 2 --group 8 --micro-batch 8 --block-size 384 --lr 3e-6
    --log-every 1 --reward my_rewards.py:steps | truncate=True eval_prompts=24 max_new_tokens=96
    warmup=2 steps=10 batch_size=2 group=8 micro_batch=8 block_size=384 lr=3e-06 log_every=1
dapo | steps=40 batch_size=16 lr=0.0002 save_every=20 reward=task group=8 adv_norm=std
    agg=token_mean eps=0.2 eps_high=0.28 max_rounds=10 overlong=True overlong_cache=0
    overlong_filter=False temperature=1.0 updates=1 minibatches=8
dapo --task arithmetic:2 | steps=50 batch_size=32 minibatches=4
dapo --task exact | steps=1500 batch_size=4 lr=0.0003 lr_schedule=linear group=64 overlong=False
dapo --task exact --steps 60 --batch-size 16 --group 8 --lr 1e-3 --minibatches 1 --log-every 1 |
    steps=60 batch_size=16 lr=0.001 lr_schedule=linear group=8 minibatches=1 overlong=False
    log_every=1
distill --steps 40 --batch-size 16 --group 4 --lr 2e-3 --max-new-tokens 48 --eval-prompts 256 --init
    small.pt --teacher teacher.pt --loss reverse | steps=40 lr=0.002 group=4
    max_new_tokens=48 eval_prompts=256 teacher=teacher.pt loss=reverse
distill --steps 40 --batch-size 16 --group 4 --lr 2e-3 --max-new-tokens 48 --eval-prompts 256 --init
    small.pt --teacher teacher.pt --loss forward | steps=40 lr=0.002 group=4
    max_new_tokens=48 eval_prompts=256 teacher=teacher.pt loss=forward
sft --steps 250 --n-layer 2 --n-embd 32 --eval-prompts 128 | steps=250 n_layer=2 n_embd=32
    eval_prompts=128
distill | steps=100 batch_size=16 lr=0.001 save_every=20 teacher= loss=reverse agg=seq_mean
    answers=0.0 reward=task group=8 temperature=1.0 updates=1 minibatches=1
distill --task exact --init out/exact/sft.pt --teacher out/exact/dpo.pt | steps=300 batch_size=4
    lr=0.002 lr_schedule=linear group=64 teacher=out/exact/dpo.pt
online_dpo | steps=150 lr=0.0003 reward=task missing_eos_penalty=1.0 label=bt loss=dpo beta=0.1
    ipo_sum=False rounds=0 samples_per_prompt=2 ref_update=fixed temperature=1.0
online_dpo --reward out/reviews/reward_model.pt |
online_dpo --rounds 3 --samples-per-prompt 4 | rounds=3 samples_per_prompt=4
online_dpo --loss ipo | loss=ipo beta=1.0
online_dpo --task exact | steps=1000 batch_size=256 lr=0.0005 lr_schedule=linear beta=0.5
    missing_eos_penalty=0.0
online_dpo --task exact --steps 160 --batch-size 64 --lr 1e-3 | steps=160 batch_size=64 lr=0.001
    lr_schedule=linear beta=0.5 missing_eos_penalty=0.0
online_dpo --task exact --steps 160 --batch-size 64 --lr 1e-3 --rounds 3 | steps=160 batch_size=64
    lr=0.001 lr_schedule=linear beta=0.5 missing_eos_penalty=0.0 rounds=3
online_dpo --task exact --label argmax | steps=1000 batch_size=256 lr=0.0005 lr_schedule=linear
    missing_eos_penalty=0.0 label=argmax beta=0.5
online_dpo --task exact --loss ipo | steps=1000 batch_size=256 lr=0.0005 lr_schedule=linear
    missing_eos_penalty=0.0 loss=ipo beta=0.3
rlaif | steps=60 lr=0.0002 tokenizer= save_every=50 n_layer=4 n_head=4 n_embd=128 constitution=
    judge= clamp=0.0 revisions=2 answers=1024 comparisons=2048 skill_steps=900 skill_lr=0.004
    sl_steps=100 sl_lr=0.001 pm_steps=150 pm_lr=0.001 group=4 beta=0.05 missing_eos_penalty=1.0
    temperature=1.0
"""
ROWS = [row.split("|") for row in EFFECTIVE.replace("\n    ", " ").strip().splitlines()]
ROWS = {command.strip(): row for command, row in ROWS}
PATHS = "task init reward".split()  # as the command line says them


def read(command):
    """-> the options of a command, without "python" and ".py"."""
    script, *argv = command.split()
    module = import_module(script)
    return parse(module.Options, argv, module.PRESETS)


def table(text):
    return dict(word.split("=") for word in text.split())


@pytest.fixture(autouse=True)
def without_a_hub(monkeypatch):
    monkeypatch.setattr("hf.hub.fetch", lambda name, files: name)


@pytest.mark.parametrize("command", ROWS)
def test_effective_options(command, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", bool)  # its package may be missing
    script, *argv = command.split()
    expected = {f.name: str(f.default) for f in fields(import_module(script).Options)}
    expected |= table(COMMON) | table(ROWS[script]) | table(ROWS[command])
    expected |= {name: argv[argv.index(flag(name)) + 1] for name in PATHS if flag(name) in argv}
    found = {name: str(x) for name, x in asdict(read(command)).items()}
    assert found == {"task": "reviews"} | expected


def documented(path, end="`#\n|"):
    """-> the commands in a text, "dpo --beta 0.1", without their comments"""
    found = re.findall(rf"python (\w+)\.py((?: (?! )[^{end} ]+)*)", path.read_text())
    return [script + arguments for script, arguments in found if script in METHODS]


@pytest.mark.parametrize(
    "path", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=str
)
def test_every_command_of_the_docs_stands_in_the_table(path):
    if path.name == "add-a-method.md":
        return  # its script is an example
    unknown = set(documented(path)) - set(ROWS)
    assert not unknown


@pytest.mark.parametrize("script", METHODS)
def test_every_command_of_a_docstring_parses(script):
    found = documented(ROOT / f"{script}.py")
    assert found
    for command in found:
        assert read(command)


@pytest.mark.parametrize("script", METHODS)
def test_every_option_is_read_and_explained(script, capsys, monkeypatch):
    module = import_module(script)
    files = [ROOT / f"{script}.py", ROOT / "evaluate.py", *(ROOT / "training").glob("*.py")]
    source = "".join(path.read_text() for path in [*files, *(ROOT / "data").glob("*.py")])
    assert main(script, "--help-all") == 0
    said = capsys.readouterr().out
    assert module.__doc__.strip() in said
    text = " ".join(said.split())
    for f in fields(module.Options):
        assert re.search(rf"\bo\.{f.name}\b", source), f"{flag(f.name)} is never read"
        assert re.search(rf" --(no-)?{flag(f.name)[2:]} ", text) and f.metadata["help"] in text


@pytest.mark.parametrize("script", [*METHODS, "evaluate", "export", "compare"])
def test_the_help_fits_a_screen_of_80_columns(script, capsys):
    """It has the title, the equations and the method's own options; of a switch, the form that
    changes the default."""
    module = import_module(script)
    assert main(script, "--help") == 0
    said = capsys.readouterr().out
    wide = [line for line in said.splitlines() if len(line) > 80]
    assert not wide and len(said.splitlines()) <= 90
    assert module.__doc__.split()[0] in said and "--help-all" in said
    squeezed, equations = "".join(said.split()), module.__doc__.split("\n\n    paper")[0]
    for line in equations.splitlines() if script in METHODS else ():
        assert "".join(line.split()) in squeezed
    shared = " ".join(GROUPS.values()).split() if script in METHODS else ()
    for name in module.Options.__annotations__.keys() - set(shared):
        assert re.search(rf"^  (--(no-)?)?{flag(name)[2:].replace('-', '[-_]')}\b", said, re.M), (
            name
        )
    if script == "dapo":
        assert "  --no-overlong " in said and "  --overlong-filter " in said


@pytest.mark.parametrize(
    "argv, near",
    [("--bata 1", "--beta"), ("--learning-rate 1e-4", "--lr"), ("--num_epochs=3", "--epochs"),
     ("--per-device-batch-size 4", "--batch-size"), ("--output-dir x", "--out"),
     ("--max-length 8", "--block-size"), ("--model x", "--init"), ("--no-chatt", "--no-chat")],
)  # fmt: skip
def test_an_unknown_option_names_the_nearest(argv, near):
    said = refused("dpo", *argv.split())
    assert said.endswith(
        f"unrecognized arguments: {argv}; did you mean {near}? (--help lists the options)"
    )
    assert "did you mean" not in refused("dpo", "--zzzzzz", "3")


HELPS = """
dpo | 1/nats; IPO's τ (default: 0.1; exact: 0.5; loss=ipo: 1.0; loss=norm: 5.0; exact loss=ipo: 0.3
dpo | π_ref and comparisons (default: the start) --
dpo | with a file: one epoch (default: 150; exact: 2000)
dpo | --no-chat turns off: read a plain prompt as a user message, if there is a chat template
dapo | --no-overlong turns off: add R_len to the reward (exact: off)
dpo | α: adapters are scaled by α/r (default: that of --lora)
dpo | --template-args S ... for the chat template, such as enable_thinking=false
compare | blocks of the model (default: the task's) --
"""
HELPS = [row.split(" | ") for row in HELPS.strip().splitlines()]


@pytest.mark.parametrize("script, words", HELPS)
def test_the_help_names_defaults_and_those_of_variants(script, words, capsys):
    assert main(script, "--help-all") == 0
    assert words in " ".join(capsys.readouterr().out.split())


def test_a_home_in_a_path_is_found_even_if_no_shell_has_read_it(monkeypatch):
    """As in --init=~/x, and in what a program starts; a prompt is no path."""
    monkeypatch.setenv("HOME", "/home/me")
    o = parse(import_module("dpo").Options, ["--init=~/a.pt", "--task", "~/b.jsonl", "--out=c~/d"])
    assert (o.init, o.task, o.out) == ("/home/me/a.pt", "/home/me/b.jsonl", "c~/d")
    o = parse(import_module("evaluate").Options, ["~/a.pt", "--prompt", "~/b"])
    assert (o.checkpoint, o.prompt) == ("/home/me/a.pt", "~/b")
    with pytest.raises(UserError, match="--records /home/me/c is not the record"):
        parse(import_module("compare").Options, ["--records", "~/c"])


def refused(script, *argv):
    """-> what the command line's mistake is called"""
    module = import_module(script)
    with pytest.raises(UserError) as e:
        parse(module.Options, list(argv), module.PRESETS)
    return str(e.value)


WORDS = {"low": "at least", "high": "at most", "above": "more than", "below": "less than"}


@pytest.mark.parametrize("script", METHODS)
def test_numbers_have_bounds(script):
    """Each bound is admitted or refused as its name says, and so are other types of number."""
    for f in fields(import_module(script).Options):
        name, rules = flag(f.name), f.metadata
        tried = [("x", "invalid choice: 'x'")] if "choices" in rules else []
        if f.type in (int, float):
            kind = "whole number" if f.type is int else "number"
            others = ("many", "nan", "inf", "1.5")[: 4 if f.type is int else 3]
            tried = [(x, f"must be a {kind}, not '{x}'") for x in others]
            assert WORDS.keys() & rules, f"{name} has no bounds"
        for bound in WORDS.keys() & rules:
            x = rules[bound] + {"low": -1, "high": 1}.get(bound, 0)
            tried.append((str(x), f"must be {WORDS[bound]} {rules[bound]}, not {x}"))
        for x, words in tried:
            assert f"{name}: {words}" in refused(script, name, x)


READ_ONLY = """
dpo --name a | --out x.pt | without --out only
sft --n-layer 2 | --init x.pt | without --init only
sft --tokenizer a.tiktoken | --init x.pt | without --init only
orpo --n-head 2 --tokenizer a.tiktoken | --init x.pt | without --init only
rlaif --n-embd 64 --tokenizer a.tiktoken | --init x.pt | without --init only
rlaif --skill-steps 9 | --init x.pt | without --init only
rlaif --skill-lr 9 | --init x.pt | without --init only
dpo --label-smoothing 0.2 | --loss ipo | with --loss dpo or robust or norm only, not with ipo
dpo --length-penalty 0.3 | --loss norm | with --loss dpo only, not with norm
dpo --loss ipo --ipo-sum | --loss dpo | with --loss ipo only, not with dpo
dpo --loss ipo --ipo-sum | --loss robust | with --loss ipo only, not with robust
ppo --missing-eos-penalty 1 | --reward task | with --reward rm or *.pt only, not with task
ppo --missing-eos-penalty 1 --reward x.pt | --reward a.py:f | only, not with a.py:f
grpo --ratio seq | --clip weight | with --clip ratio only, not with weight
grpo --beta 1 --kl k3-ratio | --kl none | with --kl k3 or k3-ratio or reward only, not with none
grpo --beta 1 --kl reward | --kl none | with --kl k3 or k3-ratio or reward only, not with none
online_dpo --rounds 3 --ref-update per-round | --lora 8 | with --lora 0 only, not with 8
dapo --overlong-cache 9 | --no-overlong | with --overlong only
distill --loss jsd --jsd-beta 0.1 | --loss forward | with --loss jsd only, not with forward
distill --answers 0.5 | --loss sampled | reverse or forward or jsd only, not with sampled
online_dpo --loss ipo --ipo-sum | --loss dpo | with --loss ipo only, not with dpo
online_dpo --missing-eos-penalty 1 --reward rm | --reward task | rm or *.pt only, not with task
"""
READ_ONLY = [row.split(" | ") for row in READ_ONLY.strip().splitlines()]


@pytest.mark.parametrize("command, other, words", READ_ONLY)
def test_an_option_that_the_variant_does_not_read_is_refused(command, other, words):
    """It is taken with the variants that read it, and refused with the others."""
    assert read(command).given
    script, *argv = f"{command} {other}".split()
    said = refused(script, *argv)
    named = [word for word in argv if said.startswith(f"{word} is read with")]
    assert named and words in said and said.endswith("; leave one of the two out")


@pytest.mark.parametrize("script", METHODS)
def test_every_option_of_a_variant_is_tried(script):
    rows = " ".join(command for command, *_ in READ_ONLY if command.startswith(f"{script} "))
    for f in fields(import_module(script).Options):
        shape = f.name in ("n_layer", "n_head", "n_embd")  # one of them will do
        tried = flag(f.name) in rows or shape and rows or f.name == "name"  # which all have
        assert "only" not in f.metadata or tried


def test_every_torchrun_of_the_docs_parses(monkeypatch):
    monkeypatch.setattr(distributed, "many", True)
    monkeypatch.setattr(distributed, "size", 2)
    monkeypatch.setattr("torch.__version__", "2.8.0")  # the least that has --shard
    text = (ROOT / "docs/scaling.md").read_text()
    found = re.findall(r"^torchrun .*? (\w+)\.py (.*)$", text, re.M)
    assert len(found) > 2
    for script, arguments in found:
        assert read(f"{script} {arguments}")

"""The two sides of analysis.parity: a script's own `main`, and `train` of a trainer of TRL.

Both read one folder: a small GPT-2 of random weights in float64, a reference, a reward model, and a
tokenizer of letters. Both read the same rows, in order. If a method samples, the script samples,
and the trainer is handed the same tokens. No loss is written here, and none is changed. TRL has no
PPO: there analysis/derived_ppo.py is the other side.
"""

import contextlib
import importlib
import json
import string
from pathlib import Path
from statistics import fmean
from unittest.mock import patch

import torch
from torch.nn.utils.rnn import pad_sequence

from analysis.against_trl import derived_ppo, trainers
from analysis.against_trl.steps import Steps, in_order, quiet
from gpt import GPTConfig, ScalarGPT
from hf import weights
from training import Run, locks, sampling

LETTERS = string.ascii_lowercase
END, PAD = 0, 1  # token ids; the letters come after them
SIZES = GPTConfig(vocab_size=28, block_size=32, n_layer=2, n_head=2, n_embd=16)
LONGEST = 8  # tokens of a response
REFERENCED = ("dpo", "kto", "grpo", "online_dpo", "ppo")  # the scripts that get a reference
GROUPED = ("GRPO", "RLOO", "Distillation")  # the trainers whose prompts have many responses
REWARDS = {  # a script that samples -> its reward
    "grpo": "letters",
    "dapo": "verdict",
    "online_dpo": "letters",
    "ppo": "a reward model",
}
# Nothing is clipped: a clipped gradient does not show that it is twice too large.
OURS = "--lr 0.003 --lr-schedule constant --warmup 0 --grad-clip 1000"
OURS += " --dtype float64 --device cpu --eval-prompts 1 --log-every 1"
THEIRS = trainers.SETTINGS | dict(
    learning_rate=0.003,
    max_grad_norm=1000,
    optim="adamw_torch",
    adam_beta2=0.95,
    logging_strategy="steps",
    logging_steps=1,
)
ALIASES = {  # what the table calls a setting -> its name in TRL
    "batch": "per_device_train_batch_size",
    "accumulation": "gradient_accumulation_steps",
    "updates": "num_iterations",
}


# ---- what both read


def write(folder):
    """Writes folder/policy, folder/reference and folder/reward."""
    with quiet(), torch.no_grad():
        for seed, name in ((7, "policy"), (6, "reference"), (5, "reward")):
            torch.manual_seed(seed)
            model = trainers.gpt2(SIZES, END, PAD, scores=name == "reward").double()
            for p in model.parameters():
                p += 0.2 * torch.randn_like(p)
            if name != "reward":  # some responses end, and none draws padding
                last, words = model.transformer.ln_f, model.transformer.wte.weight
                last.weight[0], last.bias[0] = 0, 1
                words[END, 0], words[PAD, 0] = 2, -40
            model.save_pretrained(Path(folder, name))
            tokenizer().save_pretrained(Path(folder, name))


def tokenizer(pad="<pad>"):
    """-> a token for each letter, one that ends, one that pads"""
    return trainers.tokenizer(["<end>", "<pad>", *LETTERS], between="", pad=pad)


def rows(script, needs=""):
    """-> the rows of a script: 12, or 4 prompts of 4 letters. needs: words. margin: pairs have one.
    twins: two rows in turn have one prompt. ragged: prompts have many lengths."""
    columns, draws, found = trainers.COLUMNS[script], torch.Generator().manual_seed(0), []
    lengths = (3, 6, 4) if columns or "ragged" in needs else (4,)

    def text(length):
        return "".join(LETTERS[i] for i in torch.randint(26, (length,), generator=draws).tolist())

    for i in range(12 if columns else 4):
        row = {"prompt": text(lengths[i % len(lengths)])}
        for column in columns:
            row[column] = text(2 + int(torch.randint(8, (1,), generator=draws)))
        if "label" in columns:
            row["label"] = i % 3 != 1
        if "margin" in needs:
            row["margin"] = 0.25 * (i % 4)
        if "twins" in needs and i % 2:
            row["prompt"] = found[-1]["prompt"]
        found.append(row)
    return found


def letters(completion):
    """A reward: the mean place of a completion's letters in the alphabet, from 0 to 1"""
    return sum(map(LETTERS.find, completion)) / (25 * max(1, len(completion)))


def verdict(completion):
    """A reward of two values, for DAPO"""
    return 1.0 if letters(completion) > 0.5 else -1.0


# ---- our side


def ours(command, data, folder, other_sampler=False):
    """Runs a script on the rows. -> its Steps, and the Rollout that it was trained on, or None.
    other_sampler: the Rollout's log-probs are not the policy's"""
    name, *argv = command.split()
    script, steps, drawn = importlib.import_module(name), Steps(), []
    adamw, sample = Run.adamw, sampling.sample

    def watched(run, *models):
        optimizer = adamw(run, *models)
        steps.watch(optimizer, lambda: gradients(*models))
        return optimizer

    def kept(*args, **how):
        rollout = sample(*args, **how)
        if other_sampler:
            rollout |= {"logp": rollout.logp + 0.1 * torch.sin(7 * rollout.logp) * rollout.mask}
        drawn.append(rollout)
        return rollout

    with contextlib.ExitStack() as stack:
        stack.enter_context(quiet())
        stack.enter_context(in_order())
        stack.enter_context(steps.watching_losses())
        stack.enter_context(locks.given_back())
        stack.enter_context(patch.object(Run, "adamw", watched))
        stack.enter_context(patch.object(Run, "finish", lambda *_, **__: None))  # no evaluation
        stack.enter_context(patch("training.sampling.sample", kept))
        script.main([*arguments(name, data, folder), *argv])
    lines = Path(folder, "ours.jsonl").read_text().splitlines()
    steps.logged([line for line in map(json.loads, lines) if "step" in line])
    return steps, drawn[-1] if drawn else None


def arguments(script, data, folder):
    """Writes the rows. -> what a script gets beside the options of the comparison"""
    file = f"{folder}/rows.jsonl"
    Path(file).write_text("\n".join(map(json.dumps, data)))
    found = ["--task", file, "--eval-file", file, "--batch-size", str(len(data)), *OURS.split()]
    found += ["--init", f"{folder}/policy", "--out", f"{folder}/ours.pt"]
    if script == "distill":
        found += ["--teacher", f"{folder}/reference", "--max-new-tokens", str(LONGEST)]
    if script in REFERENCED:
        found += ["--reference", f"{folder}/reference"]
    if judge := REWARDS.get(script):
        judge = f"{folder}/reward" if judge == "a reward model" else f"{__file__}:{judge}"
        found += ["--reward", judge, "--max-new-tokens", str(LONGEST)]
    return found


def gradients(*models):
    """-> {a weight's name in transformers: its gradient, as the weight stands there}; of a second
    model, PPO's critic, the names begin with "critic." """
    found = {}
    for prefix, model in zip(("", "critic."), models):
        for name, p in model.named_parameters():
            if name != "head.bias":  # transformers' head has none
                (theirs,) = weights.theirs(name, model.config)
                grad = p.grad.T if weights.transposed(name, model.config) else p.grad
                found[prefix + theirs] = grad.clone()
    return found


# ---- TRL's side


def theirs(command, data, folder, steps, rollout=None):
    """Trains so many steps with a trainer of TRL on the rows. -> its Steps

    command: the trainer, and settings of its config as name=value. Two are not the config's: `pad`,
    the token that pads, and `reward`, names joined by +. rollout: what the script has sampled."""
    from datasets import Dataset
    from transformers import GPT2LMHeadModel

    kind, *given = command.split()
    if kind == "derivation":
        with quiet():
            return derived_ppo.train(Steps(), rollout, folder, **dict(map(setting, given)))
    found = Steps()
    Trainer, Config = trainers.trainer(kind)
    settings = THEIRS | {"output_dir": f"{folder}/theirs", "max_steps": steps}
    settings["per_device_train_batch_size"] = len(data)
    if kind in GROUPED:
        settings["per_device_train_batch_size"] = len(rollout)
        if kind == "Distillation":  # it has no groups
            data = [row for row in data for _ in range(len(rollout) // len(data))]
        else:
            settings["num_generations"] = len(rollout) // len(data)
        settings["max_completion_length"] = LONGEST
    settings |= dict(map(setting, given))
    words = tokenizer(settings.pop("pad", "<pad>"))
    rewards = settings.pop("reward", "letters").split("+")

    with quiet(), in_order():
        policy, reference = (
            GPT2LMHeadModel.from_pretrained(f"{folder}/{name}") for name in ("policy", "reference")
        )
        policy = scalar(policy, words, folder) if kind == "Reward" else policy
        given = {"train_dataset": Dataset.from_list(data)}
        if kind in trainers.WITH_REFERENCE:
            given["ref_model"] = reference
        if kind == "Distillation":
            given["teacher_model"] = reference
        elif rollout:
            given["reward_funcs"] = list(map(reward, rewards))
        args = Config(**settings)
        trainer = Trainer(model=policy, args=args, processing_class=words, **given)
        if rollout:
            hand_over(kind, trainer, rollout, reference)
        named = dict(policy.named_parameters())
        optimizer = trainer.create_optimizer()
        found.watch(optimizer, lambda: {name: p.grad.clone() for name, p in named.items()})
        with found.watching_losses():
            trainer.train()
    found.logged(trainer.state.log_history)
    found.figures["loss"] = fmean(loss for loss, _ in found)
    if kind in ("GRPO", "RLOO") and "kl" in found.figures:  # of a token; ours: of a response
        found.figures["kl"] *= found.figures["completions/mean_length"]
    return found


def setting(text):
    """name=value -> (name, value); a value with a comma is a list"""
    name, _, value = text.partition("=")
    values = [number(x) for x in value.split(",")]
    return ALIASES.get(name, name), values if len(values) > 1 else values[0]


def number(text):
    """-> the number or the truth value that a text means, or the text"""
    with contextlib.suppress(ValueError):
        return float(text) if "." in text else int(text)
    return {"True": True, "False": False}.get(text, text)


def reward(name):
    """-> as TRL wants it, a reward of a script, or TRL's own for long responses"""
    if name == "overlong":
        from trl.rewards import get_soft_overlong_punishment

        return get_soft_overlong_punishment(LONGEST, 4)
    of_one = {"letters": letters, "verdict": verdict}[name]
    return lambda completions, **_: [of_one(x) for x in completions]


def scalar(policy, words, folder):
    """-> the reward model that reward_model.py starts from: the policy's trunk with its own head"""
    from transformers import GPT2ForSequenceClassification

    policy.config.num_labels, policy.config.pad_token_id = 1, words.pad_token_id
    model = GPT2ForSequenceClassification(policy.config).double()
    model.transformer = policy.transformer
    trunk = weights.load(f"{folder}/policy")[0]
    model.score.weight.data = ScalarGPT(trunk.config, trunk=trunk).head.weight.data.double()
    return model


def hand_over(kind, trainer, rollout, reference):
    """Where the trainer would sample, it takes the script's responses, a prompt's in the order in
    which the script has drawn them, and GRPO their log-probs, as if they came from vLLM. GRPO and
    RLOO make a reference of their own: it gets the weights of ours."""
    responses, logps = {}, {}
    for ids, mask, logp in zip(rollout.ids, rollout.mask, rollout.logp):
        prompt = tuple(ids[: mask.int().argmax()].tolist())
        responses.setdefault(prompt, []).append(ids[mask].tolist())
        logps.setdefault(prompt, []).append(logp[mask].tolist())

    def taken(prompts, responses=responses):
        left = {prompt: iter(found) for prompt, found in responses.items()}
        return [next(left[tuple(prompt)]) for prompt in prompts]

    def padded(model, prompts, images):
        """Online DPO: the first answer to each prompt, then the second"""
        prompts = 2 * trainer.processing_class(prompts)["input_ids"]
        answers = [torch.tensor(x) for x in taken(prompts)]
        ids = pad_sequence(answers, batch_first=True, padding_value=PAD)
        mask = pad_sequence([torch.ones_like(x) for x in answers], batch_first=True)
        prompts = torch.tensor(prompts)
        return prompts, torch.ones_like(prompts), ids, mask, None

    if kind == "OnlineDPO":
        trainer._generate = padded
    elif kind in ("RLOO", "Distillation"):
        trainer._generate_single_turn = lambda prompts, *_: taken(prompts)
    else:
        trainer._generate_single_turn = lambda prompts, *_: (taken(prompts), taken(prompts, logps))
        trainer.use_vllm = "truncate" in trainer.args.vllm_importance_sampling_mode
    if kind in ("GRPO", "RLOO") and trainer.beta:
        trainer.ref_model.load_state_dict(reference.state_dict())

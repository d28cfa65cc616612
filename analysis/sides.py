"""The two sides of analysis.parity: a script's own `main`, and `train` of a trainer of TRL.

Both read one folder: a small GPT-2 of random weights in float64, a reference, a reward model, and a
tokenizer of letters. Both read the same rows, in order. If a method samples, the script samples,
and the trainer is handed the same tokens. No loss is written here, and none is changed. TRL has no
PPO: there analysis/derived_ppo.py is the other side.
"""

import contextlib
import importlib
import io
import json
import string
import warnings
from pathlib import Path
from statistics import fmean
from unittest.mock import patch

import torch
from torch.nn.utils.rnn import pad_sequence

from analysis import derived_ppo
from gpt import ScalarGPT
from hf import weights
from training import Run, locks, sampling

END, PAD = 0, 1  # token ids; the letters come after them
SIZES = dict(vocab_size=28, n_positions=32, n_layer=2, n_head=2, n_embd=16)
LONGEST = 8  # tokens of a response
SCRIPTS = {  # a script -> the columns of its rows beside the prompt, has it a reference, its reward
    "sft": ("completion", False, None),
    "reward_model": ("chosen rejected", False, None),
    "dpo": ("chosen rejected", True, None),
    "simpo": ("chosen rejected", False, None),
    "orpo": ("chosen rejected", False, None),
    "kto": ("completion label", True, None),
    "grpo": ("", True, "letters"),
    "dapo": ("", False, "verdict"),
    "online_dpo": ("", True, "letters"),
    "ppo": ("", True, "a reward model"),
}
# Nothing is clipped: a clipped gradient does not show that it is twice too large.
OURS = "--lr 0.003 --lr-schedule constant --warmup 0 --grad-clip 1000"
OURS += " --dtype float64 --device cpu --eval-prompts 1 --log-every 1"
THEIRS = dict(
    **dict(learning_rate=0.003, lr_scheduler_type="constant", max_grad_norm=1000),
    **dict(optim="adamw_torch", adam_beta2=0.95, gradient_checkpointing=False),
    **dict(use_cpu=True, bf16=False, save_strategy="no", report_to="none"),
    **dict(logging_strategy="steps", logging_steps=1, disable_tqdm=True),
)
MODULES = {  # of a trainer that is not in trl itself
    "CPO": "trl.experimental.cpo",
    "ORPO": "trl.experimental.orpo",
    "OnlineDPO": "trl.experimental.online_dpo",
}
ALIASES = {  # what the table calls a setting -> its name in TRL
    "batch": "per_device_train_batch_size",
    "accumulation": "gradient_accumulation_steps",
    "updates": "num_iterations",
}
NAMES = {  # TRL's name of a figure -> ours
    "learning_rate": "lr",
    "objective/scores": "reward",
    "objective/scores_margin": "reward_margin",
    "objective/kl": "kl",
}


# ---- what both read


def write(folder):
    """Writes folder/policy, folder/reference and folder/reward."""
    from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel

    no_dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    ids = dict(bos_token_id=None, eos_token_id=END, pad_token_id=PAD)
    for seed, name in ((7, "policy"), (6, "reference")):
        torch.manual_seed(seed)
        model = GPT2LMHeadModel(GPT2Config(**SIZES, **no_dropout, **ids)).double()
        with torch.no_grad(), quiet():
            for p in model.parameters():
                p += 0.2 * torch.randn_like(p)
            last, words = model.transformer.ln_f, model.transformer.wte.weight
            last.weight[0], last.bias[0] = 0, 1
            words[END, 0], words[PAD, 0] = 2, -40  # some responses end, and none draws padding
            model.save_pretrained(Path(folder, name))
            tokenizer().save_pretrained(Path(folder, name))
    config = GPT2Config(**SIZES, **no_dropout, **ids, num_labels=1)
    with quiet():
        judge = GPT2ForSequenceClassification(config).double()
        with torch.no_grad():
            for p in judge.parameters():
                p += 0.2 * torch.randn_like(p)
        judge.save_pretrained(Path(folder, "reward"))
        tokenizer().save_pretrained(Path(folder, "reward"))


def tokenizer(pad="<pad>"):
    """-> a token for each letter, one that ends, one that pads"""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {x: i for i, x in enumerate(["<end>", "<pad>", *string.ascii_lowercase])}
    found = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    found.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    found.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=found, eos_token="<end>", pad_token=pad)


def rows(script, needs=""):
    """-> the rows of a script: 12, or 4 prompts of 4 letters. needs: words. margin: pairs have one.
    twins: two rows in turn have one prompt. ragged: prompts have many lengths."""
    columns, draws, found = SCRIPTS[script][0].split(), torch.Generator().manual_seed(0), []
    lengths = (3, 6, 4) if columns or "ragged" in needs else (4,)

    def text(length):
        ids = torch.randint(26, (length,), generator=draws).tolist()
        return "".join(string.ascii_lowercase[i] for i in ids)

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
    return sum(map(string.ascii_lowercase.find, completion)) / (25 * max(1, len(completion)))


def verdict(completion):
    """A reward of two values, for DAPO"""
    return 1.0 if letters(completion) > 0.5 else -1.0


# ---- how a side is watched


class Steps(list):
    """One entry per optimizer step: (the loss that was differentiated, {a weight's name in
    transformers: its gradient}). Torch itself is asked, on both sides alike. figures: {a figure
    that the side has logged, under our name: its mean over the run}."""

    def __init__(self):
        self.losses = []  # since the last step; several if there are micro-batches
        self.figures = {}

    def logged(self, lines):
        """Takes what the side has logged: dicts, each of an optimizer step or of a rollout."""
        for name in {name for line in lines for name in line} - {"step"}:
            found = [line[name] for line in lines if isinstance(line.get(name), (int, float))]
            if found:
                self.figures[NAMES.get(name, name)] = fmean(found)

    def watch(self, optimizer, gradients):
        def before(*_):
            self.append((sum(self.losses), gradients()))
            self.losses.clear()

        optimizer.register_step_pre_hook(before)

    @contextlib.contextmanager
    def watching_losses(self):
        backward = torch.Tensor.backward

        def noted(loss, *rest, **more):
            self.losses.append(loss.item())
            return backward(loss, *rest, **more)

        with patch.object(torch.Tensor, "backward", noted):
            yield


@contextlib.contextmanager
def in_order():
    """Within it neither side shuffles anything."""
    same, nothing = (lambda n, **_: torch.arange(n)), (lambda self, x: None)
    with patch("torch.randperm", same), patch("random.Random.shuffle", nothing):
        yield


@contextlib.contextmanager
def quiet():
    nowhere = io.StringIO()
    with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield


# ---- our side


def ours(command, data, folder):
    """Runs a script on the rows. -> its Steps, and the Rollout that it was trained on, or None"""
    name, *argv = command.split()
    script, steps, drawn = importlib.import_module(name), Steps(), []
    adamw, sample = Run.adamw, sampling.sample

    def watched(run, *models):
        optimizer = adamw(run, *models)
        steps.watch(optimizer, lambda: gradients(*models))
        return optimizer

    def kept(*args, **how):
        drawn.append(sample(*args, **how))
        return drawn[-1]

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
    """Writes the rows. -> what a script is told beside the options of the comparison"""
    _, has_reference, judge = SCRIPTS[script]
    file = f"{folder}/rows.jsonl"
    Path(file).write_text("\n".join(map(json.dumps, data)))
    found = ["--task", file, "--eval-file", file, "--batch-size", str(len(data)), *OURS.split()]
    found += ["--init", f"{folder}/policy", "--out", f"{folder}/ours.pt"]
    if has_reference:
        found += ["--reference", f"{folder}/reference"]
    if judge:
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

    kind, *told = command.split()
    if kind == "derivation":
        with quiet():
            return derived_ppo.train(Steps(), rollout, folder, **dict(map(setting, told)))
    module, found = importlib.import_module(MODULES.get(kind, "trl")), Steps()
    settings = THEIRS | {"output_dir": f"{folder}/theirs", "max_steps": steps}
    settings["per_device_train_batch_size"] = len(data)
    if kind in ("GRPO", "RLOO"):
        settings["per_device_train_batch_size"] = len(rollout)
        settings["num_generations"] = len(rollout) // len(data)
        settings["max_completion_length"] = LONGEST
    settings |= dict(map(setting, told))
    words = tokenizer(settings.pop("pad", "<pad>"))
    rewards = settings.pop("reward", "letters").split("+")

    with quiet(), in_order():
        policy, reference = (
            GPT2LMHeadModel.from_pretrained(f"{folder}/{name}") for name in ("policy", "reference")
        )
        policy = scalar(policy, words, folder) if kind == "Reward" else policy
        given = {
            "model": policy,
            "processing_class": words,
            "train_dataset": Dataset.from_list(data),
        }
        if kind in ("DPO", "KTO", "OnlineDPO"):
            given["ref_model"] = reference
        if rollout:
            given["reward_funcs"] = list(map(reward, rewards))
        config = getattr(module, f"{kind}Config")(**settings)
        trainer = getattr(module, f"{kind}Trainer")(args=config, **given)
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
    which the script has drawn them. GRPO and RLOO make a reference of their own: it gets the
    weights of ours."""
    responses = {}
    for ids, mask in zip(rollout.ids, rollout.mask):
        prompt = tuple(ids[: mask.int().argmax()].tolist())
        responses.setdefault(prompt, []).append(ids[mask].tolist())

    def taken(prompts):
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
    elif kind == "RLOO":
        trainer._generate_single_turn = lambda prompts, *_: taken(prompts)
    else:
        trainer._generate_single_turn = lambda prompts, *_: (taken(prompts), None)
    if kind != "OnlineDPO" and trainer.beta:
        trainer.ref_model.load_state_dict(reference.state_dict())

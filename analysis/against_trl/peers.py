"""The same shapes in TRL and transformers, for analysis.bench.

A GPT-2 with random weights and without dropout; rows of one length, so that there is no padding;
float32, fused AdamW, gradients clipped at 1. What a step holds is counted as for our scripts.
"""

import itertools
import statistics
import tempfile
import time

import torch

from analysis.against_trl import trainers
from gpt import GPTConfig
from training import memory

PAD, END = 0, 1  # token ids
SHAPES = {  # a script -> TRL's trainer, what its config gets
    "sft": ("SFT", dict(completion_only_loss=True, packing=False)),
    "reward_model": ("Reward", {}),
    "dpo": ("DPO", {}),
    "simpo": ("CPO", dict(loss_type="simpo", cpo_alpha=0.0)),
    "orpo": ("ORPO", {}),
    "kto": ("KTO", {}),
    "grpo": ("GRPO", dict(beta=0.0, temperature=1.0)),
    "generate": (),
}


def model(config, scores=False):
    """-> GPT-2 of transformers, of the sizes of a GPTConfig"""
    torch.manual_seed(0)
    return trainers.gpt2(config, END, PAD, scores)


def tokenizer(size, ends):
    """-> words t0, t1, … as tokens, by number. ends: whether the model may draw the end, which is
    outside of its vocabulary otherwise"""
    words = [f"t{i}" for i in range(size)] + ["<end>"]
    if ends:
        words[END] = words.pop()
    return trainers.tokenizer(words, between=" ", pad=words[PAD])


def rows(job, n):
    """Yields n rows as TRL's trainer of the job wants them; it adds the end tokens."""
    draws, size = torch.Generator().manual_seed(0), job["config"][0]

    def words(count):
        return " ".join(f"t{i}" for i in torch.randint(2, size, (count,), generator=draws).tolist())

    for i in range(n):
        row = {"prompt": words(job["prompt"])}
        for column in trainers.COLUMNS[job["name"]]:
            row[column] = i % 2 == 0 if column == "label" else f" {words(job['response'] - 1)} "
        yield row


def rewards(completions, **columns):
    """They differ within every group."""
    return [float(i) for i in range(len(completions))]


def step(job, now=time.process_time, **also):
    """Trains with TRL. -> CPU ms of a step, bytes at its peak. now: gives the time, in seconds;
    also: settings besides"""
    from datasets import Dataset

    name, config = job["name"], GPTConfig(*job["config"])
    kind, more = SHAPES[name]
    texts = 2 if "chosen" in trainers.COLUMNS[name] else 1  # of a row
    batch = job["sequences"] // texts
    given = {"train_dataset": Dataset.from_list(list(rows(job, batch * (job["steps"] + 1))))}
    if kind == "GRPO":
        group = job["command"].index("--group") + 1
        more = more | {"num_generations": int(job["command"][group]), "max_length": None}
        given["reward_funcs"] = rewards
    if kind in trainers.WITH_REFERENCE:
        given["ref_model"] = model(config)
    policy = model(config, scores=kind == "Reward")
    words = tokenizer(config.vocab_size, ends=kind != "GRPO")
    clock = stopwatch(now)
    Trainer, Config = trainers.trainer(kind)
    with tempfile.TemporaryDirectory() as folder:
        how = settings(job, folder, batch) | more | also
        known = Config.__dataclass_fields__
        args = Config(**{k: v for k, v in how.items() if k in known})
        trainer = Trainer(model=policy, args=args, processing_class=words, **given)
        clock.ref = getattr(trainer, "ref_model", None)
        trainer.add_callback(clock)
        trainer.train()
    seconds = [b - a for a, b in itertools.pairwise(clock.marks)]
    return {"ms": 1000 * statistics.median(seconds), "bytes": clock.tracker.peak}


def settings(job, folder, batch):
    """-> what TRL's configs get of a job; each takes what it knows"""
    return trainers.SETTINGS | dict(
        output_dir=folder,
        max_steps=job["steps"],
        per_device_train_batch_size=batch,
        learning_rate=1e-5,
        optim="adamw_torch_fused",
        max_length=job["prompt"] + job["response"],
        max_completion_length=job["response"],
        disable_dropout=True,
        logging_strategy="no",
    )


def stopwatch(now):
    """-> a callback that marks the ends of steps, and counts the bytes of the second one"""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        tracking = ref = None
        marks = []

        def on_step_begin(self, args, state, control, model=None, optimizer=None, **rest):
            if state.global_step == 1:  # AdamW's moments are there
                held = {"policy": model, "ref": self.ref}
                held = {role: x for role, x in held.items() if x is not None}
                while hasattr(optimizer, "optimizer"):
                    optimizer = optimizer.optimizer
                self.tracking = memory.track(held, optimizer)
                self.tracker = self.tracking.__enter__()

        def on_step_end(self, args, state, control, **rest):
            if self.tracking:
                self.tracking.__exit__(None, None, None)
                self.tracking = None
                self.marks.clear()
            self.marks.append(now())

    return Clock()


@torch.no_grad()
def end_often(bias, embedding):
    """Makes the end so likely that responses to a prompt of the bench have 24 tokens on average, of
    96 at most. Its logit is about 3.3 above the others', of which there are some 750."""
    bias[0] = 4.0
    embedding[END, 0] += 0.82


def generator(config, job):
    """-> a function that draws with transformers, and tells how many tokens"""
    policy = model(config).eval()
    if job["ends"]:
        end_often(policy.transformer.ln_f.bias, policy.transformer.wte.weight)
    ids = torch.randint(2, config.vocab_size, (job["prompts"], job["prompt"]))
    ids = ids.repeat_interleave(job["group"], 0)
    how = dict(do_sample=True, top_k=0, max_new_tokens=job["response"], pad_token_id=PAD)
    how |= dict(eos_token_id=END if job["ends"] else None, attention_mask=torch.ones_like(ids))

    @torch.inference_mode()
    def draw():
        ended = policy.generate(ids, **how)[:, job["prompt"] :] == END
        if not job["ends"]:
            return ended.numel()
        return (ended.cumsum(1) - ended.int() == 0).sum()

    return draw

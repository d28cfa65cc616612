"""The same shapes in TRL and transformers, for analysis.bench.

A GPT-2 with random weights and without dropout; rows of one length, so that there is no padding;
float32, fused AdamW, gradients clipped at 1. What a step holds is counted as for our scripts.
"""

import importlib.util
import itertools
import statistics
import tempfile
import time

import torch

from data import UserError
from training import memory

SHAPES = {  # a script -> TRL's trainer, its module, what its config is told
    "sft": ("SFT", "trl", dict(completion_only_loss=True, packing=False)),
    "reward_model": ("Reward", "trl", {}),
    "dpo": ("DPO", "trl", {}),
    "simpo": ("CPO", "trl.experimental.cpo", dict(loss_type="simpo", cpo_alpha=0.0)),
    "orpo": ("ORPO", "trl.experimental.orpo", {}),
    "kto": ("KTO", "trl", {}),
    "grpo": ("GRPO", "trl", dict(beta=0.0, temperature=1.0)),
    "generate": (),
}
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}  # environment of a process


def check(who):
    """Stops if a package is missing. who: what needs it"""
    for name in ("trl", "transformers", "datasets"):
        if importlib.util.find_spec(name) is None:
            remedy = "pip install -r requirements-peers.txt"
            raise UserError(f"{who} needs the package {name}, which is not installed; {remedy}")


def model(config, scalar=False):
    """-> GPT-2 of transformers, of the sizes of a GPTConfig"""
    import transformers

    sizes = transformers.GPT2Config(
        vocab_size=config[0],
        n_positions=config[1],
        n_layer=config[2],
        n_head=config[3],
        n_embd=config[4],
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0),
        **dict(bos_token_id=None, eos_token_id=1, pad_token_id=0),
    )
    kind = "GPT2ForSequenceClassification" if scalar else "GPT2LMHeadModel"
    sizes.num_labels = 1 if scalar else 2
    torch.manual_seed(0)
    return getattr(transformers, kind)(sizes)


def tokenizer(size, ends):
    """-> words t0, t1, … as tokens, by number; 1 is the end. ends: whether the model may draw it"""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    end = 1 if ends else size
    words = {f"t{i}": i for i in range(size) if i != end} | {"<end>": end, "<other>": size + 1}
    found = Tokenizer(models.WordLevel(words, unk_token="<other>"))
    found.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = dict(eos_token="<end>", pad_token="t0", unk_token="<other>")
    return PreTrainedTokenizerFast(tokenizer_object=found, **special)


def rows(job, n, size):
    """-> n rows as TRL's trainer of the job wants them; it adds the end tokens"""
    draws = torch.Generator().manual_seed(0)

    def words(count):
        return " ".join(f"t{i}" for i in torch.randint(2, size, (count,), generator=draws).tolist())

    def answer():
        return f" {words(job['response'] - 1)} "

    for i in range(n):
        row = {"prompt": words(job["prompt"])}
        if job["name"] in ("sft", "kto"):
            row["completion"] = answer()
            row |= {"label": i % 2 == 0} if job["name"] == "kto" else {}
        elif job["name"] != "grpo":
            row |= {"chosen": answer(), "rejected": answer()}
        yield row


def spread(completions, **columns):
    """A reward that differs in every group"""
    return [float(i) for i in range(len(completions))]


def step(job):
    """Trains with TRL. -> CPU ms of a step, bytes at its peak"""
    from datasets import Dataset

    name, module, more = SHAPES[job["name"]]
    trl, size = importlib.import_module(module), job["config"][0]
    pairs = job["name"] in ("dpo", "simpo", "orpo", "reward_model")
    batch = job["sequences"] // (2 if pairs else 1)
    if job["name"] == "grpo":
        group = job["command"].index("--group") + 1
        more = more | {"num_generations": int(job["command"][group]), "max_length": None}
    policy = model(job["config"], scalar=job["name"] == "reward_model")
    given = {"reward_funcs": spread} if job["name"] == "grpo" else {}
    if job["name"] in ("dpo", "kto"):
        given["ref_model"] = model(job["config"])
    given["train_dataset"] = Dataset.from_list(list(rows(job, batch * (job["steps"] + 1), size)))
    words, clock = tokenizer(size, ends=job["name"] != "grpo"), stopwatch()
    with tempfile.TemporaryDirectory() as folder:
        config = getattr(trl, f"{name}Config")
        how = settings(job, folder, batch) | more
        known = config.__dataclass_fields__
        args = config(**{k: v for k, v in how.items() if k in known})
        trainer = getattr(trl, f"{name}Trainer")
        trainer = trainer(model=policy, args=args, processing_class=words, **given)
        clock.ref = getattr(trainer, "ref_model", None)
        trainer.add_callback(clock)
        trainer.train()
    seconds = [b - a for a, b in itertools.pairwise(clock.marks)]
    return {"ms": 1000 * statistics.median(seconds), "bytes": clock.tracker.peak}


def settings(job, folder, batch):
    """-> what TRL's configs are told of a job, of which each takes what it knows"""
    return dict(
        output_dir=folder,
        max_steps=job["steps"],
        per_device_train_batch_size=batch,
        gradient_checkpointing=False,
        learning_rate=1e-5,
        lr_scheduler_type="constant",
        optim="adamw_torch_fused",
        use_cpu=True,
        bf16=False,
        max_length=job["prompt"] + job["response"],
        max_completion_length=job["response"],
        disable_dropout=True,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def stopwatch():
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
            self.marks.append(time.process_time())

    return Clock()


@torch.no_grad()
def end_often(bias, embedding):
    """Makes token 1 so likely that responses to a prompt of the bench have 24 tokens on average, of
    96 at most. Its logit is about 3.3 above the others', of which there are some 750."""
    bias[0] = 4.0
    embedding[1, 0] += 0.82


def generator(config, job):
    """-> a function that draws with transformers, and tells how many tokens"""
    sizes = config.n_layer, config.n_head, config.n_embd
    policy = model((config.vocab_size, config.block_size, *sizes)).eval()
    if job["ends"]:
        end_often(policy.transformer.ln_f.bias, policy.transformer.wte.weight)
    ids = torch.randint(2, config.vocab_size, (job["prompts"], job["prompt"]))
    ids = ids.repeat_interleave(job["group"], 0)
    how = dict(do_sample=True, top_k=0, max_new_tokens=job["response"], pad_token_id=0)
    how |= dict(eos_token_id=1 if job["ends"] else None, attention_mask=torch.ones_like(ids))

    @torch.inference_mode()
    def draw():
        ended = policy.generate(ids, **how)[:, job["prompt"] :] == 1
        if not job["ends"]:
            return ended.numel()
        return (ended.cumsum(1) - ended.int() == 0).sum()

    return draw

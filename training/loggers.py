"""--log-to: the record's lines as curves in TensorBoard or Weights & Biases.

Each needs a package of its own, which is imported only if it is used. A figure has the name that
TRL's trainers give it, if they log it, else the record's own (docs/metrics.md).
"""

import importlib.util
import os
import uuid

from data import UserError
from data.ours import refuse
from training.logger import Logger

NAMES = {  # in the record -> in TRL
    "lr": "learning_rate",
    "step_ms": "step_time",
    "rlhf_reward": "objective/rlhf_reward",
    "reward_margin": "objective/scores_margin",
}
JUDGED = {"reward": "objective/scores", "kl": "objective/kl"}  # of its PPO and its online DPO
UNITS = {"step_ms": 1e-3}  # TRL has seconds


def scalars(method, line):
    """A line of a record -> {name: number}, by TRL's names; those of an evaluation begin with
    "eval/", the closing ones with "final/"."""
    if "options" in line:  # the first one
        return {}
    part = next((part for part in ("eval", "final") if part in line), "")
    names = NAMES | (JUDGED if method in ("ppo", "online_dpo") else {})
    numbers = {k: x for k, x in (line[part] if part else line).items() if type(x) in (int, float)}
    if part:
        return {f"{part}/{k}": x for k, x in numbers.items()}
    return {names.get(k, k): x * UNITS.get(k, 1) for k, x in numbers.items() if k != "step"}


def check(name):
    """Refuses a logger whose package is missing."""
    if importlib.util.find_spec(name) is None:
        missing = f"needs the package {name}, which is not installed"
        raise UserError(f"--log-to {name} {missing}; pip install {name}, or leave it out")


class TensorBoard(Logger):
    """Writes to the folder out/<task>/<method>.tb; `tensorboard --logdir out` shows all runs."""

    def __init__(self, method, out):
        super().__init__(method, out)
        folder = f"{self.stem}.tb"
        inside = os.listdir(folder) if os.path.isdir(folder) else [folder] * os.path.exists(folder)
        if not all(name.startswith("events.out.tfevents.") for name in inside):
            refuse(f"--out {out}", folder)

    def begin(self, options, lines):
        from torch.utils.tensorboard import SummaryWriter

        # the curves show this record alone: those of an earlier run in this folder are hidden
        self.writer = SummaryWriter(f"{self.stem}.tb", purge_step=0)
        rows = "\n".join(f"| {name} | {x} |" for name, x in options.items())
        self.writer.add_text("options", f"| option | value |\n|---|---|\n{rows}", 0)
        for line in lines:
            self.take(line)

    def take(self, line):
        self.step = line.get("step", self.step)
        for name, x in scalars(self.method, line).items():
            self.writer.add_scalar(name, x, self.step)
        self.writer.flush()


class WandB(Logger):
    """Writes to the project nanopo, or with WANDB_MODE=offline to out/<task>/wandb, for `wandb
    sync`."""

    id = ""

    def begin(self, options, lines):
        import wandb

        known = lines[0].get("wandb") if lines else ""
        self.id = known or uuid.uuid4().hex[:12]
        try:
            self.run = wandb.init(
                project="nanopo",
                name="/".join(self.stem.split(os.sep)[-2:]),
                id=self.id,
                resume="allow",
                dir=os.path.dirname(self.stem) or ".",
                config=options,
            )
        except wandb.errors.Error as e:
            why, remedy = str(e).rstrip("."), "WANDB_MODE=offline needs no account"
            raise UserError(f"--log-to wandb: {why}; {remedy}") from None
        for line in [] if known else lines:
            self.take(line)

    def facts(self):
        return {"wandb": self.id}

    def take(self, line):
        self.step = line.get("step", self.step)
        figures = scalars(self.method, line)
        if "final" in line:
            self.run.summary.update(figures)
            self.run.finish()
        else:
            self.run.log(figures, step=self.step)


LOGGERS = {"tensorboard": TensorBoard, "wandb": WandB}

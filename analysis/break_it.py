"""Ten well-known bugs of alignment code. Each is a few lines that replace one function.

    python -m analysis.break_it mean_for_sum        its lines; a healthy and a broken run
    python -m analysis.break_it mean_for_sum --seed 1 --plot curves.png
    python -m pytest -p analysis.plugin --break-it mean_for_sum tests/test_losses.py

The scripts stay as they are: the lines replace the function only while a script runs in this
process. In each bug `right` is the original function. All runs except those of sft.py start from
one SFT checkpoint, which is made first if it is missing. The last command runs tests with the bug
in place. docs/break-it.md shows all ten, and the test that catches each.
"""

import contextlib
import importlib
import inspect
import io
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from pkgutil import resolve_name
from typing import NamedTuple
from unittest.mock import patch

import training
from analysis import plots, tables
from data import UserError, say
from data.ours import refuse_others
from packing import before, last_token, pack
from training import opt, parse

# ---- the bugs


def prompt_in_mask(right, rows, device="cpu", ends=False):
    batch = right(rows, device, ends)
    mask = batch.text.clone()
    mask[:, 0] = False  # nothing predicts the first token
    return batch._replace(mask=mask, packed=pack(batch.ids, before(mask)))


def end_out_of_mask(right, rows, device="cpu", ends=False):
    batch = right(rows, device, ends)
    mask = batch.mask & ~last_token(batch.mask)
    return batch._replace(mask=mask, packed=pack(batch.ids, before(mask)))


def mean_for_sum(right, model, batch):
    return right(model, batch) / batch.length


def moving_reference(right, run, policy):
    return policy  # not a frozen copy


def wrong_kl_sign(right, score, logp, ref_logp, mask, kl_coef):
    return right(score, logp, ref_logp, mask, -kl_coef)


def attached_advantage(right, policy, critic, batch, o):
    values = critic.values_before(batch.ids, batch.mask, batch.packed)  # no .detach()
    batch.adv = (batch.returns - values) * batch.mask
    return right(policy, critic, batch, o)


def ratio_to_reference(right, policy, batch, o):
    return right(policy, batch | {"old_logp": batch.ref_logp}, o)


def padding_in_mean(right, logp_w, logp_l, len_w, len_l, beta=2.0, gamma=1.0):
    columns = len_w.maximum(len_l).max().expand_as(len_w)  # the width of the padded table
    return right(logp_w, logp_l, columns, columns, beta, gamma)


def mean_of_micro_batch(right, batch, minibatch, longest, agg):
    return right(batch, batch, longest, agg)  # not those of the whole step


def sampling_temperature(right, model, batch, temperature=1.0, **more):
    return right(model, batch, 1.0, **more)


# ---- where they go, and how they show


class Bug(NamedTuple):
    patch: object  # the function with the bug
    what: str
    places: str  # the functions that it replaces
    command: str  # a script that shows the bug, and its options
    shown: str  # figures of the record; final_…: at the end, the others are means of the last steps
    symptom: str  # the figure that gives the bug away, and whether it "rises" or "falls"
    test: str  # the test that catches it, in tests/

    @contextlib.contextmanager
    def planted(self):
        """Puts the bug in each of its places for the body of a with statement."""
        with contextlib.ExitStack() as stack:
            for place in self.places.split():
                stack.enter_context(patch(place, around(self.patch, resolve_name(place))))
            yield


def around(bug, right):
    """-> a function that calls the bug with the original function as its first argument"""

    def broken(*args, **more):
        return bug(right, *args, **more)

    return broken


SFT = "sft --task arithmetic:1 --n-layer 2 --n-embd 64 --steps 300 --lr 4e-3"
DPO = "dpo --task exact --steps 120 --batch-size 1024 --lr 2e-3"
PPO = "ppo --task exact --steps 30 --group 32 --lam 1"
RLOO = "grpo --task exact --steps 100 --group 32 --lr 1e-3 --adv-norm loo --kl reward"
SFT_STEPS = 150  # for the checkpoint that the others start from
SIMPO = DPO.replace("dpo", "simpo")
OF_SFT = "loss grad_norm final_reward final_length final_ended"
OF_PAIRS = "loss rewards/margins grad_norm final_reward final_kl"
OF_PPO = (
    "loss/value_avg policy/approxkl_avg policy/clipfrac_avg entropy grad_norm reward rlhf_reward"
)
OF_PPO += " kl final_kl_star"
OF_RLOO = "loss entropy clip_ratio/high_mean grad_norm reward kl final_kl_star"
MASK = "data.pad data.batch.pad"
BUGS = [
    Bug(
        prompt_in_mask,
        "the loss mask includes the prompt's tokens",
        MASK,
        SFT,
        OF_SFT,
        "loss rises",
        "test_data.py::test_the_mask_covers_the_response_and_its_end_token",
    ),
    Bug(
        end_out_of_mask,
        "the loss mask leaves out the end token",
        MASK,
        SFT,
        OF_SFT,
        "final_ended falls",
        "test_run.py::test_log_probs_of_the_end_token_are_trained",
    ),
    Bug(
        mean_for_sum,
        "DPO takes means of log-probs, although its equation has sums",
        "dpo.response_logprobs",
        DPO,
        OF_PAIRS + " final_kl_star",
        "final_kl_star rises",
        "test_steps.py::test_dpo",
    ),
    Bug(
        moving_reference,
        "the reference is not frozen: it is the policy itself",
        "training.Run.reference",
        DPO,
        OF_PAIRS + " final_kl_star",
        "rewards/margins falls",
        "test_rollout.py::test_the_reference_is_fixed_or_the_last_round_s_policy",
    ),
    Bug(
        wrong_kl_sign,
        "the KL in PPO's reward has the wrong sign",
        "ppo.token_rewards",
        PPO,
        OF_PPO,
        "kl rises",
        "test_losses.py::test_token_rewards",
    ),
    Bug(
        attached_advantage,
        "PPO's advantage R − V carries the gradient of V",
        "ppo.compute_loss",
        PPO,
        OF_PPO,
        "loss/value_avg rises",
        "test_steps.py::test_ppo",
    ),
    Bug(
        ratio_to_reference,
        "GRPO's ratio is taken against the reference, not against π_old",
        "grpo.compute_loss",
        RLOO,
        OF_RLOO,
        "clip_ratio/high_mean rises",
        "test_gradients.py::test_at_a_rollout_s_first_optimizer_step_the_ratio_is_1[grpo-float32]",
    ),
    Bug(
        padding_in_mean,
        "SimPO's mean over tokens counts padding",
        "simpo.simpo_loss",
        SIMPO,
        OF_PAIRS + " final_length final_ended",
        "final_ended falls",
        "test_losses.py::test_simpo",
    ),
    Bug(
        mean_of_micro_batch,
        "each micro-batch's loss is divided by its own tokens, not by the step's",
        "grpo.token_weight",
        RLOO + " --agg token_mean --micro-batch 32",
        OF_RLOO,
        "grad_norm rises",
        "test_gradients.py::test_weights_reduce_a_minibatch_as_agg_names_however_it_is_cut",
    ),
    Bug(
        sampling_temperature,
        "sampling has a temperature, and the loss has none",
        "ppo.token_logprobs",
        PPO + " --temperature 0.7",
        OF_PPO,
        "policy/approxkl_avg rises",
        "test_steps.py::test_ppo",
    ),
]
BUGS = {bug.patch.__name__: bug for bug in BUGS}


# ---- both runs


def start_of(bug, o):
    """-> the options that name the checkpoint of both runs' start; it is made if it is missing"""
    script = bug.command.split()[0]
    if script == "sft":
        return []
    path = f"{o.out}/sft.pt"
    if not Path(path).exists():
        say("training an SFT checkpoint first, which all bugs share")
        train(["sft", "--task", "exact", "--steps", str(SFT_STEPS), "--out", path])
    return ["--init", path]


def train(command):
    """Runs a script in this process, without what it prints."""
    script, *argv = command
    with contextlib.redirect_stdout(io.StringIO()):
        importlib.import_module(script).main([*argv, "--device", "cpu"])


def measured(bug, o, broken=False):
    """Trains with the bug's command, healthy or broken by the bug. -> the record's steps, and its
    figures: means over the last tenth of the steps, and those of the end as final_…"""
    name = bug.patch.__name__ if broken else f"{bug.patch.__name__}-healthy"
    path = f"{o.out}/{name}.pt"
    command = f"{bug.command} --log-every 1 --eval-every 0 --seed {o.seed}".split()
    command += [*start_of(bug, o), "--out", path]
    with bug.planted() if broken else contextlib.nullcontext():
        train(command)
    _, steps, final = tables.read(Path(o.out), name)
    end = steps[-max(1, len(steps) // 10) :]
    figures = {key: statistics.fmean(step[key] for step in end) for key in steps[-1]}
    figures |= {f"final_{key}": x for key, x in final.items()}
    return steps, figures


# ---- the command


@dataclass
class Options:
    name: str = opt(..., f"which bug: {', '.join(BUGS)}")
    out: str = opt("out/break_it", "folder for the checkpoints and records")
    seed: int = opt(0, "seed of both runs", low=0)
    plot: str = opt("", "draw both runs' curves into this FILE.png")

    def check(self):
        if self.name not in BUGS:
            raise UserError(f"there is no bug {self.name}; there are {', '.join(BUGS)}")
        path = Path(self.plot)
        if self.plot and not (path.suffix == ".png" and path.parent.is_dir()):
            raise UserError(f"--plot {path}: give FILE.png, in a folder that exists")
        if self.plot:
            refuse_others("--plot", path)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0][:2] == "--" and argv[0] != "--help":
        raise UserError(f"give the name of a bug first, one of {', '.join(BUGS)}")
    o = parse(Options, argv)
    bug = BUGS[o.name]
    print(f"{o.name}: {bug.what}\n\n{inspect.getsource(bug.patch)}")
    print(f"in place of {bug.places.replace(' ', ' and ')}, in {bug.command}\n", flush=True)
    (healthy, right), (broken, wrong) = measured(bug, o), measured(bug, o, broken=True)
    symptom, how = bug.symptom.split()
    print(f"{'':<24}{'healthy':>10}{'broken':>10}")
    for key in bug.shown.split():
        mark = f"  ← symptom: it {how}" if key == symptom else ""
        print(f"{key:<24}{right[key]:>10.4f}{wrong[key]:>10.4f}{mark}")
    print(f"\ncaught by tests/{bug.test}")
    if o.plot:
        draw(bug, healthy, broken, o.plot)


def draw(bug, healthy, broken, path):
    """Draws the shown figures over the steps of both records."""
    if plt := plots.pyplot():
        runs = {"healthy": healthy, "broken": broken}
        figure = plots.curves(plt, runs, bug.shown.split())
        figure.savefig(path, bbox_inches="tight", metadata=plots.OURS)
        print(f"curves {path}")


if __name__ == "__main__":
    training.command(main, torchrun=False)

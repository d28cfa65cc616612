"""Each script beside TRL's own trainer: the same weights, the same tokens, the same loss?

    python -m analysis.parity                  every comparison, a minute or two
    python -m analysis.parity --only KTO RLOO  those with one of these words in their name

A comparison runs a script's `main` and `train` of a trainer of TRL on a small GPT-2. At each
optimizer step it looks at the loss that is differentiated, and at the gradient of every weight.
Where the two sides differ by more than rounding, it must name one of DEPARTURES: without a name the
exit code is 1. It is 1 too where a departure shows no difference any more.

analysis/sides.py runs the two sides. The printed tables are in docs/parity.md.
"""

import os
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from typing import NamedTuple

import torch
from tqdm import tqdm

import training
from analysis import peers, sides, tables
from data import Stopped, UserError, say
from training import opt, parse

SMALL = 1e-5  # rounding: TRL computes log-probs, rewards or advantages in float32
LARGE = 1e-4  # a departure changes the loss or the gradient by more

DEPARTURES = {  # -> (what TRL does, what the script does, whose side the paper is on)
    "label smoothing": ("`sigmoid` does not read `label_smoothing`", "cDPO", "ours"),
    "NLL of a batch": (
        "the NLL is a mean over all tokens of a micro-batch",
        "a mean over each answer's tokens, then over pairs",
        "ours (iterative RPO, ORPO's text); ORPO's code: TRL's",
    ),
    "NLL by default": ("SimPO adds the NLL: `cpo_alpha` is 1", "`--sft-weight` is 0", "ours"),
    "NLL of the prompt": (
        "ORPO's NLL covers the prompt, as in the authors' code",
        "the answer alone; the prompt too with `--prompt-loss`",
        "ours",
    ),
    "partner": (
        "ẑ pairs a prompt with the answer of the row before",
        "with that of the row after, as the authors' code does",
        "neither: it names no row",
    ),
    "ẑ of a part": ("ẑ comes from a micro-batch", "from the step's whole batch", "TRL's"),
    "equal prompts": (
        "ẑ may pair a prompt with an answer to the same prompt",
        "it takes the next row with another prompt",
        "ours",
    ),
    "padding is the end": (
        "where both are one token, a score is read before the end",
        "it is read at the end token",
        "the papers are silent",
    ),
    "left padding": (
        "pads prompts on the left, and GPT-2's positions shift",
        "positions count from the prompt's first token",
        "the papers are silent",
    ),
    "ρ k3": ("multiplies k3 by the ratio by default", "it does so with `--kl k3-ratio`", "ours"),
    "mean of means": (
        "bnpo: a token mean of each micro-batch, then their mean",
        "one token mean of the optimizer step",
        "neither: no paper has bnpo",
    ),
    "tokens of a rollout": (
        "dapo divides by the rollout's tokens / its minibatches",
        "by the minibatch's own tokens",
        "neither; the code of DAPO's authors: ours",
    ),
    "ratio of a response": (
        "RLOO's ratio is that of the whole response",
        "it is that of each token",
        "neither: it has no ratio",
    ),
}

# name | script and options | trainer and settings | departure | what else it needs
TABLE = """
SFT | sft | SFT
SFT, decay and clipping | sft --batch-size 4 --steps 3 --weight-decay 0.1 --grad-clip 0.2
    | SFT batch=4 weight_decay=0.1 max_grad_norm=0.2
SFT, micro-batches | sft --micro-batch 4 | SFT batch=4 accumulation=3
reward model | reward_model | Reward
reward model, margin | reward_model | Reward | | margin
reward model, centring | reward_model --center-rewards 0.1 | Reward center_rewards_coefficient=0.1
reward model, padding | reward_model | Reward pad=<end> | padding is the end
DPO | dpo | DPO
DPO, 2 epochs, micro-batches | dpo --batch-size 4 --micro-batch 2 --epochs 2 --precompute-ref
    | DPO batch=2 accumulation=2 precompute_ref_log_probs=True
cDPO | dpo --label-smoothing 0.1 | DPO label_smoothing=0.1 | label smoothing
cDPO of two losses | dpo --label-smoothing 0.1
    | DPO loss_type=sigmoid,robust loss_weights=1.8,-0.8 label_smoothing=0.1
robust DPO | dpo --loss robust --label-smoothing 0.2 | DPO loss_type=robust label_smoothing=0.2
IPO | dpo --loss ipo --beta 0.5 | DPO loss_type=ipo beta=0.5
DPO + NLL | dpo --sft-weight 0.2 | DPO loss_type=sigmoid,sft loss_weights=1.0,0.2 | NLL of a batch
DPO + NLL, a pair at a time | dpo --sft-weight 0.2
    | DPO batch=1 accumulation=12 loss_type=sigmoid,sft loss_weights=1.0,0.2
SimPO | simpo | CPO loss_type=simpo beta=2.0 simpo_gamma=1.0 cpo_alpha=0.0
SimPO, TRL's NLL | simpo | CPO loss_type=simpo beta=2.0 simpo_gamma=1.0 | NLL by default
SimPO + NLL | simpo --sft-weight 1 | CPO loss_type=simpo beta=2.0 simpo_gamma=1.0 | NLL of a batch
SimPO + NLL, a pair at a time | simpo --sft-weight 1
    | CPO batch=1 accumulation=12 loss_type=simpo beta=2.0 simpo_gamma=1.0
ORPO | orpo --lam 0.2 | ORPO batch=1 accumulation=12 beta=0.2 | NLL of the prompt
ORPO + prompt | orpo --lam 0.2 --prompt-loss | ORPO beta=0.2 | NLL of a batch
ORPO + prompt, a pair at a time | orpo --lam 0.2 --prompt-loss
    | ORPO batch=1 accumulation=12 beta=0.2
KTO | kto | KTO | | backwards
KTO, λ_D and λ_U | kto --w-desirable 1.5 --w-undesirable 0.5
    | KTO desirable_weight=1.5 undesirable_weight=0.5 | | backwards
KTO, rows in order | kto | KTO | partner
KTO, micro-batches | kto --micro-batch 4 | KTO batch=4 accumulation=3 | ẑ of a part | backwards
KTO, prompts twice | kto | KTO | equal prompts | backwards twins
GRPO | grpo --kl none | GRPO loss_type=grpo
GRPO, clip | grpo --kl none --updates 2 | GRPO loss_type=grpo updates=2
GRPO, ε and ε_high | grpo --kl none --updates 2 --eps 0.1 --eps-high 0.3
    | GRPO loss_type=grpo updates=2 epsilon=0.1 epsilon_high=0.3
GRPO, k3 | grpo --updates 2 --beta 0.1
    | GRPO loss_type=grpo updates=2 beta=0.1 use_bias_correction_kl=False
GRPO, ρ k3 | grpo --updates 2 --beta 0.1 --kl k3-ratio | GRPO loss_type=grpo updates=2 beta=0.1
GRPO, TRL's KL | grpo --beta 0.1 | GRPO loss_type=grpo beta=0.1 | ρ k3
GRPO, temperature | grpo --kl none --updates 2 --temperature 0.7
    | GRPO loss_type=grpo updates=2 temperature=0.7
GRPO, micro-batches | grpo --kl none --micro-batch 16
    | GRPO loss_type=grpo batch=16 accumulation=2
GRPO, minibatches | grpo --kl none --minibatches 4
    | GRPO loss_type=grpo batch=8 steps_per_generation=4
GRPO, prompts of many lengths | grpo --kl none | GRPO loss_type=grpo | left padding | ragged
Dr. GRPO | grpo --kl none --adv-norm none --agg const --updates 2
    | GRPO loss_type=dr_grpo scale_rewards=none updates=2
token mean | grpo --kl none --agg token_mean --updates 2 | GRPO loss_type=bnpo updates=2
token mean, micro-batches | grpo --kl none --agg token_mean --micro-batch 16
    | GRPO loss_type=bnpo batch=16 accumulation=2 | mean of means
GSPO | grpo --kl none --ratio seq --eps 0.01 --updates 2
    | GRPO loss_type=grpo importance_sampling_level=sequence epsilon=0.01 updates=2
RLOO | grpo --adv-norm loo --agg sum --kl reward --beta 0.1 | RLOO beta=0.1 | | gradient
RLOO, two updates | grpo --adv-norm loo --agg sum --kl reward --beta 0.1 --updates 2
    | RLOO beta=0.1 updates=2 | ratio of a response | gradient
DAPO | dapo --minibatches 1 --no-overlong --updates 2
    | GRPO loss_type=dapo epsilon_high=0.28 updates=2 reward=verdict
DAPO, overlong filter | dapo --minibatches 1 --no-overlong --overlong-filter
    | GRPO loss_type=dapo mask_truncated_completions=True reward=verdict
DAPO, overlong reward | dapo --minibatches 1 --overlong-cache 4
    | GRPO loss_type=dapo epsilon_high=0.28 reward=verdict+overlong
DAPO, minibatches | dapo --minibatches 2 --no-overlong --eps-high 0.2
    | GRPO loss_type=dapo batch=16 steps_per_generation=2 reward=verdict | tokens of a rollout
online DPO | online_dpo --label argmax | OnlineDPO beta=0.1
online IPO of sums | online_dpo --label argmax --loss ipo --ipo-sum --beta 0.5
    | OnlineDPO loss_type=ipo beta=0.5
"""


class Comparison(NamedTuple):
    """A row of the table. needs: words. margin, twins, ragged: see sides.rows. backwards: TRL has
    the rows from the last to the first. gradient: the values of the losses are not compared."""

    name: str
    ours: str
    theirs: str
    departs: str = ""
    needs: str = ""


COMPARISONS = [
    Comparison(*map(str.strip, row.split("|")))
    for row in TABLE.replace("\n    ", " ").strip().splitlines()
]


# ---- one comparison


def compare(row, folder):
    """-> (how far the losses are apart, how far the gradients, relative to their norm): the most of
    all optimizer steps"""
    data = sides.rows(row.ours.split()[0], row.needs)
    ours, rollout = sides.ours(row.ours, data, folder)
    data = data[::-1] if "backwards" in row.needs else data
    theirs = sides.theirs(row.theirs, data, folder, len(ours), rollout)
    assert len(theirs) == len(ours) > 0, f"{row.name}: {len(theirs)} and {len(ours)} steps"
    losses = [abs(a - b) for (a, _), (b, _) in zip(ours, theirs)]
    gradients = [apart(a, b) for (_, a), (_, b) in zip(ours, theirs)]
    return tuple(torch.tensor([losses, gradients]).amax(1).tolist())  # amax keeps a NaN


def apart(a, b):
    """Two {name: gradient} -> the norm of their difference, relative to that of b"""
    assert a.keys() == b.keys(), "the same weights"
    difference = sum((a[name] - b[name]).square().sum() for name in b)
    return (difference / sum(x.square().sum() for x in b.values())).sqrt().item()


def judge(row, loss, gradient):
    """-> (the verdict, whether it is the one that is expected)"""
    found = [gradient] if "gradient" in row.needs else [loss, gradient]
    if row.departs:
        shown = any(x > LARGE for x in found)
        return row.departs if shown else f"NO LONGER: {row.departs}", shown
    agree = all(x < SMALL for x in found)
    return "agree" if agree else "DIFFERS", agree


# ---- the command


@dataclass
class Options:
    only: tuple = opt((), "comparisons with one of these words in their name (default: all)")

    def check(self):
        for word in self.only:
            if all(word not in row.name for row in COMPARISONS):
                raise UserError(f"--only {word}: no comparison has it in its name")
        peers.check("the comparison")

    def rows(self):
        words = self.only or [""]
        return [row for row in COMPARISONS if any(word in row.name for word in words)]


def report(found):
    """{comparison: its differences} -> the tables, as lines of Markdown"""
    packages = ", ".join(f"{name} {version(name)}" for name in ("trl", "transformers", "torch"))
    yield f"{packages}\n"
    lines = [["comparison", "ours", "TRL", "Δ loss", "Δ gradient", "verdict"]]
    for row, (loss, gradient) in found.items():
        figures = ["" if "gradient" in row.needs else f"{loss:.0e}", f"{gradient:.0e}"]
        verdict, _ = judge(row, loss, gradient)
        lines.append([row.name, f"`{row.ours}`", f"`{row.theirs}`", *figures, verdict])
    yield from tables.markdown(lines)
    named = {row.departs for row in found}
    lines = [["departure", "TRL", "ours", "the paper's side"]]
    lines += [[name, *words] for name, words in DEPARTURES.items() if name in named]
    if len(lines) > 1:
        yield ""
        yield from tables.markdown(lines)


def main(argv=None):
    o = parse(Options, argv)
    torch.set_num_threads(1)
    os.environ.update(peers.OFFLINE)
    with tempfile.TemporaryDirectory() as folder:
        sides.write(folder)
        bar = tqdm(o.rows(), "parity", leave=False, disable=None)
        found = {row: compare(row, folder) for row in bar}
    say("\n".join(report(found)))
    wrong = [row.name for row, x in found.items() if not judge(row, *x)[1]]
    agree = sum(not row.departs for row in found)
    if wrong:
        raise Stopped(f"{len(wrong)} of {len(found)} are not as expected: {'; '.join(wrong)}")
    say(f"\n{len(found)} comparisons: {agree} agree, {len(found) - agree} depart, as expected.")


if __name__ == "__main__":
    training.command(main, torchrun=False)

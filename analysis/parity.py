"""Compares each script with TRL's own trainer: do the same weights and tokens give the same loss?

    python -m analysis.parity                  every comparison, a minute or two
    python -m analysis.parity --only KTO RLOO  those with one of these words in their name

A comparison runs a script's `main` and the `train` of a TRL trainer on a small GPT-2. At each
optimizer step it compares the loss that is differentiated, and the gradient of every weight; at the
end it compares every figure that both sides have logged. If the two differ by more than rounding,
the comparison must name one of DEPARTURES, or else the exit code is 1. It is 1 too if a named
departure no longer makes a difference.

analysis/against_trl/sides.py runs the two sides. The printed tables are in docs/parity.md.
"""

import os
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from typing import NamedTuple

import torch
from tqdm import tqdm

import training
from analysis import against_trl, tables
from analysis.against_trl import sides
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

# Figures that TRL logs under the same name, but defines otherwise, in rows whose TRL side has all
# of these words: words of TRL's side | figures | what TRL logs | what the script logs
FIGURES = """
DPO loss_type=ipo | rewards/chosen rewards/rejected rewards/margins rewards/accuracies
    | β times the log-ratio, summed over tokens | β times its mean over tokens, which the loss has
DPO loss_type=sigmoid_norm | rewards/chosen rewards/rejected rewards/margins rewards/accuracies
    | β times the log-ratio, summed over tokens | β times its mean over tokens, which the loss has
CPO | logps/chosen logps/rejected | means over tokens | sums over tokens
ORPO | logps/chosen logps/rejected | means over tokens | sums over tokens
Reward center_rewards_coefficient=0.1 | grad_norm | its head has no bias | the bias is counted
GRPO | reward_std | over all responses | mean over the groups
RLOO | reward_std | over all responses | mean over the groups
RLOO | kl | mean k1 of a token as it was sampled | k3, summed over a response
GRPO use_bias_correction_kl=True | kl | k3 times the ratio | k3
GRPO accumulation=2 | entropy | mean of the micro-batches' means | mean over all tokens
GRPO importance_sampling_level=sequence | clip_ratio/low_mean clip_ratio/high_mean
    | share of responses | share of tokens
GRPO reward=verdict+overlong | reward | with the length penalty | without it
OnlineDPO | kl | padding's log-ratios are in the sum | those of the response alone
"""

# name | script and options | trainer and settings | departure | needs of its rows
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
DPO, length-normalised | dpo --loss norm --beta 5 | DPO loss_type=sigmoid_norm beta=5.0
APO-zero | dpo --loss apo --beta 0.3 | DPO loss_type=apo_zero beta=0.3
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
GRPO, ε and ε_high | grpo --kl none --updates 2 --eps 0.1 --eps-high 0.5
    | GRPO loss_type=grpo updates=2 epsilon=0.1 epsilon_high=0.5
GRPO, k3 | grpo --updates 2 --beta 0.1
    | GRPO loss_type=grpo updates=2 beta=0.1 use_bias_correction_kl=False
GRPO, ρ k3 | grpo --updates 2 --beta 0.1 --kl k3-ratio
    | GRPO loss_type=grpo updates=2 beta=0.1 use_bias_correction_kl=True
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
GRPO, std of the batch | grpo --kl none --adv-norm batch
    | GRPO loss_type=grpo scale_rewards=batch
CISPO | grpo --kl none --agg token_mean --clip weight --eps-high 0.02 --updates 2
    | GRPO loss_type=cispo epsilon_high=1.02 updates=2
truncated importance sampling | grpo --kl none --tis 1.05
    | GRPO loss_type=grpo vllm_importance_sampling_mode=token_truncate
    vllm_importance_sampling_clip_max=1.05 | | sampler
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
distillation, reverse | distill --agg token_mean | Distillation beta=1.0
distillation, forward | distill --agg token_mean --loss forward | Distillation beta=0.0
distillation, JSD | distill --agg token_mean --loss jsd --jsd-beta 0.5 | Distillation beta=0.5
distillation, JSD, temperature | distill --agg token_mean --loss jsd --jsd-beta 0.1
    --temperature 0.7 | Distillation beta=0.1 temperature=0.7
PPO | ppo --updates 2 --minibatches 2 --beta 0.1 --lam 0.9 --gamma 0.8 --vf-coef 0.3 --eps 0.02
    --eps-v 0.02 --missing-eos-penalty 0.5
    | derivation passes=2 parts=2 beta=0.1 lam=0.9 gamma=0.8 vf_coef=0.3 eps=0.02 eps_v=0.02
    penalty=0.5
"""


class Comparison(NamedTuple):
    """A row of the table. needs is a list of words: for margin, twins and ragged see sides.rows;
    with backwards TRL reads the rows from the last to the first; with sampler the tokens come with
    log-probs that are not the policy's; with gradient the values of the losses are not compared."""

    name: str
    ours: str
    theirs: str
    departs: str = ""
    needs: str = ""

    def has(self, words):
        """Whether TRL's side has all of these words"""
        return set(words.split()) <= set(self.theirs.split())

    def other(self):
        """-> the figures that TRL defines otherwise here"""
        rows = [figures for words, figures, *_ in OTHER if self.has(words)]
        return {name for figures in rows for name in figures.split()}


def cells(table):
    """-> the rows of a table above"""
    lines = table.replace("\n    ", " ").strip().splitlines()
    return [[cell.strip() for cell in line.split("|")] for line in lines]


OTHER = cells(FIGURES)
COMPARISONS = [Comparison(*row) for row in cells(TABLE)]


# ---- one comparison


def compare(row, folder):
    """-> (the largest difference of the losses over all optimizer steps; that of the gradients,
    relative to their norm; {figure: the difference of what both sides have logged, relative to
    TRL's value if that is above 1})"""
    data = sides.rows(row.ours.split()[0], row.needs)
    ours, rollout = sides.ours(row.ours, data, folder, "sampler" in row.needs)
    data = data[::-1] if "backwards" in row.needs else data
    theirs = sides.theirs(row.theirs, data, folder, len(ours), rollout)
    assert len(theirs) == len(ours) > 0, f"{row.name}: {len(theirs)} and {len(ours)} steps"
    losses = [abs(a - b) for (a, _), (b, _) in zip(ours, theirs)]
    gradients = [apart(a, b) for (_, a), (_, b) in zip(ours, theirs)]
    loss, gradient = torch.tensor([losses, gradients]).amax(1).tolist()  # amax keeps a NaN
    both = ours.figures.keys() & theirs.figures.keys()
    pairs = {name: (ours.figures[name], theirs.figures[name]) for name in sorted(both)}
    return loss, gradient, {name: abs(a - b) / max(1, abs(b)) for name, (a, b) in pairs.items()}


def apart(a, b):
    """Two {name: gradient} -> the norm of their difference, relative to that of b"""
    assert a.keys() == b.keys(), "the same weights"
    difference = sum((a[name] - b[name]).square().sum() for name in b)
    return (difference / sum(x.square().sum() for x in b.values())).sqrt().item()


def judged(row, figures):
    """-> {figure: its difference}, for the figures that must agree"""
    left_out = row.other() | ({"loss"} if "gradient" in row.needs else set())
    return {} if row.departs else {k: x for k, x in figures.items() if k not in left_out}


def judge(row, loss, gradient, figures):
    """-> (the verdict, whether it is the expected one)"""
    found = ({} if "gradient" in row.needs else {"loss": loss}) | {"gradient": gradient}
    if row.departs:
        shown = any(x > LARGE for x in found.values())
        return row.departs if shown else f"NO LONGER: {row.departs}", shown
    wrong = [name for name, x in (judged(row, figures) | found).items() if not x < SMALL]
    return f"DIFFERS: {', '.join(wrong)}" if wrong else "agree", not wrong


def gone(found):
    """{comparison: its differences}. Yields the figures that FIGURES lists as defined otherwise
    and that differ in none of these comparisons."""
    for words, figures, *_ in OTHER:
        rows = [x for row, (*_, x) in found.items() if row.has(words)]
        for name in figures.split():
            if rows and not any(x.get(name, 0) > SMALL for x in rows):
                yield f"{name} of {words}"


# ---- the command


@dataclass
class Options:
    only: tuple = opt((), "only comparisons with one of these words in their name (default: all)")

    def check(self):
        for word in self.only:
            if all(word not in row.name for row in COMPARISONS):
                raise UserError(f"--only {word}: no comparison has it in its name")
        against_trl.check("the comparison")

    def rows(self):
        words = self.only or [""]
        return [row for row in COMPARISONS if any(word in row.name for word in words)]


def report(found):
    """{comparison: its differences}. Yields the tables as lines of Markdown."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("trl", "transformers", "torch"))
    yield f"{packages}\n"
    head = ["comparison", "ours", "TRL", "Δ loss", "Δ gradient", "Δ figures", "of", "verdict"]
    lines = [head]
    for row, (loss, gradient, figures) in found.items():
        shown = ["" if "gradient" in row.needs else f"{loss:.0e}", f"{gradient:.0e}"]
        held = judged(row, figures)
        shown += [f"{max(held.values()):.0e}", str(len(held))] if held else ["", ""]
        verdict, _ = judge(row, loss, gradient, figures)
        lines.append([row.name, f"`{row.ours}`", f"`{row.theirs}`", *shown, verdict])
    yield from tables.markdown(lines)
    named = {row.departs for row in found}
    lines = [["departure", "TRL", "ours", "the paper's side"]]
    lines += [[name, *words] for name, words in DEPARTURES.items() if name in named]
    if len(lines) > 1:
        yield ""
        yield from tables.markdown(lines)
    lines = [["figures", "TRL logs", "ours"]]
    for words, figures, *means in OTHER:
        if any(row.has(words) for row in found):
            names = ", ".join(f"`{name}`" for name in figures.split())
            lines.append([f"{names} of `{words}`", *means])
    if len(lines) > 1:
        yield ""
        yield from tables.markdown(lines)


def main(argv=None):
    o = parse(Options, argv)
    torch.set_num_threads(1)
    os.environ.update(against_trl.OFFLINE)
    with tempfile.TemporaryDirectory() as folder:
        sides.write(folder)
        bar = tqdm(o.rows(), "parity", leave=False, disable=None)
        found = {row: compare(row, folder) for row in bar}
    say("\n".join(report(found)))
    wrong = [row.name for row, x in found.items() if not judge(row, *x)[1]]
    agree = sum(not row.departs for row in found)
    if wrong:
        raise Stopped(f"{len(wrong)} of {len(found)} are not as expected: {'; '.join(wrong)}")
    if alike := list(gone(found)):
        raise Stopped(f"no longer defined otherwise: {'; '.join(alike)}")
    held = sum(len(judged(row, x)) for row, (*_, x) in found.items())
    say(
        f"\n{len(found)} comparisons: {agree} agree, in {held} figures too, and "
        f"{len(found) - agree} depart, as expected."
    )


if __name__ == "__main__":
    training.command(main, torchrun=False)

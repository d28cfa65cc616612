"""The questions that readers bring, each answered by a small experiment: docs/questions.md.

    python -m analysis.questions cancels           runs one
    python -m analysis.questions                   lists the names

A question prints the commands that it ran, a small table, and its claims with yes or no, once for
each of seeds 0, 1 and 2 if anything is random. The exit code is 1 if a claim is wrong. Runs are
kept under out/questions, and none is repeated.
"""

import sys

import torch

import training
from analysis import experiment
from analysis import questions_pairs as pairs
from analysis import questions_rewards as rewards
from data import Stopped, UserError

QUESTIONS = {  # in the order of the page
    "cancels": pairs.cancels,
    "implicit-reward": pairs.implicit_reward,
    "beta-doubled": pairs.beta_doubled,
    "beta-extremes": pairs.beta_extremes,
    "one-network": pairs.one_network,
    "memory": rewards.memory,
    "length": pairs.length,
    "few-pairs": pairs.few_pairs,
    "critic": rewards.critic,
    "group-std": rewards.group_std,
    "response-mean": rewards.response_mean,
    "dynamic-sampling": rewards.dynamic_sampling,
    "verifier": rewards.verifier,
    "teacher": rewards.teacher,
    "thumbs": pairs.thumbs,
    "orpo": pairs.orpo,
    "judge": rewards.judge,
    "hacking": rewards.hacking,
    "mt-bench": rewards.mt_bench,
}


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if len(argv) != 1 or argv[0] not in QUESTIONS:
        raise UserError(f"give one question: {', '.join(QUESTIONS)}")
    torch.set_num_threads(1)
    experiment.TOLD.clear()
    rows, claims = QUESTIONS[argv[0]]()
    for command in experiment.TOLD:
        print(f"ran: python {command}")
    print(f"\n{experiment.show(rows)}\n\n{experiment.verdicts(claims)}")
    if not all(all(found) for found in claims.values()):
        raise Stopped(f"{argv[0]}: a claim does not hold")


if __name__ == "__main__":
    training.command(main, torchrun=False)

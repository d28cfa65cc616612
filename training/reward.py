"""Chooses the judge of a run: the task's own reward, a reward model, or a user's function."""

import os
from functools import partial

import data
from data import UserError
from gpt import response_scores
from packing import last_token
from training import checkpoint
from training.checkpoint import is_checkpoint
from training.judge import Judge

ROWS = 128  # sequences per forward pass of a reward model


def load_judge(how, run, task, missing_eos_penalty=0.0):
    """-> the Judge of the responses. A wrong `how` is refused at once. missing_eos_penalty: what a
    reward model's score loses if the response did not end.

    "task"              the task's own reward
    "rm"                out/<task>/reward_model.pt, made first if it is missing
    "X.pt"              another reward model, of any vocabulary, or a Hugging Face folder of one
    "FILE.py:function"  a user's function
    """
    if how == "task":
        if not task.has_reward:
            place = task.lacks("answer", str, int, float)
            what = (
                f'not every row of {task.name} has an "answer" to check against ({place} has none)'
            )
            own = "give --reward X.pt, or a function of your own, --reward FILE.py:function"
            raise UserError(f"--reward task: {what}; {own}")
        return Judge(run, task, task.reward, bound=task.bound)
    if how == "rm" or is_checkpoint(how):
        if task.outcomes and missing_eos_penalty:
            costs = f"a missing end costs nothing on {task.name}; leave it out"
            raise UserError(f"--missing-eos-penalty: {costs}")
        path = run.stage("reward_model", "reward") if how == "rm" else how
        return ModelJudge(run, task, path, missing_eos_penalty)
    if task.outcomes:
        own = f"{task.name} keeps its own rewards, whose optimum is known"
        raise UserError(f"--reward {how}: {own}; give task or rm")
    from training.function import UserReward

    earn = UserReward(how, task)
    run.reads(how.rpartition(":")[0], "reward", known_by=os.path.basename(how))
    return Judge(run, task, earn, user=True)


class ModelJudge(Judge):
    """The judge is a reward model. If it has the policy's vocabulary, it reads the policy's tokens,
    otherwise text. A row that is longer than its context loses the beginning of the prompt, then
    the end of the response."""

    name = "score"
    user = False

    def __init__(self, run, task, path, missing_eos_penalty=0.0):
        run.reads(path, "reward")
        self.missing_eos_penalty = missing_eos_penalty
        model, self.tokenizer, meta = checkpoint.load_scalar(path, task, True)
        self.run, self.task, self.path, self.bound = run, task, path, task.bound
        self.model = run.freeze(run.place(model, frozen=True))
        data.say(f"{path} judges the responses: {checkpoint.describe(meta)}")

    @property
    def reads_tokens(self):
        """Whether it has the policy's vocabulary, and renders prompts as the policy does"""
        return self.tokenizer.way == self.run.tokenizer.way

    def __call__(self, questions, rollout):
        if self.reads_tokens and rollout.ids.size(1) <= self.model.config.block_size:
            return self.run.scores(rollout, self._score, ROWS)
        pad = partial(data.pad, device=rollout.ids.device, ends=True)
        rows = self.encode(questions, rollout)
        return self.run.scores(rows, lambda x: response_scores(self.model, pad(x)), ROWS)

    def _score(self, rollout):
        return self.model.score(rollout.ids, rollout.mask, rollout.pack(last_token))

    def reward(self, questions, rollout):
        scores = self(questions, rollout)
        return scores - self.missing_eos_penalty * (~rollout.finished).to(scores)

    def encode(self, questions, rollout):
        """-> rows in the judge's own vocabulary. A response that did not end has no end token."""
        texts = []
        for (prompt, text, ended), _ in self.each(questions, rollout):
            cut = text if ended else tuple(self.tokenizer.encode(text))
            texts.append((prompt, cut))
        return data.encode(texts, self.tokenizer, self.model.config.block_size, truncate=True)[0]

    def correct(self, questions, rollout):
        return self(questions, rollout) > 0

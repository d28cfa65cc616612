"""The judge of sampled responses: the task's own reward, a reward model, or a user's function."""

import os
from functools import partial

import torch

import data
from data import UserError
from gpt import response_scores
from training import checkpoint, distributed
from training.checkpoint import is_checkpoint

ROWS = 128  # sequences per forward pass of a reward model


def load_judge(how, run, task, missing_eos_penalty=0.0):
    """-> the Judge of the responses. A wrong `how` is refused at once. missing_eos_penalty: what is
    subtracted from a reward model's score if the response did not end.

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
        path = run.stage("reward_model") if how == "rm" else how
        return ModelJudge(run, task, path, missing_eos_penalty)
    if task.outcomes:
        own = f"{task.name} keeps its own rewards, whose optimum is known"
        raise UserError(f"--reward {how}: {own}; give task or rm")
    from training.function import UserReward

    earn = UserReward(how, task)
    run.reads(how.rpartition(":")[0], "reward", known_by=os.path.basename(how))
    return Judge(run, task, earn, user=True)


class Judge:
    """judge(questions, rollout) -> (N,) rewards, float64, so that large rewards keep their small
    differences. questions: P rows (ids, prompt, columns), each with N / P responses in the rollout,
    in order."""

    model = None  # a reward model, if it is one that judges
    name = "reward"  # its key in the figures

    def __init__(self, run, task, earn, bound=None, user=False):
        self.run, self.task, self.earn, self.bound, self.user = run, task, earn, bound, user

    def __call__(self, questions, rollout):
        try:
            rewards = self._judged(questions, rollout, self.earn)
        except (UserError, distributed.Lost):
            self.run.keep()  # what was done before this step is saved
            raise
        self.run.largest_reward = max(self.run.largest_reward, rewards.abs().max().item())
        return rewards.to(rollout.ids.device)

    def reward(self, questions, rollout):
        """-> (N,) what is trained on"""
        return self(questions, rollout)

    def correct(self, questions, rollout):
        """-> (N,) bool: what the task calls correct; with another reward, what is above 0"""
        if self.user:
            return self(questions, rollout) > 0
        verdicts = self._judged(questions, rollout, self.task.correct)
        return verdicts.to(rollout.ids.device) > 0

    def _judged(self, questions, rollout, judge):
        """-> (N,) judge(prompt, completion, ended, **columns) of each response, on the CPU. Each
        process judges its share."""
        part = distributed.mine(len(rollout))
        wide = torch.float32 if rollout.ids.device.type == "mps" else torch.float64
        said = torch.zeros(len(rollout), dtype=wide)
        with distributed.agreed():
            rows = self.each(questions, rollout, part)
            said[part] = torch.tensor([judge(*one, **row) for one, row in rows], dtype=wide)
        return distributed.total(said)

    def each(self, questions, rollout, part=slice(None)):
        """-> ((prompt, completion, ended), columns) of each response, or of a part of them"""
        rows = [row for row in questions for _ in range(len(rollout) // len(questions))]
        rollout = rollout[part]
        texts = completions(self.run.tokenizer, rollout)
        judged = zip(rows[part], texts, rollout.finished.tolist())
        return [((x, text, end), columns) for (_, x, columns), text, end in judged]

    def try_out(self, policy, prompts):
        """Judges one response to each of four prompts, so that a function that does not work stops
        the run before anything is written."""
        questions = prompts.rows[:4]
        generator = torch.Generator().manual_seed(0)
        self(questions, self.run.sample(policy, questions, prompts.longest, generator=generator))


class ModelJudge(Judge):
    """The judge is a reward model. One with the policy's vocabulary reads its tokens; one that was
    trained elsewhere reads text. A row that is longer than its context loses the prompt's
    beginning, then the response's end."""

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
            return self.run.scores(rollout, lambda x: self.model.score(x.ids, x.mask), ROWS)
        pad = partial(data.pad, device=rollout.ids.device, ends=True)
        rows = self.encode(questions, rollout)
        return self.run.scores(rows, lambda x: response_scores(self.model, pad(x)), ROWS)

    def reward(self, questions, rollout):
        scores = self(questions, rollout)
        return scores - self.missing_eos_penalty * (~rollout.finished).to(scores)

    def encode(self, questions, rollout):
        """-> rows in the judge's own vocabulary; a response that did not end has no end token"""
        texts = []
        for (prompt, text, ended), _ in self.each(questions, rollout):
            cut = text if ended else tuple(self.tokenizer.encode(text))
            texts.append((prompt, cut))
        return data.encode(texts, self.tokenizer, self.model.config.block_size, truncate=True)[0]

    def correct(self, questions, rollout):
        return self(questions, rollout) > 0


def completions(tokenizer, rollout):
    """-> the responses of a rollout as text"""
    rows = zip(rollout.ids.cpu(), rollout.mask.cpu())
    return [tokenizer.decode(ids[mask].tolist()) for ids, mask in rows]

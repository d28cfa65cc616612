"""The judge, which gives a reward to each sampled response."""

import torch

from data import UserError
from packing import on_device
from training import distributed


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
        return on_device(rewards, rollout.ids.device)

    def reward(self, questions, rollout):
        """-> (N,) the rewards to train on"""
        return self(questions, rollout)

    def correct(self, questions, rollout):
        """-> (N,) bool: whether the task calls a response correct; with another reward, whether
        that is above 0"""
        if self.user:
            return self(questions, rollout) > 0
        verdicts = self._judged(questions, rollout, self.task.correct)
        return on_device(verdicts, rollout.ids.device) > 0

    def _judged(self, questions, rollout, judge):
        """-> (N,) on the CPU: judge(prompt, completion, ended, **columns) of each response. Each
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
        rollout = rollout.host[part]
        texts = completions(self.run.tokenizer, rollout)
        judged = zip(rows[part], texts, rollout.finished.tolist())
        return [((x, text, end), columns) for (_, x, columns), text, end in judged]

    def try_out(self, policy, prompts):
        """Judges one response to each of four prompts, so that a function that does not work stops
        the run before anything is written."""
        questions = prompts.rows[:4]
        generator = torch.Generator().manual_seed(0)
        self(questions, self.run.sample(policy, questions, prompts.longest, generator=generator))


def completions(tokenizer, rollout):
    """-> the responses of a rollout as text"""
    rows = zip(rollout.host.ids, rollout.host.mask)
    return [tokenizer.decode(ids[mask].tolist()) for ids, mask in rows]

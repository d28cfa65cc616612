"""The judge of sampled responses: the task's own reward, a reward model, or a user's function."""

import importlib.util
import inspect
import os
import sys
import traceback

import torch

import data
from data import UserError
from gpt import response_scores
from training import checkpoint

ROWS = 128  # sequences a forward pass of a reward model


def load_judge(how, run, task):
    """-> what judges responses, a Judge. A wrong `how` is told at once.

    "task"              the task's own reward
    "rm"                out/<task>/reward_model.pt, made first where it is missing
    "X.pt"              another reward model, of any vocabulary
    "FILE.py:function"  a user's function
    """
    if how == "task":
        if not task.has_reward:
            raise UserError(
                f'--reward task: not every row of {task.name} has an "answer" to check against; '
                "give --reward X.pt, or a function of your own, --reward FILE.py:function"
            )
        return Judge(run, task, task.reward, bound=task.bound)
    if how == "rm" or how.endswith(".pt"):
        path = run.stage("reward_model") if how == "rm" else how
        return ModelJudge(run, task, path)
    if task.outcomes:
        own = f"{task.name} keeps its own rewards, whose optimum is known"
        raise UserError(f"--reward {how}: {own}; give task or rm")
    earn = user_reward(how, task.prompts(1, 0)[0][1])
    run.reads(how.rpartition(":")[0], may_change=True)  # mended where it raised, say
    return Judge(run, task, earn, user=True)


class Judge:
    """judge(questions, rollout) -> (N,) rewards. questions: P rows (ids, prompt, columns), each
    with N / P responses in the rollout, in order."""

    model = None  # of a learned reward
    name = "reward"  # its key in the figures

    def __init__(self, run, task, earn, bound=None, user=False):
        self.run, self.task, self.earn, self.bound, self.user = run, task, earn, bound, user

    def __call__(self, questions, rollout):
        try:
            rewards = [self.earn(*one, **columns) for one, columns in self.each(questions, rollout)]
        except UserError:
            self.run.keep()  # nothing is lost that was done before this step
            raise
        return torch.tensor(rewards, device=rollout.ids.device)

    def correct(self, questions, rollout):
        """-> (N,) bool: what the task calls correct; under another reward, what is above 0"""
        if self.user:
            return self(questions, rollout) > 0
        rows = self.each(questions, rollout)
        verdicts = [self.task.correct(*one, **columns) for one, columns in rows]
        return torch.tensor(verdicts, device=rollout.ids.device)

    def each(self, questions, rollout):
        """((prompt, completion, ended), columns) of each response"""
        texts = completions(self.run.tokenizer, rollout)
        rows = [row for row in questions for _ in range(len(texts) // len(questions))]
        ended = rollout.finished.tolist()
        return [((x, text, end), columns) for (_, x, columns), text, end in zip(rows, texts, ended)]

    def try_out(self, policy, prompts):
        """Judges one response to each of four prompts: a function that does not work stops the run
        before anything is written."""
        questions = prompts.rows[:4]
        generator = torch.Generator().manual_seed(0)
        self(questions, self.run.sample(policy, questions, prompts.longest, generator=generator))


class ModelJudge(Judge):
    """The score of a reward model. One of the policy's own vocabulary reads its tokens; one that
    was trained elsewhere reads text. What is longer than its context loses the prompt's beginning,
    then the response's end."""

    name = "score"
    user = False

    def __init__(self, run, task, path):
        run.reads(path)
        model, self.tokenizer, meta = checkpoint.load_scalar(path, task)
        self.run, self.task, self.path, self.bound = run, task, path, task.bound
        self.model = run.freeze(run.prepare(model))
        data.say(f"{path} judges the responses: {checkpoint.describe(meta)}")

    @property
    def reads_tokens(self):
        """Whether it has the policy's vocabulary"""
        return self.tokenizer.meta == self.run.tokenizer.meta

    def __call__(self, questions, rollout):
        with torch.no_grad(), self.run.autocast():
            if self.reads_tokens and rollout.ids.size(1) <= self.model.config.block_size:
                parts = [rollout[rows] for rows in torch.arange(len(rollout)).split(ROWS)]
                return torch.cat([self.model.score(part.ids, part.mask) for part in parts])
            rows = self.encode(questions, rollout)
            device = rollout.ids.device
            batches = [data.pad(rows[i : i + ROWS], device) for i in range(0, len(rows), ROWS)]
            return torch.cat([response_scores(self.model, batch) for batch in batches])

    def encode(self, questions, rollout):
        """-> the texts in the judge's own vocabulary; what did not end has no end token"""
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


def user_reward(name, columns):
    """-> reward(prompt, completion, ended, **columns) -> float: the user's function, which gets
    `ended` and the row's columns as far as it names them. columns: those of a row. Raises UserError
    for a function that is not there, wants a column that is not there, raises, or returns something
    that is no finite number."""
    function = _find(name)
    takes = _columns_taken(name, function, columns)

    def reward(prompt, completion, ended=True, **columns):
        columns["ended"] = ended
        place = f"the prompt {prompt!r} and the completion {completion!r}"
        if takes is not None:
            columns = {k: columns[k] for k in takes if k in columns}
        try:
            x = function(prompt, completion, **columns)
        except (Exception, SystemExit) as e:  # a user's function raises what it likes
            frames = traceback.extract_tb(e.__traceback__)[1:]
            line = next((frame.lineno for frame in frames), "?")
            what = f"{type(e).__name__} ({_flat(e)}, line {line})"
            raise UserError(
                f"--reward {name} raised {what} at {place}; mend the function"
            ) from None
        try:
            if not isinstance(x, str) and abs(float(x)) < 1e38:  # it becomes a float32
                return float(x)
        except (TypeError, ValueError, RuntimeError, OverflowError):
            pass
        returned = f"--reward {name} returned {_flat(repr(x))} at {place}"
        raise UserError(f"{returned}; it must return a finite number")

    return reward


def _columns_taken(name, function, columns):
    """-> the columns that a user's function asks for by name, or None for all"""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (ValueError, TypeError):  # some built-in functions have none
        parameters = []
    by_place = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    names = [p.name for p in by_place]
    swapped = {"prompt", "completion"} <= set(names) and names[:2] != ["prompt", "completion"]
    if len(names) < 2 or swapped:
        form = "(prompt, completion, …), a prompt and one completion of it at a time"
        raise UserError(f"--reward {name}: the function must take {form}")
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    asked = [p for p in parameters[2:] if p.kind is not p.VAR_POSITIONAL]
    for p in asked:
        if p.default is p.empty and p.name not in {"ended", *columns}:
            had = f"beside the prompt they have {', '.join(columns) or 'none'}"
            raise UserError(
                f"--reward {name} takes {p.name!r}, which is no column of the rows ({had})"
            )
    return [p.name for p in asked]


def _flat(text):
    """On one line, and no longer than one can read"""
    text = " ".join(str(text).split())
    return text if len(text) < 200 else text[:200] + " …"


def _find(name):
    """FILE.py:function -> the function"""
    path, _, attribute = name.rpartition(":")
    if not path.endswith(".py"):
        form = "give task, rm, the X.pt of a reward model, or a function as FILE.py:function"
        raise UserError(f"--reward {name}: {form}")
    if not os.path.isfile(path):
        raise UserError(f"--reward {name}: {path} is no file; give FILE.py:function")
    sys.path.append(os.path.dirname(os.path.abspath(path)))  # for what it imports from beside it
    spec = importlib.util.spec_from_file_location("user_reward", path)
    module = sys.modules["user_reward"] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as e:  # whatever stands in the file
        why = f"{type(e).__name__}: {_flat(e)}"
        raise UserError(f"--reward {name}: {path} cannot be run ({why}); mend it") from None
    function = getattr(module, attribute, None)
    if not callable(function):
        raise UserError(f"--reward {name}: {path} has no function {attribute!r}")
    return function

"""AI feedback: a model that answers, criticises and revises, a model that judges, and how well both
agree with the gold reward, if a task has one."""

import random
from collections import namedtuple
from statistics import fmean

import torch
import torch.nn.functional as F

import data
from data import UserError
from data.constitution import ask_choice, ask_critique, ask_revision
from gpt import response_scores
from training import memory
from training.judge import completions

ROWS = 128  # questions per forward pass
# Two answers to a prompt, and the principle that the judge compares them by; or an answer, its
# revision, and the principle and the critique that led to the revision.
Pair = namedtuple("Pair", "prompt a b principle columns critique", defaults=("",))


class Writer:
    """A frozen model that answers, criticises and revises, at temperature 1. Its samples depend on
    --seed and on a name."""

    def __init__(self, model, run, task, principles):
        self.model, self.run, self.task, self.principles = model, run, task, principles
        self.longest = task.longest(run.o.max_new_tokens, run.block_size)

    def prompts(self, n, name, split):
        """-> n rows (prompt, columns), a generator of principles and one of samples"""
        seed = self.run.o.seed
        rng = random.Random(f"rlaif {seed} {name}")
        rows = self.task.prompts(n, f"{seed} {name}", split)
        return rows, rng, torch.Generator().manual_seed(rng.getrandbits(62))

    def ask(self, questions, generator):
        """Replies to each question. -> (texts, whether each has ended). A question that is too long
        loses its beginning, and the reply to it does not count as ended."""
        texts, ended, room = [], [], self.run.block_size - self.longest
        speak = self.run.tokenizer.dialogue
        ids = [(speak(x), speak(x, room)) for x in questions]
        for part in [ids[i : i + ROWS] for i in range(0, len(ids), ROWS)]:
            cut = [(x,) for _, x in part]
            rollout = self.run.sample(self.model, cut, self.longest, generator=generator)
            texts += completions(self.run.tokenizer, rollout)
            ends = zip(part, rollout.finished.tolist())
            ended += [end and len(x) <= room for (x, _), end in ends]
        return texts, ended

    def pairs(self, n, name, split):
        """-> a Pair of answers for each of n prompts, if the two differ and have ended"""
        rows, rng, generator = self.prompts(n, name, split)
        texts, ended = self.ask([[x] for x, _ in rows for _ in "ab"], generator)
        made = zip(rows, texts[::2], texts[1::2])
        pairs = [Pair(x, a, b, rng.choice(self.principles), columns) for (x, columns), a, b in made]
        complete = map(all, zip(ended[::2], ended[1::2]))
        return [pair for pair, good in zip(pairs, complete) if good and pair.a != pair.b]

    def revise(self, n, name, split, rounds=1):
        """Answers n prompts, criticises each answer by a principle and revises it; the next round
        does the same to the revision. -> a Pair (answer, revision) for each prompt and round, if
        every text that led to it has ended"""
        rows, rng, generator = self.prompts(n, name, split)
        answers, complete = self.ask([[x] for x, _ in rows], generator)
        out = []
        for _ in range(rounds):
            answered = [(x, y, rng.choice(self.principles)) for (x, _), y in zip(rows, answers)]
            critiques, ended = self.ask([ask_critique(*one) for one in answered], generator)
            questions = [ask_revision(*one, c) for one, c in zip(answered, critiques)]
            answers, ends = self.ask(questions, generator)
            complete = list(map(all, zip(complete, ended, ends)))
            for (x, a, principle), c, b, row, good in zip(
                answered, critiques, answers, rows, complete
            ):
                out += [Pair(x, a, b, principle, row[1], c)] if good else []
        return out


class AIJudge:
    """A frozen model that answers multiple-choice questions in its own vocabulary. Its verdict is
    the probabilities of the next token; nothing is sampled."""

    def __init__(self, model, tokenizer, run):
        self.model, self.tokenizer, self.run = model, tokenizer, run
        letters = [tokenizer.encode(letter) for letter in "AB"]  # as after "(", without a space
        if any(len(ids) > 1 for ids in letters):
            raise UserError("the judge's vocabulary cuts A or B in two; give another --judge")
        self.options = [ids[0] for ids in letters]

    def compare(self, pairs):
        """Pairs -> (ab, ba), each (N, 2): log-probs of the options A and B; a pair's a is option A
        in ab, and its b is option A in ba"""
        ab = [ask_choice(x.prompt, x.a, x.b, x.principle) for x in pairs]
        ba = [ask_choice(x.prompt, x.b, x.a, x.principle) for x in pairs]
        return self.read(ab), self.read(ba)

    def read(self, questions):
        """-> (N, 2) log-probs of A and B as the next token, up to a constant per question. A
        question that is too long loses its beginning."""
        model = self.run.gathered(self.model)
        weight, room = model.head[self.options].float(), model.config.block_size
        rows = [(tuple(self.tokenizer.dialogue(question, room)), ()) for question in questions]

        def ask(part):
            batch = data.pad(part, self.run.device, ends=True)
            h = model.hidden(batch.packed).float()
            with torch.autocast(h.device.type, enabled=False):
                return batch.unfold(F.linear(h, weight))

        return self.run.scores(rows, ask, ROWS).view(len(rows), 2)


def frozen_records(what, **models):
    """Prints which frozen models work before a phase, and what they do. -> their records"""
    data.say(f"used {what}\n{memory.ledger(memory.records(models))}")
    return memory.records(models)


# ---- how far they agree with the gold reward


def gold(task, pairs):
    """-> the gold rewards [of a, of b] of each pair; [] if the task knows no reward"""
    known = pairs if task.has_reward else []
    return [[task.reward(x.prompt, y, **x.columns) for y in (x.a, x.b)] for x in known]


def agreement(task, pairs, *verdicts):
    """verdicts: (N,) bool each, whether a is the better answer. -> the share of verdicts that agree
    with the gold reward, over the pairs whose gold rewards differ; None if there is no such pair"""
    rewards = gold(task, pairs)
    differ = [i for i, (a, b) in enumerate(rewards) if a != b]
    right = [(rewards[i][0] > rewards[i][1]) == bool(wins[i]) for wins in verdicts for i in differ]
    return fmean(right) if right else None


def label_figures(task, pairs, ab, ba, a_wins=()):
    """-> figures of the quality of the labels that a judge's (ab, ba) give to pairs; {} without
    pairs. a_wins: (N,) bool, the verdicts of a model that learned from such labels; with these also
    how often that model agrees with the judge and with the gold reward"""
    if not pairs:
        return {}
    first, second = ab.softmax(1)[:, 0], ba.softmax(1)[:, 1]
    label = (first + second) / 2
    figures = {
        "order_consistency": (first > 0.5) == (second > 0.5),
        "position_bias": (first - second) / 2,
        "label_mean": label,
        "label_entropy": -(label.xlogy(label) + (1 - label).xlogy(1 - label)),
    }
    figures = {name: x.float().mean().item() for name, x in figures.items()}
    figures["label_agreement"] = agreement(task, pairs, label > 0.5)
    figures["one_order_agreement"] = agreement(task, pairs, first > 0.5, second > 0.5)
    if len(a_wins) == len(pairs):
        figures["accuracy"] = (a_wins == (label > 0.5)).float().mean().item()
        figures["gold_accuracy"] = agreement(task, pairs, a_wins)
    return {name: x for name, x in figures.items() if x is not None}


def revision_figures(task, revisions):
    """-> how the gold rewards of revisions compare with those of the answers"""
    gain = [after - before for before, after in gold(task, revisions)]
    if not gain:
        return {}
    better, equal = fmean(x > 0 for x in gain), fmean(x == 0 for x in gain)
    return {"revision_better": better, "revision_equal": equal, "revision_gain": fmean(gain)}


def skill_figures(writer, judge, n):
    """Measures on n test prompts how well the writer revises and the judge compares, and prints it.
    -> the figures"""
    task, pairs = writer.task, writer.pairs(n, "skills", "test")
    revisions = writer.revise(n, "skills", "test")
    ab, ba = judge.compare(pairs)
    figures = label_figures(task, pairs, ab, ba) | revision_figures(task, revisions)
    shown = dict(figures)
    for principle in dict.fromkeys(pair.principle for pair in pairs):
        rows = [i for i, pair in enumerate(pairs) if pair.principle == principle]
        found = label_figures(task, [pairs[i] for i in rows], ab[rows], ba[rows])
        shown[f"label_agreement, {principle}"] = found.get("label_agreement")
    show(f"the skills, on {len(pairs)} pairs and {len(revisions)} revisions of test answers", shown)
    return figures


def show(title, figures):
    rows = [f"  {name:<36}{x:>8.3f}" for name, x in figures.items() if isinstance(x, float)]
    data.say("\n".join(["", title, *rows]))


class PreferenceEvaluator:
    """Measures how often a preference model that learned from an AI judge agrees with that judge,
    and with the gold reward. pairs: a list of Pair, for held-out prompts"""

    def __init__(self, run, task, judge, pairs, facts):
        self.run, self.task, self.judge, self.pairs, self.facts = run, task, judge, pairs, facts

    def what_next(self, out, record):
        return ""  # the next phase is

    def measure(self, reward):
        run, pairs = self.run, self.pairs
        if not pairs:
            return {}

        def margin(part):
            batch = data.pad_pairs(part, run.device, ends=True)
            return torch.sub(*response_scores(reward, batch).chunk(2))

        rows, _ = data.encode([x[:3] for x in pairs], run.tokenizer, run.block_size, truncate=True)
        a_wins = run.scores(rows, margin, ROWS) > 0
        return label_figures(self.task, pairs, *self.judge.compare(pairs), a_wins)

    def report(self, title, figures):
        show(f"{title}: {len(self.pairs)} held-out pairs", figures)

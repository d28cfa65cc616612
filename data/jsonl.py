"""Makes a task of a JSONL file (.gz too). Its rows may have these shapes, which TRL documents:

    {"prompt", "completion"}               {"prompt", "chosen", "rejected"}
    {"prompt", "completion", "label"}      {"prompt", …}               {"messages"}

Each value is a string or a message list [{"role", "content"}]; the parts of a content [{"type":
"text", "text"}] are joined. If chosen and rejected begin alike, "prompt" may be left out, or be
repeated in both. The last of "messages" is the completion, and the others are the prompt; if
`turns` is "all", every answer in them makes a row. A single user message is read as plain text, as
a string is. A longer chat is rendered by TEMPLATE, or by the template of the checkpoint, which may
read more columns and keys. A hash puts 5 % of the prompts into the test split. A bad line stops the
run with file:line. Rows that are well formed but useless (an empty answer, chosen equal to
rejected) are dropped and counted, or refused if `strict`.
"""

import json
import random
from collections import Counter
from decimal import Decimal

from data.chat import TEMPLATE, same
from data.error import UserError, say
from data.messages import for_template, turns
from data.shapes import answer_of, missing, number_of, prompt_of, read
from data.toy import Graded, Labelled, Task, hash_share

TEST_SHARE = 0.05
REASONS = ("empty", "equal", "undesirable", "not drawn")  # why rows are left out


class Drawn(list):
    """Rows of a file."""

    account = ""  # for training rows: lines that say what became of every row of the file


class Jsonl(Task):
    """A task with the same methods as a built-in one. If n is None, they give all rows, in the
    file's order. `template` may be a checkpoint's own."""

    kind = "file"
    size = None
    max_new_tokens = 256
    bound = None
    template = TEMPLATE

    def __init__(self, path, eval_file="", strict=False, turns="last"):
        self.name, self.eval_file, self.strict = path, eval_file, strict
        self.notes = []  # what has been printed about the rows
        self.lines = {"train": read(path)}  # split -> [("path:number", row)]
        if eval_file:
            self.lines["test"] = read(eval_file)
            self._note_shared()
        else:
            self._split(path)
        if turns == "all":
            self._take_all_turns()
        test = self.lines["test"][0][1]
        self.unpaired = "label" in test and not self._has_pairs("test")
        self.has_reward = not self.lacks("answer", str, int, float)

    def _take_all_turns(self):
        """Makes a row of every answer of "messages". Those of a conversation stay in its split."""
        for split, lines in self.lines.items():
            rows = [(place, one) for place, row in lines for one in turns(row)]
            found = f"{len(lines):,} {split} rows have {len(rows):,} answers"
            self._note(f"{found}, each of which is a row (--turns all)")
            self.lines[split] = rows

    def _note_shared(self):
        train, test = ({self._prompt(*x)[0] for x in self.lines[k]} for k in ("train", "test"))
        if shared := len(train & test):
            what = f"warning: {shared} of the {len(test)} prompts of {self.eval_file}"
            self._note(f"{what} are prompts of {self.name} too: they are trained on")

    def _split(self, path):
        """Moves prompts with a low hash, but at least one, from the train to the test split."""
        lines = self.lines["train"]
        prompts = [self._prompt(*line)[0] for line in lines]
        share = {prompt: hash_share(prompt) for prompt in prompts}
        if len(share) < 2:
            raise UserError(
                f"{path} has one prompt only, and one must be held out: add rows, or name others "
                "with --eval-file"
            )
        limit = max(TEST_SHARE, min(share.values()))
        test = {prompt for prompt in share if share[prompt] <= limit}
        if len(test) == len(share):
            test.remove(max(share, key=share.get))
        self.lines = {"train": [], "test": []}
        for line, prompt in zip(lines, prompts):
            self.lines["test" if prompt in test else "train"].append(line)

    def columns(self):
        rows = self._questions("train") + self._questions("test")
        return list(dict.fromkeys(name for _, columns in rows for name in columns))

    def lacks(self, column, *types):
        """-> the place of the first row, of any split, that lacks the column or has it with another
        type; "" if there is no such row"""
        for lines in self.lines.values():
            for place, row in lines:
                name = "completion" if column == "reference" and column not in row else column
                if name not in row or types and type(row[name]) not in types:
                    return place
        return ""

    # ---- what a script draws

    def prompts(self, n, seed, split="train"):
        """-> (prompt, the other columns of the row). `completion` is called `reference` there."""
        return self._draw(self._questions, n, seed, split)

    def demonstrations(self, n, seed, split="train"):
        """-> (prompt, completion): the chosen answers of a preference file, the desirable ones of a
        feedback file"""
        return self._draw(self._demonstrations, n, seed, split)

    def preferences(self, n, seed, split="train"):
        """-> (prompt, chosen, rejected)"""
        return self._draw(self._pairs, n, seed, split)

    def graded(self, n, seed, split="train"):
        """-> Graded pairs. Without these columns the margin is 0, and p, the probability that
        chosen is better, is 1."""
        return self._draw(self._graded, n, seed, split)

    def feedback(self, n, seed, split="train"):
        """-> Labelled answers; each pair of a preference file gives two"""
        if not self._has_pairs(split):
            return self._draw(self._labelled, n, seed, split)
        rows = self._draw(self._labelled, n and max(1, n // 2), seed, split)
        count = f"{len(rows)} pairs are split into {2 * len(rows)} examples"
        self._note(f"a file of pairs: {count} ({split} split)")
        rows[:] = [Labelled(x, y, y == w) for x, w, l in rows for y in (w, l)]
        return rows

    def reward(self, prompt, completion, ended=True, answer=None, **columns):
        """-> 1 if the completion is the row's `answer`, else 0; every row must have one
        (`has_reward`). Spaces around it do not count. If the answer is a number, numbers are
        compared, not their spelling: 5, 5.0 and 5e0 are one answer."""
        text = completion.strip()
        if isinstance(answer, str):
            return float(ended and text == answer.strip())
        try:
            number = float(text) if isinstance(answer, float) else Decimal(text)
            return float(ended and number == answer)
        except (ValueError, ArithmeticError):
            return 0.0

    # ---- the rows of a split as text

    def _prompt(self, place, row):
        return prompt_of(place, row, self.template)

    def _answers(self, place, row, *keys):
        """-> (prompt, the text of each of these columns)"""
        prompt, row = self._prompt(place, row)
        return prompt, *(answer_of(place, row, key, self.template) for key in keys)

    def _questions(self, split):
        rows = []
        for place, row in self.lines[split]:
            columns = {k: v for k, v in row.items() if k not in ("prompt", "completion", "ended")}
            answers = ["completion"] if "completion" in row else []
            prompt, *texts = self._answers(place, row, *answers)
            for text in texts:
                columns.setdefault("reference", text.strip())
            rows.append((prompt, columns))
        return rows

    def _demonstrations(self, split):
        place, first = self.lines[split][0]
        chosen = "completion" not in first and "chosen" in first
        labels = "label" in first and not chosen
        if chosen:
            self._note("a preference file: its chosen answers are the demonstrations")
        elif labels:
            self._note("a feedback file: its desirable answers are the demonstrations")
        rows = []
        for where, row in self.lines[split]:
            texts = self._answers(where, row, "chosen" if chosen else "completion")
            if not chosen and ("label" in row) != labels:
                a, b = (where, place) if labels else (place, where)
                raise UserError(f'{a}: no column "label", which {b} has; label all rows, or none')
            if not labels or row["label"]:
                rows.append(texts)
        return rows

    def _pairs(self, split):
        return [self._answers(*line, "chosen", "rejected") for line in self.lines[split]]

    def _graded(self, split):
        return [
            Graded(*pair, number_of(*line, "margin", 0.0), number_of(*line, "p", 1.0))
            for pair, line in zip(self._pairs(split), self.lines[split])
        ]

    def _has_pairs(self, split):
        first = self.lines[split][0][1]
        return "chosen" in first and "rejected" in first

    def _labelled(self, split):
        if self._has_pairs(split):
            return self._pairs(split)
        rows = []
        for place, row in self.lines[split]:
            if "label" not in row:
                raise UserError(f"{place}: {missing(row, 'label')}")
            rows.append(Labelled(*self._answers(place, row, "completion"), row["label"]))
        return rows

    # ---- the rows that are drawn, and what became of the others

    def _draw(self, rows_of, n, seed, split):
        """-> n of the useful rows of rows_of(split), all of them if n is None"""
        self._note_template()
        rows, lost = self._useful(rows_of, split)
        if n is not None and n < len(rows):
            lost["not drawn"] = len(rows) - n
            rows = random.Random(seed).sample(rows, n)
        drawn = Drawn(rows)
        if split == "train":
            drawn.account = self._account(len(rows), lost, *self._useful(rows_of, "test"))
        return drawn

    def _note_template(self):
        """Prints which columns and keys beside role and content the chat template reads, and which
        it does not."""
        reads, found = self.template.get("reads", ()), {}
        for place, row in self.lines["train"]:
            for name, what in for_template(row).items():
                found.setdefault(name, (place, what))
        for name, (place, what) in found.items():
            done = "the chat template reads it"
            lost = "no chat template here reads it, and it does not reach the model"
            self._note(f"{place}: {what}: {done if name in reads else lost}")

    def _teaches(self, answer):
        """Whether an answer has any content: a text, or something else that a template reads"""
        reads = self.template.get("reads", ())
        more = [json.loads(x.more or "{}") for x in getattr(answer, "messages", ())]
        return answer.strip() or any(key in reads for keys in more for key in keys)

    def _useful(self, rows_of, split):
        """-> (the rows that teach something, {reason: the number of rows left out for it})"""
        rows, kept = rows_of(split), []
        lost = Counter({"undesirable": len(self.lines[split]) - len(rows)})
        for row in rows:
            prompt, *answers = (x for x in row[:3] if isinstance(x, str))
            if not all(map(self._teaches, answers)):
                lost["empty"] += 1
            elif len(answers) == 2 and same(*answers):
                lost["equal"] += 1
            else:
                kept.append(row)
        if self.strict and (lost["empty"] or lost["equal"]):
            empty = f"{lost['empty']} rows with an empty answer"
            words = f"{empty} and {lost['equal']} whose two answers are equal"
            remedy = "mend them, or leave --strict out to drop them"
            raise UserError(f"{self.name}: {words} in the {split} split; {remedy}")
        if not kept:
            raise UserError(f"{self.name}: no usable row is left in the {split} split")
        return kept, lost

    def _account(self, used, lost, held_out, lost_there):
        """-> what became of each row, one line per file. used: the number of rows trained on.
        held_out: the rows held out. lost, lost_there: the rows left out of the two splits"""
        held, prompts = len(held_out), len({row[0] for row in held_out})
        train, test = f"{used:,} train", f"{held:,} held out ({prompts:,} prompts)"
        n_train, n_test = len(self.lines["train"]), len(self.lines["test"])
        if self.eval_file:
            there = account(self.eval_file, n_test, test, lost_there)
            lines = [account(self.name, n_train, train, lost), there]
        else:
            lines = [account(self.name, n_train + n_test, f"{train}, {test}", lost + lost_there)]
        if used < held or 1 in (used, held):
            few = f"{used:,} to train on, {held:,} held out"
            lines.append(f"warning: {few}; add rows, or name others with --eval-file")
        return "\n".join(lines)

    def _note(self, text):
        if text not in self.notes:
            self.notes.append(text)
            say(text)


def account(path, rows, words, lost):
    """-> a line on the rows of a file. lost: {reason: the number of rows left out for it}"""
    why = ", ".join(f"{lost[reason]:,} {reason}" for reason in REASONS if lost[reason])
    dropped = f", {sum(lost.values()):,} dropped ({why})" if why else ""
    return f"{path}: {rows:,} rows: {words}{dropped}"

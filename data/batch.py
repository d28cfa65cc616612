"""From text to tensors: encodes rows, chooses those of a step, and pads them."""

import contextlib
import random
from array import array
from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from data.chat import facts
from data.error import UserError, say
from packing import Packed, before, on_device, pack


class Rows:
    """Rows (prompt ids, *answers, *columns), all of one shape: like a list of tuples, but in only 2
    or 4 bytes per token. The ids of a text are a tuple. A row with columns is a named tuple whose
    fields have the names of the columns."""

    def __init__(self, rows=()):
        self.make = tuple  # makes a row of its values
        self.tokens = array("H")  # of all texts, one after the other: uint16, or "I", uint32
        self.ends = array("Q", [0])  # uint64: where each text ends
        self.numbers = []  # for each row its labels and numbers
        for row in rows:
            self.append(row)

    def append(self, row):
        texts = [x for x in row if isinstance(x, tuple)]
        self.n_texts, self.make = len(texts), getattr(row, "_make", tuple)
        for ids in texts:
            if self.tokens.typecode == "H" and max(ids, default=0) >= 2**16:
                self.tokens = array("I", self.tokens)
            self.tokens.extend(ids)
            self.ends.append(len(self.tokens))
        self.numbers.append(row[self.n_texts :])

    def __len__(self):
        return len(self.numbers)

    def __getitem__(self, i):
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        first = range(len(self))[i] * self.n_texts
        ends = self.ends[first : first + self.n_texts + 1].tolist()
        texts = (tuple(self.tokens[a:b].tolist()) for a, b in zip(ends, ends[1:]))
        return self.make((*texts, *self.numbers[i]))

    def __iter__(self):
        return (self[i] for i in range(len(self)))

    def save(self, file):
        """Writes a file that `mapped` reads."""
        kind = torch.uint16 if self.tokens.typecode == "H" else torch.uint32
        tokens = torch.frombuffer(self.tokens, dtype=kind)
        ends = torch.frombuffer(self.ends, dtype=torch.int64)
        torch.save(vars(self) | {"tokens": tokens, "ends": ends}, file)

    @staticmethod
    def mapped(path):
        """-> the rows that `save` wrote; their tokens stay in the file until they are read"""
        rows = Rows()
        vars(rows).update(torch.load(path, mmap=True, weights_only=False))
        return rows

    def with_columns(self, kind, numbers):
        """-> the same rows, each with more numbers at its end, as named tuples of type `kind`"""
        rows = Rows()
        vars(rows).update(vars(self))
        rows.numbers = [(*old, *new) for old, new in zip(self.numbers, numbers)]
        rows.make = kind._make
        return rows


def encode(rows, tokenizer, block_size, truncate=False, many=False):
    """Turns the texts of rows (prompt, *answers) into tuples of token ids, each answer with its end
    token; labels and numbers stay. Returns (rows, a note). many: the rows are a Rows, and a bar
    shows the progress if this takes long.

    If rows do not fit in block_size tokens, a UserError says how many. With `truncate` they are
    cut: first the prompt loses its beginning, down to one token, then each answer loses what is
    beyond block_size. A pair whose answers are then equal is dropped.
    """
    out, long = Rows() if many else [], []
    prompt_ids = lru_cache(4096)(lambda prompt, facts: tuple(tokenizer.prompt(prompt)))
    bar = tqdm(rows, "rows to tokens", delay=2, leave=False, disable=None) if many else rows
    for row in bar:
        prompt, *answers = row
        with _placed(prompt):
            x = prompt_ids(prompt, facts(prompt))
            ys = [tuple(tokenizer.answer(y, prompt)) if isinstance(y, str) else y for y in answers]
        longest = max([len(y) for y in ys if isinstance(y, tuple)])
        if len(x) + longest > block_size:
            long.append(len(x) + longest)
            if truncate:
                with _placed(prompt):
                    x = tuple(tokenizer.cut(prompt, max(1, block_size - longest)))
                    _room(len(x), block_size - 1)
            ys = [y[: block_size - len(x)] if isinstance(y, tuple) else y for y in ys]
            if ys[0] in ys[1:]:
                continue
        out.append(getattr(row, "_make", tuple)((x, *ys)))
    if long and not truncate:
        raise UserError(
            f"{len(long)} of {len(rows)} rows do not fit in {block_size} tokens (the longest has "
            f"{max(long)}): --truncate cuts them; or give sft.py a larger --block-size"
        )
    if not out:
        remedy = "a larger --block-size keeps more"
        raise UserError(f"no usable row is left once they are cut to {block_size} tokens; {remedy}")
    note = f"{len(long)} of {len(rows)} rows are cut to {block_size} tokens" if long else ""
    if equal := len(rows) - len(out):
        dropped = f"{equal} of them dropped because their answers became equal"
        note += f", {dropped}: {len(out)} rows are left"
    return out, _note(rows, tokenizer.notes(), note)


@contextlib.contextmanager
def _placed(prompt):
    """If the tokenizer or its chat template refuses a row of a file, the error names the row."""
    try:
        yield
    except UserError as e:
        place = getattr(prompt, "place", "")
        raise UserError(f"{place}: {e}" if place else str(e)) from None


def _note(rows, *more):
    """-> the note on rows that were drawn: what became of the other rows of a file, then `more`"""
    return "\n".join(filter(None, (getattr(rows, "account", ""), *more)))


def encode_prompts(rows, tokenizer, limit, truncate=False, what="test prompts"):
    """Rows (prompt, …) as text -> (Rows (ids, prompt, …), a note). A prompt of more than `limit`
    tokens raises UserError; with `truncate` it loses its beginning."""
    if limit < 1:
        room = "--max-new-tokens leaves no room for a prompt"
        raise UserError(f"{room}; it must be smaller than the context")
    out, long = Rows(), []
    for prompt, *rest in tqdm(rows, "prompts to tokens", delay=2, leave=False, disable=None):
        with _placed(prompt):
            ids = tokenizer.prompt(prompt)
            if len(ids) > limit:
                long.append(len(ids))
                if truncate:
                    ids = tokenizer.cut(prompt, limit)
                    _room(len(ids), limit)
        out.append((tuple(ids), prompt, *rest))
    if long and not truncate:
        raise UserError(
            f"{len(long)} of {len(out)} {what} are longer than the {limit} tokens that "
            f"--max-new-tokens leaves of the context (the longest has {max(long)}): lower it, or "
            "give --truncate"
        )
    room = f"{limit} tokens, which leaves room for the response"
    note = f"{len(long)} of {len(out)} {what} are cut to {room}" if long else ""
    return out, _note(rows, note)


def _room(least, limit):
    if least > limit:
        words = f"the chat template alone takes {least} tokens, but a prompt has room for"
        raise UserError(f"{words} {limit}; give a larger --block-size, or smaller --max-new-tokens")


class Batches:
    """batches[step] -> the rows of that optimizer step. They depend only on the step and the seed,
    so a resumed run sees the same rows.

    draw: a task's method demonstrations, preferences, graded or feedback. count: the size of a
    fixed set, which is shuffled anew for each epoch; None for every row of a file; 0 for fresh rows
    at every step. A batch is never larger than the set; the last one of an epoch may be smaller.
    make(f) -> f(), the rows of a fixed set, which one process may make for all others.
    """

    def __init__(self, draw, count, tokenizer, block_size, o, make=lambda f: f()):
        self.draw, self.seed, self.batch_size = draw, o.seed, o.batch_size
        self.encode = partial(
            encode, tokenizer=tokenizer, block_size=block_size, truncate=o.truncate
        )
        self.rows = self.per_epoch = None
        if count == 0:  # a probe, so that what does not fit is reported before training
            _, note = self.encode(draw(1000, o.seed))
            say(note and f"in a probe {note}")
        else:
            self.rows, note = make(lambda: self.encode(draw(count, o.seed), many=True))
            say(note)
            self.shuffled = Shuffled(self.rows, o.batch_size, o.seed)
            self.batch_size, self.per_epoch = self.shuffled.batch_size, self.shuffled.per_epoch

    def __getitem__(self, step):
        if self.rows is None:
            return self.encode(self.draw(self.batch_size, f"{self.seed} step {step}"))[0]
        return [self.rows[i] for i in self.shuffled[step]]


class Shuffled:
    """shuffled[step] -> the numbers of the rows of a fixed set that are the batch of that step"""

    def __init__(self, rows, batch_size, seed):
        self.n, self.seed = len(rows), seed
        self.batch_size = min(batch_size, self.n)
        if batch_size > self.n:
            set_of = f"the {self.n} rows of the set, so every step takes all of them"
            say(f"--batch-size {batch_size} is more than {set_of}")
        rest = self.n % self.batch_size  # a single last row joins the batch before it
        self.per_epoch = self.n // self.batch_size + (rest > 1)
        self.epoch = self.order = None

    def __getitem__(self, step):
        epoch, i = divmod(step, self.per_epoch)
        if self.epoch != epoch:
            self.epoch, self.order = epoch, list(range(self.n))
            random.Random(f"{self.seed} epoch {epoch}").shuffle(self.order)
        stop = self.n if i == self.per_epoch - 1 else (i + 1) * self.batch_size
        return self.order[i * self.batch_size : stop]


class Prompts:
    """next(prompts) -> the next batch of rows (ids, prompt, columns). The task's training prompts
    are shuffled anew for each pass. `longest`: the most tokens of a response. An enumerated world
    has few prompts, and a batch has each of them equally often."""

    def __init__(self, task, tokenizer, block_size, o, split="train", make=lambda f: f()):
        self.longest, self.cursor = task.longest(o.max_new_tokens, block_size), 0
        count, room = o.batch_size if task.outcomes else None, block_size - self.longest

        def rows():
            texts = task.prompts(count, o.seed, split)
            return encode_prompts(texts, tokenizer, room, o.truncate, "training prompts")

        self.rows, note = make(rows)
        say(note)
        self.shuffled = Shuffled(self.rows, o.batch_size, o.seed)
        self.batch_size, self.per_epoch = self.shuffled.batch_size, self.shuffled.per_epoch

    def __next__(self):
        self.cursor += 1
        return [self.rows[i] for i in self.shuffled[self.cursor - 1]]

    def state_dict(self):
        return {"cursor": self.cursor}

    def load_state_dict(self, state):
        self.cursor = state["cursor"]


def mismatched(rows, block_size):
    """Rows (prompt, response, …) -> rows (prompt, response to another prompt). Each row takes the
    response of the next row whose prompt differs; after the last row comes the first. With the
    prompts a, a, b rows 0 and 1 take the response of row 2, and row 2 takes that of row 0. If all
    prompts are equal, no row is left. If prompt and response do not fit in block_size, the response
    loses its end.
    """
    ring = [*rows, *rows]  # in which the first row follows the last
    partner = {}  # place of a row -> place of the next row with another prompt
    for i in reversed(range(len(ring) - 1)):
        if ring[i + 1][0] != ring[i][0]:
            partner[i] = i + 1
        elif i + 1 in partner:
            partner[i] = partner[i + 1]
    pairs = [(x, ring[partner[i]][1]) for i, (x, *_) in enumerate(rows) if i in partner]
    return [(x, y[: block_size - len(x)]) for x, y in pairs]


class Batch(NamedTuple):
    """B unique rows of prompt and response. Each is scored once, and `unfold` copies the scores to
    all rows that were handed in, so that a repeated row costs nothing."""

    ids: torch.Tensor  # (B, T) int64, padded on the right with 0
    mask: torch.Tensor  # (B, T) bool, True = a response token, its end token included
    text: torch.Tensor  # (B, T) bool, True = a token of prompt or response, False = padding
    inverse: torch.Tensor  # int64: for each row that was handed in, its index among the B
    columns: dict  # the other columns of the rows: name -> tensor, one entry per row
    packed: Packed  # the tokens that are computed

    def unfold(self, x):
        """x (B, …), one entry per unique row -> one entry for each row that was handed in"""
        return x.index_select(0, self.inverse)

    @property
    def length(self):
        """response tokens of each row that was handed in, end tokens included"""
        return self.unfold(self.mask.sum(1))

    @property
    def tokens(self):
        """the number of tokens that are computed"""
        return len(self.packed.ids)


def pad(rows, device="cpu", ends=False):
    """Rows of (prompt ids, response ids, *columns) -> Batch, for the log-probs of the responses or,
    with `ends`, for a score at the last token of each row"""
    unique = {}
    texts = rows if len(rows[0]) == 2 else [row[:2] for row in rows]
    inverse = torch.tensor([unique.setdefault(text, len(unique)) for text in texts])
    texts = list(unique)
    start = torch.tensor([len(x) for x, _ in texts])[:, None]
    stop = torch.tensor([len(x) + len(y) for x, y in texts])[:, None]
    column = torch.arange(int(stop.max()))
    text = column < stop
    mask = text & (column >= start)
    ids = torch.zeros(text.shape, dtype=torch.int64)
    ids[text] = torch.tensor([token for x, y in texts for part in (x, y) for token in part])
    packed = pack(ids, column == stop - 1 if ends else before(mask))
    return on_device(Batch(ids, mask, text, inverse, _columns(rows, 2), packed), device)


def pad_pairs(pairs, device="cpu", ends=False):
    """B pairs (prompt, chosen, rejected, *columns) -> Batch of 2B rows, the chosen ones first: one
    forward pass for both. The columns have one entry per pair. ends: as for `pad`"""
    rows = [pair[:2] for pair in pairs] + [(pair[0], pair[2]) for pair in pairs]
    batch = pad(rows, device, ends)
    return batch._replace(columns=on_device(_columns(pairs, 3), device))


def _columns(rows, first):
    """-> {name: tensor} of the columns of the rows from index `first` on"""
    names = getattr(rows[0], "_fields", ())[first:]
    return {name: torch.from_numpy(np.array([getattr(x, name) for x in rows])) for name in names}

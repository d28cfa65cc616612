"""From text to tensors: encode, choose a step's rows or prompts, pad."""
import random
from functools import cache
from typing import NamedTuple

import torch

from data.error import DataError


def encode(rows, tokenizer, block_size, truncate=False):
    """(prompt, *answers) as text -> as tuples of token ids, each answer with its end token; a label or a number goes through.

    Returns (rows, a note on what was cut, or ""). A row that does not fit in block_size tokens raises DataError with the count,
    or with `truncate` is cut: the prompt first, from its left, down to one token; then every answer at the same place, losing
    its end. A pair whose answers are equal after that is dropped.
    """
    out, cut, equal, widest = [], 0, 0, 0
    prompt_ids, answer_ids = cache(lambda text: tuple(tokenizer.encode(text))), cache(lambda text: tuple(tokenizer.answer(text)))
    for prompt, *answers in rows:
        x, ys = prompt_ids(prompt), [answer_ids(y) if isinstance(y, str) else y for y in answers]
        longest = max([len(y) for y in ys if isinstance(y, tuple)])
        if len(x) + longest > block_size:
            cut, widest = cut + 1, max(widest, len(x) + longest)
            x = x[-max(1, block_size - longest) :]
            ys = [y[: block_size - len(x)] if isinstance(y, tuple) else y for y in ys]
            if ys[0] in ys[1:]:
                equal += 1
                continue
        out.append((x, *ys))
    if cut and not truncate:
        raise DataError(f"{cut} of {len(rows)} rows do not fit in {block_size} tokens (the longest has {widest}): "
                        "--truncate cuts them, and sft.py takes a larger --block-size")  # fmt: skip
    if not out:
        raise DataError(f"no usable row is left once they are cut to {block_size} tokens; a larger --block-size keeps more")
    note = f"{cut} of {len(rows)} rows are cut to {block_size} tokens" if cut else ""
    return out, note + (f", {equal} of them dropped because their answers became equal" if equal else "")


def encode_prompts(prompts, tokenizer, limit, truncate=False, what="test prompts"):
    """Texts -> (lists of at most `limit` token ids, a note): a longer prompt raises DataError, or is cut from its left."""
    out = [tokenizer.encode(prompt) for prompt in prompts]
    long = [len(x) for x in out if len(x) > limit]
    if limit < 1:
        raise DataError("--max-new-tokens leaves no room for a prompt; it must be smaller than the context")
    if long and not truncate:
        raise DataError(f"{len(long)} of {len(out)} {what} are longer than the {limit} tokens that --max-new-tokens leaves "
                        f"of the context (the longest has {max(long)}): lower it, or --truncate")  # fmt: skip
    note = f"{len(long)} of {len(out)} {what} are cut to {limit} tokens, which leaves room for the response" if long else ""
    return [x[-limit:] for x in out], note


class Batches:
    """batches[step] -> the rows of that optimizer step: a function of step and seed alone, so a resumed run sees the same.

    draw: a task's demonstrations, preferences or feedback. count: the size of a fixed set, shuffled anew each epoch, None
    for every row of a file, 0 for fresh rows at every step. A batch larger than the set is the set; the last batch of an epoch
    may be smaller, and joins the one before where it would hold one row. `note` says what `truncate` has cut.
    """

    def __init__(self, draw, count, batch_size, seed, tokenizer, block_size, truncate=False):
        self.draw, self.seed, self.order = draw, seed, (None, None)
        self.fit = (tokenizer, block_size, truncate)
        if count == 0:
            self.rows, self.batch_size, self.per_epoch = None, batch_size, None
            _, note = encode(draw(1000, seed), *self.fit)  # a probe: what does not fit is told before the training
            self.note = note and f"of a probe, {note}"
        else:
            self.rows, self.note = encode(draw(count, seed), *self.fit)
            self._cut(batch_size)

    def _cut(self, batch_size):
        self.batch_size = min(batch_size, len(self.rows))
        self.per_epoch = len(self.rows) // self.batch_size + (len(self.rows) % self.batch_size > 1)

    def __getitem__(self, step):
        if self.rows is None:
            return encode(self.draw(self.batch_size, f"{self.seed} step {step}"), *self.fit)[0]
        epoch, i = divmod(step, self.per_epoch)
        if self.order[0] != epoch:
            order = list(range(len(self.rows)))
            random.Random(f"{self.seed} epoch {epoch}").shuffle(order)
            self.order = (epoch, order)
        stop = len(self.rows) if i == self.per_epoch - 1 else (i + 1) * self.batch_size
        return [self.rows[j] for j in self.order[1][i * self.batch_size : stop]]


class Prompts(Batches):
    """next(prompts) -> the next batch of rows (ids, prompt, columns), shuffled anew each pass over the task's training prompts; and the
    generator that draws responses and minibatches. How far both have come is part of a run's saved state. count: how many of the
    prompts a pass has, again and again where the task has fewer (None: each of them once); split: of which prompts."""

    def __init__(self, task, batch_size, seed, tokenizer, limit, truncate=False, count=None, split="train"):
        texts = task.prompts(count, seed, split)
        ids, self.note = encode_prompts([prompt for prompt, _ in texts], tokenizer, limit, truncate, "training prompts")
        self.rows = [(x, *text) for x, text in zip(ids, texts)]
        self.seed, self.order, self.cursor, self.sampled = seed, (None, None), 0, 0  # sampled: tokens of all responses so far
        self.generator = torch.Generator().manual_seed(seed)
        self._cut(batch_size)

    def __next__(self):
        self.cursor += 1
        return self[self.cursor - 1]

    def minibatches(self, n, updates, parts):
        """-> the places of n responses in `parts` shuffled parts, once for each of the updates; as they stand where there is one."""
        if updates == parts == 1:
            return [torch.arange(n)]
        return [part for _ in range(updates) for part in torch.randperm(n, generator=self.generator).tensor_split(min(parts, n))]

    def state_dict(self):
        return {"cursor": self.cursor, "sampled": self.sampled, "generator": self.generator.get_state()}

    def load_state_dict(self, state):
        self.cursor, self.sampled = state["cursor"], state["sampled"]
        self.generator.set_state(state["generator"].cpu())


def sides(pairs):
    """B rows (prompt, chosen, rejected, …) -> 2B rows (prompt, response), the chosen ones first: one forward pass for both."""
    return [(row[0], row[1]) for row in pairs] + [(row[0], row[2]) for row in pairs]


def mismatched(rows, block_size):
    """Rows (prompt, response, …) -> rows (prompt, another prompt's response): that of the next row, around the end, whose prompt
    differs. None is left where all prompts are equal. Where the two do not fit in block_size, the prompt loses its beginning."""
    n, partner = len(rows), None
    partners = []
    for i in reversed(range(2 * n - 1)):  # twice around, so that the last rows know their partner
        if rows[(i + 1) % n][0] != rows[i % n][0]:
            partner = (i + 1) % n
        if i < n and partner is not None:
            partners.append((i, partner))
    pairs = [(rows[i][0], rows[j][1]) for i, j in reversed(partners)]
    return [(x[-max(1, block_size - len(y)) :], y) for x, y in pairs]


class Batch(NamedTuple):
    ids: torch.Tensor  # (B, T) int64, padded on the right with 0
    mask: torch.Tensor  # (B, T) bool, True = a response token, its end token included
    text: torch.Tensor  # (B, T) bool, True = a token of prompt or response, False = padding
    index: torch.Tensor  # (N,) int64, where mask[:, 1:].flatten() is True
    row: torch.Tensor  # int64, one for each row that was given: its place among the B
    tokens: int  # prompt and response tokens of the B rows, padding not counted

    def spread(self, x):
        """x (B, …), one entry a different row -> one entry for each row that was given."""
        return x.index_select(0, self.row)


def pad(given, device="cpu"):
    """Rows of (prompt ids, response ids) -> Batch of the B different ones: each is scored once, and `spread` gives every row its
    score."""
    place = {}
    row = torch.tensor([place.setdefault(pair, len(place)) for pair in given])
    rows = list(place)
    start = torch.tensor([len(x) for x, _ in rows])[:, None]
    stop = torch.tensor([len(x) + len(y) for x, y in rows])[:, None]
    column = torch.arange(int(stop.max()))
    text = column < stop
    mask = text & (column >= start)
    ids = torch.zeros(text.shape, dtype=torch.int64)
    ids[text] = torch.tensor([token for x, y in rows for part in (x, y) for token in part])
    index = mask[:, 1:].flatten().nonzero().squeeze(1)
    return Batch(ids.to(device), mask.to(device), text.to(device), index.to(device), row.to(device), int(stop.sum()))

"""Cuts the rows of a step by their tokens, if --micro-tokens limits those of a forward pass."""

import torch

from packing import row_lengths


def lengths(rows):
    """-> (len(rows),) int64: the tokens of each row, prompt and responses"""
    if hasattr(rows, "host"):  # a Rollout
        return row_lengths(rows.host.mask)
    return torch.tensor([sum(len(x) for x in row if isinstance(x, tuple)) for row in rows])


def by_tokens(length, rows, tokens):
    """length (n,) -> the rows of each part, at most `rows` of them. A part has rows of similar
    length, with at most `tokens` tokens together; a longer row is alone. The cut depends only on
    lengths, so all processes cut alike. Lengths 5 9 4 8 and 13 tokens give the parts 0 2, 3 and 1.
    """
    parts, used = [[]], 0
    for i in length.argsort(stable=True).tolist():
        if parts[-1] and (len(parts[-1]) == rows or used + int(length[i]) > tokens):
            parts.append([])
            used = 0
        parts[-1].append(i)
        used += int(length[i])
    return [torch.tensor(sorted(part)) for part in parts]


def taken(rows, part):
    """-> the rows of a part"""
    if isinstance(part, slice) or hasattr(rows, "host") or torch.is_tensor(rows):
        return rows[part]
    return [rows[i] for i in part.tolist()]

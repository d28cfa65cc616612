"""Packing: which tokens of a batch are computed, and how attention finds them.

    pack         ids (B, T), and whose states are wanted -> Packed
    before       a mask of tokens -> True at the position that predicts each of them
    last_token   a mask of tokens -> True at the last one of each row

A padded table of B rows and T columns wastes work twice: on padding, and on prompts that several
rows have in common. So the tokens that matter are put into one list, without padding, and a
beginning that rows share is in it once. An example is the log-probs of two responses, 7 8 and 9, to
the prompt 5 6:

    ids     5 6 7 8      wanted  - 6 7 -      the tokens that predict 7 and 8
            5 6 9 0              - 6 - -      the token that predicts 9
    list    5 6 7        N = 3 tokens; no prediction needs the states of 8 and 9
    rows    0 1 2        where the tokens of each row are in the list; padding repeats the last
            0 1 1

Embeddings, norms and linear layers run on the list. Only attention needs rows: it gathers the
tokens into rows, and its output back into the list.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_map

SPLIT_BELOW = 0.7  # prefixes are attended separately if that leaves a smaller share of B·T² pairs
SHARE_ABOVE = 0.04  # rows without padding share tokens if that spares a larger share of them
CALL = 2**14  # the cost of one more call of attention, in pairs of a query and a key
MOST_CALLS = 4  # calls for the rows of a batch, at most


class Packed(NamedTuple):
    """The N tokens of B rows that are computed, and the M among them whose states are wanted.

    Rows share equal tokens up to and including the first that is wanted, usually the last of the
    prompt. If few rows differ in their first p columns, as the responses to one prompt do, these
    columns are attended once for all rows that have them. In the last block, what comes after keys
    and values is computed for the M wanted states alone. T' is the width of the table up to the
    last wanted state.
    """

    ids: torch.Tensor  # (N,) int64
    position: torch.Tensor  # (N,) int64: the column of each token in its row
    places: torch.Tensor  # (M,) int64: where the wanted ones are in the flattened ids (B, T)
    wanted: torch.Tensor  # (M,) int64: which of the N tokens these are
    # (B, T') int64: each row's tokens, as indices of the list; in padding its last one
    rows: torch.Tensor
    tables: tuple  # these rows in groups of like length, each as wide as its longest
    prefixes: torch.Tensor | None  # (U, p) int64: the U different beginnings, attended separately
    # (N,) int64: each token's index in attention's output; None: its own
    gather: torch.Tensor | None
    gather_wanted: torch.Tensor  # (M,) int64: the same for the wanted tokens

    def select(self, x):
        """x (N, C) -> (M, C), of the tokens whose states are wanted"""
        return x.index_select(0, self.wanted)

    def attend(self, layer, qkv, sizes, final):
        """qkv (N, (H + 2K) D) -> (N, H D); in the final block (M, H D). sizes: (H, K, D). layer is
        unused here; a sampling cache needs it."""
        H, K, D = sizes
        q, kv = qkv.split((H * D, 2 * K * D), 1)
        starts, tails = self.tables, ()
        if self.prefixes is not None:
            starts, tails = (self.prefixes,), self.tables
        if self.gather is None:
            tables = [qkv.view(*self.rows.shape, -1, D)]
        else:
            tables = [_table(qkv, rows, D) for rows in starts]
        found = [_attention(*x.split((H, K, K), 2)) for x in tables]
        for rows in tails:
            k, v = _table(kv, rows, D).chunk(2, 2)
            found.append(_attention(_table(q, rows[:, self.prefixes.size(1) :], D), k, v))
        y = torch.cat(found) if len(found) > 1 else found[0]
        index = self.gather_wanted if final else self.gather
        return y if index is None else y.index_select(0, index)


def _table(x, rows, D):
    """x (N, heads · D), rows (R, T) -> (R, T, heads, D)"""
    return x.index_select(0, rows.flatten()).view(*rows.shape, -1, D)


def _attention(q, k, v):
    """Causal attention of the last Tq of Tk tokens. q (R, Tq, H, D), k and v (R, Tk, K, D) ->
    (R·Tq, H D)"""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    attend = _causal
    if q.is_cuda:
        from gpu import attention as attend
    return attend(q, k, v).transpose(1, 2).flatten(2).flatten(0, 1)


def _causal(q, k, v):
    Tq, Tk, visible = q.size(2), k.size(2), None
    if Tq < Tk:
        visible = torch.ones(Tq, Tk, dtype=torch.bool, device=q.device).tril(Tk - Tq)
    how = {"is_causal": visible is None, "enable_gqa": k.size(1) < q.size(1)}
    return F.scaled_dot_product_attention(q, k, v, visible, **how)


def pack(ids, wanted, device=None):
    """ids (B, T) int64; wanted (B, T) bool: the tokens whose states are needed. -> Packed, on
    `device` (by default that of ids). It is computed on the CPU, because its shapes would otherwise
    have to wait for numbers from the GPU."""
    device, ids, wanted = device or ids.device, ids.cpu(), wanted.cpu()
    length = row_lengths(wanted)  # tokens after the last wanted one are not computed
    length[0] = length[0].clamp(min=1)  # at least one token, even if no state is wanted
    B, T = len(ids), int(length.max())  # from here on T is T'
    real = torch.arange(T) < length[:, None]

    order, same = _order(ids[:, :T].where(real, -1))
    same &= (wanted.cumsum(1) - wanted.int() == 0)[order, :T]  # up to the first wanted state
    if real.all() and int(same.sum()) <= SHARE_ABOVE * B * T:
        same[:] = False
    owner = _owners(order, same)
    shared = owner != torch.arange(B)[:, None]  # another row computes this token
    new = real & ~shared
    rows = (new.flatten().cumsum(0).view(B, T) - 1).gather(0, owner).clamp(min=0)
    # padding repeats each row's own last token; if all rows shared one, a GPU would add its
    # gradients one after the other
    rows = rows.gather(1, torch.arange(T).minimum((length[:, None] - 1).clamp(min=0)))

    n_shared = shared.sum(1)
    p = _prefix_length(n_shared, T)
    row, column = new.nonzero(as_tuple=True)
    tables, prefixes, gather = _tables(row, column, rows, length, n_shared < p, p)
    tokens = rows[wanted[:, :T]]
    gather_wanted = gather[tokens]
    if not p and len(gather) == B * T:
        gather = None  # nothing is padded or shared: the list is the table
    places = wanted.flatten().nonzero()[:, 0]
    found = ids[:, :T][new], column.clone(), places, tokens, rows, tables, prefixes
    return on_device(Packed(*found, gather, gather_wanted), device)


def on_device(tree, device):
    """A tree of tensors on the CPU -> the same on a device. To CUDA they go in one copy, for which
    the program does not wait. MPS has no float64, so such tensors stay on the CPU until they are
    cast."""
    kind = torch.device(device).type
    if kind == "cuda":
        from gpu import upload

        return upload(tree, device)
    if kind == "mps":
        return tree_map(lambda x: x if x is None or x.dtype == torch.float64 else x.to(kind), tree)
    return tree


def _order(ids):
    """ids (B, T), padding -1 -> (order, same). order (B,) sorts the rows, so that rows that begin
    alike are neighbours. same (B, T) bool says of each token of the sorted rows whether it and all
    before it equal those of the row above.

    [5 6 7], [5 6 8] -> order 0 1, same [F F F], [T T F]"""
    keys = [row.numpy().tobytes() for row in ids]
    order = torch.tensor(sorted(range(len(ids)), key=keys.__getitem__))
    ids = ids[order]
    same = (ids[1:] == ids[:-1]).cumprod(1) > 0
    return order, F.pad(same, (0, 0, 1, 0))


def _owners(order, same):
    """-> (B, T) int64, for the rows in their original order: which row computes each token.

    order 1 0, same [F F F], [T T F]: row 1 comes first and computes all its tokens, row 0 takes two
    from it -> [1 1 0], [1 1 1]"""
    source = torch.where(same, 0, torch.arange(len(same))[:, None])
    source = source.cummax(0).values  # the nearest row, above or itself, with a new token here
    return order[source][order.argsort()]


def _tables(row, column, rows, length, has_prefix, p):
    """-> (tables, prefixes, gather) of a Packed. row, column (N,): where the tokens of the list are
    in the table; length (B,): how many columns of each row are computed; has_prefix (B,): True at
    the rows that contribute the U different prefixes. Attention's output has these prefixes first,
    then the rest of each row, group by group.

    rows [0 1 2], [0 1 3], p = 2 -> prefixes [0 1]; the output holds tokens 0 1 | 2 | 3, gather is
    0 1 2 3. With p = 0 it holds 0 1 2 | 0 1 3, and gather is 0 1 2 5."""
    prefixes = rows[has_prefix, :p] if p else None
    order = length.argsort(stable=True)
    cuts = _cuts(length[order], p)
    order = order if len(cuts) > 2 else torch.arange(len(rows))
    tables, start, n = [], torch.zeros_like(length), prefixes.numel() if p else 0
    for a, b in zip(cuts, cuts[1:]):
        group = order[a:b]
        width = int(length[group].max())
        if width > p:
            start[group] = n + torch.arange(b - a) * (width - p)
            n += (b - a) * (width - p)
            tables.append(rows[group, :width])
    gather = start[row] + column - p
    if p:
        in_prefix = (has_prefix.cumsum(0) - 1)[row] * p + column
        gather = torch.where(column < p, in_prefix, gather)
    return tuple(tables), prefixes, gather


def _cuts(length, p):
    """length (B,), sorted; p: how many columns are attended separately -> where the rows are cut
    into groups, each of which is attended in one call, as wide as its longest row. The cost is
    counted in pairs of a query and a key, and does not depend on any clock.

    length 1 … 1 (99 times) and 1000, p = 0: 100 · 1000² pairs in one call, 1000² + 99 in two
    -> 0 99 100"""
    pairs, cuts = (length - p).clamp(min=0) * length, [0, len(length)]
    while len(cuts) <= MOST_CALLS:
        found = []
        for a, b in zip(cuts, cuts[1:]):  # the first rows of a group become as wide as they are
            saved = torch.arange(1, b - a) * (pairs[b - 1] - pairs[a : b - 1])
            found += [(int(saved.max()), a + 1 + int(saved.argmax()))] if b - a > 1 else []
        saved, where = max(found, default=(0, 0))
        if saved <= CALL:
            break
        cuts = sorted([*cuts, where])
    return cuts


def _prefix_length(n_shared, T):
    """n_shared (B,): how many tokens of each row another row computes -> p, how many columns are
    best attended separately; 0: none. The cost is counted in pairs of a query and a key.

    n_shared 0 2, T = 3: one prefix of two tokens costs 2·2 pairs, the rest of the two rows 2·1·3.
    That is 10 of the 18 pairs of the table -> 2"""
    B, p = len(n_shared), torch.arange(1, T)
    different = n_shared.bincount(minlength=T).cumsum(0)[: T - 1]  # how many prefixes of p tokens
    pairs = different * p * p + B * (T - p) * T
    least = int(pairs.argmin()) if T > 1 else 0
    return least + 1 if T > 1 and pairs[least] < SPLIT_BELOW * B * T * T else 0


def before(mask):
    """mask (B, T) bool, of tokens -> True at the positions that predict them"""
    return F.pad(mask[:, 1:], (0, 1))


def last_token(mask):
    """mask (B, T) bool, of tokens -> True at the last one of each row"""
    return mask & (mask.flip(1).cumsum(1).flip(1) == 1)


def row_lengths(mask):
    """mask (B, T) bool -> (B,) int64: how many columns there are up to the last marked one"""
    return (mask * torch.arange(1, mask.size(1) + 1, device=mask.device)).amax(1)

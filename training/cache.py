"""Keeps the keys and values of the tokens that sampling has read, so that each is read once."""

import math

import torch

from packing import on_device


class Cache:
    """Keys and values of P prompts and of the G rows that each of them has.

    own      of each layer (2, P·K·G, columns, D), written at `column`, read up to `width`
    mask     what a row sees of these columns: 0, or -inf
    """

    def __init__(self, P, G, K, n, prompt_mask, static):
        """K heads; room for n drawn tokens; prompt_mask (1 or P, 1, L): 0, or -inf after a prompt.
        static: every step reads all columns; those that are still empty are masked."""
        self.P, self.G, self.K, self.n, self.static = P, G, K, n, static
        self.own = []
        self.start(prompt_mask)
        self.column = torch.full((1,), self.width, device=prompt_mask.device)

    def show_column(self):
        """The rows see one column more, the one that is written now."""
        self.width = self.mask.size(2) if self.static else self.width + 1
        self.seen = self.mask.index_fill_(2, self.column, 0).narrow(2, 0, self.width)

    def write(self, layer, qkv, sizes):
        """qkv (P·G, (H + 2K) D) of a token per row -> queries (P·K·G, H / K, D), and all keys and
        values of the rows' own, each (P·K·G, width, D)"""
        (H, K, D), P, G = sizes, self.P, self.G
        q, kv = qkv.split((H * D, 2 * K * D), 1)
        q = q.view(P, G, K, -1, D).transpose(1, 2).reshape(P * K * G, -1, D)
        new = kv.view(P, G, 2, K, D).permute(2, 0, 3, 1, 4).reshape(2, P * K * G, 1, D)
        self.own[layer].index_copy_(2, self.column, new)
        return q, *self.own[layer].narrow(2, 0, self.width).unbind()

    def rows(self, y):
        """y (P·K·G, H / K, D) -> (P·G, H D)"""
        P, G, K = self.P, self.G, self.K
        return y.view(P, K, G, -1, y.size(2)).transpose(1, 2).reshape(P * G, -1)

    def alive_rows(self, alive):
        alive = alive.view(self.P, self.G)
        return int(alive.any(1).sum() * alive.sum(1).max())

    def drop_finished(self, alive):
        alive = alive.view(self.P, self.G)
        prompts, most = alive.any(1).nonzero()[:, 0], int(alive.sum(1).max())
        rows = alive[prompts].sort(dim=1, descending=True, stable=True).indices[:, :most]
        head = torch.arange(self.K)
        heads = (prompts[:, None] * self.K + head).flatten()
        own = (heads.view(-1, self.K, 1) * self.G + rows[:, None]).flatten()
        rows = (prompts[:, None] * self.G + rows).flatten()
        self.P, self.G = len(prompts), most
        heads, own, rows = on_device((heads, own, rows), self.column.device)
        for layer, kv in enumerate(self.own):  # one at a time: never two whole caches
            self.own[layer] = kv.index_select(1, own)
        self.keep(heads, own)
        return rows


class OwnCache(Cache):
    """A short prompt is copied for each row: every row is a prompt of its own, G = 1."""

    def start(self, prompt_mask):
        self.copies, self.P, self.G = self.G, self.P * self.G, 1
        self.width = prompt_mask.size(2)
        if len(prompt_mask) > 1:
            prompt_mask = prompt_mask.repeat_interleave(self.copies * self.K, 0)
        later = prompt_mask.new_full((len(prompt_mask), 1, self.n), -math.inf)
        self.mask = torch.cat([prompt_mask, later], 2)

    def add_prompts(self, kv):
        """kv (2, P, K, L, D), of a layer"""
        L = kv.size(3)
        own = kv.new_zeros(2, kv.size(1), self.copies, self.K, L + self.n, kv.size(4))
        own[:, :, :, :, :L] = kv[:, :, None]
        self.own.append(own.flatten(1, 3))

    def attend(self, layer, qkv, sizes):
        q, k, v = self.write(layer, qkv, sizes)
        # for one query, faster than SDPA
        scores = torch.baddbmm(self.seen, q, k.mT, alpha=sizes[2] ** -0.5)
        return self.rows(torch.bmm(scores.softmax(2), v))

    def keep(self, heads, own):
        self.mask = self.mask if len(self.mask) == 1 else self.mask[own]

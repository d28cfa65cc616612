"""A model that reads a growing text, each token once, and draws the next: for chat.py."""

import os

import torch
import torch.nn.functional as F

from training.sampling import plain

MORE = 256  # columns that a full cache gets at a time


class Reader:
    """A model, with the keys and values of the tokens that it has read last, `known`.

    `GPT.hidden` takes a Reader in place of a Packed: it has the `ids` of N new tokens, their
    `position`, and a method by which they attend to all tokens before them. `cache`: for each layer
    (2K, columns, D), of which the first len(known) columns are in use.
    """

    def __init__(self, model):
        self.model, self.head = plain(model), model.head
        self.known, self.cache = [], []

    def read(self, ids):
        """ids, a list: a whole text -> logits (V,) of the token after it. The beginning that this
        text shares with the previous one is not read again."""
        self.known = os.path.commonprefix([self.known, ids[:-1]])  # of lists too
        n, device = len(self.known), self.head.device
        self.ids = torch.tensor(ids[n:], device=device)
        self.position = torch.arange(n, len(ids), device=device)
        h = self.model.hidden(self)
        self.known = list(ids)
        return F.linear(h, self.head)[0]

    def select(self, x):
        """x (N, C) -> (1, C): the last token's state is wanted"""
        return x[-1:]

    def attend(self, layer, qkv, sizes, final):
        """qkv (N, (H + 2K) D) of the new tokens -> (N, H D); in the final block (1, H D)"""
        (H, K, D), N, n = sizes, len(qkv), len(self.known)
        q, kv = qkv.view(N, -1, D).transpose(0, 1).split((H, 2 * K))  # (heads, N, D)
        if layer == len(self.cache):
            self.cache.append(kv[:, :0])
        if (lack := n + N - self.cache[layer].size(1)) > 0:
            self.cache[layer] = F.pad(self.cache[layer], (0, 0, 0, lack + MORE))
        self.cache[layer][:, n : n + N] = kv
        k, v = self.cache[layer][:, : n + N].split(K)
        visible = torch.ones(N, n + N, dtype=torch.bool, device=q.device).tril(n)
        if final:
            q, visible = q[:, -1:], visible[-1:]
        y = F.scaled_dot_product_attention(q[None], k[None], v[None], visible, enable_gqa=K < H)
        return y[0].transpose(0, 1).flatten(1)


def drawn_from(logits, temperature, top_p, generator):
    """logits (V,) -> a token drawn from the likeliest ones, which together have the probability
    top_p. If temperature is 0, -> the likeliest token"""
    logits = logits.float().cpu()
    if temperature == 0:
        return int(logits.argmax())
    p, token = (logits / temperature).softmax(0).sort(descending=True)
    p = p.where(p.cumsum(0) - p < top_p, 0)
    return int(token[torch.multinomial(p, 1, generator=generator)])

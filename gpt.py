"""The model that every script shares: a nanoGPT-style transformer, sampling, log-probs, files.

    GPT          ids (B, T) -> hidden states (B, T, C), logits (B, T, V), or log-probs (B, T)
    ScalarGPT    the same trunk with one number a position (B, T): a reward model or a critic
    sample       prompts of mixed length -> a Rollout of responses to them
    save, load   a checkpoint: weights, config, and the plain facts that a later stage needs

Shapes: B sequences, T tokens, V vocabulary, C width, H heads of queries, K of keys and of values,
D width of a head. Rows are padded on the right with id 0. Under causal attention the padding
changes nothing before it, so there is no attention mask, only the mask of what is trained. Entry t
of a (B, T) table of log-probs is log π(ids[t] | ids[<t]); column 0 is 0.
There is no dropout: log-probs of the same text must agree between sampling, scoring and training.
"""

import contextlib
import math
import os
from dataclasses import asdict, dataclass
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

LOGITS_BYTES = 2**28  # of logits, softmax and gradient held; above it, chunks computed again


@dataclass
class GPTConfig:
    vocab_size: int = 512
    block_size: int = 256  # longest sequence, prompt and response together
    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 128
    # what checkpoints of others differ in
    llama: bool = False  # RMSNorm, SwiGLU, rotary positions, no biases: all four, or GPT-2's
    n_kv_head: int = 0  # K: heads of keys and of values; 0: as many as of queries
    head_dim: int = 0  # D; 0: n_embd / n_head
    n_inner: int = 0  # width inside the MLP; 0: 4 n_embd
    norm_eps: float = 1e-5
    tied: bool = True  # the head is the token embedding
    qkv_bias: bool = False  # Qwen2: biases on queries, keys and values alone
    qk_norm: bool = False  # Qwen3: RMSNorm of each query and key
    rope_theta: float = 10000.0
    rope_scaling: tuple = ()  # Llama 3.1: (factor, low, high, context)

    def heads(self):
        """-> (H, K, D)"""
        H = self.n_head
        return H, self.n_kv_head or H, self.head_dim or self.n_embd // H


# ---- the transformer


class Linear(nn.Linear):
    __call__ = nn.Linear.forward  # no hooks: they cost a fifth of a small product


class LayerNorm(nn.LayerNorm):
    __call__ = nn.LayerNorm.forward


class RMSNorm(nn.RMSNorm):
    def __call__(self, x):
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.H, self.K, self.D = config.heads()
        bias = not config.llama
        self.qkv = Linear(config.n_embd, (self.H + 2 * self.K) * self.D, bias or config.qkv_bias)
        self.proj = Linear(self.H * self.D, config.n_embd, bias)
        self.qk_norm = config.qk_norm
        if config.qk_norm:
            self.q_norm = RMSNorm(self.D, config.norm_eps)
            self.k_norm = RMSNorm(self.D, config.norm_eps)

    def forward(self, x, cache=None, layer=0, angles=None):
        B, T, _ = x.shape
        qkv = self.qkv(x).view(B, T, -1, self.D).transpose(1, 2)  # (B, H + 2K, T, D)
        if angles:
            qkv = self.rotate(qkv, *angles)
        if cache is None:
            q, k, v = qkv.split((self.H, self.K, self.K), 1)
            grouped = self.K < self.H
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        else:
            y = cache.attend(layer, qkv)
        return self.proj(y.transpose(1, 2).reshape(B, T, self.H * self.D))

    def rotate(self, qkv, cos, sin):
        """Turns each pair (i, i + D/2) of queries and keys by its angle. RoPE, arXiv:2104.09864"""
        q, k, v = qkv.split((self.H, self.K, self.K), 1)
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        turned = [(x * cos + x.roll(self.D // 2, -1) * sin).to(v.dtype) for x in (q, k)]
        return torch.cat([*turned, v], 1)


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        C, inner, bias = config.n_embd, config.n_inner or 4 * config.n_embd, not config.llama
        Norm = RMSNorm if config.llama else LayerNorm
        self.llama = config.llama
        self.norm_1 = Norm(C, config.norm_eps)
        self.attention = Attention(config)
        self.norm_2 = Norm(C, config.norm_eps)
        self.up = Linear(C, 2 * inner if config.llama else inner, bias)  # llama: gate and up
        self.down = Linear(inner, C, bias)

    def forward(self, x, cache=None, layer=0, angles=None):
        x = x + self.attention(self.norm_1(x), cache, layer, angles)
        h = self.up(self.norm_2(x))
        if self.llama:
            gate, h = h.chunk(2, -1)
            return x + self.down(F.silu(gate) * h)
        return x + self.down(F.gelu(h, approximate="tanh"))  # one kernel; the exact form: many


class GPT(nn.Module):
    """A language model. Weights come from `seed` and are drawn on the CPU, so that every machine
    starts from the same ones: N(0, 0.02), residual projections N(0, 0.02 / sqrt(2 n_layer))."""

    def __init__(self, config, seed=0):
        super().__init__()
        whole = config.head_dim or config.n_embd % config.n_head == 0
        assert whole, f"n_embd {config.n_embd}, n_head {config.n_head}"
        self.config = config
        self.checkpoint_activations = False  # True: recompute each block in the backward pass
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        if not config.llama:
            self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = (RMSNorm if config.llama else LayerNorm)(config.n_embd, config.norm_eps)
        self.lm_head = None
        if not config.tied:
            self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        generator = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif p.dim() == 2:
                residual = name.endswith(("proj.weight", "down.weight"))
                std = 0.02 / math.sqrt(2 * config.n_layer) if residual else 0.02
                nn.init.normal_(p, 0.0, std, generator=generator)

    @property
    def head(self):
        """(V, C): the weights that give the logits"""
        return self.wte.weight if self.lm_head is None else self.lm_head.weight

    def hidden(self, ids, cache=None):
        """ids (B, T) int64 -> (B, T, C), after the final norm. With a cache, ids continue what it
        holds, and are added to it."""
        T, limit = ids.size(1), self.config.block_size
        assert T <= limit, f"{T} tokens, but the context is {limit}"
        position = cache.advance(T) if cache else torch.arange(T, device=ids.device)
        x, angles = self.wte(ids), None
        if self.config.llama:
            angles = rotations(self.config, position, x.dtype)
        else:
            x = x + self.wpe(position)
        for layer, block in enumerate(self.blocks):
            if self.checkpoint_activations and torch.is_grad_enabled():
                x = checkpoint(block, x, None, layer, angles, use_reentrant=False)
            elif cache:
                x = block.forward(x, cache, layer, angles)  # past the hooks: never compiled
            else:
                x = block(x, None, layer, angles)
        return self.norm(x)

    def forward(self, ids, cache=None):
        """ids (B, T) -> logits (B, T, V), every position."""
        return F.linear(self.hidden(ids, cache), self.head)

    def matmul_parameters(self):
        """N of the FLOP counts: the weights that multiply every token, the head among them. A
        forward pass is 2N a token."""
        inner = sum(p.numel() for p in self.blocks.parameters() if p.dim() == 2)
        return inner + self.head.numel()

    def logprobs(self, ids, mask, temperature=1.0, index=None, entropy=False):
        """Log-probs in nats of the tokens that `mask` marks, each given all that stands before it.

        ids (B, T) int64; mask (B, T) bool, True = a response token, end token included. Returns
        (B, T), 0 off the mask, float32 (float64 for a float64 model). With `entropy=True` also the
        entropies of these distributions, (B, T), nats, without gradient. `index`, if given, is
        `places(mask)`, so that no shape depends on a tensor's values.
        The head runs on the N marked positions alone; where (N, V) logits would not fit
        LOGITS_BYTES, in chunks that the backward pass computes again.
        """
        assert mask.shape == ids.shape and mask.dtype == torch.bool, "a bool mask for every id"
        index = places(mask) if index is None else index
        h = self.hidden(ids[:, :-1]).flatten(0, 1).index_select(0, index)  # (N, C)
        target = ids[:, 1:].flatten().index_select(0, index)  # (N,)
        rows = max(1, LOGITS_BYTES // (12 * self.config.vocab_size))  # of 3 tables, 4 bytes each
        parts = list(zip(h.split(rows), target.split(rows)))
        again = len(parts) > 1 and torch.is_grad_enabled()
        score = partial(checkpoint, self._score, use_reentrant=False) if again else self._score
        scored = [score(*part, temperature, entropy) for part in parts]
        tables = [_scatter(torch.cat(x), index, ids.shape) for x in zip(*scored)]
        return tuple(tables) if entropy else tables[0]

    def _score(self, h, target, temperature, entropy):
        """h (N, C), target (N,) -> log-probs (N,), and with `entropy` the entropies (N,). The
        softmax is never below float32."""
        logits = F.linear(h, self.head)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        logits = logits if temperature == 1.0 else logits / temperature
        logp = -F.cross_entropy(logits, target, reduction="none")
        if not entropy:
            return (logp,)
        with torch.no_grad():
            log_p = logits.log_softmax(-1)
            return logp, -(log_p.exp() * log_p).sum(-1)


def rotations(config, position, dtype):
    """position (T,) or (B, T) -> (cos, sin), (1 or B, 1, T, D): by what angles queries and keys are
    turned. Not below float32, and no state of the model, which a cast would round."""
    D, wide = config.heads()[2], torch.promote_types(dtype, torch.float32)
    two_i = torch.arange(0, D, 2, device=position.device, dtype=wide)
    frequency = 1 / config.rope_theta ** (two_i / D)
    if config.rope_scaling:  # long waves are stretched by the factor, short ones are not
        factor, low, high, context = config.rope_scaling
        kept = ((context * frequency / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
        frequency = frequency * (kept + (1 - kept) / factor)
    angle = position.view(-1, 1, position.size(-1), 1) * frequency
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


def places(mask):
    """mask (B, T) bool -> (N,) int64: where mask[:, 1:].flatten() is True"""
    return mask[:, 1:].flatten().nonzero().squeeze(1)


def _scatter(x, index, shape):
    """x (N,) -> a (B, T) table that holds it at the places `index`, and 0 elsewhere"""
    B, T = shape
    return F.pad(x.new_zeros(B * (T - 1)).index_copy(0, index, x).view(B, T - 1), (1, 0))


def token_logprobs(model, batch, mask=None):
    """-> (rows, T) log-probs of a data.Batch's response tokens, or of those that `mask` marks"""
    index = batch.index if mask is None else None
    return batch.spread(
        model.logprobs(batch.ids, batch.mask if mask is None else mask, index=index)
    )


def response_logprobs(model, batch, mean=False):
    """-> (rows,) log-probs of the responses of a data.Batch: sums over their tokens, in nats, or
    means."""
    logp = model.logprobs(batch.ids, batch.mask, index=batch.index).sum(1)
    return batch.spread(logp / batch.mask.sum(1) if mean else logp)


def response_scores(model, batch):
    """-> (rows,) scores of the responses of a data.Batch by a reward model"""
    return batch.spread(model.score(batch.ids, batch.mask))


def row_lengths(mask):
    """mask (B, T) bool, of the response tokens -> (B,) int64: tokens of prompt and response, up to
    the last that is marked"""
    return mask.size(1) - mask.int().flip(1).argmax(1)


class ScalarGPT(nn.Module):
    """A GPT trunk with Linear(C, 1) in place of the vocabulary. A reward model is read at the end
    token, a critic everywhere."""

    def __init__(self, config, seed=0, trunk=None):
        super().__init__()
        self.config = config
        self.trunk = trunk or GPT(config, seed)
        self.trunk.lm_head = None
        self.head = nn.Linear(config.n_embd, 1)
        generator = torch.Generator().manual_seed(seed)
        nn.init.normal_(
            self.head.weight, 0.0, 1 / math.sqrt(config.n_embd + 1), generator=generator
        )
        nn.init.zeros_(self.head.bias)

    def values(self, ids):
        """ids (B, T) -> (B, T), float32 or float64: a number a position, which sees that token and
        all before it."""
        return self._read(self.trunk.hidden(ids))

    def values_before(self, ids):
        """ids (B, T) -> (B, T): entry t is the value of what stands before token t; column 0: 0."""
        return F.pad(self.values(ids[:, :-1]), (1, 0))

    def score(self, ids, mask):
        """ids, mask (B, T) as for `logprobs` -> (B,): the value at each row's last response token,
        the end token where it has one."""
        rows = torch.arange(len(ids), device=ids.device)
        return self._read(self.trunk.hidden(ids)[rows, row_lengths(mask) - 1])

    def _read(self, h):
        """h (…, C) -> (…). The head is never below float32: bfloat16 would round scores near 2 to
        multiples of 0.016."""
        dtype = torch.promote_types(h.dtype, torch.float32)
        with torch.autocast(h.device.type, enabled=False):
            x = F.linear(h.to(dtype), self.head.weight.to(dtype), self.head.bias.to(dtype))
        return x.squeeze(-1)

    forward = values

    def matmul_parameters(self):
        """N of the FLOP counts, as in GPT; there is no vocabulary head here."""
        trunk = self.trunk.matmul_parameters() - self.trunk.head.numel()
        return trunk + self.head.weight.numel()

    @property
    def blocks(self):
        return self.trunk.blocks

    @property
    def checkpoint_activations(self):
        return self.trunk.checkpoint_activations

    @checkpoint_activations.setter
    def checkpoint_activations(self, on):
        self.trunk.checkpoint_activations = on


# ---- cache and sampling


class KVCache:
    """Keys and values of every layer, allocated once for `rows` sequences of `capacity` tokens.

    Row b holds length[b] tokens from the left, so rows of mixed length need no padding logic: a new
    token is written at its row's own length, and a query sees the keys up to itself. `width` bounds
    the longest row, as a plain int. `ragged` says that lengths may differ: where they do not, all
    rows are written in one piece.
    """

    def __init__(self, config, rows, capacity, device="cpu", dtype=torch.float32):
        self.H, self.K, D = config.heads()
        shape = (2, rows, self.K, capacity, D)
        self.kv = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layer)]
        self.length = torch.zeros(rows, dtype=torch.int64, device=device)
        self.row = torch.arange(rows, device=device)[:, None]
        self.column = torch.arange(capacity, device=device)
        self.hidden, self.seen = torch.tensor([-math.inf, 0.0], device=device, dtype=dtype)
        self.width, self.ragged = 0, False

    def advance(self, T):
        """Makes room for T more tokens a row and returns their positions (rows, T)."""
        capacity = len(self.column)
        assert self.width + T <= capacity, f"{self.width} + {T} tokens, but it holds {capacity}"
        self.position = self.length[:, None] + self.column[:T]
        self.empty, self.width = self.width == 0, self.width + T
        if not self.empty:
            later = (
                self.column[: self.width] > self.position[:, None, :, None]
            )  # (rows, 1, T, width)
            mask = torch.where(later, self.hidden, self.seen).expand(-1, self.H, -1, -1)
            groups = len(mask) * self.K, T * self.H // self.K, self.width
            self.mask = mask.reshape(groups)  # (rows·K, H/K·T, width)
        self.length = self.length + T
        return self.position

    def attend(self, layer, qkv):
        """qkv (rows, H + 2K, T, D) of tokens that `advance` made room for -> (rows, H, T, D)"""
        rows, _, T, D = qkv.size()
        q, kv = qkv.split((self.H, 2 * self.K), 1)
        new = kv.view(rows, 2, self.K, T, D)
        if self.ragged:
            self.kv[layer][:, self.row, :, self.position] = new.permute(0, 3, 1, 2, 4)
        else:
            self.kv[layer][:, :, :, self.width - T : self.width] = new.transpose(0, 1)
        if self.empty:
            k, v = kv.chunk(2, 1)
            grouped = self.K < self.H
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        k, v = self.kv[layer].flatten(1, 2)[:, :, : self.width]  # (rows·K, width, D) each
        q_ = q.reshape(rows * self.K, -1, D)  # the H/K queries of a key, one after the other
        scores = torch.baddbmm(
            self.mask, q_, k.mT, alpha=D**-0.5
        )  # for one query, faster than SDPA
        return torch.bmm(scores.softmax(-1), v).view(q.shape)

    def take(self, rows):
        """Goes on with these rows alone, in this order; a row may be named many times."""
        for layer, kv in enumerate(self.kv):
            self.kv[layer] = kv[:, rows]  # one at a time, so that never two whole caches are held
        self.length = self.length[rows]
        self.row = torch.arange(len(rows), device=rows.device)[:, None]


class Rollout:
    """Sampled responses, a row each. Every attribute is a tensor with one row a response, (N,),
    (N, 1) or (N, T), or None; all are cut, shuffled and trimmed together.

    ids       (N, T) int64    prompt and response, padded on the right with 0
    mask      (N, T) bool     the response up to and with its end token
    logp      (N, T) float32  the log-prob each token was drawn with, 0 off the mask
    finished  (N,) bool       the end token was drawn
    """

    def __init__(self, **columns):
        self.__dict__.update(columns)

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, rows):
        """-> these rows, in this order, without the columns that are padding in all of them"""
        width = self.ids.size(1)
        part = {name: x if x is None else x[rows] for name, x in vars(self).items()}
        longest = int(row_lengths(part["mask"]).max()) if len(part["mask"]) else 0
        for name, x in part.items():
            if x is not None and x.dim() == 2 and x.size(1) == width:
                part[name] = x[:, :longest]
        return Rollout(**part)

    def __or__(self, columns):
        """-> the same rows, with more columns or other ones"""
        return Rollout(**(vars(self) | columns))

    @staticmethod
    def cat(parts):
        """-> the rows of all parts, padded to the longest"""
        T = max(part.ids.size(1) for part in parts)
        columns = {}
        for name, x in vars(parts[0]).items():
            tensors = [getattr(part, name) for part in parts]
            if x is not None and x.dim() == 2 and x.size(1) == parts[0].ids.size(1):
                tensors = [F.pad(y, (0, T - y.size(1))) for y in tensors]
            columns[name] = None if x is None else torch.cat(tensors)
        return Rollout(**columns)

    @property
    def length(self):
        """(N, 1) int64: response tokens, end token included"""
        return self.mask.sum(1, keepdim=True)

    @property
    def tokens(self):
        """of prompts and responses, in all; a row without a response is not trained on"""
        return int((row_lengths(self.mask) * self.mask.any(1)).sum())

    def minibatches(self, updates, parts, generator):
        """Yields the rows in `parts` shuffled minibatches, once for each of the updates; as they
        stand where there is one. Until the first optimizer step π_θ is π_old, and the ratio of the
        two 1 to the bit: the first minibatch has no old_logp."""
        n = len(self)
        if updates == parts == 1:
            yield self | {"old_logp": None}
            return
        for update in range(updates):
            order = torch.randperm(n, generator=generator)
            for i, rows in enumerate(order.tensor_split(min(parts, n))):
                minibatch = self[rows]
                yield minibatch | {"old_logp": None} if update == i == 0 else minibatch

    def summary(self):
        """-> the figures of the responses that a record has"""
        return {
            "completions/mean_length": self.length.float().mean(),
            "completions/clipped_ratio": 1 - self.finished.float().mean(),
        }


@torch.no_grad()
def sample(
    model, prompts, max_new_tokens, end_id, temperature=1.0, generator=None, group=1, uniform=None
):
    """Draws `group` responses to each prompt from softmax(logits / temperature), nothing cut off.
    -> a Rollout

    prompts: B non-empty lists of token ids, of mixed length. Row i·group + j answers prompt i. Each
    prompt is read once, and its cache repeated. All uniforms are drawn up front by the generator,
    or given, (B·group, max_new_tokens): how rows are batched or dropped changes no sample.
    The end is looked for every 8 tokens, and rows that have ended are dropped once they are a
    quarter of the batch.
    """
    weight = model.head
    device = weight.device
    lengths = torch.tensor([len(p) for p in prompts])
    longest, B, R = int(lengths.max()), len(prompts), len(prompts) * group
    assert lengths.min() > 0, "a prompt needs at least one token"
    room = model.config.block_size - max_new_tokens
    assert longest <= room, f"a prompt of {longest} tokens, but there is room for {room}"
    uniform = uniforms(R, max_new_tokens, generator) if uniform is None else uniform
    uniform = uniform.to(device)
    prompt = torch.zeros(B, longest, dtype=torch.int64)
    tokens = torch.tensor([token for p in prompts for token in p])
    prompt[torch.arange(longest) < lengths[:, None]] = tokens
    ragged = bool(lengths.min() < longest)
    prompt, lengths = prompt.to(device), lengths.to(device)
    drawn = torch.zeros(R, max_new_tokens, dtype=torch.int64, device=device)
    p_drawn = torch.ones(R, max_new_tokens, device=device)
    rows = torch.arange(B, device=device).repeat_interleave(group)

    with torch.inference_mode():
        autocast = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if autocast else weight.dtype
        cache = KVCache(model.config, B, longest + max_new_tokens, device, dtype)
        last = torch.arange(B, device=device), lengths - 1
        h = model.hidden(prompt, cache)[last][rows]  # (R, C), it predicts the first token
        cache.length = lengths  # what was read past a prompt's end is overwritten before it is seen
        cache.ragged = ragged
        if group > 1:
            cache.take(rows)
        alive = torch.arange(R, device=device)  # the rows still drawn
        tokens, probs = [], []  # their last few draws
        for t in range(max_new_tokens):
            p = (F.linear(h, weight).float() / temperature).softmax(-1)  # (alive, V)
            cdf = p.cumsum(-1)
            u = uniform[:, t, None] * cdf[:, -1:]
            token = torch.searchsorted(cdf, u, right=True)  # (alive, 1): inverse CDF
            token.clamp_(max=cdf.size(1) - 1)
            tokens.append(token)
            probs.append(p.gather(1, token))
            if len(tokens) == 8 or t + 1 == max_new_tokens:
                new = slice(t + 1 - len(tokens), t + 1)
                drawn[alive, new] = torch.cat(tokens, 1)
                p_drawn[alive, new] = torch.cat(probs, 1)
                tokens, probs = [], []
                left = (drawn[alive, : t + 1] != end_id).all(1).nonzero()[:, 0]
                if len(left) == 0 or t + 1 == max_new_tokens:
                    break
                if len(left) <= 0.75 * len(alive):
                    cache.take(left)
                    token, alive, uniform = token[left], alive[left], uniform[left]
            h = model.hidden(token, cache)[:, 0]

    is_end = drawn == end_id
    finished = is_end.any(1)
    first_end = is_end.int().argmax(1) + 1
    n = torch.where(finished, first_end, max_new_tokens)[:, None]  # response tokens, end included
    prompt, start = prompt[rows], lengths[rows, None]
    T = int((start + n).max())
    column = torch.arange(T, device=device)
    mask = (column >= start) & (column < start + n)
    kept = torch.arange(max_new_tokens, device=device) < n
    ids = F.pad(prompt, (0, T - longest))
    ids[mask] = drawn[kept]
    logp = torch.zeros(R, T, device=device)
    logp[mask] = p_drawn[kept].log()
    return Rollout(ids=ids, mask=mask, logp=logp, finished=finished)


def uniforms(rows, tokens, generator=None):
    """-> the random numbers of so many samples, (rows, tokens), on the generator's device"""
    at = generator.device if generator else "cpu"
    return torch.rand(rows, tokens, generator=generator, device=at)


# ---- files


def write(obj, path):
    """torch.save through a temporary file and a rename: `path` is always whole, or as it was. A
    link is written through. Raises OSError where it cannot be written."""
    path = os.path.realpath(path)
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as f:  # a file object, as torch writes a file's name into it
            torch.save(obj, f)
        os.replace(temporary, path)
    except BaseException as e:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        if isinstance(e, RuntimeError) and isinstance(e.__context__, OSError):
            raise e.__context__ from None  # torch hides the cause
        raise


def save(model, path, **meta):
    """Writes the weights, the config and `meta`: strings, numbers, lists and dicts."""
    kind, config = type(model).__name__, asdict(model.config)
    write({"nanopo": kind, "config": config, "model": model.state_dict(), "meta": meta}, path)


def load(path, device="cpu", mapped=False):
    """-> (model, meta), with the weights as saved. Raises ValueError, one line, where the file is
    not a whole checkpoint of ours. mapped: the weights stay in the file until they are read."""
    try:
        file = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise ValueError(f"{path} is a directory; give the .pt file in it") from None
    except Exception as e:  # torch raises a zoo of types for a file that is cut short
        reason = type(e).__name__
        raise ValueError(f"{path} is not a whole checkpoint ({reason}); train it again") from None
    if not isinstance(file, dict) or file.get("nanopo") not in ("GPT", "ScalarGPT"):
        raise ValueError(f"{path} is not a checkpoint of these scripts; give one that sft.py wrote")
    try:
        kind = {"GPT": GPT, "ScalarGPT": ScalarGPT}[file["nanopo"]]
        with torch.device("meta"):  # no weight is drawn first
            model = kind(GPTConfig(**file["config"]))
        model.load_state_dict(file["model"], assign=True)
        return model.to(device), file["meta"]
    except (
        RuntimeError,
        LookupError,
        TypeError,
        AttributeError,
        AssertionError,
        StopIteration,
    ) as e:
        reason = (str(e) or type(e).__name__).splitlines()[0]
        said = f"{path}: weights and config disagree ({reason}); train it again"
        raise ValueError(said) from None

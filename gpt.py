"""The model that every script shares: a nanoGPT-style transformer, log-probs, files.

    GPT          ids (B, T) -> log-probs (B, T) or logits (B, T, V)
    ScalarGPT    the same trunk with one number a position (B, T): a reward model or a critic
    layout       ids (B, T) -> the tokens that are computed: no padding, and what rows share once
    plain        the forward pass without modules, for sampling
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
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

FEWER = 0.7  # pairs of a query and a key, if rows' beginnings are attended on their own
LITTLE = 0.04  # of the tokens: gathering rows that nothing pads costs more than sharing so few
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

    def forward(self, x, at, layer, angles, last):
        qkv = self.qkv(x)  # (N, (H + 2K) D)
        if angles:
            qkv = self.rotate(qkv, *angles)
        return self.proj(at.attend(layer, qkv, (self.H, self.K, self.D), last))

    def rotate(self, qkv, cos, sin):
        """Turns each pair (i, i + D/2) of queries and keys by its angle. RoPE, arXiv:2104.09864"""
        q, k, v = qkv.view(len(qkv), -1, self.D).split((self.H, self.K, self.K), 1)
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        turned = [(x * cos + x.roll(self.D // 2, -1) * sin).to(v.dtype) for x in (q, k)]
        return torch.cat([*turned, v], 1).flatten(1)


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

    def forward(self, x, at, layer=0, angles=None, last=False):
        """x (N, C) -> (N, C); in the last block (M, C), of the tokens whose states are asked for"""
        y = self.attention(self.norm_1(x), at, layer, angles, last)
        x = (at.asked(x) if last else x) + y
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

    def hidden(self, at):
        """at: a Layout, or a Drawing of training/sampling.py -> (M, C): the states that are asked
        for, after the final norm."""
        x, angles = self.wte(at.ids), None
        if self.config.llama:
            angles = rotations(self.config, at.position, x.dtype)
        else:
            x = x + self.wpe(at.position)
        for layer, block in enumerate(self.blocks):
            last = layer == len(self.blocks) - 1
            if self.checkpoint_activations and torch.is_grad_enabled():
                x = checkpoint(block, x, at, layer, angles, last, use_reentrant=False)
            else:
                x = block(x, at, layer, angles, last)
        return self.norm(x)

    def forward(self, ids):
        """ids (B, T) -> logits (B, T, V), every position."""
        h = self.hidden(layout(ids, torch.ones_like(ids, dtype=torch.bool)))
        return F.linear(h, self.head).view(*ids.shape, -1)

    def matmul_parameters(self):
        """N of the FLOP counts: the weights that multiply every token, the head among them. A
        forward pass is 2N a token."""
        inner = sum(p.numel() for p in self.blocks.parameters() if p.dim() == 2)
        return inner + self.head.numel()

    def logprobs(self, ids, mask, temperature=1.0, entropy=False, at=None):
        """Log-probs in nats of the tokens that `mask` marks, each given all that stands before it.

        ids (B, T) int64; mask (B, T) bool, True = a response token, end token included. Returns
        (B, T), 0 off the mask, float32 (float64 for a float64 model). With `entropy=True` also the
        entropies of these distributions, (B, T), nats, without gradient. at: `layout(ids,
        before(mask))`, if it is there already.
        The head runs on the M marked positions alone; where (M, V) logits would not fit
        LOGITS_BYTES, in chunks that the backward pass computes again.
        """
        assert mask.shape == ids.shape and mask.dtype == torch.bool, "a bool mask for every id"
        at = at or layout(ids, before(mask))
        h = self.hidden(at)  # (M, C)
        target = ids.flatten().index_select(0, at.places + 1)  # (M,)
        rows = max(1, LOGITS_BYTES // (12 * self.config.vocab_size))  # of 3 tables, 4 bytes each
        parts = list(zip(h.split(rows), target.split(rows)))
        again = len(parts) > 1 and torch.is_grad_enabled()
        score = partial(checkpoint, self._score, use_reentrant=False) if again else self._score
        scored = [score(*part, temperature, entropy) for part in parts]
        tables = [_scatter(torch.cat(x), at, ids.shape) for x in zip(*scored)]
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
    """position (N,) -> (cos, sin), (N, 1, D): by what angles queries and keys are turned. Not below
    float32, and no state of the model, which a cast would round."""
    D, wide = config.heads()[2], torch.promote_types(dtype, torch.float32)
    two_i = torch.arange(0, D, 2, device=position.device, dtype=wide)
    frequency = 1 / config.rope_theta ** (two_i / D)
    if config.rope_scaling:  # long waves are stretched by the factor, short ones are not
        factor, low, high, context = config.rope_scaling
        kept = ((context * frequency / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
        frequency = frequency * (kept + (1 - kept) / factor)
    angle = position.view(-1, 1, 1) * frequency
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


def _scatter(x, at, shape):
    """x (M,), of the states asked for -> a (B, T) table with each at the token that comes next"""
    return x.new_zeros(shape).view(-1).index_copy(0, at.places + 1, x).view(shape)


# ---- which tokens are computed


class Layout(NamedTuple):
    """What is computed of B rows of tokens: no padding, and once what rows have in common from the
    start up to the first state that is asked for, which is their prompt.

    The N tokens stand in one list, on which embeddings, norms and linear layers run. Attention
    alone needs rows: it gathers the tokens into them, and its output back into the list. Where few
    rows differ in their first p columns, as the responses to one prompt do, these columns are
    attended once. In the last block, what comes after keys and values is computed for the M states
    that are asked for.
    """

    ids: torch.Tensor  # (N,) int64
    position: torch.Tensor  # (N,) int64
    places: torch.Tensor  # (M,) int64: where the states asked for stand in the flat (B, T) table
    read: torch.Tensor  # (M,) int64: which of the N tokens these are
    rows: torch.Tensor  # (B, T) int64: the tokens of each row; in padding, which nothing sees, 0
    heads: torch.Tensor | None  # (D, p) int64: the different beginnings, attended on their own
    seen: torch.Tensor | None  # (T - p, T) bool: what the columns after them see
    first: torch.Tensor | None  # (N,) int64: where attention's output has a token; None: in place
    last: torch.Tensor  # (M,) int64: the same of the states asked for

    def asked(self, x):
        """x (N, C) -> (M, C)"""
        return x.index_select(0, self.read)

    def attend(self, layer, qkv, sizes, last):
        """qkv (N, (H + 2K) D) -> (N, H D); in the last block (M, H D)"""
        H, K, D = sizes
        if self.heads is None:
            qkv = qkv if self.first is None else qkv.index_select(0, self.rows.flatten())
            y = _causal(qkv.view(*self.rows.shape, -1, D), H, K)
        else:
            q, kv = qkv.split((H * D, 2 * K * D), 1)
            q, kv = _table(q, self.rows[:, self.heads.size(1) :], D), _table(kv, self.rows, D)
            tails = _attend(q, *kv.chunk(2, 2), attn_mask=self.seen)
            y = torch.cat([_causal(_table(qkv, self.heads, D), H, K), tails])
        index = self.last if last else self.first
        return y if index is None else y.index_select(0, index)


def _table(x, rows, D):
    """x (N, heads · D), rows (R, T) -> (R, T, heads, D)"""
    return x.index_select(0, rows.flatten()).view(*rows.shape, -1, D)


def _causal(qkv, H, K):
    """qkv (R, T, H + 2K, D) -> (R·T, H D)"""
    return _attend(*qkv.split((H, K, K), 2), is_causal=True)


def _attend(q, k, v, **seen):
    """q (R, Tq, H, D), k and v (R, Tk, K, D) -> (R·Tq, H D)"""
    grouped = k.size(2) < q.size(2)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    y = F.scaled_dot_product_attention(q, k, v, **seen, enable_gqa=grouped)
    return y.transpose(1, 2).flatten(2).flatten(0, 1)


def layout(ids, asked, device=None):
    """ids (B, T) int64; asked (B, T) bool: where a state is wanted -> their Layout. It is made on
    the CPU, so that no shape depends on a device's numbers. device: if not given, that of ids"""
    device, ids, asked = device or ids.device, ids.cpu(), asked.cpu()
    places, length = asked.flatten().nonzero()[:, 0], row_lengths(asked)
    length[0] = length[0].clamp(min=1)  # where nothing is asked for, one token
    B, T = len(ids), int(length.max())
    real = torch.arange(T) < length[:, None]
    ids = ids[:, :T].where(real, -1)
    order = sorted(range(B), key=[row.numpy().tobytes() for row in ids].__getitem__)
    order = torch.tensor(order)  # what begins alike stands together
    same = (ids[order[1:]] == ids[order[:-1]]).cumprod(1) > 0  # as the row above, up to here
    same, back = F.pad(same, (0, 0, 1, 0)), order.argsort()
    same &= (asked.cumsum(1) - asked.int() == 0)[order, :T]  # up to the first state asked for
    if real.all() and int(same.sum()) <= LITTLE * B * T:
        same[:] = False
    owner = (~same * torch.arange(B)[:, None]).cummax(0).values  # the row that computes it
    owner, same = order[owner[back]], same[back]
    new = real & ~same
    rows = (new.flatten().cumsum(0).view(B, T) - 1).gather(0, owner) * real
    read = rows[asked[:, :T]]

    row, column = new.nonzero(as_tuple=True)
    shared = same.sum(1)
    p, heads, seen, first = _columns(shared, T), None, None, row * T + column
    if p:
        begins = shared < p
        heads, seen = rows[begins, :p], torch.ones(T - p, T, dtype=torch.bool).tril(p)
        head, tail = (begins.cumsum(0) - 1)[row] * p + column, row * (T - p) + column - p
        first = torch.where(column < p, head, heads.numel() + tail)
    last = first[read]
    first = None if not p and len(first) == B * T else first  # nothing is padded or shared
    tensors = ids[new], column.clone(), places, read, rows, heads, seen, first, last
    return Layout(*(x if x is None else x.to(device) for x in tensors))


def _columns(shared, T):
    """shared (B,): how many tokens a row has in common with the one above -> how many columns are
    best attended on their own, 0 for none"""
    B, p = len(shared), torch.arange(1, T)
    different = shared.bincount(minlength=T).cumsum(0)[: T - 1]  # beginnings of p tokens
    pairs = different * p * p + B * (T - p) * T  # of a query and a key
    least = int(pairs.argmin()) if T > 1 else 0
    return least + 1 if T > 1 and pairs[least] < FEWER * B * T * T else 0


def before(mask):
    """mask (B, T) bool, of tokens -> where stands what predicts them"""
    return F.pad(mask[:, 1:], (0, 1))


def last(mask):
    """mask (B, T) bool -> where it is True for the last time in a row"""
    return mask & (mask.flip(1).cumsum(1).flip(1) == 1)


def token_logprobs(model, batch, temperature=1.0, entropy=False, mask=None):
    """-> (rows, T) log-probs of the response tokens of a data.Batch or a Rollout, or of those that
    `mask` marks; with `entropy` also the entropies"""
    mask, at = (batch.mask, batch.layout) if mask is None else (mask, None)
    found = model.logprobs(batch.ids, mask, temperature, entropy, at)
    return tuple(map(batch.spread, found)) if entropy else batch.spread(found)


def response_logprobs(model, batch):
    """-> (rows,) log-probs of the responses of a data.Batch or a Rollout: sums over their tokens,
    in nats."""
    return batch.spread(model.logprobs(batch.ids, batch.mask, at=batch.layout).sum(1))


def response_scores(model, batch):
    """-> (rows,) scores of the responses of a data.Batch, made with ends=True, by a reward model"""
    return batch.spread(model.score(batch.ids, batch.mask, batch.layout))


def row_lengths(mask):
    """mask (B, T) bool -> (B,) int64: columns up to the last that is marked"""
    return (mask * torch.arange(1, mask.size(1) + 1, device=mask.device)).amax(1)


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
        at = layout(ids, torch.ones_like(ids, dtype=torch.bool))
        return self._read(self.trunk.hidden(at)).view(ids.shape)

    def values_before(self, ids, mask, at=None):
        """ids, mask (B, T) and at as for `logprobs` -> (B, T): the value of what stands before each
        response token; 0 off the mask."""
        at = at or layout(ids, before(mask))
        return _scatter(self._read(self.trunk.hidden(at)), at, ids.shape)

    def score(self, ids, mask, at=None):
        """ids, mask (B, T) as for `logprobs` -> (B,): the value at each row's last response token,
        the end token where it has one. at: `layout(ids, last(mask))`, if it is there already."""
        h = self.trunk.hidden(at or layout(ids, last(mask)))
        assert len(h) == len(ids), "one state a row"
        return self._read(h)

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


# ---- without modules


def plain(module):
    """-> what a module computes, by the same formula on bare tensors. Where a product is small,
    finding its weights in modules takes as long as the product."""
    kind, own = type(module), dict(module.named_parameters(recurse=False))
    if kind is nn.ModuleList:
        return [plain(x) for x in module]
    if kind is nn.Embedding:
        return partial(torch.embedding, module.weight)
    if kind is Linear:
        return partial(F.linear, **own)
    if kind is LayerNorm:
        shape, eps = module.normalized_shape, module.eps
        return partial(torch.layer_norm, normalized_shape=shape, eps=eps, **own)
    if kind not in (Attention, Block, GPT):
        return module
    bare = kind.__new__(kind)  # its methods, and none of what makes it a module
    vars(bare).update({name: x for name, x in vars(module).items() if name[0] != "_"})
    vars(bare).update({name: plain(x) for name, x in module.named_children()})
    return bare if kind is GPT else bare.forward


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

"""The model that every script shares: a nanoGPT-style transformer, its log-probs, its files.

    GPT          ids (B, T) -> log-probs (B, T) or logits (B, T, V)
    ScalarGPT    the same trunk with one number per position (B, T): a reward model or a critic
    save, load   a checkpoint: weights, config, and the plain facts that a later stage needs

Shapes: B sequences, T tokens, V vocabulary, C width, H heads of queries, K of keys and of values,
D width of a head. Rows are padded on the right with id 0. Under causal attention padding
changes nothing before it, so there is no attention mask, only the mask of trained tokens. Entry t
of a (B, T) table of log-probs is log π(ids[t] | ids[<t]); column 0 is 0.
Inside the model the tokens of all rows are in one list, (N, C), without padding; see packing.py.
There is no dropout, because log-probs of the same text must agree between sampling, scoring and
training.
"""

import contextlib
import math
import os
from dataclasses import asdict, dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from head import target_logprobs
from packing import before, last_token, pack


@dataclass
class GPTConfig:
    vocab_size: int = 512
    block_size: int = 256  # longest sequence, prompt and response together
    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 128
    # for checkpoints of other model families
    llama: bool = False  # RMSNorm, SwiGLU, rotary positions and no biases, instead of GPT-2's four
    n_kv_head: int = 0  # K: heads of keys and of values; 0: as many as query heads
    head_dim: int = 0  # D; 0: n_embd / n_head
    n_inner: int = 0  # width inside the MLP; 0: 4 n_embd
    norm_eps: float = 1e-5
    tied: bool = True  # the head is the token embedding
    qkv_bias: bool = False  # Qwen2: biases on queries, keys and values only
    qk_norm: bool = False  # Qwen3: RMSNorm of each query and key
    rope_theta: float = 10000.0
    rope_scaling: tuple = ()  # Llama 3.1: (factor, low, high, context)

    def heads(self):
        """-> (H, K, D)"""
        H = self.n_head
        return H, self.n_kv_head or H, self.head_dim or self.n_embd // H


# ---- the transformer
#
# These layers are called without torch's module hooks, which cost 12 to 15 % of a toy model's step.
# Blocks keep their hooks, because --shard gathers a block's weights in a hook.


class Linear(nn.Linear):
    __call__ = nn.Linear.forward


class LayerNorm(nn.LayerNorm):
    __call__ = nn.LayerNorm.forward


class RMSNorm(nn.RMSNorm):
    def __call__(self, x):
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class Attention(nn.Module):
    """softmax(q kᵀ / √D + causal mask) v in each head, for the q, k and v of a row, as
    `F.scaled_dot_product_attention(q, k, v, is_causal=True)` computes it. Here x holds the N tokens
    of all rows in one list. `packed` knows the row of each token, and computes the attention."""

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

    def forward(self, x, packed, layer, rope, final):
        qkv = self.qkv(x)  # (N, (H + 2K) D)
        if rope:
            qkv = self.norm_and_rotate(qkv, *rope)
        return self.proj(packed.attend(layer, qkv, (self.H, self.K, self.D), final))

    def norm_and_rotate(self, qkv, cos, sin):
        """Turns each pair (i, i + D/2) of queries and keys by its angle. RoPE, arXiv:2104.09864"""
        q, k, v = qkv.view(len(qkv), -1, self.D).split((self.H, self.K, self.K), 1)
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        rotated = [(x * cos + x.roll(self.D // 2, -1) * sin).to(v.dtype) for x in (q, k)]
        return torch.cat([*rotated, v], 1).flatten(1)


class Block(nn.Module):
    """One layer: attention, then an MLP, each added to the residual stream. `layer` is its number,
    which the cache of keys and values needs when sampling. After the attention of the final block
    only the M wanted states go on."""

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

    def forward(self, x, packed, layer=0, rope=None, final=False):
        """x (N, C) -> (N, C); in the final block (M, C)"""
        y = self.attention(self.norm_1(x), packed, layer, rope, final)
        x = (packed.select(x) if final else x) + y
        h = self.up(self.norm_2(x))
        if self.llama:
            gate, h = h.chunk(2, -1)
            return x + self.down(F.silu(gate) * h)
        return x + self.down(F.gelu(h, approximate="tanh"))  # GPT-2's form


class GPT(nn.Module):
    """A language model. Its weights are drawn with `seed` on the CPU, so that every machine starts
    from the same ones: N(0, 0.02), for residual projections N(0, 0.02 / sqrt(2 n_layer))."""

    def __init__(self, config, seed=0):
        super().__init__()
        divides = config.head_dim or config.n_embd % config.n_head == 0
        assert divides, f"n_embd {config.n_embd}, n_head {config.n_head}"
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
        """(V, C): the weights that turn states into logits"""
        return self.wte.weight if self.lm_head is None else self.lm_head.weight

    def hidden(self, packed):
        """packed: a packing.Packed, or a sampling.Drawing, which reads from a cache. It has N
        token `ids`, their `position` in their rows, and methods to `attend` and to `select` the M
        wanted tokens. -> (M, C): the states of these, after the final norm"""
        x, rope = self.wte(packed.ids), None
        if self.config.llama:
            rope = rotations(self.config, packed.position, x.dtype)
        else:
            x = x + self.wpe(packed.position)
        for layer, block in enumerate(self.blocks):
            final = layer == len(self.blocks) - 1
            if self.checkpoint_activations and torch.is_grad_enabled():
                x = checkpoint(block, x, packed, layer, rope, final, use_reentrant=False)
            else:
                x = block(x, packed, layer, rope, final)
        return self.norm(x)

    def forward(self, ids):
        """ids (B, T) -> logits (B, T, V), every position."""
        packed = pack(ids, torch.ones_like(ids, dtype=torch.bool))
        return self.read(F.linear, packed).view(*ids.shape, -1)

    def read(self, f, packed, *how):
        """-> f(states (M, C), head (V, C), *how), computed from the wanted states. Inside f the
        weights are whole, even if the model is sharded."""
        return f(self.hidden(packed), self.head, *how)

    def matmul_parameters(self):
        """-> the number of weights that multiply every token, including those of the head. A
        forward pass costs twice as many FLOPs per token."""
        inner = sum(p.numel() for p in self.blocks.parameters() if p.dim() == 2)
        return inner + self.head.numel()

    def logprobs(self, ids, mask, temperature=1.0, entropy=False, packed=None):
        """Log-probs in nats of the tokens that `mask` marks, each given all tokens before it.

        ids (B, T) int64; mask (B, T) bool, True = a response token, end token included. Returns
        (B, T), 0 off the mask, float32 (float64 for a float64 model). With `entropy=True` also the
        entropies of these distributions, (B, T), nats, without gradient. packed: `pack(ids,
        before(mask))`, if it has been made already.
        The head runs on the M marked positions alone.
        """
        assert mask.shape == ids.shape and mask.dtype == torch.bool, "a bool mask for every id"
        packed = packed or pack(ids, before(mask))
        target = ids.flatten().index_select(0, packed.places + 1)  # (M,)
        logp, H = self.read(target_logprobs, packed, target, temperature, entropy)
        logp = scatter(logp, packed, ids.shape)
        return (logp, scatter(H, packed, ids.shape)) if entropy else logp


def rotations(config, position, dtype):
    """position (N,) -> cos and signed sin, (N, 1, D): x · cos + roll(x, D/2) · sin turns a query or
    a key. They are computed in float32 at least. The model does not store them, because its weights
    may be cast to fewer bits."""
    D, wide = config.heads()[2], torch.promote_types(dtype, torch.float32)
    two_i = torch.arange(0, D, 2, device=position.device, dtype=wide)
    frequency = 1 / config.rope_theta ** (two_i / D)
    if config.rope_scaling:  # the factor stretches long waves and leaves short ones
        factor, low, high, context = config.rope_scaling
        kept = ((context * frequency / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
        frequency = frequency * (kept + (1 - kept) / factor)
    angle = position.view(-1, 1, 1) * frequency
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


def scatter(x, packed, shape):
    """x (M,), one number per wanted state -> (B, T): each at the token after its state, else 0"""
    return x.new_zeros(shape).view(-1).index_copy(0, packed.places + 1, x).view(shape)


# ---- what the methods ask of a model
#
# batch is a data.Batch or a Rollout. A Batch holds B unique rows, and its `unfold` repeats results,
# one for each row that was handed in. A Rollout keeps equal rows, and its `unfold` does nothing.


def token_logprobs(model, batch, temperature=1.0, entropy=False, mask=None):
    """-> (rows, T) log-probs, in nats, of the response tokens, or of the tokens that `mask` marks;
    with `entropy` also the entropies"""
    mask, packed = (batch.mask, batch.packed) if mask is None else (mask, None)
    found = model.logprobs(batch.ids, mask, temperature, entropy, packed)
    return tuple(map(batch.unfold, found)) if entropy else batch.unfold(found)


def response_logprobs(model, batch):
    """-> (rows,) log-probs of the responses: sums over their tokens, in nats"""
    return batch.unfold(model.logprobs(batch.ids, batch.mask, packed=batch.packed).sum(1))


def response_scores(model, batch):
    """-> (rows,) scores by a reward model. The batch must be made with ends=True, because the score
    is read at the last token of a response."""
    return batch.unfold(model.score(batch.ids, batch.mask, batch.packed))


# ---- reward model and critic


class ScalarGPT(nn.Module):
    """A GPT trunk with Linear(C, 1) in place of the vocabulary's head. A reward model is read at
    the end token, a critic before every response token."""

    def __init__(self, config, seed=0, trunk=None):
        super().__init__()
        self.config = config
        self.trunk = trunk or GPT(config, seed)
        self.trunk.lm_head = None  # no vocabulary
        self.head = nn.Linear(config.n_embd, 1)
        generator = torch.Generator().manual_seed(seed)
        nn.init.normal_(
            self.head.weight, 0.0, 1 / math.sqrt(config.n_embd + 1), generator=generator
        )
        nn.init.zeros_(self.head.bias)

    def values(self, ids):
        """ids (B, T) -> (B, T), float32 or float64: one number per position, computed from its
        token and all tokens before it."""
        packed = pack(ids, torch.ones_like(ids, dtype=torch.bool))
        return self._scalar(self.trunk.hidden(packed)).view(ids.shape)

    def values_before(self, ids, mask, packed=None):
        """ids, mask (B, T) and packed as for `logprobs` -> (B, T): the value of the state before
        each response token; 0 off the mask."""
        packed = packed or pack(ids, before(mask))
        return scatter(self._scalar(self.trunk.hidden(packed)), packed, ids.shape)

    def score(self, ids, mask, packed=None):
        """ids, mask (B, T) as for `logprobs` -> (B,): the value at each row's last response token,
        which is the end token if it has one. packed: `pack(ids, last_token(mask))`, if it has been
        made already."""
        h = self.trunk.hidden(packed or pack(ids, last_token(mask)))
        assert len(h) == len(ids), "one state per row"
        return self._scalar(h)

    def _scalar(self, h):
        """h (…, C) -> (…), computed in float32 at least: bfloat16 would round scores near 2 to
        multiples of 0.016."""
        dtype = torch.promote_types(h.dtype, torch.float32)
        with torch.autocast(h.device.type, enabled=False):
            x = F.linear(h.to(dtype), self.head.weight.to(dtype), self.head.bias.to(dtype))
        return x.squeeze(-1)

    forward = values

    def matmul_parameters(self):
        """-> as in GPT, but with the scalar head instead of the vocabulary's"""
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


# ---- files


def write(obj, path):
    """torch.save to a temporary file, which is then renamed, so that `path` is never half written.
    If `path` is a link, its target is replaced. Raises OSError if the file cannot be written."""
    path = os.path.realpath(path)
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as f:  # given a path, torch would write its name into the file
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


def load(path, mapped=False):
    """-> (model, meta), with the weights as saved. Raises ValueError with a message of one line if
    the file is no complete checkpoint of these scripts. mapped: weights stay in the file until they
    are read."""
    try:
        file = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise ValueError(f"{path} is a directory; give the .pt file in it") from None
    except Exception as e:  # torch raises errors of many types for a truncated file
        reason = type(e).__name__
        raise ValueError(f"{path} is not a whole checkpoint ({reason}): name another one") from None
    if not isinstance(file, dict) or file.get("nanopo") not in ("GPT", "ScalarGPT"):
        raise ValueError(f"{path} is not a checkpoint of these scripts; give one that sft.py wrote")
    try:
        kind = {"GPT": GPT, "ScalarGPT": ScalarGPT}[file["nanopo"]]
        with torch.device("meta"):  # so that no weights are drawn
            model = kind(GPTConfig(**file["config"]))
        model.load_state_dict(file["model"], assign=True)
        return model, file["meta"]
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

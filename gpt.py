"""The model that every script shares: a nanoGPT-style transformer, its KV cache, sampling, log-probs and files.

    GPT          ids (B, T) -> hidden states (B, T, C), logits (B, T, V), or log-probs of the response tokens (B, T-1)
    ScalarGPT    the same trunk with one number per position (B, T): a reward model or a critic
    sample       prompts of mixed length -> responses, each with the log-probs it was drawn with
    save, load   a checkpoint: weights, config, and the plain facts that a later stage needs

Shapes: B sequences, T tokens, V vocabulary, C width, H heads, D = C / H. Rows are padded on the right with id 0; under
causal attention the padding changes nothing before it, so there is no attention mask, only the mask of what is trained.
There is no dropout: log-probs of the same text must agree between sampling, scoring and training.
"""
import math
import os
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

LOGITS_BYTES = 2**28  # of logits, softmax and gradient held for a backward pass; above it, chunks that are computed again


class CheckpointError(Exception):
    """A checkpoint that cannot be used; the message is one line and says what to do."""


@dataclass
class GPTConfig:
    vocab_size: int = 512
    block_size: int = 256  # longest sequence, prompt and response together
    n_layer: int = 4
    n_head: int = 4
    n_embd: int = 128


# ------------------------------------------------------------------------------------------------ the transformer


class Linear(nn.Linear):
    __call__ = nn.Linear.forward  # straight to the operation: the hooks of a module call cost a fifth of a small product


class LayerNorm(nn.LayerNorm):
    __call__ = nn.LayerNorm.forward


class Attention(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.qkv = Linear(config.n_embd, 3 * config.n_embd)
        self.proj = Linear(config.n_embd, config.n_embd)

    def forward(self, x, cache=None, layer=0):
        B, T, C = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.n_head, C // self.n_head)
        if cache is None:
            q, k, v = qkv.transpose(1, 3).unbind(2)  # (B, H, T, D) each
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            y = cache.attend(layer, qkv)
        return self.proj(y.transpose(1, 2).reshape(B, T, C))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.norm_1 = LayerNorm(config.n_embd)
        self.attention = Attention(config)
        self.norm_2 = LayerNorm(config.n_embd)
        self.up = Linear(config.n_embd, 4 * config.n_embd)
        self.down = Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x, cache=None, layer=0):
        x = x + self.attention(self.norm_1(x), cache, layer)
        return x + self.down(F.gelu(self.up(self.norm_2(x)), approximate="tanh"))  # one kernel, where the exact form is many


class GPT(nn.Module):
    """A language model whose head is its token embedding (tied). Weights come from `seed` and are drawn on the CPU, so
    that every machine starts from the same ones: N(0, 0.02), residual projections N(0, 0.02 / sqrt(2 n_layer))."""

    def __init__(self, config, seed=0):
        super().__init__()
        assert config.n_embd % config.n_head == 0, f"n_embd {config.n_embd} is not a multiple of n_head {config.n_head}"
        self.config = config
        self.checkpoint_activations = False  # True: recompute each block in the backward pass instead of keeping its activations
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = LayerNorm(config.n_embd)
        generator = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif p.dim() == 2:
                residual = name.endswith(("proj.weight", "down.weight"))
                nn.init.normal_(p, 0.0, 0.02 / math.sqrt(2 * config.n_layer) if residual else 0.02, generator=generator)

    def hidden(self, ids, cache=None):
        """ids (B, T) int64 -> (B, T, C), after the final norm. With a cache, ids continue what it holds, and are added to it."""
        T = ids.size(1)
        assert T <= self.config.block_size, f"{T} tokens, but the context is {self.config.block_size}"
        position = torch.arange(T, device=ids.device) if cache is None else cache.advance(T)
        x = self.wte(ids) + self.wpe(position)
        for layer, block in enumerate(self.blocks):
            if self.checkpoint_activations and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x, cache, layer)
        return self.norm(x)

    def forward(self, ids, cache=None):
        """ids (B, T) -> logits (B, T, V), every position."""
        return F.linear(self.hidden(ids, cache), self.wte.weight)

    def matmul_parameters(self):
        """N of the FLOP counts: the weights that multiply every token, the tied head among them. A forward pass is 2N a token."""
        return sum(p.numel() for name, p in self.named_parameters() if p.dim() == 2 and name != "wpe.weight")

    def logprobs(self, ids, mask, temperature=1.0, index=None, entropy=False):
        """Log-probs in nats of the tokens that `mask` marks, each given all that stands before it.

        ids (B, T) int64; mask (B, T) bool, True = a response token, end token included. Returns (B, T-1): entry t is
        log π(ids[t+1] | ids[≤t]) where mask[:, t+1], else 0; float32, or float64 for a float64 model. `index`, if given,
        is mask[:, 1:].flatten().nonzero() as (N,) int64, so that no shape depends on a tensor's values. With
        `entropy=True` also the entropy of each of these distributions, (B, T-1), nats, without gradient.
        The head runs on those N positions alone; where (N, V) logits would not fit LOGITS_BYTES, in chunks that the
        backward pass computes again.
        """
        B, T = ids.shape
        assert mask.shape == ids.shape and mask.dtype == torch.bool, f"mask {tuple(mask.shape)} {mask.dtype} for ids {(B, T)}"
        if index is None:
            index = mask[:, 1:].flatten().nonzero().squeeze(1)
        h = self.hidden(ids[:, :-1]).flatten(0, 1).index_select(0, index)  # (N, C)
        target = ids[:, 1:].flatten().index_select(0, index)  # (N,)
        rows = max(1, LOGITS_BYTES // (12 * self.config.vocab_size))  # logits, softmax and their gradient at 4 bytes
        parts = list(zip(h.split(rows), target.split(rows)))
        if len(parts) > 1 and torch.is_grad_enabled():
            scored = [checkpoint(self._score, *part, temperature, entropy, use_reentrant=False) for part in parts]
        else:
            scored = [self._score(*part, temperature, entropy) for part in parts]
        out = []
        for x in zip(*scored):
            x = torch.cat(x)
            out.append(x.new_zeros(B * (T - 1)).index_copy(0, index, x).view(B, T - 1))
        return tuple(out) if entropy else out[0]

    def _score(self, h, target, temperature, entropy):
        """h (N, C), target (N,) -> log-probs (N,), and with `entropy` the entropies (N,). The softmax is never below float32."""
        logits = F.linear(h, self.wte.weight)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        logits = logits if temperature == 1.0 else logits / temperature
        logp = -F.cross_entropy(logits, target, reduction="none")
        if not entropy:
            return (logp,)
        with torch.no_grad():
            log_p = logits.log_softmax(-1)
            return logp, -(log_p.exp() * log_p).sum(-1)


def row_lengths(mask):
    """mask (B, T) bool, of the response tokens -> (B,) int64: tokens of prompt and response, up to the last that is marked"""
    return mask.size(1) - mask.int().flip(1).argmax(1)


class ScalarGPT(nn.Module):
    """A GPT trunk with Linear(C, 1) in place of the vocabulary. A reward model is read at the end token, a critic everywhere."""

    def __init__(self, config, seed=0, trunk=None):
        super().__init__()
        self.config = config
        self.trunk = trunk or GPT(config, seed)
        self.head = nn.Linear(config.n_embd, 1)
        generator = torch.Generator().manual_seed(seed)
        nn.init.normal_(self.head.weight, 0.0, 1 / math.sqrt(config.n_embd + 1), generator=generator)
        nn.init.zeros_(self.head.bias)

    def values(self, ids):
        """ids (B, T) -> (B, T), float32 or float64: one number per position, seeing that token and all before it."""
        return self._read(self.trunk.hidden(ids))

    def score(self, ids, mask):
        """ids, mask (B, T) as for `logprobs` -> (B,): the value at each row's last response token, the end token where it has one."""
        return self._read(self.trunk.hidden(ids)[torch.arange(len(ids), device=ids.device), row_lengths(mask) - 1])

    def _read(self, h):
        """h (…, C) -> (…). The head is never below float32: bfloat16 would round scores near 2 to multiples of 0.016."""
        dtype = torch.promote_types(h.dtype, torch.float32)
        with torch.autocast(h.device.type, enabled=False):
            return F.linear(h.to(dtype), self.head.weight.to(dtype), self.head.bias.to(dtype)).squeeze(-1)

    forward = values

    def matmul_parameters(self):
        """N of the FLOP counts, as in GPT; there is no vocabulary head here."""
        return self.trunk.matmul_parameters() - self.trunk.wte.weight.numel() + self.head.weight.numel()


# ------------------------------------------------------------------------------------------------ cache and sampling


class KVCache:
    """Keys and values of every layer, allocated once for `rows` sequences of at most `capacity` tokens.

    Row b holds length[b] tokens from the left, so rows of mixed length need no padding logic: a new token is written
    at its row's own length, and a query sees the keys up to itself. `width` bounds the longest row, as a plain int; `ragged`
    says that lengths may differ: where they do not, all rows are written in one piece.
    """

    def __init__(self, config, rows, capacity, device="cpu", dtype=torch.float32):
        shape = (2, rows, config.n_head, capacity, config.n_embd // config.n_head)
        self.kv = [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.n_layer)]
        self.length = torch.zeros(rows, dtype=torch.int64, device=device)
        self.row, self.column = torch.arange(rows, device=device)[:, None], torch.arange(capacity, device=device)
        self.hidden, self.seen = torch.tensor([-math.inf, 0.0], device=device, dtype=dtype)
        self.width, self.ragged = 0, False

    def advance(self, T):
        """Makes room for T more tokens a row and returns their positions (rows, T)."""
        assert self.width + T <= len(self.column), f"{self.width} + {T} tokens, but the cache holds {len(self.column)}"
        self.position = self.length[:, None] + self.column[:T]
        self.empty, self.width = self.width == 0, self.width + T
        if not self.empty:
            later = self.column[: self.width] > self.position[:, None, :, None]  # (rows, 1, T, width)
            mask = torch.where(later, self.hidden, self.seen)
            self.mask = mask.expand(-1, self.kv[0].size(2), -1, -1).flatten(0, 1)  # (rows·H, T, width)
        self.length = self.length + T
        return self.position

    def attend(self, layer, qkv):
        """qkv (rows, T, 3, H, D) of the tokens that `advance` made room for -> (rows, H, T, D)."""
        if self.ragged:
            self.kv[layer][:, self.row, :, self.position] = qkv[:, :, 1:]
        else:
            self.kv[layer][:, :, :, self.width - qkv.size(1) : self.width] = qkv[:, :, 1:].permute(2, 0, 3, 1, 4)
        q, k, v = qkv.transpose(1, 3).unbind(2)  # (rows, H, T, D) each
        if self.empty:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        k, v = self.kv[layer].flatten(1, 2)[:, :, : self.width]  # (rows·H, width, D) each
        scores = torch.baddbmm(self.mask, q.flatten(0, 1), k.mT, alpha=q.size(-1) ** -0.5)  # for one query, faster than SDPA
        return torch.bmm(scores.softmax(-1), v).view(q.shape)

    def take(self, rows):
        """Goes on with these rows alone, in this order; a row may be named many times."""
        for layer, kv in enumerate(self.kv):
            self.kv[layer] = kv[:, rows]  # one at a time, so that never two whole caches are held
        self.length = self.length[rows]
        self.row = torch.arange(len(rows), device=rows.device)[:, None]


class Samples(NamedTuple):
    ids: torch.Tensor  # (B·group, T) int64, prompt and response, padded on the right with 0
    mask: torch.Tensor  # (B·group, T) bool, the response up to and with its end token
    logp: torch.Tensor  # (B·group, T-1) float32, the log-prob each token was drawn with, 0 off the mask
    finished: torch.Tensor  # (B·group,) bool, the end token was drawn

    @property
    def stop(self):
        """(B·group,) int64: tokens of prompt and response"""
        return row_lengths(self.mask)

    def take(self, rows):
        """-> the samples of these rows, in this order, without the columns that are padding in all of them"""
        mask = self.mask[rows]
        T = int(row_lengths(mask).max())
        return Samples(self.ids[rows, :T], mask[:, :T], self.logp[rows, : T - 1], self.finished[rows])

    @staticmethod
    def cat(parts):
        """-> the rows of all parts, padded to the longest"""
        T = max(s.ids.size(1) for s in parts)
        padded = [[F.pad(x, (0, T - s.ids.size(1))) for x in s[:3]] + [s.finished] for s in parts]
        return Samples(*(torch.cat(x) for x in zip(*padded)))


@torch.no_grad()
def sample(model, prompts, max_new_tokens, end_id, temperature=1.0, generator=None, group=1):
    """Draws `group` responses to each prompt from softmax(logits / temperature), nothing cut off; see `Samples`.

    prompts: B non-empty lists of token ids, of mixed length. Row i·group + j answers prompt i. Each prompt is read once,
    and its cache repeated. All uniforms are drawn up front, (B·group, max_new_tokens) on the generator's device: how rows
    are batched or dropped changes no sample. The end is looked for every 8 tokens, and rows that have ended are dropped
    once they are a quarter of the batch.
    """
    device, weight = model.wte.weight.device, model.wte.weight
    lengths = torch.tensor([len(p) for p in prompts])
    longest, B, R = int(lengths.max()), len(prompts), len(prompts) * group
    assert lengths.min() > 0, "a prompt needs at least one token"
    assert longest + max_new_tokens <= model.config.block_size, (
        f"prompt {longest} + max_new_tokens {max_new_tokens} exceed the context {model.config.block_size}")
    uniform = torch.rand(R, max_new_tokens, generator=generator, device=generator.device if generator else "cpu").to(device)
    prompt = torch.zeros(B, longest, dtype=torch.int64)
    prompt[torch.arange(longest) < lengths[:, None]] = torch.tensor([token for p in prompts for token in p])
    ragged = bool(lengths.min() < longest)
    prompt, lengths = prompt.to(device), lengths.to(device)
    drawn = torch.zeros(R, max_new_tokens, dtype=torch.int64, device=device)
    p_drawn = torch.ones(R, max_new_tokens, device=device)
    rows = torch.arange(B, device=device).repeat_interleave(group)

    outline = hasattr(weight, "fake_mode")  # sizes alone (memory.py): the first token and the last tell all, and the last is the end
    stride = max(1, max_new_tokens - 1) if outline else 1
    if outline:
        drawn[:, -1] = end_id

    with torch.inference_mode():
        autocast = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if autocast else weight.dtype
        cache = KVCache(model.config, B, longest + max_new_tokens, device, dtype)
        h = model.hidden(prompt, cache)[torch.arange(B, device=device), lengths - 1][rows]  # (R, C), it predicts the first token
        cache.length, cache.ragged = lengths, ragged  # what was read past a prompt's end is overwritten before it can be seen
        if group > 1:
            cache.take(rows)
        alive, tokens, probs = torch.arange(R, device=device), [], []  # the rows still drawn, and their last few draws
        for t in range(0, max_new_tokens, stride):
            p = (F.linear(h, weight).float() / temperature).softmax(-1)  # (alive, V)
            cdf = p.cumsum(-1)
            u = uniform[:, t, None] * cdf[:, -1:]
            token = torch.searchsorted(cdf, u, right=True).clamp_(max=cdf.size(1) - 1)  # (alive, 1): inverse CDF
            tokens.append(token)
            probs.append(p.gather(1, token))
            if len(tokens) == 8 or t + 1 == max_new_tokens:
                drawn[alive, t + 1 - len(tokens) : t + 1] = torch.cat(tokens, 1)
                p_drawn[alive, t + 1 - len(tokens) : t + 1] = torch.cat(probs, 1)
                tokens, probs = [], []
                left = (drawn[alive, : t + 1] != end_id).all(1).nonzero()[:, 0]
                if len(left) == 0 or t + 1 == max_new_tokens:
                    break
                if len(left) <= 0.75 * len(alive):
                    cache.take(left)
                    token, alive, uniform = token[left], alive[left], uniform[left]
            cache.width += stride - 1
            h = model.hidden(token, cache)[:, 0]

    is_end = drawn == end_id
    finished = is_end.any(1)
    n = torch.where(finished, is_end.int().argmax(1) + 1, max_new_tokens)[:, None]  # response lengths, end token included
    prompt, start = prompt[rows], lengths[rows, None]
    T = int((start + n).max())
    column = torch.arange(T, device=device)
    mask = (column >= start) & (column < start + n)
    kept = torch.arange(max_new_tokens, device=device) < n
    ids = F.pad(prompt, (0, T - longest))
    ids[mask] = drawn[kept]
    logp = torch.zeros(R, T, device=device)
    logp[mask] = p_drawn[kept].log()
    return Samples(ids, mask, logp[:, 1:], finished)


# ------------------------------------------------------------------------------------------------ files


def write(obj, path):
    """torch.save through a temporary file of this process and a rename: at every moment `path` is whole, or absent."""
    temporary = f"{path}.{os.getpid()}.tmp"
    with open(temporary, "wb") as f:  # a file object, because torch writes a file's name into it
        torch.save(obj, f)
    os.replace(temporary, path)


def save(model, path, **meta):
    """Writes the weights, the config and `meta`: strings, numbers, lists and dicts (tokenizer, task, method, options …)."""
    write({"nanopo": type(model).__name__, "config": asdict(model.config), "model": model.state_dict(), "meta": meta}, path)


def load(path, device="cpu"):
    """-> (model, meta), with the weights as saved. Raises CheckpointError where the file is not a whole checkpoint of ours."""
    try:
        file = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise CheckpointError(f"{path} is a directory; give the .pt file in it") from None
    except Exception as e:  # torch raises a zoo of types for a file that is cut short or no checkpoint at all
        raise CheckpointError(f"{path} is not a whole checkpoint ({type(e).__name__}); train it again") from None
    if not isinstance(file, dict) or file.get("nanopo") not in ("GPT", "ScalarGPT"):
        raise CheckpointError(f"{path} is not a checkpoint of these scripts; give one that sft.py wrote")
    try:
        model = {"GPT": GPT, "ScalarGPT": ScalarGPT}[file["nanopo"]](GPTConfig(**file["config"]))
        model.to(next(iter(file["model"].values())).dtype).load_state_dict(file["model"])
        return model.to(device), file["meta"]
    except (RuntimeError, TypeError, KeyError, AttributeError, AssertionError, StopIteration) as e:
        reason = (str(e) or type(e).__name__).splitlines()[0]
        raise CheckpointError(f"{path}: weights and config disagree ({reason}); train it again") from None

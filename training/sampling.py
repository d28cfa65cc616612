"""Sampling: prompts of mixed length -> a Rollout of responses to them."""

import math
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F

import gpt
from packing import before, on_device, pack, row_lengths
from training.cache import OwnCache

CHECK_ENDS_EVERY = 4  # tokens
CHECK_ENDS_SELDOM = 8  # tokens: on CUDA, because the check waits for all work under way
DROP_AT = 0.9  # finished rows are dropped once at most this share of all rows is alive
DROP_AT_STATIC = 0.5  # the same with `static`: each new number of rows needs a new capture,
DROP_STATIC_FOR = 128  # which is worth it if this many tokens may follow
SHARE_PROMPT_FROM = 64  # tokens: from this length on the rows of a group share one prompt


class Rollout:
    """Sampled responses, one per row. Every attribute is a tensor with one row per response, (N,),
    (N, 1) or (N, T), or None; all are cut, shuffled and trimmed together.

    ids       (N, T) int64    prompt and response, padded on the right with 0
    mask      (N, T) bool     the response up to and with its end token
    logp      (N, T) float32  the log-prob each token was drawn with, 0 off the mask; float64 of a
                              float64 model
    finished  (N,) bool       the end token was drawn
    """

    __slots__ = ("__dict__", "_packed", "_host")

    def __init__(self, host=None, /, **columns):
        self._host = host
        self.__dict__.update(columns)

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, rows):
        """-> these rows, in this order, without columns that are padding in all of them"""
        width, host = self.ids.size(1), None
        if self.host is not self:
            rows = torch.arange(len(self))[rows if isinstance(rows, slice) else rows.cpu()]
            host, rows = self.host[rows], on_device(rows, self.ids.device)
        part = {name: x if x is None else x[rows] for name, x in vars(self).items()}
        mask = part["mask"] if host is None else host.mask
        longest = int(row_lengths(mask).max()) if len(mask) else 0
        for name, x in part.items():
            if x is not None and x.dim() == 2 and x.size(1) == width:
                part[name] = x[:, : max(1, longest)]
        return Rollout(host, **part)

    def __or__(self, columns):
        """-> the same rows, with more columns or other ones"""
        return Rollout(self._host, **(vars(self) | columns))

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
    def host(self):
        """ids, mask and finished on the CPU, so that reading them does not wait for the device; on
        a CPU the rollout itself"""
        if self.ids.is_cpu:
            return self
        if self._host is None:
            names = [name for name in ("ids", "mask", "finished") if name in vars(self)]
            self._host = Rollout(**{name: getattr(self, name).cpu() for name in names})
        return self._host

    @property
    def length(self):
        """(N, 1) int64: response tokens, end token included"""
        return self.mask.sum(1, keepdim=True)

    @property
    def packed(self):
        """the tokens that are computed for the log-probs of the responses"""
        if not hasattr(self, "_packed"):
            self._packed = self.pack(before)
        return self._packed

    def pack(self, select):
        """-> the Packed in which the states of the tokens select(mask) are wanted"""
        return pack(self.host.ids, select(self.host.mask), self.ids.device)

    def leave_out_unfinished(self):
        """Responses that did not end keep their rows, but none of their tokens counts any more."""
        for rows in {self, self.host}:
            rows.mask = rows.mask & rows.finished[:, None]

    @property
    def tokens(self):
        """the number of tokens that are computed"""
        return len(self.packed.ids)

    def unfold(self, x):
        """Like data.Batch.unfold, but in a rollout each row stands for itself only."""
        return x

    def minibatches(self, updates, parts, generator):
        """Yields the rows in `parts` shuffled minibatches, once for each of the updates. If there
        is only one minibatch in all, it is not shuffled. The first one has no old_logp, because
        π_θ is π_old until the first optimizer step. In a minibatch the rows of a group stay
        together."""
        n = len(self)
        if updates == parts == 1:
            yield self | {"old_logp": None}
            return
        for update in range(updates):
            order = torch.randperm(n, generator=generator)
            for i, rows in enumerate(order.tensor_split(min(parts, n))):
                minibatch = self[rows.sort().values]
                yield minibatch | {"old_logp": None} if update == i == 0 else minibatch

    def old_logp_or(self, logp):
        """-> log π_old of the tokens, (N, T). In the first minibatch of a rollout it is log π_θ
        itself, so that the ratio of the two is exactly 1."""
        return logp.detach() if self.old_logp is None else self.old_logp

    def summary(self):
        """-> the figures of the responses, for the record"""
        return {
            "completions/mean_length": self.length.float().mean(),
            "completions/clipped_ratio": 1 - self.finished.float().mean(),
        }


def sample(
    model,
    prompts,
    max_new_tokens,
    ends,
    temperature=1.0,
    generator=None,
    group=1,
    uniform=None,
    static=None,
):
    """Draws `group` responses to each prompt from softmax(logits / temperature), without top-k or
    top-p. -> a Rollout

    prompts: B non-empty lists of token ids, of mixed length. Row i·group + j answers prompt i. Each
    prompt is read once. ends: the tokens that end a response. uniform: (B·group, max_new_tokens),
    random numbers; by default `generator` draws all of them at the start. Each number belongs to a
    row, so no sample depends on how rows are batched or dropped. static: every step runs on buffers
    of one size, and CUDA captures one step and replays it (None: if it can).
    """
    lengths = [len(prompt) for prompt in prompts]
    longest, R, device = max(lengths), len(prompts) * group, model.head.device
    assert min(lengths) > 0, "a prompt needs at least one token"
    room = model.config.block_size - max_new_tokens
    assert longest <= room, f"a prompt of {longest} tokens, but there is room for {room}"
    static = device.type == "cuda" if static is None else static
    uniform = uniforms(R, max_new_tokens, generator) if uniform is None else uniform
    ids, packed = encode_prompts(prompts, device)
    drawn = torch.zeros(R, max_new_tokens, dtype=torch.int64, device=device)
    p_drawn = torch.ones(R, max_new_tokens, dtype=wide(model), device=device)
    place = torch.arange(R, device=device)  # of the rows that are still drawn

    with torch.inference_mode():
        uniform = on_device(uniform, device)
        rows = Drawing(model, packed, lengths, group, uniform, temperature, static)
        on_cuda = device.type == "cuda"
        every = CHECK_ENDS_SELDOM if on_cuda else CHECK_ENDS_EVERY
        drop_at = DROP_AT_STATIC if static else DROP_AT
        step, capture = rows.step, static and on_cuda
        for t in range(1, max_new_tokens):
            if t % every == 0:
                alive = ~is_any(rows.drawn[:, :t], ends).any(1).cpu()
                n = rows.alive_rows(alive)
                if n == 0:
                    break
                worth = not static or max_new_tokens - t >= DROP_STATIC_FOR
                if worth and n <= drop_at * len(alive):
                    drawn[place], p_drawn[place] = rows.drawn, rows.p
                    place = place[rows.drop_finished(alive)]
                    step, capture = rows.step, static and on_cuda
            step()  # the first step of a shape also loads what a capture must find loaded
            if capture and t + 1 < max_new_tokens:
                from gpu import captured

                step, capture = captured(rows.step), False
        drawn[place], p_drawn[place] = rows.drawn, rows.p
    return _rollout(ids, lengths, group, drawn, p_drawn, ends)


def _rollout(ids, lengths, group, drawn, p_drawn, ends):
    """Prompts ids (P, L) on the CPU, drawn tokens and their probabilities, (P·group,
    max_new_tokens) each -> a Rollout, in which each response follows its prompt, and stops after
    its end token. On a GPU this waits only for the drawn tokens."""
    device, drawn, most = p_drawn.device, drawn.cpu(), drawn.size(1)
    is_end = is_any(drawn, ends)
    finished = is_end.any(1)
    first_end = is_end.int().argmax(1) + 1
    n = torch.where(finished, first_end, most)[:, None]  # response tokens, the end included
    start = torch.tensor(lengths).repeat_interleave(group)[:, None]
    column = torch.arange(int((start + n).max()))
    mask = (column >= start) & (column < start + n)
    ids = F.pad(ids.repeat_interleave(group, 0), (0, len(column) - ids.size(1)))
    ids[mask] = drawn[torch.arange(most) < n]
    columns = {"ids": ids, "mask": mask, "finished": finished}
    token = (column - start).clamp(0, most - 1)  # the index of the drawn token in each column
    there, token = on_device((columns, token), device)
    logp = p_drawn.gather(1, token).log().where(there["mask"], 0.0)
    return Rollout(Rollout(**columns), logp=logp, **there)


def is_any(ids, some):
    """-> (N, T) bool: whether each of the ids (N, T) is one of the tokens `some`"""
    return torch.stack([ids == one for one in some]).any(0)


def wide(model):
    """-> the dtype of log-probs: float32, or the model's if that is wider"""
    return torch.promote_types(model.head.dtype, torch.float32)


def uniforms(rows, tokens, generator=None):
    """-> the random numbers of `rows` samples, (rows, tokens), on the generator's device"""
    device = generator.device if generator else "cpu"
    return torch.rand(rows, tokens, generator=generator, device=device)


def encode_prompts(prompts, device):
    """-> ids (P, L) of the prompts on the CPU, padded on the right, and their Packed, in which the
    last state of each prompt is wanted"""
    lengths = torch.tensor([len(prompt) for prompt in prompts])[:, None]
    column = torch.arange(int(lengths.max()))
    ids = torch.zeros(len(prompts), len(column), dtype=torch.int64)
    ids[column < lengths] = torch.tensor([token for prompt in prompts for token in prompt])
    return ids, pack(ids, column == lengths - 1, device)


class Drawing:
    """G rows for each of P prompts, and the tokens that each has drawn.

    The drawn tokens begin at the same column in every row, after the longest prompt; the columns
    after a shorter prompt are masked. `GPT.hidden` takes a Drawing in place of a Packed: it has one
    token per row and its position, and leaves attention to a cache.
    """

    def __init__(self, model, packed, lengths, group, uniform, temperature=1.0, static=False):
        """packed: the P prompts; lengths: how many tokens each has; uniform (P·G, tokens)"""
        device = uniform.device
        self.model, self.head = plain(model), model.head
        self.uniform, self.temperature = uniform, temperature
        self.drawn = torch.zeros_like(uniform, dtype=torch.int64)
        self.p = torch.ones_like(uniform, dtype=wide(model))
        self.t = torch.zeros(1, dtype=torch.int64, device=device)

        start = on_device(torch.tensor(lengths), device)
        L, K, n = packed.rows.size(1), model.config.heads()[1], uniform.size(1)
        autocast = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if autocast else model.head.dtype
        prompt_mask = torch.zeros(1, 1, L, device=device, dtype=dtype)
        if min(lengths) < L:
            column = torch.arange(L, device=device)
            prompt_mask = torch.where(column < start[:, None, None], prompt_mask, -math.inf)
        kind = OwnCache
        if group > 1 and L >= SHARE_PROMPT_FROM:
            from training.prompt_cache import SharedPromptCache as kind
        self.cache = kind(len(lengths), group, K, n, prompt_mask, static)

        h = self.model.hidden(Reading(packed, self.cache)).repeat_interleave(group, 0)
        self.position = start.repeat_interleave(group)
        self.ids = torch.zeros_like(self.position)
        self.draw(h)

    def select(self, x):
        """x (N, C) -> the same: every row's state is wanted"""
        return x

    def attend(self, layer, qkv, sizes, final):
        """qkv (N, (H + 2K) D) of the next token of each row -> (N, H D)"""
        return self.cache.attend(layer, qkv, sizes)

    def draw(self, h):
        """h (N, C) -> the next token of each row, by inverse CDF"""
        logits = F.linear(h, self.head)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        logits = logits if self.temperature == 1.0 else logits / self.temperature
        p = logits.softmax(1)
        cdf = p.cumsum(1)
        u = self.uniform.index_select(1, self.t) * cdf[:, -1:]
        token = torch.searchsorted(cdf, u, right=True).clamp_(max=cdf.size(1) - 1)  # (N, 1)
        self.drawn.index_copy_(1, self.t, token)
        self.p.index_copy_(1, self.t, p.gather(1, token).to(self.p.dtype))
        self.ids.copy_(token[:, 0])
        self.t += 1

    def step(self):
        """Reads what was drawn, and draws the next."""
        self.cache.show_column()
        self.draw(self.model.hidden(self))
        self.position += 1
        self.cache.column += 1

    def alive_rows(self, alive):
        """alive (P·G,) bool, on the CPU -> the number of rows that `drop_finished` would leave"""
        return self.cache.alive_rows(alive)

    def drop_finished(self, alive):
        """Drops finished prompts, and keeps for all others the same number of rows: as many as the
        prompt with most living rows has, living ones first. alive (P·G,) bool -> the rows left"""
        rows = self.cache.drop_finished(alive)
        for name in ("ids", "position", "drawn", "p", "uniform"):
            setattr(self, name, getattr(self, name)[rows])
        return rows


class Reading:
    """The prompts while they are read: a Packed whose keys and values a cache keeps."""

    def __init__(self, packed, cache):
        self.ids, self.position, self.select = packed.ids, packed.position, packed.select
        self.packed, self.cache = packed, cache

    def attend(self, layer, qkv, sizes, final):
        H, K, D = sizes
        rows = self.packed.rows  # (P, L)
        kv = qkv[:, H * D :].index_select(0, rows.flatten()).view(*rows.shape, 2, K, D)
        self.cache.add_prompts(kv.permute(2, 0, 3, 1, 4))
        return self.packed.attend(layer, qkv, sizes, final)


def plain(module):
    """-> a function that computes the same formula as a module, from bare tensors. With one token
    per row, finding the weights in modules would take as long as the products."""
    kind, own = type(module), dict(module.named_parameters(recurse=False))
    if kind is nn.ModuleList:
        return [plain(x) for x in module]
    if kind is nn.Embedding:
        return partial(torch.embedding, module.weight)
    if kind is gpt.Linear:
        return partial(F.linear, **own)
    if kind is gpt.LayerNorm:
        shape, eps = module.normalized_shape, module.eps
        return partial(torch.layer_norm, normalized_shape=shape, eps=eps, **own)
    if kind not in (gpt.Attention, gpt.Block, gpt.GPT):
        return module
    bare = kind.__new__(kind)  # has the methods of the kind, but nothing of a module
    vars(bare).update({name: x for name, x in vars(module).items() if name[0] != "_"})
    vars(bare).update({name: plain(x) for name, x in module.named_children()})
    return bare if kind is gpt.GPT else bare.forward

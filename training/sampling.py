"""Sampling: prompts of mixed length -> a Rollout of responses to them."""

import math

import torch
import torch.nn.functional as F

import gpt

EVERY = 4  # tokens after which ends are looked for
DROP = 0.9  # rows are dropped once so many of them, or fewer, are still drawn
HALF = 0.5  # the same where each number of rows is captured anew
LONG = 64  # tokens of prompts that are read by all rows of a group from one copy


class Rollout:
    """Sampled responses, a row each. Every attribute is a tensor with one row a response, (N,),
    (N, 1) or (N, T), or None; all are cut, shuffled and trimmed together.

    ids       (N, T) int64    prompt and response, padded on the right with 0
    mask      (N, T) bool     the response up to and with its end token
    logp      (N, T) float32  the log-prob each token was drawn with, 0 off the mask
    finished  (N,) bool       the end token was drawn
    """

    __slots__ = ("__dict__", "_layout")

    def __init__(self, **columns):
        self.__dict__.update(columns)

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, rows):
        """-> these rows, in this order, without the columns that are padding in all of them"""
        width = self.ids.size(1)
        part = {name: x if x is None else x[rows] for name, x in vars(self).items()}
        longest = int(gpt.row_lengths(part["mask"]).max()) if len(part["mask"]) else 0
        for name, x in part.items():
            if x is not None and x.dim() == 2 and x.size(1) == width:
                part[name] = x[:, : max(1, longest)]
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
    def layout(self):
        """which tokens are computed for the log-probs of the responses"""
        if not hasattr(self, "_layout"):
            self._layout = gpt.layout(self.ids, gpt.before(self.mask))
        return self._layout

    @property
    def tokens(self):
        """how many tokens are computed"""
        return len(self.layout.ids)

    def spread(self, x):
        """As in a data.Batch, where equal rows are one; here every row counts."""
        return x

    def minibatches(self, updates, parts, generator):
        """Yields the rows in `parts` shuffled minibatches, once for each of the updates; as they
        stand where there is one. Until the first optimizer step π_θ is π_old, and the ratio of the
        two 1 to the bit: the first minibatch has no old_logp. Within one, groups stay together."""
        n = len(self)
        if updates == parts == 1:
            yield self | {"old_logp": None}
            return
        for update in range(updates):
            order = torch.randperm(n, generator=generator)
            for i, rows in enumerate(order.tensor_split(min(parts, n))):
                minibatch = self[rows.sort().values]
                yield minibatch | {"old_logp": None} if update == i == 0 else minibatch

    def summary(self):
        """-> the figures of the responses that a record has"""
        return {
            "completions/mean_length": self.length.float().mean(),
            "completions/clipped_ratio": 1 - self.finished.float().mean(),
        }


def sample(
    model,
    prompts,
    max_new_tokens,
    end_id,
    temperature=1.0,
    generator=None,
    group=1,
    uniform=None,
    static=False,
):
    """Draws `group` responses to each prompt from softmax(logits / temperature), nothing cut off.
    -> a Rollout

    prompts: B non-empty lists of token ids, of mixed length. Row i·group + j answers prompt i. Each
    prompt is read once. All uniforms are drawn up front by the generator, or given,
    (B·group, max_new_tokens): they belong to the rows, so that how rows are batched or dropped
    changes no sample. static: every step is made on buffers of one size, and on CUDA captured once
    and replayed.
    """
    lengths = [len(prompt) for prompt in prompts]
    longest, R, device = max(lengths), len(prompts) * group, model.head.device
    assert min(lengths) > 0, "a prompt needs at least one token"
    room = model.config.block_size - max_new_tokens
    assert longest <= room, f"a prompt of {longest} tokens, but there is room for {room}"
    uniform = uniforms(R, max_new_tokens, generator) if uniform is None else uniform
    ids, reads = read(prompts, device)
    drawn = torch.zeros(R, max_new_tokens, dtype=torch.int64, device=device)
    p_drawn = torch.ones(R, max_new_tokens, device=device)
    place = torch.arange(R, device=device)  # of the rows that are still drawn

    with torch.inference_mode():
        rows = Drawing(model, reads, lengths, group, uniform.to(device), temperature, static)
        step, graph = rows.step, None
        for t in range(1, max_new_tokens):
            if t % EVERY == 0:
                alive = (rows.drawn[:, :t] != end_id).all(1)
                left = rows.left(alive)
                if left == 0:
                    break
                if left <= (HALF if static else DROP) * len(alive):
                    drawn[place], p_drawn[place] = rows.drawn, rows.p
                    place = place[rows.take(alive)]
                    step, graph = rows.step, None
            step()
            if static and graph is None and device.type == "cuda":
                step = graph = captured(rows.step)
        drawn[place], p_drawn[place] = rows.drawn, rows.p

    is_end = drawn == end_id
    finished = is_end.any(1)
    first_end = is_end.int().argmax(1) + 1
    n = torch.where(finished, first_end, max_new_tokens)[:, None]  # response tokens, end included
    start = torch.tensor(lengths, device=device).repeat_interleave(group)[:, None]
    T = int((start + n).max())
    column = torch.arange(T, device=device)
    mask = (column >= start) & (column < start + n)
    kept = torch.arange(max_new_tokens, device=device) < n
    ids = F.pad(ids.repeat_interleave(group, 0), (0, T - longest))
    ids[mask] = drawn[kept]
    logp = torch.zeros(R, T, device=device)
    logp[mask] = p_drawn[kept].log()
    return Rollout(ids=ids, mask=mask, logp=logp, finished=finished)


def uniforms(rows, tokens, generator=None):
    """-> the random numbers of so many samples, (rows, tokens), on the generator's device"""
    at = generator.device if generator else "cpu"
    return torch.rand(rows, tokens, generator=generator, device=at)


def read(prompts, device):
    """-> ids (P, L) of the prompts, padded on the right, and how they are read: a Layout that asks
    for the state at the end of each"""
    lengths = torch.tensor([len(prompt) for prompt in prompts])[:, None]
    column = torch.arange(int(lengths.max()))
    ids = torch.zeros(len(prompts), len(column), dtype=torch.int64)
    ids[column < lengths] = torch.tensor([token for prompt in prompts for token in prompt])
    return ids.to(device), gpt.layout(ids, column == lengths - 1, device)


class Drawing:
    """G rows for each of P prompts: what they have drawn, and keys and values of what is read.

    What is drawn begins at the same column in every row, behind the longest prompt; the columns
    behind a shorter one are hidden. The rows of a group read a long prompt from one copy; a short
    one is copied for each row, and every row counts as a prompt of its own, G = 1. To `GPT.hidden`
    a drawing is what a Layout is: tokens, their positions, and how they attend.
    """

    def __init__(self, model, reads, lengths, group, uniform, temperature=1.0, static=False):
        """reads: the Layout of P prompts; lengths: of each; uniform (P·G, tokens)"""
        (P, L), device, n = reads.rows.shape, uniform.device, uniform.size(1)
        self.model, self.head = gpt.plain(model), model.head
        self.uniform, self.temperature = uniform, temperature
        autocast = torch.is_autocast_enabled(device.type)
        own = model.head.dtype
        self.dtype = torch.get_autocast_dtype(device.type) if autocast else own
        self.static, self.apart = static, group > 1 and L >= LONG
        self.P, self.G, self.K = P, group, model.config.heads()[1]
        self.drawn = torch.zeros_like(uniform, dtype=torch.int64)
        self.p = torch.ones_like(uniform)
        self.prompt, self.own = [], []  # of each layer (2, P·K, L, D) and (2, P·K·G, columns, D)

        self.reads, self.ids, self.position = reads, reads.ids, reads.position
        h = self.model.hidden(self).repeat_interleave(group, 0)
        self.reads = None

        start = torch.tensor(lengths, device=device)
        hidden = torch.zeros(1, 1, L, device=device, dtype=self.dtype)
        if min(lengths) < L:
            column = torch.arange(L, device=device)
            hidden = torch.where(column < start[:, None, None], hidden, -math.inf)
            hidden = hidden.repeat_interleave(self.K if self.apart else group * self.K, 0)
        later = hidden.new_full((1 if self.apart else len(hidden), 1, n), -math.inf)
        if self.apart:
            self.hidden, self.mask, self.width = hidden, later, 0
        else:
            self.mask, self.width = torch.cat([hidden, later], 2), L
            self.P, self.G = P * group, 1
        self.column = torch.tensor([self.width], device=device)
        self.t = torch.zeros_like(self.column)
        self.position = start.repeat_interleave(group)
        self.ids = torch.zeros_like(self.position)
        self.draw(h)

    def asked(self, x):
        """x (N, C) -> the states that the next tokens are drawn from"""
        return self.reads.asked(x) if self.reads else x

    def attend(self, layer, qkv, sizes, last):
        """qkv (N, (H + 2K) D) of the next token of each row -> (N, H D)"""
        H, K, D = sizes
        q, kv = qkv.split((H * D, 2 * K * D), 1)
        if self.reads:
            self.keep(kv.index_select(0, self.reads.rows.flatten()), D)
            return self.reads.attend(layer, qkv, sizes, last)
        P, G, scale = self.P, self.G, D**-0.5
        q = q.view(P, G, K, -1, D).transpose(1, 2).reshape(P * K * G, -1, D)
        new = kv.view(P, G, 2, K, D).permute(2, 0, 3, 1, 4).reshape(2, P * K * G, 1, D)
        self.own[layer].index_copy_(2, self.column, new)
        k, v = self.own[layer].narrow(2, 0, self.width).unbind()
        scores = torch.baddbmm(self.seen, q, k.mT, alpha=scale)  # for one query, faster than SDPA
        if self.apart:
            (k_, v_), q_ = self.prompt[layer], q.reshape(P * K, -1, D)
            before = torch.baddbmm(self.hidden, q_, k_.mT, alpha=scale)  # (P·K, G·H/K, L)
            weight = torch.cat([before, scores.view(*q_.shape[:2], -1)], 2).softmax(2)
            before, own = weight.split((k_.size(1), k.size(1)), 2)
            y = torch.baddbmm(torch.bmm(before, v_).reshape(q.shape), own.reshape(scores.shape), v)
        else:
            y = torch.bmm(scores.softmax(2), v)
        return y.view(P, K, G, -1, D).transpose(1, 2).reshape(P * G, -1)

    def keep(self, kv, D):
        """kv (P·L, 2K D): of a layer's prompts"""
        P, G, K, n = self.P, self.G, self.K, self.drawn.size(1)
        kv = kv.view(P, -1, 2, K, D).permute(2, 0, 3, 1, 4)  # (2, P, K, L, D)
        if self.apart:
            self.prompt.append(kv.flatten(1, 2))
            self.own.append(kv.new_zeros(2, P * K * G, n, D))
        else:
            own = kv.new_zeros(2, P, G, K, kv.size(3) + n, D)
            own[:, :, :, :, : kv.size(3)] = kv[:, :, None]
            self.own.append(own.flatten(1, 3))

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
        self.width = self.mask.size(2) if self.static else self.width + 1
        self.seen = self.mask.index_fill_(2, self.column, 0).narrow(2, 0, self.width)
        self.draw(self.model.hidden(self))
        self.position += 1
        self.column += 1

    def left(self, alive):
        """alive (P·G,) bool -> how many rows `take` would leave"""
        alive = alive.view(self.P, self.G)
        return int(alive.any(1).sum() * alive.sum(1).max())

    def take(self, alive):
        """Goes on with as many rows of each prompt as some prompt has alive, those first; a prompt
        without any is dropped. alive (P·G,) bool -> which rows are left"""
        alive = alive.view(self.P, self.G)
        prompts, most = alive.any(1).nonzero()[:, 0], int(alive.sum(1).max())
        rows = alive[prompts].sort(dim=1, descending=True, stable=True).indices[:, :most]
        head = torch.arange(self.K, device=alive.device)
        heads = (prompts[:, None] * self.K + head).flatten()
        own = (heads.view(-1, self.K, 1) * self.G + rows[:, None]).flatten()
        for layer, kv in enumerate(self.own):  # one at a time: never two whole caches
            self.own[layer] = kv.index_select(1, own)
        for layer, kv in enumerate(self.prompt):
            self.prompt[layer] = kv.index_select(1, heads)
        if self.apart:
            self.hidden = self.hidden if len(self.hidden) == 1 else self.hidden[heads]
        else:
            self.mask = self.mask if len(self.mask) == 1 else self.mask[own]
        rows = (prompts[:, None] * self.G + rows).flatten()
        for name in ("ids", "position", "drawn", "p", "uniform"):
            setattr(self, name, getattr(self, name)[rows])
        self.P, self.G = len(prompts), most
        return rows


def captured(step):
    """-> a step as one CUDA graph, replayed on the same buffers"""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay

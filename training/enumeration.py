"""The world `exact`, where nothing is sampled: each figure is a sum over all outcomes.

J = E_π[r] - β KL(π‖π_ref)        π* ∝ π_ref exp(r/β) maximises it: J(π*) - J(π) = β KL(π‖π*)
"""

import math
from functools import partial

import torch

import data
from data.exact import kl, star, tv


class Enumeration:
    """All outcomes of a task, as token ids, and the figures of policies on them."""

    def __init__(self, run, task):
        self.run, self.task = run, task
        rows, _ = data.encode(task.rows, run.tokenizer, run.block_size)
        self.batch = data.pad(rows, run.device)
        self.r = torch.from_numpy(task.r)  # (prompts, outcomes), the reward

    def table(self, model):
        """-> log π(y|x) of every outcome, (prompts, outcomes), float64"""
        batch = self.batch
        with self.run.autocast():
            log_p = model.logprobs(batch.ids, batch.mask, packed=batch.packed).sum(1)
        log_p = log_p.cpu().double().view(self.r.shape)
        total = log_p.exp().sum(1)
        assert (total - 1).abs().max() <= 1e-5, f"the probabilities sum to {total.tolist()}"
        return log_p

    def moments(self, log_p):
        """-> the figures that need no second policy: entropy per token, all others per prompt"""
        p = log_p.exp()
        length = self.batch.length.view(self.r.shape).cpu()
        ends = [len(y) < self.task.max_new_tokens for y in self.task.outcomes]
        tokens = (p * length).sum()
        return {
            "reward": self.reward(log_p).mean(),
            "length": tokens / len(p),
            "ended": (p * torch.tensor(ends)).sum(1).mean(),
            "entropy": -(p * log_p).sum() / tokens,
        }

    def reward(self, log_p):
        """-> E_π[r] of each prompt"""
        return (log_p.exp() * self.r).sum(1)

    def objective(self, log_p, log_ref):
        """-> J of each prompt"""
        return self.reward(log_p) - self.task.world_beta * kl(log_p, log_ref)

    def compared(self, log_p, log_ref):
        """-> the figures that compare a policy with another one"""
        start = self.moments(log_ref)
        wins = (torch.sign(self.r[:, :, None] - self.r[:, None, :]) + 1) / 2  # (x, y, y'), a tie ½
        won = torch.einsum("xy,xyz,xz->x", log_p.exp(), wins, log_ref.exp()).mean()
        figures = {"ref_reward": start["reward"], "ref_length": start["length"]}
        return figures | {"kl": kl(log_p, log_ref).mean(), "win_rate": won}

    def measure(self, policy, ref, is_reference, closing):
        """-> (figures, lines that show them). ref may be None. is_reference: later stages have this
        policy as π_ref. closing: the figures include the frontier of optima"""
        log_p = self.table(policy)
        log_ref = None if ref is None else self.table(ref)
        figures, lines = self.moments(log_p), []
        if ref is not None:
            figures |= self.compared(log_p, log_ref)
        log_ref = log_p if is_reference else log_ref
        if log_ref is not None:
            log_star = star(log_ref, self.r, self.task.world_beta)
            figures["objective"] = self.objective(log_p, log_ref).mean()
            figures["kl_star"] = kl(log_p, log_star).mean()
            figures["tv_star"] = tv(log_p, log_star).mean()
            lines = self.lines(log_p, log_ref, log_star, is_reference)
        figures = {name: float(x) for name, x in figures.items()}
        if closing and log_ref is not None:
            figures["frontier"] = self.frontier(log_ref)
        return figures | {"prompts": len(log_p), "outcomes": log_p.size(1)}, lines

    def frontier(self, log_ref):
        """-> [KL, E[r]] of π* at each of 81 β: no policy lies above this curve"""
        stars = [star(log_ref, self.r, 10 ** (i / 20)) for i in range(-40, 41)]
        return [[kl(x, log_ref).mean().item(), self.reward(x).mean().item()] for x in stars]

    def lines(self, log_p, log_ref, log_star, is_reference):
        """-> the measures of each policy by prompt, and where π is furthest from π*, as text"""
        task, tables = self.task, {"π": log_p, "π_ref": log_ref, "π*": log_star}
        measures = {
            "E[r]": self.reward,
            "KL(·‖π_ref)": partial(kl, log_q=log_ref),
            "J": partial(self.objective, log_ref=log_ref),
            "KL(·‖π*)": partial(kl, log_q=log_star),
            "TV(·, π*)": partial(tv, log_q=log_star),
        }
        head = "".join(f"{x:>10}" for x in (*task.contexts, "mean"))
        lines = [f"{f'β = {task.world_beta}, nats':<26}{head}"]
        for name, measure in measures.items():
            for policy, log_q in tables.items():
                by_prompt = measure(log_q)
                itself = policy == "π" and is_reference
                if by_prompt.abs().max() > 1e-12 and not itself:
                    row = [*by_prompt.tolist(), by_prompt.mean().item()]
                    lines.append(f"{name:<19}{policy:<7}" + "".join(f"{x:>10.4f}" for x in row))
        n, entropy = log_ref.size(1), -(log_ref.exp() * log_ref).sum(1).mean().item()
        far = f"KL(π_ref‖uniform) {math.log(n) - entropy:.3f}"
        lines.append(f"π_ref: entropy {entropy:.3f} of log {n} = {math.log(n):.3f} nats, {far}")
        return lines + self.furthest(tables)

    def furthest(self, tables):
        """-> the five outcomes whose probability is furthest from the optimum's, as text"""
        task, n = self.task, self.r.size(1)
        head = "".join(f"{x:>10}" for x in (*tables, "r"))
        lines = [f"\n{'the five outcomes furthest from π*':<34}{head}"]
        columns = [log_q.exp() for log_q in tables.values()] + [self.r]
        for i in (columns[0] - columns[2]).abs().flatten().topk(5).indices.tolist():
            x, y = divmod(i, n)
            text = f"  {task.contexts[x]} -> {task.outcomes[y] or '(empty)'}"
            lines.append(f"{text:<34}" + "".join(f"{t[x, y].item():>10.4f}" for t in columns))
        return lines

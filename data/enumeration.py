"""What evaluate.py measures on `exact`: no sample, each figure a sum over all outcomes, beside the optimum that is known."""
import math

import torch

from data import oracle
from data.batch import encode, pad
from data.error import DataError


class Enumeration:
    """The yardstick of `exact`: one forward pass over every outcome of every prompt, nothing sampled. Tables are (4, 40)."""

    notes = ()

    def __init__(self, run, task, tokenizer, block_size, max_new_tokens=0, truncate=False, implicit="nll", seed=0, aim=("", {})):
        if max_new_tokens not in (0, task.max_new_tokens):
            raise DataError(f"--max-new-tokens {max_new_tokens}: a response of {task.name} has {task.max_new_tokens}; leave it out")
        self.run, self.task, self.implicit, self.aim, self.max_new_tokens = run, task, implicit, aim, task.max_new_tokens
        self.batch = pad(encode(task.rows, tokenizer, block_size)[0], run.device)
        self.r, self.found = torch.from_numpy(task.r), None
        self.length = self.batch.mask.sum(1).view(self.r.shape).cpu()
        self.ends = torch.tensor([float(len(outcome) < task.max_new_tokens) for outcome in task.outcomes])

    @torch.no_grad()
    def table(self, model):
        """-> log π(y|x) of every outcome, float64"""
        with self.run.autocast():
            logp = model.logprobs(self.batch.ids, self.batch.mask, index=self.batch.index).sum(1)
        logp = logp.cpu().double().view(self.r.shape)
        total = logp.exp().sum(1)
        assert (total - 1).abs().max() <= 1e-5, f"the probabilities of all outcomes sum to {total.tolist()}"
        return logp

    def measure(self, policy, ref=None, n=None):
        """-> (figures, lines): the figures of evaluate.py's docstring, and π beside π_ref and π*, by prompt, as text."""
        log_p, log_ref = self.table(policy), None if ref is None else self.table(ref)
        figures = self._alone(log_p)
        if ref is not None:
            start = self._alone(log_ref)
            wins = (torch.sign(self.r[:, :, None] - self.r[:, None, :]) + 1) / 2  # (x, y, y'), a tie is ½
            figures |= {"ref_reward": start["reward"], "ref_length": start["length"], "kl": oracle.kl(log_p, log_ref).mean(),
                        "win_rate": torch.einsum("xy,xyz,xz->x", log_p.exp(), wins, log_ref.exp()).mean()}  # fmt: skip
        if self.implicit == "nll":
            log_ref = log_p  # after SFT this is π_ref
        if self.found is None:  # π_ref stays as it is, and so does the optimum
            self.found = (oracle.aim(self.task, log_ref, *self.aim),)
        lines, own, frontier = [], {}, None
        if self.found[0]:
            loss, optimum = self.found[0]
            own = {"KL(·‖own optimum)": oracle.kl(log_p, optimum), "TV(·, own optimum)": oracle.tv(log_p, optimum)}
            own = {name: x for name, x in own.items() if x.isfinite().all()}  # KTO's optimum leaves outcomes without mass
            if loss:
                figures["loss_gap"] = loss(log_p) - loss(optimum)
        if log_ref is not None:
            beta, log_star = self.task.world_beta, oracle.star(log_ref, self.r, self.task.world_beta)
            reward, kl_ref = lambda q: (q.exp() * self.r).sum(1), lambda q: oracle.kl(q, log_ref)
            measures = {"E[r]": reward, "KL(·‖π_ref)": kl_ref, "J": lambda q: reward(q) - beta * kl_ref(q),
                        "KL(·‖π*)": lambda q: oracle.kl(q, log_star), "TV(·, π*)": lambda q: oracle.tv(q, log_star)}  # fmt: skip
            tables = {"π": log_p, "π_ref": log_ref, "π*": log_star}
            values = {(name, of): f(q) for name, f in measures.items() for of, q in tables.items()}
            figures |= {key: values[name, "π"].mean() for key, name in
                        (("objective", "J"), ("kl_star", "KL(·‖π*)"), ("tv_star", "TV(·, π*)"))}  # fmt: skip
            if n is None:  # (KL, reward) of π* at each β, above which no policy lies
                stars = [oracle.star(log_ref, self.r, 10 ** (i / 20)) for i in range(-40, 41)]
                frontier = [[kl_ref(q).mean().item(), reward(q).mean().item()] for q in stars]
            if log_ref is log_p:
                values = {key: x for key, x in values.items() if key[1] != "π"}
            lines = self._lines(values, log_p, log_ref, log_star)
        lines += [""] * bool(own) + [f"{name:<26}{x.mean():>10.4f}" for name, x in own.items()]
        if "loss_gap" in figures:
            lines.append(f"{'loss above its least value':<26}{figures['loss_gap']:>10.2g}")
        elif self.implicit != "nll" and not own:
            lines.append("no optimum of this loss is known for these options (data/oracle.py)")
        keys = {"KL(·‖own optimum)": "kl_optimum", "TV(·, own optimum)": "tv_optimum"}
        figures |= {keys[name]: x.mean() for name, x in own.items()}
        figures = {k: float(v) for k, v in figures.items()} | {"prompts": len(log_p), "outcomes": log_p.size(1)}
        return figures | ({"frontier": frontier} if frontier else {}), lines

    def _alone(self, log_p):
        """What needs no second policy; tokens are averaged over tokens, all else over prompts."""
        p, tokens = log_p.exp(), (log_p.exp() * self.length).sum()
        return {"reward": (p * self.r).sum(1).mean(), "length": tokens / len(p), "ended": (p * self.ends).sum(1).mean(),
                "entropy": -(p * log_p).sum() / tokens}  # fmt: skip

    def _lines(self, values, *tables):
        lines = [f"{f'β = {self.task.world_beta}, nats':<26}" + "".join(f"{x:>10}" for x in (*self.task.contexts, "mean"))]
        for (name, of), by_prompt in values.items():
            if by_prompt.abs().max() > 1e-12:  # not the distance of a policy to itself
                lines.append(f"{name:<19}{of:<7}" + "".join(f"{x:>10.4f}" for x in [*by_prompt.tolist(), by_prompt.mean().item()]))
        p, ref, star = (log_q.exp() for log_q in tables)
        entropy, n = -(ref * tables[1]).sum(1).mean().item(), ref.size(1)
        lines.append(f"π_ref: entropy {entropy:.3f} of log {n} = {math.log(n):.3f} nats, KL(π_ref‖uniform) {math.log(n) - entropy:.3f}")
        lines.append(f"\n{'the five outcomes furthest from π*':<26}{'π':>10}{'π_ref':>10}{'π*':>10}{'r':>10}")
        for i in (p - star).abs().flatten().topk(5).indices.tolist():
            x, y = divmod(i, n)
            text = f"  {self.task.contexts[x]} -> {self.task.outcomes[y] or '(empty)'}"
            lines.append(f"{text:<34}" + "".join(f"{t[x, y].item():>10.4f}" for t in (p, ref, star, self.r)))
        return lines

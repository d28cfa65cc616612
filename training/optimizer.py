"""AdamW, its learning rate, and the loss scale that float16 gradients need."""

import math

import torch

from training.placement import is_part


def adamw(models, o, device):
    """AdamW with betas (0.9, 0.95) and weight decay on the matrices only."""
    parameters = [p for model in models for p in model.parameters() if p.requires_grad]
    matrices = [p for p in parameters if p.dim() >= 2]
    rest = [p for p in parameters if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": o.weight_decay},
        {"params": rest, "weight_decay": 0.0},
    ]
    betas = (0.9, 0.95)
    if o.optimizer == "adamw8bit":
        from training import adamw8bit

        return adamw8bit.make(groups, o.lr, betas)
    fused = device.type in ("cpu", "cuda")
    return torch.optim.AdamW(groups, lr=o.lr, betas=betas, fused=fused)


def step_if(finite, optimizer):
    """Makes an optimizer step if `finite`, a bool tensor, is True. -> whether it is. On CUDA a
    fused step looks itself, so that it need not wait until the answer has reached the CPU."""
    (p, *_), *_ = [group["params"] for group in optimizer.param_groups]
    if finite.is_cuda and optimizer.defaults.get("fused") and not is_part(p):
        optimizer.found_inf, optimizer.grad_scale = (~finite).float(), None
        optimizer.step()
    elif finite:
        optimizer.step()
    return bool(finite)


def learning_rate(step, o):
    """Linear warmup, then constant, linear to 0, or cosine to a tenth."""
    if step < o.warmup:
        return o.lr * (step + 1) / o.warmup
    done = (step - o.warmup) / max(1, o.steps - o.warmup)
    if o.lr_schedule == "cosine":
        return o.lr * (0.55 + 0.45 * math.cos(math.pi * done))
    return o.lr * (1 - done) if o.lr_schedule == "linear" else o.lr


class Scaler(torch.amp.GradScaler):
    """The scale of the loss, without which small gradients are 0 in float16. In other precisions it
    does nothing. `skipped`: how many optimizer steps were skipped"""

    skipped = 0

    def skips(self, loss):
        """-> whether to skip a step because its gradient, too large for float16, is not finite. If
        so, the scale is halved."""
        if not (self.is_enabled() and math.isfinite(loss) and self.get_scale() >= 1):
            return False
        self.skipped += 1
        self.update(self.get_scale() / 2)
        self.load_state_dict(self.state_dict() | {"_growth_tracker": 0})
        return True

    def figures(self):
        """-> the figures of the scale for the line of a step"""
        on = self.is_enabled()
        return {"skipped": self.skipped, "scale": self.get_scale()} if on else {}

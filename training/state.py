"""What --resume restores of models and of their optimizer, whole or in parts."""

import torch

from training.sharding import is_part, put


class Weights:
    """What is trained of a model, as --resume saves it; or with `frozen` all of it"""

    def __init__(self, model, frozen=False):
        self.model, self.frozen = model, frozen

    def state_dict(self):
        named = self.model.named_parameters()
        return {k: p.detach() for k, p in named if p.requires_grad or self.frozen}

    def load_state_dict(self, state):
        parameters = dict(self.model.named_parameters())
        for name, x in state.items():
            put(parameters[name], x)


class Moments:
    """What an optimizer knows of the steps before"""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    def state_dict(self):
        return self.optimizer.state_dict()

    def load_state_dict(self, state):
        """Of whole tensors each process takes its part, so that none reaches its device whole."""
        groups = self.optimizer.param_groups
        for i, p in enumerate(p for group in groups for p in group["params"]):
            for name, x in state["state"].get(i, {}).items():
                if is_part(p) and x.shape == p.shape:
                    state["state"][i][name] = torch.zeros_like(p)
                    put(state["state"][i][name], x)
        self.optimizer.load_state_dict(state)


PARTED = Weights, Moments  # which take what is theirs of whole tensors

"""How the two sides of analysis.parity are watched: torch is asked, on both sides alike."""

import contextlib
import io
import warnings
from statistics import fmean
from unittest.mock import patch

import torch

NAMES = {  # TRL's name of a figure -> ours
    "learning_rate": "lr",
    "objective/scores": "reward",
    "objective/scores_margin": "reward_margin",
    "objective/kl": "kl",
}


class Steps(list):
    """One entry per optimizer step: (the loss that was differentiated, {a weight's name in
    transformers: its gradient}). Torch itself is asked, on both sides alike. figures: {a figure
    that the side has logged, under our name: its mean over the run}."""

    def __init__(self):
        self.losses = []  # since the last step; several if there are micro-batches
        self.figures = {}

    def logged(self, lines):
        """Takes what the side has logged: dicts, each of an optimizer step or of a rollout."""
        for name in {name for line in lines for name in line} - {"step"}:
            found = [line[name] for line in lines if isinstance(line.get(name), (int, float))]
            if found:
                self.figures[NAMES.get(name, name)] = fmean(found)

    def watch(self, optimizer, gradients):
        def before(*_):
            self.append((sum(self.losses), gradients()))
            self.losses.clear()

        optimizer.register_step_pre_hook(before)

    @contextlib.contextmanager
    def watching_losses(self):
        backward = torch.Tensor.backward

        def noted(loss, *rest, **more):
            self.losses.append(loss.item())
            return backward(loss, *rest, **more)

        with patch.object(torch.Tensor, "backward", noted):
            yield


@contextlib.contextmanager
def in_order():
    """Within it neither side shuffles anything."""
    same, nothing = (lambda n, **_: torch.arange(n)), (lambda self, x: None)
    with patch("torch.randperm", same), patch("random.Random.shuffle", nothing):
        yield


@contextlib.contextmanager
def quiet():
    nowhere = io.StringIO()
    with contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield

"""Draws samples with many processes, each of them for its share of the prompts."""

from packing import on_device
from training import distributed, sampling


def sample(draw, n, group, longest, generator, device):
    """Each process draws the samples of its share of n prompts. -> all of them, as a Rollout.
    draw(slice of the prompts, uniform) -> a Rollout"""
    uniform = sampling.uniforms(n * group, longest, generator)  # alike in all processes
    part, drawn = distributed.mine(n), {}
    if part.stop > part.start:
        rollout = draw(part, uniform[part.start * group : part.stop * group])
        drawn = {name: x.cpu() for name, x in vars(rollout).items()}
    parts = [sampling.Rollout(**x) for x in distributed.gathered(drawn) if x]
    host = sampling.Rollout.cat(parts)
    return sampling.Rollout(host, **on_device(vars(host), device))

"""What one torchrun of the tests runs: torchrun --nproc-per-node 2 tests/many.py cases.json

The file has a list of [script, its arguments, ...]; each writes {out}-{processes}.pt. Between them
the processes stay together, so that many small runs cost one start.
"""

import importlib
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import training  # noqa: E402
from training import Rollout, Run, distributed  # noqa: E402


def stored(path, sample):
    """In place of Run.sample: one rollout from a file for every training step"""

    def load(*args, generator=None, **more):
        if generator:  # an evaluation's
            return sample(*args, generator=generator, **more)
        return Rollout(**torch.load(path))

    return load


def main(argv):
    sample = Run.sample
    for script, *arguments in json.loads(Path(argv[0]).read_text()):
        script, _, rollout = script.partition(":")
        Run.sample = stored(rollout, sample) if rollout else sample
        name = arguments[arguments.index("--out") + 1]
        own = [x if x != name else f"{name}-{distributed.size}.pt" for x in arguments]
        importlib.import_module(script).main(own)
    Run.sample = sample


if __name__ == "__main__":
    training.command(main)

"""Prints how much memory the largest process of a command took from the system.

    python -m analysis.resident dpo.py --steps 2
    python -m analysis.resident -m torch.distributed.run --nproc-per-node 2 dpo.py --steps 2 --shard

That is more than the tensors of a step: it includes torch itself, the messages between processes,
and memory that the C library keeps. glibc would also keep what FSDP2 frees, so the command runs
with MALLOC_MMAP_THRESHOLD_=1000000, if the environment has no other value. The figure is never less
than that of this program itself, some 250 MB.
"""

import os
import subprocess
import sys

import training
from data import Stopped, UserError

KEPT = {"MALLOC_MMAP_THRESHOLD_": "1000000"}
UNIT = 1 if sys.platform == "darwin" else 1024  # bytes of ru_maxrss: Linux counts in kB


def resident(words):
    """Runs python with these words. -> bytes of the largest process at its peak"""
    try:
        import resource
    except ImportError:
        raise UserError("analysis.resident needs Linux or macOS") from None
    ended = subprocess.run([sys.executable, *words], env=KEPT | os.environ)
    if ended.returncode:
        raise Stopped(f"the command failed with exit code {ended.returncode}")
    return UNIT * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss


def main(argv=None):
    words = sys.argv[1:] if argv is None else argv
    if words in (["-h"], ["--help"]):
        print(__doc__)
        return
    if not words:
        raise UserError("name what to run: python -m analysis.resident dpo.py --steps 2")
    print(f"largest process: {resident(words) / 1e6:.0f} MB")


if __name__ == "__main__":
    training.command(main, torchrun=False)

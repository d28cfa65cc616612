"""python -m fake_cuda SCRIPT ARGUMENTS: runs a script, and prints where its second step waits for
the device."""

import runpy
import sys
from pathlib import Path

import fake_cuda

sys.argv = sys.argv[1:]
sys.path.insert(0, str(Path(sys.argv[0]).parent.resolve()))
fake_cuda.install()

from training import Run  # noqa: E402

with fake_cuda.watched_steps(Run) as steps:
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
        code = 0
    except SystemExit as e:
        code = e.code or 0
if steps:
    waits = steps[min(1, len(steps) - 1)]
    print(f"\n{fake_cuda.number(waits)} waits in the second step")
    for (kind, name, place), n in waits.most_common():
        print(f"{n:>5}  {kind:<22}{name:<32}{place}")
sys.exit(code)

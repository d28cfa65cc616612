"""Studies of the methods: the minima of their losses, the memory of a step, how they compare. This
folder imports the scripts, so nothing that they import may import it."""

import contextlib
import platform
from pathlib import Path


def processor():
    """-> the name of this machine's processor"""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(": ")[2]
    return platform.processor() or platform.machine()

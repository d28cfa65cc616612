"""What is said about the methods: where their losses are least, what a step holds, how they
compare. It stands above the scripts; nothing that they import may import it."""

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

"""--compile: the C++ compiler that torch.compile calls."""

import os
import shutil

from data import UserError

NAMES = (os.environ.get("CXX", "g++"), "g++", "clang++", "cl")


def check():
    """Refuses a machine that has none."""
    if not any(map(shutil.which, NAMES)):
        remedy = "install one, such as g++, or leave it out"
        raise UserError(f"--compile needs a C++ compiler; {remedy}")

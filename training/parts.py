"""The saved state of a run with --shard: each process writes its parts of weights and moments.

The parts of all processes are one folder beside the state, in the format of
torch.distributed.checkpoint, which any number of processes can read. The state itself, which the
first process writes when the folder is complete, names it, and has a Stored in place of each part.
"""

import contextlib
import errno
import glob
import os
import shutil
import warnings
from functools import partial

import torch
import torch.distributed.checkpoint as dcp
from torch.utils._pytree import keystr, tree_map, tree_map_with_path

from training import distributed
from training.placement import is_part

warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
WORD = "part"  # the beginning of what the state's file has in place of a tensor


def write(state, path):
    """Writes the parts in the tree `state` to a folder beside `path`. -> the tree to write there.
    Every process calls it. Raises OSError in all of them if one of them cannot write."""
    found = {}

    def taken(where, x):
        if not is_part(x):
            return x
        found[keystr(where)] = x
        return WORD, keystr(where), list(x.shape)

    state = tree_map_with_path(taken, state)
    folder = distributed.of_first(partial(unused, path))
    try:
        dcp.save(found, checkpoint_id=folder)
    except dcp.api.CheckpointException as e:
        cause = next(iter(e.failures.values()))[0]
        raise OSError(errno.EIO, getattr(cause, "strerror", None) or str(cause)) from None
    return state | {"parts": os.path.basename(folder)}


def unused(path):
    """-> the name of a folder beside a state that is not there yet"""
    taken = {int(x.rpartition("-")[2]) for x in folders(path)}
    return f"{path}.parts-{max(taken, default=0) + 1:06d}"


def folders(path):
    """-> the folders of parts beside a state"""
    return glob.glob(f"{glob.escape(path)}.parts-{6 * '[0-9]'}")


def opened(state, path):
    """A state as it is in its file -> the same, whose parts can be read. Raises OSError if their
    folder is not complete."""
    folder = f"{path}.{state['parts'].rpartition('.')[2]}"
    if not os.path.isfile(os.path.join(folder, ".metadata")):
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), folder)

    def found(x):
        marked = isinstance(x, tuple) and x[:1] == (WORD,)
        return Stored(folder, *x[1:]) if marked else x

    return tree_map(found, state, is_leaf=lambda x: isinstance(x, tuple))


def drop(path):
    """Removes the folders of parts that the state `path`, if there is one, does not name."""
    named = None
    with contextlib.suppress(Exception):  # whatever stands there, it is no state
        file = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        named = file.get("parts")
    for folder in folders(path):
        if os.path.basename(folder) != named:
            shutil.rmtree(folder, ignore_errors=True)


class Stored:
    """A tensor in a folder of parts. `shape`: that of all its rows"""

    def __init__(self, folder, key, shape):
        self.folder, self.key, self.shape = folder, key, torch.Size(shape)

    def read_into(self, x):
        """Fills a tensor, or each process's part of it, which all must then call."""
        dcp.load({self.key: x}, checkpoint_id=self.folder, no_dist=not is_part(x))

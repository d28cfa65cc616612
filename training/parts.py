"""The saved state of a run with --shard: each process writes its parts of weights and moments.

The parts of all processes are in one folder beside the state, in the format of
torch.distributed.checkpoint, which any number of processes can read. When the folder is complete,
the first process writes the state itself, which names the folder and has a Stored in place of each
part.
"""

import errno
import glob
import os
import pickle
import re
import shutil
import warnings
from functools import partial

import torch
import torch.distributed.checkpoint as dcp
from torch.utils._pytree import keystr, tree_map, tree_map_with_path

from data import UserError
from training import distributed
from training.placement import is_part

warnings.filterwarnings("ignore", "torch.distributed is disabled, unavailable or uninitialized")
WORD = "part"  # the beginning of what the state's file has in place of a tensor
FACTS = re.compile(  # the classes of a folder's .metadata, which is a pickle
    r"torch\.distributed\.checkpoint\.metadata\.(Metadata|MetadataIndex|StorageMeta"
    r"|ChunkStorageMetadata|TensorProperties|TensorStorageMetadata|_MEM_FORMAT_ENCODING)"
    r"|torch\.distributed\.checkpoint\.filesystem\._StorageInfo"
    r"|torch\.(Size|serialization\._get_layout|(b?float|u?int)\d+)"
    r"|pathlib\.(_local\.)?(Posix|Windows)Path|builtins\.getattr"
)


def write(state, path):
    """Writes the parts in the tree `state` to a folder beside `path`. -> the tree to write to
    `path`. Every process must call it. Raises OSError in all of them if one cannot write."""
    found = {}

    def taken(where, x):
        if not is_part(x):
            return x
        found[keystr(where)] = x
        return WORD, keystr(where), list(x.shape)

    state = tree_map_with_path(taken, state)
    folder = distributed.of_first(partial(unused, path))
    try:
        # with a file for each tensor, no process holds a second one in memory
        dcp.save(found, storage_writer=dcp.FileSystemWriter(folder, single_file_per_rank=False))
    except dcp.api.CheckpointException as e:
        raise OSError(errno.EIO, cause(e)) from None
    return state | {"parts": os.path.basename(folder)}


def unused(path):
    """-> a name for a new folder beside a state"""
    taken = {int(x.rpartition("-")[2]) for x in folders(path)}
    return f"{path}.parts-{max(taken, default=0) + 1:06d}"


def folders(path):
    """-> the folders of parts beside a state"""
    return glob.glob(f"{glob.escape(path)}.parts-{6 * '[0-9]'}")


def opened(state, path):
    """A state as read from its file -> the same with parts that can be read. Raises OSError if the
    folder of parts is not complete, and UnpicklingError if its .metadata is not that of a state."""
    folder = f"{path}.{state['parts'].rpartition('.')[2]}"
    with open(os.path.join(folder, ".metadata"), "rb") as file:
        files = Facts(file).load().storage_data.values()
    for x in files:
        if os.path.getsize(os.path.join(folder, x.relative_path)) < x.offset + x.length:
            raise EOFError(x.relative_path)

    def found(x):
        marked = isinstance(x, tuple) and x[:1] == (WORD,)
        return Stored(folder, *x[1:]) if marked else x

    return tree_map(found, state, is_leaf=lambda x: isinstance(x, tuple))


def drop(path):
    """Removes the folders of parts that the state `path`, if there is one, does not name. If the
    state cannot be read, keeps all of them."""
    named = None
    try:
        if os.path.exists(path):
            named = torch.load(path, "cpu", weights_only=True, mmap=True).get("parts")
    except Exception:  # torch raises many types of error for a broken file
        return
    for folder in folders(path):
        if os.path.basename(folder) != named:
            shutil.rmtree(folder, ignore_errors=True)


class Facts(pickle.Unpickler):
    """Reads what a folder's .metadata says of its tensors. Nothing else that a pickle could name is
    imported or called."""

    def find_class(self, module, name):
        if not FACTS.fullmatch(f"{module}.{name}"):
            raise pickle.UnpicklingError(f"{module}.{name}")
        if name == "getattr":  # Python 3.11 pickles the constant of an Enum so
            return lambda constants, name: constants[name]
        return super().find_class(module, name)


class Stored:
    """A tensor in a folder of parts. `shape`: that of all its rows"""

    def __init__(self, folder, key, shape):
        self.folder, self.key, self.shape = folder, key, torch.Size(shape)

    def read_into(self, x):
        """Fills a tensor, or each process's part of it, which all must then call."""
        try:
            dcp.load({self.key: x}, checkpoint_id=self.folder, no_dist=not is_part(x))
        except dcp.api.CheckpointException as e:
            why = f"cannot be read ({cause(e)}); start without --resume"
            raise UserError(f"{self.folder} {why}") from None


def cause(e):
    """-> what went wrong in the first process that failed, in a line"""
    e = next(iter(e.failures.values()))[0]
    return getattr(e, "strerror", None) or f"{type(e).__name__}: {str(e).partition(chr(10))[0]}"

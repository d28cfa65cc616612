"""How these processes were started, by torchrun or by a cluster that sets the same environment,
and how they send gradients. A process reads this file only if its environment has RANK or
WORLD_SIZE.
"""

import json
import os
import shlex
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist

from data import UserError, say

ARGV = sys.argv[1:]  # of the script that torchrun has started, not of an earlier stage
BUCKET = 2**25  # bytes of gradients in one message; a larger one travels alone
NEEDED = "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"


def place():
    """-> (the rank of this process, the number of processes, its rank on this machine, what is
    wrong with the environment or "")"""
    found = {k: os.environ[k] for k in (*NEEDED, "LOCAL_RANK") if k in os.environ}
    found = {"LOCAL_RANK": "0"} | found
    alone = found.get("WORLD_SIZE") == "1"  # needs no address
    wrong = []
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK") if alone else (*NEEDED, "LOCAL_RANK"):
        text = found.get(name)
        number = text and text.isdecimal() and not (name == "MASTER_PORT" and int(text) > 65535)
        if text is None:
            wrong.append(f"no {name}")
        elif not (number or text and name == "MASTER_ADDR"):
            wrong.append(f"{name}={shlex.quote(text)}")
    if not wrong:
        rank, size, local = (int(found[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        if rank < size:
            return rank, size, local, ""
        wrong = [f"RANK={rank} with WORLD_SIZE={size}"]
    needs = f"a process of many needs {', '.join(NEEDED)} in its environment"
    remedy = "start it with torchrun, which sets them, or unset RANK and WORLD_SIZE for one process"
    return 0, 1, 0, f"{needs}, but this one has {' and '.join(wrong)}; {remedy}"


def connect(rank, size, patience):
    """Lets all processes reach each other. -> a store of short texts that all of them can read"""
    again = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)
    serves = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    host, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    try:
        plain = dist.TCPStore(host, int(port), is_master=serves, wait_for_workers=False)
    except (RuntimeError, ValueError) as e:
        why = str(e).partition("\n")[0].partition(" (err")[0]
        remedy = "each launch on a machine needs a port of its own"
        words = f"MASTER_ADDR={host} MASTER_PORT={port} cannot be reached or served ({why})"
        raise UserError(f"{words}; {remedy}") from None
    store = dist.PrefixStore(f"nanopo {again}", plain)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    group = {"store": dist.PrefixStore("group", store), "rank": rank, "world_size": size}
    dist.init_process_group(backend, timeout=patience, **group)
    return store


# ---- a launch, and its restarts


def name():
    """-> a name that only the torchrun of this machine has: a folder with a random name, in which
    each of its starts has a folder; "" if it writes none. Its run id cannot serve: it is always
    "none"."""
    return os.environ.get("TORCHELASTIC_ERROR_FILE", "").rpartition(f"{os.sep}attempt_")[0]


def restarts():
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT") or 0)


def has_begun(record, names):
    """-> whether a launch of these names has begun a record; if not, prints so"""
    try:
        with open(record) as file:
            ours = not names.isdisjoint(json.loads(file.readline())["launch"])
    except (OSError, ValueError, KeyError, TypeError):
        ours = False
    if not ours:
        say(f"torchrun has started this run again before {record} had begun: it begins anew")
    return ours


def words():
    """-> the words before the script's name in the command that has started these processes, taken
    from the parent process, or from what torchrun puts into the environment"""
    if "LOCAL_WORLD_SIZE" not in os.environ:  # no torchrun
        return ["python"]
    try:
        above = Path(f"/proc/{os.getppid()}/cmdline").read_text().split("\0")[:-1]
    except (OSError, ValueError):  # not Linux
        above = []
    end = len(above) - len(ARGV)
    for i, word in enumerate(above[:end]):
        runs = os.path.basename(word) == "torchrun" or word == "torch.distributed.run"
        if runs and above[end:] == ARGV:
            options = above[i + 1 : end - 1]
            return ["torchrun", *[x for x in options if x not in ("-m", "--module")]]
    known = {"--nnodes": "GROUP_WORLD_SIZE", "--nproc-per-node": "LOCAL_WORLD_SIZE"}
    if os.environ["GROUP_WORLD_SIZE"] != "1":
        known |= {"--node-rank": "GROUP_RANK", "--master-addr": "MASTER_ADDR"}
    known |= {"--master-port": "MASTER_PORT", "--max-restarts": "TORCHELASTIC_MAX_RESTARTS"}
    usual = ("--nnodes", "1"), ("--master-port", "29500"), ("--max-restarts", "0")
    found = [(option, os.environ.get(variable, "")) for option, variable in known.items()]
    return ["torchrun", *[x for pair in found if pair[1] and pair not in usual for x in pair]]


# ---- what one process writes for the others


def stored(rows):
    """-> the path of a new file of rows, in the folder for temporary files"""
    path = ""
    try:
        with tempfile.NamedTemporaryFile(suffix=".rows", delete=False) as file:
            path = file.name
            rows.save(file)
        return path
    except BaseException as e:
        if path:
            os.unlink(path)
        cause = e if isinstance(e, OSError) else e.__context__  # torch hides it
        if not isinstance(cause, OSError):
            raise
        what = f"{path or 'a temporary file'} cannot be written ({cause.strerror or cause})"
        whose = "the encoded rows, which the processes of this machine share"
        remedy = "set TMPDIR to a folder with room for them"
    raise UserError(f"{what}: it holds {whose}; {remedy}")


def total_gradients(gradients):
    """Sums each gradient over the processes, in place. Neighbours are sent together, because each
    of hundreds of small messages would cost more than its bytes."""
    for bucket in buckets(gradients):
        flat = torch.cat([x.flatten() for x in bucket]) if len(bucket) > 1 else bucket[0]
        dist.all_reduce(flat)
        if len(bucket) > 1:
            parts = flat.split([x.numel() for x in bucket])
            torch._foreach_copy_(bucket, [part.view_as(x) for part, x in zip(parts, bucket)])


def buckets(tensors):
    """Yields lists of neighbours that have one dtype, and at most BUCKET bytes together."""
    bucket, size = [], 0
    for x in tensors:
        if bucket and (size + x.nbytes > BUCKET or x.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(x)
        size += x.nbytes
    if bucket:
        yield bucket

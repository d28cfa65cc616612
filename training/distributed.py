"""Shares the work of a step among the processes that torchrun has started, and joins the results.

Every process knows the whole step: its rows, all random numbers, every rollout. Only the passes
through a model are divided among the processes. All results are joined in the same way: each
process fills its own rows of a table of zeros, and the sum over the processes is exactly the
complete table. Gradients are summed once per optimizer step. A single process sends no message.
"""

import contextlib
import os
import sys
import time
import warnings
from datetime import timedelta
from functools import cache, partial

import torch
import torch.distributed as dist

import data
from data import UserError

started = bool({"RANK", "WORLD_SIZE"} & os.environ.keys())  # by torchrun or a cluster
rank, size, local, mistake = 0, 1, 0, ""  # local: its number on this machine
if started:
    from training import launch

    rank, size, local, mistake = launch.place()
is_first, many = rank == 0, size > 1
store = None  # short texts that all processes can read
saved = ""  # the path of the state that was saved last
PATIENCE = timedelta(hours=2)  # for a process that writes or waits for another run
SAID = 3.0  # seconds that the first process has to print a mistake that all of them have met


class Lost(Exception):
    """Another process has ended, or has met a mistake that it prints itself."""


# ---- together from the start to the end


@contextlib.contextmanager
def joined():
    """Within this block the processes can reach each other. If all went well, they disconnect at
    its end."""
    global store
    if mistake:
        raise UserError(mistake)
    if not many or store:  # one process, or an earlier stage inside a run
        yield
        return
    if not is_first:
        sys.stdout = open(os.devnull, "w")
        warnings.simplefilter("ignore")
    store = launch.connect(rank, size, PATIENCE)
    try:
        yield
    except SystemExit as e:
        if not e.code:
            part()
        raise
    part()


def part():
    """Disconnects the processes, but only after success: after an error it could wait for ever."""
    wait()
    dist.destroy_process_group()


def wait():
    """Waits until every process is here."""
    if many:
        dist.barrier()


def to_say(message, alone=False, by_one=False):
    """The message of a failure -> what this process prints of it. A failure that all processes meet
    is printed by the first one. A process that fails alone prints the message itself, with its
    rank. by_one: the process that comes first prints it. message: "" if this process could not
    reach another one"""
    if not store:
        return message
    if by_one:
        store.set(f"failed {rank}", "")
        return message if store.add("once", 1) == 1 else ""
    if message:
        store.set(f"failed {rank}", "")
    until, others = time.time() + SAID, [0] if message else range(size)
    while not (message and (is_first or alone)) and time.time() < until:
        if any(store.check([f"failed {i}"]) for i in others):
            return ""
        time.sleep(0.1)
    if not message:
        kept = f"--resume goes on from {saved}" if os.path.exists(saved) else "no state was saved"
        message = f"rank {rank}: another process has ended; {kept}"
        return message if store.add("lost", 1) == 1 else ""
    return message if is_first and not alone else f"rank {rank}: {message}"


def end(code):
    """Ends at once one of many processes that has failed, even if messages are under way."""
    if many:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def is_lost(e):
    """Whether an error comes from a message to a process that has ended"""
    return many and (isinstance(e, (Lost, dist.DistError)) or "gloo" in str(e))


def launches():
    """-> the names of this launch, one per machine; none if torchrun has not started it"""
    return {x for x in gathered(launch.name()) if x} if started else set()


def goes_on(record):
    """Whether this launch of torchrun began the record, and has now restarted the run"""
    if not started or not total(launch.restarts(), "MAX"):
        return False
    return of_first(partial(launch.has_begun, record, launches()))


@contextlib.contextmanager
def agreed():
    """If one process meets a mistake within this block, all stop: the others raise Lost."""
    mistake = None
    try:
        yield
    except UserError as e:
        mistake = e
    met = total(mistake is not None)
    if mistake:
        mistake.alone = met < size
        raise mistake
    if met:
        raise Lost


@cache
def mesh(kind):
    """-> the processes in a row, as FSDP2 needs them"""
    return dist.device_mesh.init_device_mesh(kind, (size,))


# ---- shares, and how they are joined


def mine(n):
    """-> this process's share of n things, as a slice"""
    return slice(n * rank // size, n * (rank + 1) // size)


def cut(n, rows, lengths=None, tokens=0, processes=1):
    """-> the rows of each part, for `shares` to distribute among the processes"""
    parts = [slice(i, min(i + rows, n)) for i in range(0, n, rows)]
    if tokens and any(lengths[part].sum() > tokens for part in parts):
        from training.cut import by_tokens

        parts = by_tokens(lengths, rows, min(tokens, -(-int(lengths.sum()) // processes)))
    return parts


def shares(n, rows=0, lengths=None, tokens=0):
    """Yields this process's parts of n rows, at most `rows` at a time (0: its whole share), as
    (slice, whether it counts). All processes make the same number of passes: a process that has one
    part less than others gets the first part instead, which does not count. If a part would have
    more than `tokens` tokens (0: any number), it is cut by the lengths of the rows, (n,), and a
    tensor of row numbers takes the place of the slice."""
    share = max(1, -(-n // size))
    parts = cut(n, min(rows or share, share), lengths, tokens, size)
    for i in range(rank, -(-len(parts) // size) * size, size):
        yield (parts[i], True) if i < len(parts) else (parts[0], False)


def shared(n, f, *limits):
    """-> f of all n rows, (n, …). Each process computes its share, cut as `shares` does. f(rows)
    gives the results of these rows."""
    found = torch.zeros(0)
    for part, counts in shares(n, *limits):
        x = f(part)
        found = found if len(found) else x.new_zeros(n, *x.shape[1:])
        if counts:
            found[part] = x
    return total(found)


def in_one_process(make):
    """-> make(): Rows and a note. The first process of each machine makes them and writes a file;
    the others map it, and it is deleted."""
    if not many:
        return make()
    made = note = own = None
    try:
        with agreed():
            if local == 0:
                made, note = make()
                own = launch.stored(made)
        path, note = [x for x in gathered((own, note))[: rank + 1] if x[0]][-1]  # of this machine
        rows = made if own else data.Rows.mapped(path)
        wait()
        return rows, note
    except UserError as e:
        e.alone = False  # all have met it, and one prints it
        raise
    finally:
        if own:
            os.unlink(own)


def total(x, op="SUM"):
    """x, a number or a tensor of numbers, in each process -> their sum, MIN or MAX"""
    if not many:
        return x
    found = x.clone() if torch.is_tensor(x) else torch.tensor(x, dtype=torch.float64)
    dist.all_reduce(found, getattr(dist.ReduceOp, op))
    return found if torch.is_tensor(x) else found.item()


def total_all(named, device):
    """{name: a number or a tensor of one} in each process -> their sums, in one message"""
    values = [torch.as_tensor(x, dtype=torch.float64, device=device) for x in named.values()]
    return dict(zip(named, total(torch.stack(values)).unbind()))


def total_gradients(parameters):
    """Sums each gradient over the processes, in place."""
    if many:
        launch.total_gradients([p.grad for p in parameters])


def gathered(x):
    """-> x of every process, in the order of their ranks. Tensors in it must be on the CPU."""
    if not many:
        return [x]
    found = [None] * size
    dist.all_gather_object(found, x)
    return found


def of_first(f):
    """-> what f() gives in the first process"""
    if not many:
        return f()
    found = [f() if is_first else None]
    dist.broadcast_object_list(found)
    return found[0]

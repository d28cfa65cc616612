"""One writer per --out: a lock of `filelock`, which ends with its process."""

import contextlib
import os
import time

from data import UserError, say
from data.ours import refuse_others

HELD = {}  # path of a lock -> the lock, if this process holds it


def path_of(out):
    """-> the lock's file, beside the checkpoint that --out means"""
    return os.path.realpath(out).removesuffix(".pt") + ".lock"


def take(out):
    """-> whether this process may write there because no other one does. The lock's file stays."""
    try:
        from filelock import FileLock, Timeout
    except ImportError:
        missing = "needs the package filelock, which comes with torch"
        raise UserError(f"--out {out} {missing}: pip install filelock") from None
    path = path_of(out)
    if path in HELD:
        return True
    refuse_others(f"--out {out}", path)  # a lock is empty
    open(path, "a").close()  # raises an error of its own if the folder cannot be written
    lock = FileLock(path, thread_local=False)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return False
    except (OSError, NotImplementedError) as e:
        say(f"{path} cannot be locked ({e}): make sure that no other run writes there")
        return True
    HELD[path] = lock
    return True


def take_or_refuse(out):
    if not take(out):
        raise UserError(f"--out {out}: another run is writing there; wait, or give another path")


def wait(out, why):
    """Takes the lock as soon as it is free."""
    if not take(out):
        say(f"another run is writing {out}: {why}")
        while not take(out):
            time.sleep(0.5)


@contextlib.contextmanager
def given_back():
    """At the end of this block, releases the locks that were taken within it."""
    before = set(HELD)
    try:
        yield
    finally:
        for path in set(HELD) - before:
            HELD.pop(path).release()


def wait_until_free(out, why):
    """Waits until another run has ended, and writes nothing."""
    with given_back():
        wait(out, why)

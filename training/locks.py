"""One writer to an --out: a lock that ends with its process."""

import contextlib
import os
import sqlite3
import time

from data import UserError, say

HELD = {}  # path of a lock -> the connection that holds it, of this process


def path_of(out):
    """-> the lock's file, beside the checkpoint that --out means"""
    return os.path.realpath(out).removesuffix(".pt") + ".lock"


def take(out):
    """-> whether this process may write there: nobody else does. The lock is an exclusive
    transaction of SQLite, which every system takes back from a process that has ended."""
    path = path_of(out)
    while path not in HELD:
        open(path, "a").close()
        file = os.stat(path).st_ino
        how = {"timeout": 0, "isolation_level": None, "check_same_thread": False}
        connection = sqlite3.connect(os.fsencode(path), **how)
        try:
            connection.execute("PRAGMA journal_mode = OFF")  # nothing is ever written
            connection.execute("BEGIN EXCLUSIVE")
        except sqlite3.Error as e:
            connection.close()
            if "locked" in str(e):
                return False
            say(f"{path} cannot be locked ({e}): see that no other run writes there")
            return True
        with contextlib.suppress(FileNotFoundError):  # the one before may have removed it
            if os.stat(path).st_ino == file:
                HELD[path] = connection
                break
        connection.close()
    return True


def take_or_refuse(out):
    if not take(out):
        raise UserError(f"--out {out}: another run is writing there; wait for it, or give another")


def wait(out, why):
    """Takes the lock as soon as it is free."""
    if not take(out):
        say(f"another run is writing {out}: {why}")
        while not take(out):
            time.sleep(0.5)


@contextlib.contextmanager
def given_back():
    """What is taken within is given back at its end, with the locks' files."""
    before = set(HELD)
    try:
        yield
    finally:
        for path in set(HELD) - before:
            _give_back(path)


def wait_until_free(out, why):
    """Waits for another run's end, and writes nothing."""
    wait(out, why)
    _give_back(path_of(out))


def _give_back(path):
    if path in HELD:  # it is not where nothing can be locked
        with contextlib.suppress(OSError):
            os.unlink(path)
        HELD.pop(path).close()

"""Prints the notes of a run, and reports a user's mistake in one line."""

import contextlib
import sys

from tqdm import tqdm


def say(note):
    """Prints a note, unless it is empty, above the progress bar if there is one."""
    if note:
        tqdm.write(note)
        sys.stdout.flush()


def printable(text):
    """-> a text without the control characters that a terminal would obey. Files may have some, and
    so may the samples of a model that has learned little."""
    return "".join(c if c.isprintable() or c == "\n" else "·" for c in text.strip())


class UserError(Exception):
    """A mistake of the user. The message is one line: what is wrong, and how to mend it."""

    code = 2  # the process's exit code
    alone = False  # whether only one of many processes has found it

    def __init__(self, message):
        super().__init__(printable(message).replace("\n", "·"))


class Stopped(UserError):
    """Training cannot go on, for example because a loss is not finite or a stage has failed."""

    code = 1


def refuse_pointer(path):
    """Raises UserError if Git LFS has left a pointer in place of a large file."""
    begin, found = b"version https://git-lfs", b""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        found = file.read(len(begin))
    if found == begin:
        remedy = "run git lfs pull in its repository"
        raise UserError(f"{path} is a pointer of Git LFS, not the file itself; {remedy}")


@contextlib.contextmanager
def user_errors(what, remedy=""):
    """Turns any error that foreign code raises within this block into a UserError: what, why and
    the remedy. It catches BaseException too, because a package written in Rust raises one when it
    panics."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as e:
        why = str(e).strip().partition("\n")[0] or type(e).__name__
        raise UserError(f"{what} ({why})" + (f"; {remedy}" if remedy else "")) from None

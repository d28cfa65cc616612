"""What a run says: notes, and a user's mistake in one line."""

import contextlib
import sys

from tqdm import tqdm


def say(note):
    """Prints a note, if there is one, above a progress bar that may be there."""
    if note:
        tqdm.write(note)
        sys.stdout.flush()


def printable(text):
    """A text as one can look at it: a file, and a model that has learned little, may hold control
    characters, which a terminal would obey."""
    return "".join(c if c.isprintable() or c == "\n" else "·" for c in text.strip())


class UserError(Exception):
    """A mistake of the user's: its message is one line, what is wrong and how to mend it."""

    code = 2  # the process's exit code
    alone = False  # met by one process of many

    def __init__(self, message):
        super().__init__(printable(message).replace("\n", "·"))


class Stopped(UserError):
    """Training cannot go on: a loss that is not finite, an earlier stage that failed."""

    code = 1


@contextlib.contextmanager
def user_errors(what, remedy=""):
    """Whatever a stranger's code raises within it becomes a UserError: what, why and the remedy. A
    panic of a package in Rust is no Exception."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as e:
        why = str(e).strip().partition("\n")[0] or type(e).__name__
        raise UserError(f"{what} ({why})" + (f"; {remedy}" if remedy else "")) from None

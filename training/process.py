"""Handles what reaches a process from outside: streams that end, and signals."""

import contextlib
import os
import signal
import sys

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def streams():
    """Within this block a character that an encoding cannot show is replaced, and the null device
    takes the place of a stream that the process lacks. At its end a reader that has left is
    noticed."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # or a file of ours would get its number
            setattr(sys, name, open(os.devnull, mode))
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")
    yield
    sys.stdout.flush()


class Interrupts:
    """Ctrl-C and SIGTERM both raise KeyboardInterrupt. But a `patient` loop finishes its step
    first, and a `held` block is finished however often they come. This object is true once the
    first of them has come."""

    def __init__(self):
        self.depth = 0  # of nested commands: a run may make an earlier stage
        self.begin()

    def begin(self):
        self.count, self.signal = 0, None
        self.waits = self.holds = self.over = False

    def __bool__(self):
        return self.count > 0

    def __call__(self, number, frame):
        self.count, self.signal = self.count + 1, number
        if not (self.over or self.holds or self.waits and self.count == 1):
            self.stop()

    def stop(self, message=""):
        """Ends the process now; further signals are ignored."""
        self.over = True
        raise KeyboardInterrupt(message)

    @contextlib.contextmanager
    def patient(self):
        self.waits = True
        try:
            yield self
        finally:
            self.waits = False

    @contextlib.contextmanager
    def held(self):
        count, outer, self.holds = self.count, self.holds, True
        try:
            yield
        finally:
            self.holds = outer
        if self.count > count and not (outer or self.waits or self.over):
            self.stop()

    @contextlib.contextmanager
    def caught(self):
        """Within this block the signals come here. Once one of them ends the process, further ones
        are ignored to the very end."""
        try:
            before = {number: signal.signal(number, self) for number in SIGNALS}
        except ValueError:  # only the main thread may handle signals
            before = {}
        if self.depth == 0:
            self.begin()
        self.depth += 1
        try:
            yield
        finally:
            self.depth -= 1
            for number, handler in before.items():
                signal.signal(number, signal.SIG_IGN if self.over else handler)


interrupts = Interrupts()

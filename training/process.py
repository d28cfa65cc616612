"""What a process meets outside its own code: streams that end, and signals."""

import contextlib
import os
import signal
import sys

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextlib.contextmanager
def streams():
    """Within it a character that an encoding cannot show is replaced, and a stream that the process
    began without is the null device. Whether a reader has left is known at its end."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # its number is free, and no file of ours shall get it
            setattr(sys, name, open(os.devnull, mode))
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")
    yield
    sys.stdout.flush()


class Interrupts:
    """Ctrl-C and SIGTERM, which mean the same: KeyboardInterrupt, but a loop that is `patient`
    finishes its step first, and what is `held` is finished however often they come. True from the
    first of them on."""

    def __init__(self):
        self.depth = 0  # of commands: a run may make an earlier stage
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
        """The process ends now, and a further signal has nothing to stop."""
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
        """Within it the signals come here. Once the process ends because of one, further ones are
        ignored to its very end."""
        try:
            before = {number: signal.signal(number, self) for number in SIGNALS}
        except ValueError:  # not the main thread: signals are somebody else's
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

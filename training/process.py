"""What a process meets outside its own code: streams that end, and signals."""

import contextlib
import os
import signal
import sys

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stream:
    """A text stream that stops no run. What its encoding cannot show is replaced. Once nobody reads
    it any more, what is written goes nowhere."""

    def __init__(self, stream):
        self.stream = stream
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        self._try(self.stream.write, text)
        return len(text)

    def flush(self):
        self._try(self.stream.flush)

    def _try(self, act, *args):
        try:
            act(*args)
        except (OSError, ValueError):  # a pipe that has ended, a full disk, a closed file
            with contextlib.suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self.stream.fileno())  # for what is still in its buffer
                os.close(nowhere)


@contextlib.contextmanager
def streams():
    """Within it stdout and stderr are Streams, also if the process began without them."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number, so that no file gets it
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (
        x if isinstance(x, Stream) else Stream(x or open(os.devnull, "w")) for x in before
    )
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before


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

"""The logger of a run without --log-to. The others, in loggers.py, are subclasses of it."""


class Logger:
    """Takes the lines of a record, and does nothing with them."""

    def __init__(self, method, out):
        self.method, self.stem = method, out.removesuffix(".pt")
        self.step = 0  # of the last line

    def begin(self, options, lines):
        """lines: those that the record of a resumed run has already; a new run has none"""

    def facts(self):
        """-> what the record's first line keeps, so that a resumed run finds its curve again"""
        return {}

    def take(self, line):
        """line: the next of the record: the first, or that of a step, an evaluation or the end"""

"""What takes the lines of a record beside the record: nothing, or a logger of loggers.py."""


class Logger:
    """Takes the lines of a record, and does nothing with them."""

    def __init__(self, method, out):
        self.method, self.stem = method, out.removesuffix(".pt")
        self.step = 0  # of the last line

    def begin(self, options, lines):
        """lines: what a resumed run has of its record already; none of a new run"""

    def facts(self):
        """-> what the record's first line keeps, so that a resumed run finds its curve again"""
        return {}

    def take(self, line):
        """The record's next line: the first one, or of a step, an evaluation, or the end."""

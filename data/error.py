class DataError(Exception):
    """A mistake in what the user gave: a task name, a file, a row. The message is one line and says how to mend it."""

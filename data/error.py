class UserError(Exception):
    """A mistake of the user's: its message is one line, what is wrong and how to mend it."""

    code = 2  # the process's exit code

    def __init__(self, message):
        super().__init__("".join(c if c.isprintable() else "·" for c in message))


class Stopped(UserError):
    """Training cannot go on: a loss that is not finite, an earlier stage that failed."""

    code = 1

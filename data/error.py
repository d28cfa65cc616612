class UserError(Exception):
    """A mistake of the user's: its message is one line, what is wrong and how to mend it."""

    code = 2  # the process's exit code


class Stopped(UserError):
    """Training cannot go on: a loss that is not finite, an earlier stage that failed."""

    code = 1

"""The errors that a user can act on."""

import signal


class UserError(Exception):
    """Something a user can mend: bad parameters, data or files.

    The message is one line: the file, field or value at fault, and what to do. The command line prints
    it without a traceback and exits with status 1; any other exception is a defect and keeps its traceback.
    """


class Echo(UserError):
    """What another process tells of, where several train together: here it is not said again."""


class Stopped(Exception):
    """A signal asked the process to end; what had to be kept has been kept."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum

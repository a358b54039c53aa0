"""Errors that a user can act on."""

import errno
import os
import signal
from pathlib import Path

from pydantic import ValidationError

MAX_FAULTS = 40
"""Maximum number of validation errors reported in one line."""


class UserError(Exception):
    """An error that the user can fix: bad parameters, data or files.

    The message is one line that names the file, field or value at fault and says what to do. The command line prints it
    without a traceback and exits with status 1. Any other exception is a bug and keeps its traceback.
    """


ADVICE = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space, or ask for a larger quota",
    errno.EFBIG: "allow larger files (ulimit -f, or another file system)",
    errno.EROFS: "remount it writable, or choose another place",
    errno.EACCES: "change its permissions, or those of its folder",
    errno.EPERM: "change its permissions, or those of its folder",
    errno.ENAMETOOLONG: "choose a shorter name",
}


class SystemFault(UserError):
    """The operating system failed to read or write a file."""

    def __init__(self, path: Path, error: OSError, problem: str = "{}") -> None:
        self.path, self.error = path, error
        reason = os.strerror(error.errno) if error.errno else str(error)
        advice = f"; {ADVICE[error.errno]}" if error.errno in ADVICE else ""
        super().__init__(f"{path}: {problem.format(reason)}{advice}")

    @classmethod
    def of(cls, error: OSError) -> "SystemFault":
        """Convert an OSError that names a file; re-raises one that does not."""
        if not isinstance(error.filename, str | bytes):
            raise error
        return cls(Path(os.fsdecode(error.filename)), error)


class FileFault(UserError):
    """A file written earlier cannot be used: it is missing, corrupt or from another version."""

    def __init__(self, path: Path, problem: str) -> None:
        self.path = path
        super().__init__(f"{path}: {problem}")


class Damaged(FileFault):
    """A file has changed since it was written."""

    def __init__(self, path: Path, why: str) -> None:
        super().__init__(path, f"damaged ({why})")


class WriteFault(SystemFault):
    """The operating system failed to write a file."""

    def __init__(self, path: Path, error: OSError) -> None:
        super().__init__(path, error, "cannot be written ({})")


class AlreadyReported(UserError):
    """An error that another process of a distributed run reports; this process must not report it again."""


class Stopped(BaseException):
    """A signal asked the process to stop; raised where the state can be saved.

    Not an Exception, so that an `except Exception` around a decoder or server does not swallow it.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum


def describe(error: ValidationError) -> str:
    """Format a validation error as one line: field, problem and value of each fault."""
    problems, found = [], error.errors(include_url=False)
    for problem in found[:MAX_FAULTS]:
        field = ".".join(str(part) for part in problem["loc"])
        match problem["type"]:
            case "missing":
                text = "missing"
            case "extra_forbidden":
                text = "no such parameter"
            case "tuple_type":
                text = f"must be a list such as [1, 2] (got {problem['input']!r})"
            case "model_type":
                text = f"must be a section with fields (got {problem['input']!r})"
            case "value_error":
                text = str(problem["ctx"]["error"])
            case _:
                text = f"{problem['msg'][0].lower()}{problem['msg'][1:]} (got {problem['input']!r})"
        problems.append(f"{field}: {text}" if field else text)
    more = [f"and {len(found) - MAX_FAULTS} more"] if len(found) > MAX_FAULTS else []
    return "; ".join(problems + more)

"""Errors that a user can act on."""

import errno
import os
import re
import signal
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

from pydantic import ValidationError

MAX_FAULTS = 40
"""Maximum number of validation errors reported in one line."""
MAX_CHARACTERS = 100
"""Maximum length of a value in a message."""


_PASSWORD = re.compile(r"(https?://|://(?=[^\s/?#@]*:))[^\s/?#]*@")
_QUERY = re.compile(r"(://[^\s?#'\"]*)\?[^\s#'\")]*?(?=[:;,.]?(?:[\s#'\")]|$))")


def without_secrets(text: str) -> str:
    """A text in which URLs have no password and no query, which may be a signature."""
    return _QUERY.sub(r"\1", _PASSWORD.sub(r"\1", text)) if "://" in text else text


class UserError(Exception):
    """An error that the user can fix: bad parameters, data or files.

    The message is one line that names the file, field or value at fault and says what to do. The command line prints it
    without a traceback and exits with status 1, or 2 for wrong arguments. Any other exception is a bug and keeps its
    traceback.
    """

    def __str__(self) -> str:
        return without_secrets(super().__str__())

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle it as it is, to be raised in a worker process; by default, `__init__` would be called again."""
        return _unpickled, (type(self), self.args), self.__dict__


def _unpickled(kind: type[UserError], arguments: tuple[object, ...]) -> UserError:
    return kind.__new__(kind, *arguments)


class UsageError(UserError):
    """Wrong arguments of a command that its parser accepts."""


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

    status = 1
    """Exit status of the process."""


class LostConnection(AlreadyReported):
    """The connection to another process of a distributed run was lost; the launcher reports it."""

    status = os.EX_UNAVAILABLE


class Stopped(BaseException):
    """A signal asked the process to stop; raised where the state can be saved.

    Not an Exception, so that an `except Exception` around a decoder or server does not swallow it.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum


def shortened(value: object) -> str:
    """A value for a message: its repr, at most MAX_CHARACTERS long."""
    text = "nothing" if value is None else str(value) if isinstance(value, date) else repr(value)
    return text if len(text) <= MAX_CHARACTERS else f"{text[:MAX_CHARACTERS]}..."


def counted(count: float, noun: str, plural: str = "", spec: str = "") -> str:
    """A number and its noun, such as `1 image` and `2 images`; `plural` is the noun with an s if empty.

    `spec` formats the number: with a comma, such as `1,200 images`.
    """
    return f"{count:{spec}} {noun if count == 1 else plural or f'{noun}s'}"


def dotted(place: tuple[int | str, ...]) -> str:
    """The name of a field, such as train.steps."""
    return ".".join(map(str, place))


def describe(error: ValidationError, name: Callable[[tuple[int | str, ...]], str] = dotted) -> str:
    """Format a validation error as one line: field, problem and value of each fault. `name` names a field."""
    problems, found = [], error.errors(include_url=False)
    for problem in found[:MAX_FAULTS]:
        field = name(problem["loc"])
        match problem["type"]:
            case "missing":
                text = "missing"
            case "extra_forbidden":
                text = "no such parameter"
            case "tuple_type":
                text = f"must be a list such as [1, 2] (got {shortened(problem['input'])})"
            case "model_type":
                text = f"must be a section with fields (got {shortened(problem['input'])})"
            case "value_error":
                text = str(problem["ctx"]["error"])
            case _:
                text = f"{problem['msg'][0].lower()}{problem['msg'][1:]} (got {shortened(problem['input'])})"
        problems.append(f"{field}: {text}" if field else text)
    more = [f"and {len(found) - MAX_FAULTS} more"] if len(found) > MAX_FAULTS else []
    return "; ".join(problems + more)

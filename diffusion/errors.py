"""The errors that a user can act on."""

import signal

from pydantic import ValidationError


class UserError(Exception):
    """Something a user can mend: bad parameters, data or files.

    The message is one line: the file, field or value at fault, and what to do. The command line prints
    it without a traceback and exits with status 1; any other exception is a defect and keeps its traceback.
    """


class Echo(UserError):
    """What another process tells of, where several train together: here it is not said again."""


class Stopped(BaseException):
    """A signal asked the process to end; raised once everything that must be kept has been saved.

    Not an Exception, so that `except Exception` around a decoder or a server never mistakes a stop for their error.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum


def describe(error: ValidationError) -> str:
    """A validation error in one line: field, what is wrong, the value found."""
    problems, found = [], error.errors(include_url=False)
    for problem in found[:8]:
        field = ".".join(str(part) for part in problem["loc"])
        match problem["type"]:
            case "missing":
                text = "missing (presets/digits.yaml has every field)"
            case "extra_forbidden":
                text = "no such parameter"
            case "tuple_type":
                text = f"must be a list, as [1, 2] (got {problem['input']!r})"
            case "value_error":
                text = str(problem["ctx"]["error"])
            case _:
                text = f"{problem['msg'][0].lower()}{problem['msg'][1:]} (got {problem['input']!r})"
        problems.append(f"{field}: {text}" if field else text)
    more = [f"and {len(found) - 8} more"] if len(found) > 8 else []
    return "; ".join(problems + more)

"""The command line: `ddpm COMMAND`, or `python -m flows COMMAND`."""

import errno
import os
import re
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import NoReturn

from cyclopts import CycloptsError, MissingArgumentError, UnusedCliTokensError

from diffusion.errors import AlreadyReported, Stopped, SystemFault, UsageError, UserError, WriteFault
from diffusion.progress import say
from flows.cli import app
from flows.parent import launched
from flows.remedies import with_remedy

USAGE_ERROR = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit status."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the caller
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115 (until the end)
    try:
        return _main(list(sys.argv[1:] if argv is None else argv))
    finally:  # what cannot be written is dropped: Python, ending, would try again and make the status 120
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except OSError:
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _main(arguments: list[str]) -> int:
    command, *_ = arguments or [""]
    name = f"ddpm {command}" if command in app and not command.startswith("-") else "ddpm"
    try:
        with stoppable():
            _refuse_empty(arguments)
            call, bound, _ = app.parse_args(arguments, print_error=False, exit_on_error=False)
            call(*bound.args, **bound.kwargs)
            sys.stdout.flush()  # a full disk is an error of the command
    except CycloptsError as error:
        say(f"{name}: error: {usage_error(error)} See `{name} --help`.")
        return USAGE_ERROR
    except UserError as error:
        if isinstance(error, AlreadyReported):
            return error.status
        resumable = command in ("train", "distill") and isinstance(error, WriteFault)
        more = "; training will then continue from its last checkpoint" if resumable else ""
        say(f"{name}: error: {with_remedy(error)}{more}")
        return USAGE_ERROR if isinstance(error, UsageError) else 1
    except Stopped as stopped:
        if not launched():
            print(f"{name}: {stopped}", file=sys.stderr)
        return 128 + stopped.signum
    except KeyboardInterrupt:
        if not launched():
            print(f"{name}: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:
        return 128 + signal.SIGPIPE
    except OSError as error:
        on_output = error.filename is None and error.errno == errno.ENOSPC  # files are named
        say(f"{name}: error: {'standard output: no space left' if on_output else SystemFault.of(error)}")
        return 1
    return 0 if arguments else USAGE_ERROR  # without a command, it has shown them


def _refuse_empty(arguments: list[str]) -> None:
    """Raise UsageError for an empty argument, which a path would read as the current folder."""
    for before, argument in pairwise(["", *arguments]):
        if not argument or re.fullmatch(r"--[a-z-]+=", argument):
            option = argument or before
            raise UsageError(f"{option.rstrip('=') if option.startswith('--') else 'an argument'}: must not be empty")


def usage_error(error: CycloptsError) -> str:
    """A sentence about wrong arguments."""
    if isinstance(error, UnusedCliTokensError) and error.unused_tokens:
        return f"unexpected argument {error.unused_tokens[0]!r}."
    if isinstance(error, MissingArgumentError) and error.argument is not None:
        return f"{error.argument.name} is missing{' its value' if error.tokens_so_far or error.keyword else ''}."
    text = " ".join(str(error).split())
    text = text.removesuffix("?.") + "?" if text.endswith("?.") else text
    return text if text.endswith((".", "?")) else f"{text}."


@contextmanager
def stoppable() -> Iterator[None]:
    """A block that SIGTERM ends by raising Stopped, so that it can clean up and mark its records as stopped."""
    signal.signal(signal.SIGTERM, _stop)
    try:
        yield
    finally:  # it ends anyway: while Python shuts down, `_stop` would only leave a traceback
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _stop(signum: int, _: FrameType | None) -> NoReturn:
    raise Stopped(signum)


if __name__ == "__main__":
    sys.exit(main())

"""The command line: `ddpm COMMAND`, or `python -m flows COMMAND`."""

import errno
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from cyclopts import CycloptsError

from diffusion.errors import AlreadyReported, Stopped, SystemFault, UserError, WriteFault
from diffusion.progress import say
from flows.cli import app
from flows.parent import launched
from flows.remedies import with_remedy

USAGE_ERROR = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit status."""
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
            call, bound, _ = app.parse_args(arguments, print_error=False, exit_on_error=False)
            call(*bound.args, **bound.kwargs)
    except CycloptsError as error:
        say(f"{name}: error: {' '.join(str(error).split()).removesuffix('.')}. See `{name} --help`.")
        return USAGE_ERROR
    except UserError as error:
        if not isinstance(error, AlreadyReported):
            goes_on = command == "train" and isinstance(error, WriteFault)
            more = "; training will then continue from its last checkpoint" if goes_on else ""
            say(f"{name}: error: {with_remedy(error)}{more}")
        return 1
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
    return 0


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

"""SIGTERM and SIGINT, handled at a point where nothing is lost."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Self

from diffusion.errors import Stopped


class StopSignals:
    """Records SIGTERM and SIGINT within the block; `check` raises Stopped once one has been received."""

    def __init__(self) -> None:
        self._received = 0

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, signum: int, frame: FrameType | None) -> None:  # noqa: ARG002
        self._received = signum

    def received(self) -> int:
        """Number of the received signal, or 0."""
        return self._received

    def check(self) -> None:
        """Raise Stopped if a signal has been received."""
        if self._received:
            raise Stopped(self._received)


@contextmanager
def deferred() -> Iterator[None]:
    """A block that SIGTERM and SIGINT do not interrupt: they are handled at its end."""
    stop = StopSignals()
    try:
        with stop:
            yield
    finally:
        if number := stop._received:
            signal.raise_signal(number)

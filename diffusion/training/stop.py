"""Ending a training on SIGTERM or SIGINT, at a point where its state can be kept."""

import signal
from types import FrameType
from typing import Self

from diffusion.errors import Stopped


class StopSignals:
    """Within the block a SIGTERM or SIGINT is noted, and `check` raises Stopped once one has come."""

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
        """The number of the signal that has come, or 0."""
        return self._received

    def check(self) -> None:
        if self._received:
            raise Stopped(self._received)

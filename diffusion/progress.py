"""Progress of long-running stages: a bar on a terminal, periodic lines elsewhere."""

import re
import sys
import time
from contextlib import suppress
from typing import NamedTuple, Self

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 5.0
_LINE = re.compile(r"^(?P<stage>\w+): (?P<done>\d+)/(?P<total>\d+) (?P<unit>\w+)")


class Done(NamedTuple):
    """The progress reported by a line."""

    stage: str
    done: int
    total: int


def parse(line: str) -> Done | None:
    """Parse a progress line of a stage's output; None for any other line."""
    match = _LINE.match(line)
    return Done(match["stage"], int(match["done"]), int(match["total"])) if match else None


class Progress:
    """Reports progress; a context manager.

    Shows a tqdm bar on a terminal. Elsewhere it prints lines that `parse` understands:
    `train: 640/128000 images, 812/s, 157 s left, loss 0.0712`.
    """

    def __init__(self, stage: str, total: int, unit: str, done: int = 0) -> None:
        self.stage, self.total, self.unit, self.done = stage, total, unit, done
        self._first = done
        self._started = self._printed = time.monotonic()
        terminal = sys.stderr.isatty()
        self._bar = tqdm(total=total, initial=done, desc=stage, unit=f" {unit}", smoothing=0.05) if terminal else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
        elif kind is None:
            self._print("")

    def advance(self, count: int, note: str = "") -> None:
        """Record that `count` more units are done, with an optional note such as `loss 0.0712`."""
        self.done += count
        if self._bar is not None:
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(count)
        elif time.monotonic() - self._printed >= SECONDS_BETWEEN_LINES:
            self._print(note)

    def _print(self, note: str) -> None:
        self._printed = time.monotonic()
        rate = (self.done - self._first) / max(self._printed - self._started, 1e-9)
        left = (self.total - self.done) / rate if rate else 0.0
        text = f"{self.stage}: {self.done}/{self.total} {self.unit}, {rate:.0f}/s, {left:.0f} s left"
        say(f"{text}, {note}" if note else text)


def say(line: str) -> None:
    """Print a line to standard error without breaking a progress bar.

    Errors such as a closed pipe or a full disk are ignored, so that they do not stop the work.
    """
    with suppress(OSError):
        tqdm.write(line, file=sys.stderr)

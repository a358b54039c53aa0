"""Progress of long-running stages: a bar on a terminal, periodic lines elsewhere."""

import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple, Self

from tqdm import tqdm

from diffusion.errors import without_secrets

SECONDS_BETWEEN_LINES = 5.0
SECONDS_BETWEEN_REMINDERS = 10.0
_LINE = re.compile(
    r"(?P<stage>[\w-]+): (?P<done>\d+)/(?P<total>\d+) (?P<unit>\w+)"
    r"(?:, (?P<rate>[\d.]+)/s, (?P<left>\d+) s left)?(?:, (?P<note>.+))?$"
)


class Done(NamedTuple):
    """The progress reported by a line."""

    stage: str
    done: int
    total: int
    unit: str
    rate: float | None = None
    """Units per second; None before the first one, as is `seconds_left`."""
    seconds_left: int | None = None
    note: str = ""


def parse(line: str) -> Done | None:
    """The progress that a line of a stage's output reports; None for any other line."""
    if not (match := _LINE.match(line)):
        return None
    rate, left = match["rate"], match["left"]
    return Done(
        match["stage"],
        int(match["done"]),
        int(match["total"]),
        match["unit"],
        float(rate) if rate else None,
        int(left) if left else None,
        match["note"] or "",
    )


class Progress:
    """Reports progress; a context manager.

    Shows a tqdm bar on a terminal. Elsewhere it prints lines that `parse` understands:
    `train: 640/128000 images, 812/s, 157 s left, loss 0.0712`.
    """

    def __init__(self, stage: str, total: int, unit: str, done: int = 0) -> None:
        self.stage, self.total, self.unit, self.done = stage, total, unit, done
        self._first, self._note = done, ""
        self._started = self._printed = time.monotonic()
        terminal = sys.stderr.isatty()
        self._bar = tqdm(total=total, initial=done, desc=stage, unit=f" {unit}", smoothing=0.05) if terminal else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
        elif kind is None:
            self._print()

    def advance(self, count: int, note: str = "") -> None:
        """Record that `count` more units are done, with an optional note such as `loss 0.0712`."""
        self.done += count
        self._note = note
        if self._bar is not None:
            self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(count)
        elif time.monotonic() - self._printed >= SECONDS_BETWEEN_LINES:
            self._print()

    def _print(self) -> None:
        self._printed = time.monotonic()
        text = f"{self.stage}: {self.done}/{self.total} {self.unit}"
        if rate := (self.done - self._first) / max(self._printed - self._started, 1e-9):
            text += f", {rate:.{0 if rate >= 10 else 1}f}/s, {(self.total - self.done) / rate:.0f} s left"
        say(f"{text}, {self._note}" if self._note else text)


@contextmanager
def working(text: str) -> Iterator[None]:
    """A block of work without countable units: prints a line at its start and, if it takes long, reminders."""
    say(text)
    started, over = time.monotonic(), threading.Event()

    def remind() -> None:
        while not over.wait(SECONDS_BETWEEN_REMINDERS):
            say(f"{text}, {time.monotonic() - started:.0f} s")

    thread = threading.Thread(target=remind, name="working", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def printable(line: str) -> str:
    """A line without the control characters that a terminal would obey, which names of files may contain."""
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in line)


def say(line: str) -> None:
    """Print a line to standard error without breaking a progress bar, and without passwords in URLs.

    Errors such as a closed pipe or a full disk are ignored, so that they do not stop the work.
    """
    with suppress(OSError):
        tqdm.write(printable(without_secrets(line)), file=sys.stderr)

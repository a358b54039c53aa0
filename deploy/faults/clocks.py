"""A clock that jumps, as libfaketime has it (Debian's package `faketime`)."""

import contextlib
import os
import re
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from deploy.faults import two
from deploy.faults.case import Case, Seen, Unavailable
from deploy.faults.clone import OUTPUTS, ROOT, Clone, must, same

DAYS = ("+1d", "-1d", "+0d")
SECONDS = 1.5
"""Between two jumps."""
SLEEP = "import select, time\ntime.sleep = lambda seconds: select.select([], [], [], seconds) and None\n"
"""With libfaketime 0.9.10, Python's own `time.sleep` fails (EINVAL) as soon as the monotonic clock is the real one."""


class Clock:
    """The time of processes that have `settings` in their environment."""

    def __init__(self, file: Path) -> None:
        libraries = sorted(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))
        if not libraries:
            raise Unavailable("libfaketime is not installed: `apt-get install faketime`")
        self._file, self.jumps = file, 0
        (file.parent / "sitecustomize.py").write_text(SLEEP)
        self.settings = {
            "PYTHONPATH": f"{file.parent}{os.pathsep}{ROOT}",
            "LD_PRELOAD": str(libraries[0]),
            "FAKETIME_TIMESTAMP_FILE": str(file),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",  # nor does that clock jump on a real machine
        }
        self.set("+0d")

    def set(self, offset: str) -> None:
        new = self._file.with_suffix(".new")
        new.write_text(f"{offset}\n")
        new.replace(self._file)

    @contextlib.contextmanager
    def jumping(self) -> Iterator[None]:
        """A block in which it jumps every SECONDS seconds: a day ahead, two days back, a day ahead."""
        over = threading.Event()

        def jump() -> None:
            while not over.wait(SECONDS):
                self.set(DAYS[self.jumps % len(DAYS)])
                self.jumps += 1

        thread = threading.Thread(target=jump)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


def jumps(reference: Clone) -> Seen:
    """Run all stages, as the flow does, while the clock jumps."""
    with tempfile.TemporaryDirectory() as folder:
        clock = Clock(Path(folder) / "clock")
        clone = reference.fresh(Path(folder) / "clone")
        day = float(clone.do(sys.executable, "-c", "import time; print(time.time())", **clock.settings))
        clock.set("+1d")
        later = float(clone.do(sys.executable, "-c", "import time; print(time.time())", **clock.settings))
        must("the clock jumps", 86_000 < later - day < 87_000)
        with clock.jumping():
            said = clone.do(sys.executable, "-m", "flows.train_ddpm", "--name", "jumping", **clock.settings)
            listed = clone.do(sys.executable, "-m", "flows", "runs", **clock.settings)
        run = Clone(clone.path / ".ddpm/runs/jumping")
        summary = (run.path / "summary.json").read_text()
        negative = re.findall(r"-\d[\d.]* (?:s|min|h)\b", said + listed) + re.findall(r'"seconds": -', summary)
        must(f"no duration is negative: {negative}", not negative)
        must("the run is listed as completed", "completed" in listed, listed)
        same("the results", run.digests(*OUTPUTS), reference.digests(*OUTPUTS))
    return Seen(
        clock.jumps,
        "nothing: the run completes, no duration is negative, and all results have the same bytes",
    )


def locked(reference: Clone) -> Seen:
    """`ddpm train` twice in one working tree, while the clock jumps."""
    with tempfile.TemporaryDirectory() as folder:
        clock = Clock(Path(folder) / "clock")
        with clock.jumping():
            seen = two.trainings(reference, **clock.settings)
    return seen._replace(times=clock.jumps)


CASES = {
    "clock": Case(
        "The clock jumps by a day, ahead and back, every 1.5 s during a run of all stages (libfaketime)", jumps
    ),
    "clock-lock": Case("The clock jumps likewise while `ddpm train` runs twice in one working tree", locked),
}

"""Running one stage as a child process: its output line by line, its outcome, and stopping it early."""

import math
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Literal

from diffusion.errors import without_secrets
from flows import dvc_output, dvc_yaml
from flows.parent import SECONDS_TO_STOP, STOP_WITH

Outcome = Literal["cached", "run"]

_CACHED = re.compile(r"Stage '\S+' (didn't change, skipping|is cached - skipping run)")
_ADVICE = re.compile(
    r"> |(Generating|Updating) lock file|To track the changes|\s*git add |To enable auto staging|\s*dvc config core\."
    r"|Use `dvc push`"
)
"""DVC's remarks on its files and advice on git and remotes, which do not apply to a run's workspace, a copy."""
_DVC = re.compile(rf"{_ADVICE.pattern}|Running stage '|ERROR: |Having any troubles\?")
_TRACEBACK_END = re.compile(r"[\w.]+(Error|Exception|Interrupt|Exit)\b")
_PASSING = re.compile(
    r"[Uu]nable to acquire (the |file )?lock|is busy, it is being blocked by|Temporary failure in name resolution"
    r"|ConnectionError|Connection (refused|reset|aborted|timed out)|RemoteDisconnected|ConnectTimeout|ReadTimeout"
    r"|Could not connect to the endpoint"
)


class StageError(Exception):
    """A stage failed; the message is the last error line of its output."""


class PassingStageError(StageError):
    """A transient error, worth retrying: a busy lock, a lost connection."""


def run(
    stage: str,
    workspace: Path,
    on_line: Callable[[str], None],
    settings: Mapping[str, str] | None = None,
    check: Callable[[], None] = lambda: None,
) -> Outcome:
    """Bring one stage up to date in a workspace, as `dvc repro --single-item` does.

    Every line of output but DVC's advice goes to `on_line` as it is written; `check` is called at least once a second.
    An exception that interrupts the wait (from a signal, from either of them) stops the stage's processes and is raised
    again; if this process is killed, they stop by themselves (see flows/parent.py).
    `settings` are environment variables for the stage.

    Raises: StageError, or PassingStageError if retrying may help.
    """
    check()
    python = Path(sys.executable)
    environment = os.environ | {
        "PATH": f"{python.parent}{os.pathsep}{os.environ.get('PATH', '')}",  # DVC runs plain `python`
        "PYTHONUNBUFFERED": "1",
        "DVC_NO_ANALYTICS": "true",
        STOP_WITH: "stdin",
        **(settings or {}),
    }
    command = [str(python), "-m", "flows.repro", "--single-item", dvc_yaml.target(stage)]
    process = subprocess.Popen(
        command,
        cwd=workspace,
        env=environment,
        stdin=subprocess.PIPE,  # never written to; closing it signals that this process has exited
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    recent: deque[str] = deque(maxlen=200)
    cached = False
    try:
        for line in _lines(process, check=check):
            recent.append(line)
            cached = cached or _CACHED.match(line) is not None
            if line.strip() and not _ADVICE.match(line):
                on_line(line)
        if process.wait() == 0:
            return "cached" if cached else "run"
    except BaseException:
        _stop(process, on_line)
        raise
    finally:
        for pipe in (process.stdin, process.stdout):
            if pipe:
                pipe.close()
    message = last_error(list(recent)) or f"{stage}: dvc exited with status {process.returncode}"
    raise (PassingStageError if passes_by_itself(message) else StageError)(message)


def last_error(lines: list[str]) -> str:
    """The line that says why a stage failed: `ddpm STAGE: error: ...`, the end of a traceback, or DVC's own error."""
    own = [line for line in lines if line.strip() and not _DVC.match(line)]
    for pattern in (re.compile(r"ddpm [\w-]+: error: "), _TRACEBACK_END):
        if found := [line for line in own if pattern.match(line)]:
            return found[-1]
    dvc = dvc_output.reason("\n".join(lines))
    of_stage = "failed to run: " in dvc or not any(line.startswith("ERROR: ") for line in lines)
    return own[-1] if own and of_stage else dvc


def passes_by_itself(message: str) -> bool:
    """Whether an error is transient: a busy DVC lock, a lost connection. Nothing else is retried."""
    return _PASSING.search(message) is not None


def _lines(
    process: subprocess.Popen[bytes], deadline: float = math.inf, check: Callable[[], None] = lambda: None
) -> Iterator[str]:
    """Lines as they are written, without passwords in URLs, until all processes of the stage are gone, or the deadline.

    A carriage return ends a line too. Unlike a process id, the end of the pipe also covers children that outlive
    their parent.
    """
    assert process.stdout
    descriptor, rest = process.stdout.fileno(), b""
    while True:
        check()
        if not select.select([descriptor], [], [], max(0.0, min(1.0, deadline - time.monotonic())))[0]:
            if time.monotonic() >= deadline:
                return
            continue
        chunk = os.read(descriptor, 65536)
        *complete, rest = re.split(rb"\r\n|\r|\n", rest + chunk)
        if not chunk and rest:
            complete.append(rest)
        for line in complete:
            if line:
                yield without_secrets(line.decode(errors="replace"))
        if not chunk:
            return


def _stop(process: subprocess.Popen[bytes], on_line: Callable[[str], None]) -> None:
    """Stop the stage's process group: SIGTERM, and SIGKILL after SECONDS_TO_STOP."""
    deadline = time.monotonic() + SECONDS_TO_STOP
    _signal(process, signal.SIGTERM)
    try:
        for line in _lines(process, deadline):
            with suppress(Exception):  # the checkpoint matters more than the line
                on_line(line)
    finally:
        _signal(process, signal.SIGKILL)
        process.wait()


def _signal(process: subprocess.Popen[bytes], number: int) -> None:
    if process.returncode is None:  # not reaped yet, so the group's id cannot belong to another one
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)

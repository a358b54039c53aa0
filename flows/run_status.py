"""The state of a flow run and of its stages, as Prefect's events and the lines of its log report it."""

import ast
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from typing import NamedTuple

from diffusion import progress
from diffusion.progress import Done

STATES = {
    "SCHEDULED": "waiting",
    "PENDING": "waiting",
    "RUNNING": "running",
    "COMPLETED": "done",
    "FAILED": "failed",
    "CANCELLING": "cancelling",
    "CANCELLED": "cancelled",
    "CRASHED": "crashed",
}
"""What a stage's row says for each type of Prefect's states."""
_KNOWN = re.compile(r"Finished in state |Running stage |Stage '")
"""Lines that repeat the state."""
_FINISHED = re.compile(r"Finished in state \w+\((?P<message>.*)\)$", re.DOTALL)
_STAGE = re.compile(r"(?P<stage>[\w-]+): (?P<text>.+)")
WARNING = 30
"""`logging.WARNING`, from which on a log line counts as a warning."""


class Row(NamedTuple):
    """One line of the display."""

    name: str
    state: str
    seconds: float | None
    """How long it has been running, or ran; None before it started."""
    detail: str
    """Its progress, what it is doing, or its result."""
    share: float | None = None
    """How much of the present part of a running stage is done, 0 to 1."""


@dataclass
class Step:
    """The run, or one of its stages."""

    name: str
    state: str = "waiting"
    started: datetime | None = None
    changed: datetime | None = None
    line: str = ""
    """The newest line of its log, without the name, that reports no progress."""
    done: Done | None = None
    """The progress that a still newer line reports."""
    last_line: str = ""
    """The newest line of either kind."""

    def enter(self, state: str, at: datetime, message: str = "") -> bool:
        """Enter a state; returns whether it is new. Events older than the last one are ignored."""
        if self.changed and at < self.changed:
            return False
        before, self.state, self.changed = self.state, state, at
        if state == "running" and before != "running":
            self.started = at
        if state in ("failed", "crashed") and message:
            self.line = message
        if state != "running":
            self.done = None
        return state != before

    def row(self, now: datetime) -> Row:
        end = now if self.state == "running" else self.changed
        seconds = (end - self.started).total_seconds() if self.started and end else None
        if self.state == "cached":
            return Row(self.name, self.state, seconds, "")
        if self.done is None:
            return Row(self.name, self.state, seconds, self.line)
        return Row(self.name, self.state, seconds, describe(self.done), self.done.done / max(self.done.total, 1))


@dataclass
class RunStatus:
    """The state of a flow run and its stages, updated by events and log lines."""

    stages: Mapping[str, Step]
    run: Step
    _tasks: dict[str, str] = field(default_factory=dict)
    """Stage of each task run."""
    _shown: list[str] = field(default_factory=list)
    """Warnings and errors already returned."""

    @classmethod
    def of(cls, name: str, stages: Sequence[str]) -> "RunStatus":
        return cls({stage: Step(stage) for stage in stages}, Step(name, "scheduled"))

    def task(self, task_run: str, name: str, state: tuple[str, str], at: datetime, message: str = "") -> Step | None:
        """Record the state (type, name) of the task run `name`; returns the stage if its row changes."""
        stage = self.stages.get(name.rpartition("-")[0])
        if stage is None:
            return None
        self._tasks[task_run] = stage.name
        kind, own_name = state
        new_state = {"Cached": "cached", "AwaitingRetry": "retrying"}.get(own_name, STATES.get(kind, own_name.lower()))
        return stage if stage.enter(new_state, at, message) else None

    def flow(self, state: tuple[str, str], at: datetime, message: str = "") -> bool:
        """Record the state (type, name) of the flow run; returns whether it is new."""
        kind, own_name = state
        words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", own_name).lower()  # AwaitingConcurrencySlot
        new_state = {"RUNNING": "running", "COMPLETED": "done"}.get(kind, words)
        if kind in ("COMPLETED", "FAILED", "CANCELLED", "CRASHED"):
            self.run.line = self.run.last_line = ""
        changed = self.run.enter(new_state, at, message)
        if kind in ("COMPLETED", "FAILED", "CANCELLED", "CRASHED"):
            for stage in self.stages.values():
                if stage.state in ("running", "retrying"):  # ended with the run, without an event of its own
                    stage.enter(new_state, at)
        return changed

    def log(self, task_run: str | None, level: int, message: str, at: datetime) -> str | None:
        """Record a log line; returns the text to show if it is a warning or error."""
        stage = self.stages.get(self._tasks.get(task_run or "", "")) or self._named(message)
        if stage and stage.state == "waiting":
            stage.enter("running", at)  # its event was missed, or comes later
        for line in message.splitlines():
            if line.strip() and not _KNOWN.match(line):
                self._take(stage, line)
        if level < WARNING and ": error:" not in message:
            return None
        if finished := _FINISHED.match(message):
            with suppress(ValueError, SyntaxError):
                message = str(ast.literal_eval(finished["message"]))
        return self.once(message)

    def once(self, message: str) -> str | None:
        """Return a warning or error unless it was shown before: Prefect reports failures for the task and the run."""
        if any(shown.endswith(message) for shown in self._shown):
            return None
        self._shown.append(message)
        return message

    def forget_messages(self) -> None:
        """Forget which warnings and errors were shown, so that `once` returns them again."""
        self._shown.clear()

    def active(self) -> Step | None:
        """The stage that is running."""
        return next((stage for stage in self.stages.values() if stage.state == "running"), None)

    def rows(self, now: datetime) -> list[Row]:
        """The run's row, and one for each stage."""
        run = self.run.row(now)
        if self.active():
            run = run._replace(detail="")  # of the time before the stages
        return [run, *(stage.row(now) for stage in self.stages.values())]

    def _named(self, message: str) -> Step | None:
        """The stage that a line names; the task run's own event may come later than its first lines."""
        match = _STAGE.match(message)
        return self.stages.get(match["stage"]) if match else None

    def _take(self, stage: Step | None, line: str) -> None:
        if stage is None:
            self.run.line = self.run.last_line = line
            return
        stage.done = progress.parse(line) if stage.state == "running" else None
        match = _STAGE.match(line)
        if match is None or match["stage"] == stage.name:
            stage.last_line = match["text"] if match else line
            stage.line = stage.line if stage.done else stage.last_line


def describe(done: Done) -> str:
    """Progress in words: rate, remaining time and note."""
    parts = [f"{100 * done.done / max(done.total, 1):3.0f} %"]
    if done.rate is not None and done.seconds_left is not None:
        parts += [f"{done.rate:.10g} {done.unit}/s", f"{clock(done.seconds_left)} left"]
    return "  ".join([*parts, done.note] if done.note else parts)


def clock(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    minutes, rest = divmod(max(0, int(seconds)), 60)  # negative if the clocks of server and client differ
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"

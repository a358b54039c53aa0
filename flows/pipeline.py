"""The stages of a flow in order, in a workspace of their own; the same with and without Prefect."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusion.errors import UserError, counted
from flows import software, summary, workspace
from flows.dvc_stage import Outcome
from flows.environment import PUSH, setting
from flows.stages import STAGES, STUDENT_STAGES

Log = Callable[[str], object]


@dataclass(frozen=True)
class Run:
    """Identity of a run."""

    name: str
    """Its workspace has the same."""
    id: str
    """Unique."""
    page: str = ""
    """Address of the run in Prefect's UI, empty without a server."""


@dataclass(frozen=True)
class Plan:
    """What a run does."""

    parameters: Any
    """What `workspace.document` or `teacher.document` gave."""
    teacher: Path | None = None
    """The workspace of the run whose model is distilled; None to train one."""
    sweep: str = ""
    """Name of the sweep whose trial this is, if any."""

    @property
    def stages(self) -> list[str]:
        return list(STUDENT_STAGES if self.teacher else STAGES)


class Watch:
    """Watches the stages of a run, and may stop them by raising an exception; this one lets them run."""

    def turn(self, stage: str) -> AbstractContextManager[object]:  # noqa: ARG002
        """A context in which a stage runs."""
        return nullcontext()

    def line(self, line: str) -> None:
        """Take a line of a stage's output."""

    def check(self) -> None:
        """Called at least once a second while a stage runs."""


UNWATCHED = Watch()


def run(
    which: Run,
    plan: Plan,
    stage: Callable[[str, Path], Outcome],
    report: Callable[[Path, summary.Summary], object],
    log: Log,
    warn: Log,
) -> summary.Summary:
    """Run every stage that is not up to date, record the results in MLflow, and write the run's summary.

    Args:
        which: the run.
        plan: its parameters, and the teacher if it distils one.
        stage: brings one stage up to date, given its name and the workspace.
        report: shows the summary, given the workspace too.
        log: takes lines of output.
        warn: takes problems that do not make the run fail.
    """
    shared = setting(PUSH, False, bool)
    if shared and (others := software.differences(Path("requirements.lock"))):
        rest = f", and {counted(len(others) - 3, 'other')}" if len(others) > 3 else ""
        warn(f"this worker's packages differ from those of the deployed commit: {'; '.join(others[:3])}{rest}")
    with workspace.use(which.name, which.id, plan.parameters, plan.teacher, plan.sweep) as directory:
        log(f"workspace {directory}")
        done = []
        for each in plan.stages:
            started = time.monotonic()
            outcome = stage(each, directory)
            done.append(summary.StageSummary(each, round(time.monotonic() - started, 1), outcome))
        log("recording the results in MLflow")
        tracked = _track(directory, plan.teacher is not None, log, warn)
        if shared:
            _push(directory, warn)
        result = summary.collect(directory, which.page, done, tracked, plan.teacher)
        summary.write(directory, result)
        report(directory, result)
    return result


def _track(directory: Path, student: bool, log: Log, warn: Log) -> dict[str, Any] | None:
    """Record the results in MLflow (`ddpm track`); the run succeeds without it."""
    command = [sys.executable, "-m", "flows", "track", "--json", *(["--student"] if student else [])]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, cwd=directory, stdout=pipe, stderr=pipe, text=True, stdin=subprocess.DEVNULL
    ) as process:
        try:
            out, errors = process.communicate()
        except BaseException:
            process.terminate()  # it marks the MLflow run as stopped, which SIGKILL would prevent
            process.wait()
            raise
    for line in errors.splitlines():
        log(line)
    if process.returncode:
        reason = ([line for line in errors.splitlines() if line.strip()] or ["no message"])[-1]
        warn(f"not in MLflow ({reason}); `ddpm track {directory.name}` records it later")
        return None
    tracked: dict[str, Any] = json.loads(out.splitlines()[-1])
    return tracked


def _push(directory: Path, warn: Log) -> None:
    """Push what the stages could not push (see dvc_remote.py); the run succeeds without it."""
    try:
        workspace.dvc(directory, "push")
    except UserError as error:
        warn(f"not pushed ({error}); the results are in {directory} alone: run `dvc push --run-cache` there")

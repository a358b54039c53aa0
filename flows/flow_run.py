"""What the flows share: a task for each stage, how a run ends in Prefect, and the same without Prefect's server."""

import argparse
import json
import logging
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import httpx
from prefect import get_run_logger, runtime, task
from prefect.artifacts import create_markdown_artifact, create_progress_artifact, update_progress_artifact
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import State, TaskRun
from prefect.concurrency.sync import concurrency
from prefect.exceptions import FailedRun, ObjectNotFound, PrefectException, TerminationSignal
from prefect.states import Cancelled, Completed, Failed
from prefect.tasks import Task, exponential_backoff
from prefect.utilities.urls import url_for

from diffusion import progress
from diffusion.errors import SystemFault, UserError
from flows import dvc_stage, pipeline, report, summary, workspace
from flows.dvc_stage import Outcome
from flows.parameters import given
from flows.pipeline import Plan
from flows.remedies import with_remedy
from flows.stages import STAGES, STUDENT_STAGES
from flows.workers import SCHEDULER
from flows.workspace import StoppedEarly

GPU_LIMIT = "gpu"
"""Global concurrency limit in which training occupies a slot, if the limit exists."""
TRAININGS = {"train": "train-ddpm-progress", "distill": "distill-ddpm-progress"}
"""The stages that train, and the keys of the artifacts that show their progress."""
PRUNED = "Pruned"
"""State of trials that a sweep stopped early, and of their tasks."""


def run_stage(
    stage: str, workspace: Path, scheduler: str | None = None, watch: pipeline.Watch = pipeline.UNWATCHED
) -> State[Outcome]:
    """The body of all tasks: runs one stage, with this Dask scheduler if any, and logs its output."""
    log = get_run_logger()
    show_progress = ProgressArtifact(TRAININGS.get(stage, ""))
    warned = False

    def on_line(line: str) -> None:
        nonlocal warned
        try:
            log.info(line)
            if stage in TRAININGS and (done := progress.parse(line)):
                show_progress(100 * done.done / done.total)
        except Exception as error:  # of Prefect's server, which may soon be back
            if not warned:
                warned = True
                log.warning("Prefect cannot show the progress (%s); the stage continues", error)
        watch.line(line)

    try:
        with concurrency(GPU_LIMIT) if stage in TRAININGS and limit_exists(GPU_LIMIT) else nullcontext():
            settings = {SCHEDULER: str(scheduler)} if scheduler else None
            outcome = dvc_stage.run(stage, workspace, on_line, settings, watch.check)
    except dvc_stage.StageError as error:
        return Failed(message=str(error), data=error)  # raised, it would be logged with a traceback
    except StoppedEarly as error:
        return Cancelled(name=PRUNED, message=str(error))
    except TerminationSignal:
        if not cancelling():
            raise
        return Cancelled(message="The flow run was cancelled.")  # raised, the task run would count as crashed
    return Completed(name="Cached" if outcome == "cached" else None, message=outcome, data=outcome)


class ProgressArtifact:
    """An artifact that shows the progress of training, created at the first call."""

    def __init__(self, key: str) -> None:
        self._key = key
        self._id: UUID | None = None

    def __call__(self, percent: float) -> None:
        if self._id is None:
            self._id = create_progress_artifact(  # type: ignore[assignment] # a coroutine only in async code
                percent, key=self._key, description="Images trained on"
            )
        else:
            update_progress_artifact(self._id, percent)


def limit_exists(name: str) -> bool:
    """Whether the server has a global concurrency limit of this name (using one that it lacks logs a warning)."""
    with get_client(sync_client=True) as client:
        try:
            client.read_global_concurrency_limit_by_name(name)
        except ObjectNotFound:
            return False
    return True


def cancelling() -> bool:
    """Whether the flow run, or the one that it is part of, is being cancelled, rather than just its process stopped."""
    try:
        with get_client(sync_client=True) as client:
            ids = {runtime.flow_run.id, runtime.flow_run.root_flow_run_id}
            states = [client.read_flow_run(UUID(each)).state for each in ids]
    except (httpx.HTTPError, PrefectException):
        return False
    return any(state and (state.is_cancelling() or state.is_cancelled()) for state in states)


def worth_retrying(task: Task[Any, Any], run: TaskRun, state: State[Any]) -> bool:  # noqa: ARG001 (Prefect passes them)
    """Only transient errors are retried; a deterministic failure fails at once."""
    return isinstance(state.result(raise_on_failure=False), dvc_stage.PassingStageError | httpx.TransportError)


TASKS = {
    name: task(
        name=name,
        description=text,
        cache_policy=NO_CACHE,  # DVC alone decides what is up to date
        retries=3,
        retry_delay_seconds=exponential_backoff(backoff_factor=5),
        retry_jitter_factor=0.5,
        retry_condition_fn=worth_retrying,
    )(run_stage)
    for name, text in (STAGES | STUDENT_STAGES).items()
}


def run(
    plan_for: Callable[[], Plan], scheduler: str | None = None, watch: pipeline.Watch = pipeline.UNWATCHED
) -> State[Any]:
    """The body of a flow: runs the stages of a plan, and returns the state in which the flow run ends.

    The result of a completed one is its summary.

    Args:
        plan_for: makes the plan; raises UserError if a parameter is wrong.
        scheduler: address of a Dask scheduler for the stages.
        watch: watches the stages.
    """
    log = get_run_logger()

    def stage(name: str, directory: Path) -> Outcome:
        # A task that returns a State gives that State.
        with watch.turn(name):
            state = TASKS[name](name, directory, scheduler, watch)
        if state.name == PRUNED:
            raise StoppedEarly(state.message)
        if state.is_cancelled():
            raise TerminationSignal(signal.SIGTERM)  # as the task was interrupted, so is the flow
        return state.result()

    run_id = str(runtime.flow_run.id)
    which = pipeline.Run(runtime.flow_run.name, run_id, url_for("flow-run", run_id) or "")
    try:
        result = pipeline.run(which, plan_for(), stage, show_report, log.info, log.warning)
    except StoppedEarly as error:
        return Cancelled(name=PRUNED, message=str(error))
    except (UserError, dvc_stage.StageError, OSError) as error:
        logging.getLogger("prefect.flow_runs").addFilter(is_news)
        return Failed(message=reason(error))  # raised, it would be logged with a traceback
    ran = [stage.stage for stage in result.stages if stage.outcome == "run"]
    return Completed(message=f"ran {', '.join(ran)}" if ran else "all cached", data=result)


def reason(error: Exception) -> str:
    """Why a run failed, in one line, with advice."""
    return with_remedy(SystemFault.of(error) if isinstance(error, OSError) else error)


def is_news(record: logging.LogRecord) -> bool:
    """False for Prefect's traceback of a Failed state, whose message it has logged already."""
    return not (record.exc_info and isinstance(record.exc_info[1], FailedRun))


def show_report(directory: Path, result: summary.Summary) -> None:
    """Publish the report of a run as an artifact, compared with the run of the same flow before it."""
    before = workspace.newest("completed", other_than=directory, distilled=bool(result.teacher))
    last = None
    if before:
        with suppress(FileNotFoundError):  # removed meanwhile
            last = summary.read(before)
    key = "distill-ddpm-report" if result.teacher else "train-ddpm-report"
    create_markdown_artifact(report.markdown(directory, result, last), key=key, description=f"Results of {result.run}")


def local(
    flow: str,
    option: str,
    description: str,
    plan_for: Callable[[Any, Mapping[str, Any]], Plan],
    argv: Sequence[str] | None,
) -> int:
    """The command line of a flow that runs its stages without Prefect's server; returns the exit status.

    Args:
        flow: name of the flow.
        option: the parameter that has an option of its own, `--option`, and is not a section.
        description: of that parameter.
        plan_for: makes the plan from the value of this parameter and the other ones.
        argv: the arguments, by default those of the process.
    """
    parser = command_line(flow, "as -p seed=1 or -p sample='{\"count\": 9}'")
    parser.add_argument(f"--{option}", dest="option", help=description)
    parser.add_argument("--name", default=f"local-{datetime.now(UTC):%Y%m%d-%H%M%S}", help="name of the run")
    arguments = parser.parse_args(argv)
    stop_on_sigterm()
    try:
        changes = given(parameters(arguments.param))
        if arguments.option is not None and option in changes:
            raise UserError(f"{option}: given by --{option} and by -p; give it once")
        plan = plan_for(changes.pop(option, arguments.option), changes)

        def log(line: str) -> None:
            print(line, flush=True)

        def stage(name: str, directory: Path) -> Outcome:
            return dvc_stage.run(name, directory, log)

        def nothing(*_: object) -> None: ...

        result = pipeline.run(pipeline.Run(arguments.name, str(uuid4())), plan, stage, nothing, log, log)
    except (UserError, dvc_stage.StageError, OSError) as error:
        print(f"{flow}: error: {reason(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    summary.show(result.run)
    return 0


def command_line(flow: str, example: str) -> argparse.ArgumentParser:
    """The parser of `python -m flows.FLOW`, with the option -p, of which `example` shows the use."""
    parser = argparse.ArgumentParser(
        prog=f"python -m flows.{flow.replace('-', '_')}",
        description="Run the stages as the flow does, without Prefect's server.",
    )
    parser.add_argument("-p", "--param", action="append", default=[], metavar="NAME=JSON", help=example)
    return parser


def stop_on_sigterm() -> None:
    """Let SIGTERM interrupt the wait for a stage, which stops the stage, as Prefect does for its flows."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))


def parameters(texts: Sequence[str]) -> dict[str, Any]:
    """NAME=JSON, as on Prefect's command line: anything that is not JSON is text."""
    values: dict[str, Any] = {}
    for text in texts:
        name, _, value = text.partition("=")
        if name in values:
            raise UserError(f"parameter {name!r}: given twice; combine them into one")
        try:
            values[name] = json.loads(value)
        except (ValueError, RecursionError):
            values[name] = value
    return values

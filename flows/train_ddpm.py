"""The flow `train-ddpm`: typed parameters, a task per stage, artifacts.

`python -m flows.train_ddpm` runs the same without a Prefect server.
"""

import argparse
import json
import logging
import signal
import sys
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any
from uuid import UUID, uuid4

import httpx
from prefect import flow, get_run_logger, runtime, task
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
from diffusion.nn.build import Device
from diffusion.sections import NonNegative
from flows import dvc_stage, pipeline, report, summary, workspace
from flows.dvc_stage import Outcome
from flows.parameters import NOTHING, Part, PartOf, Preset, described, given
from flows.remedies import with_remedy
from flows.stages import STAGES
from flows.workers import SCHEDULER

GPU_LIMIT = "gpu"
"""Global concurrency limit in which training occupies a slot, if the limit exists."""


def run_stage(stage: str, workspace: Path, scheduler: str | None = None) -> State[Outcome]:
    """The body of all five tasks: runs one stage, with this Dask scheduler if any, and logs its output."""
    log = get_run_logger()
    show_progress = ProgressArtifact()
    warned = False

    def on_line(line: str) -> None:
        nonlocal warned
        try:
            log.info(line)
            if stage == "train" and (done := progress.parse(line)):
                show_progress(100 * done.done / done.total)
        except Exception as error:  # of Prefect's server, which may soon be back
            if not warned:
                warned = True
                log.warning("Prefect cannot show the progress (%s); the stage continues", error)

    try:
        with concurrency(GPU_LIMIT) if stage == "train" and limit_exists(GPU_LIMIT) else nullcontext():
            outcome = dvc_stage.run(stage, workspace, on_line, {SCHEDULER: str(scheduler)} if scheduler else None)
    except dvc_stage.StageError as error:
        return Failed(message=str(error), data=error)  # raised, it would be logged with a traceback
    except TerminationSignal:
        if not cancelling():
            raise
        return Cancelled(message="The flow run was cancelled.")  # raised, the task run would count as crashed
    return Completed(name="Cached" if outcome == "cached" else None, message=outcome, data=outcome)


class ProgressArtifact:
    """An artifact that shows the progress of training, created at the first call."""

    def __init__(self) -> None:
        self._id: UUID | None = None

    def __call__(self, percent: float) -> None:
        if self._id is None:
            self._id = create_progress_artifact(  # type: ignore[assignment] # a coroutine only in async code
                percent, key="train-ddpm-progress", description="Images trained on"
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
    """Whether the flow run is being cancelled, rather than just its process stopped."""
    try:
        with get_client(sync_client=True) as client:
            state = client.read_flow_run(UUID(runtime.flow_run.id)).state
    except (httpx.HTTPError, PrefectException):
        return False
    return state is not None and (state.is_cancelling() or state.is_cancelled())


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
    for name, text in STAGES.items()
}


# Prefect would report one wrong parameter at a time and accept "10" for 10; `workspace.document` checks them all.
@flow(name="train-ddpm", validate_parameters=False)
@described
def train_ddpm(
    preset: Preset | None = None,
    seed: NonNegative | None = None,
    device: Device | None = None,
    shard: Annotated[Part, PartOf("shard")] = NOTHING,
    pairs: Annotated[Part, PartOf("pairs")] = NOTHING,
    process: Annotated[Part, PartOf("process")] = NOTHING,
    network: Annotated[Part, PartOf("network")] = NOTHING,
    train: Annotated[Part, PartOf("train")] = NOTHING,
    sample: Annotated[Part, PartOf("sample")] = NOTHING,
    evaluate: Annotated[Part, PartOf("evaluate")] = NOTHING,
    export: Annotated[Part, PartOf("export")] = NOTHING,
    tracking: Annotated[Part, PartOf("tracking")] = NOTHING,
    dask_scheduler: str | None = None,
) -> State[Any]:
    """Train a denoising diffusion model and export it: shard, pairs, train, evaluate, export.

    Anything left out is taken from params.yaml.

    Args:
        preset: Preset to use (a file in presets/). It replaces all parameters but seed, device, tracking and, unless
            the preset sets it, shard.source.
        seed: {seed}
        device: {device}
        shard: {shard}
        pairs: {pairs}
        process: {process}
        network: {network}
        train: {train}
        sample: {sample}
        evaluate: {evaluate}
        export: {export}
        tracking: {tracking}
        dask_scheduler: Address of a Dask scheduler whose workers do the work of shard and pairs, such as
            tcp://10.0.0.1:8786. The results do not depend on it.
    """
    changes = given({name: value for name, value in locals().items() if name not in ("preset", "dask_scheduler")})
    log = get_run_logger()

    def stage(name: str, directory: Path) -> Outcome:
        # A task that returns a State gives that State.
        state = TASKS[name](name, directory, dask_scheduler)
        if state.is_cancelled():
            raise TerminationSignal(signal.SIGTERM)  # as the task was interrupted, so is the flow
        return state.result()

    run_id = str(runtime.flow_run.id)
    run = pipeline.Run(runtime.flow_run.name, run_id, url_for("flow-run", run_id) or "")
    try:
        parameters = workspace.document(preset, changes)
        result = pipeline.run(run, parameters, stage, show_report, log.info, log.warning)
    except (UserError, dvc_stage.StageError, OSError) as error:
        message = with_remedy(SystemFault.of(error) if isinstance(error, OSError) else error)
        logging.getLogger("prefect.flow_runs").addFilter(is_news)
        return Failed(message=message)  # raised, it would be logged with a traceback
    ran = [stage.stage for stage in result.stages if stage.outcome == "run"]
    return Completed(message=f"ran {', '.join(ran)}" if ran else "all cached")


def is_news(record: logging.LogRecord) -> bool:
    """False for Prefect's traceback of a Failed state, whose message it has logged already."""
    return not (record.exc_info and isinstance(record.exc_info[1], FailedRun))


def show_report(directory: Path, result: summary.Summary) -> None:
    """Publish the report of a run as an artifact, compared with the run before it."""
    before = workspace.newest("completed", other_than=directory)
    last = None
    if before:
        with suppress(FileNotFoundError):  # removed meanwhile
            last = summary.read(before)
    create_markdown_artifact(
        report.markdown(directory, result, last), key="train-ddpm-report", description=f"Results of {result.run}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stages as the flow does, without Prefect's server."""
    parser = argparse.ArgumentParser(prog="python -m flows.train_ddpm", description=main.__doc__)
    parser.add_argument("--preset", help=f"one of: {', '.join(Preset)}")
    parser.add_argument(
        "-p", "--param", action="append", default=[], metavar="NAME=JSON", help="as -p train='{\"steps\": 500}'"
    )
    parser.add_argument("--name", default=f"local-{datetime.now(UTC):%Y%m%d-%H%M%S}", help="name of the run")
    arguments = parser.parse_args(argv)
    # As Prefect does for its flows: interrupts the wait for a stage, which stops the stage.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        changes = given(_parameters(arguments.param))
        if arguments.preset and "preset" in changes:
            raise UserError("preset: given by --preset and by -p; give it once")
        parameters = workspace.document(changes.pop("preset", arguments.preset), changes)

        def log(line: str) -> None:
            print(line, flush=True)

        def stage(name: str, directory: Path) -> Outcome:
            return dvc_stage.run(name, directory, log)

        def nothing(*_: object) -> None: ...

        result = pipeline.run(pipeline.Run(arguments.name, str(uuid4())), parameters, stage, nothing, log, log)
    except (UserError, dvc_stage.StageError, OSError) as error:
        message = with_remedy(SystemFault.of(error) if isinstance(error, OSError) else error)
        print(f"train-ddpm: error: {message}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    summary.show(result.run)
    return 0


def _parameters(texts: Sequence[str]) -> dict[str, Any]:
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


if __name__ == "__main__":
    sys.exit(main())

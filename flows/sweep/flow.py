"""The body of the flow `sweep-ddpm`, with Prefect and without."""

import hashlib
import json
import logging
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

from prefect import flow, get_run_logger, runtime
from prefect.artifacts import create_markdown_artifact
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import State
from prefect.exceptions import ObjectNotFound
from prefect.states import Completed, Crashed, Failed

from diffusion.errors import UserError
from flows import dvc_stage, flow_run, pipeline, tracking
from flows.dvc_stage import Outcome, StageError
from flows.params import validate
from flows.paths import Paths
from flows.pipeline import Log, Plan, Watch
from flows.summary import Summary
from flows.sweep import options as parameters
from flows.sweep import running, space, study, table
from flows.sweep.options import Options
from flows.sweep.running import RunTrial
from flows.sweep.space import Space
from flows.sweep.study import Result, Trial
from flows.workspace import StoppedEarly


def run(given: dict[str, Any]) -> State[Any]:
    """The body of the flow: runs the trials, and returns the state in which the flow run ends."""
    log = get_run_logger()
    try:
        ended = _sweep(given, _as_subflow, _publish, log.info, log.warning)
    except (UserError, OSError) as error:
        logging.getLogger("prefect.flow_runs").addFilter(flow_run.is_news)
        return Failed(message=flow_run.reason(error))
    if not ended.best:
        logging.getLogger("prefect.flow_runs").addFilter(flow_run.is_news)
        return Failed(message=ended.conclusion)
    return Completed(message=ended.conclusion)


def local(argv: Sequence[str] | None) -> int:
    """The command line that runs a sweep without Prefect's server; returns the exit status."""
    parser = flow_run.command_line("sweep-ddpm", """as -p over='{"train.learning_rate": [0.001, 0.002]}'""")
    arguments = parser.parse_args(argv)
    flow_run.stop_on_sigterm()

    def log(line: str) -> None:
        print(line, flush=True)

    try:
        given = flow_run.parameters(arguments.param)
        ended = _sweep(given, _in_process, lambda *_: None, log, log)
    except (UserError, OSError) as error:
        print(f"sweep-ddpm: error: {flow_run.reason(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    log(f"\n{ended.page}")
    return 0 if ended.best else 1


@dataclass(frozen=True)
class Ended:
    """A sweep of which no trial is left to run."""

    name: str
    options: Options
    results: list[Result]
    """The trials, the best first."""

    @property
    def best(self) -> Result | None:
        """The best trial; None if none completed."""
        return next((each for each in self.results if each.state == "completed"), None)

    @property
    def conclusion(self) -> str:
        """What came out, in one line."""
        return table.conclusion(self.options.objective, self.results, len(self.results))

    @property
    def page(self) -> str:
        """The comparison of the trials."""
        return table.markdown(self.name, self.options.objective, self.results, len(self.results))


def _sweep(
    given: dict[str, Any], run_trial: RunTrial, publish: Callable[[str, str], object], log: Log, warn: Log
) -> Ended:
    """Run a sweep to its end.

    Args:
        given: the flow's parameters.
        run_trial: runs the stages of a trial.
        publish: takes the sweep's name and the comparison of its trials, at the start and after each of them.
        log: takes lines of output.
        warn: takes problems that do not make the sweep fail.
    """
    options = parameters.read(given)
    varied = space.read(options)
    name = options.name or f"sweep-{_digest(options, varied)}"
    with study.opened(name, options, varied) as trials:

        def show() -> None:
            page = table.markdown(name, options.objective, trials.results(), trials.trials)
            try:
                publish(name, page)
            except Exception as error:  # of Prefect's server, which may soon be back
                warn(f"Prefect cannot show the comparison ({error}); the sweep continues")

        log(f"sweep {name}: {table.conclusion(options.objective, trials.results(), trials.trials)}")
        if warning := running.lost_workspaces(trials.trials):
            warn(warning)
        if options.objective == "val_mse" and varied.changes_data:
            warn("over: trials may be measured on different validation pairs, so that their val MSE says little")
        show()
        running.run(trials, options, run_trial, show, log)
        ended = Ended(name, options, trials.results())
    _record(ended, varied, warn)
    return ended


def _digest(options: Options, varied: Space) -> str:
    tries = json.dumps(study.definition(options, varied), sort_keys=True)
    return hashlib.sha256(tries.encode()).hexdigest()[:8]


def _as_subflow(trial: Trial, plan: Plan, watch: Watch) -> Summary:
    """Run a trial as a flow run within this one."""

    @flow(name="train-ddpm", flow_run_name=trial.name, validate_parameters=False)
    def train_ddpm(fields: dict[str, Any]) -> State[Summary]:  # noqa: ARG001 (Prefect shows them)
        trial.begins_in(str(runtime.flow_run.id))
        return flow_run.run(lambda: plan, watch=watch)

    if trial.flow_run_before:
        _end_killed(UUID(trial.flow_run_before))
    state: State[Any] = train_ddpm(trial.values, return_state=True)
    if state.name == flow_run.PRUNED:
        raise StoppedEarly(state.message)
    if not state.is_completed():
        raise StageError(state.message or state.name)
    result: Summary = state.result()
    return result


def _end_killed(flow_run_id: UUID) -> None:
    """Mark the flow run of a trial as crashed if it still counts as running: its process was killed."""
    with get_client(sync_client=True) as client, suppress(ObjectNotFound):
        state = client.read_flow_run(flow_run_id).state
        if state and not state.is_final():
            client.set_flow_run_state(flow_run_id, Crashed(message="The sweep was killed."), force=True)


def _in_process(trial: Trial, plan: Plan, watch: Watch) -> Summary:
    """Run a trial without Prefect."""

    def log(line: str) -> None:
        if not running.HELDOUT.match(line):  # which the watch logs
            print(f"{trial.name}: {line}", flush=True)
        watch.line(line)

    def stage(name: str, directory: Path) -> Outcome:
        with watch.turn(name):
            return dvc_stage.run(name, directory, log, check=watch.check)

    def nothing(*_: object) -> None: ...

    return pipeline.run(pipeline.Run(trial.name, str(uuid4())), plan, stage, nothing, log, log)


def _publish(name: str, text: str) -> None:
    create_markdown_artifact(text, key="sweep-ddpm-report", description=f"Trials of {name}")


def _record(ended: Ended, varied: Space, warn: Log) -> None:
    """Record the sweep in MLflow; it succeeds without it."""
    options = ended.options
    settings = {f"over.{field}": json.dumps(values) for field, values in options.over.items()}
    settings |= {"objective": options.objective, "grid": str(options.trials is None)}
    best = {} if ended.best is None or ended.best.value is None else {options.objective: ended.best.value}
    rows = [
        {"trial": each.name, **each.values, options.objective: each.value, "state": each.state, **_recorded(each)}
        for each in ended.results
    ]
    shared = validate(varied.base, "parameters of the sweep")
    try:
        tracking.record_sweep(shared, Paths(), ended.name, settings, best, rows, f"Sweep: {ended.conclusion}.")
    except UserError as error:
        warn(f"the sweep is not in MLflow ({error}); starting it again records it")


def _recorded(result: Result) -> dict[str, Any]:
    return {fact: result.facts.get(fact) for fact in ("low", "high", "seconds", "mlflow", study.REASON)}

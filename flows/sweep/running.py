"""Running the trials of a sweep, each a run like those of train-ddpm, several at once."""

import hashlib
import json
import math
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from contextvars import copy_context
from typing import Any

from diffusion.errors import UserError, counted
from flows import dvc_yaml, gate, made_with, params, workspace
from flows.flow_run import reason
from flows.params import Params
from flows.pipeline import Log, Plan, Watch
from flows.stages import STAGES
from flows.summary import Summary
from flows.sweep.options import Options
from flows.sweep.study import Study, Trial
from flows.workspace import StoppedEarly

HELDOUT = re.compile(r"train: step (\d+): held-out MSE (\S+) ")

RunTrial = Callable[[Trial, Plan, Watch], Summary]
"""Runs the stages of a trial; raises StoppedEarly if it was pruned, any other exception if it failed."""


class Turns:
    """Lets trials that share a stage, its parameters and those of the stages before it, run it one after the other.

    The first one runs it; the others find its results in DVC's run cache.
    """

    def __init__(self) -> None:
        self._locks: dict[str, threading.Lock] = {}
        self._guard = threading.Lock()
        self.stopped_by: BaseException | None = None
        """What has ended the sweep; its trials end in the same way."""

    def of(self, stage: str, parameters: Params) -> threading.Lock:
        """The lock of a stage with the parameters that determine its results."""
        before = list(STAGES)[: list(STAGES).index(stage) + 1]
        names = {name for each in before for name in dvc_yaml.parameters(each)}
        key = hashlib.sha256(json.dumps([stage, made_with.flat(parameters, *sorted(names))]).encode()).hexdigest()
        with self._guard:
            return self._locks.setdefault(key, threading.Lock())


class TrialWatch(Watch):
    """Makes a trial wait for those that run the same stage, follows its held-out error, and stops it."""

    def __init__(self, trial: Trial, parameters: Params, turns: Turns, prunes: bool, log: Log) -> None:
        self._trial, self._parameters, self._turns, self._prunes, self._log = trial, parameters, turns, prunes, log

    @contextmanager
    def turn(self, stage: str) -> Iterator[None]:
        """Wait for the trials that run this stage with the same parameters."""
        with self._turns.of(stage, self._parameters):
            self.check()
            yield

    def line(self, line: str) -> None:
        """Report the held-out error to the study; raises StoppedEarly if the trial is to be pruned."""
        if not (match := HELDOUT.match(line)):
            return
        step, error = int(match[1]), float(match[2])
        self._log(f"{self._trial.name}: {line}")
        self._trial.report(step, error)
        if self._prunes and self._trial.should_prune():
            raise StoppedEarly(f"held-out MSE {match[2]} at step {step} is above the median of the completed trials")

    def check(self) -> None:
        """Raise what has ended the sweep."""
        if self._turns.stopped_by:
            raise self._turns.stopped_by


def run(study: Study, options: Options, run_trial: RunTrial, shown: Callable[[], object], log: Log) -> None:
    """Run the trials that are left; one that fails does not stop the others.

    Args:
        study: the trials.
        options: those of the sweep.
        run_trial: runs one of them.
        shown: called after each trial.
        log: takes lines of output.
    """
    turns = Turns()
    running: dict[Future[Summary], Trial] = {}

    def begin(trial: Trial) -> Future[Summary]:
        log(f"{trial.name}: {', '.join(f'{name}: {json.dumps(value)}' for name, value in trial.values.items())}")

        def work() -> Summary:
            parameters = study.space.document(trial.values)  # TPE may combine values that exclude each other
            valid = params.validate(parameters, "parameters of the trial")
            watch = TrialWatch(trial, valid, turns, study.prunes, log)
            return run_trial(trial, Plan(parameters, sweep=study.name), watch)

        return pool.submit(copy_context().run, work)

    with ThreadPoolExecutor(options.at_once, thread_name_prefix="trial") as pool:
        try:
            while True:
                while len(running) < options.at_once and (trial := study.next()):
                    running[begin(trial)] = trial
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    _end(study, running.pop(future), future, options.objective, log)
                    shown()
        except BaseException as error:
            turns.stopped_by = error
            raise


def _end(study: Study, trial: Trial, future: Future[Summary], objective: str, log: Log) -> None:
    """Record how a trial has ended."""
    try:
        summary = future.result()
        value = summary.metrics.get(objective)
        if value is None or not math.isfinite(value):
            raise UserError(f"{objective} is {value}")
    except StoppedEarly as stopped:
        study.pruned(trial, str(stopped))
        log(f"{trial.name}: pruned: {stopped}")
    except Exception as error:  # whatever it is, the others go on
        why = (reason(error).splitlines() or [type(error).__name__])[0]
        study.failed(trial, why)
        log(f"{trial.name}: failed: {why}")
    else:
        study.completed(trial, value, _facts(summary, objective))
        log(f"{trial.name}: {gate.FIGURES[objective].title} {value:.4f}")


def _facts(summary: Summary, objective: str) -> Mapping[str, Any]:
    """What the table shows of a completed trial, which may outlive its workspace."""
    ends = {end: summary.metrics.get(f"{objective}_{end}") for end in ("low", "high")}
    seconds = sum(stage.seconds for stage in summary.stages)
    ran = [stage.stage for stage in summary.stages if stage.outcome == "run"]
    return {**ends, "seconds": round(seconds, 1), "ran": ran, "run": summary.run, "mlflow": summary.mlflow}


def lost_workspaces(trials: int) -> str:
    """A warning if the workspaces of some trials will be deleted before the sweep ends; else empty."""
    keep, _ = workspace.retention()
    if trials <= keep:
        return ""
    return (
        f"only the workspaces of the last {counted(keep, 'run')} are kept (DDPM_KEEP_RUNS); figures and cached results "
        "of all trials are"
    )

"""The trials of a sweep, kept in an Optuna study: those that are left are tried when the sweep is started again.

The studies are in .ddpm/sweeps/sweeps.db, or in the database DDPM_SWEEPS names, such as
postgresql://ddpm@server/sweeps. It must be a database of its own: Optuna, MLflow and Prefect each keep the version of
their tables in a table of the same name.

A trial of a sweep is tried in one or several trials of the study: each failure or kill ends one of them, and the next
one has the same attribute `index`.
"""

import hashlib
import json
import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, Literal, NamedTuple

import optuna
from filelock import FileLock, Timeout
from optuna.pruners import MedianPruner
from optuna.samplers import TPESampler
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy import text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import SQLAlchemyError

from diffusion.errors import UserError
from diffusion.storage.files import writing
from flows.environment import setting
from flows.gate import FIGURES
from flows.params import validate
from flows.paths import Paths
from flows.sweep.options import Options
from flows.sweep.space import Space, Values

DATABASE = "DDPM_SWEEPS"
"""Address of the database of the studies, as SQLAlchemy takes it."""
OWN = "sweeps.db"
"""The database if that is not set, in .ddpm/sweeps."""
INDEX, REASON, FLOW_RUN = "index", "reason", "flow_run"
"""Attributes of a study's trial: which trial of the sweep it is, why it ended early, and its flow run in Prefect."""
DEFINITION = "definition"
"""Attribute of a study: what it tries, to tell whether a sweep of the same name is the same."""

State = Literal["running", "completed", "pruned", "failed"]
_STATES: dict[TrialState, State] = {
    TrialState.RUNNING: "running",
    TrialState.COMPLETE: "completed",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
}


class Result(NamedTuple):
    """What has become of a trial of a sweep."""

    name: str
    state: State
    values: Values
    value: float | None
    """The objective; None unless completed."""
    facts: Mapping[str, Any]
    """What was recorded of it."""


class Trial:
    """A trial that is being run."""

    def __init__(self, trial: optuna.Trial, name: str, values: Values, sign: int) -> None:
        self.name, self.values = name, values
        self._trial, self._sign = trial, sign
        self._reported = set[int]()
        self.flow_run_before: str | None = None
        """The flow run in which it failed or was killed before, if any."""

    @property
    def number(self) -> int:
        """Its number in the study."""
        return self._trial.number

    def begins_in(self, flow_run: str) -> None:
        """Note the flow run in which it runs."""
        self._trial.set_user_attr(FLOW_RUN, flow_run)

    def report(self, step: int, error: float) -> None:
        """Take the held-out error at a step of its training; a training that returns to a step reports it again."""
        if step not in self._reported:
            self._reported.add(step)
            self._trial.report(self._sign * error, step)

    def should_prune(self) -> bool:
        """Whether its error so far is above the median of the completed trials at the same step."""
        return self._trial.should_prune()


class Study:
    """The trials of a sweep; to be used by one thread, except for the trials that it gives."""

    def __init__(self, name: str, study: optuna.Study, space: Space, options: Options) -> None:
        self.name, self.space = name, space
        self.prunes = options.prunes and not space.changes_data
        """Whether trials are pruned: their errors must be those of the same pairs."""
        self._study = study
        self._sign = 1 if study.direction == optuna.study.StudyDirection.MINIMIZE else -1
        self._distributions = space.distributions()
        for _ in study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):  # a kill left it between two calls
            study.ask()
        for left in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):  # whose process was killed
            study.tell(left.number, state=TrialState.FAIL)
        begun = self._latest()
        self._failed = {index: trial for index, trial in begun.items() if trial.state == TrialState.FAIL}
        tried: Iterable[dict[str, Any] | None] = map(space.to_optuna, space.grid())
        if options.trials is not None:
            tried = [None] * options.trials  # Optuna chooses them
        new = [(index, params) for index, params in enumerate(tried) if index not in begun]
        self.trials = len(begun) + len(new)
        """How many there are."""
        self._left = deque([*((index, trial.params) for index, trial in self._failed.items()), *new])

    def next(self) -> Trial | None:
        """The next trial to run, those first that failed before; None if none is left."""
        if not self._left:
            return None
        index, params = self._left.popleft()
        if params is not None:
            self._study.enqueue_trial(params)
        asked = self._study.ask(self._distributions)
        asked.set_user_attr(INDEX, index)
        before = self._failed.get(index)
        trial = Trial(asked, self._name(index), self.space.from_optuna(asked.params), self._sign)
        if before:
            trial.flow_run_before = before.user_attrs.get(FLOW_RUN)
            for step, value in before.intermediate_values.items():
                trial.report(step, self._sign * value)
        return trial

    def completed(self, trial: Trial, value: float, facts: Mapping[str, Any]) -> None:
        """End a trial, with the value of the objective and facts to record."""
        self._end(trial, TrialState.COMPLETE, facts, value)

    def pruned(self, trial: Trial, reason: str) -> None:
        """End a trial that was stopped early."""
        self._end(trial, TrialState.PRUNED, {REASON: reason})

    def failed(self, trial: Trial, reason: str) -> None:
        """End a trial for now; it is tried once more when the sweep is started again."""
        self._end(trial, TrialState.FAIL, {REASON: reason})

    def _end(self, trial: Trial, state: TrialState, facts: Mapping[str, Any], value: float | None = None) -> None:
        for name, fact in facts.items():
            trial._trial.set_user_attr(name, fact)
        self._study.tell(trial.number, value, state)

    def results(self) -> list[Result]:
        """All trials so far, the best first, then those that did not complete."""
        found = []
        for index, trial in self._latest().items():
            value = trial.value if trial.state == TrialState.COMPLETE else None
            values = self.space.from_optuna(trial.params)
            found.append(Result(self._name(index), _STATES[trial.state], values, value, trial.user_attrs))
        return sorted(found, key=lambda each: math.inf if each.value is None else self._sign * each.value)

    def _latest(self) -> dict[int, FrozenTrial]:
        """The newest trial of the study for each trial of the sweep."""
        trials = self._study.get_trials(deepcopy=False)
        found = {trial.user_attrs[INDEX]: trial for trial in trials if INDEX in trial.user_attrs}
        return dict(sorted(found.items()))

    def _name(self, index: int) -> str:
        return f"{self.name}-{index}"


@contextmanager
def opened(name: str, options: Options, space: Space) -> Iterator[Study]:
    """The study of a sweep, created if it is new, for this process alone.

    Raises:
        UserError: the sweep is running in another process, another one has its name, or the database cannot be used.
    """
    folder = Paths().sweeps.absolute()
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    address = setting(DATABASE, f"sqlite:///{folder / OWN}", str)
    try:
        with (
            FileLock(folder / f"{name}.lock", blocking=False),
            _user_errors(address),
            _storage(address) as storage,
            _alone(name, storage),
        ):
            yield Study(name, _load(name, storage, options, space), space, options)
    except Timeout:
        raise UserError(f"sweep {name!r} is running in another process; wait for it or cancel it") from None


def definition(options: Options, space: Space) -> dict[str, Any]:
    """What a sweep tries, as plain data."""
    base = validate(space.base, "params.yaml").model_dump(mode="json", exclude={"distill", "tracking"})
    grid = options.trials is None
    return {"over": options.over, "grid": grid, "objective": options.objective, "parameters": base}


@contextmanager
def _storage(address: str) -> Iterator[RDBStorage]:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = RDBStorage(address)
    try:
        yield storage
    finally:
        storage.remove_session()
        storage.engine.dispose()


@contextmanager
def _alone(name: str, storage: RDBStorage) -> Iterator[None]:
    """Keep other machines from running a sweep of this name, by a lock that PostgreSQL holds until the process ends."""
    if storage.engine.dialect.name != "postgresql":
        yield
        return
    key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], signed=True)
    with storage.engine.connect() as connection:
        connection = connection.execution_options(isolation_level="AUTOCOMMIT")
        connection.execute(text("SET tcp_keepalives_idle = 60"))  # so that a machine that is gone loses it in minutes
        if not connection.scalar(text("SELECT pg_try_advisory_lock(:key)"), {"key": key}):
            raise UserError(f"sweep {name!r} is running on another machine; wait for it or cancel it")
        yield


def _load(name: str, storage: RDBStorage, options: Options, space: Space) -> optuna.Study:
    study = optuna.create_study(
        storage=storage,
        study_name=name,
        load_if_exists=True,
        direction="maximize" if FIGURES[options.objective].higher_is_better else "minimize",
        pruner=MedianPruner(),
    )
    # The sampler's generator begins anew: with the same seed it would suggest what it has suggested.
    study.sampler = TPESampler(seed=validate(space.base, "params.yaml").seed + len(study.trials))
    tries, before = json.loads(json.dumps(definition(options, space))), study.user_attrs.get(DEFINITION)
    if before is None and not study.trials:
        study.set_user_attr(DEFINITION, tries)
    elif before != tries:
        differ = [part for part in tries if not isinstance(before, dict) or tries[part] != before.get(part)]
        raise UserError(
            f"name: another sweep is called {name!r} (its {', '.join(differ)} differ); give this one another name"
        )
    return study


@contextmanager
def _user_errors(address: str) -> Iterator[None]:
    try:
        yield
    except (SQLAlchemyError, optuna.exceptions.OptunaError, ImportError) as error:
        shown = address
        with suppress(SQLAlchemyError):
            shown = make_url(address).render_as_string(hide_password=True)
        advice = f"; if {OWN} is damaged, delete it, and the sweeps begin anew" if address.endswith(f"/{OWN}") else ""
        raise UserError(f"{DATABASE}: {shown} cannot be used ({str(error).splitlines()[0]}){advice}") from None

"""The MLflow store, and a run in it to which nothing is logged twice."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urlsplit
from urllib.request import getproxies

from filelock import FileLock
from PIL import Image

from diffusion.errors import UserError
from diffusion.progress import say
from flows import mlflow_pages as pages
from flows.params import Params
from flows.paths import Paths
from flows.tracking import names

if TYPE_CHECKING:  # importing mlflow takes a second or more: only where something is logged
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel, Metric, Run

LOCAL = re.compile(r"http://(127\.0\.0\.1|localhost)(:\d+)?(/|$)")
"""Addresses on this machine."""
FINGERPRINT, WEIGHTS = f"{names.HIDDEN}fingerprint", f"{names.HIDDEN}weights_sha256"
ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "CRITICAL",  # errors are raised, and reported in one line
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_TRUNCATE_LONG_VALUES": "false",  # a value that is too long is an error, never cut silently
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "4",  # seconds; an unreachable server delays a stage by at most twice this
}

for _name, _value in ENVIRONMENT.items():
    os.environ.setdefault(_name, _value)


class TrackedRun:
    """An append-only MLflow run: nothing is logged twice or replaced."""

    def __init__(self, client: MlflowClient, run: Run) -> None:
        self.client, self.id, self.experiment_id = client, run.info.run_id, run.info.experiment_id
        self.status: str = run.info.status
        self.tags, self.params = names.current(run.data.tags), dict(run.data.params)
        self._logged = set(run.data.metrics)
        self._curves: dict[str, dict[int, float]] = {}
        self._images: dict[int, str | None] | None = None

    def once(self, part: str, log: Callable[[], None]) -> None:
        """Log a part, unless all of it was logged before."""
        tag = f"{names.HIDDEN}logged.{part}"
        if tag not in self.tags:
            log()
            self.tag({tag: "true"})

    def tag(self, tags: Mapping[str, str]) -> None:
        """Set tags, all in one request."""
        from mlflow.entities import RunTag

        if tags:
            self.client.log_batch(self.id, tags=[RunTag(key, value) for key, value in tags.items()])
            self.tags |= tags

    def untag(self, tags: Iterable[str]) -> None:
        """Remove tags, whatever an earlier version called them."""
        present = self.client.get_run(self.id).data.tags.keys()
        for tag in tags:
            for name in {tag, names.former(tag)} & present:
                self.client.delete_tag(self.id, name)
            self.tags.pop(tag, None)

    def curve(self, key: str) -> dict[int, float]:
        """The values of a metric by step; where a step has several, the one logged last."""
        if key not in self._curves:
            history = self.client.get_metric_history(self.id, key) if key in self._logged else []
            self._curves[key] = {point.step: point.value for point in sorted(history, key=lambda p: p.timestamp)}
        return self._curves[key]

    def metrics(self, points: Iterable[Metric]) -> None:
        """Log points of curves, except those that the run has.

        A training that returned to an earlier step has other values at the same steps: MLflow keeps both, and shows
        the later one as the metric's value.
        """
        from mlflow.utils.validation import MAX_METRICS_PER_BATCH as MOST

        new = [point for point in points if not _same(self.curve(point.key).get(point.step), point.value)]
        for start in range(0, len(new), MOST):
            self.client.log_batch(self.id, metrics=new[start : start + MOST])
        for point in new:
            self._curves[point.key][point.step] = point.value
            self._logged.add(point.key)

    def scalars(self, stage: str, report: Mapping[str, Any]) -> None:
        """The numbers of a report: metrics without steps (one that has a curve is left out), and parameters."""
        metrics, constants = names.figures(stage, report)
        self.metrics(points({key: value for key, value in metrics.items() if key not in self._logged}, 0))
        self.parameters(constants)

    def parameters(self, values: Mapping[str, Any]) -> None:
        """Log parameters; one that is longer than MLflow accepts is replaced by its length and digest."""
        from mlflow.entities import Param
        from mlflow.utils.validation import MAX_PARAM_VAL_LENGTH
        from mlflow.utils.validation import MAX_PARAMS_TAGS_PER_BATCH as MOST

        new = [
            Param(key, shortened(value, MAX_PARAM_VAL_LENGTH))
            for key, value in values.items()
            if key not in self.params
        ]
        for start in range(0, len(new), MOST):
            self.client.log_batch(self.id, params=new[start : start + MOST])
        self.params |= {param.key: param.value for param in new}

    def dataset(self, name: str, digest: str, source: Path, context: str) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        dataset = Dataset(name, digest[:36], "local", json.dumps({"uri": str(source.resolve())}))
        self.client.log_inputs(self.id, datasets=[DatasetInput(dataset, [InputTag("mlflow.data.context", context)])])

    def uses(self, model_id: str) -> None:
        """Make a logged model an input of the run."""
        from mlflow.entities import LoggedModelInput

        self.client.log_inputs(self.id, models=[LoggedModelInput(model_id)])

    def image(self, image: Image.Image, step: int) -> None:
        """Log the picture of a step, unless the run has it; one of a repeated step is added, as in `metrics`."""
        if self._images is None:
            names = [file.path for file in self.client.list_artifacts(self.id, "images")]
            self._images = {int(found[1]): None for name in names if (found := re.search(r"\+step\+(\d+)\+", name))}
        digest = hashlib.sha256(image.tobytes()).hexdigest()
        if self._images.get(step, "") not in (None, digest):
            self.client.log_image(self.id, image, key="samples", step=step, synchronous=True)
            self._images[step] = digest

    def table(self, rows: list[dict[str, Any]], file: str) -> None:
        """Log a table; see `log_table`."""
        log_table(self.client, self.id, list(rows[0]), [list(row.values()) for row in rows], file)

    def end(self, status: str) -> None:
        self.client.set_terminated(self.id, status=status)


def _same(logged: float | None, value: float) -> bool:
    return logged == value or (logged is not None and math.isnan(logged) and math.isnan(value))


def tracking_uri(paths: Paths) -> str:
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{paths.mlflow_database.resolve()}"


class Store(NamedTuple):
    """An MLflow store, and the id of the experiment in it."""

    client: MlflowClient
    experiment: str

    def run_by_id(self, run_id: str | None) -> Run | None:
        """A run that has not been deleted, or None."""
        found = self._runs(f"attributes.run_id = '{run_id}'") if run_id else []
        return found[0] if found else None

    def runs_by_tag(self, tag: str, value: str) -> list[Run]:
        """The runs with this tag, oldest first; those of earlier versions last."""
        return [run for name in (tag, names.former(tag)) for run in self._runs(f"tags.`{name}` = '{value}'")]

    def models_by_tag(self, tag: str, value: str, own: str = "") -> list[LoggedModel]:
        """The logged models with this tag whose run has not been deleted, oldest first; those of earlier versions last.

        A model whose files were not all logged is left out, unless it belongs to the run with the id `own`.
        """
        order = [{"field_name": "creation_timestamp", "ascending": True}]
        found = [
            model
            for name in (tag, names.former(tag))
            for model in self.client.search_logged_models(
                [self.experiment], f"tags.`{name}` = '{value}'", order_by=order
            )
        ]
        usable = [model for model in found if model.status == "READY" or model.source_run_id == own]
        return [model for model in usable if self.run_by_id(model.source_run_id)]

    def _runs(self, condition: str) -> list[Run]:
        return list(self.client.search_runs([self.experiment], condition, order_by=["attributes.start_time ASC"]))


def client_at(uri: str) -> MlflowClient:
    """A client of the store at `uri`.

    Raises ConnectionRefusedError if nothing listens there on this machine, before MLflow is imported.
    """
    if LOCAL.match(uri) and not getproxies():
        with suppress(ValueError, TimeoutError):  # a port that is none, or a busy server: MLflow says so
            parts = urlsplit(uri)
            socket.create_connection((parts.hostname, parts.port or 80), timeout=4).close()
    import mlflow

    given = os.environ.get("MLFLOW_TRACKING_URI")
    mlflow.set_tracking_uri(uri)  # the client alone is not enough: models:/ addresses are looked up in the global store
    if given is None:
        os.environ.pop("MLFLOW_TRACKING_URI", None)  # set by that call: not the user's setting
    return mlflow.MlflowClient()


def connect(uri: str, params: Params, paths: Paths) -> Store:
    """The store at `uri`, with the experiment of `params`, created if missing."""
    client = client_at(uri)
    experiment = client.get_experiment_by_name(params.tracking.experiment)
    if experiment is not None:
        if experiment.lifecycle_stage == "deleted":
            client.restore_experiment(experiment.experiment_id)
        if experiment.tags.get(pages.VIEW_TAG) != pages.view():
            client.set_experiment_tag(experiment.experiment_id, pages.VIEW_TAG, pages.view())
        return Store(client, experiment.experiment_id)
    served = uri.startswith(("http", "databricks"))  # then the server chooses where artifacts go
    location = None if served else paths.mlflow_artifacts.resolve().as_uri()
    tags = {"mlflow.experimentKind": "custom_model_development", pages.VIEW_TAG: pages.view()}  # pages for training
    return Store(client, client.create_experiment(params.tracking.experiment, artifact_location=location, tags=tags))


def lock(paths: Paths) -> FileLock:
    """A lock to hold while searching for and creating runs and versions, so that no two processes create the same."""
    paths.state.mkdir(exist_ok=True)
    return FileLock(paths.state.resolve() / "mlflow.lock")


def points(values: Mapping[str, float], step: int) -> list[Metric]:
    """One point at `step` for each metric in `values`."""
    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    return [Metric(key, float(value), now, step) for key, value in values.items()]


def shortened(value: Any, limit: int) -> str:
    """A parameter's value as text; if longer than `limit`, its size and the SHA-256 of its JSON form instead."""
    text = str(value)
    if len(text) <= limit:
        return text
    digest = hashlib.sha256(json.dumps(value).encode()).hexdigest()
    size = f"{len(value)} {'characters' if isinstance(value, str) else 'values'}"
    return f"{size}, sha256 {digest}, full value in params.yaml"


def read_image(path: Path) -> Image.Image:
    """A picture, read into memory."""
    with Image.open(path) as image:
        image.load()
        return image


_said: set[str] = set()


def say_unusable(uri: str, error: Exception) -> None:
    """Report once in this process that work continues without MLflow."""
    if uri not in _said:
        _said.add(uri)
        later = "continuing without it; `ddpm track` records the results later"
        say(f"MLflow: {uri} cannot be used ({brief(error)}); {later}")


@contextmanager
def user_errors(uri: str) -> Iterator[None]:
    """Turn any error from MLflow into a one-line UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # from a database, a server, or a missing driver
        raise UserError(f"MLflow at {uri}: {brief(error)}") from None


def brief(error: BaseException) -> str:
    """An error in one line; if a connection or file error caused it, that one."""
    chain = [error]
    while inner := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(inner)
    first = next((e for e in reversed(chain) if isinstance(e, OSError)), error)
    return (str(first) or type(first).__name__).splitlines()[0]


def log_table(
    client: MlflowClient, run_id: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], file: str
) -> None:
    """Log a table as MLflow's `log_table` does, but in place of one with this name, which that would append to."""
    from mlflow.utils.mlflow_tags import MLFLOW_LOGGED_ARTIFACTS

    client.log_dict(run_id, {"columns": list(columns), "data": [list(row) for row in rows]}, file)
    tables, entry = client.get_run(run_id).data.tags.get(MLFLOW_LOGGED_ARTIFACTS, "[]"), {"path": file, "type": "table"}
    if entry not in (found := json.loads(tables)):
        client.set_tag(run_id, MLFLOW_LOGGED_ARTIFACTS, json.dumps([*found, entry]))

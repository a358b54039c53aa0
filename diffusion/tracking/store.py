"""The MLflow store, and a run in it to which nothing is logged twice."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from filelock import FileLock
from PIL import Image
from tqdm import tqdm

from diffusion.params import Params
from diffusion.paths import Paths

if TYPE_CHECKING:  # importing mlflow takes a second or more: only where something is logged
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Run

FINGERPRINT, WEIGHTS, PAIRS = "ddpm.fingerprint", "ddpm.weights_sha256", "ddpm.pairs_sha256"
ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "CRITICAL",  # what goes wrong is raised, and said here in one line
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "4",  # seconds; twice this is the longest that a dead server holds up a stage
}

for _name, _value in ENVIRONMENT.items():
    os.environ.setdefault(_name, _value)


class TrackedRun:
    """An MLflow run to which nothing is logged twice."""

    def __init__(self, client: MlflowClient, run: Run) -> None:
        self.client, self.id, self.experiment_id = client, run.info.run_id, run.info.experiment_id
        self.status: str = run.info.status
        self.tags, self.params, self.latest = dict(run.data.tags), dict(run.data.params), dict(run.data.metrics)
        self._steps: dict[str, set[int]] = {}
        self._image_steps: set[int] | None = None

    def once(self, part: str, digest: str, log: Callable[[], None]) -> None:
        """Log a part, unless it was logged from content of the same digest."""
        tag = f"ddpm.logged.{part}"
        if self.tags.get(tag) != digest:
            log()
            self.client.set_tag(self.id, tag, digest)
            self.tags[tag] = digest

    def steps(self, key: str) -> set[int]:
        """The steps at which a metric has been logged."""
        if key not in self._steps:
            history = self.client.get_metric_history(self.id, key) if key in self.latest else []
            self._steps[key] = {point.step for point in history}
        return self._steps[key]

    def metrics(self, points: Iterable[Metric]) -> None:
        new = [point for point in points if point.step not in self.steps(point.key)]
        for start in range(0, len(new), 1000):  # the most that one request may hold
            self.client.log_batch(self.id, metrics=new[start : start + 1000])
        for point in new:
            self._steps[point.key].add(point.step)

    def scalars(self, prefix: str, report: Mapping[str, Any]) -> None:
        """The numbers of a report, as metrics without steps; one that has a curve is left out."""
        numbers = {f"{prefix}/{key}": value for key, value in report.items() if isinstance(value, int | float)}
        new = {key: value for key, value in numbers.items() if self.latest.get(key) != value}
        self.client.log_batch(self.id, metrics=points({k: v for k, v in new.items() if self.steps(k) <= {0}}, 0))

    def parameters(self, values: Mapping[str, Any]) -> None:
        """Parameters. MLflow's cannot change: one that did (evaluation's, of the same weights) becomes a tag."""
        from mlflow.entities import Param, RunTag

        texts = {key: str(value) for key, value in values.items()}
        new = [Param(key, text) for key, text in texts.items() if key not in self.params]
        changed = [RunTag(key, text) for key, text in texts.items() if self.params.get(key, text) != text]
        self.client.log_batch(self.id, params=new, tags=changed)

    def dataset(self, name: str, digest: str, source: Path, context: str) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        dataset = Dataset(name, digest[:36], "local", json.dumps({"uri": str(source.resolve())}))
        self.client.log_inputs(self.id, datasets=[DatasetInput(dataset, [InputTag("mlflow.data.context", context)])])

    def image(self, image: Image.Image, step: int) -> None:
        if self._image_steps is None:
            names = [file.path for file in self.client.list_artifacts(self.id, "images")]
            self._image_steps = {int(found[1]) for name in names if (found := re.search(r"\+step\+(\d+)\+", name))}
        if step not in self._image_steps:
            self.client.log_image(self.id, image, key="samples", step=step, synchronous=True)
            self._image_steps.add(step)

    def table(self, rows: list[dict[str, Any]], file: str) -> None:
        """A table; one of the same name is replaced (log_table alone would append)."""
        columns = list(rows[0])
        if file in self.tags.get("mlflow.loggedArtifacts", ""):
            content = {"columns": columns, "data": [list(row.values()) for row in rows]}
            self.client.log_dict(self.id, content, file)
        else:
            self.client.log_table(self.id, {key: [row[key] for row in rows] for key in columns}, file)

    def end(self, status: str) -> None:
        self.client.set_terminated(self.id, status=status)


def tracking_uri(paths: Paths) -> str:
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{paths.mlflow_database.resolve()}"


class Store(NamedTuple):
    """An MLflow store, and the id of the experiment in it."""

    client: MlflowClient
    experiment: str

    def run_by_id(self, run_id: str | None) -> Run | None:
        """A run that has not been deleted, or None."""
        return self._run(f"attributes.run_id = '{run_id}'") if run_id else None

    def run_by_tag(self, tag: str, value: str) -> Run | None:
        """The first run with this tag, or None."""
        return self._run(f"tags.`{tag}` = '{value}'")

    def _run(self, condition: str) -> Run | None:
        order = ["attributes.start_time ASC"]
        runs = self.client.search_runs([self.experiment], condition, max_results=1, order_by=order)
        return runs[0] if runs else None


def connect(uri: str, params: Params, paths: Paths) -> Store:
    """The store at `uri`, with the experiment of `params`, made if there is none."""
    import mlflow

    given = os.environ.get("MLFLOW_TRACKING_URI")
    mlflow.set_tracking_uri(uri)  # the client alone is not enough: it looks models:/ addresses up in this global one
    if given is None:
        os.environ.pop("MLFLOW_TRACKING_URI", None)  # set by that, and not to be taken for the user's
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name(params.tracking.experiment)
    if experiment is not None:
        if experiment.lifecycle_stage == "deleted":
            client.restore_experiment(experiment.experiment_id)
        return Store(client, experiment.experiment_id)
    served = uri.startswith(("http", "databricks"))  # then the server knows where artifacts belong
    location = None if served else paths.mlflow_artifacts.resolve().as_uri()
    tags = {"mlflow.experimentKind": "custom_model_development"}  # shows the pages for training
    return Store(client, client.create_experiment(params.tracking.experiment, artifact_location=location, tags=tags))


def lock(paths: Paths) -> FileLock:
    """Held while runs and versions are looked for and made, so that no two processes here make the same one."""
    paths.state.mkdir(exist_ok=True)
    return FileLock(paths.state.resolve() / "mlflow.lock")


def points(values: Mapping[str, float], step: int) -> list[Metric]:
    """One point at `step` for each curve named in `values`."""
    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    return [Metric(key, float(value), now, step) for key, value in values.items()]


def read_image(path: Path) -> Image.Image:
    """A picture, read to the end."""
    with Image.open(path) as image:
        image.load()
        return image


def say(line: str) -> None:
    """Print a line without breaking a progress bar."""
    tqdm.write(f"MLflow: {line}", file=sys.stderr)


_said: set[str] = set()


def say_unusable(uri: str, error: Exception) -> None:
    """Say once in this process that MLflow is gone on without."""
    if uri not in _said:
        _said.add(uri)
        say(f"{uri} cannot be used ({brief(error)}); going on without it, `ddpm track` brings the results there later")


def brief(error: BaseException) -> str:
    """An error in one line; of a chain that began with a connection or a file, that beginning."""
    chain = [error]
    while inner := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(inner)
    first = next((e for e in reversed(chain) if isinstance(e, OSError)), error)
    return (str(first) or type(first).__name__).splitlines()[0]

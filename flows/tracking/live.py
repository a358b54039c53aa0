"""Logging a training while it runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Self

from diffusion.storage.files import sha256
from flows import made_with
from flows.params import Params
from flows.paths import Paths
from flows.tracking import description, lineage, names, store
from flows.tracking.starting import resume, start
from flows.tracking.store import TrackedRun

if TYPE_CHECKING:
    from mlflow.entities import Metric

SECONDS_BETWEEN_BATCHES = 2.0
FIXED = ("seed", "process", "network", "train")
"""The parameters in a training's fingerprint, and those of a student's teacher; others may still change before an
interrupted training is resumed."""


class LiveRun:
    """The MLflow run of a training in progress; a context manager, to be exited before `record` is called.

    A thread logs in batches. After the first failure it stops; `record` adds the rest later.
    """

    run_id: str | None
    """To be saved with the checkpoint. If MLflow cannot be reached, the id that was saved before, or None."""

    def __init__(self, run: TrackedRun | None, run_id: str | None, uri: str) -> None:
        self.run_id = run_id
        self._run, self._uri = run, uri
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="mlflow")
        self._batch: list[Metric] = []
        self._sent = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._send()
        ended = "FINISHED" if kind is None else "FAILED" if issubclass(kind, Exception) else "KILLED"
        self._later(lambda run: run.end(ended))
        self._thread.shutdown()

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Log one point of each curve, named as in reports/train_curves (`mse` of heldout.csv: `heldout_mse`)."""
        if self._run is None:
            return
        self._batch += store.points({names.curve(name): value for name, value in values.items()}, step)
        if time.monotonic() - self._sent > SECONDS_BETWEEN_BATCHES:
            self._send()

    def image(self, path: Path, step: int) -> None:
        """Log the sample grid of a step; the file is read before this returns."""
        if self._run is not None:
            image = store.read_image(path)
            self._later(lambda run: run.image(image, step))

    def _send(self) -> None:
        batch, self._batch = self._batch, []
        self._sent = time.monotonic()
        if batch:
            self._later(lambda run: run.metrics(batch))

    def _later(self, action: Callable[[TrackedRun], None]) -> None:
        def guarded() -> None:
            if self._run is not None:
                try:
                    action(self._run)
                except Exception as error:  # no failure of MLflow ends a training
                    self._run = None
                    store.say_unusable(self._uri, error)

        self._thread.submit(guarded)


def live(params: Params, paths: Paths, run_id: str | None, fingerprint: str) -> LiveRun:
    """Start the run of a training, or resume it: the run `run_id`, or else an unfinished one with this fingerprint.

    A run whose training has ended is never resumed: it holds its results.
    """
    uri, run = store.tracking_uri(paths), None
    try:
        with store.lock(paths):
            mlflow_store = store.connect(uri, params, paths)
            found = [mlflow_store.run_by_id(run_id), *mlflow_store.runs_by_tag(store.FINGERPRINT, fingerprint)]
            open_runs = [run for run in found if run and store.WEIGHTS not in names.current(run.data.tags)]
            if open_runs:
                run = TrackedRun(mlflow_store.client, open_runs[0])
                resume(run, params, paths, fingerprint)
            else:
                run = start(mlflow_store, params, paths, fingerprint, {store.FINGERPRINT: fingerprint})
                run.parameters(made_with.flat(params, *FIXED, *(("distill",) if paths.student else ())))
                run.dataset(
                    Path(params.shard.source).stem, sha256(paths.pairs / "manifest.json"), paths.pairs, "training"
                )
            lineage.log_start(mlflow_store, run, params, paths)
            started = lineage.started_from(mlflow_store, params, paths)
            description.write(mlflow_store.client, run.id, description.training(params, paths, started))
    except Exception as error:
        store.say_unusable(uri, error)
        return LiveRun(None, run.id if run else run_id, uri)
    return LiveRun(run, run.id, uri)

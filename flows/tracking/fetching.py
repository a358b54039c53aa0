"""Runs that MLflow knows, whatever machine they ran on."""

from __future__ import annotations

import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from diffusion.errors import UserError
from flows.params import Params
from flows.paths import Paths
from flows.tracking import names, store
from flows.tracking.starting import COMMIT, DIRTY, FLOW_RUN, TEACHER

LOCK, PARAMETERS = "dvc.lock", "params.yaml"


class Recorded(NamedTuple):
    """A completed flow run, as MLflow has it."""

    flow_run_id: str
    commit: str
    dirty: bool
    """Whether tracked files had changes that the commit lacks."""
    teacher: str
    """Name of the run whose model it distilled; empty for a training."""
    created: str
    ended: str
    """Both ISO 8601, UTC."""
    parameters: bytes
    """The content of params.yaml."""
    lock: bytes
    """The content of the lock file, of its own stages alone."""


def find(name: str, params: Params, paths: Paths) -> Recorded:
    """The latest completed flow run of this name in the experiment of `params`.

    Raises:
        UserError: MLflow has none, or not all that is needed, or cannot be reached.
    """
    uri = store.tracking_uri(paths)
    with store.user_errors(uri):
        mlflow_store = store.connect(uri, params, paths)
        quoted = name.replace("\\", "\\\\").replace("'", "\\'")
        found = mlflow_store.client.search_runs(
            [mlflow_store.experiment],
            f"attributes.run_name = '{quoted}' and attributes.status = 'FINISHED'",
            order_by=["attributes.start_time DESC"],
        )
        runs = [run for run in found if FLOW_RUN in names.current(run.data.tags)]
        if not runs:
            raise UserError(f"run {name!r}: neither here nor completed in MLflow ({uri})")
        info, tags = runs[0].info, names.current(runs[0].data.tags)
        held = {file.path for file in mlflow_store.client.list_artifacts(info.run_id)}
        if missing := [file for file in (LOCK, PARAMETERS) if file not in held]:
            raise UserError(f"run {name!r}: MLflow has no {missing[0]} of it, without which it cannot be fetched")
        with tempfile.TemporaryDirectory() as directory:
            lock, parameters = (
                Path(mlflow_store.client.download_artifacts(info.run_id, file, directory)).read_bytes()
                for file in (LOCK, PARAMETERS)
            )
    return Recorded(
        tags[FLOW_RUN],
        tags.get(COMMIT, ""),
        tags.get(DIRTY) == "true",
        tags.get(TEACHER, ""),
        _time(info.start_time),
        _time(info.end_time),
        parameters,
        lock,
    )


def _time(milliseconds: int) -> str:
    return datetime.fromtimestamp(milliseconds / 1000, UTC).isoformat(timespec="milliseconds")

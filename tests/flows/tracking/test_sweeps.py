"""The MLflow run of a sweep, and those of its trials."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mlflow.entities import ViewType

from diffusion.storage.files import write_json
from flows import tracking
from flows.paths import Paths
from flows.workspace import Run
from tests.flows.tracking.trees import PARAMS, client_of, content, runs_of, write_all

ROWS: list[dict[str, Any]] = [
    {"trial": "lr-1", "train.learning_rate": 0.002, "val_mse": 0.25, "state": "completed"},
    {"trial": "lr-0", "train.learning_rate": 0.001, "val_mse": None, "state": "failed"},
]


def of_trial(paths: Paths, name: str, sweep: str) -> None:
    write_json(paths.root / "run.json", asdict(Run(name, "17", "", "a" * 40, False, "running", sweep=sweep)))


def record(paths: Paths, best: float) -> None:
    tracking.record_sweep(PARAMS, paths, "lr", {"objective": "val_mse"}, {"val_mse": best}, ROWS, "# Sweep lr")


def test_the_runs_of_trials_are_children_of_the_sweeps_run(paths: Paths) -> None:
    of_trial(paths, "lr-0", "lr")
    with tracking.live(PARAMS, paths, None, "f0") as first:
        (parent,) = [run for run in runs_of(client_of(paths)) if run.info.run_id != first.run_id]
        assert parent.info.status == "RUNNING"
    of_trial(paths, "lr-1", "lr")
    write_all(paths)
    second = tracking.record(PARAMS, paths)
    assert second is not None
    record(paths, 0.25)
    client = client_of(paths)
    children = client.search_runs([parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'")
    assert {run.info.run_id for run in children} == {first.run_id, second.run_id}
    found = content(client, parent.info.run_id)
    assert found["status"] == "FINISHED"
    assert found["params"] == {"objective": "val_mse"}
    assert client.get_run(parent.info.run_id).info.run_name == "lr"
    assert client.get_run(parent.info.run_id).data.metrics == {"best/val_mse": 0.25}
    assert len(runs_of(client)) == 3


def test_a_sweep_that_goes_on_is_recorded_in_its_run(paths: Paths) -> None:
    record(paths, 0.25)
    record(paths, 0.125)
    client = client_of(paths)
    (run,) = runs_of(client)
    table = json.loads(Path(client.download_artifacts(run.info.run_id, "trials.json")).read_text())
    assert table["columns"] == list(ROWS[0])
    assert table["data"] == [list(row.values()) for row in ROWS]


def test_a_training_that_a_sweep_resumes_becomes_its_child_and_no_longer_is_one_elsewhere(paths: Paths) -> None:
    of_trial(paths, "lr-0", "lr")
    with tracking.live(PARAMS, paths, None, "f0") as run:
        pass
    assert run.run_id is not None
    client = client_of(paths)
    assert "mlflow.parentRunId" in client.get_run(run.run_id).data.tags
    of_trial(paths, "calm-owl", "")
    with tracking.live(PARAMS, paths, run.run_id, "f0"):
        pass
    assert "mlflow.parentRunId" not in client.get_run(run.run_id).data.tags


def test_a_sweep_whose_run_was_deleted_gets_another(paths: Paths) -> None:
    record(paths, 0.25)
    client = client_of(paths)
    (run,) = runs_of(client)
    client.delete_run(run.info.run_id)
    record(paths, 0.25)
    assert len(client.search_runs([run.info.experiment_id], run_view_type=ViewType.ACTIVE_ONLY)) == 1

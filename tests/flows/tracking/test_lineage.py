"""Runs of trainings that started from a model are linked to the run that trained it."""

import shutil
from pathlib import Path

import pytest
from mlflow import MlflowClient

from diffusion.storage.files import sha256
from flows import tracking
from flows.origin import Origin
from flows.params import Params
from flows.paths import Paths
from flows.tracking import lineage
from tests.flows.tracking.trees import PARAMS, changed, client_of, write_all, write_training

STARTED = "The training started from the weights of [run calm-owl](/#"
LATER = changed(train={"start_from": "first"})


def inputs(client: MlflowClient, run_id: str) -> list[tuple[str, str]]:
    """The runs that trained the models which a run has as inputs, and the models' names."""
    models = [client.get_logged_model(each.model_id) for each in client.get_run(run_id).inputs.model_inputs]
    return [(str(model.source_run_id), str(model.name)) for model in models]


@pytest.fixture
def source(paths: Paths) -> Origin:
    """The origin of the model in data/models/first, whose run is in MLflow."""
    weights = write_all(paths)
    recorded = tracking.record(PARAMS, paths)
    assert recorded is not None
    origin = lineage.with_run(Origin(run="calm-owl", weights_sha256=weights), paths)
    assert (origin.run_id, origin.run) == (recorded.run_id, "calm-owl")
    shutil.copytree(paths.model, paths.imported / "first")
    origin.write(paths.imported / "first")
    return origin


@pytest.mark.parametrize("followed", [True, False])
def test_a_training_is_linked_to_the_run_whose_weights_it_started_from(
    paths: Paths, source: Origin, followed: bool
) -> None:
    client, run_id = client_of(paths), None
    if followed:
        with tracking.live(LATER, paths, None, "f2") as live:
            run_id = live.run_id
            assert run_id is not None
            assert inputs(client, run_id) == [(source.run_id, "weights")]
            note = client.get_run(run_id).data.tags["mlflow.note.content"]
            assert f"{STARTED}/experiments/1/runs/{source.run_id}" in note.splitlines()[0]
    write_all(paths, b"other weights", params=LATER)
    recorded = tracking.record(LATER, paths, run_id)
    assert recorded is not None
    assert recorded.run_id == recorded.trained_in != source.run_id
    assert run_id in (None, recorded.run_id)
    assert inputs(client, recorded.run_id) == [(source.run_id, "weights")]
    found = client.get_run(recorded.run_id).data
    assert found.tags["mlflow.ddpm.started_from_run"] == source.run_id
    assert found.params["train.start_from"] == "first"
    first = found.tags["mlflow.note.content"].splitlines()[0]
    assert f"{STARTED}/experiments/1/runs/{source.run_id}" in first
    again = tracking.record(LATER, paths, run_id)
    assert again is not None
    assert again.run_id == recorded.run_id
    assert len(inputs(client, recorded.run_id)) == 1


def test_a_source_that_mlflow_does_not_know_is_named(paths: Paths) -> None:
    write_training(paths, b"first", LATER)
    shutil.copytree(paths.model, paths.imported / "first")
    Origin(folder="old", weights_sha256=sha256(paths.model / "model.safetensors")).write(paths.imported / "first")
    run = recorded_run(paths, LATER)
    assert "The training started from the weights of the folder old." in run["mlflow.note.content"]
    assert "mlflow.ddpm.started_from_run" not in run


def test_random_weights_and_a_model_that_is_gone_are_not_mentioned(paths: Paths) -> None:
    assert "started from" not in recorded_run(paths, PARAMS)["mlflow.note.content"]
    assert "started from" not in recorded_run(paths, LATER)["mlflow.note.content"]


def recorded_run(paths: Paths, params: Params) -> dict[str, str]:
    """The tags of the run of a training."""
    write_training(paths, b"result", params)
    recorded = tracking.record(params, paths)
    assert recorded is not None
    tags: dict[str, str] = client_of(paths).get_run(recorded.run_id).data.tags
    return tags


def test_no_database_is_made_to_look_for_a_run(tmp_path: Path) -> None:
    origin = Origin(weights_sha256="0" * 64)
    assert lineage.with_run(origin, Paths(tmp_path)) == origin
    assert list(tmp_path.iterdir()) == []

"""Fixtures: a working tree with a separate MLflow store."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest
from mlflow import MlflowClient

from flows.paths import Paths
from flows.tracking import store
from tests.flows.tracking.trees import write_tree


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty MLflow database: its migrations take a second, so that tests copy it."""
    database = tmp_path_factory.mktemp("template") / "mlflow.db"
    MlflowClient(f"sqlite:///{database}").search_experiments()
    return database


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(store, "_said", set())
    yield
    mlflow.set_tracking_uri(None)


@pytest.fixture
def paths(tmp_path: Path, template: Path) -> Paths:
    """A working tree with an MLflow database and no results."""
    paths = Paths(tmp_path / "tree")
    paths.state.mkdir(parents=True)
    shutil.copyfile(template, paths.mlflow_database)
    write_tree(paths)
    return paths

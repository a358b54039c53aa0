"""Fixtures: a working tree with a separate MLflow store."""

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest
from sqlalchemy import Engine, event

from flows import tracking
from flows.paths import Paths
from flows.tracking import store
from tests.flows.tracking.kept import keep, new_tree, restore
from tests.flows.tracking.trees import PARAMS, write_all


@pytest.fixture(autouse=True, scope="session")
def _commits_without_waiting_for_the_disk() -> Iterator[None]:
    """No test here loses power; recording a run makes 150 commits."""

    def set_up(connection: object, _: object) -> None:
        if isinstance(connection, sqlite3.Connection):
            connection.execute("PRAGMA synchronous = OFF")

    event.listen(Engine, "connect", set_up)
    yield
    event.remove(Engine, "connect", set_up)


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(store, "_said", set())
    yield
    mlflow.set_tracking_uri(None)


@pytest.fixture
def paths(tmp_path: Path, mlflow_database: Path) -> Paths:
    """A working tree with an MLflow database and no results."""
    return new_tree(tmp_path / "tree", mlflow_database)


@pytest.fixture(scope="module")
def _taught(tmp_path_factory: pytest.TempPathFactory, mlflow_database: Path) -> Paths:
    paths = new_tree(tmp_path_factory.mktemp("taught") / "tree", mlflow_database)
    write_all(paths)
    assert tracking.record(PARAMS, paths) is not None
    keep(paths)
    return paths


@pytest.fixture
def taught(_taught: Paths) -> Paths:
    """A working tree with a recorded training, for students."""
    restore(_taught)
    return _taught

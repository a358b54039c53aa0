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
from tests.flows.tracking.champions import BETTER, BITS, FIRST, LIMIT, QUALITY, SAMPLES, gated, version
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


@pytest.fixture(scope="module")
def _first(tmp_path_factory: pytest.TempPathFactory, mlflow_database: Path) -> Paths:
    paths = new_tree(tmp_path_factory.mktemp("first") / "tree", mlflow_database)
    assert version(paths, b"first", FIRST) == ["challenger", "champion"]
    keep(paths)
    return paths


@pytest.fixture
def first(_first: Paths) -> Paths:
    """A working tree whose version 1 has the errors FIRST, and is champion."""
    restore(_first)
    return _first


@pytest.fixture(scope="module")
def _measured(tmp_path_factory: pytest.TempPathFactory, mlflow_database: Path) -> Paths:
    paths = new_tree(tmp_path_factory.mktemp("measured") / "tree", mlflow_database)
    params = gated(LIMIT, BETTER, BITS, QUALITY)
    assert version(paths, b"first", FIRST, params=params, bits=[3.0, 3.2, 3.4], figures=SAMPLES)[1:] == ["champion"]
    keep(paths)
    return paths


@pytest.fixture
def measured(_measured: Paths) -> Paths:
    """The same, with figures for all rules."""
    restore(_measured)
    return _measured

"""Fixtures for all tests."""

import gc
import os
import shutil
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import webdataset

from flows import params as parameters
from flows.params import Params
from flows.tracking import store
from tests import sharing
from tests.training import trees

ROOT = Path(__file__).parents[1]


def pytest_xdist_auto_num_workers() -> int:
    """One worker more than there are cores, since some tests wait for servers."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return cores + 1


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run slow files first, so that no worker is left with one when the others have finished."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(scope="session", autouse=True)
def _nothing_of_the_user(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Isolate tests from the user's settings, repository and servers."""
    empty = str(tmp_path_factory.mktemp("empty"))
    with pytest.MonkeyPatch.context() as patch:
        for variable in [name for name in os.environ if name.startswith(("GIT_", "DVC_", "DDPM_", "MLFLOW_"))]:
            patch.delenv(variable)
        for variable, value in store.ENVIRONMENT.items():  # set on import
            patch.setenv(variable, value)
        patch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
        patch.setenv("GIT_CONFIG_NOSYSTEM", "1")
        patch.setenv("DVC_GLOBAL_CONFIG_DIR", empty)
        patch.setenv("DVC_SYSTEM_CONFIG_DIR", empty)
        yield


@pytest.fixture(autouse=True)
def _same_signals() -> Iterator[None]:
    """Child processes inherit what is ignored: SIGTERM after the command line was run in the tests' own process, and
    SIGINT if the tests were started in the background of a shell."""
    before = signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="session")
def root() -> Path:
    """Root of the repository."""
    return ROOT


@pytest.fixture(scope="session")
def params() -> Params:
    """The repository's params.yaml."""
    return parameters.load(ROOT / "params.yaml")


@pytest.fixture
def digits_tree(tmp_path: Path) -> Path:
    """A working tree with only params.yaml and the digits."""
    (tmp_path / "data" / "raw").mkdir(parents=True)
    shutil.copy(ROOT / "params.yaml", tmp_path)
    shutil.copy(ROOT / "data" / "raw" / "digits.npz", tmp_path / "data" / "raw")
    return tmp_path


@pytest.fixture(scope="session", autouse=True)
def _shared_files(tmp_path_factory: pytest.TempPathFactory) -> None:
    sharing.use(tmp_path_factory)


@pytest.fixture(scope="session")
def pairs_tree() -> Path:
    """A tree after the stages shard and pairs; tests copy it."""

    def make(tree: Path) -> None:
        (tree / "data" / "raw").mkdir(parents=True)
        shutil.copy(ROOT / "params.yaml", tree)
        shutil.copy(ROOT / "data" / "raw" / "digits.npz", tree / "data" / "raw")
        trees.change(tree, trees.TINY)
        run_stages(tree, "shard", "pairs")

    return sharing.once("pairs_tree", make)


@pytest.fixture(scope="session")
def whole_tree(pairs_tree: Path) -> Path:
    """The same tree after all stages; tests copy it."""

    def make(tree: Path) -> None:
        shutil.copytree(pairs_tree, tree)
        run_stages(tree, "train", "evaluate", "export")

    return sharing.once("whole_tree", make)


@pytest.fixture(scope="session")
def mlflow_database() -> Path:
    """An empty MLflow database: its migrations take seconds, so that tests copy it."""
    from mlflow import MlflowClient  # few tests need it, and it takes seconds

    return sharing.once("mlflow.db", lambda database: MlflowClient(f"sqlite:///{database}").search_experiments())


def run_stages(tree: Path, *stages: str) -> None:
    """Run stages, which must succeed."""
    for stage in stages:
        done = trees.run(tree, stage)
        assert done.returncode == 0, done.stderr


@pytest.fixture
def webdataset_samples(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], list[dict[str, Any]]]:
    """Reads tar files with plain webdataset, which must not need pickle."""
    monkeypatch.setenv("WDS_SECURE", "1")

    def read(paths: list[str]) -> list[dict[str, Any]]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)  # webdataset does not close its files
            samples = list(webdataset.WebDataset(paths, shardshuffle=False).decode("pil"))
            gc.collect()
        return samples

    return read

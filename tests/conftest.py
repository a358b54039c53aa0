"""Fixtures for all tests."""

import gc
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import webdataset

from flows import params as parameters
from flows.params import Params
from tests.training import trees

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def params() -> Params:
    """The repository's params.yaml."""
    return parameters.load(ROOT / "params.yaml")


@pytest.fixture
def digits_tree(tmp_path: Path) -> Path:
    """A working tree with nothing but params.yaml and the digits."""
    (tmp_path / "data" / "raw").mkdir(parents=True)
    shutil.copy(ROOT / "params.yaml", tmp_path)
    shutil.copy(ROOT / "data" / "raw" / "digits.npz", tmp_path / "data" / "raw")
    return tmp_path


@pytest.fixture(scope="session")
def pairs_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tree after the stages shard and pairs, to be copied."""
    tree = tmp_path_factory.mktemp("training") / "tree"
    (tree / "data" / "raw").mkdir(parents=True)
    shutil.copy(trees.ROOT / "params.yaml", tree)
    shutil.copy(trees.ROOT / "data" / "raw" / "digits.npz", tree / "data" / "raw")
    trees.change(tree, trees.TINY)
    for stage in ("shard", "pairs"):
        done = trees.run(tree, stage)
        assert done.returncode == 0, done.stderr
    return tree


@pytest.fixture
def webdataset_samples(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], list[dict[str, Any]]]:
    """Reads tar files with plain webdataset, which must need no pickle."""
    monkeypatch.setenv("WDS_SECURE", "1")

    def read(paths: list[str]) -> list[dict[str, Any]]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)  # webdataset leaves its files to the garbage collector
            samples = list(webdataset.WebDataset(paths, shardshuffle=False).decode("pil"))
            gc.collect()
        return samples

    return read

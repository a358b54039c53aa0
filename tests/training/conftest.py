"""A working tree with shards and pairs, for trainings through the real command."""

import shutil
from pathlib import Path

import pytest

from tests.training import trees


@pytest.fixture(scope="session")
def pairs_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tree after the stages shard and pairs, to be copied."""
    tree = tmp_path_factory.mktemp("training") / "tree"
    (tree / "data" / "raw").mkdir(parents=True)
    shutil.copy(trees.ROOT / "presets" / "digits.yaml", tree / "params.yaml")
    shutil.copy(trees.ROOT / "data" / "raw" / "digits.npz", tree / "data" / "raw")
    trees.change(tree, trees.TINY)
    for stage in ("shard", "pairs"):
        done = trees.run(tree, stage)
        assert done.returncode == 0, done.stderr
    return tree

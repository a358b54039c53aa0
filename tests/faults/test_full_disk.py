"""Stages that cannot write: one line with the path, nothing half-written, and training resumes from its checkpoint."""

import errno
import itertools
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import pytest

from tests.training import trees

pytestmark = pytest.mark.slow

OUTPUTS = ("data", "models", "reports")


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """A block in which no file grows beyond so many bytes; Python ignores the signal, and writing fails (EFBIG)."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@contextmanager
def full_after(files: int) -> Iterator[None]:
    """A block in which the disk is full after so many calls of fsync."""
    left, fsync = itertools.count(files, -1), os.fsync

    def full(descriptor: int) -> None:
        if next(left) <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    with patch.object(os, "fsync", full):
        yield


def entries(tree: Path) -> set[str]:
    """Everything in a tree that is written outside of the checkpoints."""
    return {str(path.relative_to(tree)) for part in OUTPUTS for path in (tree / part).rglob("*")}


@pytest.fixture(scope="module")
def trained(pairs_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tree = trees.copy(pairs_tree, tmp_path_factory.mktemp("trained") / "tree")
    trees.change(
        tree, {"export": {"variants": []}}
    )  # quantization writes temporary files, and the error would name those
    done = trees.run(tree)
    assert done.returncode == 0, done.stderr
    return tree


@pytest.mark.parametrize(
    ("stage", "limit", "path"),
    [
        ("shard", 100_000, "data/shards/train-000000.tar"),
        ("pairs", 100_000, "data/pairs/train-000000.tar"),
        ("evaluate", 100, "reports/evaluate.json"),
        ("export", 10_000, "models/onnx/denoiser.onnx"),
    ],
)
def test_a_stage_that_cannot_write_says_where(trained: Path, tmp_path: Path, stage: str, limit: int, path: str) -> None:
    tree = trees.copy(trained, tmp_path / "tree")
    trees.change(tree, {"evaluate": {"quality_samples": 0}})  # whose features would be the first file
    before = entries(tree)
    with largest_file(limit):
        done = trees.run(tree, stage)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        f"ddpm {stage}: error: {path}: cannot be written (File too large); "
        "allow larger files (ulimit -f, or another file system)"
    )
    assert "Traceback" not in done.stderr
    assert entries(tree) == before


def test_a_full_disk_costs_no_step_of_training(trained: Path, pairs_tree: Path, tmp_path: Path) -> None:
    """Full at each of several moments in turn, of checkpoints, previews and outputs."""
    tree = trees.copy(pairs_tree, tmp_path / "tree")
    named = set()
    for files in (0, 4, 14, 22):
        with full_after(files):
            done = trees.run(tree)
        assert done.returncode == 1, files
        *_, line = done.stderr.splitlines()
        assert line.startswith("ddpm train: error: ")
        assert line.endswith(
            ": cannot be written (No space left on device); free some space; training will then continue from its last "
            "checkpoint"
        )
        assert "Traceback" not in done.stderr
        named.add(line.split(": ")[2])
        assert not [path for path in tree.rglob(".*") if path.name != ".ddpm"]
        assert not (tree / "models").exists() or not list((tree / "models").iterdir())
    assert len(named) == 4
    done = trees.run(tree)
    assert done.returncode == 0, done.stderr
    assert "resuming from step 40" in done.stderr
    assert trees.digests(tree, "models", "reports") == trees.digests(trained, "models", "reports")


def test_a_full_disk_costs_no_step_of_a_distillation(trained: Path, tmp_path: Path) -> None:
    tree = trees.copy(trained, tmp_path / "tree")
    with full_after(14):
        done = trees.run(tree, "distill")
    assert done.returncode == 1
    *_, line = done.stderr.splitlines()
    assert line.startswith("ddpm distill: error: ")
    assert line.endswith("; free some space; training will then continue from its last checkpoint")
    assert not (tree / "models/student").exists()
    done = trees.run(tree, "distill")
    assert done.returncode == 0, done.stderr
    assert "resuming from step" in done.stderr

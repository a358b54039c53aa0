"""Stages that cannot write: one line with the path, nothing half-written, and training goes on from its checkpoint."""

import sys
from pathlib import Path

import pytest

from tests.training import trees

LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
from flows.__main__ import main
sys.exit(main(sys.argv[2:]))
"""
"""Runs a command in which no file grows beyond so many bytes; Python ignores the signal, and writing fails (EFBIG)."""
FULL = """
import errno, os, sys
from flows.__main__ import main
left, fsync = int(sys.argv[1]), os.fsync
def full(descriptor):
    global left
    left -= 1
    if left < 0:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    fsync(descriptor)
os.fsync = full
sys.exit(main(sys.argv[2:]))
"""
"""Runs a command on a disk that is full after so many files."""
OUTPUTS = ("data", "models", "reports")


def entries(tree: Path) -> set[str]:
    """Everything in a tree that is written outside of the checkpoints."""
    return {str(path.relative_to(tree)) for part in OUTPUTS for path in (tree / part).rglob("*")}


@pytest.fixture(scope="module")
def trained(pairs_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tree = trees.copy(pairs_tree, tmp_path_factory.mktemp("trained") / "tree")
    trees.change(tree, {"evaluate": {"resamples": 100, "likelihood_images": 2, "exact_likelihood_images": 2}})
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
    before = entries(tree)
    done = trees.run_apart(tree, sys.executable, "-c", LIMITED, str(limit), stage)
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
        done = trees.run_apart(tree, sys.executable, "-c", FULL, str(files), "train")
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
    assert "going on from step 40" in done.stderr
    assert trees.digests(tree, "models", "reports") == trees.digests(trained, "models", "reports")

"""A small git and DVC repository with two instant stages."""

import shutil
import subprocess
from contextlib import chdir
from pathlib import Path

import pytest

DVC_YAML = """
stages:
  shard:
    cmd: python stage.py shard
    params: [shard]
    deps: [stage.py]
    outs: [data/shards]
  train:
    cmd: python stage.py train
    params: [train, seed]
    deps: [stage.py, data/shards]
    outs: [models/ddpm]
"""

STAGE_PY = """
import sys, pathlib
name = sys.argv[1]
out = pathlib.Path({"shard": "data/shards", "train": "models/ddpm"}[name])
out.mkdir(parents=True, exist_ok=True)
(out / "result").write_text(pathlib.Path("params.yaml").read_text() if name == "train" else "shards")
print(f"{name} done")
"""


def git(*arguments: str) -> None:
    identity = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
    subprocess.run(["git", *identity, *arguments], check=True, capture_output=True)


def new_repository(directory: Path, root: Path) -> None:
    """Create a repository with one commit."""
    for name in ("params.yaml", "data/raw/digits.npz", ".dvc/config", ".dvc/.gitignore", ".dvcignore", ".gitignore"):
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root / name, directory / name)
    (directory / "presets").mkdir()
    (directory / "presets/short.yaml").write_text("train:\n  steps: 7\n")
    (directory / "dvc.yaml").write_text(DVC_YAML)
    (directory / "stage.py").write_text(STAGE_PY)
    with chdir(directory):
        git("init", "--quiet", "--initial-branch=main")
        git("add", "--all")
        git("commit", "--quiet", "--message", "first")


@pytest.fixture
def repository(tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A new repository with one commit, which becomes the working directory."""
    directory = tmp_path / "a földer"  # paths may have spaces and non-ASCII letters
    new_repository(directory, root)
    monkeypatch.chdir(directory)
    return directory


def save(place: Path) -> None:
    """Copy a repository, so that tests can restore it."""
    shutil.copytree(place, place.with_name("copy"), symlinks=True)


def restore(place: Path) -> None:
    """Undo what a test did to a repository. It stays where it was made, since its files contain its path."""
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(place.with_name("copy"), place, symlinks=True)

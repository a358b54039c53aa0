"""A stage with an output tracked by git fails before its work, not after."""

import shutil
import subprocess
from pathlib import Path

import pytest

from diffusion.errors import UserError
from flows.commands.stage import check_untracked
from tests.training import trees


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with dvc.yaml, params.yaml and a model."""
    for name in ("dvc.yaml", "params.yaml"):
        shutil.copy(trees.ROOT / name, tmp_path)
    (tmp_path / "models" / "ddpm").mkdir(parents=True)
    (tmp_path / "models" / "ddpm" / "config.json").write_text("{}")
    (tmp_path / "reports").mkdir()
    (tmp_path / "reports" / "train.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def git(*arguments: str) -> None:
    subprocess.run(["git", *arguments], check=True, capture_output=True)


def test_a_stage_fails_before_its_work(tree: Path) -> None:
    git("init")
    git("add", "--force", "models/ddpm/config.json")
    for command in (["train"], ["evaluate"]):  # a stage that starts would report missing pairs
        done = trees.run(tree, *command)
        assert done.returncode == 1
        assert ("models/ddpm: tracked by git" in done.stderr) == (command == ["train"])
    done = trees.run(tree)
    assert done.stderr == (
        "ddpm train: error: models/ddpm: tracked by git, but written by the stage train and kept by DVC; run "
        "`git rm -r --cached models/ddpm`, which deletes no file\n"
    )


def test_the_advice_works(tree: Path) -> None:
    git("init")
    check_untracked("train")
    git("add", "--force", "models", "reports")
    with pytest.raises(UserError, match=r"`git rm -r --cached models/ddpm reports/train.json`"):
        check_untracked("train")
    check_untracked("pairs")
    git("rm", "-r", "--cached", "models/ddpm", "reports/train.json")
    check_untracked("train")
    assert (tree / "models" / "ddpm" / "config.json").exists()


def test_an_output_with_cache_false_may_be_tracked(tree: Path) -> None:
    git("init")
    git("add", "--force", "reports/train.json")
    text = (tree / "dvc.yaml").read_text(encoding="utf-8")
    (tree / "dvc.yaml").write_text(text.replace("- reports/train.json", "- reports/train.json: {cache: false}"))
    check_untracked("train")


def test_without_repository_git_or_pipeline_nothing_is_reported(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_untracked("train")
    git("init")
    git("add", "--force", "models")
    with pytest.raises(UserError):
        check_untracked("train")
    monkeypatch.setenv("PATH", "")
    check_untracked("train")
    monkeypatch.undo()
    monkeypatch.chdir(tree)
    (tree / "dvc.yaml").unlink()
    check_untracked("train")

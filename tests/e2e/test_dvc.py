"""DVC as a user types it: reproducible bytes, only what changed, metrics and plots, experiments, a remote."""

import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import chdir
from pathlib import Path

import pytest
from dvc.repo import Repo

from flows import yaml_files
from flows.changes import lay_over
from tests.e2e.conftest import FEATURES
from tests.training import trees

pytestmark = pytest.mark.slow

STAGES = ["shard", "pairs", "train", "evaluate", "export"]


def call(tree: Path, *command: str) -> str:
    """A command's output; it has to succeed."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command,
        cwd=tree,
        env=os.environ | {"PATH": path, "OMP_NUM_THREADS": "1", "COLUMNS": "300"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def ran(output: str) -> list[str]:
    """The stages that ran."""
    return [stage for stage in STAGES if f"Running stage '{stage}':" in output]


def git_clone(source: Path, target: Path) -> Path:
    call(source, "git", "clone", "--quiet", str(source), str(target))
    for key, value in (("user.name", "test"), ("user.email", "test@localhost")):
        call(target, "git", "config", key, value)
    return target


@pytest.fixture(scope="module")
def tree(clone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone in which `dvc repro` has run once, its dvc.lock committed."""
    target = git_clone(clone, tmp_path_factory.mktemp("dvc") / "tree")
    shutil.copytree(clone / FEATURES, target / FEATURES)
    assert ran(call(target, "dvc", "repro")) == STAGES
    call(target, "git", "add", "dvc.lock")
    call(target, "git", "commit", "--quiet", "--message", "results")
    return target


def test_a_second_time_nothing_has_changed(tree: Path) -> None:
    assert "Data and pipelines are up to date." in call(tree, "dvc", "repro")


def test_the_stages_by_themselves_give_the_same_bytes(tree: Path, stages_tree: Path) -> None:
    outputs = ("data/shards", "data/pairs", "models", "reports")
    made = trees.digests(stages_tree, *outputs)
    assert {"data/pairs/train-000000.tar", "models/ddpm/model.safetensors", "models/onnx/sampler.onnx"} <= made.keys()
    assert trees.digests(tree, *outputs) == made


def test_changed_parameters_touch_only_their_own_stage(tree: Path) -> None:
    """Those that come after it run when its outputs are other ones."""
    changes: list[tuple[dict[str, object], list[str]]] = [
        ({"shard": {"samples_per_shard": 500}}, ["shard"]),
        ({"pairs": {"draws": 2}}, ["pairs"]),
        ({"process": {"loss": "l1"}}, ["train"]),
        ({"train": {"steps": 21}}, ["train"]),
        ({"sample": {"count": 5}}, ["evaluate"]),
        ({"export": {"tolerance": 0.001}}, ["export"]),
        ({"distill": {"steps": 7}}, []),
        ({"tracking": {"gate": [{"kind": "limit", "figure": "val_mse", "value": 0.4}]}}, []),
    ]
    path = tree / "params.yaml"
    before = path.read_text()
    try:
        for change, stages in changes:
            path.write_text(before)
            yaml_files.write_yaml(path, lay_over(yaml_files.read_yaml(path), change))
            with chdir(tree), Repo() as repo:
                assert list(repo.status()) == stages
    finally:
        path.write_text(before)


def test_metrics_plots_and_experiments_work(tree: Path, tmp_path: Path) -> None:
    shown = json.loads(call(tree, "dvc", "metrics", "show", "--json"))[""]["data"]
    assert 0 < shown["reports/evaluate.json"]["data"]["mse"] < 2
    call(tree, "dvc", "plots", "show", "--out", str(tmp_path))
    page = (tmp_path / "index.html").read_text()
    pictures = re.findall(r'<img src="([^"]*)"', page)
    assert len(pictures) == 5
    assert all((tmp_path / picture).read_bytes().startswith(b"\x89PNG") for picture in pictures)
    assert "http" not in page  # it works without the internet
    assert "<script" not in page
    fewer = [f"-Sevaluate.{name}" for name in ("likelihood_images=3", "quality_samples=0")]
    assert ran(call(tree, "dvc", "exp", "run", "evaluate", *fewer)) == ["evaluate"]
    difference = json.loads(call(tree, "dvc", "metrics", "diff", "--json"))
    assert difference["reports/evaluate.json"]["bits_per_dim_images"] == {"old": 8, "new": 3, "diff": -5}
    call(tree, "git", "checkout", "--quiet", "params.yaml", "dvc.lock")
    call(tree, "dvc", "checkout")


def test_a_clone_that_pulls_runs_nothing(tree: Path, tmp_path: Path, mlflow_database: Path) -> None:
    call(tree, "dvc", "remote", "add", "--default", "storage", str(tmp_path / "storage"))
    call(tree, "dvc", "push")
    call(tree, "git", "add", ".dvc/config", "params.yaml", "dvc.lock", "data/raw")
    call(tree, "git", "commit", "--message", "Results")
    second = git_clone(tree, tmp_path / "second")
    call(second, "dvc", "pull")
    assert "Data and pipelines are up to date." in call(second, "dvc", "repro")
    assert trees.digests(second, "data", "models", "reports") == trees.digests(tree, "data", "models", "reports")
    third = git_clone(tree, tmp_path / "third")
    (third / ".ddpm").mkdir()
    shutil.copyfile(mlflow_database, third / ".ddpm/mlflow.db")
    assert ran(call(third, "python", "-m", "flows.train_ddpm", "--name", "run")) == []
    assert trees.digests(third / ".ddpm" / "runs" / "run", "models") == trees.digests(tree, "models")

"""`python -m flows.repro`: dvc.lock entries whose outputs are local, in a remote, or nowhere."""

import os
import shutil
import subprocess
import sys
from contextlib import chdir
from pathlib import Path

import pytest

from flows import dvc_stage, workspace, yaml_files
from tests.flows.conftest import git, new_repository, restore, save

pytestmark = pytest.mark.slow

LOCK, MODEL = Path("dvc.lock"), Path("models/ddpm/result")
OTHER_BYTES = """
import os
if name == "train":
    (out / "result").write_text(os.urandom(8).hex())
"""


def repro(root: Path, *arguments: str) -> str:
    environment = os.environ | {"PYTHONPATH": str(root)}
    command = [sys.executable, "-m", "flows.repro", *arguments]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    return done.stdout


def forget_everything() -> None:
    """Remove cache and outputs, as in a new clone."""
    for path in ("data/shards", "models", ".dvc/cache", ".dvc/tmp"):
        shutil.rmtree(path)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, root: Path) -> Path:
    """A repository with a committed lock file; training gives different bytes every time."""
    directory = tmp_path_factory.mktemp("repro") / "a földer"
    new_repository(directory, root)
    with (directory / "stage.py").open("a") as stage:
        stage.write(OTHER_BYTES)
    workspace.dvc(directory, "repro")
    with chdir(directory):
        git("add", "--all")
        git("commit", "--quiet", "--message", "lock")
    save(directory)
    return directory


@pytest.fixture
def committed(place: Path, monkeypatch: pytest.MonkeyPatch) -> bytes:
    """The lock file of this repository, which is restored and the working directory."""
    restore(place)
    monkeypatch.chdir(place)
    return LOCK.read_bytes()


def test_missing_outputs_are_computed_once(committed: bytes, root: Path) -> None:
    forget_everything()
    first = repro(root)
    assert "train done" in first
    assert "shard done" in first
    made = MODEL.read_text()
    LOCK.write_bytes(committed)
    again = repro(root)
    assert "dvc.lock: the outputs of train are in neither the cache nor a remote" in again
    assert "done" not in again
    assert MODEL.read_text() == made
    assert LOCK.read_bytes() != committed
    assert "Data and pipelines are up to date." in repro(root)


@pytest.mark.usefixtures("committed")
def test_flow_runs_share_the_run_cache() -> None:
    forget_everything()
    document = workspace.document(None, {})
    for name, outcome in (("first", "run"), ("second", "cached")):
        with workspace.use(name, name, document) as directory:
            assert [dvc_stage.run(stage, directory, print) for stage in ("shard", "train")] == [outcome] * 2


@pytest.mark.parametrize("level", ["--project", "--local"])
def test_outputs_in_a_remote_are_fetched(
    committed: bytes, root: Path, level: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    theirs = MODEL.read_text()
    storage = tmp_path_factory.mktemp("storage")
    workspace.dvc(Path(), "remote", "add", level, "storage", os.path.relpath(storage))
    workspace.dvc(Path(), "push", "--remote", "storage")
    forget_everything()
    with workspace.use("one", "id", workspace.document(None, {})) as directory:
        assert [dvc_stage.run(stage, directory, print) for stage in ("shard", "train")] == ["cached"] * 2
        assert (directory / MODEL).read_text() == theirs
    assert "done" not in repro(root)
    assert MODEL.read_text() == theirs
    assert LOCK.read_bytes() == committed


@pytest.mark.parametrize("url", ["http://127.0.0.1:1/storage", "s3://a-bucket-without-its-package", "/no/such/folder"])
@pytest.mark.usefixtures("committed")
def test_an_unreachable_remote_does_not_end_the_run(root: Path, url: str) -> None:
    workspace.dvc(Path(), "remote", "add", "--default", "away", url)
    forget_everything()
    output = repro(root)
    assert "remote 'away': cannot fetch the outputs of train: " in output
    assert "Traceback" not in output
    assert output.count("done") == 2


@pytest.mark.usefixtures("committed")
def test_outputs_in_the_working_tree_are_added_to_the_cache(root: Path) -> None:
    mine = MODEL.read_text()
    shutil.rmtree(".dvc/cache")
    assert "Data and pipelines are up to date." in repro(root)
    assert MODEL.read_text() == mine
    shutil.rmtree("models")
    assert "done" not in repro(root)
    assert MODEL.read_text() == mine


def test_a_failing_stage_leaves_the_lock_file_unchanged(committed: bytes, root: Path) -> None:
    forget_everything()
    document = yaml_files.read_yaml(Path("dvc.yaml"))
    document["stages"]["shard"]["outs"].append("data/none")
    entry = yaml_files.read_yaml(LOCK)
    entry["stages"]["shard"]["outs"].append({"path": "data/none", "hash": "md5", "md5": "0" * 32, "size": 1})
    yaml_files.write_yaml(Path("dvc.yaml"), document)
    yaml_files.write_yaml(LOCK, entry)
    before = LOCK.read_bytes()
    with pytest.raises(AssertionError, match="output 'data/none' does not exist"):
        repro(root)
    assert LOCK.read_bytes() == before != committed

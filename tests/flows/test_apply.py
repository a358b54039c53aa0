"""A run's results in the working tree."""

from pathlib import Path

import pytest

from diffusion import params
from diffusion.errors import UserError
from flows import apply, dvc_stage, workspace
from tests.flows.conftest import git


@pytest.fixture
def run(repository: Path) -> Path:
    """The workspace of a finished run with 5 steps."""
    assert Path.cwd() == repository
    with workspace.use("one", "id", workspace.document(None, {"train": {"steps": 5}})) as directory:
        for stage in ("shard", "train"):
            dvc_stage.run(stage, directory, print)
    return directory


def unchanged() -> bool:
    return "Data and pipelines are up to date." in workspace.dvc(Path(), "repro")


@pytest.mark.usefixtures("run")
def test_afterwards_dvc_repro_runs_nothing() -> None:
    apply.apply("one", force=False)
    assert params.load(Path("params.yaml")).train.steps == 5
    assert "steps: 5" in Path("models/ddpm/result").read_text()
    assert unchanged()
    apply.apply("one", force=False)


@pytest.mark.usefixtures("run")
def test_changes_that_are_not_committed_are_kept_unless_forced() -> None:
    text = Path("params.yaml").read_text().replace("seed: 0", "seed: 3")
    Path("params.yaml").write_text(text)
    with pytest.raises(UserError, match=r"params.yaml: changes that are not committed would be lost"):
        apply.apply("one", force=False)
    assert Path("params.yaml").read_text() == text
    apply.apply("one", force=True)
    assert unchanged()


@pytest.mark.usefixtures("run")
def test_committed_changes_are_overwritten() -> None:
    Path("params.yaml").write_text(Path("params.yaml").read_text().replace("seed: 0", "seed: 3"))
    git("commit", "--all", "--quiet", "--message", "seed")
    apply.apply("one", force=False)
    assert params.load(Path("params.yaml")).seed == 0


@pytest.mark.usefixtures("run")
def test_outputs_that_are_nowhere_else_are_kept_and_nothing_is_changed() -> None:
    before = Path("params.yaml").read_text()
    Path("models/ddpm").mkdir(parents=True)
    Path("models/ddpm/result").write_text("mine")
    with pytest.raises(UserError, match="without confirmation"):
        apply.apply("one", force=False)
    assert Path("models/ddpm/result").read_text() == "mine"
    assert Path("params.yaml").read_text() == before
    assert not Path("dvc.lock").exists()


@pytest.mark.usefixtures("run")
def test_changed_code_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    Path("stage.py").write_text(Path("stage.py").read_text() + "# changed\n")
    apply.apply("one", force=False)
    assert "warning: stage.py differ from the run's: `dvc repro` will run" in capsys.readouterr().err


@pytest.mark.usefixtures("repository")
def test_raw_data_come_too() -> None:
    Path("data/raw/mine").mkdir()
    Path("data/raw/mine/a.png").write_bytes(b"image")
    workspace.dvc(Path(), "add", "data/raw/mine")
    with workspace.use("one", "id", workspace.document(None, {"shard": {"source": "data/raw/mine"}})) as directory:
        dvc_stage.run("shard", directory, print)
    Path("data/raw/mine.dvc").unlink()
    Path("data/raw/mine/a.png").unlink()
    apply.apply("one", force=False)
    assert Path("data/raw/mine/a.png").read_bytes() == b"image"


@pytest.mark.usefixtures("repository")
def test_a_run_without_results_is_refused() -> None:
    with workspace.use("one", "id", workspace.document(None, {})):
        pass
    with pytest.raises(UserError, match="no stage of it has finished"):
        apply.apply("one", force=False)

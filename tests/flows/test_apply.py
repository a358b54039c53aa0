"""Applying the results of a run to the working tree."""

import shutil
from contextlib import chdir
from dataclasses import replace
from pathlib import Path

import pytest

from diffusion.errors import UserError
from flows import apply, dvc_stage, params, workspace
from flows.__main__ import main
from tests.flows.conftest import git, new_repository, restore, save

pytestmark = pytest.mark.slow
FILES = ("params.yaml", "dvc.lock")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, root: Path) -> Path:
    """A repository with a committed dvc.lock and the workspace of a finished run with 5 steps."""
    place = tmp_path_factory.mktemp("apply") / "place"
    place.mkdir()
    new_repository(place, root)
    with chdir(place):
        workspace.dvc(Path(), "repro")
        git("add", "--all")
        git("commit", "--quiet", "--message", "lock")
        with workspace.use("one", "id", workspace.document(None, {"train": {"steps": 5}})) as directory:
            for stage in ("shard", "train"):
                dvc_stage.run(stage, directory, print)
    save(place)
    return place


@pytest.fixture
def run(finished: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The workspace of the run, in a restored repository that is the working directory."""
    restore(finished)
    monkeypatch.chdir(finished)
    return workspace.find("one")


def unchanged() -> bool:
    return "Data and pipelines are up to date." in workspace.dvc(Path(), "repro")


@pytest.mark.usefixtures("run")
def test_dvc_repro_runs_nothing_afterwards() -> None:
    apply.apply("one", force=False)
    assert params.load(Path("params.yaml")).train.steps == 5
    assert "steps: 5" in Path("models/ddpm/result").read_text()
    assert unchanged()
    apply.apply("one", force=False)


@pytest.mark.usefixtures("run")
def test_uncommitted_changes_are_kept_unless_forced() -> None:
    text = Path("params.yaml").read_text().replace("seed: 0", "seed: 3")
    Path("params.yaml").write_text(text)
    with pytest.raises(UserError, match=r"params.yaml: uncommitted changes would be lost"):
        apply.apply("one", force=False)
    assert Path("params.yaml").read_text() == text
    apply.apply("one", force=True)
    assert unchanged()


def test_parameters_of_an_earlier_version_are_converted(run: Path, root: Path) -> None:
    old = root / "tests" / "format_1" / "params.yaml"
    (run / "params.yaml").write_text(old.read_text(encoding="utf-8").replace("\n  steps: 1000", "\n  steps: 7"))
    apply.apply("one", force=False)
    with pytest.raises(UserError, match=r"shard\.layout: missing; .*; `ddpm params --update` adds what is missing$"):
        params.load(Path("params.yaml"))
    assert "\n  start_from: ''\n" in Path("params.yaml").read_text(encoding="utf-8")  # dvc.yaml refers to it
    assert main(["params", "--update"]) == 0
    applied = params.load(Path("params.yaml"))
    assert applied.train.steps == 7
    assert applied.train.start_from == ""
    assert applied.train.optimizer.learning_rate == 0.01
    assert "# a GPU where there is one" in Path("params.yaml").read_text(encoding="utf-8")


@pytest.mark.usefixtures("run")
def test_committed_changes_are_overwritten() -> None:
    Path("params.yaml").write_text(Path("params.yaml").read_text().replace("seed: 0", "seed: 3"))
    git("commit", "--all", "--quiet", "--message", "seed")
    apply.apply("one", force=False)
    assert params.load(Path("params.yaml")).seed == 0


@pytest.mark.usefixtures("run")
def test_outputs_that_exist_nowhere_else_are_kept() -> None:
    before = {name: Path(name).read_text() for name in FILES}
    Path("models/ddpm/result").unlink()
    Path("models/ddpm/result").write_text("mine")
    with pytest.raises(UserError, match="without confirmation"):
        apply.apply("one", force=False)
    assert Path("models/ddpm/result").read_text() == "mine"
    assert {name: Path(name).read_text() for name in FILES} == before


@pytest.mark.parametrize("name", ["one", "raw"])
@pytest.mark.usefixtures("run")
def test_outputs_missing_in_the_cache_come_from_the_run(name: str) -> None:
    if name == "raw":
        add_raw_data()
        with workspace.use("raw", "id2", workspace.document(None, {"shard": {"source": "data/raw/mine"}})) as directory:
            for stage in ("shard", "train"):
                dvc_stage.run(stage, directory, print)
        for file in (Path("data/raw/mine.dvc"), Path("data/raw/mine/a.png")):
            file.unlink()
    expected = (workspace.find(name) / "models/ddpm/result").read_text()
    workspace.dvc(Path(), "gc", "--workspace", "--force")
    shutil.rmtree("models")
    apply.apply(name, force=False)
    assert Path("models/ddpm/result").read_text() == expected
    assert unchanged()
    if name == "raw":
        assert Path("data/raw/mine/a.png").read_bytes() == b"image"


def add_raw_data() -> None:
    Path("data/raw/mine").mkdir()
    Path("data/raw/mine/a.png").write_bytes(b"image")
    workspace.dvc(Path(), "add", "data/raw/mine")


def test_if_an_output_is_nowhere_everything_is_restored(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def tree() -> dict[str, str]:
        names = [*FILES, "models/ddpm/result", "data/shards/result"]
        return {name: Path(name).read_text() for name in names if Path(name).exists()}

    shutil.rmtree("data/shards")
    before = tree()
    # Replacing the run's model leaves no other copy of it.
    for file in Path(".dvc/cache/files").rglob("*"):
        if file.is_file() and b"\n  steps: 5\n" in file.read_bytes():
            file.chmod(0o644)
            file.unlink()
    (run / "models/ddpm/result").unlink()
    (run / "models/ddpm/result").write_text("damaged")
    for force in (False, True):
        with pytest.raises(UserError, match=r"missing|cache"):
            apply.apply("one", force=force)
        assert tree() == before
    assert "are now those" not in capsys.readouterr().out


@pytest.mark.usefixtures("run")
def test_a_failed_run_is_rejected_although_it_has_a_lock_file() -> None:
    with pytest.raises(RuntimeError), workspace.use("bad", "id", workspace.document(None, {"train": {"steps": 5}})):
        raise RuntimeError
    with pytest.raises(UserError, match="run 'bad': failed; only completed runs can be applied"):
        apply.apply("bad", force=False)
    assert params.load(Path("params.yaml")).train.steps == 1000
    lost = workspace.find("bad")
    replace(workspace.Run.read(lost), state="running").write(lost)
    with pytest.raises(UserError, match="crashed"):
        apply.apply("bad", force=False)


@pytest.mark.usefixtures("run")
def test_changed_code_is_reported(capsys: pytest.CaptureFixture[str]) -> None:
    Path("stage.py").write_text(Path("stage.py").read_text() + "# changed\n")
    apply.apply("one", force=False)
    assert "warning: differs from the run: stage.py; `dvc repro` will rerun" in capsys.readouterr().err


@pytest.mark.usefixtures("repository")
def test_raw_data_are_applied_and_conflicts_reported(capsys: pytest.CaptureFixture[str]) -> None:
    add_raw_data()
    with workspace.use("one", "id", workspace.document(None, {"shard": {"source": "data/raw/mine"}})) as directory:
        dvc_stage.run("shard", directory, print)
    Path("data/raw/mine.dvc").unlink()
    Path("data/raw/mine/a.png").unlink()
    apply.apply("one", force=False)
    assert Path("data/raw/mine/a.png").read_bytes() == b"image"
    Path("data/raw/mine/b.png").write_bytes(b"another")
    workspace.dvc(Path(), "add", "data/raw/mine")
    apply.apply("one", force=False)
    assert "warning: differs from the run: data/raw/mine.dvc" in capsys.readouterr().err


def test_a_damaged_lock_file_is_reported(run: Path) -> None:
    (run / "dvc.lock").write_text("stages: [")
    with pytest.raises(UserError, match=r"one/dvc\.lock: not a valid DVC lock file; restore or delete it"):
        apply.apply("one", force=True)

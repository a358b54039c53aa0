"""Machines that share git, a DVC remote and MLflow, and no folder."""

import shutil
import subprocess
from contextlib import chdir
from pathlib import Path

import mlflow
import pytest

from diffusion.errors import UserError
from flows import dvc_stage, pipeline, published, teacher, workspace
from flows.__main__ import main
from flows.environment import PUSH
from flows.tracking import names
from tests.flows.conftest import git, new_repository, restore, save
from tests.flows.test_distill_ddpm import DVC_YAML, STUDENT_PY

pytestmark = pytest.mark.slow

CHANGES = {"train": {"steps": 5}}
RESULT = "models/ddpm/result"


def bare(place: Path, root: Path) -> Path:
    """A new bare repository that names a DVC remote."""
    (first := place / "first").mkdir(parents=True)
    new_repository(first, root)
    with Path(first, ".dvc/config").open("a") as config:  # as `dvc remote add --default` writes it
        config.write(f"    remote = storage\n['remote \"storage\"']\n    url = {place / 'storage'}\n")
    git("-C", str(first), "commit", "--quiet", "--all", "--message", "remote")
    git("clone", "--quiet", "--bare", str(first), str(place / "origin.git"))
    return place / "origin.git"


@pytest.fixture
def origin(tmp_path: Path, root: Path) -> Path:
    return bare(tmp_path, root)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, root: Path) -> Path:
    """A folder with such a repository, and with the machine `a`, on which the run `one` was made and pushed."""
    place = tmp_path_factory.mktemp("sharing") / "place"
    run(clone(bare(place, root), "a"), "one")
    save(place)
    return place


@pytest.fixture
def one(shared: Path) -> Path:
    """The workspace of this run, after what other tests did was undone."""
    restore(shared)
    return shared / "a/.ddpm/runs/one"


def origin_of(directory: Path) -> Path:
    """The repository of which a machine with this workspace has a clone."""
    return directory.parents[3] / "origin.git"


def clone(origin: Path, name: str) -> Path:
    git("clone", "--quiet", str(origin), str(origin.with_name(name)))
    return origin.with_name(name)


def run(machine: Path, name: str) -> tuple[Path, list[str], list[str]]:
    """A run of both stages: its workspace, their outcomes, and warnings."""
    warnings = list[str]()
    with chdir(machine), workspace.use(name, f"id-{name}", workspace.document(None, CHANGES)) as directory:
        outcomes: list[str] = [dvc_stage.run(stage, directory, print) for stage in ("shard", "train")]
        pipeline._push(directory, warnings.append)
    return directory, outcomes, warnings


def test_results_of_one_machine_are_taken_by_others(origin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PUSH, "true")
    first, outcomes, warnings = run(clone(origin, "a"), "one")
    assert (outcomes, warnings) == (["run", "run"], [])
    stored = {file: file.stat().st_mtime_ns for file in origin.with_name("storage").rglob("*") if file.is_file()}
    assert len([file for file in stored if "runs" in file.parts]) == 2  # a record of each stage
    second, outcomes, _ = run(clone(origin, "b"), "two")
    assert outcomes == ["cached", "cached"]
    assert stored == {file: file.stat().st_mtime_ns for file in stored}  # nothing is written again
    assert (second / RESULT).read_bytes() == (first / RESULT).read_bytes()
    monkeypatch.delenv(PUSH)  # a machine of its own asks no remote
    _, outcomes, _ = run(clone(origin, "c"), "three")
    assert outcomes == ["run", "run"]


def test_a_remote_that_fails_costs_no_run(
    origin: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(PUSH, "true")
    machine = clone(origin, "a")
    (origin.with_name("storage")).write_text("not a folder")
    directory, outcomes, (warning,) = run(machine, "one")
    assert outcomes == ["run", "run"]
    said = capsys.readouterr().out
    for stage in ("shard", "train"):
        assert f"DVC remote: nothing pushed of {stage}: " in said
    assert warning.startswith("not pushed (dvc push: ")
    assert warning.endswith(f"; the results are in {directory} alone: run `dvc push --run-cache` there")


def test_whether_to_push_is_decided_by_the_environment(origin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pushed = list[Path]()
    monkeypatch.setattr(pipeline, "_push", lambda directory, _: pushed.append(directory))
    monkeypatch.setattr(pipeline, "_track", lambda *_: None)
    monkeypatch.setattr(pipeline.summary, "collect", lambda *_: None)
    monkeypatch.setattr(pipeline.summary, "write", lambda *_: None)
    monkeypatch.chdir(clone(origin, "a"))
    plan, warned = pipeline.Plan(workspace.document(None, CHANGES)), list[str]()
    Path("requirements.lock").write_text("".join(f"never-there{number}==1.5\n" for number in range(5)))
    for value, count in (("true", 1), ("false", 1), (None, 1), ("1", 2)):
        monkeypatch.setenv(PUSH, value) if value else monkeypatch.delenv(PUSH)
        name = f"run-{value}"
        pipeline.run(pipeline.Run(name, name), plan, lambda *_: "cached", lambda *_: None, print, warned.append)
        assert len(pushed) == len(warned) == count
    assert warned[0] == (
        "this worker's packages differ from those of the deployed commit: "
        + "; ".join(f"never-there{number} is missing here, and 1.5 in requirements.lock" for number in range(3))
        + ", and 2 others"
    )
    monkeypatch.setenv(PUSH, "perhaps")
    with pytest.raises(UserError, match="DDPM_PUSH: input should be a valid boolean"):
        pipeline.run(pipeline.Run("wrong", "wrong"), plan, lambda *_: "cached", lambda *_: None, print, print)


def recorded(directory: Path, files: tuple[str, ...] = ("dvc.lock", "params.yaml"), status: str = "FINISHED") -> None:
    """Record a run in MLflow, as `record` does."""
    client, ran = mlflow.MlflowClient(), workspace.Run.read(directory)
    experiment = client.get_experiment_by_name("ddpm")
    number = experiment.experiment_id if experiment else client.create_experiment("ddpm")
    tags = {f"{names.HIDDEN}flow_run_id": ran.flow_run_id, "mlflow.source.git.commit": ran.git_revision}
    tags |= {f"{names.HIDDEN}teacher": ran.teacher} if ran.teacher else {}
    found = client.create_run(number, run_name=ran.name, tags=tags | {names.GIT_DIRTY: "false"})
    for file in files:
        client.log_artifact(found.info.run_id, str(directory / file))
    client.set_terminated(found.info.run_id, status)


@pytest.fixture
def store(tmp_path: Path, mlflow_database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copyfile(mlflow_database, tmp_path / "mlflow.db")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.chdir(tmp_path)
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")


@pytest.mark.usefixtures("store")
def test_a_run_is_fetched_and_applied(one: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recorded(one)
    user = clone(origin_of(one), "b")
    git("-C", str(user), "commit", "--quiet", "--allow-empty", "--message", "later")
    with chdir(user):
        assert main(["fetch", "one"]) == 0
        said = capsys.readouterr().out
        assert said.endswith("Fetched run one: the outputs of shard, train, in .ddpm/runs/one\n")
        ran, here = workspace.Run.read(Path(".ddpm/runs/one")), workspace.Run.read(one)
        assert (ran.flow_run_id, ran.git_revision, ran.state) == ("id-one", here.git_revision, "completed")
        assert ran.created <= ran.ended
        assert Path(".ddpm/runs/one", RESULT).read_bytes() == (one / RESULT).read_bytes()
        assert main(["apply", "one"]) == 0
        assert Path(RESULT).read_bytes() == (one / RESULT).read_bytes()
        assert "are up to date" in workspace.dvc(Path(), "repro")
        assert main(["fetch", "one"]) == 1
        assert "run 'one': already here; `ddpm apply one`" in capsys.readouterr().err


@pytest.mark.usefixtures("store")
def test_a_worker_fetches_the_teacher_of_a_distillation(one: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded(one)
    with chdir(clone(origin_of(one), "b")):
        with pytest.raises(UserError, match="run 'one': not found; there are no runs yet"):
            teacher.find("one")
        monkeypatch.setenv(PUSH, "true")
        with pytest.raises(UserError, match=r"no run of train-ddpm has completed here yet.*-p run=NAME takes one"):
            teacher.find(None)
        assert (teacher.find("one") / RESULT).read_bytes() == (one / RESULT).read_bytes()


@pytest.mark.usefixtures("store")
def test_a_distillation_is_fetched_with_its_teacher(
    origin: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(PUSH, "true")
    machine = clone(origin, "a")
    (machine / "distill").mkdir()
    (machine / "distill/dvc.yaml").write_text(DVC_YAML)
    (machine / "student.py").write_text(STUDENT_PY)
    git("-C", str(machine), "add", "--all")
    git("-C", str(machine), "commit", "--quiet", "--message", "distillation")
    git("-C", str(machine), "push", "--quiet", "origin", "HEAD")
    one, _, _ = run(machine, "one")
    recorded(one)
    with chdir(machine), workspace.use("stu", "id-stu", teacher.document(one, {}), one) as directory:
        for stage in ("distill", "evaluate-student", "export-student"):
            dvc_stage.run(stage, directory, print)
    recorded(directory, ("distill/dvc.lock", "params.yaml"))
    with chdir(clone(origin, "b")):
        assert main(["fetch", "stu"]) == 0
        said = capsys.readouterr().out.splitlines()
        assert [line.partition(":")[0] for line in said if line.startswith("Fetched")] == [
            "Fetched run one",
            "Fetched run stu",
        ]
        assert workspace.Run.read(Path(".ddpm/runs/stu")).teacher == "one"
        assert main(["apply", "stu"]) == 0
        for path in (RESULT, "models/student/result", "models/student-onnx/sampler.onnx"):
            assert Path(path).read_bytes() == (directory / path).read_bytes()
        assert "are up to date" in workspace.dvc(Path(), "repro")
        assert "are up to date" in workspace.dvc(Path(), "repro", "distill/dvc.yaml")
    other = clone(origin, "c")
    monkeypatch.setitem(CHANGES, "train", {"steps": 6})
    run(other, "one")
    capsys.readouterr()
    with chdir(other):
        assert main(["fetch", "stu"]) == 1
        assert "'stu': distilled from a run 'one' with another models/ddpm than the one here" in capsys.readouterr().err
        assert not Path(".ddpm/runs/stu").exists()


@pytest.mark.usefixtures("store")
def test_runs_that_cannot_be_fetched(one: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with chdir(clone(origin_of(one), "b")):
        recorded(one, status="FAILED")

        def refused() -> str:
            assert main(["fetch", "one"]) == 1
            error = capsys.readouterr().err
            assert error.count("\n") == 1
            assert not list(Path(".ddpm/runs").glob("[!.]*"))
            assert not list(Path(".ddpm/runs").glob(".*.part"))
            return error

        assert "run 'one': neither here nor completed in MLflow (sqlite:///" in refused()
        recorded(one, ("params.yaml",))
        assert "run 'one': MLflow has no dvc.lock of it" in refused()
        ran = workspace.Run.read(one)
        workspace.replace(ran, git_revision="0" * 40).write(one)
        recorded(one)
        assert "git fetch: " in refused()
        workspace.replace(ran, git_revision="--upload-pack=touch ran;").write(one)  # as anybody can write in MLflow
        recorded(one)
        assert "MLflow does not know its commit" in refused()
        assert main(["fetch", "../one"]) == 1
        assert "run '../one': not the name of a flow run" in capsys.readouterr().err
        ran.write(one)
        recorded(one)
        for file in origin_of(one).with_name("storage").rglob("*"):
            if file.is_file():
                file.unlink()
        assert "dvc pull" in refused()


def test_only_a_commit_that_others_have_is_deployed(
    origin: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(clone(origin, "a"))
    assert published.main(["commit"]) == 0
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout
    assert capsys.readouterr().out == head
    Path("untracked").touch()
    assert published.main(["commit"]) == 0
    Path("stage.py").write_text("changed")
    assert published.main(["commit"]) == 1
    assert "not deployed: stage.py: has uncommitted changes" in capsys.readouterr().err
    git("commit", "--quiet", "--all", "--message", "changed")
    assert published.main(["commit"]) == 1
    assert "not pushed yet" in capsys.readouterr().err
    git("push", "--quiet", "origin", "HEAD")
    assert published.main(["commit"]) == 0
    capsys.readouterr()
    for url in ("git@github.com:team/ddpm.git", "ssh://git@host/ddpm", str(origin), "https://host/team/ddpm"):
        git("remote", "set-url", "origin", url)
        assert published.main(["repository"]) == 0
        assert capsys.readouterr().out == f"{url}\n"
    for url in ("https://me:CANARY@host/ddpm", "https://CANARY@host/ddpm", "ssh://git:CANARY@host/ddpm"):
        git("remote", "set-url", "origin", url)
        assert published.main(["repository"]) == 1
        error = capsys.readouterr().err
        assert error.startswith("not deployed: remote origin: its address contains a password")
        assert "CANARY" not in error


def test_raw_data_come_from_the_remote(origin: Path) -> None:
    with chdir(clone(origin, "a")):
        Path("data/raw/mine").mkdir()
        Path("data/raw/mine/a.png").write_bytes(b"image")
        workspace.dvc(Path(), "add", "data/raw/mine")
        workspace.dvc(Path(), "push")
        git("add", "data/raw")
        git("commit", "--quiet", "--message", "images")
        git("push", "--quiet", "origin", "HEAD")
    with chdir(clone(origin, "b")):
        document = workspace.document(None, {"shard": {"source": "data/raw/mine"}})
        with workspace.use("one", "id", document) as directory:
            assert (directory / "data/raw/mine/a.png").read_bytes() == b"image"

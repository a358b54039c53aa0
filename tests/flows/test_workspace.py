"""Creating, isolating, cleaning up and finding workspaces."""

import json
import signal
import subprocess
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from prefect.exceptions import TerminationSignal

from diffusion.errors import UserError
from flows import dvc_config, dvc_stage, params, run_list, summary, workspace
from tests.flows.conftest import git

pytestmark = pytest.mark.slow

RUNS = Path(".ddpm/runs")


def make(name: str, changes: Mapping[str, Any] | None = None) -> Path:
    with workspace.use(name, f"id-{name}", workspace.document(None, changes or {})) as directory:
        return directory


def age(name: str, days: float) -> None:
    file = RUNS / name / "run.json"
    ended = (datetime.now(UTC) - timedelta(days=days)).isoformat()
    file.write_text(json.dumps(json.loads(file.read_text()) | {"ended": ended}))


def state(name: str) -> str:
    return workspace.Run.read(RUNS / name).state


@pytest.mark.usefixtures("repository")
def test_it_has_the_current_files_and_the_parameters_of_the_run() -> None:
    Path("new.py").write_text("new")
    Path("stage.py").write_text("changed")
    Path(".ddpm/secret").parent.mkdir()
    Path(".ddpm/secret").write_text("state")
    directory = make("one", {"train": {"steps": 5}})
    assert (directory / "new.py").read_text() == "new"
    assert (directory / "stage.py").read_text() == "changed"
    assert (directory / ".ddpm" / "secret").read_text() == "state"
    assert params.load(directory / "params.yaml").train.steps == 5
    assert "# a GPU if available" in (directory / "params.yaml").read_text()
    run = workspace.Run.read(directory)
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    assert (run.name, run.flow_run_id, run.git_revision, run.git_dirty) == ("one", "id-one", head, True)
    assert datetime.fromisoformat(run.created).tzinfo is UTC


@pytest.mark.usefixtures("repository")
def test_the_state_is_how_the_block_ends() -> None:
    document = workspace.document(None, {})
    for error, expected in (
        (RuntimeError(), "failed"),
        (KeyboardInterrupt(), "cancelled"),
        (TerminationSignal(signal.SIGTERM), "cancelled"),
        (SystemExit(128 + signal.SIGTERM), "cancelled"),
        (SystemExit(1), "crashed"),
        (GeneratorExit(), "crashed"),
    ):
        name = repr(error)
        with pytest.raises(type(error)), workspace.use(name, name, document) as directory:
            raise AssertionError if state(directory.name) != "running" else error
        assert state(directory.name) == expected
    make("one")
    assert state("one") == "completed"


@pytest.mark.usefixtures("repository")
def test_a_restarted_run_keeps_its_workspace_unlike_a_namesake() -> None:
    document = workspace.document(None, {})
    with workspace.use("one", "first", document) as first:
        (first / "mark").touch()
    with workspace.use("one", "first", document) as again:
        assert (again / "mark").exists()
    with workspace.use("one", "second-run", document) as other:
        assert other.name == "one-second-r"
    with workspace.use("../a b", "third", document) as odd:
        assert odd.parent == first.parent


@pytest.mark.usefixtures("repository")
def test_a_trial_continues_in_its_workspace_unless_its_parameters_are_others() -> None:
    def begin(flow_run_id: str, sweep: str, seed: int) -> str:
        with workspace.use("lr-0", flow_run_id, workspace.document(None, {"seed": seed}), sweep=sweep) as directory:
            run = workspace.Run.read(directory)
        assert (run.flow_run_id, run.sweep) == (flow_run_id, sweep)
        return directory.name

    assert begin("first-id", "lr", 1) == "lr-0"
    assert begin("another1", "lr", 1) == "lr-0"
    assert begin("another2", "lr", 2) == "lr-0-another2"
    assert begin("another3", "", 1) == "lr-0-another3"
    assert begin("another4", "other", 1) == "lr-0-another4"


@pytest.mark.usefixtures("repository")
def test_a_workspace_in_use_is_locked() -> None:
    document = workspace.document(None, {})
    with workspace.use("one", "first", document):
        with (
            pytest.raises(UserError, match="run 'one' is running in another"),
            workspace.use("one", "first", {}),
        ):
            pass
        with workspace.use("one", "second-run", document) as other:
            assert other.name == "one-second-r"


@pytest.mark.usefixtures("repository")
def test_concurrent_runs_can_clean_up(monkeypatch: pytest.MonkeyPatch) -> None:
    document = workspace.document(None, {})
    for number in range(6):
        make(f"old{number}")
    monkeypatch.setenv("DDPM_KEEP_RUNS", "0")

    def start(number: int) -> str:
        with workspace.use("new", f"{number}-flow-run", document) as directory:
            started.wait(60)
            return directory.name

    started = threading.Barrier(3)
    with ThreadPoolExecutor() as pool:
        names = list(pool.map(start, range(3)))
    assert sorted(names)[0] == "new"
    assert len(set(names)) == 3
    assert list(RUNS.glob("old*")) == []


@pytest.mark.usefixtures("repository")
def test_a_long_run_is_not_removed_when_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DDPM_KEEP_DAYS", "10")
    directory = make("long")
    started = (datetime.now(UTC) - timedelta(days=15)).isoformat()
    replace(workspace.Run.read(directory), created=started).write(directory)
    make("next")
    assert directory.exists()


@pytest.mark.usefixtures("repository")
def test_a_workspace_deleted_during_listing_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    make("one")
    gone = make("gone")
    monkeypatch.setattr(Path, "glob", lambda *_: iter([gone / "run.json", RUNS / "one" / "run.json"]))
    (gone / "run.json").unlink()
    assert workspace.find("o").name == "one"


@pytest.mark.usefixtures("repository")
def test_untracked_files_and_dvc_lock_do_not_make_it_dirty() -> None:
    Path("dvc.lock").write_text("schema: '2.0'\nstages: {}\n")
    git("add", "--all")
    git("commit", "--quiet", "--message", "lock")
    Path("dvc.lock").write_text("schema: '2.0'\n")
    Path("new.py").touch()
    assert not workspace.Run.read(make("one")).git_dirty
    Path("stage.py").write_text("changed")
    assert workspace.Run.read(make("two")).git_dirty


@pytest.mark.usefixtures("repository")
def test_runs_share_the_cache() -> None:
    assert dvc_stage.run("shard", make("one"), print) == "run"
    assert dvc_stage.run("shard", make("two"), print) == "cached"
    assert dvc_stage.run("shard", make("three", {"shard": {"val_fraction": 0.2}}), print) == "run"


@pytest.mark.usefixtures("repository")
def test_old_and_surplus_workspaces_are_removed_unless_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(5):
        make(f"run{number}")
        age(f"run{number}", 5 - number)
    make("old")
    age("old", 15)
    (RUNS / ".half.part").mkdir()
    monkeypatch.setenv("DDPM_KEEP_RUNS", "3")
    monkeypatch.setenv("DDPM_KEEP_DAYS", "10")
    with workspace._lock((RUNS / "run0").absolute()):
        make("new")
    assert sorted(path.name for path in RUNS.glob("[!.]*")) == ["new", "run0", "run2", "run3", "run4"]
    assert not (RUNS / ".half.part").exists()
    assert Path(".ddpm").is_dir()


@pytest.mark.usefixtures("repository")
def test_an_error_while_creating_it_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise UserError("no cache")

    monkeypatch.setattr(dvc_config, "write", fail)
    with pytest.raises(UserError, match="no cache"):
        make("one")
    assert list(RUNS.glob("[!.]*")) == []


def test_a_missing_git_is_reported(tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "params.yaml").write_bytes((root / "params.yaml").read_bytes())
    with pytest.raises(UserError, match="not a git repository"):
        make("one")


@pytest.mark.usefixtures("repository")
def test_raw_data_tracked_by_dvc_come_from_the_cache() -> None:
    Path("data/raw/mine").mkdir()
    Path("data/raw/mine/a.png").write_bytes(b"image")
    workspace.dvc(Path(), "add", "data/raw/mine")
    changes = {"shard": {"source": "data/raw/mine"}}
    assert (make("one", changes) / "data/raw/mine/a.png").read_bytes() == b"image"
    for file in Path(".dvc/cache/files").rglob("*"):
        if file.is_file():
            file.unlink()
    with pytest.raises(UserError, match=r"mine.dvc: its data are not in the DVC cache, and no remote"):
        make("two", changes)


@pytest.mark.usefixtures("repository")
def test_images_at_a_url_stay_there() -> None:
    assert make("one", {"shard": {"source": "s3://bucket/pictures.zip"}}).is_dir()


@pytest.mark.usefixtures("repository")
def test_untracked_raw_data_are_rejected() -> None:
    Path("mine/.gitignore").parent.mkdir()
    Path("mine/.gitignore").write_text("*\n")
    with pytest.raises(UserError, match="mine is tracked by neither git nor DVC"):
        make("one", {"shard": {"source": "mine"}})
    with pytest.raises(UserError, match=r"shard.source: absent: no such file"):
        make("two", {"shard": {"source": "absent"}})


@pytest.mark.usefixtures("repository")
def test_changes_override_the_preset_which_overrides_params_yaml() -> None:
    document = workspace.document("short", {"train": {"batch_size": 4}, "seed": 9})
    assert (document["train"]["steps"], document["train"]["batch_size"], document["seed"]) == (7, 4, 9)
    with pytest.raises(UserError, match="available: short"):
        workspace.document("shrt", {})
    with pytest.raises(UserError, match=r"sample.steps .* exceeds"):
        workspace.document(None, {"sample": {"steps": 5000}})


@pytest.mark.usefixtures("repository")
def test_find_and_list(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="there are no runs yet"):
        workspace.find("x")
    for name in ("red-fox", "red-hen", "red"):
        directory = make(name)
    (directory / "reports").mkdir()
    (directory / "reports" / "evaluate.json").write_text('{"mse": 0.25}')
    assert workspace.find("red-f").name == "red-fox"
    assert workspace.find("red").name == "red"
    with pytest.raises(UserError, match="ambiguous; matches red-fox, red-hen"):
        workspace.find("red-")
    with pytest.raises(UserError, match="not found; available:"):
        workspace.find("blue")
    lost = workspace.Run.read(RUNS / "red-fox")
    workspace.Run(**{**vars(lost), "state": "running"}).write(RUNS / "red-fox")
    run_list.show()
    table, kept = capsys.readouterr().out.split("\n\n")
    assert "last 20 runs (DDPM_KEEP_RUNS)" in kept
    assert "14 days ago (DDPM_KEEP_DAYS)" in kept
    rows = {line.split()[0]: line.split()[3:] for line in table.splitlines()[1:]}
    assert rows == {"red-fox": ["crashed"], "red-hen": ["completed"], "red": ["completed", "0.2500"]}


@pytest.mark.usefixtures("repository")
def test_damaged_runs_are_reported_and_the_others_listed(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("red", "green", "blue"):
        make(name)
    (RUNS / "red" / "run.json").write_text("")
    (RUNS / "green" / "reports").mkdir()
    (RUNS / "green" / "reports" / "evaluate.json").write_text("[]")
    run_list.show()
    output = capsys.readouterr()
    assert "red/run.json: damaged; delete" in output.err
    rows = {line.split()[0]: line.split()[3:] for line in output.out.split("\n\n")[0].splitlines()[1:]}
    assert rows == {"green": ["completed", "damaged"], "blue": ["completed"]}
    with pytest.raises(UserError, match=r"^\.ddpm/runs/red/run\.json: damaged; delete \.ddpm/runs/red, which"):
        workspace.find("re")
    with pytest.raises(UserError, match=r"not found; available: blue, green, red$"):
        workspace.find("pink")
    assert workspace.find("gr") == RUNS / "green"
    capsys.readouterr()
    (RUNS / "blue" / "summary.json").write_text('{"stages": 1}')
    with pytest.raises(UserError, match=r"blue/summary\.json: damaged"):
        summary.read(RUNS / "blue")


@pytest.mark.usefixtures("repository")
def test_the_users_own_cache_is_used() -> None:
    workspace.dvc(Path(), "cache", "dir", "--local", "elsewhere")
    git("status")
    assert workspace.dvc(make("one"), "cache", "dir") == str(Path("elsewhere").absolute())


@pytest.mark.usefixtures("repository")
def test_the_users_remotes_are_used_wherever_they_are_configured() -> None:
    workspace.dvc(Path(), "remote", "add", "--default", "shared", "../storage")
    workspace.dvc(Path(), "remote", "add", "--local", "mine", "../my storage")
    workspace.dvc(Path(), "remote", "modify", "--local", "mine", "verify", "true")
    settings = {line.split("=")[0]: line.split("=")[1] for line in dvc_settings(make("one"))}
    for name, folder in (("shared", "storage"), ("mine", "my storage")):
        url = Path(RUNS / "one" / ".dvc" / settings[f"remote.{name}.url"])
        assert url.resolve() == (Path().absolute().parent / folder).resolve()
    assert settings["core.remote"] == "shared"
    assert settings["remote.mine.verify"] == "true"


def dvc_settings(directory: Path) -> list[str]:
    return workspace.dvc(directory, "config", "--list", "--local").splitlines()


@pytest.mark.usefixtures("repository")
def test_a_configuration_rejected_by_dvc_gives_one_line() -> None:
    Path(".dvc/config").write_text("[core]\n    analytics = perhaps\n")
    with pytest.raises(UserError, match=r"DVC's configuration: .*analytics") as error:
        make("one")
    assert "\n" not in str(error.value)

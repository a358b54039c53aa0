"""`ddpm gc`: what goes, what never goes, and a full disk."""

import os
import resource
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import zc.lockfile
from filelock import Timeout

from diffusion.storage.files import sha256
from flows import workspace
from flows.fingerprint import lock_of
from flows.garbage import collect
from flows.tracking import garbage as mlflow_garbage
from flows.tracking.garbage import Named
from tests.flows.garbage.conftest import (
    MB,
    RUNS,
    aged,
    contents,
    disk_usage,
    found,
    gc,
    in_cache,
    left,
    lock,
    run,
    stored,
    write,
)


@pytest.fixture
def named(monkeypatch: pytest.MonkeyPatch) -> Callable[[Named], None]:
    """Gives a version in MLflow an alias."""

    def name(version: Named) -> None:
        monkeypatch.setattr(mlflow_garbage, "named", lambda _: [version])

    return name


def test_runs_go_by_their_number_and_age() -> None:
    for days in (0, 10, 20, 40):
        run(f"run{days}", days)
    assert found()["runs"] == []
    assert found("--keep", "2")["runs"] == ["run40", "run20"]
    assert found("--older-than", "15d")["runs"] == ["run40", "run20"]
    assert found("--keep", "3", "--older-than", "15d")["runs"] == ["run40"]
    assert left() == ["run0", "run10", "run20", "run40"]
    assert found("--keep", "3", "--older-than", "2w", "--force")["runs"] == ["run40"]
    assert left() == ["run0", "run10", "run20"]


def test_without_force_it_deletes_nothing() -> None:
    stored(b"unused")
    run("old", 99)
    aged(write(Path("data/.shards.abcdefgh/a.tar")).parent, 2)
    write(Path(".ddpm/checkpoints/0123/step.pt"))
    before = contents()
    done = gc("--keep", "0", "--older-than", "1h")
    assert contents() == before
    assert done.stdout.endswith("\n\nNothing was deleted; `ddpm gc --keep 0 --older-than 1h --force` deletes it.\n")


def test_the_sizes_are_those_of_the_disk_and_what_goes_is_freed() -> None:
    shared = write(Path(".dvc/cache/files/md5/00") / ("1" * 30), 4 * MB)
    os.link(shared, run("old", 9) / "shards.tar")
    write(RUNS / "old/models/onnx/sampler.onnx", 2 * MB)
    write(run("new") / "samples.png", MB)
    write(Path(".ddpm/prefect/prefect.db"), 3 * MB)
    before = disk_usage(Path(".ddpm"), Path(".dvc/cache"))
    shown = found("--keep", "1")
    assert {name: part["bytes"] // MB for name, part in shown["parts"].items()} == {
        "DVC cache": 4, "runs": 3, "checkpoints": 0, "features": 0, "MLflow": 0, "leftovers": 0, "other": 3
    }  # fmt: skip
    folders = 2  # .ddpm and .ddpm/runs themselves
    assert before - shown["bytes"] <= folders * 4096
    deleted = found("--keep", "1", "--force")
    assert shown | {"deleted": True} == deleted
    assert deleted["freed"] == before - disk_usage(Path(".ddpm"), Path(".dvc/cache")) >= 6 * MB


def test_the_table() -> None:
    write(run("old", 9) / "samples.png", 2 * MB)
    run("new")
    done = gc("--keep", "1", "--force")
    rows = {line[:11].strip(): line[11:].split() for line in done.stdout.split("\n\n")[0].splitlines()}
    assert rows[""] == ["SIZE", "DELETED"]
    assert rows["runs"][:2] == rows["runs"][2:4] == ["2.1", "MB"]
    assert " ".join(rows["runs"][4:]) == "1 of 2: all but the newest 1"
    assert rows["total"] == ["2.1", "MB", "2.1", "MB"]
    assert done.stdout.endswith("\n\nruns deleted: old\n")
    assert (done.returncode, done.stderr) == (0, "")


def test_an_active_run_and_its_teacher_never_go() -> None:
    teacher, other = run("teacher", 9, digests=[stored(b"teacher")]), run("other", 9, digests=[stored(b"other")])
    student = run("student", 8, teacher="teacher", digests=[stored(b"student")])
    replace(workspace.Run.read(student), state="running", ended="").write(student)
    with workspace._lock(student.absolute()):
        done = found("--keep", "0", "--force")
    assert done["kept"] == {"teacher": "teacher of student", "student": "active"}
    assert [directory.exists() for directory in (teacher, other, student)] == [True, False, True]
    assert [in_cache(content) for content in (b"teacher", b"student", b"other")] == [True, True, False]
    assert found("--keep", "0", "--force")["runs"] == ["teacher", "student"]  # the student has crashed


def test_the_runs_of_a_version_with_an_alias_never_go(named: Callable[[Named], None]) -> None:
    for name in ("trained", "exported", "other", "teacher"):
        run(name, 9)
    run("student", 9, teacher="teacher")
    named(Named("champion of ddpm", frozenset({"id-trained", "id-exported", "id-gone"}), "", []))
    assert found("--keep", "0")["kept"] == dict.fromkeys(("trained", "exported"), "champion of ddpm")
    named(Named("champion of ddpm-student", frozenset({"id-student"}), "", []))
    assert found("--older-than", "1d", "--force")["kept"] == {
        "teacher": "teacher of student", "student": "champion of ddpm-student"
    }  # fmt: skip
    assert left() == ["student", "teacher"]


def test_a_run_with_the_same_model_as_such_a_version_never_goes(named: Callable[[Named], None]) -> None:
    sampler = write(run("same", 9) / "models/onnx/sampler.onnx", 100)
    write(run("other", 9) / "models/onnx/sampler.onnx", 101)
    student = run("student", 9, teacher="other")
    os.link(sampler, write(student / "models/onnx/x", 1).with_name("sampler.onnx"))  # its teacher's
    write(student / "models/student-onnx/sampler.onnx", 102)
    named(Named("challenger of ddpm", frozenset(), sha256(sampler), []))
    assert found("--keep", "0")["kept"] == {"same": "challenger of ddpm"}
    named(Named("champion of s", frozenset(), sha256(student / "models/student-onnx/sampler.onnx"), []))
    assert found("--keep", "0")["kept"] == {"other": "teacher of student", "student": "champion of s"}


def test_what_a_commit_a_run_or_a_version_with_an_alias_uses_stays_in_the_cache(
    named: Callable[[Named], None],
) -> None:
    Path("dvc.lock").write_text(lock(stored(b"here")))
    run("new", digests=[stored(b"new")])
    run("old", 9, digests=[stored(b"old")])
    damaged = run("damaged", 9, digests=[stored(b"damaged")])
    (damaged / "run.json").write_text("{")
    named(Named("champion of ddpm", frozenset({"id-gone"}), "", [lock(stored(b"champion")).encode()]))
    gc("--keep", "1", "--force")
    assert [in_cache(each) for each in (b"here", b"new", b"damaged", b"champion", b"old")] == [True] * 4 + [False]
    assert left() == ["damaged", "new"]


def test_a_cache_elsewhere_is_not_touched(tmp_path_factory: pytest.TempPathFactory) -> None:
    elsewhere = tmp_path_factory.mktemp("shared")
    write(elsewhere / "files/md5/00/1", 10)
    Path(".dvc/config.local").write_text(f"[cache]\n    dir = {elsewhere}\n")
    assert "outside of the repository" in gc("--keep", "0", "--force").stdout
    assert (elsewhere / "files/md5/00/1").exists()


def test_checkpoints_go_by_the_same_rules_unless_in_use() -> None:
    for name, days in (("a", 50), ("b", 40), ("c", 1)):
        aged(write(Path(f".ddpm/checkpoints/{name}/step.pt")).parent, days)
    checkpoints = Path(".ddpm/checkpoints")
    with workspace._lock(run("active").absolute()):
        assert (
            "0 of 3 interrupted trainings, none while a run or stage is active" in gc("--keep", "0", "--force").stdout
        )
    assert found("--keep", "2")["parts"]["checkpoints"]["freed"] // MB == 1
    with lock_of(checkpoints / "b"):
        assert found("--older-than", "30d")["parts"]["checkpoints"]["freed"] // MB == 1
        gc("--older-than", "30d", "--force")
    assert sorted(path.name for path in checkpoints.iterdir() if path.is_dir()) == ["b", "c"]


def test_features_go_by_their_age() -> None:
    old, new = (aged(write(Path(f".ddpm/features/{name}")), days) for name, days in (("old", 50), ("new", 1)))
    gc("--keep", "0", "--force")
    assert old.exists()
    with workspace._lock(run("active").absolute()):
        gc("--older-than", "30d", "--force")
    assert old.exists()
    gc("--keep", "9", "--older-than", "30d", "--force")
    assert (old.exists(), new.exists()) == (False, True)


def test_in_another_folder_it_is_refused() -> None:
    Path(".dvc").rename("dvc")
    done = gc()
    assert done.returncode == 1
    assert done.stderr == "ddpm gc: error: .dvc: no such folder here; run this in the pipeline's folder\n"


def test_dvcs_databases_of_former_workspaces_go() -> None:
    databases = Path(".ddpm/dvc/repo")
    old, used = (
        aged(write(databases / name / "links/cache.db").parents[1], days) for name, days in (("a", 9), ("b", 3))
    )
    run("kept", 5)
    gc("--force")
    assert (old.exists(), used.exists()) == (False, True)
    gc("--keep", "0", "--force")
    assert not used.exists()


@pytest.mark.usefixtures("repository")
def test_a_run_that_starts_meanwhile_waits_and_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    (run("old", 9, digests=[stored(b"old")]) / ".dvc").mkdir()
    states, delete, document = list[tuple[str, bool]](), collect.delete, workspace.document(None, {})

    def start() -> None:
        with workspace.use("new", "id", document) as directory:
            states.append((directory.name, (RUNS / "old").exists()))

    thread = threading.Thread(target=start)

    def meanwhile(garbage: collect.Garbage) -> None:
        thread.start()
        with pytest.raises(Timeout):
            workspace.exclusive(RUNS).acquire(timeout=0)
        for folder in (Path(), RUNS / "old"):
            with pytest.raises(zc.lockfile.LockError):  # DVC would wait, too
                zc.lockfile.LockFile(folder / ".dvc/tmp/lock")
        assert (states, left()) == ([], ["old"])
        delete(garbage)

    monkeypatch.setattr(collect, "delete", meanwhile)
    assert gc("--keep", "0", "--force").returncode == 0
    thread.join(60)
    assert states == [("new", False)]
    assert not in_cache(b"old")


def test_a_run_that_has_just_ended_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    ending, all_runs = run("ending", 9, digests=[stored(b"ending")]), workspace.all_runs
    replace(workspace.Run.read(ending), state="running", ended="").write(ending)
    held = workspace._lock(ending.absolute())
    held.acquire()

    def end() -> list[tuple[Path, workspace.Run]]:
        found = all_runs()
        held.release()
        replace(workspace.Run.read(ending), state="completed").write(ending)
        return found

    monkeypatch.setattr(workspace, "all_runs", end)
    assert found("--keep", "0", "--force")["kept"] == {"ending": "active"}
    assert ending.exists()
    assert in_cache(b"ending")


def test_it_needs_no_space() -> None:
    write(run("old", 9, digests=[stored(b"old")]) / "a", MB)
    run("new")
    (RUNS / "new/.dvc/tmp").mkdir(parents=True)
    aged(write(Path("data/.shards.abcdefgh/a.tar")).parent, 2)
    write(Path(".ddpm/checkpoints/0123/step.pt"))
    write(Path(".ddpm/checkpoints/4567/step.pt"))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))  # no file can grow
    try:
        done = gc("--keep", "1", "--force")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (done.returncode, done.stderr) == (0, "")
    assert left() == ["new"]
    assert not Path("data/.shards.abcdefgh").exists()
    assert len([path for path in Path(".ddpm/checkpoints").iterdir() if path.is_dir()]) == 1
    assert not in_cache(b"old")


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("--keep", "-1"), "--keep: must be at least 0 (got -1)"),
        (("--keep", "five"), "Invalid value for --keep: 'five' is not an integer. See `ddpm gc --help`."),
        (("--older-than", "30"), "--older-than: must be a number of hours, days or weeks, such as 30d (got '30')"),
        (("all",), "unexpected argument 'all'. See `ddpm gc --help`."),
    ],
)
def test_wrong_options_are_refused_in_one_line(arguments: tuple[str, ...], error: str) -> None:
    done = gc(*arguments)
    assert (done.returncode, done.stderr) == (2, f"ddpm gc: error: {error}\n")


def test_an_empty_tree() -> None:
    assert found("--keep", "0", "--force")["bytes"] == 0

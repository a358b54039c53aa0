"""`ddpm gc`: what others have left unfinished, are making, or have put there."""

import json
import os
import threading
from pathlib import Path

import pytest
import zc.lockfile

from flows import workspace
from flows.garbage import collect
from flows.garbage.rules import Rule
from tests.flows.garbage.conftest import MB, RUNS, aged, contents, found, gc, in_cache, left, run, stored, write


def test_what_killed_commands_left_goes_after_a_day() -> None:
    names = ("data/.shards.abcdefgh", "data/raw/.mine.abc_ef12", "models/.ddpm.abcdefgh.former", ".ddpm/.remote.x")
    for name in names:
        aged(write(Path(name, "mine")).parent, 2)
    for name in ("data/.pairs.abcdefgh", ".ddpm/.remote.y"):
        write(Path(name, "a"))
    for name in ("data/.gitignore", "data/raw/.gitkeep", "models/ddpm/a", "data/shards/a.tar"):
        aged(write(Path(name)), 99)
    for name in ("data/.my.pictures", "data/raw/.cats.original/b", "data/raw/.cats.original.txt"):  # those of a user
        aged(write(Path(name)), 99)
    part = RUNS / ".half.part"
    write(part / "a")
    with workspace._lock(RUNS / "half"):  # being created
        assert found()["parts"]["leftovers"]["freed"] // MB == 4
    before = contents()
    with workspace._lock(run("active").absolute()):
        gc("--force")
    assert part not in contents()
    assert all(Path(name).exists() for name in names)
    assert found()["parts"]["leftovers"]["freed"] // MB == 4
    gc("--force")
    gone = {path for path in before - contents() if path != part and part not in path.parents}
    assert gone == {Path(name) / more for name in names for more in ("", "mine")}


def test_a_workspace_that_is_a_link_leaves_what_it_leads_to() -> None:
    moved = run("moved", 9)
    Path("elsewhere").mkdir()
    moved.replace("elsewhere/moved")
    moved.symlink_to(Path("elsewhere/moved").absolute())
    checkpoints = write(Path("elsewhere/0123/step.pt"))
    Path(".ddpm/checkpoints").mkdir()
    Path(".ddpm/checkpoints/0123").symlink_to(checkpoints.parent.absolute())
    assert found("--keep", "0", "--force")["runs"] == ["moved"]
    assert list(RUNS.glob("*[!k]")) == list(Path(".ddpm/checkpoints").glob("*[!k]")) == []  # but for locks
    assert Path("elsewhere/moved/dvc.lock").exists()
    assert checkpoints.exists()


def test_what_a_run_that_is_being_fetched_needs_stays() -> None:
    part = run("one", digests=[stored(b"pulled"), stored(b"to come")]).rename(RUNS / ".one.part")
    (part / "run.json").unlink()  # written at the end
    (part / ".dvc/tmp").mkdir(parents=True)

    def collected() -> None:
        with collect.at_rest():
            collect.delete(collect.find(Rule()))

    with workspace._lock(RUNS / "one"):
        held = zc.lockfile.LockFile(str(part / ".dvc/tmp/lock"))  # by `dvc pull`
        gone = threading.Thread(target=collected)
        gone.start()
        gone.join(1)
        assert gone.is_alive()
        held.close()
        gone.join(60)
    assert part.exists()
    assert (in_cache(b"pulled"), in_cache(b"to come")) == (True, True)
    gc("--force")  # the fetch was killed
    assert (part.exists(), in_cache(b"pulled")) == (False, False)


@pytest.mark.parametrize("alive", [True, False])
def test_what_a_stage_in_the_working_tree_may_use_stays(alive: bool) -> None:
    left = aged(write(Path(".ddpm/.remote.x/a")).parent, 2)
    process = os.getpid() if alive else 2**22 + 1  # beyond the largest id
    Path(".dvc/tmp").mkdir()
    Path(".dvc/tmp/rwlock").write_text(json.dumps({"write": {"data/shards": {"pid": process, "cmd": "dvc repro"}}}))
    gc("--force")
    assert left.exists() == alive


@pytest.mark.parametrize(
    "wrong", [{"ended": "yesterday"}, {"created": 5}, {"ended": "2020-01-01", "created": "2020-01-01"}]
)
def test_a_workspace_of_unknown_age_stays(wrong: dict[str, object]) -> None:
    file = run("odd", 99) / "run.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | wrong))
    done = gc("--keep", "0", "--force")
    assert done.stderr == f"{file}: damaged; delete {file.parent}, which is no longer usable\n"
    assert left() == ["odd"]

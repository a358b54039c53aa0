"""Which files of DVC's cache are used, and waiting for DVC."""

import threading
from pathlib import Path
from queue import SimpleQueue

import pytest
import zc.lockfile

from diffusion.errors import UserError
from flows.garbage import cache
from tests.flows.conftest import git
from tests.flows.garbage.conftest import CACHE, lock, run, stored, stored_folder


def used(*contents: bytes, workspaces: tuple[Path, ...] = (), more: tuple[bytes, ...] = ()) -> list[bool]:
    """Which of these contents, stored in the cache, are used."""
    digests = [stored(content) for content in contents]
    folder = cache.folder()
    assert folder is not None
    unused = {path.parent.name + path.name for path in cache.unused(folder, workspaces, more)}
    return [digest not in unused for digest in digests]


def commit(message: str = "more") -> None:
    git("add", "--all")
    git("commit", "--quiet", "--message", message)


def test_lock_files_and_dvc_files_of_the_working_tree_keep_what_they_name() -> None:
    Path("dvc.lock").write_text(lock(stored(b"lock")))
    Path("distill").mkdir()
    Path("distill/dvc.lock").write_text(lock(stored(b"student")))
    Path(".dvcignore").write_text("/distill\n")  # hides it from DVC
    Path("data/raw").mkdir(parents=True)
    Path("data/raw/mine.dvc").write_text(f"outs:\n- md5: {stored(b'raw')}\n  hash: md5\n  path: mine\n")
    Path("data/models").mkdir()
    Path("data/models/start.dvc").write_text(f"outs:\n- md5: {stored(b'start')}\n  path: start\n")
    Path(".git/info/exclude").write_text("/data\n/dvc.lock\n")
    Path("notes.txt").write_text(stored(b"notes"))
    kept = (b"lock", b"student", b"raw", b"start")
    assert used(*kept, b"notes", b"nothing") == [True, True, True, True, False, False]


def test_every_commit_keeps_what_its_files_name() -> None:
    Path("data/raw").mkdir(parents=True)
    Path("a.txt").write_text(lock(stored(b"copied")))  # the same blob under another name
    Path("dvc.lock").write_text(lock(stored(b"copied")))
    Path("data/raw/old.dvc").write_text(f"outs:\n- md5: {stored(b'deleted')}\n")
    commit()
    Path("data/raw/old.dvc").unlink()
    Path("dvc.lock").write_text(lock(stored(b"main")))
    commit()
    git("checkout", "--quiet", "-b", "side", "HEAD^")
    Path("dvc.lock").write_text(lock(stored(b"side")))
    commit()
    git("checkout", "--quiet", "main")
    git("merge", "--quiet", "--strategy=ours", "side", "--message", "merge")  # whose side is not in the result
    git("branch", "--quiet", "--delete", "side")
    Path("dvc.lock").write_text(lock(stored(b"amended")))
    commit()
    git("reset", "--quiet", "--hard", "HEAD^")  # now only in the reflog
    Path("dvc.lock").write_text(lock(stored(b"stash")))
    Path("new.dvc").write_text(f"outs:\n- md5: {stored(b'untracked')}\n")
    git("stash", "--quiet", "--include-untracked")
    Path("dvc.lock").write_text(lock(stored(b"staged")))
    git("add", "dvc.lock")
    Path("dvc.lock").write_text(lock(stored(b"now")))
    kept = (b"copied", b"deleted", b"main", b"side", b"amended", b"stash", b"untracked", b"staged", b"now")
    assert used(*kept, b"nothing") == [True] * 9 + [False]


def test_both_sides_of_a_merge_keep_what_they_name() -> None:
    git("checkout", "--quiet", "-b", "side")
    Path("dvc.lock").write_text(lock(stored(b"side")))
    commit()
    git("checkout", "--quiet", "main")
    Path("dvc.lock").write_text(lock(stored(b"main")))
    commit()
    git("merge", "--quiet", "--strategy=ours", "side", "--message", "merge")
    git("branch", "--quiet", "--delete", "side")
    git("reflog", "expire", "--expire=all", "--all")
    assert used(b"side", b"main", b"nothing") == [True, True, False]


def test_workspaces_that_stay_and_lock_files_in_mlflow_keep_what_they_name() -> None:
    kept, gone = run("kept", digests=[stored(b"kept")]), run("gone", digests=[stored(b"gone")])
    (kept / "distill").mkdir()
    (kept / "distill/dvc.lock").write_text(lock(stored(b"student")))
    (kept / "data/raw").mkdir(parents=True)
    (kept / "data/raw/mine.dvc").write_text(f"outs:\n- md5: {stored(b'raw')}\n")
    contents = (b"kept", b"student", b"raw", b"gone", b"champion")
    champion = (lock(stored(b"champion")).encode(),)
    assert used(*contents, workspaces=(kept,), more=champion) == [True, True, True, False, True]
    assert used(*contents, workspaces=(kept, gone)) == [True, True, True, True, False]


def test_the_files_of_a_folder_are_used_with_it() -> None:
    inside, outside = stored_folder(stored(b"a"), stored(b"b")), stored_folder(stored(b"c"))
    Path("dvc.lock").write_text(lock(inside))
    assert used(b"a", b"b", b"c") == [True, True, False]
    unused = cache.unused(Path(".dvc/cache").resolve(), (), ())
    assert [path.suffix for path in unused] == [".dir", ""]  # no list of files that are gone is left
    assert unused[0].name == outside[2:]


def test_a_damaged_list_of_files_is_refused() -> None:
    folder = stored_folder(stored(b"a"))
    Path("dvc.lock").write_text(lock(folder))
    (CACHE / folder[:2] / folder[2:]).write_text("[]")
    with pytest.raises(UserError, match=rf"{folder[2:]}: damaged .*`make scrub`"):
        used(b"a")


def test_what_dvc_left_unfinished_is_not_used() -> None:
    stored(b"a")
    (CACHE / "c51ZSUvQ.tmp").write_text("half")
    assert CACHE.resolve() / "c51ZSUvQ.tmp" in cache.unused(Path(".dvc/cache").resolve(), (), ())
    assert cache.count(Path(".dvc/cache")) == 2


def test_a_repository_without_commits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "new/.dvc").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "new")
    git("init", "--quiet")
    assert used(b"a") == [False]


def test_without_git_nothing_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    (tmp_path / "new/.dvc").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "new")
    with pytest.raises(UserError, match="not a git repository"):
        used(b"a")


def test_a_repository_that_lacks_objects_is_refused() -> None:
    Path("dvc.lock").write_text("schema: '2.0'\n")
    commit()
    for blob in Path(".git/objects").glob("[0-9a-f][0-9a-f]/*"):
        blob.chmod(0o644)
    Path("dvc.lock").write_text(lock(stored(b"a")))
    git("add", "dvc.lock")
    newest = max(Path(".git/objects").glob("[0-9a-f][0-9a-f]/*"), key=lambda path: path.stat().st_ctime_ns)
    newest.unlink()
    with pytest.raises(UserError, match=r"the repository lacks objects; `git fsck`"):
        used(b"a")


def test_a_cache_elsewhere_is_left_alone(tmp_path_factory: pytest.TempPathFactory) -> None:
    shared = tmp_path_factory.mktemp("shared")
    Path(".dvc/config.local").write_text(f"[cache]\n    dir = {shared}\n")
    assert cache.folder() is None
    Path(".dvc/config.local").write_text("[cache]\n    dir = ../inside\n")
    assert cache.folder() == Path("inside").resolve()


def test_locks_of_another_kind_are_refused() -> None:
    Path(".dvc/config.local").write_text("[core]\n    hardlink_lock = true\n")
    with pytest.raises(UserError, match=r"^core.hardlink_lock .* use `dvc gc`"):
        cache.folder()


@pytest.mark.parametrize("name", [".", "one"])
def test_it_waits_for_dvc(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    said = SimpleQueue[str]()
    monkeypatch.setattr(cache, "say", said.put)
    workspace = run("one")
    folder = Path() if name == "." else workspace
    (folder / ".dvc/tmp").mkdir(parents=True)
    held = zc.lockfile.LockFile(str(folder / ".dvc/tmp/lock"))  # as DVC takes it
    entered = threading.Event()

    def wait() -> None:
        with cache.at_rest([workspace]):
            entered.set()

    thread = threading.Thread(target=wait)
    thread.start()
    try:
        assert said.get(timeout=60).startswith(f"gc: waiting for DVC in {folder}")
        assert not entered.is_set()
    finally:
        held.close()
        thread.join(60)
    assert entered.is_set()
    with cache.at_rest([workspace]), pytest.raises(zc.lockfile.LockError):
        zc.lockfile.LockFile(str(folder / ".dvc/tmp/lock"))

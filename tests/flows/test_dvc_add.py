"""Adding files to DVC on a full disk; tests/flows/test_importing.py does it with the real DVC."""

import errno
from pathlib import Path

import pytest

from diffusion.errors import UserError, WriteFault
from diffusion.storage.files import writing
from flows import dvc_add
from flows.paths import Paths


def test_a_full_disk_is_reported_with_the_file_that_was_to_be(tmp_path: Path) -> None:
    def make(path: Path) -> None:
        path.mkdir()
        with writing(path / "a.png"):
            raise OSError(errno.ENOSPC, "no space", str(path / "a.png"))

    target = tmp_path / "data/raw/own"
    with pytest.raises(WriteFault) as caught:
        dvc_add.add(target, Paths(tmp_path), make)
    assert str(caught.value) == f"{target}/a.png: cannot be written (No space left on device); free some space"
    assert list(target.parent.iterdir()) == []


def test_a_fault_elsewhere_keeps_its_name(tmp_path: Path) -> None:
    def make(_: Path) -> None:
        raise WriteFault(tmp_path / "other", OSError(errno.ENOSPC, "no space"))

    with pytest.raises(WriteFault, match=rf"^{tmp_path}/other: "):
        dvc_add.add(tmp_path / "data/raw/own", Paths(tmp_path), make)


@pytest.mark.parametrize("changed", [False, True])
def test_undoing_writes_only_what_dvc_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: bool
) -> None:
    """On a full disk, a file that is written again may be lost."""
    target = tmp_path / "data/raw/own"
    target.parent.mkdir(parents=True)
    ignored = dvc_add.ignore_file(target)
    ignored.write_text("/mine\n")
    before = ignored.stat().st_mtime_ns

    def fail(*_: object) -> None:
        if changed:
            ignored.write_text("/mine\n/own\n")
        raise UserError("dvc add: no space")

    monkeypatch.setattr(dvc_add, "_dvc_add", fail)
    with pytest.raises(UserError, match="no space"):
        dvc_add.add(target, Paths(tmp_path), lambda path: path.mkdir())
    assert ignored.read_text() == "/mine\n"
    assert changed or ignored.stat().st_mtime_ns == before
    assert [path.name for path in target.parent.iterdir()] == [".gitignore"]

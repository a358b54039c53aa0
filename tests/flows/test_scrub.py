"""`make scrub`: only damaged files are deleted from the DVC cache."""

import os
from hashlib import md5
from pathlib import Path

import pytest

from flows import scrub


def put(cache: Path, content: bytes, suffix: str = "") -> Path:
    """Add a file to a DVC cache under the name given by its content."""
    name = md5(content, usedforsecurity=False).hexdigest()
    path = cache / "files" / "md5" / name[:2] / f"{name[2:]}{suffix}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def damage(path: Path) -> None:
    """Flip a bit like a failing disk, preserving times and mode; DVC trusts read-only files."""
    before, content = path.stat(), bytearray(path.read_bytes())
    content[0] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.usefixtures("repository")
def test_only_damaged_files_are_deleted(capsys: pytest.CaptureFixture[str]) -> None:
    cache = Path(".dvc/cache")
    files = [put(cache, b"weights"), put(cache, b"[]", ".dir"), put(cache, b"pairs")]
    unfinished = files[0].with_name(".fLbHBNpnvKSqiW4dAZ3Jbq.tmp")  # as DVC names files that it is writing
    unfinished.write_bytes(b"weig")
    assert scrub.main() == 0
    assert capsys.readouterr().out == "3 files checked, 0 deleted\n"
    damage(files[0])
    damage(files[1])
    assert scrub.main() == 0
    output = capsys.readouterr()
    assert output.out == "3 files checked, 2 deleted; `dvc repro` or `dvc pull` restores them\n"
    assert {line.rpartition("/")[2] for line in output.err.splitlines()[:-1]} == {path.name for path in files[:2]}
    assert [path.exists() for path in [*files, unfinished]] == [False, False, True, True]


@pytest.mark.usefixtures("repository")
def test_an_unreadable_file_gives_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    path = put(Path(".dvc/cache"), b"weights")
    path.unlink()
    path.mkdir()
    assert scrub.main() == 1
    assert capsys.readouterr().err == f"scrub: error: {path.absolute()}: Is a directory\n"


def test_an_error_of_dvc_gives_one_line(repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (repository / ".dvc" / "config").write_text("[cache\n")
    assert scrub.main() == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("scrub: error: dvc cache dir: ")

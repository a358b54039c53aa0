"""Atomic writes."""

import errno
from pathlib import Path

import pytest

from diffusion.errors import UserError, WriteFault
from diffusion.storage import files
from flows import __main__, run_list


def test_write_atomic_leaves_the_old_file_when_writing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    files.write_atomic(path, b"old")

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(WriteFault, match=f"^{path}: cannot be written .No space left on device.; free some space$"):
        files.write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("error", "named"),
    [
        (OSError(errno.ENOSPC, "no space"), True),  # as of file.write
        (OSError("4096 requested and 1024 written"), True),  # as of numpy
        (OSError(errno.EACCES, "denied", "out/.file.x1y2"), True),  # as of tempfile
        (OSError(errno.EROFS, "read-only", "out"), True),  # as of mkdir
        (OSError(errno.ENOSPC, "no space", "elsewhere/read", None, "out/file"), True),  # as of shutil.copyfile
        (OSError(errno.EACCES, "denied", "elsewhere/read"), False),
    ],
)
def test_an_error_names_what_was_written(error: OSError, named: bool) -> None:
    with pytest.raises(WriteFault if named else OSError) as caught, files.writing(Path("out/file")):
        raise error
    assert str(caught.value).startswith("out/file: cannot be written (") == named


def test_a_command_reports_a_system_error_that_names_a_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing(error: OSError) -> None:
        def fail() -> None:
            raise error

        monkeypatch.setattr(run_list, "show", fail)

    failing(OSError(errno.EROFS, "read-only", "data/x"))
    assert __main__.main(["runs"]) == 1
    assert capsys.readouterr().err == (
        "ddpm runs: error: data/x: Read-only file system; remount it writable, or choose another place\n"
    )
    failing(ConnectionResetError(errno.ECONNRESET, "reset"))  # no file is at fault
    with pytest.raises(ConnectionResetError):
        __main__.main(["runs"])


def test_an_error_in_a_new_directory_names_the_file_that_was_to_be(tmp_path: Path) -> None:
    path = tmp_path / "out"
    with pytest.raises(WriteFault) as caught, files.new_directory(path) as temporary:
        files.write_atomic(temporary / ("b" * 300), b"2")
    assert str(caught.value) == f"{path / ('b' * 300)}: cannot be written (File name too long); choose a shorter name"
    assert list(tmp_path.iterdir()) == []


def test_a_new_directory_replaces_the_old_one_only_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "out"
    with files.new_directory(path) as temporary:
        (temporary / "a").write_text("1")
    interrupted = files.new_directory(path)
    (interrupted.__enter__() / "b").write_text("2")
    error = KeyError()
    assert not interrupted.__exit__(KeyError, error, None)
    assert [file.name for file in path.iterdir()] == ["a"]
    with files.new_directory(path) as temporary:
        (temporary / "c").write_text("3")
    assert [file.name for file in path.iterdir()] == ["c"]
    assert list(tmp_path.iterdir()) == [path]


def test_csv_gives_back_the_numbers(tmp_path: Path) -> None:
    rows = [{"step": 1, "loss": 0.1 + 0.2}, {"step": 2, "loss": 1e-300}]
    files.write_csv(tmp_path / "t.csv", rows)
    assert files.parse_csv((tmp_path / "t.csv").read_bytes()) == rows


def test_sums_name_the_file_that_changed_or_is_gone(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
    files.write_sums(tmp_path)
    files.check_sums(tmp_path)
    (tmp_path / "b").write_text("c")
    with pytest.raises(UserError, match=rf"^{tmp_path}/b: damaged \(it does not match its digest in SHA256SUMS\)"):
        files.check_sums(tmp_path)
    (tmp_path / "b").unlink()
    with pytest.raises(UserError, match=rf"^{tmp_path}/b: No such file or directory$"):
        files.check_sums(tmp_path)
    (tmp_path / "SHA256SUMS").unlink()
    with pytest.raises(UserError, match=rf"^{tmp_path}/SHA256SUMS: No such file or directory"):
        files.check_sums(tmp_path)


def test_json_refuses_what_json_has_not(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.write_json(tmp_path / "t.json", {"loss": float("nan")})
    assert not (tmp_path / "t.json").exists()


def test_a_row_of_a_csv_file_may_lack_a_column(tmp_path: Path) -> None:
    rows = [{"step": 1.0, "loss": 0.1}, {"step": 2.0, "band": 1 / 3}]
    files.write_csv(tmp_path / "a.csv", rows, ["step", "loss", "band"])
    assert (tmp_path / "a.csv").read_text().splitlines()[:2] == ["step,loss,band", "1.0,0.1,"]
    assert files.parse_csv((tmp_path / "a.csv").read_bytes()) == rows


def test_a_new_directory_that_cannot_take_its_place_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "file").write_text("old")
    replace = Path.replace

    def fail_for_the_new_one(self: Path, target: Path) -> Path:
        if target.name == "old" and not self.name.endswith(".former"):
            raise OSError(errno.EIO, "input/output error")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", fail_for_the_new_one)
    with pytest.raises(UserError, match="old: cannot be written"), files.new_directory(tmp_path / "old") as temporary:
        (temporary / "file").touch()
    assert (tmp_path / "old" / "file").read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["old"]

"""Atomic writes."""

from pathlib import Path

import pytest

from diffusion import files


def test_write_atomic_leaves_the_old_file_when_writing_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    files.write_atomic(path, b"old")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        files.write_atomic(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


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
    assert files.read_csv(tmp_path / "t.csv") == rows


def test_json_refuses_what_json_has_not(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.write_json(tmp_path / "t.json", {"loss": float("nan")})
    assert not (tmp_path / "t.json").exists()


def test_a_row_of_a_csv_file_may_lack_a_column(tmp_path: Path) -> None:
    rows = [{"step": 1.0, "loss": 0.1}, {"step": 2.0, "band": 1 / 3}]
    files.write_csv(tmp_path / "a.csv", rows, ["step", "loss", "band"])
    assert (tmp_path / "a.csv").read_text().splitlines()[:2] == ["step,loss,band", "1.0,0.1,"]
    assert files.read_csv(tmp_path / "a.csv") == rows

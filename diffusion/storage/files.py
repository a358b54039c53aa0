"""Writing files so that a reader sees the whole of them or nothing, and naming them by their content."""

import csv
import hashlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffusion.errors import Damaged, FileFault, SystemFault, WriteFault

SUMS = "SHA256SUMS"
"""Digests of the files beside it, in the format of sha256sum."""


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Raise SystemFault, which names `path`, for an error of the operating system; those of decoders pass.

    Decoders raise OSError too, but without an error number.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise SystemFault(path, error, "cannot be read ({})") from None


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise WriteFault, which names `path`, for any system error of the block, but one that names an unrelated file.

    Most of these errors come from libraries, and name no file or a temporary one.
    """
    try:
        yield
    except OSError as error:
        whole = path.absolute()
        named = Path(os.fsdecode(error.filename)).absolute() if isinstance(error.filename, str | bytes) else whole
        copied = error.filename2 is not None  # then the first is what was read
        if copied or whole.is_relative_to(named) or named.is_relative_to(whole.parent):
            raise WriteFault(path, error) from None
        raise


def sync(path: Path) -> None:
    """Flush a file or a directory entry to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, content: bytes) -> None:
    """Write `content` to `path`: the old file or the whole new one is there at any moment.

    Raises WriteFault if the system refuses.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fchmod(descriptor, 0o644)
                os.fsync(descriptor)
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)  # a signal may come just after it was renamed
            raise
        sync(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON that is the same bytes for the same value (NaN is refused: JSON has none)."""
    write_atomic(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def write_csv(path: Path, rows: Sequence[Mapping[str, float]], columns: Sequence[str] = ()) -> None:
    """Write rows as CSV, each number in the fewest digits that give it back exactly.

    A row may lack some of the `columns`; without these, all rows have the same.
    """
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, fieldnames=columns or list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(path, buffer.getvalue().encode())


def parse_csv(content: bytes) -> list[dict[str, float]]:
    """The rows of a file that `write_csv` wrote, all numbers as float."""
    rows = csv.DictReader(io.StringIO(content.decode(), newline=""))
    return [{name: float(value) for name, value in row.items() if value} for row in rows]


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A temporary directory that becomes `path`, replacing what was there, when the block ends without an error.

    Raises WriteFault if the system refuses; one of the block that names a file in the temporary directory names that in
    `path` instead.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        yield temporary
        with writing(path):
            temporary.chmod(0o755)
            for entry in temporary.rglob("*"):
                sync(entry)
            former = temporary.with_name(f"{temporary.name}.former")
            try:
                if path.exists():
                    path.replace(former)  # what was there is deleted only once the new one is in its place
                temporary.replace(path)
            except BaseException:
                if former.exists() and not path.exists():
                    former.replace(path)
                raise
            if former.exists():
                shutil.rmtree(former)
    except WriteFault as fault:
        shutil.rmtree(temporary, ignore_errors=True)
        if fault.path.is_relative_to(temporary):
            raise WriteFault(path / fault.path.relative_to(temporary), fault.error) from None
        raise
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    with writing(path):
        sync(path.parent)


def sha256(path: Path) -> str:
    """The hexadecimal SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_sums(directory: Path, known: Mapping[str, str] | None = None) -> None:
    """Write SHA256SUMS: the digest of every file in a directory, for `read_checked` and `sha256sum --check`.

    Args:
        directory: a directory of files alone, otherwise complete.
        known: digests by file name that need not be computed again.
    """
    names = sorted(path.name for path in directory.iterdir() if path.name != SUMS)
    lines = [f"{(known or {}).get(name) or sha256(directory / name)}  {name}\n" for name in names]
    write_atomic(directory / SUMS, "".join(lines).encode())


def read_checked(path: Path) -> bytes:
    """The bytes of a file, checked against the SHA256SUMS beside it.

    Raises:
        FileFault: the file or its SHA256SUMS is missing, or the bytes are not those that were written.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise FileFault(path, error.strerror or str(error)) from None
    sums = path.with_name(SUMS)
    try:
        lines = sums.read_bytes().splitlines()
    except OSError as error:
        raise FileFault(
            sums, f"{error.strerror}, so {path.name} cannot be checked: an earlier version wrote it"
        ) from None
    if f"{hashlib.sha256(content).hexdigest()}  {path.name}".encode() not in lines:
        raise Damaged(path, f"not the bytes that {SUMS} lists")
    return content


def check_sums(directory: Path) -> None:
    """Raise FileFault, as `read_checked` does, unless all files that a directory's SHA256SUMS lists are as written."""
    sums = directory / SUMS
    try:
        names = [os.fsdecode(line[66:]) for line in sums.read_bytes().splitlines()]
    except OSError as error:
        raise FileFault(sums, error.strerror or str(error)) from None
    for name in names:
        read_checked(directory / name)

"""Atomic writing of files and directories, and their verification by digests."""

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
"""File with the digests of a directory's files, in the format of sha256sum."""


@contextmanager
def reading(path: object) -> Iterator[None]:
    """Convert the operating system's errors to SystemFault naming `path`, by its text; decoders' errors pass unchanged.

    Decoders also raise OSError, but without an error number.
    """
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise SystemFault(Path(str(path)), error, "cannot be read ({})") from None


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Convert the operating system's errors to WriteFault naming `path`, unless the error names an unrelated file.

    Most of these errors come from libraries, and name no file or a temporary one.
    """
    try:
        yield
    except OSError as error:
        whole = path.absolute()
        named = Path(os.fsdecode(error.filename)).absolute() if isinstance(error.filename, str | bytes) else whole
        copied = error.filename2 is not None  # a copy, whose first name is the source
        if copied or whole.is_relative_to(named) or named.is_relative_to(whole.parent):
            raise WriteFault(path, error) from None
        raise


def sync(path: Path) -> None:
    """Flush a file or directory to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, content: bytes) -> None:
    """Write `content` to `path` atomically: readers see either the old or the complete new file.

    Raises WriteFault on failure.
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
            Path(name).unlink(missing_ok=True)  # missing if a signal arrives just after the rename
            raise
        sync(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON, deterministically; raises ValueError for NaN, which JSON lacks."""
    write_atomic(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def write_csv(path: Path, rows: Sequence[Mapping[str, float]], columns: Sequence[str] = ()) -> None:
    """Write rows as CSV, each number in the fewest digits that represent it exactly.

    Rows may lack some of the `columns`. If `columns` is empty, all rows must have the same keys.
    """
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, fieldnames=columns or list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(path, buffer.getvalue().encode())


def parse_csv(content: bytes) -> list[dict[str, float]]:
    """Parse a file written by `write_csv`, with all numbers as float."""
    rows = csv.DictReader(io.StringIO(content.decode(), newline=""))
    return [{name: float(value) for name, value in row.items() if value} for row in rows]


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A temporary directory that replaces `path` when the block ends without an error.

    Raises WriteFault on failure. A WriteFault in the block that names a file in the temporary directory is changed to
    name the file in `path`.
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
                    path.replace(former)  # deleted only once the new directory is in place
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
    """Hexadecimal SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_sums(directory: Path, known: Mapping[str, str] | None = None) -> None:
    """Write SHA256SUMS, the digests of a directory's files, for `read_checked` and `sha256sum --check`.

    Args:
        directory: a directory without subdirectories, otherwise complete.
        known: digests by file name that are already computed.
    """
    names = sorted(path.name for path in directory.iterdir() if path.name != SUMS)
    lines = [f"{(known or {}).get(name) or sha256(directory / name)}  {name}\n" for name in names]
    write_atomic(directory / SUMS, "".join(lines).encode())


def read_checked(path: Path) -> bytes:
    """Read a file and verify it against SHA256SUMS in its directory.

    Raises:
        FileFault: the file or SHA256SUMS is missing, or the digest does not match.
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
            sums, f"{error.strerror}, so {path.name} cannot be verified (written by an earlier version)"
        ) from None
    if f"{hashlib.sha256(content).hexdigest()}  {path.name}".encode() not in lines:
        raise Damaged(path, f"it does not match its digest in {SUMS}")
    return content


def check_sums(directory: Path) -> None:
    """Verify all files listed in a directory's SHA256SUMS; raises FileFault like `read_checked`."""
    sums = directory / SUMS
    try:
        names = [os.fsdecode(line[66:]) for line in sums.read_bytes().splitlines()]
    except OSError as error:
        raise FileFault(sums, error.strerror or str(error)) from None
    for name in names:
        read_checked(directory / name)

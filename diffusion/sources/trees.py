"""Trees of files: below a folder, or in a zip or tar archive, which is read in place."""

import bz2
import gzip
import io
import lzma
import os
import tarfile
import tempfile
import weakref
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePath, PurePosixPath
from typing import IO, NamedTuple, Protocol, cast

from diffusion.errors import UserError
from diffusion.sources.images import File, Picture, Unreadable, read_image
from diffusion.sources.reading import Reading
from diffusion.storage.files import reading, writing

SYSTEM = frozenset(
    {"@eaDir", "__MACOSX", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found"}
    | {"Thumbs.db", "desktop.ini"}
)
"""Files and folders created by file managers and storage devices."""
TAR_ENDINGS = (".tar.gz", ".tar.bz2", ".tar.xz", ".tar", ".tgz", ".tbz2", ".txz")
MAX_MEMBER_BYTES = 2**30
"""Maximum size of an uncompressed file in an archive; a larger one is rejected without reading it."""
COMPRESSED: dict[bytes, Callable[[Path], IO[bytes]]] = {
    b"\x1f\x8b": gzip.open,  # type: ignore[dict-item] # opened for reading by default
    b"BZh": bz2.open,
    b"\xfd7zXZ": lzma.open,
}
"""How to open a compressed file, by its first bytes."""
MAX_GROWTH = 200
"""Maximum factor by which decompression may enlarge an archive; images are nearly incompressible."""
BROKEN = (
    zipfile.BadZipFile,
    tarfile.TarError,
    zlib.error,
    lzma.LZMAError,
    EOFError,
    OSError,
    ValueError,
    NotImplementedError,
)
"""Errors of the standard library's readers for a damaged archive."""


class Tree(Protocol):
    """Visible files, and how to open them."""

    path: Path
    """The folder or archive."""

    def names(self) -> list[str]:
        """Paths of the files relative to the root, with `/`, sorted by their parts."""
        ...

    def file(self, name: str) -> File:
        """The file of that name; raises Unreadable if it cannot be used."""
        ...


class Directory:
    """The files below a folder. Symbolic links are followed."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def names(self) -> list[str]:
        depth = len(self.path.parts)
        return ["/".join(path.parts[depth:]) for path in files_below(self.path)]

    def file(self, name: str) -> File:
        return self.path / name


class Member(NamedTuple):
    """A file in an archive, or in memory; it answers what `diffusion.sources.images` asks a Path."""

    archive: Path | None
    """None for a file in memory."""
    path: PurePath
    opener: Callable[[], IO[bytes]]
    """Raises Unreadable if the file cannot be read."""
    size: int = 0
    """Bytes when uncompressed, as the archive states it."""

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def suffix(self) -> str:
        return self.path.suffix

    def __str__(self) -> str:
        return f"{self.archive}: {self.path}" if self.archive else str(self.path)

    def open(self, mode: str = "rb") -> IO[bytes]:  # noqa: ARG002 (as in Path.open)
        return self.opener()

    def exists(self) -> bool:
        return True

    def is_file(self) -> bool:
        return True


@dataclass(frozen=True)
class Decoder:
    """Decodes an image file in this process, one in an archive while that is open."""

    file: File
    how: Reading
    remarks: tuple[str, ...] = ()
    """Warnings to add to those of the decoder."""

    def __call__(self) -> Picture:
        picture = read_image(self.file, self.how)
        return picture._replace(warnings=(*picture.warnings, *self.remarks))

    @property
    def size(self) -> int:
        """Size of the file in bytes, as its archive states it; raises SystemFault if it is gone from the disk."""
        if isinstance(self.file, Member):
            return self.file.size
        with reading(self.file):
            return self.file.stat().st_size if isinstance(self.file, Path) else 0

    def carried(self) -> "Decoder":
        """The same for any machine: with the content of the file.

        Raises UserError if the file is too large to be sent, and SystemFault if it cannot be read.
        """
        if not isinstance(self.file, Path):
            return self.portable()
        with reading(self.file):
            if (size := self.file.stat().st_size) > MAX_MEMBER_BYTES:
                raise UserError(
                    f"{self.file}: {size} bytes, too many to send to a Dask worker; unset DDPM_DASK_SCHEDULER, or move "
                    "the file elsewhere"
                )
            opener = partial(io.BytesIO, self.file.read_bytes())
        return replace(self, file=Member(None, self.file, opener))

    def portable(self) -> "Decoder":
        """The same for any process here: with the content of a file in an archive, or why it cannot be read."""
        if not isinstance(self.file, Member):
            return self
        opener: Callable[[], IO[bytes]]
        try:
            with self.file.open("rb") as opened:
                opener = partial(io.BytesIO, opened.read())
        except MemoryError:
            raise
        except Exception as error:  # readers of archives raise arbitrary exceptions
            opener = partial(_fail, error)
        return replace(self, file=self.file._replace(opener=opener))


def _fail(error: Exception) -> IO[bytes]:
    raise error


class Zip:
    """The files in a .zip archive. Of several files of one name, the last counts, as in unpacking."""

    def __init__(self, path: Path) -> None:
        """Raises UserError if the archive cannot be read."""
        self.path = path
        try:
            with reading(path):
                self._zip = zipfile.ZipFile(path)
        except BROKEN as error:
            raise UserError(f"{path}: not a readable zip archive ({error})") from None
        infos = [info for info in self._zip.infolist() if not info.filename.endswith("/")]
        self._infos = {_normalized(_zip_name(info)): info for info in infos}

    def names(self) -> list[str]:
        return _visible(self._infos)

    def file(self, name: str) -> File:
        info = self._infos[name]
        return Member(self.path, PurePosixPath(name), partial(self._open, info), info.file_size)

    def _open(self, info: zipfile.ZipInfo) -> IO[bytes]:
        if info.flag_bits & 1:
            raise Unreadable("encrypted; unpack the archive with its password first")
        _check_size(info.file_size)
        try:
            return self._zip.open(info)
        except BROKEN as error:
            raise Unreadable(f"damaged, or compressed in a way that Python cannot read ({error})") from None


class Tar:
    """The files in a .tar archive. Of several files of one name, the last counts, as in unpacking.

    A compressed archive is decompressed into a temporary file first, for random access.
    """

    def __init__(self, path: Path) -> None:
        """Raises UserError if the archive cannot be read."""
        self.path = path
        try:
            with reading(path):
                content = _decompressed(path)
                weakref.finalize(self, content.close)
                self._tar = tarfile.open(fileobj=content, mode="r:")  # noqa: SIM115 (open as long as the source)
                members = self._tar.getmembers()
                content.seek(self._tar.offset)  # behind the last file
                if content.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                    raise tarfile.ReadError("truncated: its end is missing")
        except BROKEN as error:
            raise UserError(f"{path}: not a readable tar archive ({error})") from None
        self._members = {_normalized(member.name): member for member in members if not member.isdir()}

    def names(self) -> list[str]:
        return _visible(self._members)

    def in_order(self) -> list[str]:
        """The names in the order of the archive."""
        return [name for name in self._members if all(map(is_visible, name.split("/")))]

    def file(self, name: str) -> File:
        member = self._members[name]
        return Member(self.path, PurePosixPath(name), partial(self._open, member), member.size)

    def _open(self, member: tarfile.TarInfo) -> IO[bytes]:
        if not member.isreg():
            raise Unreadable("a link or device in an archive; only regular files are read")
        _check_size(member.size)
        return cast(IO[bytes], self._tar.extractfile(member))


def open_tree(path: Path) -> Tree | None:
    """The files below a folder or in an archive; None for any other file."""
    if path.is_dir():
        return Directory(path)
    if ending(path) == ".zip":
        return Zip(path)
    return Tar(path) if ending(path) in TAR_ENDINGS else None


def ending(path: Path) -> str:
    """The ending by which the kind of a file is known: `.tar.gz`, `.zip`."""
    name = path.name.lower()
    return next((known for known in TAR_ENDINGS if name.endswith(known)), path.suffix.lower())


def _check_size(size: int) -> None:
    """Raise Unreadable for a file in an archive that would not fit into memory."""
    if size > MAX_MEMBER_BYTES:
        raise Unreadable(f"{size} bytes when uncompressed, more than {MAX_MEMBER_BYTES}")


def _zip_name(info: zipfile.ZipInfo) -> str:
    """A name in a zip archive; some programs write UTF-8 without saying so, or backslashes."""
    name = info.filename
    if not info.flag_bits & 0x800:
        with suppress(UnicodeError):
            name = name.encode("cp437").decode()
    return name.replace("\\", "/")


def _normalized(name: str) -> str:
    """A name without empty parts and `.`; a leading `/` is dropped, as in unpacking."""
    return "/".join(part for part in name.split("/") if part not in ("", ".")) or ".."


def _visible(names: Iterable[str]) -> list[str]:
    """Names without hidden and system files, sorted by their parts."""
    split = [name.split("/") for name in names]
    return ["/".join(parts) for parts in sorted(split) if all(map(is_visible, parts))]


def is_visible(name: str) -> bool:
    """Whether a file or folder is neither hidden nor made by a file manager."""
    return name == ".." or (not name.startswith(".") and name not in SYSTEM)


def _decompressed(path: Path) -> IO[bytes]:
    """A tar file, decompressed into a temporary file if need be; raises UserError if it grows too much."""
    with path.open("rb") as file:
        start = file.read(8)
    opener = next((opener for magic, opener in COMPRESSED.items() if start.startswith(magic)), None)
    if opener is None:
        return path.open("rb")
    content, limit = tempfile.TemporaryFile(), MAX_GROWTH * path.stat().st_size  # noqa: SIM115 (open with the source)
    try:
        with opener(path) as compressed:
            while block := compressed.read(2**20):
                with writing(Path(tempfile.gettempdir())):
                    content.write(block)
                if content.tell() > limit:
                    raise UserError(f"{path}: more than {MAX_GROWTH} times as large when decompressed; unpack it first")
    except BaseException:
        content.close()
        raise
    content.seek(0)
    return content


def files_below(folder: Path, above: frozenset[tuple[int, int]] = frozenset()) -> Iterator[Path]:
    """Files below a folder, sorted, without hidden and system files.

    Symbolic links are followed, except to a folder that contains them; a broken link counts as a file.
    """
    try:
        status = folder.stat()
        with os.scandir(folder) as entries:
            found = sorted((entry.name, entry.is_file(follow_symlinks=False)) for entry in entries)
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error.strerror})") from None
    here = (status.st_dev, status.st_ino)
    if here in above:
        return
    for name, regular in found:
        if not is_visible(name):
            continue
        path = folder / name
        if regular:
            yield path
        elif path.is_dir():
            yield from files_below(path, above | {here})
        elif _is_file(path):
            yield path


def linked_folders(folder: Path) -> list[Path]:
    """Symbolic links to folders below a folder, sorted."""
    found = []
    for place, names, _ in os.walk(folder):
        names[:] = [name for name in names if is_visible(name)]
        found += [path for name in names if (path := Path(place, name)).is_symlink()]
    return sorted(found)


def _is_file(path: Path) -> bool:
    """Whether a path is a file, or a broken link, which must be reported; not a pipe or a device."""
    return path.is_file() or (path.is_symlink() and not path.exists())

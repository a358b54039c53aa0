"""Where images are: a path, a URL that fsspec opens, or several files by a brace range or glob of either.

A reader needs its files on this machine. Remote files are downloaded once into a temporary folder: a reader seeks in
its files, and needs the space for the shards anyway. webdataset's `gopen` is not used: it streams
through `curl` or `aws`, which must be installed, and runs what follows `pipe:` in a shell.
"""

import errno
import glob
import math
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice, takewhile
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import unquote

from braceexpand import braceexpand
from fsspec import url_to_fs
from fsspec.callbacks import Callback
from fsspec.implementations.local import LocalFileSystem

from diffusion.errors import UserError, WriteFault
from diffusion.progress import Progress
from diffusion.storage.files import writing

MAX_FILES = 10_000
"""Maximum number of files in a brace range."""
RANGE = re.compile(r"\{(-?\d+)\.\.(-?\d+)(?:\.\.-?\d+)?\}")
"""Numbers in braces, with an optional step."""
ACCESSED = frozenset({"time", "atime", "st_atime", "last_access_time", "access_time"})
"""Facts that reading a file changes, in some file systems."""
MB = 10**6
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Location(NamedTuple):
    """The files of a source."""

    source: str
    fs: Any
    """Their fsspec file system; None for a path on this machine, which is used as it is."""
    files: tuple[str, ...]
    """Their paths in the file system."""
    folder: str | None
    """The folder that contains them; None for a single file."""
    pattern: bool = False
    """Whether the source is a brace range or a glob."""

    @property
    def remote(self) -> bool:
        """Whether the files are not on this machine."""
        return self.fs is not None and not isinstance(self.fs, LocalFileSystem)

    @property
    def name(self) -> str:
        """Name of the single file; empty for a folder."""
        return "" if self.folder is not None else _path(self.files[0]).name.removeprefix("..")

    @contextmanager
    def at_hand(self, stage: str, within: Path | None = None) -> Iterator[Path]:
        """A path on this machine with the images, for the block: remote files are downloaded, local ones linked.

        Args:
            stage: name for the lines that report the progress.
            within: where to create the temporary folder; by default the system's folder for temporary files.
        Raises:
            UserError: a file is missing or cannot be read, or changed while it was read. In the block, messages that
                name a file in the temporary folder are changed to name the original.
        """
        if self.fs is None:
            yield Path(self.source)
            return
        within = within or Path(tempfile.gettempdir())
        with writing(within):
            within.mkdir(parents=True, exist_ok=True)
            temporary = tempfile.TemporaryDirectory(dir=within, prefix=".remote.")
        with temporary as folder:
            path = Path(folder).absolute() / (self.name or "files")
            if self.folder is None:
                targets = {self.files[0]: path}
            else:
                targets = {file: path / inside for file, inside in _below(self.folder, self.files).items()}
            self._fetch(targets, stage)
            try:
                yield path
            except UserError as error:
                original = self.source if self.folder is None else _url(self.fs, self.folder)
                if str(path) not in str(error):
                    raise
                raise UserError(str(error).replace(str(path), original)) from None

    def _fetch(self, targets: dict[str, Path], stage: str) -> None:
        """Download or link files, creating the folders of the targets."""
        facts = {file: self._facts(file) for file in targets}
        for target in targets.values():
            with writing(target):
                target.parent.mkdir(parents=True, exist_ok=True)
        if not self.remote:
            for file, target in targets.items():
                target.symlink_to(file)
            return
        sizes = {file: known["size"] or 0 for file, known in facts.items()}  # None if the server does not say it
        with Progress(stage, -(-sum(sizes.values()) // MB), "MB") as progress:
            advance = _Advance(progress)
            for file, target in targets.items():
                with _asking(_url(self.fs, file), target):
                    self.fs.get_file(file, str(target), callback=advance)
                if self._facts(file) != facts[file] or sizes[file] not in (0, target.stat().st_size):
                    raise UserError(f"{_url(self.fs, file)}: changed while it was downloaded; try again")

    def _facts(self, file: str) -> dict[str, Any]:
        """What the file system knows of a file at present, such as its size and etag."""
        with _asking(_url(self.fs, file)):
            self.fs.invalidate_cache()
            return {name: value for name, value in self.fs.info(file).items() if name.lower() not in ACCESSED}


class _Advance(Callback):  # type: ignore[misc] # fsspec has no types
    """Reports downloaded bytes as megabytes."""

    def __init__(self, progress: Progress) -> None:
        super().__init__()
        self._progress, self._bytes = progress, 0

    def relative_update(self, inc: int = 1) -> None:
        before, self._bytes = self._bytes, self._bytes + inc
        self._progress.advance(before // -MB - self._bytes // -MB)


def is_url(source: str) -> bool:
    return "://" in source


def resolved(source: str, root: Path) -> str:
    """A source relative to the folder `root`; a URL remains as it is."""
    return source if is_url(source) else str(root / source)


def locate(source: str | Path) -> Location:
    """Find the files of a source: a path or URL of a file or folder, or of several files (`{0000..0009}`, `*`).

    A path that exists is itself, whatever characters it has. Raises UserError if files are missing or access fails.
    """
    source = str(source)
    if not is_url(source) and (Path(source).exists() or not _is_pattern(source)):
        if not Path(source).exists():
            raise UserError(f"{source}: no such file or folder")
        return _here(source)
    with _asking(source):
        fs, path = url_to_fs(source)
        found = _info(fs, path)
        if found is None:
            files = tuple(dict.fromkeys(_expand(fs, path))) if _is_pattern(path) else ()
            if not files:
                raise UserError(f"{source}: no such file or folder")
            return Location(source, fs, files, _common_folder(files), pattern=True)
        if isinstance(fs, LocalFileSystem):
            return _here(path)
        if found["type"] != "directory":
            return Location(source, fs, (path,), None)
        return Location(source, fs, tuple(file for file in sorted(fs.find(path)) if file[-1] != "/"), path.rstrip("/"))


def _here(path: str) -> Location:
    return Location(path, None, (path,), path if Path(path).is_dir() else None)


@contextmanager
def _asking(url: str, target: Path | None = None) -> Iterator[None]:
    """Convert the errors of any file system to UserError with one line that names `url`, or the `target` on this disk.

    Each file system raises the exceptions of its own library.
    """
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{url}: no such file") from None
    except Exception as error:
        if target is not None and isinstance(error, OSError) and error.errno in DISK_FULL:
            raise WriteFault(target, error) from None
        line = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{url}: cannot be read ({line})") from None


def _info(fs: Any, path: str) -> dict[str, Any] | None:
    """Facts about a file or folder; None if it is not there."""
    try:
        facts: dict[str, Any] = fs.info(path)
    except FileNotFoundError as error:
        if isinstance(error.__cause__, OSError) and not isinstance(error.__cause__, FileNotFoundError):
            raise error.__cause__ from None  # of a web server that does not answer
        return None
    return facts


def _is_pattern(path: str) -> bool:
    return "{" in path or glob.has_magic(path)


def _expand(fs: Any, pattern: str) -> Iterator[str]:
    """The files of a pattern, all of a brace range and those that match a glob."""
    # braceexpand holds the numbers of all ranges in memory.
    numbers = math.prod(abs(int(last) - int(first)) + 1 for first, last in RANGE.findall(pattern))
    paths = list(islice(braceexpand(pattern), MAX_FILES + 1)) if numbers <= MAX_FILES else []
    if max(numbers, len(paths)) > MAX_FILES:
        raise UserError(f"{_url(fs, pattern)}: more than {MAX_FILES} files")
    for path in paths:
        if not glob.has_magic(path):
            yield path
        elif found := sorted(fs.glob(path)):
            yield from found
        else:
            raise UserError(f"{_url(fs, path)}: matches no file")


def _url(fs: Any, path: str) -> str:
    """The name of a file or folder in messages."""
    return path if isinstance(fs, LocalFileSystem) else str(fs.unstrip_protocol(path))


def _common_folder(files: tuple[str, ...]) -> str:
    """The folder that contains all files, directly or in folders below it."""
    parents = [file.split("/")[:-1] for file in files]
    return "/".join(parts[0] for parts in takewhile(lambda parts: len(set(parts)) == 1, zip(*parents, strict=False)))


def _below(folder: str, files: tuple[str, ...]) -> dict[str, PurePosixPath]:
    """The files by their paths below `folder`; raises UserError if one leads out of it, or two are the same."""
    inside = {file: _path(file[len(folder) :].lstrip("/")) for file in files}
    taken = set[PurePosixPath]()
    for file, path in inside.items():
        if ".." in path.parts or path in taken:
            raise UserError(f"{file}: leads out of {folder}, or to another file; rename it")
        taken.add(path)
    return inside


def _path(file: str) -> PurePosixPath:
    """A file's path without what follows it in a URL; only file systems of the web keep URLs as they are."""
    return PurePosixPath(unquote(file.partition("?")[0]) if is_url(file) else file)

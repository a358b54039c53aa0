"""Tar shards in WebDataset format: written byte-reproducibly, with random access through memory maps.

A split consists of `SPLIT-000000.tar`, `SPLIT-000001.tar`, ...; a sample is a group of consecutive members
`KEY.EXTENSION`, where KEY contains no dot. File contents do not depend on time, place or user. Any sample can be read
without those before it, which webdataset's pipelines cannot do: benchmarks/README.md compares them.
"""

import hashlib
import mmap
import sys
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from diffusion.errors import Damaged, FileFault, describe
from diffusion.storage.files import read_checked, sha256, writing

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
FORMAT: Literal[1] = 1
"""Format of the manifests; also of manifests that do not state one."""

MAX_OPEN = 256
"""Maximum number of shards of a split that are open at once: systems allow often 1,024 open files, and 65,530 maps."""


class Facts(BaseModel):
    """A manifest, or a part of one."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a manifest; raises FileFault if it is missing, corrupt or has another format."""
        content = read_checked(path)
        try:
            return cls.model_validate_json(content)
        except ValidationError as error:
            raise FileFault(path, f"not in format {FORMAT}, which this version reads: {describe(error)}") from None


class Tar(Facts):
    """A tar file's entry in a manifest."""

    name: str
    samples: int
    bytes: int
    sha256: str


class Member(NamedTuple):
    """Position of a member's content in its tar file."""

    key: str
    extension: str
    offset: int
    size: int


class Writer:
    """Writes the shards of a split; a context manager, after which `tars` lists the files."""

    def __init__(
        self, directory: Path, split: Split, *, max_samples: int = sys.maxsize, max_bytes: int = sys.maxsize
    ) -> None:
        self.directory, self.split = directory, split
        self.max_samples, self.max_bytes = max_samples, max_bytes
        self.tars: list[Tar] = []
        self._tar: Any = None
        self._samples = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._finish()

    def add(self, key: str, members: Mapping[str, bytes]) -> None:
        """Append a sample, given as contents by extension."""
        size = sum(map(len, members.values()))
        if self._tar and (self._samples == self.max_samples or self._tar.tarstream.offset + size > self.max_bytes):
            self._finish()
        with writing(self._path()):
            if self._tar is None:
                from webdataset import TarWriter  # it imports torch, which worker processes do without

                self._file = self._path().open("wb")
                self._tar = TarWriter(self._file, user="", group="", mode=0o644, mtime=0, encoder=False)
            for extension, content in members.items():  # one by one, since it would sort them
                self._tar.write({"__key__": key, extension: content})
        self._samples += 1

    def _path(self) -> Path:
        return self.directory / f"{self.split}-{len(self.tars):06d}.tar"

    def _finish(self) -> None:
        if self._tar is None:
            return
        path = self._path()
        with writing(path), self._file:
            self._tar.close()
        self.tars.append(Tar(name=path.name, samples=self._samples, bytes=path.stat().st_size, sha256=sha256(path)))
        self._tar, self._samples = None, 0


def open_map(directory: Path, tar: Tar, verify: bool = True) -> mmap.mmap:
    """Memory-map a tar file; raises FileFault if it cannot be read, or has another size than in the manifest.

    With `verify`, its digest must be that in the manifest, too.
    """
    path = directory / tar.name
    try:
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise FileFault(path, f"cannot be read ({error})") from None
    if len(mapped) != tar.bytes:
        raise Damaged(path, f"it has {len(mapped)} bytes, but {tar.bytes} in manifest.json")
    if verify and hashlib.sha256(mapped).hexdigest() != tar.sha256:
        raise Damaged(path, "it does not match its digest in manifest.json")
    return mapped


def open_maps(directory: Path, tars: Sequence[Tar], verify: bool = True) -> Callable[[int], mmap.mmap]:
    """The memory maps of a split's shards, by number; each is opened when it is needed, and verified the first time.

    Raises FileFault as `open_map` does, when called.
    """
    unverified = set(range(len(tars))) if verify else set[int]()

    @lru_cache(MAX_OPEN)
    def opened(number: int) -> mmap.mmap:
        mapped = open_map(directory, tars[number], number in unverified)
        unverified.discard(number)
        return mapped

    return opened


def members(mapped: mmap.mmap, position: int = 0) -> Iterator[Member]:
    """Iterate over the members of a tar file that `Writer` wrote, from `position` on, reading only their headers.

    Only the name and the size are read, in place: tarfile takes ten times as long.
    """
    while position < len(mapped) and mapped[position]:  # a zero block marks the end
        name, size = mapped[position : position + 100], int(mapped[position + 124 : position + 135], 8)
        key, _, extension = name.rstrip(b"\0").decode().partition(".")
        yield Member(key, extension, position + tarfile.BLOCKSIZE, size)
        position += tarfile.BLOCKSIZE * (1 + -(-size // tarfile.BLOCKSIZE))

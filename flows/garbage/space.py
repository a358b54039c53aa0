"""How much space files take, and how much deleting some of them would free."""

import os
import stat
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

BLOCK = 512
"""Bytes in a unit of `st_blocks`."""


@dataclass
class Space:
    """Bytes on the disk."""

    taken: int = 0
    freed: int = 0


@dataclass
class Part:
    """Files and folders of one kind."""

    name: str
    roots: Iterable[Path]
    going: Collection[Path] = ()
    """What would be deleted: files or folders in `roots`."""
    what: str = ""
    """What goes and why, in words."""
    space: Space = field(default_factory=Space)


@dataclass
class _Inode:
    part: int
    size: int
    links: int
    """Those that would remain."""


def measure(parts: Sequence[Part]) -> None:
    """Set the space of each part.

    A file with several hard links, such as a file of DVC's cache in a workspace, counts once, in the first part that
    has it; it is freed if all of its links go. Symbolic links are not followed.
    """
    inodes: dict[tuple[int, int], _Inode] = {}
    for index, part in enumerate(parts):
        part.space = Space()
        going = {os.fspath(path) for path in part.going}
        for root in part.roots:
            for found, goes in _walk(os.fspath(root), going):
                folder = stat.S_ISDIR(found.st_mode)
                links = 1 if folder else found.st_nlink
                new = _Inode(index, found.st_blocks * BLOCK, links)
                inode = inodes.setdefault((found.st_dev, found.st_ino), new)
                inode.links -= goes
    for inode in inodes.values():
        space = parts[inode.part].space
        space.taken += inode.size
        space.freed += inode.size if inode.links == 0 else 0


def _walk(path: str, going: Collection[str], goes: bool = False) -> Iterator[tuple[os.stat_result, bool]]:
    """The files and folders at and below a path, and whether they go; what is deleted meanwhile is left out."""
    goes = goes or path in going
    try:
        found = os.lstat(path)
        below = [entry.path for entry in os.scandir(path)] if stat.S_ISDIR(found.st_mode) else []
    except FileNotFoundError:
        return
    yield found, goes
    for each in below:
        yield from _walk(each, going, goes)

"""Assignment of images to splits: the source's own, or by a hash of the pixels, so that copies stay together."""

import re
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from diffusion.errors import UserError
from diffusion.sources.colours import Unreadable
from diffusion.storage.tar import Split

SPLIT_NAMES: dict[str, Split] = {
    "train": "train", "training": "train",
    "val": "val", "valid": "val", "validation": "val", "dev": "val",
    "test": "test", "testing": "test",
}  # fmt: skip
"""Names of splits, case-insensitive."""
COPY_OF_TEST = "a copy of an image in the source's test split"
ORDER: tuple[Split, ...] = ("test", "val", "train")
"""Held-out splits first: see Source."""
MAX_NAMES = 3
"""Maximum number of a split's files that are listed by name."""


def by_file_name(root: Path, files: Sequence[Path]) -> tuple[list[tuple[Split | None, Path]], dict[Split, str]]:
    """Files below `root` with their splits, held-out ones first, and the names of each split's files.

    A split's name is a word of the file's name, or a folder: `train-000000.tar`, `default/test/0000.parquet`. Without
    one named train, the files have no splits. Raises UserError if only some files name one, or a file names several.
    """
    named = {
        file: {SPLIT_NAMES[word] for word in _words(file.relative_to(root)) & SPLIT_NAMES.keys()} for file in files
    }
    if not any("train" in splits for splits in named.values()) or len(files) == 1:
        return [(None, file) for file in sorted(files)], {}
    for file, splits in sorted(named.items()):
        if len(splits) != 1:
            what = "several splits" if splits else "no split, unlike others"
            raise UserError(f"{file}: its name states {what} (train, val, test); rename or remove it")
    found: list[tuple[Split | None, Path]] = [
        (split, file) for split in ORDER for file, splits in sorted(named.items()) if split in splits
    ]
    names = {split: [file.relative_to(root).as_posix() for each, file in found if each == split] for split in ORDER}
    return found, {split: _listed(names[split]) for split in reversed(ORDER) if names[split]}


def _listed(names: Sequence[str]) -> str:
    if len(names) > MAX_NAMES:
        return f"{names[0]} to {names[-1]} ({len(names)} files)"
    return " and ".join(names)


def _words(path: Path) -> set[str]:
    return set(re.split(r"[^a-z]+", path.as_posix().lower()))


class Fractions(NamedTuple):
    """Fractions of the images without a split that go to val and test."""

    val: float
    test: float


class _Digests:
    """A set of image digests; needs 8 bytes of memory per image."""

    def __init__(self) -> None:
        self._values = array("Q")
        self._sorted = np.empty(0, np.uint64)

    def add(self, value: int) -> None:
        self._values.append(value)

    def __contains__(self, value: int) -> bool:
        if len(self._sorted) != len(self._values):
            self._sorted = np.sort(np.array(self._values))
        place = int(np.searchsorted(self._sorted, np.uint64(value)))
        return place < len(self._sorted) and int(self._sorted[place]) == value

    def copies(self) -> int:
        """Number of digests that are equal to an earlier one."""
        values = np.array(self._values)
        values.sort()
        return int((values[1:] == values[:-1]).sum())


class Splitter:
    """Assigns each image to a split by the `digest` of its pixels; own test and val splits must come first.

    The source's own val and test are kept. If it lacks one, a part of the other images becomes that split, as a
    function of the pixels only, so that new images never move old ones, and copies stay together.
    """

    def __init__(self, own: Mapping[Split, str], fractions: Fractions) -> None:
        self.own, self.fractions = own, fractions
        self.seen, self.digests = _Digests(), {"test": _Digests(), "val": _Digests()}

    def __call__(self, split: Split | None, pixels: int) -> Split:
        """The split of an image from the source's `split`; raises Unreadable for a copy of one in its test split."""
        self.seen.add(pixels)
        if split in self.digests:
            self.digests[split].add(pixels)
        if split != "test" and pixels in self.digests["test"]:
            raise Unreadable(COPY_OF_TEST)
        if split in ("val", "test"):
            return split
        if pixels in self.digests["val"]:
            return "val"
        position = pixels / 2**64  # uniform in [0, 1)
        if position < self.fractions.val:
            return "train" if "val" in self.own else "val"
        if position < self.fractions.val + self.fractions.test:
            return "train" if "test" in self.own else "test"
        return "train"

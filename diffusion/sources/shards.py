"""Image shards in WebDataset format, written from any source, with random access.

A sample consists of `KEY.json` (label, class, source, size, mode) and `KEY.png`, or `KEY.npy` (H, W, C) where no
picture has so many channels, in `{train,val,test}-NNNNNN.tar`; `manifest.json` describes the data set.
"""

import hashlib
import json
import operator
import os
import posixpath
import re
from array import array
from bisect import bisect
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from itertools import accumulate, islice
from pathlib import Path
from tarfile import BLOCKSIZE
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field

from diffusion.errors import counted
from diffusion.sources import duplicates
from diffusion.sources.bands import Bands
from diffusion.sources.convert import Converted, Rejected, convert
from diffusion.sources.images import Picture, Unreadable
from diffusion.sources.rejections import Rejections, Remark, TooFewImages
from diffusion.sources.splits import Fractions, Splitter
from diffusion.sources.stored import Stored
from diffusion.storage.executors import OWN_PROCESS, Executor
from diffusion.storage.files import sha256, write_json, write_sums
from diffusion.storage.tar import FORMAT, SPLITS, Facts, Member, Split, Tar, Writer, members, open_maps

MANIFEST = "manifest.json"
MAX_WARNINGS = 1000
"""Maximum number of warnings that are listed; there may be one for each image."""


class Sample(NamedTuple):
    """An image of a source, not yet decoded."""

    key: str
    """Unique and stable key, a function of the image's name or index. Letters, digits, `-` and `_`."""
    file: str
    """Name of the image in the source."""
    label: int | None
    split: Split | None
    """The source's own split, where it has one."""
    decode: Callable[[], Picture]
    """Decodes the image, also in another process, so it is picklable; a `trees.Decoder` once it is `portable`.

    Raises Unreadable, or SystemFault if the operating system cannot read the file.
    """
    rejected: str | None = None
    """Why the image is rejected without decoding it."""
    size: int = 0
    """Bytes of the image in the source, about; 0 if unknown. Samples are divided among tasks by it."""


class Source(Protocol):
    """A data set of images: `len()` samples, iterated in a fixed order with constant memory.

    The source's own test split comes first and its own val split second, so that later copies of their images are
    recognized.
    """

    @property
    def classes(self) -> tuple[str, ...]: ...

    @property
    def own_splits(self) -> Mapping[Split, str]:
        """The source's own splits, each with the name of its file or folder."""
        ...

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Sample]: ...


class Contents(Facts):
    """Contents of a split."""

    samples: int
    per_class: tuple[int, ...]
    """Number of samples of each class; the rest have no label."""
    shards: tuple[Tar, ...]


class Statistics(Facts):
    """Statistics per channel over all images of one mode, for values in [0, 1]."""

    images: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


class Manifest(Facts):
    """manifest.json of data/shards."""

    format: Literal[1] = FORMAT
    source: str
    classes: tuple[str, ...]
    splits: dict[Split, Contents]
    statistics: dict[str, Statistics]
    """By image mode: L, RGB, RGBA or a number of channels."""
    smallest: tuple[int, int]
    """Minimum width and minimum height."""
    largest: tuple[int, int]
    own_splits: dict[Split, str]
    """The source's own splits and their locations; other splits are chosen by a hash of the pixels."""
    rejected: tuple[Remark, ...]
    """Rejected files: unreadable images, and copies of images in the source's own test split; the first MAX_LISTED."""
    more_rejected: dict[str, int] = Field({}, exclude_if=operator.not_)
    """Number of further rejected files, by reason."""
    warnings: tuple[Remark, ...]
    """Files that were used despite a warning of their decoder, the first MAX_WARNINGS."""
    more_warnings: int = 0
    """Number of further warnings."""
    copies: int
    """Number of images with the same visible pixels as an earlier one."""
    near_duplicates: tuple[duplicates.Between, ...] | None = None
    """Similar images in different splits; None if the images are too small to tell."""
    multipage: int
    """Number of files with several pages or frames, of which the first was used."""

    @property
    def reasons(self) -> list[tuple[str, int]]:
        """The reasons for rejecting files, with their numbers of files, the most frequent ones first."""
        listed = Counter(remark.reason for remark in self.rejected)
        return (listed + Counter(self.more_rejected)).most_common()


def sample_key(name: str) -> str:
    """A readable key that depends only on the file's name; the digest distinguishes a-b/c, a/b-c and a/b/c."""
    readable = re.sub(r"[^A-Za-z0-9_]+", "-", posixpath.splitext(name)[0]).strip("-")
    return f"{readable[:60]}-{hashlib.sha256(os.fsencode(name)).hexdigest()[:12]}"


class _Tally:
    """Collects the manifest's statistics, from exact histograms, so that they do not depend on the order."""

    def __init__(self, classes: int) -> None:
        self.images: dict[str, int] = {}
        self.histograms: dict[str, NDArray[np.int64]] = {}
        self.sizes: NDArray[np.int64] | None = None
        self.per_class = {split: np.zeros(classes, np.int64) for split in SPLITS}
        self.warnings, self.more_warnings = list[Remark](), 0
        self.multipage = 0

    def add(self, sample: Sample, image: Converted, split: Split) -> None:
        mode, size = image.stored_mode, np.array(image.size)
        self.images[mode] = self.images.get(mode, 0) + 1
        self.histograms[mode] = self.histograms.get(mode, 0) + image.histogram
        least, most = self.sizes if self.sizes is not None else (size, size)
        self.sizes = np.array([np.minimum(least, size), np.maximum(most, size)])
        if sample.label is not None:
            self.per_class[split][sample.label] += 1
        room = MAX_WARNINGS - len(self.warnings)
        self.warnings += [Remark(file=sample.file, reason=warning) for warning in image.warnings[:room]]
        self.more_warnings += len(image.warnings[room:])
        self.multipage += image.several

    def statistics(self) -> dict[str, Statistics]:
        value = np.arange(256) / 255
        result = {}
        for mode in sorted(self.histograms):
            histogram = self.histograms[mode].reshape(-1, 256)  # (C, 256)
            share = histogram / histogram.sum(axis=1, keepdims=True)
            mean = share @ value
            std = np.sqrt((share * (value - mean[:, None]) ** 2).sum(axis=1))
            result[mode] = Statistics(
                images=self.images[mode], mean=tuple(mean.round(9).tolist()), std=tuple(std.round(9).tolist())
            )
        return result


def write(
    source: Source,
    name: str,
    directory: Path,
    fractions: Fractions,
    samples_per_shard: int,
    advance: Callable[[int], None] = lambda _: None,
    executor: Executor = OWN_PROCESS,
    *,
    max_rejected: float = 1.0,
    on_rejected: Callable[[Remark, bytes | None], None] = lambda *_: None,
) -> Manifest:
    """Write the shards and manifest of a source into an empty directory.

    `advance` is called for each image. Images that cannot be read, or are copies of images in the source's own test
    split, are rejected: they are listed in the manifest, and `on_rejected` is called with each and a thumbnail (PNG),
    where one can be made. `executor` decodes and encodes the images. Raises TooFewImages if no image can be used, more
    than the share `max_rejected` cannot be used, or a split is empty; and UserError if images cannot be decoded without
    the process being killed.
    """
    hashes = {split: duplicates.Hashes() for split in SPLITS}
    tally, splitter, rejected = _Tally(len(source.classes)), Splitter(source.own_splits, fractions), Rejections()
    with ExitStack() as stack:
        writers = {
            split: stack.enter_context(Writer(directory, split, max_samples=samples_per_shard)) for split in SPLITS
        }
        for sample, image in stack.enter_context(closing(convert(source, executor))):
            advance(1)
            try:
                if isinstance(image, Rejected):
                    raise Unreadable(image.reason)
                split = splitter(sample.split, image.digest)
            except Unreadable as error:
                remark = Remark(file=sample.file, reason=str(error))
                rejected.add(remark)
                on_rejected(remark, image.thumbnail)
                continue
            hashes[split].add(image.perceptual_hash)
            tally.add(sample, image, split)
            writers[split].add(sample.key, _record(sample, image, source.classes))
    splits = {split: _contents(writers[split].tars, tally.per_class[split]) for split in SPLITS}
    counts = {split: contents.samples for split, contents in splits.items()}
    rejected.check(name, sum(counts.values()), max_rejected)
    _check_counts(name, counts, source.own_splits)
    assert tally.sizes is not None
    smallest, largest = (tuple(size) for size in tally.sizes.tolist())
    found = duplicates.search(hashes)
    named = {split for each in found if each.pairs for split in each.splits}
    similar = {split: Images(directory, splits[split], verify=False) for split in named}
    manifest = Manifest(
        source=name,
        classes=source.classes,
        splits=splits,
        statistics=tally.statistics(),
        smallest=smallest,
        largest=largest,
        own_splits=dict(source.own_splits),
        rejected=tuple(rejected.listed),
        more_rejected=rejected.more,
        warnings=tuple(tally.warnings),
        more_warnings=tally.more_warnings,
        copies=splitter.seen.copies(),
        near_duplicates=duplicates.describe(found, lambda split, number: similar[split].source(number)),
        multipage=tally.multipage,
    )
    write_json(directory / MANIFEST, manifest.model_dump())
    write_sums(directory, {tar.name: tar.sha256 for contents in splits.values() for tar in contents.shards})
    return manifest


def _contents(tars: Sequence[Tar], per_class: NDArray[np.int64]) -> Contents:
    samples = sum(tar.samples for tar in tars)
    return Contents(samples=samples, per_class=tuple(per_class.tolist()), shards=tuple(tars))


def _record(sample: Sample, image: Converted, classes: Sequence[str]) -> dict[str, bytes]:
    """The stored files of an image, by extension."""
    record = {
        "label": sample.label,
        "class": None if sample.label is None else classes[sample.label],
        "source": sample.file,
        "size": image.size,
        "mode": image.mode,
    }
    return {"json": json.dumps(record).encode()} | image.content


def check_number(name: str, images: int) -> None:
    """Raise TooFewImages if so many images leave a split empty in any case."""
    if images < len(SPLITS):
        raise TooFewImages(
            f"{name}: only {counted(images, 'image')}; add some, since train, val and test need at least one each"
        )


def _check_counts(name: str, counts: Mapping[Split, int], own: Mapping[Split, str]) -> None:
    empty, total = [split for split, count in counts.items() if not count], sum(counts.values())
    for split in (split for split in empty if split in own):
        raise TooFewImages(f"{name}: no image of the source's split {split} ({own[split]}) can be used")
    check_number(name, total)
    for split in empty:
        if split == "train":
            advice = "decrease shard.val_fraction or shard.test_fraction, or add images"
        else:
            advice = f"increase shard.{split}_fraction, or add images"
        raise TooFewImages(f"{name}: {counted(total, 'image')}, of which none fell into the split {split}; {advice}")


def manifest_sha256(directory: Path) -> str:
    """SHA-256 of the manifest, which contains the digests of all shards."""
    return sha256(directory / MANIFEST)


class Images:
    """Random access to the images of a split, in the order written; needs 8 bytes of memory per image.

    Raises UserError if a shard is missing or, unless `verify` is false because this process wrote it, corrupt.
    """

    def __init__(self, directory: Path, contents: Contents, verify: bool = True) -> None:
        self._paths = [directory / tar.name for tar in contents.shards]
        self._map = open_maps(directory, contents.shards, verify)
        self._begins = list(accumulate((tar.samples for tar in contents.shards), initial=0))
        self._offsets = array("q")
        """Of each image's first member, KEY.json, in its shard."""
        for number in range(len(contents.shards)):
            found = (member.offset for member in members(self._map(number)) if member.extension == "json")
            self._offsets.extend(offset - BLOCKSIZE for offset in found)

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, index: int) -> tuple[Image.Image | Bands, int | None]:
        """An image and its label, or None."""
        reader = self.reader(index)
        return reader.read(), reader.label

    def source(self, index: int) -> str:
        """Name of an image's file in the source."""
        return str(self._find(index)[1]["source"])

    def _find(self, index: int) -> tuple[int, dict[str, Any], Member]:
        """The number of an image's shard, the content of its KEY.json, and its encoded image."""
        number = bisect(self._begins, index) - 1
        mapped = self._map(number)
        record, image = islice(members(mapped, self._offsets[index]), 2)
        return number, json.loads(mapped[record.offset : record.offset + record.size]), image

    def reader(self, index: int) -> Stored:
        """An image and its label, to be read in any process."""
        number, record, image = self._find(index)
        return Stored(self._paths[number], image.offset, image.size, record["label"])

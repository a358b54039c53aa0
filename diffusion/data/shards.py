"""Images in webdataset shards: written from any source, read at random.

A sample is `KEY.json` (label, class, source, size, mode) and `KEY.png`, in `{train,val,test}-NNNNNN.tar`;
`manifest.json` says the rest.
"""

import hashlib
import io
import json
import warnings
from array import array
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps
from pydantic import BaseModel, ConfigDict, ValidationError

from diffusion.data.noise import SPLITS, Split
from diffusion.data.tar import Tar, Writer, members, open_map
from diffusion.errors import UserError
from diffusion.files import read_checked, sha256, write_json, write_sums

MANIFEST = "manifest.json"


class Sample(NamedTuple):
    """One image of a source, not yet decoded."""

    key: str
    """Unique and stable: a function of the image's own name or index. Letters, digits, `-` and `_`."""
    file: str
    """Which file of the source it comes from."""
    label: int | None
    split: Split | None
    """The source's own split, where it has one."""
    decode: Callable[[], Image.Image]
    """Raises whatever Pillow raises on a damaged image."""


class Source(Protocol):
    """Images in some format: `len()` of them, iterated in a fixed order with flat memory."""

    @property
    def classes(self) -> tuple[str, ...]: ...

    @property
    def own_splits(self) -> frozenset[Split]: ...

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Sample]: ...


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Contents(_Model):
    """What a split holds."""

    samples: int
    shards: tuple[Tar, ...]


class Statistics(_Model):
    """Of all images of one mode, channel by channel, for values in [0, 1]."""

    images: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


class Rejected(_Model):
    """An image that was left out."""

    file: str
    reason: str


class Manifest(_Model):
    """manifest.json of data/shards."""

    source: str
    classes: tuple[str, ...]
    splits: dict[Split, Contents]
    statistics: dict[str, Statistics]
    """By image mode: L, RGB or RGBA."""
    smallest: tuple[int, int]
    """Least width and least height seen."""
    largest: tuple[int, int]
    rejected: tuple[Rejected, ...]


def split_of(sample: Sample, own: frozenset[Split], val_fraction: float, test_fraction: float) -> Split:
    """The split of a sample: the source's own, else by a hash of the key alone, so that new images never move old ones.

    Of a source's own train split, a part becomes whichever of val and test the source lacks.
    """
    if sample.split in ("val", "test"):
        return sample.split
    position = int.from_bytes(hashlib.sha256(sample.key.encode()).digest()[:8]) / 2**64  # uniform in [0, 1)
    if position < val_fraction:
        return "train" if "val" in own else "val"
    if position < val_fraction + test_fraction:
        return "train" if "test" in own else "test"
    return "train"


def normalise(image: Image.Image) -> Image.Image:
    """The image upright and in mode L, RGB or RGBA, losing nothing where it is in one already.

    16-bit grey is scaled to 8 bits. Raises ValueError for 32-bit pixels, which have no known range.
    """
    sixteen_bits = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM")
    image = ImageOps.exif_transpose(image)
    if not sixteen_bits and image.mode in ("I", "F"):
        raise ValueError(f"mode {image.mode}: 32-bit pixels have no known range")
    if sixteen_bits:
        image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
    elif image.mode != "L":
        image = image.convert("L" if image.mode == "1" else "RGB")
    image.info = {}  # or the PNG would carry colour profiles, dates and comments
    return image


def png(image: Image.Image) -> bytes:
    """The image as PNG: the same bytes for the same pixels. Fast rather than small: these images are small already."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


class _Tally:
    """Statistics from exact histograms, so in any order the same."""

    def __init__(self) -> None:
        self.images: dict[str, int] = {}
        self.histograms: dict[str, NDArray[np.int64]] = {}
        self.sizes: NDArray[np.int64] | None = None

    def add(self, image: Image.Image) -> None:
        mode, size = image.mode, np.array(image.size)
        self.images[mode] = self.images.get(mode, 0) + 1
        self.histograms[mode] = self.histograms.get(mode, 0) + np.array(image.histogram())
        least, most = self.sizes if self.sizes is not None else (size, size)
        self.sizes = np.array([np.minimum(least, size), np.maximum(most, size)])

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
    *,
    val_fraction: float,
    test_fraction: float,
    samples_per_shard: int,
    advance: Callable[[int], None] = lambda _: None,
) -> Manifest:
    """Write the shards and manifest of a source into an empty directory.

    `advance` is told of each image done. An image that cannot be decoded is listed in the manifest as rejected.
    Raises UserError if no image can be decoded, or a split stays empty.
    """
    tally, rejected = _Tally(), []
    with ExitStack() as stack:
        writers = {
            split: stack.enter_context(Writer(directory, split, max_samples=samples_per_shard)) for split in SPLITS
        }
        for sample in source:
            advance(1)
            try:
                # Any error at all: the decoders of a hundred formats raise what they like.
                with warnings.catch_warnings():
                    warnings.simplefilter("error", Image.DecompressionBombWarning)
                    original = sample.decode()
                    image = normalise(original)
                content = png(image)
            except Exception as error:
                reason = str(error).split("\n")[0] or type(error).__name__
                rejected.append(Rejected(file=sample.file, reason=reason))
                continue
            tally.add(image)
            record = {
                "label": sample.label,
                "class": None if sample.label is None else source.classes[sample.label],
                "source": sample.file,
                "size": original.size,
                "mode": original.mode,
            }
            split = split_of(sample, source.own_splits, val_fraction, test_fraction)
            writers[split].add(sample.key, {"json": json.dumps(record).encode(), "png": content})
    counts = {split: sum(tar.samples for tar in writers[split].tars) for split in SPLITS}
    _check_counts(name, counts, rejected)
    assert tally.sizes is not None
    (least_width, least_height), (most_width, most_height) = tally.sizes.tolist()
    manifest = Manifest(
        source=name,
        classes=source.classes,
        splits={split: Contents(samples=counts[split], shards=tuple(writers[split].tars)) for split in SPLITS},
        statistics=tally.statistics(),
        smallest=(least_width, least_height),
        largest=(most_width, most_height),
        rejected=tuple(rejected),
    )
    write_json(directory / MANIFEST, manifest.model_dump())
    write_sums(directory, {tar.name: tar.sha256 for split in SPLITS for tar in writers[split].tars})
    return manifest


def _check_counts(name: str, counts: Mapping[Split, int], rejected: list[Rejected]) -> None:
    total = sum(counts.values())
    if not total:
        why = f"; the first: {rejected[0].file}: {rejected[0].reason}" if rejected else ""
        raise UserError(f"{name}: none of its {len(rejected)} images can be used{why}")
    if empty := [split for split, count in counts.items() if not count]:
        raise UserError(
            f"{name}: no image of {total} fell into the split {empty[0]}; add images, or change shard.val_fraction or "
            "shard.test_fraction in params.yaml"
        )


def read_manifest(directory: Path) -> Manifest:
    """The manifest of data/shards; raises UserError if it is missing, damaged or not what this version writes."""
    path = directory / MANIFEST
    try:
        return Manifest.model_validate_json(read_checked(path, "shard"))
    except ValidationError:
        raise UserError(f"{path}: of another version; `dvc repro shard` writes it") from None


def manifest_sha256(directory: Path) -> str:
    """The digest of the manifest, which lists the digests of all shards."""
    return sha256(directory / MANIFEST)


class Images:
    """The images of one split at random, in the order they were written; 48 bytes of memory for each.

    Raises UserError if a shard is missing or damaged.
    """

    def __init__(self, directory: Path, contents: Contents) -> None:
        self._maps = [open_map(directory, tar, "shard") for tar in contents.shards]
        places = {"png": array("q"), "json": array("q")}
        for number, mapped in enumerate(self._maps):
            for member in members(mapped):
                places[member.extension].extend((number, member.offset, member.size))
        self._png, self._json = (np.array(places[kind]).reshape(-1, 3) for kind in ("png", "json"))

    def __len__(self) -> int:
        return len(self._png)

    def __getitem__(self, index: int) -> tuple[Image.Image, int | None]:
        """An image, and its label or None."""
        label: int | None = json.loads(self._content(self._json[index]))["label"]
        return Image.open(io.BytesIO(self._content(self._png[index])), formats=["PNG"]), label

    def _content(self, place: NDArray[np.int64]) -> bytes:
        number, offset, size = place.tolist()
        content: bytes = self._maps[number][offset : offset + size]
        return content

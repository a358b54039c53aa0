"""Near-duplicates across splits: images whose perceptual hashes differ in few bits.

The hash (pHash) has a bit for each of the 16x16 lowest frequencies of the discrete cosine transform, so that it hardly
changes when an image is compressed, resized or brightened; a crop changes it. benchmarks/near_duplicates.py measures
from which size, and up to which distance, it tells copies from images that are only similar.
"""

from array import array
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from diffusion.sources.bands import Bands
from diffusion.storage.tar import Facts, Split

SIDE = 16
"""Frequencies in each direction; the hash has SIDE ** 2 bits."""
MAX_BITS = 16
"""Maximum number of bits in which near-duplicates differ."""
MIN_SIDE = 28
"""Minimum side of an image; in a smaller one, the hash of a copy differs too much."""
SHOWN = 5
"""Maximum number of near-duplicates listed for two splits."""
ROWS = 16
"""Images compared at once with all of another split."""
PAIRS = 2**18
"""Pairs of images with an equal part of their hashes that are compared at once, about."""
MAX_SHARE = 1 / 200
"""Share of such pairs among all pairs above which comparing all is faster."""
Words = NDArray[np.uint64]
"""Hashes, (4, n)"""
BETWEEN: tuple[tuple[Split, Split], ...] = (("train", "val"), ("train", "test"), ("val", "test"))


class Pair(Facts):
    """An image of the second split, and before it the one of the first that it resembles most."""

    numbers: tuple[int, int]
    """Of the images in their splits, in the order of the shards, from 0."""
    files: tuple[str, str]
    bits: int
    """Number of bits in which their hashes differ, of 256."""


class Between(Facts):
    """Near-duplicates between two splits."""

    first: Split
    second: Split
    images: int
    """Number of images of the second split that resemble one of the first."""
    pairs: tuple[Pair, ...]
    """The most similar ones."""


class Found(NamedTuple):
    """Near-duplicates between two splits, by their numbers in the splits."""

    splits: tuple[Split, Split]
    images: int
    pairs: list[tuple[int, int, int]]
    """The most similar ones: the image of the first split, that of the second, and the bits in which they differ."""


def perceptual_hash(image: Image.Image | Bands) -> bytes | None:
    """32 bytes that are similar for similar images; None if the image is too small, or no picture.

    Transparent images are composited on white.
    """
    if isinstance(image, Bands) or min(image.size) < MIN_SIDE:
        return None
    import imagehash  # takes a while

    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.packbits(imagehash.phash(image, hash_size=SIDE, highfreq_factor=2).hash).tobytes()


class Hashes:
    """The perceptual hashes of a split's images; needs 40 bytes of memory per image."""

    def __init__(self) -> None:
        self._bits, self._numbers, self._images = bytearray(), array("q"), 0

    def add(self, bits: bytes | None) -> None:
        """Add those of the next image, if it has one."""
        if bits is not None:
            self._bits += bits
            self._numbers.append(self._images)
        self._images += 1

    def __len__(self) -> int:
        """Number of hashes."""
        return len(self._numbers)

    @property
    def words(self) -> NDArray[np.uint64]:
        """(4, n)"""
        return np.ascontiguousarray(np.frombuffer(self._bits, np.uint64).reshape(-1, SIDE**2 // 64).T)

    @property
    def numbers(self) -> NDArray[np.int64]:
        """The images' numbers in the split, (n,)."""
        return np.array(self._numbers, np.int64)


def search(hashes: Mapping[Split, Hashes]) -> list[Found]:
    """Find the near-duplicates between each two splits; empty if no two splits have images that are large enough."""
    return [
        _between(splits, *(hashes[split] for split in splits))
        for splits in BETWEEN
        if all(len(hashes[split]) for split in splits)
    ]


def describe(found: list[Found], name: Callable[[Split, int], str]) -> tuple[Between, ...] | None:
    """For the manifest; `name` gives the file of an image of a split. None if nothing could be compared."""
    between = []
    for (first, second), images, pairs in found:
        named = tuple(Pair(numbers=(i, j), files=(name(first, i), name(second, j)), bits=bits) for i, j, bits in pairs)
        between.append(Between(first=first, second=second, images=images, pairs=named))
    return tuple(between) or None


def _between(splits: tuple[Split, Split], first: Hashes, second: Hashes) -> Found:
    a, b = first.words, second.words
    bits, nearest = np.divmod(_by_parts(a, b), len(first))
    similar = np.flatnonzero(bits <= MAX_BITS)
    chosen = similar[np.argsort(bits[similar], kind="stable")][:SHOWN]
    numbers = first.numbers[nearest[chosen]], second.numbers[chosen], bits[chosen]
    return Found(splits, len(similar), list(zip(*(part.tolist() for part in numbers), strict=True)))


def _by_all(a: Words, b: Words) -> NDArray[np.int64]:
    """For each hash of b, bits * n + j: the fewest bits in which one of the n hashes of a differs, and the first."""
    best = np.empty(b.shape[1], np.int64)
    for start in range(0, len(best), ROWS):
        rows = slice(start, start + ROWS)
        bits = np.zeros((len(best[rows]), a.shape[1]), np.uint16)
        for ours, theirs in zip(a, b, strict=True):
            bits += np.bitwise_count(ours ^ theirs[rows, None])
        best[rows] = bits.min(axis=1).astype(np.int64) * a.shape[1] + bits.argmin(axis=1)
    return best


def _by_parts(a: Words, b: Words) -> NDArray[np.int64]:
    """As `_by_all`, where they differ in at most MAX_BITS; elsewhere, some number of more bits.

    Of MAX_BITS + 1 parts of the bits, one is then equal, so that only hashes with an equal part are compared.
    """
    size = a.shape[1]
    best = np.full(b.shape[1], (MAX_BITS + 1) * size)
    for part in range(MAX_BITS + 1):
        # Neighbouring frequencies are similar; bits from all over make more different parts.
        mask = np.packbits(np.arange(SIDE**2) % (MAX_BITS + 1) == part).view(np.uint64)[:, None]
        ours: NDArray[np.uint64] = np.bitwise_or.reduce(a & mask)  # no two bits in one place
        theirs: NDArray[np.uint64] = np.bitwise_or.reduce(b & mask)
        order = np.argsort(ours)
        ours = ours[order]
        start, end = np.searchsorted(ours, theirs), np.searchsorted(ours, theirs, "right")
        until = np.cumsum(end - start)  # number of pairs up to each hash of b
        if until[-1] > MAX_SHARE * size * len(best):
            return _by_all(a, b)
        for rows in np.split(np.arange(len(best)), np.searchsorted(until, np.arange(PAIRS, until[-1], PAIRS))):
            count = (end - start)[rows]
            i = np.repeat(rows, count)
            place = np.arange(len(i)) - np.repeat(np.cumsum(count) - count, count)  # among those of the same i
            j = order[start[i] + place]
            bits = sum(np.bitwise_count(x[j] ^ y[i]).astype(np.int64) for x, y in zip(a, b, strict=True))
            np.minimum.at(best, i, bits * size + j)
    return best

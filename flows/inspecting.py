"""What `ddpm import` finds out about images: the parameters for training on them, and a contact sheet."""

import statistics
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from diffusion.errors import UserError, counted
from diffusion.pairs.pixels import Fit
from diffusion.samples import grid_png
from diffusion.sources.arrays import Arrays
from diffusion.sources.bands import Bands
from diffusion.sources.colours import DEEP_GREY
from diffusion.sources.descriptions import describe_sizes
from diffusion.sources.images import Picture, Unreadable
from diffusion.sources.shards import Source

LOOKED_AT = 100
"""Number of images that are decoded."""
SHOWN = 12
"""Number of images on the contact sheet."""
MAX_SIDE = 64
"""Maximum side that is chosen without `--size`: larger images take long to train on."""


class Findings(NamedTuple):
    """What some images of a source have in common."""

    sizes: list[tuple[int, int]]
    """(width, height) of each image looked at."""
    colour: bool
    """Whether one of them is not grey."""
    classes: bool
    """Whether there are at least two classes."""
    transparent: int = 0
    """Number of images with transparent pixels."""
    deep: bool = False
    """Whether one of them has a range of values to choose: an array, or a greyscale picture with more than 8 bits."""
    rejected: tuple[str, ...] = ()
    """Files looked at that cannot be read, each with the reason."""
    bands: int = 0
    """Number of separate channels; 0 if the images are greyscale or in colour."""

    def size(self, side: int | None) -> tuple[int, int]:
        """Height and width to train at: `side`, else that of all images, else a square by the median."""
        if side is not None:
            return side, side
        (width, height), *others = self.sizes
        if all(size == (width, height) for size in others) and max(width, height) <= MAX_SIDE:
            return height, width
        shorter = min(MAX_SIDE, int(statistics.median(min(size) for size in self.sizes)))
        rounded = max(shorter - shorter % 8, 8)
        return rounded, rounded

    def parameters(self, side: int | None) -> dict[str, Any]:
        """Changes to params.yaml: image size, channels and classes."""
        height, width = self.size(side)
        pairs = {"height": height, "width": width, "channels": self.bands or (3 if self.colour else 1)}
        return {"pairs": pairs, "network": {"classes": self.classes}}

    def describe(self, fit: Fit) -> str:
        """Sizes and colours in one line, and what will be done to the images."""
        widths, heights = zip(*self.sizes, strict=True)
        sizes = describe_sizes((min(widths), min(heights)), (max(widths), max(heights)))
        found = f"{sizes}, {f'{self.bands} channels' if self.bands else 'colour' if self.colour else 'greyscale'}"
        if self.transparent:
            becomes = "kept" if fit.channels == 4 else f"on {fit.background}"
            found += f", {self.transparent} with transparent pixels ({becomes})"
        done = fit.describe(**fit.tally(Counter(self.sizes))) or "none is cropped or enlarged"
        looked_at = f"{counted(len(self.sizes) + len(self.rejected), 'image')} looked at"
        if self.rejected:
            looked_at += f", of which {len(self.rejected)} cannot be read, such as {self.rejected[0]}"
        return f"{found} ({looked_at}); at {fit.width}x{fit.height}, {done}"


def look_at(source: Source, background: str = "white") -> Findings:
    """Decode some images of a source, transparent ones on `background`.

    Raises UserError with the first reason if none can be read.
    """
    rejected = list[str]()
    deep, looks = isinstance(source, Arrays), []
    for picture in _decoded(source, LOOKED_AT, rejected):
        deep |= picture.mode in DEEP_GREY
        looks.append(_look(picture.image, background))
    if not looks:
        rejected = [f"{sample.file}: {sample.rejected}" for sample in source if sample.rejected] + rejected
        raise UserError(f"{counted(len(rejected), 'file')}, of which none can be read; the first: {rejected[0]}")
    sizes, colour, transparent, bands = zip(*looks, strict=True)
    classes = len(source.classes) > 1
    return Findings(list(sizes), any(colour), classes, sum(transparent), deep, tuple(rejected), max(bands))


def contact_sheet(source: Source, fit: Fit) -> bytes:
    """A grid of some images as the network will see them, as a PNG; `look_at` must have found at least one."""
    some = list(_decoded(source, SHOWN, [])) or list(islice(_decoded(source, LOOKED_AT, []), 1))
    return grid_png(np.stack([fit(picture.image) for picture in some]))


def _look(image: Image.Image | Bands, background: str) -> tuple[tuple[int, int], bool, bool, int]:
    """Size, whether red, green and blue differ anywhere, whether a pixel is transparent, and the number of bands."""
    if isinstance(image, Bands):
        return image.size, False, False, len(image.bands)
    transparent = image.mode == "RGBA" and image.getchannel("A").histogram()[255] < image.width * image.height
    seen = Fit(3, image.height, image.width, background=background)(image)
    colour = bool(np.ptp(seen, axis=0).any())
    return image.size, colour, transparent, 0


def _decoded(source: Source, count: int, rejected: list[str]) -> Iterator[Picture]:
    """`count` images of a source at random, always the same ones, or all; adds those that fail to `rejected`."""
    usable = [index for index, sample in enumerate(source) if not sample.rejected]
    chosen = set(np.random.default_rng(0).permutation(usable)[:count].tolist())
    for index, sample in enumerate(source):
        if index in chosen:
            try:
                yield sample.decode()
            except Unreadable as error:
                rejected.append(f"{sample.file}: {error}")

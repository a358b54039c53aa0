"""What `ddpm import` finds out about images: the parameters for training on them, and a contact sheet."""

import statistics
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from diffusion.errors import UserError
from diffusion.pairs.pixels import fit
from diffusion.samples import grid_png
from diffusion.sources.images import MAX_PIXELS, Picture, Unreadable
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
        pairs = {"height": height, "width": width, "channels": 3 if self.colour else 1}
        return {"pairs": pairs, "network": {"classes": self.classes}}

    def describe(self, height: int, width: int) -> str:
        """Sizes and colours in one line, and what will be done to the images."""
        widths, heights = zip(*self.sizes, strict=True)
        same = len(set(self.sizes)) == 1
        sizes = f"{widths[0]}x{heights[0]}" if same else f"{min(widths)}x{min(heights)} to {max(widths)}x{max(heights)}"
        cropped = sum(w * height != h * width for w, h in self.sizes)
        enlarged = sum(w < width or h < height for w, h in self.sizes)
        done = [f"{number} {what}" for number, what in ((cropped, "cropped"), (enlarged, "enlarged")) if number]
        found = f"{sizes}, {'colour' if self.colour else 'greyscale'} ({len(self.sizes)} images looked at)"
        return f"{found}; at {width}x{height}, {' and '.join(done) or 'none is cropped or enlarged'}"


def look_at(source: Source, max_pixels: int = MAX_PIXELS) -> Findings:
    """Decode some images of a source; raises UserError with the first reason if none can be read."""
    rejected = list[str]()
    decoded = _decoded(source, LOOKED_AT, max_pixels, rejected)
    pictures = [(picture.image.size, _is_colour(picture.image)) for picture in decoded]
    if not pictures:
        raise UserError(f"none of {len(rejected)} files can be read; the first: {rejected[0]}")
    return Findings([size for size, _ in pictures], any(colour for _, colour in pictures), len(source.classes) > 1)


def contact_sheet(source: Source, pairs: Mapping[str, int], max_pixels: int = MAX_PIXELS) -> bytes:
    """A grid of some images as the network will see them, as a PNG; `look_at` must have found at least one."""
    shape = pairs["channels"], pairs["height"], pairs["width"]
    some = list(_decoded(source, SHOWN, max_pixels, [])) or list(islice(_decoded(source, LOOKED_AT, max_pixels, []), 1))
    return grid_png(np.stack([fit(picture.image, *shape) for picture in some]))


def _is_colour(image: Image.Image) -> bool:
    """Whether red, green and blue differ anywhere."""
    return image.mode != "L" and bool(np.ptp(np.asarray(image.convert("RGB")), axis=2).any())


def _decoded(source: Source, count: int, max_pixels: int, rejected: list[str]) -> Iterator[Picture]:
    """`count` images of a source at random, always the same ones, or all; adds those that fail to `rejected`."""
    usable = list[int]()
    for index, sample in enumerate(source):
        if sample.left_out:
            rejected.append(f"{sample.file}: {sample.left_out}")
        else:
            usable.append(index)
    chosen = set(np.random.default_rng(0).permutation(usable)[:count].tolist())
    for index, sample in enumerate(source):
        if index in chosen:
            try:
                yield sample.decode(max_pixels)
            except Unreadable as error:
                rejected.append(f"{sample.file}: {error}")

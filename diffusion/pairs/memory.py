"""In-memory images, for training without stored pairs."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from diffusion.errors import UserError
from diffusion.pairs.noise import BLOCK
from diffusion.pairs.pairs import BlockedImages
from diffusion.pairs.pixels import Filter, Fit, Resize
from diffusion.sources.images import Unreadable
from diffusion.sources.locations import locate
from diffusion.sources.reading import Reading
from diffusion.sources.shards import Source
from diffusion.sources.sources import open_source


@dataclass(frozen=True)
class Images:
    """Images of one size, with labels."""

    pixels: NDArray[np.uint8]
    """(N, C, H, W)"""
    y: NDArray[np.int64]
    """(N,), -1 where there is no label."""
    classes: tuple[str, ...] = ()
    """Class names, by index."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)"""
        _, channels, height, width = self.pixels.shape
        return channels, height, width

    def __len__(self) -> int:
        return len(self.pixels)


def load_images(
    path: str | Path,
    height: int,
    width: int,
    channels: int = 3,
    *,
    resize: Resize = "crop",
    background: str = "white",
    filter: Filter = "bicubic",
    value_range: tuple[float, float] | None = None,
) -> Images:
    """Load the images of any source, such as a folder, at one size.

    Args:
        path: a folder, .zip or .tar of images, an .npz file, or another source that `ddpm import` accepts; or a URL.
        height: of the images returned, in pixels.
        width: of the images returned, in pixels.
        channels: 1, 3 or 4 for pictures; otherwise, that of the arrays.
        resize: how images of another aspect ratio are resized.
        background: colour behind transparent pixels and beside padded images.
        filter: Pillow's filter for resizing.
        value_range: the values of black and white of arrays, if their type does not say.
    Raises:
        UserError: no supported images were found, or one cannot be read; the message names it.
    """
    with locate(path).at_hand("load_images") as place:
        fit = Fit(channels, height, width, resize, background, filter)
        return _load(open_source(place, Reading(value_range=value_range or ())), fit)


def _load(source: Source, fit: Fit) -> Images:
    pixels, y = [], []
    for sample in source:
        if sample.rejected is not None:
            raise UserError(f"{sample.file}: {sample.rejected}")
        try:
            image = sample.decode().image
        except Unreadable as error:
            raise UserError(f"{sample.file}: {error}") from None
        pixels.append(fit(image))
        y.append(-1 if sample.label is None else sample.label)
    return Images(np.stack(pixels), np.array(y, np.int64), source.classes)


class Blocks(BlockedImages):
    """In-memory counterpart of `pairs.Pairs`; the images are not shuffled."""

    def __init__(self, images: Images, seed: int, num_timesteps: int) -> None:
        super().__init__(len(images), images.shape, seed, "train", num_timesteps)
        self._images = images

    def x_0(self, block: int) -> NDArray[np.uint8]:
        return self._images.pixels[block * BLOCK :][:BLOCK]

    def labels(self, block: int) -> NDArray[np.int64]:
        return self._images.y[block * BLOCK :][:BLOCK]

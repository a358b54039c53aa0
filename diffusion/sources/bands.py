"""Images with any number of channels, which Pillow has no mode for."""

from collections.abc import Callable
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

MODES = {1: "L", 3: "RGB", 4: "RGBA"}
"""Pillow's mode of pictures by number of channels."""


class Bands(NamedTuple):
    """An image of separate 8-bit channels, for instance spectral ones; the methods are those of Pillow's images."""

    bands: tuple[Image.Image, ...]
    """One image of mode L per channel."""

    @classmethod
    def of(cls, pixels: NDArray[np.uint8]) -> Self:
        """The image with the given pixels, (H, W, C)."""
        return cls(tuple(map(Image.fromarray, np.ascontiguousarray(pixels.transpose(2, 0, 1)))))

    @property
    def size(self) -> tuple[int, int]:
        """(width, height)"""
        return self.bands[0].size

    @property
    def mode(self) -> str:
        return f"{len(self.bands)} channels"

    def each(self, change: Callable[[Image.Image], Image.Image]) -> "Bands":
        """Apply a function to each channel."""
        return Bands(tuple(map(change, self.bands)))

    def histogram(self) -> list[int]:
        """The 256 counts of each channel, one channel after another."""
        return [count for band in self.bands for count in band.histogram()]

    def pixels(self) -> NDArray[np.uint8]:
        """(H, W, C)"""
        return np.stack([np.asarray(band) for band in self.bands], axis=2)

"""Pixels: an image as an array of one size, to [-1, 1] for the network, and back."""

from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

Real = TypeVar("Real", bound=np.floating[Any])


def fit(image: Image.Image, channels: int, height: int, width: int) -> NDArray[np.uint8]:
    """An image as uint8 (C, H, W): laid on white if transparent, cropped to the aspect ratio and resized if need be."""
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("L" if channels == 1 else "RGB")
    if image.size != (width, height):
        image = ImageOps.fit(image, (width, height))
    return np.asarray(image).reshape(height, width, channels).transpose(2, 0, 1)


def to_x_0(values: NDArray[np.uint8], dtype: type[Real]) -> NDArray[Real]:
    """0..255 to [-1, 1], of any shape, computed in `dtype`."""
    return values / dtype(127.5) - dtype(1)


def to_uint8(x: NDArray[np.float32]) -> NDArray[np.uint8]:
    """[-1, 1] to 0..255, of any shape: the inverse of `to_x_0`."""
    scaled: NDArray[np.float32] = np.rint((x.clip(-1, 1) + 1) * 127.5)
    return scaled.astype(np.uint8)

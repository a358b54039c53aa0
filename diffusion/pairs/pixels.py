"""Conversion of images to arrays of a fixed size, to [-1, 1] and back."""

from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

Real = TypeVar("Real", bound=np.floating[Any])


def fit(image: Image.Image, channels: int, height: int, width: int) -> NDArray[np.uint8]:
    """Convert an image to uint8 (C, H, W): composited on white, center-cropped to the aspect ratio and resized."""
    if image.mode == "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("L" if channels == 1 else "RGB")
    if image.size != (width, height):
        image = ImageOps.fit(image, (width, height))
    return np.asarray(image).reshape(height, width, channels).transpose(2, 0, 1)


def to_x_0(values: NDArray[np.uint8], dtype: type[Real]) -> NDArray[Real]:
    """Scale 0..255 to [-1, 1], computed in `dtype`; any shape."""
    return values / dtype(127.5) - dtype(1)


def to_uint8(x: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Scale [-1, 1] to 0..255 with clipping and rounding, the inverse of `to_x_0`; any shape."""
    scaled: NDArray[np.float32] = np.rint((x.clip(-1, 1) + 1) * 127.5)
    return scaled.astype(np.uint8)

"""Pixels for the tests of image files, with expected values by arithmetic."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

W, H = 16, 12
RNG = np.random.default_rng(0)
DEEP = RNG.integers(0, 65536, (H, W)).astype(np.uint16)
BYTES = RNG.integers(0, 256, (H, W, 4), dtype=np.uint8)
PALETTE = RNG.integers(0, 256, (256, 3), dtype=np.uint8)


def rgba(pixels: NDArray[Any]) -> NDArray[np.int64]:
    """Grey, RGB or RGBA as RGBA."""
    pixels = np.asarray(pixels).astype(np.int64)
    if pixels.ndim == 2:
        pixels = np.repeat(pixels[..., None], 3, axis=2)
    if pixels.shape[2] == 3:
        pixels = np.concatenate([pixels, np.full_like(pixels[..., :1], 255)], axis=2)
    return pixels


def differ(image: Image.Image, expected: NDArray[Any]) -> int:
    """The largest difference in any channel; of colour, where it is visible."""
    assert image.mode in ("L", "RGB", "RGBA")
    found, wanted = rgba(np.asarray(image)), rgba(expected)
    assert found.shape == wanted.shape
    difference = np.abs(found - wanted)
    difference[..., :3][wanted[..., 3] == 0] = 0
    return int(difference.max())


def upright(pixels: NDArray[Any], orientation: int) -> NDArray[Any]:
    """Stored pixels as they are to be shown, by the table of the Exif standard: where row 0 and column 0 are."""
    rows = {1: "top", 2: "top", 3: "bottom", 4: "bottom"}
    columns = {1: "left", 2: "right", 3: "right", 4: "left"}
    if orientation in rows:
        pixels = pixels[::-1] if rows[orientation] == "bottom" else pixels
        return pixels[:, ::-1] if columns[orientation] == "right" else pixels
    pixels = pixels.swapaxes(0, 1)  # row 0 is a visual column
    pixels = pixels[:, ::-1] if orientation in (6, 7) else pixels  # row 0 is the right-hand side
    return pixels[::-1] if orientation in (7, 8) else pixels  # column 0 is the bottom


def from_ycbcr(pixels: NDArray[Any]) -> NDArray[np.float64]:
    """By ITU-R BT.601 with full range, as in JFIF."""
    y, cb, cr = np.moveaxis(pixels.astype(float), -1, 0)
    red, blue = y + 1.402 * (cr - 128), y + 1.772 * (cb - 128)
    return np.clip(np.stack([red, y - 0.344136 * (cb - 128) - 0.714136 * (cr - 128), blue], axis=-1), 0, 255)


def save(path: Path, image: Image.Image, **options: Any) -> bytes:
    image.save(path, **options)
    return path.read_bytes()

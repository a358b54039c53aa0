"""Conversion of an image's colours to 8-bit sRGB, in mode L, RGB or RGBA."""

import io
import warnings
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms

SRGB = ImageCms.createProfile("sRGB")
CLOSE_TO_SRGB = 2
"""Tolerance in grey levels (of 255): a profile that changes no colour by more is treated as sRGB, unconverted."""


DEEP_GREY = frozenset({"I;16", "I;16B", "I;16L", "I", "F"})
"""Pillow's modes of greyscale pixels with more than 8 bits."""


class Unreadable(Exception):
    """An image cannot be used; the message is one line that does not name the file."""

    def __init__(self, reason: str, thumbnail: Image.Image | None = None) -> None:
        super().__init__(reason)
        self.thumbnail = thumbnail
        """A small picture of it, where one can be made."""


def from_16_bits(image: Image.Image, white: int, negative: bool) -> tuple[Image.Image, Image.Image | None]:
    """Split 16-bit pixels into colour, in mode I;16 from 0 to 65535, and alpha."""
    values = np.asarray(image).astype(np.int64)
    alpha = _alpha(values, image.info.get("transparency"))
    values = (values * 65535 + white // 2) // white
    return Image.fromarray((65535 - values if negative else values).astype(np.uint16)), alpha


def from_range(
    values: NDArray[Any], transparent: int | None, value_range: tuple[float, ...], negative: bool
) -> tuple[Image.Image, Image.Image | None]:
    """As `from_16_bits`, for pixels (H, W) of any type, of which `value_range` are the values of black and white."""
    alpha = _alpha(values, transparent)
    scaled, clipped = scale(values, value_range, 65535)
    if clipped:
        warnings.warn(clipped, stacklevel=2)
    return Image.fromarray((65535 - scaled if negative else scaled).astype(np.uint16)), alpha


def _alpha(values: NDArray[Any], transparent: int | None) -> Image.Image | None:
    return None if transparent is None else Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8))


def scale(values: NDArray[Any], value_range: tuple[float, ...], top: int) -> tuple[NDArray[np.float64], str]:
    """Scale values linearly to 0 to `top`, rounding halves to even; and say, in words, how many had to be clipped.

    Raises Unreadable if one is not finite.
    """
    with np.errstate(invalid="ignore"):  # NaN may be a signalling one
        values = values.astype(np.float64)
    if not np.isfinite(values).all():
        raise Unreadable("contains values that are not finite numbers")
    low, high = value_range
    scaled = np.rint((values.clip(low, high) - low) * (top / (high - low)))
    if outside := int(((values < low) | (values > high)).sum()):
        return scaled, f"{outside} of {values.size} values lie outside {low:g} to {high:g} and were clipped"
    return scaled, ""


def separate(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Split an image into colour, in mode L, RGB or CMYK, and alpha."""
    if image.mode in ("La", "RGBa"):
        image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
    grey = image.mode in ("1", "L", "LA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return image.convert("L" if grey else "RGB"), image.getchannel("A")
    if image.mode in ("L", "RGB", "CMYK"):
        return image, None
    if image.mode in ("1", "P", "YCbCr", "HSV", "RGBX"):
        return image.convert("L" if grey else "RGB"), None
    if image.mode == "LAB":
        raise Unreadable(
            "8-bit L*a*b* pixels, which are too coarse for sRGB; convert it to sRGB with the program that made it"
        )
    raise Unreadable(f"mode {image.mode}: pixels of 32 bits have no known black and white; set shard.value_range")


def to_srgb(colour: Image.Image, profile: bytes | None, deep: bool) -> Image.Image:
    """Convert colour to sRGB in mode L or RGB, 8 bits per channel. `deep`: whether the file has more bits."""
    grey = colour.mode in ("L", "I;16")
    if profile:
        colour = _as_described(colour, profile)
        if (convert := _conversion(profile, colour.mode)) is not None:
            if deep and colour.mode == "RGB" and _steepest(convert) > 6:
                raise Unreadable(
                    "16-bit pixels in a linear RGB space, of which only 8 bits are read; convert it to sRGB"
                )
            colour = convert(colour)
    return _eight_bits(colour).convert("L" if grey else "RGB")


def _as_described(colour: Image.Image, profile: bytes) -> Image.Image:
    """Convert colour to the mode that an ICC profile describes; raises Unreadable if they do not match."""
    try:
        space = ImageCms.ImageCmsProfile(io.BytesIO(profile)).profile.xcolor_space.strip()
    except OSError:
        raise Unreadable("a damaged ICC profile") from None
    if space == "RGB" and colour.mode in ("L", "I;16"):
        return _eight_bits(colour).convert("RGB")
    if space == "GRAY" and colour.mode == "RGB" and not np.ptp(np.asarray(colour), axis=2).any():
        return colour.convert("L")
    if {"GRAY": "L", "RGB": "RGB", "CMYK": "CMYK"}.get(space) != colour.mode.replace("I;16", "L"):
        raise Unreadable(f"its ICC profile is for {space} pixels, but it has {colour.mode} pixels")
    return colour


@lru_cache(maxsize=32)
def _conversion(profile: bytes, mode: str) -> Callable[[Image.Image], Image.Image] | None:
    """Conversion from an ICC profile to sRGB for pixels of a mode; None if the profile is practically sRGB."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        intent = ImageCms.Intent(source.profile.rendering_intent)
        # Little CMS's optimizations are only exact for matrix profiles; they lose 30 levels in dark linear grey.
        exact = mode != "RGB" or not source.profile.is_matrix_shaper
        flags = ImageCms.Flags.NOOPTIMIZE if exact else ImageCms.Flags.NONE
        transform = ImageCms.ImageCmsTransform(
            source, ImageCms.ImageCmsProfile(SRGB), mode, "RGB", intent=intent, flags=flags
        )
    except (OSError, ValueError):
        raise Unreadable("an ICC profile that cannot be applied") from None
    if mode == "CMYK":
        return transform.apply
    if mode == "RGB":
        steps = np.arange(0, 256, 15, dtype=np.uint8)
        probe = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(1, -1, 3)
        change = np.asarray(transform.apply(Image.fromarray(probe))).astype(int) - probe
        return transform.apply if np.abs(change).max() > CLOSE_TO_SRGB else None
    ramp = np.arange(256, dtype=np.uint8) if mode == "L" else np.arange(65536, dtype=np.uint16)
    table = np.asarray(transform.apply(Image.fromarray(ramp[None])).convert("L"))[0]
    change = table - ramp * (255 / ramp[-1])
    return partial(_by_table, table) if np.abs(change).max() > CLOSE_TO_SRGB else None


def _by_table(table: NDArray[np.uint8], image: Image.Image) -> Image.Image:
    return Image.fromarray(table[np.asarray(image)])


def _steepest(convert: Callable[[Image.Image], Image.Image]) -> int:
    """The largest output step between neighbouring 8-bit greys."""
    ramp = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, axis=2)
    return int(np.diff(np.asarray(convert(Image.fromarray(ramp))).astype(int), axis=1).max())


def _eight_bits(colour: Image.Image) -> Image.Image:
    if colour.mode != "I;16":
        return colour
    return Image.fromarray(((np.asarray(colour).astype(np.int64) + 128) // 257).astype(np.uint8))


def join(colour: Image.Image, alpha: Image.Image | None) -> Image.Image:
    if alpha is not None:
        colour = colour.convert("RGB")
        colour.putalpha(alpha)
    image = colour.copy()
    image.info = {}  # otherwise PNG files would contain profiles, dates and comments
    return image

"""How a source is read."""

from typing import Literal, NamedTuple

MAX_PIXELS = 89_478_485
"""Default maximum of width times height of an image file: Pillow's, against decompression bombs."""
Layout = Literal["auto", "channels-first", "channels-last"]


class Reading(NamedTuple):
    """What a source leaves open; by default, an ambiguous file is an error that names the parameter to set."""

    split_names_as_classes: bool = False
    """Whether classes, and folders inside classes, may be named like a split."""
    layout: Layout = "auto"
    """Order of the axes in arrays: channels-first is (N, C, H, W), channels-last (N, H, W, C)."""
    value_range: tuple[float, ...] = ()
    """The values of black and white in arrays, and in greyscale pictures of more than 8 bits; empty: those of their
    type."""
    max_pixels: int = MAX_PIXELS
    """Maximum of width times height of an image file."""


DEFAULTS = Reading()

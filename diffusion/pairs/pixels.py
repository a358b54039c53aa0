"""Conversion of images to arrays of a fixed size, to [-1, 1] and back."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, TypeVar, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageColor, ImageOps

from diffusion.errors import UserError
from diffusion.sources.bands import MODES, Bands

Real = TypeVar("Real", bound=np.floating[Any])
Resize = Literal["crop", "pad", "stretch"]
Filter = Literal["nearest", "box", "bilinear", "bicubic", "lanczos"]


def opaque(colour: str) -> str:
    """The colour itself; raises ValueError if it is none, or transparent."""
    try:
        if len(ImageColor.getrgb(colour)) == 3:
            return colour
    except ValueError:
        pass
    raise ValueError("must be an opaque colour, such as white or #ffffff")


@dataclass(frozen=True)
class Fit:
    """How images are brought to one size and number of channels; raises UserError for unknown names."""

    channels: int
    """1: greyscale; 3: RGB; 4: RGB and alpha, not premultiplied. Other numbers: the channels of an array."""
    height: int
    width: int
    resize: Resize = "crop"
    """crop: cut off what exceeds the aspect ratio, equally at both ends; pad: add `background`; stretch: distort."""
    background: str = "white"
    """Colour behind transparent pixels and beside padded images, in CSS notation; as grey where there is no colour."""
    filter: Filter = "bicubic"
    """Pillow's filter, antialiased except nearest."""

    def __post_init__(self) -> None:
        for name, names in (("resize", get_args(Resize)), ("filter", get_args(Filter))):
            if getattr(self, name) not in names:
                raise UserError(f"{name}: must be {', '.join(names)} (got {getattr(self, name)!r})")
        try:
            opaque(self.background)
        except ValueError as error:
            raise UserError(f"background: {error} (got {self.background!r})") from None

    def __call__(self, image: Image.Image | Bands) -> NDArray[np.uint8]:
        """Convert an image to (C, H, W).

        Transparent pixels are composited on `background` before resizing; with 4 channels, invisible ones get its
        colour. Raises UserError if an image of an array has another number of channels.
        """
        if isinstance(image, Bands):
            if len(image.bands) != self.channels:
                raise UserError(f"pairs.channels: must be {len(image.bands)} for these images (got {self.channels})")
            return np.stack([self._resized(band) for band in image.bands])
        if self.channels not in MODES:
            raise UserError(f"pairs.channels: must be 1, 3 or 4 for pictures (got {self.channels})")
        if image.mode == "RGBA" and self.channels != 4:
            image = Image.alpha_composite(Image.new("RGBA", image.size, self.background), image)
        pixels = self._resized(image.convert(MODES[self.channels]))
        if self.channels == 4:
            pixels[pixels[..., 3] == 0, :3] = ImageColor.getrgb(self.background)
        return pixels.reshape(self.height, self.width, self.channels).transpose(2, 0, 1)

    def _resized(self, image: Image.Image) -> NDArray[np.uint8]:
        """The pixels of an image at the new size, (H, W) or (H, W, C)."""
        size, method = (self.width, self.height), Image.Resampling[self.filter.upper()]
        if image.size == size:
            return np.array(image)
        if self.resize == "crop":
            return np.array(ImageOps.fit(image, size, method))
        if self.resize == "pad":
            colour = "#0000" if image.mode == "RGBA" else self.background
            return np.array(ImageOps.pad(image, size, method, colour))
        return np.array(image.resize(size, method))

    def enlarged(self, size: tuple[int, int]) -> bool:
        """Whether an image of this width and height is enlarged, in one direction or both."""
        across, down = self.width / size[0], self.height / size[1]
        return {"crop": max, "pad": min, "stretch": max}[self.resize](across, down) > 1

    def cropped(self, size: tuple[int, int]) -> float:
        """The fraction of the area of an image of this width and height that is cut off."""
        across, down = self.width / size[0], self.height / size[1]
        return 1 - min(across, down) / max(across, down) if self.resize == "crop" else 0.0

    def tally(self, sizes: Mapping[tuple[int, int], int]) -> dict[str, Any]:
        """Count the images that were cropped and enlarged, given the number of images of each size."""
        cropped = {size: count for size, count in sizes.items() if self.cropped(size)}
        area = sum(count * self.cropped(size) for size, count in cropped.items())
        return {
            "cropped": sum(cropped.values()),
            "cropped_area": round(area / max(sum(cropped.values()), 1), 6),
            "enlarged": sum(count for size, count in sizes.items() if self.enlarged(size)),
        }

    def describe(self, cropped: int, cropped_area: float, enlarged: int) -> str:
        """How many images were cropped, and by what fraction of their area, and enlarged, in words."""
        area = f"{cropped_area:.0%}" if cropped_area < 0.995 else "over 99%"
        parts = [f"{cropped} cropped by {area} of their area on average"] if cropped else []
        parts += [f"{enlarged} enlarged"] if enlarged else []
        return f"{' and '.join(parts)} (pairs.resize: {self.resize})" if parts else ""


FIELDS = frozenset(field.name for field in fields(Fit))


def visible(images: NDArray[np.uint8], shown: tuple[int, ...] = ()) -> NDArray[np.uint8]:
    """Images (N, C, H, W) as pictures with 1, 3 or 4 channels.

    Of other numbers of channels, `shown` are taken, by default the first three, or the first of two.
    """
    channels = images.shape[1]
    if channels in MODES:
        return images
    return images[:, list(shown) or ([0, 1, 2] if channels > 3 else [0])]


def to_x_0(values: NDArray[np.uint8], dtype: type[Real]) -> NDArray[Real]:
    """Scale 0..255 to [-1, 1], computed in `dtype`; any shape."""
    return values / dtype(127.5) - dtype(1)


def to_uint8(x: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Scale [-1, 1] to 0..255 with clipping and rounding, the inverse of `to_x_0`; any shape."""
    scaled: NDArray[np.float32] = np.rint((x.clip(-1, 1) + 1) * 127.5)
    return scaled.astype(np.uint8)

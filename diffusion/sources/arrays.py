"""Arrays of NumPy: .npz and .npy files of any numeric type, with any number of channels."""

import math
import zipfile
from collections.abc import Iterator, Mapping
from functools import cached_property, partial
from pathlib import Path
from tokenize import TokenError
from typing import IO, Any, Literal, Self

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray
from PIL import Image

from diffusion.errors import UserError, counted, shortened
from diffusion.sources.bands import MODES, Bands
from diffusion.sources.colours import scale
from diffusion.sources.images import Picture
from diffusion.sources.reading import DEFAULTS, Layout, Reading
from diffusion.sources.rows import classes_of, label_of, rows
from diffusion.sources.shards import Sample
from diffusion.sources.trees import BROKEN
from diffusion.storage.tar import Split

FULL_RANGE: dict[str, tuple[float, float]] = {"bool": (0, 1), "uint8": (0, 255), "uint16": (0, 65535)}
"""Values of black and white by type, where all values are used. Floats: see `Arrays.value_range`."""


class Arrays:
    """An .npz file with `images` and optionally `labels`, integers (N,), or an .npy file of images.

    Images are (N, H, W), (N, H, W, C) or (N, C, H, W), of type bool or any integer or floating-point type, and are
    brought to 8 bits. A label of -1 means no label.
    """

    own_splits: Mapping[Split, str] = {}

    @classmethod
    def at(cls, path: Path, reading: Reading) -> Self | None:
        """The source at `path`; None if it is not an .npz or .npy file."""
        return cls(path, reading) if path.is_file() and path.suffix in (".npz", ".npy") else None

    def __init__(self, path: Path, reading: Reading = DEFAULTS) -> None:
        self.path = path
        names = list[str]()
        try:
            if path.suffix == ".npz":
                with zipfile.ZipFile(path) as archive:
                    names = [name[:-4] for name in archive.namelist() if name.endswith(".npy")]
                if "images" not in names:
                    raise UserError(f"{path}: contains no array `images` (found: {shortened(names)})")
            with self._open() as file:
                self.shape, self.dtype = self._header(file)
                size, rest = math.prod(self.shape) * self.dtype.itemsize, self._size() - file.tell()
        except (TypeError, KeyError, TokenError, *BROKEN) as error:
            raise UserError(f"{path}: not a readable {path.suffix} file ({_reason(error)})") from None
        if rest != size:
            raise UserError(
                f"{path}: contains {counted(rest, 'byte')} for {self.dtype} of shape {self.shape}, which needs {size}"
            )
        self.layout = _layout(path, self.shape, reading.layout)
        first = self.layout == "channels-first"
        if (pixels := math.prod(self.shape[2:4] if first else self.shape[1:3])) > reading.max_pixels:
            raise UserError(f"{path}: images of {pixels} pixels, more than shard.max_pixels ({reading.max_pixels})")
        self._given_range = reading.value_range
        values, self.labels = classes_of(self._read_labels() if "labels" in names else None)
        self.classes = tuple(map(str, values))

    def _open(self, name: str = "images") -> IO[bytes]:
        if self.path.suffix == ".npy":
            return self.path.open("rb")
        with zipfile.ZipFile(self.path) as archive:  # the file stays open until the member is closed
            return archive.open(f"{name}.npy")

    def _size(self) -> int:
        """Size of the .npy data in bytes."""
        if self.path.suffix == ".npy":
            return self.path.stat().st_size
        with zipfile.ZipFile(self.path) as archive:
            return archive.getinfo("images.npy").file_size

    def _read_labels(self) -> NDArray[np.integer[Any]]:
        try:
            with self._open("labels") as file:
                shape, _, dtype = _read_header(file)
                if shape != self.shape[:1] or dtype.kind not in "iu":  # before they fill the memory
                    raise UserError(
                        f"{self.path}: labels must be integers of shape ({self.shape[0]},), one for each image "
                        f"(got {dtype} of shape {shape})"
                    )
                return np.array(list(rows(file, self.path, shape, dtype)))
        except (TypeError, KeyError, TokenError, *BROKEN) as error:
            raise UserError(f"{self.path}: not a readable .npz file ({_reason(error)})") from None

    def _header(self, file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
        """Read the shape and the type of the images, and check them."""
        shape, fortran_order, dtype = _read_header(file)
        if dtype.kind not in "biuf" or len(shape) not in (3, 4) or min(shape) < 1:
            raise UserError(
                f"{self.path}: images must be numbers of shape (N, H, W), (N, H, W, C) or (N, C, H, W) "
                f"(got {dtype} of shape {shape})"
            )
        if len(shape) == 3 and shape[2] in (3, 4) and min(shape[:2]) > 4:
            raise UserError(
                f"{self.path}: images of shape {shape} are probably a single picture; save images[None] instead, or "
                f"images[..., None] if they are {shape[0]} greyscale images"
            )
        if fortran_order:
            raise UserError(f"{self.path}: images are in Fortran order; save np.ascontiguousarray(images) instead")
        return shape, dtype

    @cached_property
    def value_range(self) -> tuple[float, float]:
        """The values that become 0 and 255.

        Those given, else those of the type: 0 to 65535 for uint16; for floats, 0 to 1 or -1 to 1, whichever is the
        first that contains all values. Raises UserError if neither does, or for other types.
        """
        if self._given_range:
            low, high = self._given_range
            return low, high
        if (name := self.dtype.name) in FULL_RANGE:
            return FULL_RANGE[name]
        low, high = self.extremes
        if self.dtype.kind == "f":
            for least in (0, -1):
                if least <= low and high <= 1:
                    return least, 1
        raise UserError(
            f"{self.path}: {name} values from {low:.9g} to {high:.9g}, whose black and white levels are unknown; set "
            "shard.value_range (ddpm import: --value-range)"
            + (f", for instance to {low:.9g} and {high:.9g}" if low < high else "")
        )

    @cached_property
    def extremes(self) -> tuple[float, float]:
        """The least and the greatest finite value."""
        low, high = math.inf, -math.inf
        for row in self._rows():
            finite = row[np.isfinite(row)] if self.dtype.kind == "f" else row
            if finite.size:
                low, high = min(low, float(finite.min())), max(high, float(finite.max()))
        if low > high:
            raise UserError(f"{self.path}: contains no finite values")
        return low, high

    def _rows(self) -> Iterator[NDArray[Any]]:
        # np.load would load all images into memory.
        try:
            with self._open() as file:
                self._header(file)
                yield from rows(file, self.path, self.shape, self.dtype)
        except BROKEN as error:
            raise UserError(f"{self.path}: not a readable {self.path.suffix} file ({_reason(error)})") from None

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator[Sample]:
        for index, row in enumerate(self._rows()):
            file, label = f"{self.path.name}[{index}]", label_of(self.labels, index)
            pixels = row.transpose(1, 2, 0) if self.layout == "channels-first" else row
            decode = partial(_decode, pixels, self.value_range)
            yield Sample(f"{index:07d}", file, label, None, decode, size=row.nbytes)

    def describe_values(self) -> str:
        """The type and the values that become 8 bits, in one line; empty if they have 8 bits and use them."""
        low, high = self.value_range
        least, greatest = self.extremes
        line = (
            f"{self.dtype.name} from {least:.9g} to {greatest:.9g}, brought to 8 bits: {low:g} becomes 0, {high:g} 255"
        )
        if 0 < greatest - least < (high - low) / 2:
            line += f"; --value-range {least:.9g} {greatest:.9g} (or shard.value_range) would use all 8 bits"
        elif self.dtype == np.uint8 and not self._given_range:
            return ""
        return line


def _reason(error: Exception) -> str:
    """Why a file cannot be read; NumPy's messages about headers may contain memory addresses, or the whole header."""
    return str(error) if isinstance(error, (OSError, zipfile.BadZipFile)) else "its header is damaged"


def _read_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, whether the order of the values is Fortran's, and type."""
    read = npy.read_array_header_1_0 if npy.read_magic(file) == (1, 0) else npy.read_array_header_2_0
    shape, fortran_order, dtype = read(file)
    return tuple(shape), fortran_order, dtype


def _layout(path: Path, shape: tuple[int, ...], asked: Layout) -> Literal["channels-first", "channels-last"]:
    """The order of the axes: `asked`, or else the more plausible one.

    Raises UserError if both are equally plausible, or neither is: (N, 10, 12, 13) may be 10 channels of 12x13 pixels,
    or 13 channels of 10x12.
    """
    if len(shape) == 3:
        return "channels-last"
    if asked != "auto":
        return asked
    _, a, b, c = shape
    first, last = _plausibility(a, (b, c)), _plausibility(c, (a, b))
    if first == last:
        raise UserError(
            f"{path}: images of shape {shape} may be (N, H, W, C) or (N, C, H, W); set shard.layout (ddpm import: "
            "--layout) to channels-last or channels-first"
        )
    return "channels-first" if first > last else "channels-last"


def _plausibility(channels: int, sides: tuple[int, int]) -> int:
    """0 to 2, for an image with so many channels, height and width.

    0 is not plausible. Plausible are 1, 3 and 4 channels, at most half as many channels as pixels along each side, and
    fewer channels than pixels along the sides of a square. 2 is for squares, of which most data sets consist.
    """
    square, shorter = sides[0] == sides[1], min(sides)
    plausible = channels in MODES or channels <= shorter / 2 or (square and channels < shorter)
    return int(plausible) + int(plausible and square)


def _decode(pixels: NDArray[Any], value_range: tuple[float, float]) -> Picture:
    """An image of pixels (H, W) or (H, W, C) of any type."""
    eight, clipped = _eight_bits(pixels, value_range)
    if eight.shape[2:] == (1,):
        eight = eight[..., 0]
    channels, name = math.prod(eight.shape[2:]), pixels.dtype.name
    # Four channels of another type have no alpha.
    if channels not in MODES or (channels == 4 and name != "uint8"):
        return Picture(Bands.of(eight), name, warnings=clipped)
    image = Image.fromarray(np.ascontiguousarray(eight))
    return Picture(image, image.mode if name == "uint8" else name, warnings=clipped)


def _eight_bits(pixels: NDArray[Any], value_range: tuple[float, float]) -> tuple[NDArray[np.uint8], tuple[str, ...]]:
    """Values as 0 to 255, and a warning if some were clipped."""
    if pixels.dtype.name == "uint8" and value_range == FULL_RANGE["uint8"]:
        return pixels, ()
    scaled, clipped = scale(pixels, value_range, 255)
    return scaled.astype(np.uint8), (clipped,) if clipped else ()

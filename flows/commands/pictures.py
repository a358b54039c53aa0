"""Pictures that a user gives and gets: image files and masks in; a grid, an .npz file or a folder of images out."""

import io
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from diffusion.errors import UsageError, UserError
from diffusion.pairs import pixels
from diffusion.progress import say
from diffusion.samples import grid_png
from diffusion.sources import images, png
from diffusion.sources.bands import MODES, Bands
from diffusion.sources.reading import DEFAULTS, Reading
from diffusion.storage.files import write_atomic, writing

Write = Callable[[NDArray[np.uint8], NDArray[np.int64] | None], None]
"""Writes pictures (N, C, H, W) and their classes (N,), if they have any; raises UserError if it cannot."""


def read_image(path: Path, reading: Reading = DEFAULTS) -> Image.Image:
    """An image file, upright, in sRGB, in mode L, RGB or RGBA; raises UserError if it cannot be read."""
    try:
        picture = images.read_image(path, reading)
    except images.Unreadable as error:
        raise UserError(f"{path}: not a readable image ({error})") from None
    assert not isinstance(picture.image, Bands)  # a file, not an array
    for warning in picture.warnings:
        say(f"sample: decoder warning: {path}: {warning}")
    if picture.several:
        say(f"sample: {path} has several pages or frames; the first is used")
    return picture.image


def to_x_0(image: Image.Image, fit: pixels.Fit) -> Tensor:
    """An image as (1, C, H, W) in [-1, 1], resized if need be."""
    return torch.from_numpy(pixels.to_x_0(fit(image), np.float32))[None]


def read_mask(path: Path, image: Image.Image, fit: pixels.Fit) -> Tensor:
    """1 where the mask of an image is dark or padded, 0 where it is light, (1, 1, H, W) float; resized as the image is.

    Raises UserError if it has not the image's size.
    """
    mask = read_image(path)
    if mask.size != image.size:
        raise UserError(
            f"{path}: the mask has {mask.width}x{mask.height} pixels, but its image {image.width}x{image.height}"
        )
    return (to_x_0(mask, replace(fit, channels=1, background="black")) < 0).float()


def writer(out: str, count: int, channels: int) -> Write:
    """What writes `count` pictures to `out`, by its ending.

    Raises UserError if the ending is unknown or not for this number of channels, the folder cannot be written to, or it
    would mix with other files.
    """
    path = Path(out)
    kind = "/" if out.endswith("/") or path.is_dir() else path.suffix.lower()
    if kind not in FILES:
        raise UsageError(f"--out: {out!r} must end in .png, in .npz, or in / for a folder")
    if kind == "/" and channels not in MODES:
        raise UsageError(f"--out: no picture has {channels} channels; choose a file that ends in .npz")
    prepare_folder("--out", path if kind == "/" else path.parent)
    if kind == "/" and (others := {file.name for file in path.iterdir()} - {_numbered(i) for i in range(count)}):
        raise UsageError(f"--out: {out} contains other files, such as {min(others)}; choose a new folder, or empty it")

    def write(pictures: NDArray[np.uint8], y: NDArray[np.int64] | None) -> None:
        for file, content in FILES[kind](path, pictures, y):
            write_atomic(file, content)

    return write


def prepare_folder(option: str, folder: Path) -> None:
    """Create the folder of an option's file, if need be; raises UserError if it cannot be written to."""
    above = next(each for each in (folder, *folder.parents) if each.exists() or each == each.parent)
    if not above.is_dir():
        raise UsageError(f"{option}: {above} is a file, not a folder; choose another")
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()


def _grid(path: Path, pictures: NDArray[np.uint8], _: NDArray[np.int64] | None) -> Iterator[tuple[Path, bytes]]:
    yield path, grid_png(pictures)


def _npz(path: Path, pictures: NDArray[np.uint8], y: NDArray[np.int64] | None) -> Iterator[tuple[Path, bytes]]:
    buffer = io.BytesIO()
    labels = {} if y is None else {"labels": y}
    np.savez(buffer, images=pictures.transpose(0, 2, 3, 1), allow_pickle=False, **labels)
    yield path, buffer.getvalue()


def _folder(path: Path, pictures: NDArray[np.uint8], _: NDArray[np.int64] | None) -> Iterator[tuple[Path, bytes]]:
    for number, picture in enumerate(pictures):
        image = Image.fromarray(picture[0] if len(picture) == 1 else np.ascontiguousarray(picture.transpose(1, 2, 0)))
        yield path / _numbered(number), png.encode(image)


def _numbered(number: int) -> str:
    return f"{number:05}.png"


FILES = {".png": _grid, ".npz": _npz, "/": _folder}
"""The files and their content, by the ending of --out."""

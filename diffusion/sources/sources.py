"""Detection of the format of a source."""

from collections.abc import Callable
from pathlib import Path

from diffusion.errors import UserError
from diffusion.sources.arrays import Arrays
from diffusion.sources.cifar import Cifar
from diffusion.sources.folders import Folder
from diffusion.sources.idx import Idx
from diffusion.sources.parquet import Parquet
from diffusion.sources.reading import DEFAULTS, Reading
from diffusion.sources.shards import Source
from diffusion.sources.webdatasets import WebDataset

SOURCES: dict[str, Callable[[Path, Reading], Source | None]] = {
    "an .npz file with the array `images`, or an .npy file": Arrays.at,
    "a folder with train-images-idx3-ubyte(.gz)": Idx.at,
    "a folder with CIFAR's binary files": Cifar.at,
    "Parquet files with images": Parquet.at,
    "webdataset shards": WebDataset.at,
    "a folder, .zip or .tar of image files": Folder.at,
}
"""Supported formats by description, in order of detection; each returns the source at a path, or None."""


def open_source(path: Path, reading: Reading = DEFAULTS) -> Source:
    """Open the images at a path; raises UserError if the format is not supported, or a file is corrupt or ambiguous."""
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    for find in SOURCES.values():
        if (source := find(path, reading)) is not None:
            if not len(source):
                raise UserError(f"{path}: contains no images")
            return source
    *first, last = SOURCES
    raise UserError(f"{path}: no images in a supported format; expected {', '.join(first)}, or {last}")

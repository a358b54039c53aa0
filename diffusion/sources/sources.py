"""Input formats: .npz and idx files (see the other files here for the rest), and detection of the format."""

import gzip
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import IO, Self

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray
from PIL import Image

from diffusion.errors import UserError, shortened
from diffusion.sources.cifar import Cifar
from diffusion.sources.folders import Folder
from diffusion.sources.images import MAX_PIXELS, Picture, is_image
from diffusion.sources.parquet import Parquet
from diffusion.sources.shards import Sample, Source
from diffusion.sources.trees import BROKEN, files_below
from diffusion.sources.webdatasets import WebDataset
from diffusion.storage.tar import Split

IDX = re.compile(r"(?P<part>train|t10k)[-_.](?P<kind>images[-_.]idx3|labels[-_.]idx1)[-_.]ubyte(\.gz)?")
IMAGES_IDX, LABELS_IDX = 0x0803, 0x0801
"""Magic numbers of unsigned bytes in three dimensions (N, H, W) and in one."""
LARGEST_SIDE = 2**16
"""Maximum side of an idx image; a larger number means a corrupt header."""
CHANNELS = [(), (1,), (3,), (4,)]
"""Trailing dimensions of an image array: grey, grey, RGB, RGBA."""
NO_LABEL = -1
"""Label of an .npz file that means none."""


class Npz:
    """An .npz file of NumPy with `images`, uint8 (N, H, W) or (N, H, W, C), and optionally `labels`, integers (N,).

    A label of -1 means no label.
    """

    own_splits: Mapping[Split, str] = {}

    @classmethod
    def at(cls, path: Path, split_names_as_classes: bool) -> Self | None:  # noqa: ARG003
        """The source at `path`; None if it is not an .npz file."""
        return cls(path) if path.is_file() and path.suffix == ".npz" else None

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with np.load(path, allow_pickle=False) as arrays:
                names = list(arrays)
                labels = arrays["labels"] if "labels" in names else None
            if "images" not in names:
                raise UserError(f"{path}: contains no array `images` (found: {shortened(names)})")
            with zipfile.ZipFile(path) as archive, archive.open("images.npy") as file:
                self.shape = self._header(file)
        except (TypeError, KeyError, *BROKEN) as error:
            raise UserError(f"{path}: not a readable .npz file ({error})") from None
        if labels is not None and (labels.shape != self.shape[:1] or labels.dtype.kind not in "iu"):
            raise UserError(
                f"{path}: labels must be integers of shape ({self.shape[0]},), one for each image "
                f"(got {labels.dtype} of shape {labels.shape})"
            )
        values, self.labels = _classes(labels)
        self.classes = tuple(map(str, values))

    def _header(self, file: IO[bytes]) -> tuple[int, ...]:
        version = npy.read_magic(file)
        read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, fortran_order, dtype = read(file)
        if dtype != np.uint8 or len(shape) not in (3, 4) or shape[3:] not in CHANNELS or 0 in shape:
            raise UserError(
                f"{self.path}: images must be uint8 of shape (N, H, W) or (N, H, W, C) with C = 1, 3 or 4 "
                f"(got {dtype} of shape {shape})"
            )
        if fortran_order:
            raise UserError(f"{self.path}: images are in Fortran order; save np.ascontiguousarray(images) instead")
        return tuple(shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator[Sample]:
        # np.load would load all images into memory.
        with zipfile.ZipFile(self.path) as archive, archive.open("images.npy") as file:
            self._header(file)
            for index, image in enumerate(_rows(file, self.path, self.shape)):
                yield Sample(
                    f"{index:07d}",
                    f"{self.path.name}[{index}]",
                    _label(self.labels, index),
                    None,
                    partial(_picture, image),
                )


class Idx:
    """A folder of idx files as distributed by MNIST and Fashion-MNIST, optionally gzip-compressed."""

    @classmethod
    def at(cls, path: Path, split_names_as_classes: bool) -> Self | None:  # noqa: ARG003
        """The source at `path`, or in a folder below it that is free of images; None if there are no idx files."""
        files = list(files_below(path)) if path.is_dir() else []
        folders = sorted({file.parent for file in files if IDX.fullmatch(file.name)})
        if path in folders:
            return cls(path)
        if not folders or any(is_image(file) for file in files):
            return None
        if len(folders) > 1:
            raise UserError(f"{path}: several folders contain idx files; choose one of {', '.join(map(str, folders))}")
        return cls(folders[0])

    def __init__(self, folder: Path) -> None:
        self.files: dict[tuple[str, str], Path] = {}
        for path in sorted(folder.iterdir(), reverse=True):  # x before x.gz, if both are there
            if (match := IDX.fullmatch(path.name)) and path.is_file():
                self.files[match["part"], match["kind"][:6]] = path
        if ("train", "images") not in self.files:
            raise UserError(f"{folder}: contains idx files, but no train-images-idx3-ubyte(.gz)")
        self.parts: dict[Split, str] = {"train": "train"}
        if ("t10k", "images") in self.files:
            self.parts["test"] = "t10k"
        self.own_splits: dict[Split, str] = {
            split: self.files[part, "images"].name for split, part in self.parts.items()
        }
        self.shapes = {part: self._shape(self.files[part, "images"], IMAGES_IDX) for part in self.parts.values()}
        read = {part: self._read_labels(part) for part in self.parts.values() if (part, "labels") in self.files}
        values, codes = _classes(np.concatenate(list(read.values())) if read else None)
        self.classes = tuple(map(str, values))
        bounds = np.cumsum([len(labels) for labels in read.values()])
        self.labels = {} if codes is None else dict(zip(read, np.split(codes, bounds), strict=False))

    @staticmethod
    def _open(path: Path) -> IO[bytes]:
        return gzip.open(path) if path.suffix == ".gz" else path.open("rb")  # type: ignore[return-value]

    def _shape(self, path: Path, magic: int) -> tuple[int, ...]:
        with self._open(path) as file:
            return _idx_header(file, path, magic)

    def _read_labels(self, part: str) -> NDArray[np.uint8]:
        path, images = self.files[part, "labels"], self.shapes[part][0]
        with self._open(path) as file:
            shape = _idx_header(file, path, LABELS_IDX)
            if shape != (images,):
                raise UserError(f"{path}: {shape[0]} labels for the {images} images of {self.files[part, 'images']}")
            return np.array(list(_rows(file, path, shape)), dtype=np.uint8)

    def __len__(self) -> int:
        return sum(shape[0] for shape in self.shapes.values())

    def __iter__(self) -> Iterator[Sample]:
        for split, part in reversed(self.parts.items()):  # test first: see Source
            path, labels = self.files[part, "images"], self.labels.get(part)
            with self._open(path) as file:
                shape = _idx_header(file, path, IMAGES_IDX)
                for index, image in enumerate(_rows(file, path, shape)):
                    key, name = f"{split}-{index:07d}", f"{path.name}[{index}]"
                    yield Sample(key, name, _label(labels, index), split, partial(_picture, image))


def _idx_header(file: IO[bytes], path: Path, magic: int) -> tuple[int, ...]:
    """Read the shape from an idx file's header."""
    try:
        if struct.unpack(">I", file.read(4)) != (magic,):
            raise UserError(f"{path}: not an idx file of {magic & 0xFF}-dimensional unsigned bytes")
        dimensions = magic & 0xFF
        shape: tuple[int, ...] = struct.unpack(f">{dimensions}I", file.read(4 * dimensions))
    except (OSError, EOFError, zlib.error, struct.error) as error:
        raise UserError(f"{path}: not a readable idx file ({error})") from None
    if 0 in shape or max(shape[1:], default=0) > LARGEST_SIDE:
        raise UserError(f"{path}: idx file of shape {shape}, which contains no valid images")
    return shape


def _rows(file: IO[bytes], path: Path, shape: tuple[int, ...]) -> Iterator[NDArray[np.uint8]]:
    """Iterate over the rows of a uint8 array of `shape`, which is the rest of a file."""
    row = shape[1:3] if shape[3:] == (1,) else shape[1:]
    size = int(np.prod(row))
    for index in range(shape[0]):
        content = _read(file, size, path, f"entry {index} of {shape[0]}")
        if len(content) < size:
            raise UserError(f"{path}: truncated at entry {index} of {shape[0]}")
        yield np.frombuffer(content, np.uint8).reshape(row)
    if _read(file, 1, path, "its end"):  # at the end, compressed files also check what they read
        raise UserError(f"{path}: contains data after its {shape[0]} entries")


def _read(file: IO[bytes], size: int, path: Path, place: str) -> bytes:
    try:
        return file.read(size)
    except BROKEN as error:
        raise UserError(f"{path}: damaged at {place} ({error})") from None


def _classes(labels: NDArray[np.integer] | None) -> tuple[list[int], NDArray[np.int64] | None]:
    """The distinct labels, sorted, and each label as an index into them, NO_LABEL where it has none."""
    if labels is None:
        return [], None
    values = np.unique(labels[labels != NO_LABEL])
    return values.tolist(), np.where(labels == NO_LABEL, NO_LABEL, np.searchsorted(values, labels))


def _label(codes: NDArray[np.int64] | None, index: int) -> int | None:
    return None if codes is None or codes[index] == NO_LABEL else int(codes[index])


def _picture(pixels: NDArray[np.uint8], _: int = MAX_PIXELS) -> Picture:
    image = Image.fromarray(pixels)
    return Picture(image, image.mode)


SOURCES: dict[str, Callable[[Path, bool], Source | None]] = {
    "an .npz file with the array `images`": Npz.at,
    "a folder with train-images-idx3-ubyte(.gz)": Idx.at,
    "a folder with CIFAR's binary files": Cifar.at,
    "Parquet files with images": Parquet.at,
    "webdataset shards": WebDataset.at,
    "a folder, .zip or .tar of image files": Folder.at,
}
"""Supported formats by description, in order of detection; each returns the source at a path, or None."""


def open_source(path: Path, split_names_as_classes: bool = False) -> Source:
    """Open the images at a path; raises UserError if the format is not supported or a file is corrupt.

    `split_names_as_classes` allows classes, and folders inside classes, that are named like a split.
    """
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    for find in SOURCES.values():
        if (source := find(path, split_names_as_classes)) is not None:
            return source
    *first, last = SOURCES
    raise UserError(f"{path}: no images in a supported format; expected {', '.join(first)}, or {last}")

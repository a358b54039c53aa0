"""idx files, as distributed by MNIST and Fashion-MNIST."""

import gzip
import re
import struct
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import IO, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from diffusion.errors import UserError, counted
from diffusion.sources.images import Picture, is_image
from diffusion.sources.reading import Reading
from diffusion.sources.rows import classes_of, label_of, rows
from diffusion.sources.shards import Sample
from diffusion.sources.trees import files_below
from diffusion.storage.tar import Split

IDX = re.compile(r"(?P<part>train|t10k)[-_.](?P<kind>images[-_.]idx3|labels[-_.]idx1)[-_.]ubyte(\.gz)?")
IMAGES_IDX, LABELS_IDX = 0x0803, 0x0801
"""Magic numbers of unsigned bytes in three dimensions (N, H, W) and in one."""
LARGEST_SIDE = 2**16
"""Maximum side of an idx image; a larger number means a corrupt header."""


class Idx:
    """A folder of idx files as distributed by MNIST and Fashion-MNIST, optionally gzip-compressed."""

    @classmethod
    def at(cls, path: Path, reading: Reading) -> Self | None:  # noqa: ARG003
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
        values, codes = classes_of(np.concatenate(list(read.values())) if read else None)
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
                labels, of = counted(shape[0], "label"), f"{counted(images, 'image')} of {self.files[part, 'images']}"
                raise UserError(f"{path}: {labels} for {of}")
            return np.array(list(rows(file, path, shape, np.dtype(np.uint8))), dtype=np.uint8)

    def __len__(self) -> int:
        return sum(shape[0] for shape in self.shapes.values())

    def __iter__(self) -> Iterator[Sample]:
        for split, part in reversed(self.parts.items()):  # test first: see Source
            path, labels = self.files[part, "images"], self.labels.get(part)
            with self._open(path) as file:
                shape = _idx_header(file, path, IMAGES_IDX)
                for index, image in enumerate(rows(file, path, shape, np.dtype(np.uint8))):
                    key, name = f"{split}-{index:07d}", f"{path.name}[{index}]"
                    yield Sample(key, name, label_of(labels, index), split, partial(_picture, image), size=image.nbytes)


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


def _picture(pixels: NDArray[np.uint8]) -> Picture:
    image = Image.fromarray(pixels)
    return Picture(image, image.mode)

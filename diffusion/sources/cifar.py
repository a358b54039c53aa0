"""The binary version of CIFAR-10 and CIFAR-100 (Krizhevsky 2009)."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from diffusion.errors import UserError, counted
from diffusion.sources.images import Picture
from diffusion.sources.reading import Reading
from diffusion.sources.shards import Sample
from diffusion.storage.files import reading
from diffusion.storage.tar import Split

SHAPE = (3, 32, 32)
PIXELS = 3 * 32 * 32


class Version(NamedTuple):
    """What distinguishes CIFAR-10 from CIFAR-100."""

    parts: dict[Split, tuple[str, ...]]
    """The files of each split, the test split first."""
    names: str
    """The file with the names of the classes, one per line."""
    label_bytes: int
    """Bytes before the pixels of each image; the last is the label."""


VERSIONS = (
    Version(
        {"test": ("test_batch.bin",), "train": tuple(f"data_batch_{number}.bin" for number in range(1, 6))},
        "batches.meta.txt",
        1,
    ),
    Version({"test": ("test.bin",), "train": ("train.bin",)}, "fine_label_names.txt", 2),
)


class Cifar:
    """A folder with the files of the binary version; of CIFAR-100's labels, the fine ones are used."""

    @classmethod
    def at(cls, path: Path, reading: Reading) -> Self | None:  # noqa: ARG003
        """The source at `path`; None if these files are not there."""
        for version in VERSIONS:
            if (path / version.names).is_file():
                return cls(path, version)
        return None

    def __init__(self, folder: Path, version: Version) -> None:
        """Raises UserError if a file is missing or has another size than a multiple of an image's."""
        self.folder, self.version = folder, version
        self.size = version.label_bytes + PIXELS
        names = folder / version.names
        with reading(names):
            lines = names.read_text(encoding="utf-8", errors="backslashreplace").split("\n")
        self.classes = tuple(line.strip() for line in lines if line.strip())
        self.files: dict[Split, tuple[Path, ...]] = {}
        for split, parts in version.parts.items():
            files = tuple(folder / name for name in parts)
            for file in files:
                if not file.is_file():
                    raise UserError(f"{file}: not there; {folder} is not the complete binary version of CIFAR")
                if file.stat().st_size % self.size or not file.stat().st_size:
                    raise UserError(f"{file}: {counted(file.stat().st_size, 'byte')}, not a multiple of {self.size}")
            self.files[split] = files
        self.own_splits: dict[Split, str] = {split: " and ".join(parts) for split, parts in version.parts.items()}

    def __len__(self) -> int:
        return sum(file.stat().st_size // self.size for files in self.files.values() for file in files)

    def __iter__(self) -> Iterator[Sample]:
        for split, files in self.files.items():
            for path in files:
                with reading(path), path.open("rb") as file:
                    for index in range(path.stat().st_size // self.size):
                        record = np.frombuffer(file.read(self.size), np.uint8)
                        yield self._sample(f"{path.stem}-{index:07d}", f"{path.name}[{index}]", split, record, path)

    def _sample(self, key: str, name: str, split: Split, record: NDArray[np.uint8], path: Path) -> Sample:
        label = int(record[self.version.label_bytes - 1])
        if label >= len(self.classes):
            raise UserError(f"{path}: {name} has the label {label}, but {self.version.names} names {len(self.classes)}")
        pixels = record[self.version.label_bytes :].reshape(SHAPE)
        return Sample(key, name, label, split, partial(_picture, pixels), size=pixels.nbytes)


def _picture(pixels: NDArray[np.uint8]) -> Picture:
    """The picture of planes uint8 (3, 32, 32)."""
    image = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    return Picture(image, image.mode)

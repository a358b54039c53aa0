"""Formats in: .npz files, idx files, folders of images. Which one a path is, is found by looking."""

import gzip
import hashlib
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import IO

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray
from PIL import Image

from diffusion.data.noise import Split
from diffusion.data.shards import Sample, Source
from diffusion.errors import UserError

IDX = re.compile(r"(?P<part>train|t10k)[-_.](?P<kind>images[-_.]idx3|labels[-_.]idx1)[-_.]ubyte(\.gz)?")
IMAGES_IDX, LABELS_IDX = 0x0803, 0x0801
"""The magic numbers: unsigned bytes in 3 dimensions (N, H, W), and in 1."""
LARGEST_SIDE = 2**16
"""Of an idx image: a larger number is a damaged header."""
CHANNELS = [(), (1,), (3,), (4,)]
"""Trailing dimensions of an image array: grey, grey, RGB, RGBA."""


def open_source(path: Path) -> Source:
    """The images at a path; raises UserError if they are in no known form, or a file is damaged."""
    if path.is_file() and path.suffix == ".npz":
        return Npz(path)
    if path.is_dir():
        if any(IDX.fullmatch(file.name) and file.is_file() for file in path.iterdir()):
            return Idx(path)
        if any(_is_image(file) for file in _files_below(path)):
            return Folder(path)
    elif not path.exists():
        raise UserError(f"{path}: no such file or folder")
    raise UserError(
        f"{path}: no images in a known form; looked for an .npz file with the array `images`, a folder with "
        "train-images-idx3-ubyte(.gz), and a folder with image files"
    )


class Npz:
    """`images`, uint8 (N, H, W) or (N, H, W, C), and perhaps `labels`, integers (N,), in a file of numpy's."""

    own_splits: frozenset[Split] = frozenset()

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with np.load(path, allow_pickle=False) as arrays:
                names = list(arrays)
                labels = arrays["labels"] if "labels" in names else None
            if "images" not in names:
                raise UserError(f"{path}: has no array `images`; it has {', '.join(names) or 'none'}")
            with zipfile.ZipFile(path) as archive, archive.open("images.npy") as file:
                self.shape = self._header(file)
        except (OSError, ValueError, TypeError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
            raise UserError(f"{path}: not a readable .npz file ({error})") from None
        if labels is not None and (labels.shape != self.shape[:1] or labels.dtype.kind not in "iu"):
            raise UserError(
                f"{path}: labels must be integers of shape ({self.shape[0]},), one for each image; "
                f"they are {labels.dtype} of shape {labels.shape}"
            )
        values, self.labels = _classes(labels)
        self.classes = tuple(map(str, values))

    def _header(self, file: IO[bytes]) -> tuple[int, ...]:
        version = npy.read_magic(file)
        read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, fortran_order, dtype = read(file)
        if dtype != np.uint8 or len(shape) not in (3, 4) or shape[3:] not in CHANNELS or 0 in shape:
            raise UserError(
                f"{self.path}: images must be uint8 of shape (N, H, W) or (N, H, W, C) with C 1, 3 or 4; "
                f"they are {dtype} of shape {shape}"
            )
        if fortran_order:
            raise UserError(f"{self.path}: images are in Fortran order; save np.ascontiguousarray(images)")
        return tuple(shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator[Sample]:
        # Not np.load, which would hold all images in memory.
        with zipfile.ZipFile(self.path) as archive, archive.open("images.npy") as file:
            self._header(file)
            for index, image in enumerate(_rows(file, self.path, self.shape)):
                label = None if self.labels is None else int(self.labels[index])
                yield Sample(f"{index:07d}", f"{self.path.name}[{index}]", label, None, partial(Image.fromarray, image))


class Idx:
    """A folder of idx files as MNIST and Fashion-MNIST ship them, gzip-compressed or not."""

    def __init__(self, folder: Path) -> None:
        self.files: dict[tuple[str, str], Path] = {}
        for path in sorted(folder.iterdir(), reverse=True):  # x before x.gz, if both are there
            if (match := IDX.fullmatch(path.name)) and path.is_file():
                self.files[match["part"], match["kind"][:6]] = path
        if ("train", "images") not in self.files:
            raise UserError(f"{folder}: idx files, but no train-images-idx3-ubyte(.gz)")
        self.parts: dict[Split, str] = {"train": "train"}
        if ("t10k", "images") in self.files:
            self.parts["test"] = "t10k"
        self.own_splits: frozenset[Split] = frozenset(self.parts)
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
        for split, part in self.parts.items():
            path, labels = self.files[part, "images"], self.labels.get(part)
            with self._open(path) as file:
                shape = _idx_header(file, path, IMAGES_IDX)
                for index, image in enumerate(_rows(file, path, shape)):
                    label = None if labels is None else int(labels[index])
                    decode = partial(Image.fromarray, image)
                    yield Sample(f"{split}-{index:07d}", f"{path.name}[{index}]", label, split, decode)


class Folder:
    """Image files of any format that Pillow reads. Sub-folders are classes; those inside them count as part of them.

    Where train and test or val are the only folders at the top, they are the source's own splits, with the classes
    inside. Hidden files and folders are left out.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        names: dict[str, Split] = {"train": "train", "val": "val", "test": "test"}
        top = _folders_in(folder)
        self._own = {name: names[name] for name in top} if {"train"} < top <= names.keys() else {}
        self.own_splits: frozenset[Split] = frozenset(self._own.values())
        roots = [folder / name for name in self._own] or [folder]
        self._labels = sorted({name for root in roots for name in _folders_in(root)})
        self.classes = tuple(map(_text, self._labels))

    @cached_property
    def _count(self) -> int:
        return sum(1 for _ in _files_below(self.folder))

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Sample]:
        labels = {name: label for label, name in enumerate(self._labels)}
        for path in _files_below(self.folder):
            inside = path.relative_to(self.folder)
            parts = inside.parts
            split = self._own.get(parts[0]) if len(parts) > 1 else None
            inner = parts[1:] if split else parts
            label = labels[inner[0]] if len(inner) > 1 else None
            yield Sample(_key(inside), _text(inside.as_posix()), label, split, partial(_decode, path))


def _key(path: Path) -> str:
    """A readable key from a file's own path alone; the digest tells apart what reads the same (a-b/c, a/b-c, a/b/c)."""
    readable = re.sub(r"[^A-Za-z0-9_]+", "-", str(path.with_suffix(""))).strip("-")
    return f"{readable[:60]}-{hashlib.sha256(os.fsencode(path)).hexdigest()[:12]}"


def _text(name: str) -> str:
    """A file's name as text that any encoding can hold: bytes that are no UTF-8 are written as \\xNN."""
    return os.fsencode(name).decode(errors="backslashreplace")


def _decode(path: Path) -> Image.Image:
    with Image.open(path, formats=_formats()) as image:
        image.load()
        return image


def _is_image(path: Path) -> bool:
    try:
        with Image.open(path, formats=_formats()):
            return True
    except Exception:  # not in any of a hundred formats; the decoders raise what they like
        return False


def _formats() -> list[str]:
    Image.init()
    return sorted(Image.OPEN.keys() - {"EPS"})  # PostScript is a program


def _folders_in(folder: Path) -> set[str]:
    """Names of the folders that hold a file: git and DVC keep no others, and labels must not depend on them."""
    return {
        path.name
        for path in folder.iterdir()
        if path.is_dir() and not path.is_symlink() and not path.name.startswith(".") and any(_files_below(path))
    }


def _files_below(folder: Path) -> Iterator[Path]:
    """Files below a folder, sorted, without hidden ones."""
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.name.startswith("."):
            continue
        if entry.is_dir(follow_symlinks=False):
            yield from _files_below(Path(entry))
        else:
            yield Path(entry)


def _idx_header(file: IO[bytes], path: Path, magic: int) -> tuple[int, ...]:
    """The shape that an idx file states."""
    try:
        if struct.unpack(">I", file.read(4)) != (magic,):
            raise UserError(f"{path}: not an idx file of {magic & 0xFF}-dimensional unsigned bytes")
        dimensions = magic & 0xFF
        shape: tuple[int, ...] = struct.unpack(f">{dimensions}I", file.read(4 * dimensions))
    except (OSError, EOFError, zlib.error, struct.error) as error:
        raise UserError(f"{path}: not a readable idx file ({error})") from None
    if 0 in shape or max(shape[1:], default=0) > LARGEST_SIDE:
        raise UserError(f"{path}: an idx file of shape {shape}, which holds no images")
    return shape


def _rows(file: IO[bytes], path: Path, shape: tuple[int, ...]) -> Iterator[NDArray[np.uint8]]:
    """The rows of a uint8 array of `shape` that follows in a file up to its end, one at a time."""
    row = shape[1:3] if shape[3:] == (1,) else shape[1:]
    size = int(np.prod(row))
    for index in range(shape[0]):
        content = _read(file, size, path, f"entry {index} of {shape[0]}")
        if len(content) < size:
            raise UserError(f"{path}: truncated: it ends at entry {index} of {shape[0]}")
        yield np.frombuffer(content, np.uint8).reshape(row)
    if _read(file, 1, path, "its end"):  # at the end, compressed files also check what they read
        raise UserError(f"{path}: goes on after its {shape[0]} entries")


def _read(file: IO[bytes], size: int, path: Path, place: str) -> bytes:
    try:
        return file.read(size)
    except (OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path}: damaged at {place} ({error})") from None


def _classes(labels: NDArray[np.integer] | None) -> tuple[list[int], NDArray[np.int64] | None]:
    """The values that labels take, sorted, and each label as an index into them."""
    if labels is None:
        return [], None
    values, codes = np.unique(labels, return_inverse=True)
    return values.tolist(), codes.astype(np.int64)

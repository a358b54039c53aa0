"""Rows of arrays, read one by one, and their labels."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from diffusion.errors import UserError
from diffusion.sources.trees import BROKEN

NO_LABEL = -1
"""Label of an array that means none."""


def rows(file: IO[bytes], path: Path, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Iterator[NDArray[Any]]:
    """Iterate over the rows of an array, which is the rest of a file; raises UserError if it is not."""
    size = math.prod(shape[1:]) * dtype.itemsize
    for index in range(shape[0]):
        content = _read(file, size, path, f"entry {index} of {shape[0]}")
        if len(content) < size:
            raise UserError(f"{path}: truncated at entry {index} of {shape[0]}")
        yield np.frombuffer(content, dtype).reshape(shape[1:])
    if _read(file, 1, path, "its end"):  # at the end, compressed files also check what they read
        raise UserError(f"{path}: contains data after its {shape[0]} entries")


def _read(file: IO[bytes], size: int, path: Path, place: str) -> bytes:
    try:
        return file.read(size)
    except BROKEN as error:
        raise UserError(f"{path}: damaged at {place} ({error})") from None


def classes_of(labels: NDArray[np.integer] | None) -> tuple[list[int], NDArray[np.int64] | None]:
    """The distinct labels, sorted, and each label as an index into them, NO_LABEL where it has none."""
    if labels is None:
        return [], None
    values = np.unique(labels[labels != NO_LABEL])
    return values.tolist(), np.where(labels == NO_LABEL, NO_LABEL, np.searchsorted(values, labels))


def label_of(codes: NDArray[np.int64] | None, index: int) -> int | None:
    return None if codes is None or codes[index] == NO_LABEL else int(codes[index])

"""Conversion of a source's images to what the shards store of them, by an executor."""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from diffusion.errors import UserError
from diffusion.sources import png
from diffusion.sources.colours import Unreadable
from diffusion.sources.images import Picture, digest
from diffusion.storage.executors import TRIES, Executor, LostWorker

if TYPE_CHECKING:
    from diffusion.sources.shards import Sample, Source

CHUNK, CHUNK_BYTES = 64, 2**18
"""Maximum number of images in a task, and the number of bytes at which it is complete."""


class Converted(NamedTuple):
    """An image as the shards store it, and what the manifest counts."""

    png: bytes
    digest: int
    """See `images.digest`."""
    histogram: NDArray[np.int64]
    """Number of pixels of each value, one channel after the other, (256 C,)."""
    stored_mode: str
    mode: str
    """Pillow's mode of the file."""
    size: tuple[int, int]
    """Width and height."""
    several: bool
    warnings: tuple[str, ...]


def convert(source: "Source", executor: Executor) -> Generator[tuple["Sample", Converted | str]]:
    """Each sample of a source, in order, with its converted image, or the reason for rejecting it.

    Raises:
        UserError: the process that decodes an image is killed each time.
        SystemFault: the operating system cannot read a file.
    """
    with closing(executor.map(_convert, _chunks(source), _bytes)) as done:
        try:
            for chunk, images in done:
                yield from zip(chunk, images, strict=True)
        except LostWorker as lost:
            raise UserError(
                f"{lost.task[0].file}: the process that read the files from here to {lost.task[-1].file} was killed "
                f"{TRIES} times; use fewer processes (DDPM_WORKERS) to save memory, or remove the file at fault"
            ) from None


def _chunks(source: "Source") -> Iterator[tuple["Sample", ...]]:
    """The samples in groups, the tasks of an executor."""
    chunk, size = list["Sample"](), 0
    for sample in source:
        chunk.append(sample)
        size += sample.size
        if len(chunk) == CHUNK or size >= CHUNK_BYTES:
            yield tuple(chunk)
            chunk, size = [], 0
    if chunk:
        yield tuple(chunk)


def _bytes(chunk: Sequence["Sample"]) -> int:
    return sum(sample.size for sample in chunk)


def _convert(chunk: Sequence["Sample"]) -> list[Converted | str]:
    return [sample.left_out or _converted(sample.decode) for sample in chunk]


def _converted(decode: Callable[[], Picture]) -> Converted | str:
    try:
        picture = decode()
    except Unreadable as error:
        return str(error)
    image = picture.image
    return Converted(
        png=picture.png or png.encode(image),
        digest=digest(image),
        histogram=np.array(image.histogram()),
        stored_mode=image.mode,
        mode=picture.mode,
        size=image.size,
        several=picture.several,
        warnings=picture.warnings,
    )

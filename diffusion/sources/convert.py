"""Conversion of a source's images to what the shards store of them, by an executor."""

import io
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from diffusion.errors import UserError
from diffusion.sources import png
from diffusion.sources.bands import Bands
from diffusion.sources.colours import Unreadable
from diffusion.sources.duplicates import perceptual_hash
from diffusion.sources.images import THUMBNAIL, Picture, digest
from diffusion.sources.trees import Decoder
from diffusion.storage.executors import Executor, LostWorker

if TYPE_CHECKING:
    from diffusion.sources.shards import Sample, Source

CHUNK, CHUNK_BYTES = 64, 2**18
"""Maximum number of images in a task, and the number of bytes at which it is complete."""
EXPANSION = 16
"""Bytes of a PNG file per byte of the file that it was made of, at most about; JPEG photographs come near it."""


class Converted(NamedTuple):
    """An image as the shards store it, and what the manifest counts."""

    content: dict[str, bytes]
    """The encoded image, by extension."""
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
    perceptual_hash: bytes | None
    """See `duplicates.perceptual_hash`."""

    @property
    def thumbnail(self) -> bytes:
        return thumbnail(decode(*self.content.values()))


class Rejected(NamedTuple):
    """An image that cannot be used."""

    reason: str
    thumbnail: bytes | None = None
    """A small PNG of it, where one can be made."""


def convert(source: "Source", executor: Executor) -> Generator[tuple["Sample", Converted | Rejected]]:
    """Each sample of a source, in order, with its converted image, or the reason for rejecting it.

    Raises:
        UserError: the process that decodes an image is killed each time, or memory does not suffice.
        SystemFault: the operating system cannot read a file.
    """
    chunks = _chunks(source, executor.shares_files)
    with closing(executor.map(_convert, chunks, _bytes)) as done:
        try:
            for chunk, images in done:
                yield from zip(chunk, images, strict=True)
        except LostWorker as lost:
            first, last = lost.task[0].file, lost.task[-1].file
            read = "this file" if len(lost.task) == 1 else f"the files from here to {last}"
            raise UserError(
                f"{first}: the process that reads {read} is killed each time; give it more memory, use fewer "
                "processes (DDPM_WORKERS), or remove the file at fault"
            ) from None


def _chunks(source: "Source", shares_files: bool) -> Iterator[tuple["Sample", ...]]:
    """The samples in groups, the tasks of an executor."""
    chunk, size = list["Sample"](), 0
    for sample in source:
        if isinstance(decode := sample.decode, Decoder):
            decode = decode.portable() if shares_files else decode.carried()
        chunk.append(sample._replace(decode=decode))
        size += sample.size
        if len(chunk) == CHUNK or size >= CHUNK_BYTES:
            yield tuple(chunk)
            chunk, size = [], 0
    if chunk:
        yield tuple(chunk)


def _bytes(chunk: Sequence["Sample"]) -> int:
    return EXPANSION * sum(sample.size for sample in chunk)


def _convert(chunk: Sequence["Sample"]) -> list[Converted | Rejected]:
    return [Rejected(sample.rejected) if sample.rejected else _converted(sample) for sample in chunk]


def _converted(sample: "Sample") -> Converted | Rejected:
    try:
        return _stored(sample.decode())
    except Unreadable as error:
        return Rejected(str(error), thumbnail(error.thumbnail) if error.thumbnail else None)
    except MemoryError:
        raise UserError(
            f"{sample.file}: out of memory; use fewer processes (DDPM_WORKERS), or decrease shard.max_pixels, so that "
            "it is rejected"
        ) from None


def _stored(picture: Picture) -> Converted:
    image = picture.image
    return Converted(
        content={"png": picture.png} if picture.png else encode(image),
        digest=digest(image),
        histogram=np.array(image.histogram(), np.int64),
        stored_mode=image.mode,
        mode=picture.mode,
        size=image.size,
        several=picture.several,
        warnings=picture.warnings,
        perceptual_hash=perceptual_hash(image),
    )


def thumbnail(image: Image.Image | Bands) -> bytes:
    """A small PNG of an image, on white; of separate channels, the first one."""
    small = (image.bands[0] if isinstance(image, Bands) else image).convert("RGBA")
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    return png.encode(Image.alpha_composite(Image.new("RGBA", small.size, "white"), small).convert("RGB"))


def encode(image: Image.Image | Bands) -> dict[str, bytes]:
    """Encode an image deterministically: as `png`, or as `npy` where PNG has no such mode."""
    if not isinstance(image, Bands):
        return {"png": png.encode(image)}
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, image.pixels(), allow_pickle=False)
    return {"npy": buffer.getvalue()}


def decode(content: bytes) -> Image.Image | Bands:
    """The image that `encode` encoded."""
    file = io.BytesIO(content)
    if content.startswith(np.lib.format.MAGIC_PREFIX):
        return Bands.of(np.lib.format.read_array(file, allow_pickle=False))
    return Image.open(file, formats=["PNG"])

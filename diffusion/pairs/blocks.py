"""Making of the blocks of pairs, by an executor."""

import io
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple, Protocol, Self

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from diffusion.errors import UserError
from diffusion.pairs.noise import BLOCK, Purpose, eps_from_key, eps_key, stream, timesteps
from diffusion.pairs.pixels import to_x_0
from diffusion.sources.bands import Bands
from diffusion.storage.executors import Executor, LostWorker
from diffusion.storage.tar import SPLITS, Split

if TYPE_CHECKING:
    from diffusion.pairs.pairs import Settings

PART_BYTES = 2**23
"""Number of bytes of encoded images at which a task that carries them is complete."""
IMAGE_AXIS = {"x_0": 0, "y": 0, "t": 1, "x_t": 1, "eps": 1}
"""Axis of a block's images in each array; the noise key is that of the whole block."""


class Reader(Protocol):
    """Reads an image, in any process that can open its file."""

    @property
    def label(self) -> int | None: ...

    @property
    def size(self) -> int:
        """Number of bytes of the encoded image."""
        ...

    def read(self) -> Image.Image | Bands: ...

    def carried(self) -> Self:
        """The same for any machine, with the encoded image."""
        ...


class LabelledImages(Protocol):
    """Images with labels, by index."""

    def __len__(self) -> int: ...

    def reader(self, index: int) -> Reader:
        """An image and its label, to be read in any process."""
        ...


class Block(NamedTuple):
    """A block that was made."""

    split: Split
    number: int
    files: dict[str, bytes]
    """By extension."""
    sizes: list[tuple[int, int]]
    """Width and height of each image before it was resized."""


class _Part(NamedTuple):
    """Images of a block, the task of an executor."""

    split: Split
    block: int
    start: int
    """Place of the first image in the block."""
    images: tuple[Reader, ...]
    carried: int
    """Bytes of their content, if it is sent to the process that does the task."""


class _Made(NamedTuple):
    """A part that was made."""

    arrays: dict[str, NDArray[np.generic]]
    sizes: list[tuple[int, int]]
    """Width and height of each image before it was resized."""


def make(
    images: Mapping[Split, LabelledImages], settings: "Settings", alpha_bar: NDArray[np.float64], executor: Executor
) -> Generator[Block]:
    """Make each block of each split, in order.

    alpha_bar: (T,). Raises UserError if the process that makes a block is killed each time.
    """
    tasks = _parts(images, settings.seed, executor.shares_files)
    with closing(executor.map(partial(_make, settings, alpha_bar), tasks, partial(_bytes, settings))) as done:
        try:
            for (split, number), parts in groupby(done, key=lambda each: each[0][:2]):
                made = [each for _, each in parts]
                yield Block(split, number, _join(made), [size for each in made for size in each.sizes])
        except LostWorker as lost:
            raise UserError(
                f"block {lost.task.block} of {lost.task.split}: the process that makes it is killed each time; give "
                "it more memory, or use fewer processes (DDPM_WORKERS)"
            ) from None


def _parts(images: Mapping[Split, LabelledImages], seed: int, shares_files: bool) -> Iterator[_Part]:
    """The blocks in one part each, or in several so that the content of the images does not fill the memory."""
    for split in SPLITS:
        source = images[split]
        order = stream(seed, Purpose.SHUFFLE, high=SPLITS.index(split)).permutation(len(source))
        for block, first in enumerate(range(0, len(source), BLOCK)):
            part, start, carried = list[Reader](), 0, 0
            for index in order[first : first + BLOCK].tolist():
                image = source.reader(index)
                part.append(image if shares_files else image.carried())
                carried += 0 if shares_files else image.size
                if carried >= PART_BYTES:
                    yield _Part(split, block, start, tuple(part), carried)
                    part, start, carried = [], start + len(part), 0
            if part:
                yield _Part(split, block, start, tuple(part), carried)


def _bytes(settings: "Settings", part: _Part) -> int:
    values = len(part.images) * settings.channels * settings.height * settings.width
    return part.carried + (values if part.split == "train" else values * (1 + 8 * settings.heldout_draws))


def _make(settings: "Settings", alpha_bar: NDArray[np.float64], part: _Part) -> _Made:
    """Make a part of a block; images are resized one by one to save memory."""
    fit, n, sizes = settings.fit, len(part.images), list[tuple[int, int]]()
    x_0, y = np.empty((n, fit.channels, fit.height, fit.width), np.uint8), np.full(n, -1, np.int64)
    for place, stored in enumerate(part.images):
        image = stored.read()
        x_0[place] = fit(image)
        sizes.append(image.size)
        if stored.label is not None:
            y[place] = stored.label
    arrays: dict[str, NDArray[np.generic]] = {"x_0": x_0, "y": y}
    rows = slice(part.start, part.start + n)
    if part.split == "train":
        arrays |= _train_arrays(settings, part.block, rows)
    else:
        arrays |= _heldout_arrays(settings, part.split, part.block, rows, x_0, alpha_bar)
    return _Made(arrays, sizes)


def _join(parts: Sequence[_Made]) -> dict[str, bytes]:
    """The files of a block, of the arrays of its parts."""
    arrays = dict(parts[0].arrays)
    for name, axis in IMAGE_AXIS.items():
        if name in arrays:
            arrays[name] = np.concatenate([part.arrays[name] for part in parts], axis)
    return {f"{name}.npy": _npy(value) for name, value in arrays.items()}


def _train_arrays(settings: "Settings", block: int, rows: slice) -> dict[str, NDArray[np.generic]]:
    draws = range(settings.draws)
    t = [timesteps(settings.seed, "train", block, draw, settings.num_timesteps)[rows] for draw in draws]
    return {"t": np.stack(t), "noise_key": np.stack([eps_key(settings.seed, "train", block, draw) for draw in draws])}


def _heldout_arrays(
    settings: "Settings",
    split: Split,
    block: int,
    rows: slice,
    x_0: NDArray[np.uint8],
    alpha_bar: NDArray[np.float64],
) -> dict[str, NDArray[np.generic]]:
    draws = settings.heldout_draws
    t = np.empty((draws, len(x_0)), np.int64)
    x_t, eps = (np.empty((draws, *x_0.shape), np.float32) for _ in range(2))
    clean = to_x_0(x_0, np.float64)  # float64, like everything up to the final assignment
    for draw in range(draws):
        t[draw] = timesteps(settings.seed, split, block, draw, settings.num_timesteps)[rows]
        eps[draw] = eps_from_key(eps_key(settings.seed, split, block, draw), x_0.shape[1:])[rows]
        at = alpha_bar[t[draw]][:, None, None, None]
        x_t[draw] = np.sqrt(at) * clean + np.sqrt(1 - at) * eps[draw]
    return {"t": t, "x_t": x_t, "eps": eps}


def _npy(value: NDArray[np.generic]) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, value, allow_pickle=False)
    return buffer.getvalue()

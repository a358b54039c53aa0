"""Making of the blocks of pairs, by an executor."""

import io
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import closing
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, Protocol

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


class LabelledImages(Protocol):
    """Images with labels, by index."""

    def __len__(self) -> int: ...

    def reader(self, index: int) -> tuple[Callable[[], Image.Image | Bands], int | None]:
        """How to read an image, in any process, and its label, or None."""
        ...


class Block(NamedTuple):
    """A block, to be made."""

    split: Split
    number: int
    images: tuple[tuple[Callable[[], Image.Image | Bands], int | None], ...]
    """A reader and a label for each."""


class Made(NamedTuple):
    """A block that was made."""

    files: dict[str, bytes]
    """By extension."""
    sizes: list[tuple[int, int]]
    """Width and height of each image before it was resized."""


def make(
    images: Mapping[Split, LabelledImages], settings: "Settings", alpha_bar: NDArray[np.float64], executor: Executor
) -> Generator[tuple[Block, Made]]:
    """Make each block of each split, in order.

    alpha_bar: (T,). Raises UserError if the process that makes a block is killed each time.
    """
    function, size = partial(_contents, settings, alpha_bar), partial(_bytes, settings)
    with closing(executor.map(function, _blocks(images, settings.seed), size)) as done:
        try:
            yield from done
        except LostWorker as lost:
            raise UserError(
                f"block {lost.task.number} of {lost.task.split}: the process that makes it is killed each time; give "
                "it more memory, or use fewer processes (DDPM_WORKERS)"
            ) from None


def _blocks(images: Mapping[Split, LabelledImages], seed: int) -> Iterator[Block]:
    for split in SPLITS:
        source = images[split]
        order = stream(seed, Purpose.SHUFFLE, high=SPLITS.index(split)).permutation(len(source))
        for number, start in enumerate(range(0, len(source), BLOCK)):
            yield Block(split, number, tuple(source.reader(int(index)) for index in order[start : start + BLOCK]))


def _bytes(settings: "Settings", block: Block) -> int:
    values = len(block.images) * settings.channels * settings.height * settings.width
    return values if block.split == "train" else values * (1 + 8 * settings.heldout_draws)


def _contents(settings: "Settings", alpha_bar: NDArray[np.float64], block: Block) -> Made:
    """Make a block; images are resized one by one to save memory."""
    fit, n, sizes = settings.fit, len(block.images), list[tuple[int, int]]()
    x_0, y = np.empty((n, fit.channels, fit.height, fit.width), np.uint8), np.full(n, -1, np.int64)
    for place, (read, label) in enumerate(block.images):
        image = read()
        x_0[place] = fit(image)
        sizes.append(image.size)
        if label is not None:
            y[place] = label
    arrays: dict[str, NDArray[np.generic]] = {"x_0": x_0, "y": y}
    if block.split == "train":
        arrays |= _train_arrays(settings, block.number, n)
    else:
        arrays |= _heldout_arrays(settings, block.split, block.number, x_0, alpha_bar)
    return Made({f"{name}.npy": _npy(value) for name, value in arrays.items()}, sizes)


def _train_arrays(settings: "Settings", block: int, n: int) -> dict[str, NDArray[np.generic]]:
    draws = range(settings.draws)
    t = [timesteps(settings.seed, "train", block, draw, settings.num_timesteps)[:n] for draw in draws]
    return {"t": np.stack(t), "noise_key": np.stack([eps_key(settings.seed, "train", block, draw) for draw in draws])}


def _heldout_arrays(
    settings: "Settings", split: Split, block: int, x_0: NDArray[np.uint8], alpha_bar: NDArray[np.float64]
) -> dict[str, NDArray[np.generic]]:
    draws, n = settings.heldout_draws, len(x_0)
    t = np.empty((draws, n), np.int64)
    x_t, eps = (np.empty((draws, *x_0.shape), np.float32) for _ in range(2))
    clean = to_x_0(x_0, np.float64)  # float64, like everything up to the final assignment
    for draw in range(draws):
        t[draw] = timesteps(settings.seed, split, block, draw, settings.num_timesteps)[:n]
        eps[draw] = eps_from_key(eps_key(settings.seed, split, block, draw), x_0.shape[1:])[:n]
        at = alpha_bar[t[draw]][:, None, None, None]
        x_t[draw] = np.sqrt(at) * clean + np.sqrt(1 - at) * eps[draw]
    return {"t": t, "x_t": x_t, "eps": eps}


def _npy(value: NDArray[np.generic]) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, value, allow_pickle=False)
    return buffer.getvalue()

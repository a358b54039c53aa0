"""Baselines for the likelihood: histograms of the values in the training images, in bits per dimension.

A model whose bound is not below that of a histogram has learned less about the images than counting them would tell.
"""

from collections.abc import Iterable, Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from diffusion.evaluation.likelihood import mean
from diffusion.pairs.noise import BLOCK
from diffusion.pairs.pairs import Pairs

PRIOR = 0.5
"""Added to each count, so that no value has probability zero; Krichevsky & Trofimov 1981."""
MAX_BYTES = 2**28
"""Memory for the counts of a group of rows."""


def values_of(splits: Iterable[Pairs]) -> NDArray[np.uint8]:
    """The values that occur in the images of the splits, in ascending order, (V,)."""
    present = np.zeros(256, bool)
    for pairs in splits:
        for block in range(pairs.blocks):
            present[pairs.x_0(block)] = True
    return np.flatnonzero(present).astype(np.uint8)


def bits(train: Pairs, test: Pairs, images: int, values: NDArray[np.uint8]) -> dict[str, NDArray[np.float64]]:
    """Bits per dimension of the first `images` images of `test`, (images,), by baseline.

    uniform: all of `values` (V,) are equally probable; histogram: as frequent as in the training images;
    pixel_histogram: as frequent as at the same pixel and channel of the training images.
    """
    index = np.zeros(256, np.int64)
    index[values] = np.arange(len(values))
    channels, height, width = train.shape
    rows = max(1, MAX_BYTES // (8 * len(values) * channels * width))
    total, by_pixel = np.zeros(len(values)), np.zeros(images)
    for first in range(0, height, rows):
        cells = channels * min(rows, height - first) * width
        counts = np.zeros((len(values), cells))
        for _, x_0 in _blocks(train, train.images):
            found = index[x_0[:, :, first : first + rows]].reshape(-1, cells)
            counts += np.bincount((found * cells + np.arange(cells)).ravel(), minlength=counts.size).reshape(
                counts.shape
            )
        total += counts.sum(axis=1)
        cost = _cost(counts)
        for part, x_0 in _blocks(test, images):
            found = index[x_0[:, :, first : first + rows]].reshape(-1, cells)
            by_pixel[part] += cost[found, np.arange(cells)].sum(axis=1)
    cost = _cost(total)
    return {
        "uniform": np.full(images, np.log2(len(values))),
        "histogram": np.concatenate([cost[index[x_0]].mean(axis=(1, 2, 3)) for _, x_0 in _blocks(test, images)]),
        "pixel_histogram": by_pixel / (channels * height * width),
    }


def compare(model: NDArray[np.float64], baselines: Mapping[str, NDArray[np.float64]]) -> dict[str, float]:
    """Figures for the report: the mean of each baseline, and how far the model (n,) is below the lowest, per image."""
    means = {f"bits_per_dim_{name}": float(bits.mean()) for name, bits in baselines.items()}
    lowest = min(baselines.values(), key=np.mean)
    return means | mean("bits_per_dim_gain", lowest - model)


def _blocks(pairs: Pairs, images: int) -> Iterator[tuple[slice, NDArray[np.uint8]]]:
    """The first `images` images in blocks, with their places."""
    for first in range(0, images, BLOCK):
        x_0 = pairs.x_0(first // BLOCK)[: images - first]
        yield slice(first, first + len(x_0)), x_0


def _cost(counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """Bits of each value, given the counts of the values along the first axis."""
    weights = counts + PRIOR
    return np.log2(weights.sum(axis=0) / weights)

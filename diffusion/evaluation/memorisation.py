"""Whether samples are copies of training images."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from diffusion.evaluation.distances import squared_distances
from diffusion.pairs.noise import BLOCK
from diffusion.pairs.pairs import BlockedImages
from diffusion.samples import grid_png

COLUMNS = 10
"""Of a picture."""


class Nearest(NamedTuple):
    """The training image nearest to each of n images."""

    images: NDArray[np.uint8]
    """(n, C, H, W)"""
    distance: NDArray[np.float64]
    """(n,), root mean square over pixels and channels, in grey levels"""
    second: NDArray[np.float64]
    """(n,), of the second-nearest training image"""


def nearest(images: NDArray[np.uint8], train: BlockedImages, itself: bool = False) -> Nearest:
    """Find the training image nearest to each of `images` (n, C, H, W), which stay in memory, unlike those of `train`.

    itself: whether `images` are training images, whose nearest other one is wanted.
    """
    flat = images.reshape(len(images), -1).astype(np.float32)
    found, least = np.empty_like(images), np.full((len(images), 2), np.inf, np.float32)
    for block in range(-(-train.images // BLOCK)):
        candidates = train.x_0(block)
        squares = squared_distances(flat, candidates.reshape(len(candidates), -1).astype(np.float32))
        if itself:
            squares[(images[:, None] == candidates).all(axis=(2, 3, 4))] = np.inf
        closest = squares.argmin(axis=1)
        closer = squares.min(axis=1) < least[:, 0]
        found[closer] = candidates[closest[closer]]
        least = np.partition(np.concatenate([least, squares], axis=1), 1, axis=1)[:, :2]
    return Nearest(found, *np.sqrt(least.astype(np.float64) / flat.shape[1]).T)


def picture(images: NDArray[np.uint8], copies: NDArray[np.uint8]) -> bytes:
    """PNG with rows of images (n, C, H, W), as they can be shown, and below each its nearest training image."""
    columns = min(COLUMNS, len(images))
    whole = len(images) // columns * columns
    rows = [part[:whole].reshape(-1, columns, *part.shape[1:]) for part in (images, copies)]
    return grid_png(np.stack(rows, axis=1).reshape(-1, *images.shape[1:]), columns=columns)

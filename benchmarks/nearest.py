"""The nearest training image of each sample, to see whether a model copies.

    ddpm sample --count 100 --seed 0 --out samples.npz
    python benchmarks/nearest.py samples.npz --out nearest.png

In the picture, samples and nearest training images alternate by row. Distances are root mean squares over pixels and
channels, in grey levels; those of test images, to which no model has adapted, are what to compare with.
"""

import argparse
import math
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parents[1]))  # in case the project is not installed

from diffusion.errors import UserError
from diffusion.pairs.noise import BLOCK
from diffusion.pairs.pairs import BlockedImages, Pairs
from diffusion.samples import save_grid

COLUMNS = 10


def nearest(images: NDArray[np.uint8], train: BlockedImages) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """The training image nearest to each of `images` (n, C, H, W), (n, C, H, W), and its distance, (n,)."""
    flat = images.reshape(len(images), -1).astype(np.float32)
    found, least = np.empty_like(images), np.full(len(images), np.inf, np.float32)
    for block in range(math.ceil(train.images / BLOCK)):
        candidates = train.x_0(block)
        others = candidates.reshape(len(candidates), -1).astype(np.float32)
        squares = (flat**2).sum(1)[:, None] + (others**2).sum(1) - 2 * flat @ others.T
        closer = squares.min(axis=1) < least
        found[closer] = candidates[squares.argmin(axis=1)[closer]]
        least = np.minimum(least, squares.min(axis=1))
    return found, np.sqrt(least.clip(0) / flat.shape[1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("samples", type=Path, help=".npz file of `ddpm sample`")
    parser.add_argument("--pairs", type=Path, default=Path("data/pairs"), help="the pairs (default %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("nearest.png"), help="picture (default %(default)s)")
    arguments = parser.parse_args()
    try:
        with np.load(arguments.samples, allow_pickle=False) as arrays:
            samples = arrays["images"].transpose(0, 3, 1, 2)
        train, test = (Pairs(arguments.pairs, split) for split in ("train", "test"))
        if samples.shape[1:] != train.shape:
            raise UserError(f"{arguments.samples}: images {samples.shape[1:]}, but the pairs have {train.shape}")
        held_out = np.concatenate([test.x_0(block) for block in range(test.blocks)])
        for name, images in (("samples", samples), ("test images", held_out)):
            copies, distance = nearest(images, train)
            quartiles = ", ".join(f"{value:.1f}" for value in np.quantile(distance, [0, 0.25, 0.5, 0.75, 1]))
            print(f"{len(images)} {name}: distance to the nearest training image, quartiles {quartiles}")
            if name == "samples":
                whole = len(samples) // COLUMNS * COLUMNS or len(samples)
                rows = [part[:whole].reshape(-1, min(COLUMNS, whole), *train.shape) for part in (images, copies)]
                save_grid(np.stack(rows, axis=1).reshape(-1, *train.shape), arguments.out, columns=min(COLUMNS, whole))
    except (UserError, OSError, ValueError, KeyError) as error:
        print(f"benchmarks/nearest.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

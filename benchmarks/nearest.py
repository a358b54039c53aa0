"""The nearest training image of each sample, to see whether a model copies.

    ddpm sample --count 100 --seed 0 --out samples.npz
    python benchmarks/nearest.py samples.npz --out nearest.png

In the picture, samples and nearest training images alternate by row. Distances are root mean squares over pixels and
channels, in grey levels; those of test images, to which no model has adapted, are what to compare with.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))  # in case the project is not installed

from diffusion.errors import UserError
from diffusion.evaluation.memorisation import nearest, picture
from diffusion.pairs.pairs import Pairs
from diffusion.storage.files import write_atomic


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
            found = nearest(images, train)
            quartiles = ", ".join(f"{value:.1f}" for value in np.quantile(found.distance, [0, 0.25, 0.5, 0.75, 1]))
            print(f"{len(images)} {name}: distance to the nearest training image, quartiles {quartiles}")
            if name == "samples":
                write_atomic(arguments.out, picture(images, found.images))
    except (UserError, OSError, ValueError, KeyError) as error:
        print(f"benchmarks/nearest.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

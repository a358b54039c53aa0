"""The Fréchet distance of images to a working tree's training images, in the features that `evaluate` uses."""

import sys

import numpy as np
from numpy.typing import NDArray

from diffusion.evaluation import distances, sets
from diffusion.evaluation.features import trained_features
from diffusion.evaluation.quality import MAX_REFERENCE
from diffusion.pairs.pairs import Pairs
from flows.paths import Paths

Images = NDArray[np.uint8]
"""(N, C, H, W)"""


class Frechet:
    """Fréchet distances of sets of `count` images to the same training images; `real` is that of other ones."""

    def __init__(self, paths: Paths, count: int) -> None:
        train = Pairs(paths.pairs, "train")
        if train.images < 2 * count:
            sys.exit(f"--count: at most half of the {train.images} training images")
        self._features = trained_features(train, paths.features)
        pool = sets.chosen([train], count + max(count, MAX_REFERENCE)).pixels
        self._reference = self._features(pool[count:])
        self.description, self.real = self._features.description, self(pool[:count])

    def __call__(self, images: Images) -> float:
        return float(distances.frechet(self._features(images), self._reference)[0])

    def kid(self, images: Images) -> float:
        """The kernel distance of a set of images of any number."""
        return float(distances.kid(self._features(images), self._reference)[0])

"""A cheap figure of quality while training: distances of a few samples to as many training images."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray

from diffusion.evaluation import distances, sets
from diffusion.evaluation.distances import Array
from diffusion.evaluation.features import OwnFeatures, trained_features
from diffusion.model import Model
from diffusion.pairs.noise import Purpose, stream
from diffusion.pairs.pairs import Pairs
from diffusion.sampling.build import SampleOptions

SUBSETS, KEPT = 50, 0.8
"""Number of random subsets of the samples for the standard errors, and the share of the samples in each."""


class Measured(NamedTuple):
    """Kernel and Fréchet distance of samples to training images, with standard errors."""

    kid: float
    kid_se: float
    frechet_distance: float
    frechet_distance_se: float


@dataclass(frozen=True)
class LiveQuality:
    """Compares samples with training images, in the features of evaluate that are trained on them."""

    features: OwnFeatures
    real: Array
    """Features of the training images, (n, D)."""
    labels: NDArray[np.int64]
    """Their classes, (n,), which the samples have, too."""
    counts: NDArray[np.bool_]
    """Which samples are in each subset, (1 + SUBSETS, n); the first has all."""

    @classmethod
    def prepare(cls, count: int, train: Pairs, cache: Path, stage: str) -> Self:
        """Choose `count` training images, or all if they are fewer; `cache` and `stage` as in `trained_features`."""
        images = sets.chosen([train], count)
        features, n = trained_features(train, cache, stage), len(images.labels)
        generator = stream(sets.data_seed(train.manifest), Purpose.QUALITY, low=1)
        kept = generator.permuted(np.tile(np.arange(n) < int(KEPT * n), (SUBSETS, 1)), axis=1)
        return cls(features, features(images.pixels), images.labels, np.concatenate([np.ones((1, n), bool), kept]))

    def __call__(
        self, model: Model, options: SampleOptions, seed: int, device: torch.device, check_stop: Callable[[], None]
    ) -> Measured:
        """Draw samples and compare them; standard errors by the delete-d jackknife, as in evaluate."""
        samples = sets.samples(model, options, seed, device, self.labels, check_stop)
        x, n = self.features(samples.pixels), len(self.labels)
        kept = int(KEPT * n)
        scale = np.sqrt(kept / (n - kept))
        found = [distance(x, self.real, self.counts) for distance in (distances.kid, distances.frechet)]
        return Measured(*(float(value) for each in found for value in (each[0], each[1:].std() * scale)))

"""The bound on the negative log-likelihood of test images, in bits per dimension: summed whole, or estimated cheaply.

The sum over timesteps is taken in strata: of each, one timestep is drawn, and its term counts for the whole stratum.
Strata of width one make it the exact sum; wider ones an unbiased estimate from fewer looks at the network.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from diffusion.model import Model
from diffusion.pairs.noise import BLOCK, Purpose, stream
from diffusion.pairs.pairs import Pairs
from diffusion.pairs.pixels import to_x_0
from diffusion.process.likelihood import Bound, prior
from diffusion.process.schedule import float64_device
from diffusion.process.variance import Variance

BATCH = 256
"""Pairs of image and timestep that the network sees at once."""

Array = NDArray[np.float64]
Edges = NDArray[np.int64]
"""Where each stratum of timesteps begins, and T: (strata + 1,), ascending from 0."""


@dataclass(frozen=True)
class Draws:
    """Which terms of the bound are computed: of each image, one for each stratum, at a timestep drawn from it.

    What is drawn for an image depends on the seed and the image's index alone, and the noise at a timestep not on the
    strata: an estimate is one of the exact sum over the very same terms.
    """

    images: int
    """The first ones of a split."""
    edges: Edges
    seed: int

    @property
    def terms(self) -> int:
        return self.images * (len(self.edges) - 1)


class Terms(NamedTuple):
    """The bound on n images, in bits per dimension."""

    prior: Array
    """L_T, (n,)."""
    steps: Array
    """Each stratum's width times the term at the timestep drawn from it, (n, strata). The first one is L_0."""

    @property
    def total(self) -> Array:
        """The bound on each image, (n,)."""
        return self.prior + self.steps.sum(axis=1)


def every_timestep(num_timesteps: int) -> Edges:
    """Strata of width one: the sum over them is exact."""
    return np.arange(num_timesteps + 1)


def strata(num_timesteps: int) -> Edges:
    """Strata that widen from single timesteps near 0 to a seventh of where they begin: 41 of them for T = 1000.

    The terms fall off about as 1 / t: near 0 each timestep weighs much, far from it neighbours are alike.
    """
    edges = [0]
    while edges[-1] < num_timesteps:
        edges.append(min(edges[-1] + 1 + edges[-1] // 7, num_timesteps))
    return np.array(edges)


@torch.inference_mode()
def measure(
    model: Model,
    variance: Variance,
    pairs: Pairs,
    draws: Draws,
    device: torch.device,
    advance: Callable[[int], None] = lambda _: None,
) -> Terms:
    """The bound on images of a split, told their classes; `advance` is told of terms done."""
    seed, edges = draws.seed, draws.edges
    T, count = int(edges[-1]), len(edges) - 1
    priors, steps = np.empty(draws.images), np.empty((draws.images, count))
    for first in range(0, draws.images, BLOCK):
        indices = range(first, min(first + BLOCK, draws.images))
        x_0 = torch.from_numpy(to_x_0(pairs.x_0(first // BLOCK)[: len(indices)], np.float64))
        y = torch.from_numpy(pairs.labels(first // BLOCK))
        priors[indices] = prior(model.process.schedule, x_0).numpy()
        # Noise of an image at t is its stream t, so that the timesteps' own is free at T.
        t = np.stack([stream(seed, Purpose.LIKELIHOOD, image, T).integers(edges[:-1], edges[1:]) for image in indices])
        for begin in range(0, t.size, BATCH):
            row, column = np.divmod(np.arange(begin, min(begin + BATCH, t.size)), count)
            noise = [
                stream(seed, Purpose.LIKELIHOOD, first + int(image), int(at)).standard_normal(
                    pairs.shape, dtype=np.float32
                )
                for image, at in zip(row, t[row, column], strict=True)
            ]
            bound = Bound(model.process.denoiser(model.net_for(y[row].to(device))), variance)
            term = bound.term(
                x_0[row].float().to(device, memory_format=torch.channels_last),
                torch.from_numpy(t[row, column]).to(float64_device(device)),
                torch.from_numpy(np.stack(noise)).to(device, memory_format=torch.channels_last),
            )
            steps[first + row, column] = term.cpu().numpy()
            advance(len(row))
    return Terms(priors, steps * np.diff(edges))


def summarize(estimate: Terms, exact: Terms) -> dict[str, float]:
    """The figures of the report: the bound, estimated and exact, and the exact one's parts (means over the images)."""
    return (
        mean("bits_per_dim", estimate.total)
        | mean("bits_per_dim_exact", exact.total)
        | {
            "bits_per_dim_prior": float(exact.prior.mean()),
            "bits_per_dim_diffusion": float(exact.steps[:, 1:].sum(axis=1).mean()),
            "bits_per_dim_decoder": float(exact.steps[:, 0].mean()),
        }
    )


def curve(exact: Terms) -> list[dict[str, float]]:
    """The term at each t, bits per dimension: mean over the images."""
    return [{"t": t, "bits_per_dim": float(value)} for t, value in enumerate(exact.steps.mean(axis=0))]


def mean(name: str, values: Array) -> dict[str, float]:
    """The mean over images, its standard error and 95 % interval. A single image's error is not known: zero."""
    average, n = float(values.mean()), len(values)
    error = float(np.sqrt(np.square(values - average).sum() / max(n - 1, 1) / n))
    low, high = average - 1.96 * error, average + 1.96 * error
    return {name: average, f"{name}_se": error, f"{name}_low": low, f"{name}_high": high, f"{name}_images": n}

"""The variational bound on the negative log-likelihood of test images, in bits per dimension: exact or estimated.

The sum over timesteps is stratified: one timestep is drawn from each stratum, and its term is multiplied by the
stratum's width. Strata of width one give the exact sum, wider ones an unbiased estimate with fewer network evaluations.
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
"""Batch size, in pairs of image and timestep."""

Array = NDArray[np.float64]
Edges = NDArray[np.int64]
"""First timestep of each stratum, followed by T: (strata + 1,), ascending from 0."""


@dataclass(frozen=True)
class Draws:
    """The terms of the bound to compute: for each image, one per stratum, at a timestep drawn from it.

    The draws for an image only depend on the seed and its index, and the noise at a timestep does not depend on the
    strata. So an estimate uses a subset of the terms of the exact sum.
    """

    images: int
    """Number of images, the first ones of a split."""
    edges: Edges
    seed: int

    @property
    def terms(self) -> int:
        """Number of terms."""
        return self.images * (len(self.edges) - 1)


class Terms(NamedTuple):
    """Terms of the bound for n images, in bits per dimension."""

    prior: Array
    """L_T, (n,)."""
    steps: Array
    """Term at the timestep drawn from each stratum, times the stratum's width, (n, strata). The first is L_0."""

    @property
    def total(self) -> Array:
        """The bound for each image, (n,)."""
        return self.prior + self.steps.sum(axis=1)


def every_timestep(num_timesteps: int) -> Edges:
    """Strata of width one, for the exact sum."""
    return np.arange(num_timesteps + 1)


def strata(num_timesteps: int) -> Edges:
    """Strata of width 1 + t // 7, where t is the first timestep: 41 strata for T = 1000.

    The terms decay approximately as 1 / t: near 0 every timestep matters, far from it neighbouring terms are similar.
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
    values: NDArray[np.uint8] | None = None,
) -> Terms:
    """Compute the bound for images of a split, given their classes; `advance` receives the number of terms done.

    values: those that occur in the data set, ascending (V,); by default all 8-bit values.
    """
    levels = None if values is None else torch.from_numpy(to_x_0(values, np.float64)).to(float64_device(device))
    seed, edges = draws.seed, draws.edges
    T, count = int(edges[-1]), len(edges) - 1
    priors, steps = np.empty(draws.images), np.empty((draws.images, count))
    for first in range(0, draws.images, BLOCK):
        indices = range(first, min(first + BLOCK, draws.images))
        x_0 = torch.from_numpy(to_x_0(pairs.x_0(first // BLOCK)[: len(indices)], np.float64))
        y = torch.from_numpy(pairs.labels(first // BLOCK))
        priors[indices] = prior(model.process.schedule, x_0).numpy()
        # The noise of an image at t uses its stream t, so stream T is free for drawing timesteps.
        t = np.stack([stream(seed, Purpose.LIKELIHOOD, image, T).integers(edges[:-1], edges[1:]) for image in indices])
        for begin in range(0, t.size, BATCH):
            row, column = np.divmod(np.arange(begin, min(begin + BATCH, t.size)), count)
            noise = [
                stream(seed, Purpose.LIKELIHOOD, first + int(image), int(at)).standard_normal(
                    pairs.shape, dtype=np.float32
                )
                for image, at in zip(row, t[row, column], strict=True)
            ]
            bound = Bound(model.process.denoiser(model.net_for(y[row].to(device))), variance, levels)
            term = bound.term(
                x_0[row].float().to(device, memory_format=torch.channels_last),
                torch.from_numpy(t[row, column]).to(float64_device(device)),
                torch.from_numpy(np.stack(noise)).to(device, memory_format=torch.channels_last),
            )
            steps[first + row, column] = term.cpu().numpy()
            advance(len(row))
    return Terms(priors, steps * np.diff(edges))


def summarize(estimate: Terms, exact: Terms) -> dict[str, float]:
    """Figures for the report, means over images: the estimated and the exact bound, and the parts of the exact one."""
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
    """The mean term at each t, in bits per dimension."""
    return [{"t": t, "bits_per_dim": float(value)} for t, value in enumerate(exact.steps.mean(axis=0))]


def mean(name: str, values: Array) -> dict[str, float]:
    """Mean over images, its standard error and 95 % interval; the standard error is 0 for a single image."""
    average, n = float(values.mean()), len(values)
    error = float(np.sqrt(np.square(values - average).sum() / max(n - 1, 1) / n))
    low, high = average - 1.96 * error, average + 1.96 * error
    return {name: average, f"{name}_se": error, f"{name}_low": low, f"{name}_high": high, f"{name}_images": n}

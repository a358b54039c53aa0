"""A sampler as a linear recurrence, the form in which it is exported.

Between network evaluations, a sampler only computes linear combinations of images, whose coefficients depend on the
step alone. They are found by calling the sampler's own `step` with unit vectors in place of images.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffusion.process.build import Process
from diffusion.process.parameterization import X0
from diffusion.process.variance import Variance
from diffusion.sampling import build as sampling
from diffusion.sampling.build import SampleOptions
from diffusion.sampling.sampler import Previous

STATE = INPUT, X_T, LAST = range(3)
"""The images carried between evaluations: the next network input, the step's x_t, and the last x_0_hat."""
SOURCES = OF_X_T, OF_LAST, OF_X_0_HAT, OF_Z = range(4)
"""The images they are combined from: two of the state, the current network output, and the step's noise."""
MAX_EVALUATIONS = 2
"""Maximum number of network evaluations per step (Heun)."""


class Recurrence(NamedTuple):
    """One row for each network evaluation.

    t: the timestep of the evaluation, int64 (N,).
    mixture: the coefficients of the next state in terms of the sources, float64 (N, 3, 4).
    """

    t: NDArray[np.int64]
    mixture: NDArray[np.float64]

    @property
    def stochastic(self) -> bool:
        """Whether any step adds noise."""
        return bool(self.mixture[:, :, OF_Z].any())

    @classmethod
    def joined(cls, parts: Sequence[Self]) -> Self:
        """Concatenate the rows of several recurrences."""
        return cls(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def recurrence(
    options: SampleOptions, process: Process, variance_of: Callable[[str], Variance], timesteps: list[int]
) -> Recurrence:
    """The recurrence of the sampler in `options` along descending `timesteps`, without thresholding and guidance.

    Those are applied to the network output. The learned variance is not supported, since it is not a constant.
    """
    seen = list[tuple[Tensor, Tensor]]()

    def evaluation(x: Tensor, t: Tensor) -> Tensor:
        seen.append((x, t))
        return _unit(2 + len(seen))

    # x_t, the x_0_hat of the previous step and z are the first three coordinates; the network outputs are the next.
    x_t, last, z = (_unit(coordinate) for coordinate in range(3))
    plain = options.model_copy(update={"threshold": "none"})
    sampler = sampling.sampler(plain, replace(process, parameterization=X0(process.schedule)), evaluation, variance_of)
    times, mixtures, previous = list[int](), list[NDArray[np.float64]](), None
    for t, s in zip(timesteps, [*timesteps[1:], -1], strict=True):
        seen.clear()
        at, to = torch.tensor([t]), torch.tensor([s])
        x_s, _ = sampler.step(x_t, at, to, lambda: z, previous)
        previous = Previous(at, last)
        shown = [image for image, _ in seen[1:]]
        for number, image in enumerate([*shown, x_s]):
            coordinates = image.flatten().numpy()
            mixture = np.zeros((len(STATE), len(SOURCES)))
            kept = [0, 2 + number if number else 1, 3 + number, 2]  # in the order of SOURCES
            mixture[INPUT] = coordinates[kept]
            assert np.count_nonzero(coordinates) == np.count_nonzero(mixture[INPUT]), "depends on other images"
            if number == len(shown):
                mixture[X_T] = mixture[INPUT]
            else:
                mixture[X_T, OF_X_T] = 1
            mixture[LAST, OF_X_0_HAT] = 1
            mixtures.append(mixture)
        times += [int(t[0]) for _, t in seen]
    return Recurrence(np.array(times), np.stack(mixtures))


def _unit(coordinate: int) -> Tensor:
    """A unit vector as an image, float64 (1, 5, 1, 1)."""
    return torch.eye(3 + MAX_EVALUATIONS, dtype=torch.float64)[coordinate].view(1, -1, 1, 1)

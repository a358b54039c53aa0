"""Equal-width bands of timesteps, for per-band metrics."""

from typing import TypeVar

from numpy.typing import NDArray
from torch import Tensor

BANDS = 10
Times = TypeVar("Times", Tensor, NDArray)  # type: ignore[type-arg]


def band_of(t: Times, num_timesteps: int, bands: int = BANDS) -> Times:
    """Index of the band, in [0, bands), that each timestep `t` (integers of any shape) falls into."""
    return t * bands // num_timesteps


def band_edges(num_timesteps: int, bands: int = BANDS) -> list[int]:
    """First timestep of each band, followed by T: bands + 1 numbers."""
    return [-(-band * num_timesteps // bands) for band in range(bands + 1)]

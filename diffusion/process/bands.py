"""Equal bands of timesteps, whose figures are told apart."""

from typing import TypeVar

from numpy.typing import NDArray
from torch import Tensor

BANDS = 10
Times = TypeVar("Times", Tensor, NDArray)  # type: ignore[type-arg]


def band_of(t: Times, num_timesteps: int, bands: int = BANDS) -> Times:
    """The band of each timestep `t`, integers of any shape, below `bands`."""
    return t * bands // num_timesteps


def band_edges(num_timesteps: int, bands: int = BANDS) -> list[int]:
    """The first timestep of each band, and T: bands + 1 numbers."""
    return [-(-band * num_timesteps // bands) for band in range(bands + 1)]

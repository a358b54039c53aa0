"""Loss weights by signal-to-noise ratio."""

from typing import Protocol

import torch
from torch import Tensor


class Weighting(Protocol):
    def __call__(self, snr: Tensor) -> Tensor:
        """Weight of the loss at `snr` = alpha_bar / (1 - alpha_bar), same shape."""


class Simple:
    """1 at every timestep; L_simple of Ho et al. 2020, eq. 14."""

    def __call__(self, snr: Tensor) -> Tensor:
        return torch.ones_like(snr)

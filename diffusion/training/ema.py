"""Exponential moving average of the weights."""

import copy
from functools import lru_cache
from typing import TypeVar

import numpy as np
import torch
from torch import nn

from diffusion.training.distributed import is_sharded

Net = TypeVar("Net", bound=nn.Module)


def average_of(net: Net) -> Net:
    """A copy of `net` to hold its average, in evaluation mode."""
    return copy.deepcopy(net).eval().requires_grad_(False)


@torch.no_grad()
def update(average: nn.Module, net: nn.Module, step: int, width: float) -> None:
    """average <- d average + (1 - d) net after `step` steps, with d = (1 - 1 / step)^(gamma + 1).

    So the weights of step s count in proportion to s^gamma, whatever the length of the training: the average reaches
    back over a share `width` of it. Power-function EMA, Karras et al. 2024 (EDM2), section 3.1.
    """
    keep = (1 - 1 / step) ** (gamma(width) + 1)
    local = [
        [tensor.to_local() if is_sharded(tensor) else tensor for tensor in module.parameters()]
        for module in (average, net)
    ]
    torch._foreach_lerp_(local[0], local[1], 1 - keep)


@lru_cache
def gamma(width: float) -> float:
    """The exponent for a relative width, the standard deviation of s^gamma on [0, 1], which is below 12^(-1/2).

    The largest root of (g + 2)^2 (g + 3) = (g + 1) / width^2; Karras et al. 2024, algorithm 2.
    """
    inverse = width**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())

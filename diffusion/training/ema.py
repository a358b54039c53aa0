"""Exponential moving average (EMA) of the weights."""

import copy
from functools import lru_cache
from typing import TypeVar

import numpy as np
import torch
from torch import nn

from diffusion.training.distributed import is_sharded
from diffusion.training.options import ConstantOptions, PowerOptions

Net = TypeVar("Net", bound=nn.Module)


def average_of(net: Net) -> Net:
    """Copy `net` to hold the average of its weights, in evaluation mode and without gradients."""
    return copy.deepcopy(net).eval().requires_grad_(False)


@torch.no_grad()
def update(average: nn.Module, net: nn.Module, step: int, options: PowerOptions | ConstantOptions) -> None:
    """average <- d average + (1 - d) net after `step` steps, with the `decay` d.

    `net` may have more parameters, which are not averaged.
    """
    named = [dict(module.named_parameters()) for module in (average, net)]
    local = [
        [tensor.to_local() if is_sharded(tensor) else tensor for tensor in (parameters[name] for name in named[0])]
        for parameters in named
    ]
    torch._foreach_lerp_(local[0], local[1], 1 - decay(step, options))


def decay(step: int, options: PowerOptions | ConstantOptions) -> float:
    """What the average keeps of itself after `step` steps; 0 after the first, so no random weights are left.

    power: d = (1 - 1 / step)^(gamma + 1); Karras et al. 2024 (EDM2), section 3.1. The weights of step s contribute in
    proportion to s^gamma, so that the width of the average is a constant fraction `width` of the steps so far.

    constant: d is given, as in Ho et al. 2020, appendix B, whose code also starts with the weights of the first step.
    """
    if isinstance(options, ConstantOptions):
        return options.decay if step > 1 else 0.0
    return float((1 - 1 / step) ** (gamma(options.width) + 1))


@lru_cache
def gamma(width: float) -> float:
    """Exponent for a relative width, defined as the standard deviation of s^gamma on [0, 1]; below 12^(-1/2).

    It is the largest root of (g + 2)^2 (g + 3) = (g + 1) / width^2; Karras et al. 2024, algorithm 2.
    """
    inverse = width**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())

"""Exponential moving average of the weights."""

import copy

import torch
from torch import nn


def average_of(net: nn.Module) -> nn.Module:
    """A copy of `net` to hold its average, in evaluation mode."""
    return copy.deepcopy(net).eval().requires_grad_(False)


@torch.no_grad()
def update(average: nn.Module, net: nn.Module, step: int, decay: float) -> None:
    """average <- d average + (1 - d) net after `step` steps, with d = min(decay, (1 + step) / (10 + step)).

    The rising decay lets the first, random weights go quickly: the average of a short training is good as well.
    """
    now = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(average.parameters()), list(net.parameters()), 1 - now)

"""The optimizer and its learning rate."""

import math

import torch
from torch import nn

from diffusion import params


def optimizer(net: nn.Module, options: params.Train) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019); matrices and kernels decay, biases and norms do not."""
    matrices = [parameter for parameter in net.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in net.parameters() if parameter.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": options.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=options.learning_rate, fused=True)


def learning_rate(step: int, options: params.Train) -> float:
    """The learning rate of step `step`, counted from 0: a linear warm-up, then constant or falling to zero."""
    if step < options.warmup_steps:
        return options.learning_rate * (step + 1) / options.warmup_steps
    fraction = (step - options.warmup_steps) / max(options.steps - options.warmup_steps, 1)
    match options.decay:
        case "linear":
            return options.learning_rate * (1 - fraction)
        case "cosine":
            return options.learning_rate * 0.5 * (1 + math.cos(math.pi * fraction))
        case _:
            return options.learning_rate

"""Which timesteps a sampler visits: some of [0, T), descending from the last to the first."""

from collections.abc import Callable

import torch
from torch import Tensor

from diffusion.process.schedule import Schedule

Spacing = Callable[[Schedule, int], list[int]]
"""(schedule, number of steps n) to n different timesteps, descending; a single one is T - 1."""


def linspace(schedule: Schedule, steps: int) -> list[int]:
    """Evenly spaced from T - 1 to 0."""
    return _distinct(torch.linspace(schedule.num_timesteps - 1, 0, steps, dtype=torch.float64))


def quadratic(schedule: Schedule, steps: int) -> list[int]:
    """Squares of evenly spaced numbers, closer together near 0; Song et al. 2021, appendix D.2."""
    return _distinct(torch.linspace((schedule.num_timesteps - 1) ** 0.5, 0, steps, dtype=torch.float64) ** 2)


def log_snr(schedule: Schedule, steps: int) -> list[int]:
    """Evenly spaced in log SNR, as far as whole timesteps can be; Lu et al. 2022 (DPM-Solver), section 3.4.

    From pure noise, where log SNR is infinite, the second one is the last timestep where it is not.
    """
    table = (schedule.alpha_bar / (1 - schedule.alpha_bar)).log()
    finite = int(table.isfinite().sum())
    skipped = min(schedule.num_timesteps - finite, steps)
    wanted = torch.linspace(float(table[finite - 1]), float(table[0]), steps - skipped, dtype=torch.float64)
    nearest = (table[:finite, None] - wanted).abs().argmin(dim=0)
    return _distinct(torch.cat([torch.arange(schedule.num_timesteps - 1, finite - 1, -1)[:skipped], nearest]))


def _distinct(points: Tensor) -> list[int]:
    """Descending points rounded to whole numbers, moved apart where they meet."""
    steps, chosen = len(points), list[int]()
    for index, point in enumerate(points.tolist()):
        highest = chosen[-1] - 1 if chosen else round(point)
        chosen.append(max(min(round(point), highest), steps - 1 - index))
    return chosen

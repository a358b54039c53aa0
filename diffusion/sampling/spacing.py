"""Which timesteps a sampler visits: some of [0, T), descending from the last to the first."""

from collections.abc import Callable

import torch

from diffusion.process.schedule import Schedule

MIN_LOG_SNR = -10.2
"""log SNR where Ho's linear schedule ends, about; below it there is nothing to see of the image."""
Spacing = Callable[[Schedule, int], list[int]]
"""(schedule, number of steps n) to n different timesteps, descending; a single one is T - 1."""


def linspace(schedule: Schedule, steps: int) -> list[int]:
    """Evenly spaced from T - 1 to 0."""
    return _distinct(torch.linspace(schedule.num_timesteps - 1, 0, steps, dtype=torch.float64).tolist())


def quadratic(schedule: Schedule, steps: int) -> list[int]:
    """Squares of evenly spaced numbers, closer together near 0; Song et al. 2021, appendix D.2."""
    return _distinct(
        torch.linspace((schedule.num_timesteps - 1) ** 0.5, 0, steps, dtype=torch.float64).square().tolist()
    )


def log_snr(schedule: Schedule, steps: int) -> list[int]:
    """Evenly spaced in log SNR, as far as whole timesteps can be; Lu et al. 2022a (DPM-Solver), section 3.4.

    A schedule that goes on into pure noise would have most of its steps there: from T - 1 the second step then leads to
    where log SNR is above MIN_LOG_SNR.
    """
    table, end = (schedule.alpha_bar / (1 - schedule.alpha_bar)).log(), schedule.num_timesteps - 1
    begin = max(int((table > MIN_LOG_SNR).sum()), 1) - 1
    wanted = torch.linspace(float(table[0]), float(table[begin]), steps - (begin < end), dtype=torch.float64)
    nearest = (table[: begin + 1, None] - wanted).abs().argmin(dim=0)
    return _distinct([end, *nearest.flip(0)[len(nearest) - steps + 1 :].tolist()])


def _distinct(points: list[float]) -> list[int]:
    """Descending points rounded to whole numbers, moved apart where they meet."""
    chosen = list[int]()
    for left, point in zip(range(len(points) - 1, -1, -1), points, strict=True):
        highest = chosen[-1] - 1 if chosen else round(point)
        chosen.append(max(min(round(point), highest), left))
    return chosen


SPACINGS: dict[str, Spacing] = {
    "linspace": linspace,
    "quadratic": quadratic,
    "log-snr": log_snr,
}

"""Timestep spacings: the subset of [0, T) that a sampler visits, in descending order."""

from collections.abc import Callable

import torch

from diffusion.process.schedule import Schedule

MIN_LOG_SNR = -10.2
"""log SNR at the end of Ho's linear schedule, approximately; below it x_t is indistinguishable from noise."""
Spacing = Callable[[Schedule, int], list[int]]
"""Maps (schedule, number of steps n) to n distinct descending timesteps; for n = 1 it is T - 1."""


def linspace(schedule: Schedule, steps: int) -> list[int]:
    """Evenly spaced from T - 1 to 0."""
    return _distinct(torch.linspace(schedule.num_timesteps - 1, 0, steps, dtype=torch.float64).tolist())


def quadratic(schedule: Schedule, steps: int) -> list[int]:
    """Squares of evenly spaced numbers, denser near 0; Song et al. 2021, appendix D.2."""
    return _distinct(
        torch.linspace((schedule.num_timesteps - 1) ** 0.5, 0, steps, dtype=torch.float64).square().tolist()
    )


def log_snr(schedule: Schedule, steps: int) -> list[int]:
    """Evenly spaced in log SNR, up to rounding to integers; Lu et al. 2022a (DPM-Solver), section 3.4.

    A schedule that continues into pure noise would spend most of its steps there. So the first step from T - 1 skips to
    the highest timestep whose log SNR exceeds MIN_LOG_SNR.
    """
    table, end = (schedule.alpha_bar / (1 - schedule.alpha_bar)).log(), schedule.num_timesteps - 1
    begin = max(int((table > MIN_LOG_SNR).sum()), 1) - 1
    wanted = torch.linspace(float(table[0]), float(table[begin]), steps - (begin < end), dtype=torch.float64)
    nearest = (table[: begin + 1, None] - wanted).abs().argmin(dim=0)
    return _distinct([end, *nearest.flip(0)[len(nearest) - steps + 1 :].tolist()])


def angle(schedule: Schedule, steps: int) -> list[int]:
    """Evenly spaced in the angle phi of `Schedule.angle`, up to rounding to integers; Salimans & Ho 2022, appendix D.

    All steps are equally long, from T - 1 to the clean image at phi = 0. So the last one does not begin at t = 0, where
    almost no noise is left to remove.
    """
    phi = schedule.angle(torch.arange(schedule.num_timesteps)).flatten()
    wanted = phi[-1] * torch.arange(steps, 0, -1, dtype=torch.float64) / steps
    return _distinct((phi[:, None] - wanted).abs().argmin(dim=0).tolist())


def _distinct(points: list[float]) -> list[int]:
    """Round descending points to distinct integers, shifting those that coincide."""
    chosen = list[int]()
    for left, point in zip(range(len(points) - 1, -1, -1), points, strict=True):
        highest = chosen[-1] - 1 if chosen else round(point)
        chosen.append(max(min(round(point), highest), left))
    return chosen


SPACINGS: dict[str, Spacing] = {
    "linspace": linspace,
    "quadratic": quadratic,
    "log-snr": log_snr,
    "angle": angle,
}

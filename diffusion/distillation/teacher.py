"""The model to distil: its estimates, and steps along its sampling trajectories."""

from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion.model import Model
from diffusion.process.denoiser import THRESHOLDS, Denoiser
from diffusion.process.schedule import Schedule
from diffusion.sampling.sampler import Previous, Sampler


@dataclass(frozen=True)
class Teacher:
    """A model, with classifier-free guidance toward the classes, if it has any."""

    model: Model
    guidance: float = 1.0
    threshold: str = "clip"

    @property
    def schedule(self) -> Schedule:
        return self.model.process.schedule

    def denoiser(self, y: Tensor | None) -> Denoiser:
        """The estimates for images of the classes `y` int64 (B,), -1 for none."""
        net = self.model.net_for(y, self.guidance)
        return self.model.process.denoiser(net, THRESHOLDS[self.threshold])


def waypoints(schedule: Schedule, t: Tensor, points: int, count: int) -> list[Tensor]:
    """The next `count` timesteps on the way from `t` int64 (B,) to the image, each int64 (B,), -1 at the end.

    The steps are even in the angle of `Schedule.angle`: as many as there are steps of the largest angle / `points` in
    that of `t`, rounded up.
    """
    angle, largest = schedule.angle(t).flatten(), schedule.angle(torch.full_like(t[:1], schedule.num_timesteps - 1))
    rounding = 1e-9  # so that an angle just below that of a timestep is taken for it
    steps = torch.ceil(angle / largest.flatten() * points - rounding).clamp(min=1)
    path, last = list[Tensor](), t
    for number in range(1, count + 1):
        wanted = schedule.at_angle(angle * (1 - number / steps).clamp(min=0) + rounding)
        last = torch.where(number < steps, torch.minimum(wanted, last - 1), -1).clamp(min=-1)
        path.append(last)
    return path


@torch.no_grad()
def follow(sampler: Sampler, x_t: Tensor, t: Tensor, path: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Take deterministic steps from x_t (B, C, H, W) at `t` along `path`; returns x_s and its timestep s int64 (B,).

    Images that have arrived at the end, timestep -1, stay there.
    """
    previous = None
    for s in path:
        x_s, x_0_hat = sampler.step(x_t, t.clamp(min=0), s, _no_noise, previous)
        previous = Previous(t.clamp(min=0), x_0_hat)
        x_t, t = torch.where((t >= 0).to(x_t.device).view(-1, 1, 1, 1), x_s, x_t), s
    return x_t, t


def _no_noise() -> Tensor:
    raise AssertionError("a deterministic sampler draws no noise")

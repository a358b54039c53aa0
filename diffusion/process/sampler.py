"""Samplers: one step from x_t to an earlier x_s, and the one loop that takes the steps."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from diffusion.process.parameterization import Parameterization
from diffusion.process.schedule import Schedule
from diffusion.process.variance import Variance

Noise = Callable[[int], Tensor]
"""Standard normal noise (B, C, H, W) for each place where it is drawn: 0 for x_T, then 1, 2, ... for the steps."""


@dataclass(frozen=True)
class Denoiser:
    """A network with its parameterization: (x_t, t) to the estimates of x_0 and eps, all (B, C, H, W)."""

    net: nn.Module
    schedule: Schedule
    parameterization: Parameterization

    def __call__(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """x_0_hat clipped to [-1, 1], and the eps_hat that belongs to the clipped x_0_hat; `t` int64 (B,)."""
        x_0_hat = self.parameterization.to_x_0(self.net(x_t, t), x_t, t).clamp(-1, 1)
        alpha_bar = self.schedule(t)
        eps_hat = (x_t - alpha_bar.sqrt().to(x_t.dtype) * x_0_hat) * (1 - alpha_bar).rsqrt().to(x_t.dtype)
        return x_0_hat, eps_hat


class Sampler(Protocol):
    def step(self, x_t: Tensor, t: Tensor, s: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """x_s and x_0_hat, (B, C, H, W), from x_t; `t`, `s` int64 (B,), -1 <= s < t; `z` standard normal noise."""


@dataclass(frozen=True)
class Ancestral:
    """Ancestral sampling: x_s ~ N(posterior_mean(x_t, x_0_hat), variance); Ho et al. 2020, algorithm 2 and eq. 7."""

    denoiser: Denoiser
    variance: Variance

    def step(self, x_t: Tensor, t: Tensor, s: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        x_0_hat, _ = self.denoiser(x_t, t)
        alpha_bar_t, alpha_bar_s = self.denoiser.schedule(t), self.denoiser.schedule(s)
        alpha = alpha_bar_t / alpha_bar_s
        of_x_0 = alpha_bar_s.sqrt() * (1 - alpha) / (1 - alpha_bar_t)
        of_x_t = alpha.sqrt() * (1 - alpha_bar_s) / (1 - alpha_bar_t)
        posterior_mean = of_x_0.to(x_t.dtype) * x_0_hat + of_x_t.to(x_t.dtype) * x_t
        # No noise in the last step: there the mean is x_0_hat itself.
        scale = torch.where((s >= 0).view(-1, 1, 1, 1), self.variance(t, s), 0).sqrt()
        return posterior_mean + scale.to(x_t.dtype) * z, x_0_hat


@dataclass(frozen=True)
class Ddim:
    """DDIM: x_s = sqrt(alpha_bar_s) x_0_hat + sqrt(1 - alpha_bar_s - sigma^2) eps_hat + sigma z.

    Song et al. 2021, eq. 12, with sigma = eta times the posterior's standard deviation (eq. 16).
    """

    denoiser: Denoiser
    eta: float

    def step(self, x_t: Tensor, t: Tensor, s: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        x_0_hat, eps_hat = self.denoiser(x_t, t)
        alpha_bar_t, alpha_bar_s = self.denoiser.schedule(t), self.denoiser.schedule(s)
        variance = self.eta**2 * (1 - alpha_bar_s) / (1 - alpha_bar_t) * (1 - alpha_bar_t / alpha_bar_s)
        # 1 - alpha_bar_s - variance is zero for s = -1, and rounding must not take it below.
        direction = (1 - alpha_bar_s - variance).clamp(min=0).sqrt()
        x_s = alpha_bar_s.sqrt().to(x_t.dtype) * x_0_hat + direction.to(x_t.dtype) * eps_hat
        return x_s + variance.sqrt().to(x_t.dtype) * z, x_0_hat


class Point(NamedTuple):
    """One point of a sampling trajectory."""

    t: int
    """The timestep of x_t: -1 at the end, where x_t is the picture."""
    x_t: Tensor
    x_0_hat: Tensor


def evenly_spaced(num_timesteps: int, steps: int) -> list[int]:
    """`steps` timesteps from T - 1 down to 0, evenly spaced (T - 1 alone for a single step)."""
    return [round(t) for t in torch.linspace(num_timesteps - 1, 0, steps, dtype=torch.float64).tolist()]


@torch.inference_mode()
def trajectory(sampler: Sampler, noise: Noise, timesteps: list[int]) -> Iterator[Point]:
    """Sample along descending `timesteps`, giving every point on the way; the last one's x_t is the result."""
    x_t = noise(0)
    for index, (t, s) in enumerate(zip(timesteps, [*timesteps[1:], -1], strict=True), start=1):
        batch = torch.empty(len(x_t), dtype=torch.int64, device=x_t.device)
        x_t, x_0_hat = sampler.step(x_t, batch.fill_(t), torch.full_like(batch, s), noise(index))
        yield Point(s, x_t, x_0_hat)


def sample(sampler: Sampler, noise: Noise, timesteps: list[int]) -> Tensor:
    """The pictures at the end of the trajectory, float (B, C, H, W) in about [-1, 1]."""
    for point in trajectory(sampler, noise, timesteps):
        x_t = point.x_t
    return x_t

"""Samplers, which take one step from x_t to an earlier x_s, and the sampling loop."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal, NamedTuple, Protocol

import torch
from pydantic import Field
from torch import Tensor

from diffusion.process.denoiser import Denoiser
from diffusion.process.schedule import float64_device, times
from diffusion.process.variance import Variance
from diffusion.sections import Choice

Noise = Callable[[int], Tensor]
"""Maps the index of a draw to standard normal noise (B, C, H, W): 0 for x_T, then 1, 2, ... for the steps."""
Draw = Callable[[], Tensor]
"""Draws the noise of one step; deterministic samplers do not call it."""


class Point(NamedTuple):
    """One point of a sampling trajectory."""

    t: int
    """The timestep of x_t; -1 at the end, where x_t is the image."""
    x_t: Tensor
    x_0_hat: Tensor


class Previous(NamedTuple):
    """The previous step, for multistep samplers."""

    t: Tensor
    """The timestep at which it started, int64 (B,)."""
    x_0_hat: Tensor
    """(B, C, H, W)"""


class Sampler(Protocol):
    def step(self, x_t: Tensor, t: Tensor, s: Tensor, z: Draw, previous: Previous | None) -> tuple[Tensor, Tensor]:
        """Compute x_s and x_0_hat, (B, C, H, W), from x_t; `t`, `s` int64 (B,), -1 <= s < t.

        z: draws this step's standard normal noise (B, C, H, W).
        previous: the step that produced x_t, None for the first.
        """


@dataclass(frozen=True)
class Ancestral:
    """Ancestral sampling: x_s ~ N(posterior_mean(x_t, x_0_hat), variance); Ho et al. 2020, algorithm 2 and eq. 7."""

    denoiser: Denoiser
    variance: Variance

    def step(self, x_t: Tensor, t: Tensor, s: Tensor, z: Draw, previous: Previous | None) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        x_0_hat, _, fraction = self.denoiser(x_t, t)
        mean = self.denoiser.schedule.posterior_mean(x_0_hat, x_t, t, s)
        # The last step adds no noise; its mean is x_0_hat.
        sigma = torch.where((s >= 0).view(-1, 1, 1, 1), self.variance(t, s, fraction), 0).sqrt()
        return mean + times(sigma, z()), x_0_hat


@dataclass(frozen=True)
class Ddim:
    """DDIM: x_s = sqrt(alpha_bar_s) x_0_hat + sqrt(1 - alpha_bar_s - sigma^2) eps_hat + sigma z.

    Song et al. 2021, eq. 12, with sigma = eta times the posterior standard deviation (eq. 16).
    """

    denoiser: Denoiser
    eta: float

    def step(self, x_t: Tensor, t: Tensor, s: Tensor, z: Draw, previous: Previous | None) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        schedule = self.denoiser.schedule
        x_0_hat, eps_hat, _ = self.denoiser(x_t, t)
        alpha_bar, variance = schedule(s), self.eta**2 * schedule.posterior_variance(t, s)
        # 1 - alpha_bar - variance is zero for s = -1, up to rounding.
        direction = (1 - alpha_bar - variance).clamp(min=0).sqrt()
        x_s = times(alpha_bar.sqrt(), x_0_hat) + times(direction, eps_hat)
        return x_s + times(variance.sqrt(), z()) if self.eta else x_s, x_0_hat


@dataclass(frozen=True)
class Consistency:
    """For distilled models, whose x_0_hat is the end of the trajectory through x_t, not a mean over images.

    x_s = sqrt(alpha_bar_s) x_0_hat + sqrt(1 - alpha_bar_s) (sqrt(1 - gamma^2) eps_hat + gamma z): the gamma-sampling of
    Kim et al. 2024 (consistency trajectory models), algorithm 3, with a DDIM step in place of their jump to an
    intermediate time. gamma = 1 is multistep consistency sampling (Song et al. 2023, algorithm 1), which keeps nothing
    of x_t but x_0_hat; gamma = 0 keeps its noise, as DDIM with eta = 0 does.
    """

    denoiser: Denoiser
    gamma: float

    def step(self, x_t: Tensor, t: Tensor, s: Tensor, z: Draw, previous: Previous | None) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        x_0_hat, eps_hat, _ = self.denoiser(x_t, t)
        alpha_bar, kept = self.denoiser.schedule(s), 1 - self.gamma**2
        x_s = times(alpha_bar.sqrt(), x_0_hat) + times(((1 - alpha_bar) * kept).sqrt(), eps_hat)
        return x_s + times((1 - alpha_bar).sqrt() * self.gamma, z()) if self.gamma else x_s, x_0_hat


@dataclass(frozen=True)
class DpmSolver:
    """DPM-Solver++(2M), or SDE-DPM-Solver++(2M) if `stochastic`; Lu et al. 2022b.

    With lambda = log(SNR) / 2, h = lambda_s - lambda_t, and D extrapolated from this and the previous step's x_0_hat,

        x_s = sigma_s / sigma_t x_t + sqrt(alpha_bar_s) (1 - e^-h) D,   sigma^2 = 1 - alpha_bar.

    Where h is infinite (to the clean image, or from pure noise), D is x_0_hat itself: a first-order step.
    """

    denoiser: Denoiser
    stochastic: bool

    def step(self, x_t: Tensor, t: Tensor, s: Tensor, z: Draw, previous: Previous | None) -> tuple[Tensor, Tensor]:
        schedule = self.denoiser.schedule
        x_0_hat, _, _ = self.denoiser(x_t, t)
        alpha_bar_t, alpha_bar_s = schedule(t), schedule(s)
        snr_t, snr_s = schedule.snr(t), schedule.snr(s)
        decay = (snr_t / snr_s).sqrt()  # e^-h
        direction = x_0_hat
        if previous is not None:
            # h divided by the previous step's h: 1 / r in the paper.
            ratio = (snr_s / snr_t).log() / (snr_t / schedule.snr(previous.t)).log()
            ratio = torch.where(ratio.isfinite(), ratio, 0)
            direction = x_0_hat + times(ratio / 2, x_0_hat - previous.x_0_hat)
        of_x_t = ((1 - alpha_bar_s) / (1 - alpha_bar_t)).sqrt()
        if self.stochastic:
            of_x_t, gain = of_x_t * decay, 1 - decay**2
            noise = times(((1 - alpha_bar_s) * gain).sqrt(), z())
        else:
            gain, noise = 1 - decay, torch.zeros_like(x_t)
        return times(of_x_t, x_t) + times(alpha_bar_s.sqrt() * gain, direction) + noise, x_0_hat


@dataclass(frozen=True)
class Heun:
    """Heun's second-order method; Karras et al. 2022 (EDM), algorithm 1, in terms of x_t.

    With x = x_t / sqrt(alpha_bar) and sigma = SNR^(-1/2), an Euler step of dx/dsigma = eps_hat is a DDIM step. Heun's
    method evaluates eps_hat again at its end and uses the mean of both. Plain Euler steps are taken to the clean image,
    and from above EDM's largest sigma of 80, where x_t is pure noise and steps in sigma are huge.
    """

    denoiser: Denoiser
    MAX_SIGMA = 80.0

    def step(self, x_t: Tensor, t: Tensor, s: Tensor, z: Draw, previous: Previous | None) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        schedule = self.denoiser.schedule
        x_0_hat, eps_hat, _ = self.denoiser(x_t, t)
        alpha_bar = schedule(s)
        x_s = times(alpha_bar.sqrt(), x_0_hat) + times((1 - alpha_bar).sqrt(), eps_hat)
        sigma_t, sigma_s = schedule.snr(t).rsqrt(), schedule.snr(s).rsqrt()
        second = (s >= 0).view(-1, 1, 1, 1) & (sigma_t <= self.MAX_SIGMA)
        if second.any():
            _, eps_hat_s, _ = self.denoiser(x_s, s.clamp(min=0))
            half_step = torch.where(second, alpha_bar.sqrt() * (sigma_s - sigma_t) / 2, 0)
            x_s = x_s + times(half_step, eps_hat_s - eps_hat)
        return x_s, x_0_hat


class DdimOptions(Choice):
    """DDIM sampling (Song et al. 2021)."""

    kind: Literal["ddim"] = "ddim"
    """Name of the sampler."""
    eta: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Stochasticity: 0 is deterministic; 1 adds as much noise as ddpm with variance fixed-small."""


class ConsistencyOptions(Choice):
    """Sampling from distilled models (Kim et al. 2024)."""

    kind: Literal["consistency"] = "consistency"
    """Name of the sampler."""
    gamma: Annotated[float, Field(ge=0, le=1)] = 0.0
    """How much of the noise is new in each step: 0 keeps that of x_t, and is deterministic; 1 replaces it (multistep
    consistency sampling, Song et al. 2023)."""


SAMPLERS: dict[str, Callable[[Denoiser, Callable[[], Variance], Any], Sampler]] = {
    "ddpm": lambda denoiser, variance, _: Ancestral(denoiser, variance()),
    "ddim": lambda denoiser, _, options: Ddim(denoiser, options.eta),
    "dpm-solver++": lambda denoiser, _, __: DpmSolver(denoiser, stochastic=False),
    "dpm-solver++-sde": lambda denoiser, _, __: DpmSolver(denoiser, stochastic=True),
    "heun": lambda denoiser, _, __: Heun(denoiser),
    "consistency": lambda denoiser, _, options: Consistency(denoiser, options.gamma),
}
"""Constructors by name; each takes the denoiser, a function that builds the variance, and the sampler's options."""
SAMPLER_OPTIONS: dict[str, type[Choice]] = {
    "ddim": DdimOptions,
    "consistency": ConsistencyOptions,
}


@torch.inference_mode()
def trajectory(sampler: Sampler, noise: Noise, timesteps: list[int], x_t: Tensor | None = None) -> Iterator[Point]:
    """Sample along the descending `timesteps`, yielding every point; the last point's x_t is the result.

    Starts from `x_t` at timesteps[0], or from noise if it is None.
    """
    x_t = noise(0) if x_t is None else x_t
    previous = None
    for index, (t, s) in enumerate(zip(timesteps, [*timesteps[1:], -1], strict=True), start=1):
        at, to = (torch.full((len(x_t),), step, device=float64_device(x_t.device)) for step in (t, s))
        x_t, x_0_hat = sampler.step(x_t, at, to, partial(noise, index), previous)
        previous = Previous(at, x_0_hat)
        yield Point(s, x_t, x_0_hat)


def sample(sampler: Sampler, noise: Noise, timesteps: list[int], x_t: Tensor | None = None) -> Tensor:
    """The images at the end of the trajectory, float (B, C, H, W), approximately in [-1, 1]."""
    for point in trajectory(sampler, noise, timesteps, x_t):
        x_t = point.x_t
    assert x_t is not None
    return x_t

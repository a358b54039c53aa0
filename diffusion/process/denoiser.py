"""Turns a network into a denoiser: estimates of x_0 and eps, with thresholding and classifier-free guidance."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from diffusion.process.parameterization import Parameterization, split
from diffusion.process.schedule import Schedule, times

Net = Callable[[Tensor, Tensor], Tensor]
"""Maps (x_t (B, C, H, W), t int64 (B,)) to the network's raw output."""
Threshold = Callable[[Tensor], Tensor]
"""Limits the range of x_0_hat (B, C, H, W)."""


class Estimate(NamedTuple):
    """A network's estimates from x_t, each (B, C, H, W)."""

    x_0_hat: Tensor
    eps_hat: Tensor
    """The noise consistent with x_t and the thresholded x_0_hat."""
    variance_fraction: Tensor | None


@dataclass(frozen=True)
class Denoiser:
    """A network with its schedule, parameterization and thresholding."""

    net: Net
    schedule: Schedule
    parameterization: Parameterization
    threshold: Threshold

    def __call__(self, x_t: Tensor, t: Tensor) -> Estimate:
        """Estimate x_0 and eps from x_t (B, C, H, W) at `t` int64 (B,)."""
        out, fraction = split(self.net(x_t, t.to(x_t.device)), x_t.shape[1])
        x_0_hat = self.threshold(self.parameterization.to_x_0(out, x_t, t))
        alpha_bar = self.schedule(t)
        eps_hat = times((1 - alpha_bar).rsqrt(), x_t - times(alpha_bar.sqrt(), x_0_hat))
        return Estimate(x_0_hat, eps_hat, fraction)


@dataclass(frozen=True)
class Guided:
    """A class-conditional network with classifier-free guidance toward the classes `y` int64 (B,), -1 for none.

    out = out(no class) + scale (out(y) - out(no class)); Ho & Salimans 2022, eq. 6, with scale = 1 + w. A learned
    variance is taken from the conditional output.
    """

    net: nn.Module
    y: Tensor
    scale: float

    def __call__(self, x_t: Tensor, t: Tensor) -> Tensor:
        if self.scale == 1:
            return self.net(x_t, t, self.y)
        twice = self.net(torch.cat([x_t, x_t]), torch.cat([t, t]), torch.cat([self.y, torch.full_like(self.y, -1)]))
        with_class, without = twice.chunk(2)
        out, fraction = split(with_class, x_t.shape[1])
        plain, _ = split(without, x_t.shape[1])
        guided = plain + self.scale * (out - plain)
        return guided if fraction is None else torch.cat([guided, fraction], dim=1)


def clip(x_0_hat: Tensor) -> Tensor:
    """Clip x_0_hat to [-1, 1]."""
    return x_0_hat.clamp(-1, 1)


def dynamic_threshold(x_0_hat: Tensor) -> Tensor:
    """Clip to [-s, s] and divide by s, where s is the image's 99.5th percentile of |x_0_hat|, at least 1.

    Avoids the saturation that `clip` causes with strong guidance; Saharia et al. 2022 (Imagen), section 2.3.
    """
    values = x_0_hat.abs().flatten(1)
    # Full sort because kthvalue has no deterministic CUDA kernel.
    s = values.sort(dim=1).values[:, math.ceil(0.995 * values.shape[1]) - 1].clamp(min=1).view(-1, 1, 1, 1)
    return x_0_hat.clamp(-s, s) / s


def unbounded(x_0_hat: Tensor) -> Tensor:
    """Return x_0_hat unchanged."""
    return x_0_hat


THRESHOLDS: dict[str, Threshold] = {
    "clip": clip,
    "dynamic": dynamic_threshold,
    "none": unbounded,
}

"""From a network to estimates of the clean image and the noise, kept in range, and guided by a class if wished."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from diffusion.process.parameterization import Parameterization, split
from diffusion.process.schedule import Schedule, times

Net = Callable[[Tensor, Tensor], Tensor]
"""(x_t (B, C, H, W), t int64 (B,)) to the network's whole output."""
Threshold = Callable[[Tensor], Tensor]
"""x_0_hat (B, C, H, W) to the same, kept in range."""


class Estimate(NamedTuple):
    """What a network says of x_t, each (B, C, H, W)."""

    x_0_hat: Tensor
    eps_hat: Tensor
    """The noise that belongs to x_0_hat after thresholding."""
    variance_fraction: Tensor | None


@dataclass(frozen=True)
class Denoiser:
    """A network with its parameterization."""

    net: Net
    schedule: Schedule
    parameterization: Parameterization
    threshold: Threshold

    def __call__(self, x_t: Tensor, t: Tensor) -> Estimate:
        """Estimates from x_t (B, C, H, W) at `t` int64 (B,)."""
        out, fraction = split(self.net(x_t, t.to(x_t.device)), x_t.shape[1])
        x_0_hat = self.threshold(self.parameterization.to_x_0(out, x_t, t))
        alpha_bar = self.schedule(t)
        eps_hat = times((1 - alpha_bar).rsqrt(), x_t - times(alpha_bar.sqrt(), x_0_hat))
        return Estimate(x_0_hat, eps_hat, fraction)


@dataclass(frozen=True)
class Guided:
    """A network of classes as one for the classes `y` int64 (B,), -1 for none, with classifier-free guidance.

    out = out(no class) + scale (out(y) - out(no class)); Ho & Salimans 2022, eq. 6, with scale = 1 + w. Of a learned
    variance it is the one for `y`.
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
    """x_0_hat clipped to [-1, 1]."""
    return x_0_hat.clamp(-1, 1)


def dynamic_threshold(x_0_hat: Tensor) -> Tensor:
    """Clip to [-s, s] and divide by s: the value that 99.5 % of an image's are below, at least 1.

    Saharia et al. 2022 (Imagen), section 2.3: images do not saturate as they do under `clip` with strong guidance.
    """
    values = x_0_hat.abs().flatten(1)
    # Sorted, since kthvalue has no deterministic kernel on a GPU.
    s = values.sort(dim=1).values[:, math.ceil(0.995 * values.shape[1]) - 1].clamp(min=1).view(-1, 1, 1, 1)
    return x_0_hat.clamp(-s, s) / s


def unbounded(x_0_hat: Tensor) -> Tensor:
    """x_0_hat as it is."""
    return x_0_hat


THRESHOLDS: dict[str, Threshold] = {
    "clip": clip,
    "dynamic": dynamic_threshold,
    "none": unbounded,
}

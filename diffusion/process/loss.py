"""The training loss."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from diffusion.process import likelihood
from diffusion.process.parameterization import Parameterization, split
from diffusion.process.schedule import Schedule, float64_device, times
from diffusion.process.variance import Learned
from diffusion.process.weighting import Weighting

Penalty = Callable[[Tensor], Tensor]
"""The loss of each value's error, same shape."""


def huber(error: Tensor) -> Tensor:
    """e^2 up to |e| = 1 and 2 |e| - 1 beyond, so that small errors count as in the squared loss; Huber 1964."""
    return 2 * F.huber_loss(error, torch.zeros_like(error), reduction="none", delta=1.0)


@dataclass(frozen=True)
class Loss:
    """The error of x_0_hat, scaled by the root of its weight, in the mean of its `penalty`; Ho et al. 2020, eq. 14.

    With the weighting `Simple` the scaled error is that of the noise. Where the network learns the variance, the bound
    is added (Nichol & Dhariwal 2021, eq. 16): lambda T times its term at t in bits per dimension, for uniform
    timesteps an unbiased estimate of lambda times the sum over t; it does not reach the mean, which is detached.
    """

    schedule: Schedule
    parameterization: Parameterization
    weighting: Weighting
    penalty: Penalty
    VLB_SHARE = 0.001
    """lambda in the hybrid loss."""

    def __call__(self, net: nn.Module, x_0: Tensor, t: Tensor, eps: Tensor, y: Tensor | None = None) -> Tensor:
        """Loss of each image, (B,), at `t` int64 (B,) with noise `eps` (B, C, H, W) and classes `y` int64 (B,)."""
        t = t.to(float64_device(x_0.device))
        x_t = self.schedule.diffuse(x_0, t, eps)
        out, fraction = split(net(x_t, t.to(x_t.device), y), x_0.shape[1])
        error = times(self.scale(t), out - self.parameterization.target(x_0, eps, t))
        simple = self.penalty(error).mean(dim=(1, 2, 3))
        if fraction is None:
            return simple
        x_0_hat = self.parameterization.to_x_0(out.detach(), x_t, t)
        variance = Learned(self.schedule)(t, t - 1, fraction)
        vlb = likelihood.term(self.schedule, x_0, x_t, t, x_0_hat, variance)
        return simple + self.VLB_SHARE * self.schedule.num_timesteps * vlb

    def scale(self, t: Tensor) -> Tensor:
        """What an error of the network's output at `t` is multiplied by, float64 (B, 1, 1, 1)."""
        snr, before = self.schedule.snr(t), self.schedule.snr(t - 1)
        # Before t = 0 there is no SNR: the ratio of t = 1 stands in.
        one = torch.ones_like(t)
        ratio = self.schedule.snr(one - 1) / self.schedule.snr(one)
        before = torch.where(before.isfinite(), before, snr * ratio)
        _, x_0_per_out = self.parameterization.coefficients(t)
        return self.weighting(snr, before).sqrt() * x_0_per_out.abs()


LOSSES: dict[str, Penalty] = {
    "mse": torch.square,
    "l1": torch.abs,
    "huber": huber,
}

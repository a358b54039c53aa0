"""The training loss."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from diffusion.process import likelihood
from diffusion.process.parameterization import Parameterization, split
from diffusion.process.schedule import Schedule, float64_device, times
from diffusion.process.variance import Learned
from diffusion.process.weighting import Weighting

Penalty = Callable[[Tensor], Tensor]
"""Elementwise penalty of the error, same shape."""


def huber(error: Tensor) -> Tensor:
    """e^2 up to |e| = 1 and 2 |e| - 1 beyond: twice Huber's loss, to match mse for small errors; Huber 1964."""
    return 2 * F.huber_loss(error, torch.zeros_like(error), reduction="none", delta=1.0)


@dataclass(frozen=True)
class Loss:
    """Mean `penalty` of the error of x_0_hat scaled by the square root of its weight; Ho et al. 2020, eq. 14.

    With the weighting `Simple` the scaled error equals the noise error. With a learned variance, the variational bound
    is added (Nichol & Dhariwal 2021, eq. 16): lambda T times its term at t in bits per dimension, an unbiased estimate
    of lambda times the sum over t if timesteps are uniform. The mean is detached, so the bound only trains the
    variance.
    """

    schedule: Schedule
    parameterization: Parameterization
    weighting: Weighting
    penalty: Penalty
    VLB_SHARE = 0.001
    """lambda of the hybrid loss."""

    def __call__(
        self, net: Callable[..., Tensor], x_0: Tensor, t: Tensor, eps: Tensor, y: Tensor | None = None
    ) -> Tensor:
        """Loss of each image, (B,), for `t` int64 (B,), noise `eps` (B, C, H, W) and classes `y` int64 (B,)."""
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
        """Factor by which the error of the network's output at `t` is scaled, float64 (B, 1, 1, 1)."""
        snr, previous_snr = self.schedule.snr(t), self.schedule.snr(t - 1)
        # The SNR at t = -1 is infinite. If so is the weight, extrapolate the SNR with the ratio SNR_0 / SNR_1.
        one = torch.ones_like(t)
        ratio = self.schedule.snr(one - 1) / self.schedule.snr(one)
        weight = self.weighting(snr, previous_snr)
        weight = torch.where(weight.isfinite(), weight, self.weighting(snr, snr * ratio))
        _, x_0_per_out = self.parameterization.coefficients(t)
        return weight.sqrt() * x_0_per_out.abs()


LOSSES: dict[str, Penalty] = {
    "mse": torch.square,
    "l1": torch.abs,
    "huber": huber,
}

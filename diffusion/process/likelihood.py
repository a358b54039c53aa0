"""The variational bound on the negative log-likelihood, in bits per dimension.

-log p(x_0) <= L_T + sum_{t=1}^{T-1} KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) - log p(x_0 | x_{t=0})

Ho et al. 2020, eq. 5, with timesteps counted from 0: their L_{t-1} is `term` at t >= 1, their L_0 is `term` at t = 0.
Images (B, C, H, W) are 8-bit images scaled to [-1, 1]. The distribution is one over the values that occur in the data:
if these are not all 256, as in images of few grey levels, the decoder's bins are wider, and the bound is comparable
with the likelihood of histograms.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion.process.denoiser import Denoiser
from diffusion.process.schedule import Schedule, double, like, times
from diffusion.process.variance import Variance

BITS = 1 / math.log(2)
"""Bits per nat."""


def normal_kl(mean_1: Tensor, variance_1: Tensor, mean_2: Tensor, variance_2: Tensor) -> Tensor:
    """Elementwise KL(N(mean_1, variance_1) || N(mean_2, variance_2)), in nats."""
    ratio = variance_1 / variance_2
    return 0.5 * (ratio - 1 - ratio.log() + (mean_1 - mean_2) ** 2 / variance_2)


def decoder_nll(x_0: Tensor, mean: Tensor, variance: Tensor, values: Tensor | None = None) -> Tensor:
    """Negative log of the probability that N(mean, variance) assigns to the bin of each value of x_0, in nats.

    The bins of the `values` (V,), which x_0 consists of, meet halfway between neighbours; the outer ones extend to
    infinity. By default, all 8-bit values; Ho et al. 2020, eq. 13.
    """
    scale = variance.rsqrt()
    if values is None:
        first, last = x_0 < -0.999, x_0 > 0.999
        low, high = x_0 - 1 / 255, x_0 + 1 / 255
    else:
        edges = torch.cat([values[:1], (values[1:] + values[:-1]) / 2, values[-1:]])
        bins = torch.bucketize(x_0.contiguous(), edges[1:-1])
        first, last = bins == 0, bins == len(values) - 1
        low, high = edges[bins], edges[bins + 1]
    below = torch.where(first, 0, torch.special.ndtr((low - mean) * scale))
    above = torch.where(last, 1, torch.special.ndtr((high - mean) * scale))
    return -(above - below).clamp(min=1e-12).log()


def prior(schedule: Schedule, x_0: Tensor) -> Tensor:
    """L_T = KL(q(x_T | x_0) || N(0, I)) of each image, in bits per dimension, (B,)."""
    alpha_bar = schedule(torch.tensor([schedule.num_timesteps - 1], device=x_0.device))
    zero, one = torch.zeros_like(x_0), torch.ones_like(x_0)
    return BITS * normal_kl(times(alpha_bar.sqrt(), x_0), times(1 - alpha_bar, one), zero, one).mean(dim=(1, 2, 3))


def term(
    schedule: Schedule,
    x_0: Tensor,
    x_t: Tensor,
    t: Tensor,
    x_0_hat: Tensor,
    variance: Tensor,
    values: Tensor | None = None,
) -> Tensor:
    """The bound's term at `t` (B,) for each image, in bits per dimension, (B,); L_0 where t = 0.

    x_0_hat: the model's estimate of the clean image; variance: of the model's step from t to t - 1; values (V,): see
    `decoder_nll`.
    """
    s = t - 1
    mean = schedule.posterior_mean(x_0_hat, x_t, t, s)
    true_mean = schedule.posterior_mean(x_0, x_t, t, s)
    # At t = 0 the posterior variance is zero; substitute any other value, since that divergence is discarded.
    true_variance = schedule.posterior_variance(t.clamp(min=1), s.clamp(min=0))
    true_variance, variance = like(true_variance, x_0), like(variance, x_0)
    divergence = normal_kl(true_mean, true_variance, mean, variance)
    last = (t == 0).view(-1, 1, 1, 1).to(x_0.device)
    return BITS * torch.where(last, decoder_nll(x_0, mean, variance, values), divergence).mean(dim=(1, 2, 3))


@dataclass(frozen=True)
class Bound:
    """The model's terms of the bound; the bound is `prior` plus their sum over all t, with one draw of x_t for each."""

    denoiser: Denoiser
    variance: Variance
    values: Tensor | None = None
    """See `decoder_nll`."""

    def term(self, x_0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """The term at `t` int64 (B,) with noise `eps` (B, C, H, W), in bits per dimension, float64 (B,)."""
        schedule = self.denoiser.schedule
        x_t = schedule.diffuse(x_0, t, eps)
        estimate = self.denoiser(x_t, t)
        variance = self.variance(t, t - 1, estimate.variance_fraction)
        return term(schedule, double(x_0), double(x_t), t, double(estimate.x_0_hat), variance, self.values)

"""Variance of the reverse step p(x_s | x_t), for any earlier s (s = t - 1 in the papers).

For `t`, `s` int64 (B,), -1 <= s < t, all return float64 (B, 1, 1, 1), or (B, C, H, W) if learned.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from diffusion.errors import UserError
from diffusion.process.schedule import Schedule, double


class Variance(Protocol):
    def __call__(self, t: Tensor, s: Tensor, fraction: Tensor | None) -> Tensor:
        """Variance of x_s given x_t; `fraction` (B, C, H, W) is the network's variance output, if it has one."""


@dataclass(frozen=True)
class FixedSmall:
    """The posterior variance, optimal if all data is one x_0; Ho et al. 2020, sec. 3.2.

    It is zero for the last step, to s = -1, where the bound's decoder term needs a positive variance: as in Ho's code,
    that step uses the variance of the step from t = 1 to t = 0.
    """

    schedule: Schedule

    def __call__(self, t: Tensor, s: Tensor, fraction: Tensor | None = None) -> Tensor:  # noqa: ARG002
        last = s < 0
        return self.schedule.posterior_variance(torch.where(last, 1, t), torch.where(last, 0, s))


@dataclass(frozen=True)
class FixedLarge:
    """beta_t, or 1 - alpha_bar_t / alpha_bar_s for longer steps; optimal for x_0 ~ N(0, I); Ho et al. 2020, sec. 3.2.

    The last step uses the variance of FixedSmall, as in Ho's code: no noise is added there, and the decoder term
    benefits from a small variance.
    """

    schedule: Schedule

    def __call__(self, t: Tensor, s: Tensor, fraction: Tensor | None = None) -> Tensor:  # noqa: ARG002
        large = 1 - self.schedule(t) / self.schedule(s)
        return torch.where((s < 0).view(-1, 1, 1, 1), FixedSmall(self.schedule)(t, s), large)


@dataclass(frozen=True)
class Learned:
    """exp(f log large + (1 - f) log small), f = (fraction + 1) / 2; Nichol & Dhariwal 2021, eq. 15.

    small is the posterior variance and large is 1 - alpha_bar_t / alpha_bar_s; the network output `fraction`, which is
    not bounded, interpolates between them on [-1, 1].
    """

    schedule: Schedule

    def __call__(self, t: Tensor, s: Tensor, fraction: Tensor | None) -> Tensor:
        assert fraction is not None, "the network has no variance output"
        small = FixedSmall(self.schedule)(t, s).log()
        large = (1 - self.schedule(t) / self.schedule(s)).log()
        f = (double(fraction) + 1) / 2
        return torch.exp(f * large + (1 - f) * small)


@dataclass(frozen=True)
class Analytic:
    """The optimal variance for the network's mean: posterior variance plus the network's uncertainty about x_0.

        sigma^2 = posterior variance + a^2 E |x_0 - x_0_hat|^2 / d

    where a is the posterior mean's coefficient of x_0. For a perfect network this is Analytic-DPM's variance (Bao et
    al. 2022a, theorem 1), with (1 - alpha_bar_t) Gamma_t = E |eps_hat|^2 / d = 1 - E |eps - eps_hat|^2 / d. It remains
    optimal for an imperfect network (Bao et al. 2022b, "Estimating the optimal covariance with imperfect mean"), for
    which Analytic-DPM's can fall below the posterior variance. Images lie in [-1, 1], so the error is at most 1.
    """

    schedule: Schedule
    x_0_mse: Tensor
    """E |x_0 - x_0_hat|^2 / d at each timestep, float64 (T,)."""

    def __call__(self, t: Tensor, s: Tensor, fraction: Tensor | None = None) -> Tensor:  # noqa: ARG002
        x_0_mse = self.x_0_mse.to(t.device)[t].view(-1, 1, 1, 1).clamp(max=1)
        of_x_0, _ = self.schedule.posterior_coefficients(t, s)
        variance = self.schedule.posterior_variance(t, s) + of_x_0**2 * x_0_mse
        # For the last step the posterior variance is zero, and with a perfect network so is the sum: the decoder term
        # needs a positive variance.
        minimum = FixedSmall(self.schedule)(t, s)
        return torch.where((s < 0).view(-1, 1, 1, 1), torch.maximum(variance, minimum), variance)


@dataclass(frozen=True)
class CappedLastNoise:
    """`variance`, capped for the step to t = 0 so that it adds at most one grey level of noise: E |sigma z| <= 2 / 255.

    After a long step to t = 0, the last step could not remove the noise; Bao et al. 2022a, appendix on clipping.
    """

    variance: Variance
    LARGEST = (2 / 255) ** 2 * math.pi / 2

    def __call__(self, t: Tensor, s: Tensor, fraction: Tensor | None) -> Tensor:
        found = self.variance(t, s, fraction)
        return torch.where((s == 0).view(-1, 1, 1, 1), found.clamp(max=self.LARGEST), found)


def _analytic(schedule: Schedule, x_0_mse: Tensor | None) -> Analytic:
    if x_0_mse is None:
        raise UserError(
            "sample.variance: analytic needs an estimate that this model does not have; use fixed-small or "
            "fixed-large, or train the model with this pipeline"
        )
    return Analytic(schedule, x_0_mse)


VARIANCES: dict[str, Callable[[Schedule, Tensor | None], Variance]] = {
    "fixed-small": lambda schedule, _: FixedSmall(schedule),
    "fixed-large": lambda schedule, _: FixedLarge(schedule),
    "learned": lambda schedule, _: Learned(schedule),
    "analytic": _analytic,
}
"""Variances by name; the Tensor (T,) is the model's estimate for the analytic one, if it has one."""

"""Variance of the reverse step p(x_s | x_t), for any earlier s (s = t - 1 in the papers).

All give float64 (B, 1, 1, 1), or with a learned fraction (B, C, H, W), for `t`, `s` int64 (B,), -1 <= s < t.
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
        """The variance of x_s given x_t; `fraction` is what the network says of it, (B, C, H, W), if it does."""


@dataclass(frozen=True)
class FixedSmall:
    """The posterior's, right for a single x_0; Ho et al. 2020, sec. 3.2.

    In the last step, to s = -1, that is zero, and the decoder of the bound could not be evaluated: as in Ho's code it
    is then the one of the step before, from t = 1 to t = 0.
    """

    schedule: Schedule

    def __call__(self, t: Tensor, s: Tensor, fraction: Tensor | None = None) -> Tensor:  # noqa: ARG002
        last = s < 0
        return self.schedule.posterior_variance(torch.where(last, 1, t), torch.where(last, 0, s))


@dataclass(frozen=True)
class FixedLarge:
    """beta_t, or 1 - alpha_bar_t / alpha_bar_s for longer steps: right for x_0 ~ N(0, I); Ho et al. 2020, sec. 3.2.

    In the last step, where no noise is added and the decoder wants little, it is that of FixedSmall, as in Ho's code.
    """

    schedule: Schedule

    def __call__(self, t: Tensor, s: Tensor, fraction: Tensor | None = None) -> Tensor:  # noqa: ARG002
        large = 1 - self.schedule(t) / self.schedule(s)
        return torch.where((s < 0).view(-1, 1, 1, 1), FixedSmall(self.schedule)(t, s), large)


@dataclass(frozen=True)
class Learned:
    """exp(f log large + (1 - f) log small), f = (fraction + 1) / 2; Nichol & Dhariwal 2021, eq. 15.

    The network's output `fraction` is free; from -1 to 1 it goes from the posterior's variance to 1 - alpha_bar_t /
    alpha_bar_s.
    """

    schedule: Schedule

    def __call__(self, t: Tensor, s: Tensor, fraction: Tensor | None) -> Tensor:
        assert fraction is not None, "the network was not made to learn the variance"
        small = FixedSmall(self.schedule)(t, s).log()
        large = (1 - self.schedule(t) / self.schedule(s)).log()
        f = (double(fraction) + 1) / 2
        return torch.exp(f * large + (1 - f) * small)


@dataclass(frozen=True)
class Analytic:
    """The best variance for the network's mean: the posterior's, and what the network does not know of x_0.

        sigma^2 = posterior variance + a^2 E |x_0 - x_0_hat|^2 / d

    with a the posterior mean's coefficient of x_0. For a perfect network it is that of Analytic-DPM (Bao et al. 2022a,
    theorem 1), where (1 - alpha_bar_t) Gamma_t = E |eps_hat|^2 / d = 1 - E |eps - eps_hat|^2 / d; for any other one it
    is still the best (Bao et al. 2022b, "Estimating the optimal covariance with imperfect mean"), where theirs can come
    out below the posterior's. Images lie in [-1, 1], so the error is at most 1.
    """

    schedule: Schedule
    x_0_mse: Tensor
    """E |x_0 - x_0_hat|^2 / d at each timestep, float64 (T,)."""

    def __call__(self, t: Tensor, s: Tensor, fraction: Tensor | None = None) -> Tensor:  # noqa: ARG002
        x_0_mse = self.x_0_mse.to(t.device)[t].view(-1, 1, 1, 1).clamp(max=1)
        of_x_0, _ = self.schedule.posterior_coefficients(t, s)
        variance = self.schedule.posterior_variance(t, s) + of_x_0**2 * x_0_mse
        # In the last step the posterior's is zero, and a perfect network's whole variance: the decoder needs some.
        least = FixedSmall(self.schedule)(t, s)
        return torch.where((s < 0).view(-1, 1, 1, 1), torch.maximum(variance, least), variance)


@dataclass(frozen=True)
class CappedLastNoise:
    """`variance` for sampling, but a step to t = 0 adds a grey level of noise at most: E |sigma z| <= 2 / 255.

    The last step could not take away again what a long step before it adds; Bao et al. 2022a, appendix on clipping.
    """

    variance: Variance
    LARGEST = (2 / 255) ** 2 * math.pi / 2

    def __call__(self, t: Tensor, s: Tensor, fraction: Tensor | None) -> Tensor:
        found = self.variance(t, s, fraction)
        return torch.where((s == 0).view(-1, 1, 1, 1), found.clamp(max=self.LARGEST), found)


def _analytic(schedule: Schedule, x_0_mse: Tensor | None) -> Analytic:
    if x_0_mse is None:
        raise UserError("sample.variance: the model holds no estimate for analytic; choose another, or train it here")
    return Analytic(schedule, x_0_mse)


VARIANCES: dict[str, Callable[[Schedule, Tensor | None], Variance]] = {
    "fixed-small": lambda schedule, _: FixedSmall(schedule),
    "fixed-large": lambda schedule, _: FixedLarge(schedule),
    "learned": lambda schedule, _: Learned(schedule),
    "analytic": _analytic,
}
"""Variances by name; the Tensor (T,) is what a model has for the analytic one, if it does."""

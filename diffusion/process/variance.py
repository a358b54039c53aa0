"""Variance of the reverse step p(x_s | x_t), for any earlier s (s = t - 1 in the papers).

All give float64 (B, 1, 1, 1), or with a learned fraction (B, C, H, W), for `t`, `s` int64 (B,), -1 <= s < t.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from diffusion.process.schedule import Schedule


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
        f = (fraction.double() + 1) / 2
        return torch.exp(f * large + (1 - f) * small)


@dataclass(frozen=True)
class Analytic:
    """The best variance for the network's mean: the posterior's and what is not known of x_0; Bao et al. 2022, th. 1.

        sigma^2 = posterior variance + a^2 Var(x_0 | x_t),   Var(x_0 | x_t) = (1 - alpha_bar_t) / alpha_bar_t (1 - G_t)

    with a the posterior mean's coefficient of x_0 and G_t = E |eps_hat(x_t, t)|^2 / d, (T,): (1 - alpha_bar_t) Gamma_t
    in the paper's terms. Var(x_0 | x_t) is at most 1, since images lie in [-1, 1] (their theorem 2).
    """

    schedule: Schedule
    eps_hat_square: Tensor
    """G_t, float64 (T,)."""

    def __call__(self, t: Tensor, s: Tensor, fraction: Tensor | None = None) -> Tensor:  # noqa: ARG002
        alpha_bar = self.schedule(t)
        unknown = 1 - self.eps_hat_square.to(t.device)[t].view(-1, 1, 1, 1).clamp(max=1)
        of_x_0, _ = self.schedule.posterior_coefficients(t, s)
        x_0_variance = torch.where(alpha_bar > 0, (1 - alpha_bar) / alpha_bar * unknown, 1).clamp(max=1)
        # In the last step the posterior's is zero, and a perfect network's whole variance: the decoder needs some.
        least = FixedSmall(self.schedule)(t, s)
        variance = self.schedule.posterior_variance(t, s) + of_x_0**2 * x_0_variance
        return torch.where((s < 0).view(-1, 1, 1, 1), torch.maximum(variance, least), variance)

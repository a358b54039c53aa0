"""Prediction targets, and their conversion to x_0, eps and the reverse mean."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion.process.schedule import Schedule, times


@dataclass(frozen=True)
class Parameterization(ABC):
    """Defined by x_0 = a x_t + b out, where a and b depend only on t.

    The rest follows from x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps. Images are (B, C, H, W), `t` is int64
    (B,), and coefficients are float64 (B, 1, 1, 1).
    """

    schedule: Schedule

    @abstractmethod
    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """a and b of x_0 = a x_t + b out."""

    def target(self, x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """The regression target of the network: (x_0 - a x_t) / b."""
        alpha_bar = self.schedule(t)
        a, b = self.coefficients(t)
        of_x_0, of_eps = (1 - a * alpha_bar.sqrt()) / b, -a * (1 - alpha_bar).sqrt() / b
        return times(of_x_0, x_0) + times(of_eps, eps)

    def to_x_0(self, out: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Convert the network's output to the estimated clean image."""
        a, b = self.coefficients(t)
        return times(a, x_t) + times(b, out)

    def to_eps(self, out: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Convert the network's output to the noise, (x_t - sqrt(alpha_bar_t) x_0) / sqrt(1 - alpha_bar_t)."""
        alpha_bar = self.schedule(t)
        a, b = self.coefficients(t)
        root, scale = alpha_bar.sqrt(), (1 - alpha_bar).rsqrt()
        return times((1 - root * a) * scale, x_t) - times(root * b * scale, out)

    def to_mu(self, out: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Convert the network's output to the mean of the reverse step to t - 1; Ho et al. 2020, eq. 7 and 11."""
        return self.schedule.posterior_mean(self.to_x_0(out, x_t, t), x_t, t, t - 1)


class Eps(Parameterization):
    """The network predicts the noise; Ho et al. 2020, eq. 14. Undefined where alpha_bar = 0."""

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha_bar = self.schedule(t)
        return alpha_bar.rsqrt(), -(1 / alpha_bar - 1).sqrt()

    def target(self, x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:  # noqa: ARG002
        return eps

    def to_eps(self, out: Tensor, x_t: Tensor, t: Tensor) -> Tensor:  # noqa: ARG002
        return out


class X0(Parameterization):
    """The network predicts the clean image; Ho et al. 2020, section 3.2."""

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        one = torch.ones_like(self.schedule(t))
        return torch.zeros_like(one), one


class V(Parameterization):
    """The network predicts v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x_0; Salimans & Ho 2022, appendix D."""

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha_bar = self.schedule(t)
        return alpha_bar.sqrt(), -(1 - alpha_bar).sqrt()


class Mu(Parameterization):
    """The network predicts the posterior mean, posterior_mean(x_0, x_t); Ho et al. 2020, eq. 8.

    This original choice "works well only when trained on the true variational bound" (section 4.2), the weighting vlb:
    the mean is close to x_t, so that the information about x_0 is a small difference, amplified by 1 / a. For study.
    """

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        of_x_0, of_x_t = self.schedule.posterior_coefficients(t, t - 1)
        return -of_x_t / of_x_0, 1 / of_x_0


def split(out: Tensor, channels: int) -> tuple[Tensor, Tensor | None]:
    """Split a network's raw output into the prediction (B, C, H, W) and the variance fraction, if there is one."""
    return out[:, :channels], out[:, channels:] if out.shape[1] > channels else None


PARAMETERIZATIONS: dict[str, Callable[[Schedule], Parameterization]] = {
    "eps": Eps,
    "x_0": X0,
    "v": V,
    "mu": Mu,
}

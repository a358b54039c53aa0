"""What the network predicts, and how x_0 and eps follow from it."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from diffusion.process.schedule import Schedule


class Parameterization(Protocol):
    """All tensors are (B, C, H, W), `t` is int64 (B,)."""

    def target(self, x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """What the network's output should be."""

    def to_x_0(self, out: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The estimated clean image, from the network's output."""

    def to_eps(self, out: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The estimated noise, from the network's output."""


@dataclass(frozen=True)
class Eps:
    """The network predicts the noise; Ho et al. 2020, eq. 14."""

    schedule: Schedule

    def target(self, x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:  # noqa: ARG002
        return eps

    def to_x_0(self, out: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """x_0 = (x_t - sqrt(1 - alpha_bar_t) eps) / sqrt(alpha_bar_t); eq. 4 solved for x_0."""
        alpha_bar = self.schedule(t)
        noise_to_signal = (1 / alpha_bar - 1).sqrt()
        return alpha_bar.rsqrt().to(out.dtype) * x_t - noise_to_signal.to(out.dtype) * out

    def to_eps(self, out: Tensor, x_t: Tensor, t: Tensor) -> Tensor:  # noqa: ARG002
        return out

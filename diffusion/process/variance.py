"""Variance of the reverse step p(x_s | x_t), for any earlier s (s = t - 1 in the papers)."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from diffusion.process.schedule import Schedule


class Variance(Protocol):
    def __call__(self, t: Tensor, s: Tensor) -> Tensor:
        """The variance of x_s given x_t, float64 (B, 1, 1, 1); `t`, `s` int64 (B,), -1 <= s < t."""


@dataclass(frozen=True)
class FixedLarge:
    """beta_t, or 1 - alpha_bar_t / alpha_bar_s for longer steps: right for x_0 ~ N(0, I); Ho et al. 2020, sec. 3.2."""

    schedule: Schedule

    def __call__(self, t: Tensor, s: Tensor) -> Tensor:
        return 1 - self.schedule(t) / self.schedule(s)


@dataclass(frozen=True)
class FixedSmall:
    """The posterior's: (1 - alpha_bar_s) / (1 - alpha_bar_t) beta_t: right for a single x_0; Ho et al. 2020, eq. 7."""

    schedule: Schedule

    def __call__(self, t: Tensor, s: Tensor) -> Tensor:
        alpha_bar_t, alpha_bar_s = self.schedule(t), self.schedule(s)
        return (1 - alpha_bar_s) / (1 - alpha_bar_t) * (1 - alpha_bar_t / alpha_bar_s)

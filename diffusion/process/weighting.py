"""Loss weights as functions of the signal-to-noise ratio, defined for the squared error of x_0_hat.

A weighting thus means the same loss for any parameterization: Loss converts the output's error to that of x_0_hat.
The squared error of eps_hat is SNR times that of x_0_hat, the squared error of v_hat (1 + SNR) times.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol

from pydantic import Field
from torch import Tensor

from diffusion.sections import Choice


class Weighting(Protocol):
    def __call__(self, snr: Tensor, snr_before: Tensor) -> Tensor:
        """Weight at `snr` = alpha_bar_t / (1 - alpha_bar_t), same shape; `snr_before`: at t - 1, infinite at t = 0."""


class Simple:
    """SNR, which weights the noise error by 1 at every timestep; L_simple of Ho et al. 2020, eq. 14."""

    def __call__(self, snr: Tensor, snr_before: Tensor) -> Tensor:  # noqa: ARG002
        return snr


class Vlb:
    """(SNR_{t-1} - SNR_t) / 2: L_{t-1} of the variational bound, in nats; Kingma et al. 2021, eq. 13.

    With the posterior variance it weights the noise error by beta_t^2 / (2 sigma_t^2 alpha_t (1 - alpha_bar_t)); Ho et
    al. 2020, eq. 12. At t = 0, where the bound has the decoder term instead, Loss extrapolates SNR_{-1} from the ratio
    at t = 1.
    """

    def __call__(self, snr: Tensor, snr_before: Tensor) -> Tensor:
        return (snr_before - snr) / 2


class VlbLarge:
    """`Vlb` with the variance sigma_t^2 = beta_t; Ho et al. 2020, eq. 12 and section 3.2.

    That of `Vlb` times the ratio of the variances, (1 - alpha_bar_{t-1}) / (1 - alpha_bar_t), which is near 1 except at
    the first timesteps.
    """

    def __call__(self, snr: Tensor, snr_before: Tensor) -> Tensor:
        return (1 - snr / snr_before) / (1 + 1 / snr_before) * (1 + snr) / 2


class PosteriorMean:
    """(1 - SNR_t / SNR_{t-1})^2 / (1 + 1 / SNR_{t-1}), which weights the error of the posterior mean by 1.

    The square of the posterior mean's coefficient of x_0; Ho et al. 2020, eq. 7, and table 2 with mu.
    """

    def __call__(self, snr: Tensor, snr_before: Tensor) -> Tensor:
        return (1 - snr / snr_before) ** 2 / (1 + 1 / snr_before)


class SnrPlusOne:
    """SNR + 1, which weights the v error by 1; Salimans & Ho 2022, section 4."""

    def __call__(self, snr: Tensor, snr_before: Tensor) -> Tensor:  # noqa: ARG002
        return snr + 1


class TruncatedSnr:
    """max(SNR, 1); Salimans & Ho 2022, eq. 10."""

    def __call__(self, snr: Tensor, snr_before: Tensor) -> Tensor:  # noqa: ARG002
        return snr.clamp(min=1)


@dataclass(frozen=True)
class MinSnr:
    """min(SNR, gamma); Hang et al. 2023, section 3.4."""

    gamma: float

    def __call__(self, snr: Tensor, snr_before: Tensor) -> Tensor:  # noqa: ARG002
        return snr.clamp(max=self.gamma)


class P2:
    """SNR / (k + SNR)^gamma with k = gamma = 1: 1 / (1 + SNR) for the noise error; Choi et al. 2022, eq. 8."""

    def __call__(self, snr: Tensor, snr_before: Tensor) -> Tensor:  # noqa: ARG002
        return snr / (1 + snr)


class MinSnrOptions(Choice):
    """Min-SNR weighting, min(SNR, gamma) (Hang et al. 2023)."""

    kind: Literal["min-snr"] = "min-snr"
    """Name of the weighting."""
    gamma: Annotated[float, Field(gt=0)] = 5.0
    """Upper limit of the weight on the error of x_0; 5 in the paper."""


WEIGHTINGS: dict[str, Callable[[Any], Weighting]] = {
    "simple": lambda _: Simple(),
    "vlb": lambda _: Vlb(),
    "vlb-large": lambda _: VlbLarge(),
    "posterior-mean": lambda _: PosteriorMean(),
    "snr-plus-one": lambda _: SnrPlusOne(),
    "truncated-snr": lambda _: TruncatedSnr(),
    "min-snr": lambda options: MinSnr(options.gamma),
    "p2": lambda _: P2(),
}
"""Constructors by name; each takes the weighting's options."""
WEIGHTING_OPTIONS: dict[str, type[Choice]] = {
    "min-snr": MinSnrOptions,
}

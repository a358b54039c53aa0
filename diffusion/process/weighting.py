"""Loss weights by signal-to-noise ratio, each as the weight of the squared error of x_0_hat.

So a weighting is the same loss whatever the network predicts: Loss takes the error of its output to that of x_0_hat.
In terms of the noise the squared error is SNR times as large, in terms of v (1 + SNR) times.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Protocol

from pydantic import Field
from torch import Tensor

from diffusion.sections import Choice


class Weighting(Protocol):
    def __call__(self, snr: Tensor, snr_before: Tensor) -> Tensor:
        """Weight at `snr` = alpha_bar_t / (1 - alpha_bar_t), same shape; `snr_before` is the one at t - 1."""


class Simple:
    """SNR: 1 for the error of the noise at every timestep; L_simple of Ho et al. 2020, eq. 14."""

    def __call__(self, snr: Tensor, snr_before: Tensor) -> Tensor:  # noqa: ARG002
        return snr


class Vlb:
    """(SNR_{t-1} - SNR_t) / 2: L_{t-1} of the variational bound, in nats; Kingma et al. 2021, eq. 13.

    With the posterior's variance it is beta_t^2 / (2 sigma_t^2 alpha_t (1 - alpha_bar_t)) for the noise: Ho et al.
    2020, eq. 12. At t = 0, where the bound has the decoder instead, Loss takes SNR_{-1} from the ratio at t = 1.
    """

    def __call__(self, snr: Tensor, snr_before: Tensor) -> Tensor:
        return (snr_before - snr) / 2


class SnrPlusOne:
    """SNR + 1: 1 for the error of v; Salimans & Ho 2022, section 4."""

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
    """SNR / (k + SNR)^gamma, with k = gamma = 1: 1 / (1 + SNR) for the noise; Choi et al. 2022, eq. 8."""

    def __call__(self, snr: Tensor, snr_before: Tensor) -> Tensor:  # noqa: ARG002
        return snr / (1 + snr)


class MinSnrOptions(Choice):
    """The weighting min-snr."""

    kind: Literal["min-snr"] = "min-snr"
    """The kind of weighting."""
    gamma: Annotated[float, Field(gt=0)] = 5.0
    """Its gamma; 5 in the paper."""


WEIGHTINGS: dict[str, Callable[[Any], Weighting]] = {
    "simple": lambda _: Simple(),
    "vlb": lambda _: Vlb(),
    "snr-plus-one": lambda _: SnrPlusOne(),
    "truncated-snr": lambda _: TruncatedSnr(),
    "min-snr": lambda options: MinSnr(options.gamma),
    "p2": lambda _: P2(),
}
"""Weightings by name, given the options of their kind."""
WEIGHTING_OPTIONS: dict[str, type[Choice]] = {
    "min-snr": MinSnrOptions,
}

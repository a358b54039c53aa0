"""Noise schedules: how much of the image is left at each timestep.

q(x_t | x_0) = N(sqrt(alpha_bar_t) x_0, (1 - alpha_bar_t) I)        Ho et al. 2020 (DDPM), eq. 4
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor


def has_float64(device: torch.device) -> bool:
    """Whether tensors on `device` can be in float64; MPS and some XPUs lack it."""
    if device.type == "xpu":
        return bool(torch.xpu.get_device_properties(device).has_fp64)
    return device.type != "mps"


def float64_device(device: torch.device) -> torch.device:
    """Where coefficients for tensors on `device` are computed: there, or on the CPU if it has no float64."""
    return device if has_float64(device) else torch.device("cpu")


def double(x: Tensor) -> Tensor:
    """x in float64, on its `float64_device`."""
    return x.to(float64_device(x.device)).double()


def like(coefficient: Tensor, x: Tensor) -> Tensor:
    """A float64 coefficient in the precision of x, on its device."""
    return coefficient.to(x.dtype).to(x.device)


def times(coefficient: Tensor, x: Tensor) -> Tensor:
    """A float64 coefficient times x, in the precision of x: products with coefficients are cast here."""
    return like(coefficient, x) * x


class Schedule:
    """The forward process, from its beta_t = 1 - alpha_t: all coefficients float64, (T,), indexed by t from 0.

    Called with timesteps, it gives alpha_bar there; t = -1 is the clean image, alpha_bar = 1. All that its methods give
    for `t` (and an earlier `s`, -1 <= s < t), int64 (B,), is float64 (B, 1, 1, 1), to be combined, and cast by `times`.
    Timesteps are on the `float64_device` of the images.
    """

    def __init__(self, beta: Tensor) -> None:
        self.beta = beta.double()
        self.alpha = 1 - self.beta
        self.alpha_bar = torch.cumprod(self.alpha, dim=0)
        self._table = torch.cat([self.alpha_bar, torch.ones(1, dtype=torch.float64)])  # index -1 is the clean image

    @property
    def num_timesteps(self) -> int:
        return len(self.beta)

    def __call__(self, t: Tensor) -> Tensor:
        """alpha_bar at `t`."""
        if self._table.device != t.device:
            self._table = self._table.to(t.device)
        return self._table[t].view(-1, 1, 1, 1)

    def snr(self, t: Tensor) -> Tensor:
        """The signal-to-noise ratio alpha_bar / (1 - alpha_bar): infinite at t = -1."""
        alpha_bar = self(t)
        return alpha_bar / (1 - alpha_bar)

    def diffuse(self, x_0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps, (B, C, H, W); Ho et al. 2020, eq. 4."""
        alpha_bar = self(t)
        return times(alpha_bar.sqrt(), x_0) + times((1 - alpha_bar).sqrt(), eps)

    def posterior_coefficients(self, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """a and b of the mean a x_0 + b x_t of q(x_s | x_t, x_0); Ho et al. 2020, eq. 7, here for any s < t.

        With alpha = alpha_bar_t / alpha_bar_s (alpha_t where s = t - 1),

            a = sqrt(alpha_bar_s) (1 - alpha) / (1 - alpha_bar_t)
            b = sqrt(alpha) (1 - alpha_bar_s) / (1 - alpha_bar_t).

        Some texts print alpha where eq. 7 has alpha_bar, in a or in the denominators: that is another, wrong mean.
        """
        alpha_bar_t, alpha_bar_s = self(t), self(s)
        alpha = alpha_bar_t / alpha_bar_s
        of_x_0 = alpha_bar_s.sqrt() * (1 - alpha) / (1 - alpha_bar_t)
        of_x_t = alpha.sqrt() * (1 - alpha_bar_s) / (1 - alpha_bar_t)
        return of_x_0, of_x_t

    def posterior_mean(self, x_0: Tensor, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """The mean of q(x_s | x_t, x_0), (B, C, H, W)."""
        of_x_0, of_x_t = self.posterior_coefficients(t, s)
        return times(of_x_0, x_0) + times(of_x_t, x_t)

    def posterior_variance(self, t: Tensor, s: Tensor) -> Tensor:
        """The variance of q(x_s | x_t, x_0): (1 - alpha_bar_s) / (1 - alpha_bar_t) beta_t; Ho et al. 2020, eq. 7."""
        alpha_bar_t, alpha_bar_s = self(t), self(s)
        return (1 - alpha_bar_s) / (1 - alpha_bar_t) * (1 - alpha_bar_t / alpha_bar_s)


def linear(num_timesteps: int) -> Tensor:
    """beta from 1e-4 to 0.02, float64 (T,); Ho et al. 2020, section 4.

    For other T than the paper's 1000 beta is scaled by 1000 / T, so that the last alpha_bar stays about the same.
    """
    scale = 1000 / num_timesteps
    return torch.linspace(1e-4 * scale, 0.02 * scale, num_timesteps, dtype=torch.float64)


def scaled_linear(num_timesteps: int) -> Tensor:
    """sqrt(beta) evenly from sqrt(0.00085) to sqrt(0.012), float64 (T,); Rombach et al. 2022 (Stable Diffusion).

    Scaled by 1000 / T as `linear` is. Of the image's variance 0.5 % is left at the last timestep, unless the schedule
    is rescaled by `zero_terminal`.
    """
    scale = 1000 / num_timesteps
    return torch.linspace(math.sqrt(0.00085), math.sqrt(0.012), num_timesteps, dtype=torch.float64) ** 2 * scale


def cosine(num_timesteps: int) -> Tensor:
    """beta for alpha_bar = f(t) / f(0), f(t) = cos^2((t/T + s) / (1 + s) pi/2), float64 (T,).

    Nichol & Dhariwal 2021 (Improved DDPM), eq. 17, with their s = 0.008 and beta clipped at 0.999.
    """
    s = 0.008
    time = torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps
    return _beta_of(torch.cos((time + s) / (1 + s) * math.pi / 2) ** 2)


def sigmoid(num_timesteps: int) -> Tensor:
    """beta for alpha_bar = (f(t) - f(T)) / (f(0) - f(T)), f(t) = sigmoid(3 - 6 t/T), float64 (T,).

    Chen 2023, "On the importance of noise scheduling for diffusion models", algorithm 1, with start = -3, end = 3 and
    temperature 1; beta is clipped at 0.999 as for `cosine`.
    """
    time = torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps
    f = torch.sigmoid(3 - 6 * time)
    return _beta_of(f - f[-1])


def _beta_of(f: Tensor) -> Tensor:
    """beta, (T,), of an alpha_bar proportional to `f`, (T + 1,), which begins with the clean image."""
    return (1 - f[1:] / f[:-1]).clamp(max=0.999)


def zero_terminal(beta: Tensor) -> Tensor:
    """`beta`, (T,), changed so that nothing of the image is left at the last timestep; Lin et al. 2024, algorithm 1.

    sqrt(alpha_bar) is shifted to end at zero and scaled to begin where it did; the last beta becomes 1.
    """
    root = torch.cumprod(1 - beta, dim=0).sqrt()
    alpha_bar = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    return 1 - alpha_bar / torch.cat([torch.ones_like(alpha_bar[:1]), alpha_bar[:-1]])


SCHEDULES: dict[str, Callable[[int], Tensor]] = {
    "linear": linear,
    "scaled-linear": scaled_linear,
    "cosine": cosine,
    "sigmoid": sigmoid,
}
"""beta, float64 (T,), by name."""

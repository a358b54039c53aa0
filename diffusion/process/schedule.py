"""Noise schedules: the signal and noise levels at each timestep.

q(x_t | x_0) = N(sqrt(alpha_bar_t) x_0, (1 - alpha_bar_t) I)        Ho et al. 2020 (DDPM), eq. 4
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor


def has_float64(device: torch.device) -> bool:
    """Whether `device` supports float64; MPS and some XPUs do not."""
    if device.type == "xpu":
        return bool(torch.xpu.get_device_properties(device).has_fp64)
    return device.type != "mps"


def float64_device(device: torch.device) -> torch.device:
    """The device on which to compute coefficients for tensors on `device`: the CPU if `device` lacks float64."""
    return device if has_float64(device) else torch.device("cpu")


def double(x: Tensor) -> Tensor:
    """Convert x to float64, on its `float64_device`."""
    return x.to(float64_device(x.device)).double()


def like(coefficient: Tensor, x: Tensor) -> Tensor:
    """Cast a float64 coefficient to the dtype and device of x."""
    return coefficient.to(x.dtype).to(x.device)


def times(coefficient: Tensor, x: Tensor) -> Tensor:
    """Multiply x by a float64 coefficient, in the dtype of x. The only place where coefficients are cast."""
    return like(coefficient, x) * x


class Schedule:
    """The forward process, defined by beta_t = 1 - alpha_t; coefficients are float64 (T,), indexed by t from 0.

    Calling it with timesteps returns alpha_bar there; t = -1 is the clean image, alpha_bar = 1. Methods take `t` (and
    an earlier `s`, -1 <= s < t), int64 (B,), and return float64 (B, 1, 1, 1), which `times` casts. Timesteps must be on
    the `float64_device` of the images.
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
        """The signal-to-noise ratio alpha_bar / (1 - alpha_bar); infinite at t = -1."""
        alpha_bar = self(t)
        return alpha_bar / (1 - alpha_bar)

    def angle(self, t: Tensor) -> Tensor:
        """The angle phi for which x_t = cos(phi) x_0 + sin(phi) eps, from 0 (the image) to pi / 2 (noise).

        Salimans & Ho 2022, appendix D.
        """
        alpha_bar = self(t)
        return torch.atan2((1 - alpha_bar).sqrt(), alpha_bar.sqrt())

    def at_angle(self, angle: Tensor) -> Tensor:
        """The last timestep whose `angle` is at most `angle` float64 (B,), int64 (B,); -1 if there is none."""
        every = torch.arange(self.num_timesteps, device=angle.device)
        return torch.searchsorted(self.angle(every).flatten(), angle, right=True) - 1

    def diffuse(self, x_0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps, (B, C, H, W); Ho et al. 2020, eq. 4."""
        alpha_bar = self(t)
        return times(alpha_bar.sqrt(), x_0) + times((1 - alpha_bar).sqrt(), eps)

    def posterior_coefficients(self, t: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """a and b of the mean a x_0 + b x_t of q(x_s | x_t, x_0); Ho et al. 2020, eq. 7, generalized to any s < t.

        With alpha = alpha_bar_t / alpha_bar_s (alpha_t where s = t - 1),

            a = sqrt(alpha_bar_s) (1 - alpha) / (1 - alpha_bar_t)
            b = sqrt(alpha) (1 - alpha_bar_s) / (1 - alpha_bar_t).

        Some texts print alpha in place of eq. 7's alpha_bar, in a or in the denominators; that mean is wrong.
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

    For T other than the paper's 1000, beta is scaled by 1000 / T, which keeps the last alpha_bar about the same.
    """
    scale = 1000 / num_timesteps
    return torch.linspace(1e-4 * scale, 0.02 * scale, num_timesteps, dtype=torch.float64)


def scaled_linear(num_timesteps: int) -> Tensor:
    """sqrt(beta) evenly from sqrt(0.00085) to sqrt(0.012), float64 (T,); Rombach et al. 2022 (Stable Diffusion).

    Scaled by 1000 / T as in `linear`. The last timestep retains 0.5 % of the image's variance, unless the schedule is
    rescaled by `zero_terminal`.
    """
    scale = 1000 / num_timesteps
    return torch.linspace(math.sqrt(0.00085), math.sqrt(0.012), num_timesteps, dtype=torch.float64) ** 2 * scale


def cosine(num_timesteps: int) -> Tensor:
    """beta for alpha_bar = f(t) / f(0), f(t) = cos^2((t/T + s) / (1 + s) pi/2), float64 (T,).

    Nichol & Dhariwal 2021 (Improved DDPM), eq. 17, with s = 0.008 and beta clipped at 0.999 as in the paper.
    """
    s = 0.008
    time = torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps
    return _beta_of(torch.cos((time + s) / (1 + s) * math.pi / 2) ** 2)


def sigmoid(num_timesteps: int) -> Tensor:
    """beta for alpha_bar = (f(t) - f(T)) / (f(0) - f(T)), f(t) = sigmoid(3 - 6 t/T), float64 (T,).

    Chen 2023, "On the importance of noise scheduling for diffusion models", algorithm 1, with start = -3, end = 3 and
    temperature 1; beta is clipped at 0.999 as in `cosine`.
    """
    time = torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps
    f = torch.sigmoid(3 - 6 * time)
    return _beta_of(f - f[-1])


def _beta_of(f: Tensor) -> Tensor:
    """beta (T,) for alpha_bar proportional to `f` (T + 1,), whose first value is that of the clean image."""
    return (1 - f[1:] / f[:-1]).clamp(max=0.999)


def zero_terminal(beta: Tensor) -> Tensor:
    """Rescale `beta` (T,) to zero terminal SNR; Lin et al. 2024, algorithm 1.

    sqrt(alpha_bar) is shifted to end at zero and scaled to keep its first value; the last beta becomes 1.
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
"""Functions from T to beta, float64 (T,), by name."""

"""Noise schedules: how much of the image is left at each timestep.

q(x_t | x_0) = N(sqrt(alpha_bar_t) x_0, (1 - alpha_bar_t) I)        Ho et al. 2020 (DDPM), eq. 4
"""

import math

import torch
from torch import Tensor


class Schedule:
    """The forward process, from its beta_t = 1 - alpha_t: all coefficients float64, (T,), indexed by t from 0.

    Called with timesteps, it gives alpha_bar there; t = -1 is the clean image, alpha_bar = 1.
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
        """alpha_bar at `t`, int64 (B,) with -1 <= t < T: float64 (B, 1, 1, 1), to be combined and only then cast."""
        if self._table.device != t.device:
            self._table = self._table.to(t.device)
        return self._table[t].view(-1, 1, 1, 1)

    def diffuse(self, x_0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps, (B, C, H, W); Ho et al. 2020, eq. 4."""
        alpha_bar = self(t)
        return alpha_bar.sqrt().to(x_0.dtype) * x_0 + (1 - alpha_bar).sqrt().to(x_0.dtype) * eps


def linear(num_timesteps: int) -> Tensor:
    """beta from 1e-4 to 0.02, float64 (T,); Ho et al. 2020, section 4.

    For other T than the paper's 1000 beta is scaled by 1000 / T, so that the last alpha_bar stays about the same.
    """
    scale = 1000 / num_timesteps
    return torch.linspace(1e-4 * scale, 0.02 * scale, num_timesteps, dtype=torch.float64)


def cosine(num_timesteps: int) -> Tensor:
    """beta for alpha_bar = f(t) / f(0), f(t) = cos^2((t/T + s) / (1 + s) pi/2), float64 (T,).

    Nichol & Dhariwal 2021 (Improved DDPM), eq. 17, with their s = 0.008 and beta clipped at 0.999.
    """
    s = 0.008
    time = torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps
    f = torch.cos((time + s) / (1 + s) * math.pi / 2) ** 2
    return (1 - f[1:] / f[:-1]).clamp(max=0.999)

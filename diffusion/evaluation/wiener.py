"""The linear Wiener denoiser, the optimal linear noise prediction from x_t, as a baseline.

For x_0 with mean mu and covariance Sigma, the linear least-squares estimate of the noise is

    eps_hat = sqrt(1 - alpha_bar_t) (alpha_bar_t Sigma + (1 - alpha_bar_t) I)^-1 (x_t - sqrt(alpha_bar_t) mu)

(Wiener 1949; Kay 1993, "Estimation Theory", eq. 12.20). For Gaussian data it is optimal among all estimates.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from diffusion.pairs.pairs import Pairs
from diffusion.pairs.pixels import to_x_0

Array = NDArray[np.float64]
MAX_FULL_COVARIANCE = 4096
"""Maximum number of values per image for a full covariance matrix; the eigendecomposition has cubic cost."""


@dataclass(frozen=True)
class Wiener:
    """A fitted denoiser; `forward` transforms images to coordinates in which their covariance is diagonal."""

    mean: Array  # (C, H, W)
    spectrum: Array  # variance of each coordinate
    forward: Callable[[Array], NDArray[np.inexact]]
    inverse: Callable[[NDArray[np.inexact]], Array]

    def __call__(self, x_t: NDArray[np.float32], alpha_bar: Array) -> Array:
        """Compute eps_hat, (B, C, H, W); `alpha_bar` is (B, 1, 1, 1)."""
        z = self.forward(x_t - np.sqrt(alpha_bar) * self.mean)
        signal = alpha_bar.reshape(-1, *[1] * self.spectrum.ndim)
        return self.inverse(np.sqrt(1 - signal) / (signal * self.spectrum + 1 - signal) * z)


def fit(pairs: Pairs) -> Wiener:
    """Fit to the images of a split, with memory independent of their number.

    Images with more than MAX_FULL_COVARIANCE values are treated as stationary, so that their covariance is diagonal in
    the Fourier basis.
    """
    fit_one = _fit_covariance if np.prod(pairs.shape) <= MAX_FULL_COVARIANCE else _fit_stationary
    return fit_one(pairs)


def _images(pairs: Pairs, block: int) -> Array:
    return to_x_0(pairs.x_0(block), np.float64)


def _mean(pairs: Pairs) -> Array:
    total = np.zeros(pairs.shape)
    for block in range(pairs.blocks):
        total += _images(pairs, block).sum(axis=0)
    return total / pairs.images


def _fit_covariance(pairs: Pairs) -> Wiener:
    mean, size = _mean(pairs), int(np.prod(pairs.shape))
    covariance = np.zeros((size, size))
    for block in range(pairs.blocks):
        centred = (_images(pairs, block) - mean).reshape(-1, size)
        covariance += centred.T @ centred
    variances, vectors = np.linalg.eigh(covariance / pairs.images)
    return Wiener(
        mean,
        np.maximum(variances, 0),  # rounding can make zeros negative
        forward=lambda x: x.reshape(len(x), size) @ vectors,
        inverse=lambda z: (z @ vectors.T).real.reshape(len(z), *pairs.shape),
    )


def _fit_stationary(pairs: Pairs) -> Wiener:
    mean, power = _mean(pairs), np.zeros(pairs.shape)
    for block in range(pairs.blocks):
        power += (np.abs(np.fft.fft2(_images(pairs, block) - mean, norm="ortho")) ** 2).sum(axis=0)
    return Wiener(
        mean,
        power / pairs.images,
        forward=lambda x: np.fft.fft2(x, norm="ortho"),
        inverse=lambda z: np.fft.ifft2(z, norm="ortho").real,
    )

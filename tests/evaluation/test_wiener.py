"""The Wiener baseline on data whose optimal linear denoiser is known."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from diffusion.evaluation import wiener


class GaussianPairs:
    """Replaces a split of pairs: 8-bit images, normal with standard deviation 20 around 100."""

    shape = (1, 4, 4)
    blocks, images = 200, 200 * 64

    def x_0(self, block: int) -> NDArray[np.uint8]:
        values = np.random.default_rng(block).normal(100, 20, (64, *self.shape))
        return np.clip(np.rint(values), 0, 255).astype(np.uint8)


class CorrelatedPairs(GaussianPairs):
    """Normal with a covariance that is neither a multiple of the identity nor stationary."""

    mixing = np.random.default_rng(99).normal(0, 8, (16, 16))

    def x_0(self, block: int) -> NDArray[np.uint8]:
        values = 128 + np.random.default_rng(block).normal(0, 1, (64, 16)) @ self.mixing.T
        return np.clip(np.rint(values), 0, 255).astype(np.uint8).reshape(64, *self.shape)


def test_correlated_gaussian_data_have_the_closed_forms_error() -> None:
    """The least error: the mean over the principal axes, of variance l, of a l / (a l + 1 - a), a = alpha_bar."""
    pairs: Any = CorrelatedPairs()
    denoise = wiener._fit_covariance(pairs)
    x_0 = np.concatenate([pairs.x_0(block) for block in range(300, 400)]) / 127.5 - 1
    variances = np.linalg.eigvalsh(np.cov(x_0.reshape(-1, 16).T))
    rng = np.random.default_rng(7)
    for a in (0.1, 0.5, 0.9):
        eps = rng.standard_normal(x_0.shape)
        x_t = (np.sqrt(a) * x_0 + np.sqrt(1 - a) * eps).astype(np.float32)
        error = denoise(x_t, np.full((len(x_t), 1, 1, 1), a)) - eps
        assert (error**2).mean() == pytest.approx((a * variances / (a * variances + 1 - a)).mean(), rel=0.03)


@pytest.mark.parametrize("fit", [wiener._fit_covariance, wiener._fit_stationary])
def test_white_gaussian_data_have_the_closed_forms_error(fit: Any) -> None:
    pairs = GaussianPairs()
    denoise = fit(pairs)
    rng = np.random.default_rng(7)
    s2 = (20 / 127.5) ** 2
    for a in (0.05, 0.5, 0.95, 0.999):
        x_0 = np.concatenate([pairs.x_0(block) for block in range(300, 340)]) / 127.5 - 1
        eps = rng.standard_normal(x_0.shape)
        x_t = (np.sqrt(a) * x_0 + np.sqrt(1 - a) * eps).astype(np.float32)
        error = denoise(x_t, np.full((len(x_t), 1, 1, 1), a)) - eps
        expected = a * s2 / (a * s2 + 1 - a)
        assert (error**2).mean() == pytest.approx(expected, rel=0.03)

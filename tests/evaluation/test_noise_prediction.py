"""Statistics of the noise prediction against direct computation and closed forms."""

from collections.abc import Iterator

import numpy as np
import pytest
from scipy import stats

from diffusion.evaluation import likelihood, noise_prediction
from diffusion.evaluation.heldout import Prediction
from diffusion.evaluation.wiener import Wiener
from diffusion.process import schedule
from diffusion.process.schedule import Schedule

IMAGES, DRAWS, SHAPE = 50, 20, (1, 4, 4)
SCHEDULE = Schedule(schedule.linear(1000))
IDENTITY = Wiener(np.zeros(SHAPE), np.ones(SHAPE), forward=lambda x: x, inverse=lambda z: z.real)


def predictions(error: float) -> Iterator[Prediction]:
    """Predictions with independent normal errors of standard deviation `error`."""
    rng = np.random.default_rng(0)
    for _ in range(DRAWS):
        eps = rng.standard_normal((IMAGES, *SHAPE), dtype=np.float32)
        eps_hat = (eps + error * rng.standard_normal(eps.shape)).astype(np.float32)
        t = rng.integers(1000, size=IMAGES)
        y = np.full(IMAGES, -1)
        yield Prediction(np.arange(IMAGES), t, y, rng.standard_normal(eps.shape, dtype=np.float32), eps, eps_hat)


def test_errors_by_image_give_the_mean_and_its_standard_error() -> None:
    errors = noise_prediction.by_image(predictions(0.3), IMAGES)
    per_pair = np.stack([(p.eps_hat.astype(np.float64) - p.eps) ** 2 for p in predictions(0.3)])
    assert errors == pytest.approx(per_pair.mean(axis=(0, 2, 3, 4)))
    figures = likelihood.mean("val_mse", errors)
    assert figures["val_mse"] == pytest.approx(per_pair.mean())
    assert figures["val_mse_se"] == pytest.approx(stats.sem(errors))
    assert figures["val_mse_images"] == IMAGES


def test_figures_are_those_of_a_direct_computation() -> None:
    sums = noise_prediction.collect(predictions(0.3), IMAGES, SCHEDULE, IDENTITY)
    overall, bands = noise_prediction.summarize(sums, seed=0, resamples=100, num_timesteps=1000)
    all_of_them = list(predictions(0.3))
    eps = np.concatenate([p.eps for p in all_of_them]).astype(np.float64)
    error = np.concatenate([p.eps_hat for p in all_of_them]) - eps
    t = np.concatenate([p.t for p in all_of_them])
    assert overall["images"] == IMAGES
    assert overall["pairs"] == IMAGES * DRAWS
    assert overall["mse"] == pytest.approx((error**2).mean())
    assert overall["rmse"] == pytest.approx(np.sqrt((error**2).mean()))
    assert overall["mae"] == pytest.approx(np.abs(error).mean())
    assert overall["r2"] == pytest.approx(1 - (error**2).sum() / ((eps - eps.mean()) ** 2).sum())
    assert overall["zero_mse"] == pytest.approx((eps**2).mean())
    assert [(band["t_from"], band["t_to"]) for band in bands] == [(100 * i, 100 * i + 99) for i in range(10)]
    for band in bands:
        inside = (t >= band["t_from"]) & (t <= band["t_to"])
        assert band["pairs"] == inside.sum()
        assert band["mse"] == pytest.approx((error[inside] ** 2).mean())


def test_intervals_have_the_width_of_the_standard_error() -> None:
    sums = noise_prediction.collect(predictions(0.3), IMAGES, SCHEDULE, IDENTITY)
    overall, _ = noise_prediction.summarize(sums, seed=0, resamples=1000, num_timesteps=1000)
    by_image = sums.by_image[:, :, noise_prediction.SQUARES].sum(axis=1) / (DRAWS * 16)
    expected = 2 * 1.96 * by_image.std() / np.sqrt(IMAGES)
    assert overall["mse_high"] - overall["mse_low"] == pytest.approx(expected, rel=0.1)
    assert overall["mse_low"] < overall["mse"] < overall["mse_high"]


def test_which_timesteps_were_drawn_does_not_widen_the_overall_interval() -> None:
    """An error that depends only on t is known exactly, since the number of occurrences of each t is not random."""
    rng = np.random.default_rng(1)
    by_image = np.zeros((IMAGES, noise_prediction.BANDS, 6))
    for image in range(IMAGES):
        band = rng.integers(noise_prediction.BANDS)
        by_image[image, band] = [16, 16 * (band + 1), 1, 1, 0, 16]
    low, high = noise_prediction.intervals(by_image, seed=0, resamples=200)["mse"]
    assert high[0] - low[0] < 0.2  # of errors between 1 and 10: only empty bands are left to move it
    plain = by_image[:, :, noise_prediction.SQUARES].sum(axis=1) / 16
    assert 3.92 * plain.std() / np.sqrt(IMAGES) > 1


def test_the_interval_covers_the_truth() -> None:
    sums = noise_prediction.collect(predictions(0.3), IMAGES, SCHEDULE, IDENTITY)
    overall, _ = noise_prediction.summarize(sums, seed=0, resamples=1000, num_timesteps=1000)
    assert overall["mse_low"] < 0.09 < overall["mse_high"]
    assert overall["r2_low"] < 0.91 < overall["r2_high"]


@pytest.mark.parametrize("T", [64, 100, 999, 1000])
def test_band_edges_agree_with_the_band_of_each_timestep(T: int) -> None:
    edges = noise_prediction.band_edges(T, 10)
    for band in range(10):
        inside = [t for t in range(T) if t * 10 // T == band]
        assert (inside[0], inside[-1]) == (edges[band], edges[band + 1] - 1)

"""Metrics of the noise prediction on held-out pairs, overall and by timestep, with intervals and baselines."""

import warnings
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from diffusion.evaluation.heldout import Prediction
from diffusion.evaluation.wiener import Wiener
from diffusion.pairs.noise import Purpose, stream
from diffusion.process.bands import BANDS, band_edges, band_of
from diffusion.process.schedule import Schedule

POINTS = 50
"""Number of points of the curve over t."""

COUNT, SQUARES, ABSOLUTES, WIENER_SQUARES, EPS, EPS_SQUARES = range(6)
"""Quantities summed over the values of a pair: 1, squared error, absolute error, squared error of the Wiener denoiser,
noise, and squared noise."""

Array = NDArray[np.float64]


class Sums(NamedTuple):
    """Sums from which all statistics are computed."""

    by_image: Array  # (images, BANDS, 6)
    by_t: Array  # (POINTS, 6)
    pairs: NDArray[np.int64]  # (BANDS,): number of pairs in each band


def collect(predictions: Iterable[Prediction], images: int, schedule: Schedule, wiener: Wiener) -> Sums:
    """Accumulate the sums over the predictions on a split of `images` images."""
    T = schedule.num_timesteps
    alpha_bar_of = schedule.alpha_bar.numpy()
    by_image, by_t = np.zeros((images, BANDS, 6)), np.zeros((POINTS, 6))
    pairs = np.zeros(BANDS, dtype=np.int64)
    for image, t, _, x_t, eps, eps_hat in predictions:
        error = eps_hat.astype(np.float64) - eps
        wiener_error = wiener(x_t, alpha_bar_of[t].reshape(-1, 1, 1, 1)) - eps
        values = (np.ones_like(error), error**2, np.abs(error), wiener_error**2, eps, np.square(eps, dtype=np.float64))
        sums = np.stack([value.sum(axis=(1, 2, 3), dtype=np.float64) for value in values], axis=1)
        band = band_of(t, T)
        np.add.at(by_image, (image, band), sums)
        np.add.at(by_t, band_of(t, T, POINTS), sums)
        np.add.at(pairs, band, 1)
    return Sums(by_image, by_t, pairs)


def by_image(predictions: Iterable[Prediction], images: int) -> Array:
    """MSE of the predicted noise over each image's pairs, (images,).

    All images have the same number of pairs, so the mean over images is the MSE of the split.
    """
    squares, count = np.zeros(images), np.zeros(images)
    for image, _, _, _, eps, eps_hat in predictions:
        np.add.at(squares, image, np.square(eps_hat.astype(np.float64) - eps).sum(axis=(1, 2, 3)))
        np.add.at(count, image, eps[0].size)
    return squares / count


def statistics(sums: Array) -> dict[str, Array]:
    """Compute MSE, RMSE, MAE and R^2, each of shape (...), from sums (..., 6); NaN where there are no pairs.

    R^2 = 1 - sum (eps - eps_hat)^2 / sum (eps - mean eps)^2.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        count = sums[..., COUNT]
        total = sums[..., EPS_SQUARES] - sums[..., EPS] ** 2 / count
        mse = sums[..., SQUARES] / count
        return {
            "mse": mse,
            "rmse": np.sqrt(mse),
            "mae": sums[..., ABSOLUTES] / count,
            "r2": 1 - sums[..., SQUARES] / total,
        }


def baselines(sums: Array) -> dict[str, Array]:
    """MSE of predicting zero noise and of the linear Wiener denoiser, each (...), from sums (..., 6)."""
    with np.errstate(invalid="ignore"):
        return {
            "zero_mse": sums[..., EPS_SQUARES] / sums[..., COUNT],
            "wiener_mse": sums[..., WIENER_SQUARES] / sums[..., COUNT],
        }


def with_total(bands: Array) -> Array:
    """Prepend the total over all bands: (..., BANDS, 6) to (..., 1 + BANDS, 6)."""
    return np.concatenate([bands.sum(axis=-2, keepdims=True), bands], axis=-2)


def intervals(by_image: Array, seed: int, resamples: int) -> dict[str, tuple[Array, Array]]:
    """95 % intervals of each statistic by the percentile bootstrap over images (Efron & Tibshirani 1993, ch. 13).

    `by_image` is (images, BANDS, 6); returns lower and upper limits, each (1 + BANDS,), overall first. Since timesteps
    are stratified, the number of pairs per band is not random. So every resample is reweighted to the bands' numbers
    of pairs in the data; otherwise the intervals of the overall error would be far too wide.
    """
    images = len(by_image)
    flat = by_image.reshape(images, -1)
    count = by_image[..., COUNT].sum(axis=0)
    rng = stream(seed, Purpose.BOOTSTRAP)
    resampled = np.empty((resamples, 1 + BANDS, by_image.shape[2]))
    for index in range(resamples):
        times_drawn = np.bincount(rng.integers(images, size=images), minlength=images)
        bands = (times_drawn @ flat).reshape(by_image.shape[1:])
        drawn = bands[:, COUNT]
        scale = np.divide(count, drawn, out=np.zeros(BANDS), where=drawn > 0)
        resampled[index] = with_total(bands * scale[:, None])
    found = {}
    with warnings.catch_warnings():
        # A resample of few images may leave a band empty, or a band may have no pairs at all.
        warnings.filterwarnings("ignore", message="All-NaN slice")
        for name, values in statistics(resampled).items():
            low, high = np.nanpercentile(values, [2.5, 97.5], axis=0)
            found[name] = (low, high)
    return found


def summarize(
    sums: Sums, seed: int, resamples: int, num_timesteps: int
) -> tuple[dict[str, float], list[dict[str, float]]]:
    """Overall metrics, and a row for each band of t."""
    total = with_total(sums.by_image.sum(axis=0))
    figures, ends, others = statistics(total), intervals(sums.by_image, seed, resamples), baselines(total)

    def row(part: int) -> dict[str, float]:
        values: dict[str, float] = {}
        for name, value in figures.items():
            low, high = ends[name]
            values |= {name: value[part], f"{name}_low": low[part], f"{name}_high": high[part]}
        values |= {name: value[part] for name, value in others.items()}
        return {name: float(value) for name, value in values.items()}

    edges = band_edges(num_timesteps)
    bands = [
        {"t_from": edges[band], "t_to": edges[band + 1] - 1, "pairs": int(sums.pairs[band])} | row(band + 1)
        for band in range(BANDS)
        if sums.pairs[band]
    ]
    return {"images": len(sums.by_image), "pairs": int(sums.pairs.sum())} | row(0), bands


def verdict(report: Mapping[str, float]) -> str:
    """Whether the model is better than the linear baseline, in words."""
    if report["mse_high"] < report["wiener_mse"]:
        word = "better than"
    elif report["mse_low"] > report["wiener_mse"]:
        word = "worse than"
    else:
        word = "no different, within its noise, from"
    return f"{word} the linear baseline (MSE {report['mse']:.4f} against {report['wiener_mse']:.4f})"


def curve(sums: Sums, num_timesteps: int) -> list[dict[str, float]]:
    """MSE over t, in rows: center of an interval of timesteps, and the errors of the model and the baselines."""
    edges = band_edges(num_timesteps, POINTS)
    model, others = statistics(sums.by_t)["mse"], baselines(sums.by_t)
    return [
        {
            "t": (edges[point] + edges[point + 1] - 1) / 2,
            "model": float(model[point]),
            "wiener": float(others["wiener_mse"][point]),
            "zero": float(others["zero_mse"][point]),
        }
        for point in range(POINTS)
        if sums.by_t[point, COUNT]
    ]

"""Histogram baselines for the likelihood."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from diffusion.evaluation import histograms
from diffusion.pairs.noise import BLOCK
from flows.baselines import verdict

RNG = np.random.default_rng(0)


class Some:
    """Images as `Pairs` has them."""

    def __init__(self, images: NDArray[np.uint8]) -> None:
        self._images = images
        self.images, self.shape = len(images), images.shape[1:]
        self.blocks = -(-len(images) // BLOCK)

    def x_0(self, block: int) -> NDArray[np.uint8]:
        return self._images[block * BLOCK :][:BLOCK]


def some(count: int, values: list[int]) -> Any:
    return Some(RNG.choice(np.array(values, np.uint8), (count, 2, 3, 5)))


def test_the_values_of_all_splits() -> None:
    splits = [some(BLOCK + 30, [7, 200]), some(3, [0]), some(3, [200, 255])]
    assert histograms.values_of(splits).tolist() == [0, 7, 200, 255]


@pytest.mark.parametrize("memory", [2**28, 1])
def test_the_costs_are_those_of_counting_one_by_one(memory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(histograms, "MAX_BYTES", memory)
    train, test = some(2 * BLOCK + 9, [0, 4, 9]), some(BLOCK + 7, [0, 4, 9, 255])
    values = np.array([0, 4, 9, 255], np.uint8)
    n = BLOCK + 2
    found = histograms.bits(train, test, n, values)
    x, y = train._images, test._images
    for image in (0, n - 1):
        whole = by_pixel = 0.0
        for place in np.ndindex(y.shape[1:]):
            value = y[image][place]
            seen = x[(slice(None), *place)]
            by_pixel -= np.log2(((seen == value).sum() + 0.5) / (len(x) + 4 * 0.5))
            whole -= np.log2(((x == value).sum() + 0.5) / (x.size + 4 * 0.5))
        assert found["histogram"][image] == pytest.approx(whole / 30, rel=1e-12)
        assert found["pixel_histogram"][image] == pytest.approx(by_pixel / 30, rel=1e-12)
    assert found["uniform"].tolist() == [2.0] * n
    assert {len(bits) for bits in found.values()} == {n}


@pytest.mark.parametrize(
    ("gain", "words"), [(0.5, "better than"), (-0.5, "worse than"), (0.0, "no different, within its noise, from")]
)
def test_the_verdict_compares_with_the_best_baseline(gain: float, words: str) -> None:
    baselines = {"uniform": np.full(100, 8.0), "histogram": RNG.normal(5, 1, 100), "pixel_histogram": np.full(100, 6.0)}
    noise = RNG.normal(0, 0.1, 100)
    report = histograms.compare(baselines["histogram"] - gain + noise - noise.mean(), baselines)
    assert report["bits_per_dim_gain"] == pytest.approx(gain, abs=1e-12)
    assert report["bits_per_dim_uniform"] == 8
    best = report["bits_per_dim_histogram"]
    assert verdict(report) == f"{words} the histogram of all pixels ({best:.4f})"

"""Noise prediction on held-out pairs."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from diffusion.evaluation import heldout
from diffusion.evaluation.heldout import Prediction, quick_mse

RNG = np.random.default_rng(0)
ERRORS = RNG.exponential(size=(4, 50))
"""MSE of each draw of each image."""


def given(*_: object) -> Iterator[Prediction]:
    """Draw by draw, in blocks of 20, 20 and 10 images."""
    for draw in ERRORS:
        for images in np.split(np.arange(50), [20, 40]):
            eps = np.zeros((len(images), 1, 2, 2), np.float32)
            yield Prediction(images, images, images, eps, eps, eps + np.sqrt(draw[images])[:, None, None, None])


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(heldout, "predictions", given)
    return lambda blocks: quick_mse(None, None, torch.device("cpu"), lambda: None, blocks)  # type: ignore[arg-type]


def test_the_standard_error_is_that_of_the_images_means(ask: Any) -> None:
    found, means = ask(12), ERRORS.mean(axis=0)
    assert found.mse == pytest.approx(means.mean())
    assert found.se == pytest.approx(means.std(ddof=1) / np.sqrt(50))


def test_of_images_with_different_numbers_of_pairs_it_is_that_of_a_ratio(ask: Any) -> None:
    """The MSE is the ratio of two sums over images; its standard error by the jackknife."""
    found = ask(5)
    seen = [ERRORS[: 2 if image < 40 else 1, image] for image in range(50)]
    assert found.mse == pytest.approx(np.concatenate(seen).mean())
    without = np.array([np.concatenate(seen[:image] + seen[image + 1 :]).mean() for image in range(50)])
    jackknife = np.sqrt(49 / 50 * np.square(without - without.mean()).sum())
    assert found.se == pytest.approx(jackknife, rel=0.02)


def test_a_single_image_has_no_standard_error(monkeypatch: pytest.MonkeyPatch, ask: Any) -> None:
    one = [each._replace(**{name: value[:1] for name, value in each._asdict().items()}) for each in given()][::3]
    monkeypatch.setattr(heldout, "predictions", lambda *_: iter(one))
    assert ask(4).se == pytest.approx(0, abs=1e-12)

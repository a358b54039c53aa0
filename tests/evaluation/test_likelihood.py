"""The bound on images of normally distributed values, whose optimal denoiser and likelihood are known."""

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from diffusion.evaluation import likelihood
from diffusion.evaluation.heldout import x_0_mse
from diffusion.evaluation.likelihood import Draws, Terms
from diffusion.model import Config, Model
from diffusion.pairs.noise import BLOCK
from diffusion.process import build
from flows.params import Params

CPU = torch.device("cpu")
SCALE = 0.25
"""Standard deviation of the images' values, in [-1, 1]."""
SHAPE = (1, 4, 4)


class GaussianPairs:
    """Replaces a split of pairs: 8-bit images with independent normal values around the middle."""

    shape, images = SHAPE, 1000

    def x_0(self, block: int) -> NDArray[np.uint8]:
        values = np.random.default_rng(block).normal(0, SCALE, (BLOCK, *SHAPE))
        return np.clip(np.rint((values + 1) * 127.5), 0, 255).astype(np.uint8)

    def labels(self, block: int) -> NDArray[np.int64]:
        return np.random.default_rng(block).integers(-1, 3, BLOCK)


class Best(nn.Module):
    """The optimal v for x_0 ~ N(0, SCALE^2 I), independent of the class; records the classes."""

    def __init__(self, alpha_bar: Tensor) -> None:
        super().__init__()
        self.alpha_bar = alpha_bar
        self.asked: list[int] = []

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        self.asked += y.tolist() if y is not None else []
        a = self.alpha_bar[t].view(-1, 1, 1, 1)
        of_x_t = (a * (1 - a)).sqrt() * (1 - SCALE**2) / (a * SCALE**2 + 1 - a)
        return of_x_t.float() * x_t


def gaussian_model(params: Params, num_timesteps: int, classes: tuple[str, ...] = ()) -> Model:
    options = params.process.model_copy(update={"num_timesteps": num_timesteps})
    network = params.network.model_copy(update={"classes": bool(classes)})
    process = build.process(options)
    left = 1 - process.schedule.alpha_bar
    errors = tuple((left * SCALE**2 / (process.schedule.alpha_bar * SCALE**2 + left)).tolist())
    config = Config(shape=SHAPE, classes=classes, network=network, process=options, x_0_mse=errors)
    return Model(Best(process.schedule.alpha_bar), process, config)


def measure(model: Model, images: int, edges: NDArray[np.int64], variance: str = "fixed-small", seed: int = 0) -> Terms:
    pairs: Any = GaussianPairs()
    return likelihood.measure(model, model.variance(variance), pairs, Draws(images, edges, seed), CPU)


@pytest.mark.parametrize("T", [2, 3, 10, 64, 999, 1000, 4000])
def test_strata_cover_every_timestep_once(T: int) -> None:
    for edges in (likelihood.strata(T), likelihood.every_timestep(T)):
        assert edges[0] == 0
        assert edges[1] == 1  # L_0 is a separate stratum
        assert edges[-1] == T
        assert (np.diff(edges) > 0).all()
    assert len(likelihood.every_timestep(T)) == T + 1


def test_strata_are_few_and_narrow_where_the_terms_are_large() -> None:
    edges = likelihood.strata(1000)
    assert len(edges) == 41 + 1
    assert (np.diff(edges)[:7] == 1).all()
    assert (np.diff(edges) <= 1 + edges[:-1] / 7).all()


def test_the_exact_sum_meets_the_likelihood_of_normal_images(params: Params) -> None:
    """With the best mean and variance each step is right, and the bound tight: -log2 of the mass in each value's bin.

    E |x_0 - x_0_hat|^2 / d = (1 - alpha_bar) SCALE^2 / (alpha_bar SCALE^2 + 1 - alpha_bar) for the best x_0_hat.
    """
    model, images = gaussian_model(params, 100), 320
    exact, by_fixed = (
        measure(model, images, likelihood.every_timestep(100), name) for name in ("analytic", "fixed-small")
    )
    x_0 = torch.from_numpy(np.concatenate([GaussianPairs().x_0(block) for block in range(images // BLOCK)]) / 127.5 - 1)
    mass = torch.special.ndtr((x_0 + 1 / 255) / SCALE) - torch.special.ndtr((x_0 - 1 / 255) / SCALE)
    gap = exact.total + mass.log2().mean(dim=(1, 2, 3)).numpy()
    error = gap.std(ddof=1) / np.sqrt(images)
    assert error < 0.02
    assert abs(gap.mean()) < 3 * error
    assert by_fixed.total.mean() > exact.total.mean() + 0.5
    assert exact.prior == pytest.approx(0, abs=1e-6)


def test_the_estimate_is_unbiased_and_of_the_very_same_terms(params: Params) -> None:
    T, images = 100, 320
    model = gaussian_model(params, T)
    exact, estimate = (measure(model, images, edges(T)) for edges in (likelihood.every_timestep, likelihood.strata))
    assert (estimate.prior == exact.prior).all()
    assert estimate.steps[:, :7] == pytest.approx(exact.steps[:, :7], rel=1e-6)  # strata of width one
    difference = estimate.total - exact.total
    error = difference.std(ddof=1) / np.sqrt(images)
    assert abs(difference.mean()) < 3 * error
    # What the strata add is small compared with the images' error.
    assert error < 0.2 * exact.total.std(ddof=1) / np.sqrt(images)
    # Each stratum separately: means over the images of exact and estimated sums.
    sums = np.add.reduceat(exact.steps, likelihood.strata(T)[:-1], axis=1)
    errors = (estimate.steps - sums).std(axis=0, ddof=1) / np.sqrt(images)
    assert (np.abs((estimate.steps - sums).mean(axis=0)) <= 4 * errors + 1e-6).all()


def test_an_images_terms_depend_on_neither_batches_nor_other_images(
    params: Params, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, edges = gaussian_model(params, 50), likelihood.strata(50)
    many = measure(model, 70, edges)
    monkeypatch.setattr(likelihood, "BATCH", 13)
    few = measure(model, 66, edges)
    assert few.prior == pytest.approx(many.prior[:66], rel=1e-12)
    assert few.steps == pytest.approx(many.steps[:66], rel=1e-5)
    assert (measure(model, 66, edges).steps == few.steps).all()
    assert not np.isclose(measure(model, 66, edges, seed=1).steps, few.steps).all(axis=1).any()


def test_the_network_gets_the_class_of_each_image(params: Params) -> None:
    model, edges = gaussian_model(params, 20, ("a", "b", "c")), likelihood.every_timestep(20)
    measure(model, 70, edges)
    labels = np.concatenate([GaussianPairs().labels(block) for block in range(2)])[:70]
    assert model.net.asked == np.repeat(labels, 20).tolist()


def test_every_term_is_counted(params: Params) -> None:
    done: list[int] = []
    pairs: Any = GaussianPairs()
    model, edges = gaussian_model(params, 20), likelihood.strata(20)
    likelihood.measure(model, model.variance("fixed-large"), pairs, Draws(70, edges, 0), CPU, done.append)
    assert sum(done) == 70 * (len(edges) - 1)


def test_the_reports_figures() -> None:
    rng = np.random.default_rng(0)
    estimate, exact = (Terms(rng.random(n), rng.random((n, strata))) for n, strata in ((50, 5), (8, 20)))
    figures = likelihood.summarize(estimate, exact)
    assert figures["bits_per_dim"] == pytest.approx(np.mean(estimate.prior + estimate.steps.sum(axis=1)))
    error = np.std(estimate.total, ddof=1) / np.sqrt(50)
    assert figures["bits_per_dim_se"] == pytest.approx(error)
    assert figures["bits_per_dim_high"] - figures["bits_per_dim_low"] == pytest.approx(2 * 1.96 * error)
    assert (figures["bits_per_dim_images"], figures["bits_per_dim_exact_images"]) == (50, 8)
    parts = [figures[f"bits_per_dim_{part}"] for part in ("prior", "diffusion", "decoder")]
    assert sum(parts) == pytest.approx(figures["bits_per_dim_exact"])
    assert parts[0] == pytest.approx(exact.prior.mean())
    assert parts[2] == pytest.approx(exact.steps[:, 0].mean())
    rows = likelihood.curve(exact)
    assert [row["t"] for row in rows] == list(range(20))
    assert sum(row["bits_per_dim"] for row in rows) == pytest.approx(exact.steps.sum(axis=1).mean())


def test_a_single_image_has_figures_too() -> None:
    one = Terms(np.array([0.5]), np.array([[1.0, 2.0]]))
    figures = likelihood.summarize(one, one)
    assert (figures["bits_per_dim"], figures["bits_per_dim_se"]) == (3.5, 0)


@pytest.mark.parametrize(("T", "size"), [(101, BLOCK), (40, 5)])
def test_the_error_of_the_clean_image_is_estimated_at_every_timestep(params: Params, T: int, size: int) -> None:
    """It is known for the optimal denoiser; the images of a short block are repeated."""
    model = gaussian_model(params, T)

    class Blocks(GaussianPairs):
        blocks = 7

        def size(self, block: int) -> int:  # noqa: ARG002
            return size

    pairs: Any = Blocks()
    found = np.array(x_0_mse(model, pairs, CPU, 0, lambda: None))
    expected = np.array(model.config.x_0_mse)
    assert found.shape == (T,)
    # 16 images of 16 values each; the images' values are whole grey levels, which counts where all else is known.
    assert (np.abs(found / (expected + (2 / 255) ** 2 / 12) - 1) < 0.6).all()
    assert np.mean(found / expected) == pytest.approx(1, abs=0.1)
    assert found.tolist() == list(x_0_mse(model, pairs, CPU, 0, lambda: None))

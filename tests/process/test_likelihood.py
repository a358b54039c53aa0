"""The bound against an independent implementation from the paper, and against the likelihood of Gaussian data."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from diffusion.process import build, likelihood
from diffusion.process.denoiser import clip, unbounded
from diffusion.process.likelihood import Bound
from diffusion.process.variance import VARIANCES, FixedSmall
from tests.process.fakes import (
    PARAMETERIZATIONS,
    Says,
    always,
    gaussian_x_0_hat,
    gaussian_x_0_mse,
    process,
    randn,
    some_x_0_hat,
)

BINS = (torch.arange(256, dtype=torch.float64) / 127.5 - 1).view(256, 1, 1, 1)
Array = NDArray[np.float64]


class Paper:
    """Ho et al. 2020, eq. 5, 7, 8 and 13, and Nichol & Dhariwal 2021, eq. 15, counting t from 1 as they do."""

    def __init__(self, beta: Array) -> None:
        self.beta = np.concatenate([[np.nan], beta])
        self.alpha_bar = np.concatenate([[1], np.cumprod(1 - beta)])
        self.beta_tilde = np.full_like(self.beta, np.nan)
        self.beta_tilde[1:] = (1 - self.alpha_bar[:-1]) / (1 - self.alpha_bar[1:]) * beta

    def mean(self, t: int, x_t: Array, x_0: Array) -> Array:
        a, before = self.alpha_bar[t], self.alpha_bar[t - 1]
        of_x_0 = math.sqrt(before) * self.beta[t] / (1 - a)
        return of_x_0 * x_0 + math.sqrt(1 - self.beta[t]) * (1 - before) / (1 - a) * x_t

    def variance(self, name: str, t: int, v: float) -> float:
        small, large = self.beta_tilde[max(t, 2)], self.beta[t]
        if name == "learned":
            return math.exp(v * math.log(large) + (1 - v) * math.log(small))
        return large if name == "fixed-large" and t > 1 else small

    def prior(self, x_0: Array) -> float:
        """L_T: KL(N(sqrt(alpha_bar_T) x_0, 1 - alpha_bar_T) || N(0, 1))."""
        a = self.alpha_bar[-1]
        return float(np.mean(0.5 * (a * x_0**2 + (1 - a) - 1 - math.log(1 - a)))) / math.log(2)

    def term(self, t: int, x_0: Array, x_t: Array, x_0_hat: Array, variance: float) -> float:
        """L_{t-1}, or L_0 for t = 1, in bits per dimension."""
        mean = self.mean(t, x_t, x_0_hat)
        if t > 1:
            ratio = self.beta_tilde[t] / variance
            distance = (self.mean(t, x_t, x_0) - mean) ** 2 / variance
            return float(np.mean(0.5 * (distance + ratio - 1 - math.log(ratio)))) / math.log(2)
        level = np.round((x_0 + 1) * 127.5)
        below = np.where(level == 0, -np.inf, x_0 - 1 / 255)
        above = np.where(level == 255, np.inf, x_0 + 1 / 255)
        normal = stats.norm(mean, math.sqrt(variance))
        return float(np.mean(-np.log(np.maximum(normal.cdf(above) - normal.cdf(below), 1e-12)))) / math.log(2)


def bound(made: build.Process, net: Says, variance: str, square: Tensor | None = None) -> Bound:
    return Bound(made.denoiser(net, unbounded), build.variance(variance, made, square))


def images(count: int) -> Tensor:
    """8-bit images that contain both extreme values."""
    levels = torch.randint(0, 256, (count, 1, 4, 4), generator=torch.Generator().manual_seed(2))
    levels[:, 0, 0, :2] = torch.tensor([0, 255])
    return levels / 127.5 - 1


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("variance", ["fixed-small", "fixed-large", "learned"])
@pytest.mark.parametrize("name", PARAMETERIZATIONS)
def test_every_term_is_that_of_an_independent_implementation(name: str, variance: str, schedule: str) -> None:
    made = process(parameterization=name, schedule=schedule, num_timesteps=40)
    fraction = -0.4 if variance == "learned" else None
    found = bound(made, Says(name, made.schedule, some_x_0_hat, fraction), variance)
    paper = Paper(made.schedule.beta.numpy())
    t = torch.arange(40)
    x_0, eps = images(40).double(), randn(40, 1, 4, 4)
    terms = found.term(x_0, t, eps)
    assert terms.shape == (40,)
    x_t = made.schedule.diffuse(x_0, t, eps)
    x_0_hat = some_x_0_hat(x_t, t)
    for step in range(40):
        of_step = (array[step].numpy() for array in (x_0, x_t, x_0_hat))
        expected = paper.term(step + 1, *of_step, paper.variance(variance, step + 1, 0.3))
        assert terms[step].item() == pytest.approx(expected, rel=1e-6), step
    assert likelihood.prior(made.schedule, x_0).tolist() == pytest.approx([paper.prior(image.numpy()) for image in x_0])


def test_the_prior_counts_what_is_left_of_the_image() -> None:
    """The first half, where the divergence is far from that of pure noise."""
    beta = (0.1, 0.2, 0.3)
    made = process(schedule={"kind": "given", "beta": beta}, num_timesteps=3)
    x_0 = images(2).double()
    expected = [Paper(np.array(beta)).prior(image.numpy()) for image in x_0]
    assert likelihood.prior(made.schedule, x_0).tolist() == pytest.approx(expected)
    assert likelihood.prior(made.schedule, x_0.float()).tolist() == pytest.approx(expected, rel=1e-5)


def test_the_terms_are_float64_whatever_the_images_are() -> None:
    made = process()
    found = bound(made, Says("eps", made.schedule, some_x_0_hat), "fixed-small")
    x_0, t, eps = images(5), torch.tensor([0, 1, 2, 500, 999]), randn(5, 1, 4, 4).float()
    terms, same = found.term(x_0, t, eps), found.term(x_0.double(), t, eps.double())
    assert terms.dtype == torch.float64
    torch.testing.assert_close(terms, same, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("std", [1e-3, 0.01, 0.3, 3.0])
@pytest.mark.parametrize("mean", [-1.5, -1.0, 0.123, 0.99])
def test_the_decoders_masses_over_all_bins_add_up_to_one(mean: float, std: float) -> None:
    nll = likelihood.decoder_nll(BINS, torch.full_like(BINS, mean), torch.full_like(BINS, std**2))
    assert nll.exp().reciprocal().sum().item() == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("levels", [[-1.0], [-1.0, 1.0], [-0.9, -0.1, 0.0, 0.7]])
def test_bins_of_few_values_meet_halfway(levels: list[float]) -> None:
    values = torch.tensor(levels, dtype=torch.float64)
    x_0 = values[:, None, None, None]
    nll = likelihood.decoder_nll(x_0, torch.full_like(x_0, 0.2), torch.full_like(x_0, 0.25), values)
    edges = [-np.inf, *((a + b) / 2 for a, b in itertools.pairwise(levels)), np.inf]
    np.testing.assert_allclose(nll.flatten(), -np.log(np.diff(stats.norm(0.2, 0.5).cdf(edges))), rtol=1e-9)


def test_the_decoders_bins_are_2_255_wide_and_open_at_the_ends() -> None:
    normal = stats.norm(0.2, 0.5)
    values = BINS.flatten().numpy()
    edges = np.concatenate([[-np.inf], (values[1:] + values[:-1]) / 2, [np.inf]])
    nll = likelihood.decoder_nll(BINS, torch.full_like(BINS, 0.2), torch.full_like(BINS, 0.25))
    np.testing.assert_allclose(nll.flatten().numpy(), -np.log(np.diff(normal.cdf(edges))), rtol=1e-9)
    for kind in (torch.float32, torch.float64):  # impossible values cost a lot, but not without end
        x_0 = BINS.to(kind)
        nll = likelihood.decoder_nll(x_0, torch.zeros_like(x_0), torch.full_like(x_0, 1e-8))
        assert nll.isfinite().all()
        assert nll.max().item() == pytest.approx(-math.log(1e-12), rel=1e-5)


def test_divergence_of_normal_distributions() -> None:
    """Against torch.distributions."""
    values = [randn(4, 3), randn(4, 3, seed=1).exp(), randn(4, 3, seed=2), randn(4, 3, seed=3).exp()]
    normal = [torch.distributions.Normal(values[i], values[i + 1].sqrt()) for i in (0, 2)]
    torch.testing.assert_close(likelihood.normal_kl(*values), torch.distributions.kl_divergence(*normal))


def test_zero_terminal_snr_leaves_no_cost_at_the_prior() -> None:
    made = process(parameterization="v", zero_terminal_snr=True)
    assert likelihood.prior(made.schedule, images(3).double()).tolist() == [0, 0, 0]
    for variance in VARIANCES:
        fraction = 0.0 if variance == "learned" else None
        found = bound(made, Says("v", made.schedule, some_x_0_hat, fraction), variance, torch.zeros(1000))
        terms = found.term(images(3), torch.tensor([997, 998, 999]), randn(3, 1, 4, 4).float())
        assert terms.isfinite().all()
        assert (terms >= 0).all()


def test_the_bound_uses_the_estimate_kept_in_range() -> None:
    made = process()
    x_0, t, eps = images(3).double(), torch.tensor([0, 10, 900]), randn(3, 1, 4, 4)
    terms = []
    for value, threshold in ((5.0, clip), (1.0, unbounded)):
        net = Says("eps", made.schedule, always(torch.full_like(x_0, value)))
        terms.append(Bound(made.denoiser(net, threshold), FixedSmall(made.schedule)).term(x_0, t, eps))
    torch.testing.assert_close(*terms)


def gaussian_terms(variance: str, T: int, std: float = 0.2, values: int = 4000) -> tuple[Tensor, float]:
    """Terms at every t, (T,), for N(0, std^2) and its optimal denoiser; and L_T less the data's own likelihood.

    The data are quantiles, each in a bin of its own.

    The denoiser is linear, so that all terms but L_0 depend only on second moments; noise and data are constructed to
    match them exactly, without sampling error.
    """
    made = process(num_timesteps=T)
    net = Says("eps", made.schedule, gaussian_x_0_hat(made.schedule, std))
    found = bound(made, net, variance, gaussian_x_0_mse(made.schedule, std))
    x_0 = torch.special.ndtri((torch.arange(values, dtype=torch.float64) + 0.5) / values)
    x_0 = x_0 / x_0.square().mean().sqrt()
    found = replace(found, values=std * x_0)
    eps = randn(T, 1, 1, values)
    eps = eps - (eps * x_0).mean(dim=-1, keepdim=True) * x_0
    eps = eps / eps.square().mean(dim=-1, keepdim=True).sqrt()
    terms = found.term((std * x_0).expand(T, 1, 1, -1), torch.arange(T), eps)
    edges = np.concatenate([[-np.inf], (x_0[1:] + x_0[:-1]).numpy() / 2, [np.inf]])
    nll = -np.log2(np.diff(stats.norm.cdf(edges))).mean()
    return terms, float(likelihood.prior(made.schedule, std * x_0.view(1, 1, 1, -1)) - nll)


@pytest.mark.parametrize("T", [50, 100, 400, 1000])
def test_with_the_true_variance_the_bound_is_the_likelihood_of_gaussian_data(T: int) -> None:
    """The reverse steps of Gaussian data are Gaussian, so the only difference is due to the width of the bins."""
    terms, rest = gaussian_terms("analytic", T)
    assert terms.sum().item() + rest == pytest.approx(0, abs=2e-3)


@pytest.mark.parametrize("variance", ["fixed-small", "fixed-large"])
def test_a_fixed_variance_costs_its_divergence_from_the_true_one(variance: str) -> None:
    """(r - 1 - log r) / 2 nats at t >= 1, r being the true variance over it: beyond L_0 that is all of the gap.

    It closes as 1 / T with fixed-large. With fixed-small it does not, for in the first timesteps, however short they
    are, beta_tilde is too little by t / (t + 1).
    """
    gaps = []
    for T in (100, 400):
        made = process(num_timesteps=T)
        t = torch.arange(1, T)
        true = build.variance("analytic", made, gaussian_x_0_mse(made.schedule, 0.2))(t, t - 1, None)
        ratio = (true / build.variance(variance, made, None)(t, t - 1, None)).flatten()
        cost = (gaussian_terms(variance, T)[0] - gaussian_terms("analytic", T)[0])[1:]
        torch.testing.assert_close(cost, (ratio - 1 - ratio.log()) / 2 / math.log(2), rtol=1e-5, atol=1e-9)
        gaps.append(cost.sum().item())
    assert gaps[0] / gaps[1] == pytest.approx(4 if variance == "fixed-large" else 1.75, rel=0.05)


def test_small_fixed_variances_are_never_better_than_the_true_one() -> None:
    true, rest = gaussian_terms("analytic", 100)
    for variance in ("fixed-small", "fixed-large"):
        assert (gaussian_terms(variance, 100)[0] >= true - 1e-9).all()
    assert rest < 0

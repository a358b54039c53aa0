"""Reverse variances against diffusers, the papers' formulas and, for Gaussian data, the truth."""

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor

from diffusion.errors import UserError
from diffusion.process import build
from diffusion.process.schedule import Schedule
from diffusion.process.variance import VARIANCES, Analytic, FixedLarge, FixedSmall, Learned
from diffusion.sampling import build as sampling
from diffusion.sampling.sampler import Ancestral
from tests.process.fakes import Says, at, gaussian_x_0_hat, gaussian_x_0_mse, marginal_variance, options, process, randn

LINEAR = process().schedule
STEPS = torch.tensor([(1, 0), (2, 1), (500, 499), (999, 998), (999, 500), (500, 0), (999, 0)])


def true_variance(schedule: Schedule, t: Tensor, s: Tensor, std: float) -> Tensor:
    """Var(x_s | x_t) for x_0 ~ N(0, std^2): of two jointly normal ones with Cov(x_s, x_t) = sqrt(alpha) Var(x_s)."""
    alpha = at(schedule, t) / at(schedule, s)
    before = marginal_variance(schedule, s, std)
    return before - alpha * before**2 / marginal_variance(schedule, t, std)


def bao_et_al(schedule: Schedule, t: Tensor, gamma: Tensor) -> Tensor:
    """sigma_n^2 of Analytic-DPM as printed, with lambda_n^2 = beta_tilde_n (DDPM), in the paper's own variables."""
    alpha_n, beta_n = schedule.alpha[t], schedule.beta[t]
    beta_bar_n, beta_bar_before = 1 - schedule.alpha_bar[t], 1 - schedule.alpha_bar[t - 1]
    lambda_2 = beta_bar_before / beta_bar_n * beta_n
    root = (beta_bar_n / alpha_n).sqrt() - (beta_bar_before - lambda_2).sqrt()
    return lambda_2 + root**2 * (1 - beta_bar_n * gamma)


@pytest.mark.parametrize("steps", [1000, 50])
@pytest.mark.parametrize("theirs", ["fixed_small", "fixed_large", "learned_range"])
def test_variances_agree_with_diffusers(theirs: str, steps: int) -> None:
    scheduler = DDPMScheduler(1000, variance_type=theirs)
    scheduler.alphas_cumprod, scheduler.one = LINEAR.alpha_bar, torch.ones((), dtype=torch.float64)
    scheduler.set_timesteps(steps)
    ours = {"fixed_small": FixedSmall, "fixed_large": FixedLarge, "learned_range": Learned}[theirs](LINEAR)
    fraction = randn(1, 1, 2, 2)  # beyond [-1, 1] here and there
    for t in scheduler.timesteps.tolist()[:-1]:  # in the last step they have no variance
        expected = scheduler._get_variance(t, predicted_variance=fraction)
        found = ours(torch.tensor([t]), torch.tensor([t - 1000 // steps]), fraction)
        torch.testing.assert_close(found, (expected.exp() if theirs == "learned_range" else expected).expand_as(found))


def test_the_last_steps_variance_is_that_of_the_step_before() -> None:
    """As in the code of Ho et al.: posterior_variance[1] at t = 0; improved DDPM's range goes from it to beta_0."""
    last, clean = torch.tensor([0]), torch.tensor([-1])
    before = FixedSmall(LINEAR)(torch.tensor([1]), torch.tensor([0]))
    assert before > 0
    assert FixedSmall(LINEAR)(last, clean) == before
    assert FixedLarge(LINEAR)(last, clean) == before
    for value, expected in ((-1.0, before.item()), (1.0, 1e-4)):
        found = Learned(LINEAR)(last, clean, torch.full((1, 1, 1, 1), value))
        assert found.item() == pytest.approx(expected)


@pytest.mark.parametrize("std", [1.0, 0.3])
def test_analytic_variance_is_the_formula_of_the_paper(std: float) -> None:
    t = torch.arange(1, 1000)
    square = gaussian_x_0_mse(LINEAR, std)
    gamma = 1 / marginal_variance(LINEAR, t, std).flatten()  # E |score|^2 / d, the score being -x_t / Var(x_t)
    found = Analytic(LINEAR, square)(t, t - 1).flatten()
    torch.testing.assert_close(found, bao_et_al(LINEAR, t, gamma))


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
@pytest.mark.parametrize("std", [1.0, 0.3])
def test_analytic_variance_is_the_true_one_of_gaussian_data(std: float, zero_terminal_snr: bool) -> None:
    schedule = process(parameterization="v", zero_terminal_snr=zero_terminal_snr).schedule
    t, s = STEPS.T
    found = Analytic(schedule, gaussian_x_0_mse(schedule, std))(t, s)
    torch.testing.assert_close(found, true_variance(schedule, t, s, std))
    # The fixed ones bound it: right for a single x_0, and for N(0, I).
    assert (found >= FixedSmall(schedule)(t, s)).all()
    assert (found <= FixedLarge(schedule)(t, s) * (1 + 1e-9)).all()
    if std == 1:
        torch.testing.assert_close(found, FixedLarge(schedule)(t, s))


@pytest.mark.parametrize("square", [0.0, 0.5, 1.0, 1.5])
def test_analytic_variance_stays_in_its_bounds(square: float) -> None:
    """Between the posterior variance and the limit for images in [-1, 1] (Bao et al. 2022, eq. 12)."""
    t, s = torch.cat([STEPS, torch.stack([torch.arange(1, 1000), torch.arange(999)], dim=1)]).T
    found = Analytic(LINEAR, torch.full((1000,), square, dtype=torch.float64))(t, s)
    small = FixedSmall(LINEAR)(t, s)
    a = at(LINEAR, s).sqrt() - ((1 - at(LINEAR, s) - small) * at(LINEAR, t) / (1 - at(LINEAR, t))).sqrt()
    assert (found >= small).all()
    assert (found <= small + a**2 + 1e-12).all()
    if square == 0:
        torch.testing.assert_close(found, small)


def test_analytic_variance_of_the_last_step_is_what_is_not_known_of_x_0() -> None:
    last, clean = torch.tensor([0]), torch.tensor([-1])
    found = Analytic(LINEAR, gaussian_x_0_mse(LINEAR, 0.3))(last, clean)
    assert found.item() == pytest.approx(0.3**2 * 1e-4 / marginal_variance(LINEAR, last, 0.3).item(), rel=1e-6)
    perfect = Analytic(LINEAR, torch.zeros(1000, dtype=torch.float64))(last, clean)
    assert perfect == FixedSmall(LINEAR)(last, clean)


@pytest.mark.parametrize("name", sorted(VARIANCES))
def test_variances_are_finite_and_positive_with_zero_terminal_snr(name: str) -> None:
    made = process(parameterization="v", zero_terminal_snr=True)
    square = gaussian_x_0_mse(made.schedule, 0.5)
    t = torch.arange(1000)
    found = build.variance(name, made, square)(t, t - 1, torch.zeros(1000, 1, 1, 1))
    assert found.dtype == torch.float64
    assert found.isfinite().all()
    assert (found > 0).all()
    assert (found <= 1).all()


def test_analytic_sampling_adds_a_grey_level_of_noise_at_most_in_the_step_to_t_0() -> None:
    x_0_mse = gaussian_x_0_mse(LINEAR, 0.5)
    net = Says("eps", LINEAR, gaussian_x_0_hat(LINEAR, 0.5))
    sampler = sampling.sampler(
        options(variance="analytic"), process(), net, lambda name: build.variance(name, process(), x_0_mse)
    )
    assert isinstance(sampler, Ancestral)
    t, s = torch.tensor([500, 500, 999]), torch.tensor([0, 1, 998])
    plain, found = Analytic(LINEAR, x_0_mse)(t, s).flatten(), sampler.variance(t, s, None).flatten()
    assert found[1:].tolist() == plain[1:].tolist()
    assert (found[0].sqrt() * randn(100_000)).abs().mean().item() == pytest.approx(2 / 255, rel=0.02)


def test_analytic_variance_without_an_estimate_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"^sample\.variance: analytic needs an estimate that this model does not have; use fixed-small"
    ):
        build.variance("analytic", process(), None)

"""Noise schedules against published values, independent formulas and diffusers."""

import math
from collections.abc import Callable

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr
from torch import Tensor

from diffusion.process import schedule
from diffusion.process.schedule import Schedule
from tests.process.fakes import at, mean_of_eq_7, process, randn

MADE = [schedule.linear, schedule.scaled_linear, schedule.cosine, schedule.sigmoid]
Make = Callable[[int], Tensor]


def test_linear_alpha_bar_has_the_papers_values() -> None:
    alpha_bar = Schedule(schedule.linear(1000)).alpha_bar
    assert alpha_bar[-1].item() == pytest.approx(4.03582976538e-5, rel=1e-10)
    assert alpha_bar[499].item() == pytest.approx(0.0785872428818, rel=1e-10)


def test_cosine_alpha_bar_follows_its_formula() -> None:
    alpha_bar = Schedule(schedule.cosine(1000)).alpha_bar
    assert alpha_bar[499].item() == pytest.approx(0.493843590441, rel=1e-10)
    angle = [(t / 1000 + 0.008) / 1.008 * math.pi / 2 for t in range(1000)]  # eq. 17; the last beta is clipped
    expected = torch.tensor([math.cos(a) ** 2 / math.cos(angle[0]) ** 2 for a in angle[1:]], dtype=torch.float64)
    torch.testing.assert_close(alpha_bar[:-1], expected, rtol=1e-9, atol=0)
    assert (1 - alpha_bar[-1] / alpha_bar[-2]).item() == pytest.approx(0.999)


@pytest.mark.parametrize(
    ("made", "name", "first", "last"),
    [
        (schedule.linear, "linear", 1e-4, 0.02),
        (schedule.scaled_linear, "scaled_linear", 0.00085, 0.012),
        (schedule.cosine, "squaredcos_cap_v2", 1e-4, 0.02),
    ],
)
def test_schedules_agree_with_diffusers(made: Make, name: str, first: float, last: float) -> None:
    theirs = DDPMScheduler(1000, beta_schedule=name, beta_start=first, beta_end=last)
    ours = Schedule(made(1000))
    torch.testing.assert_close(ours.beta.float(), theirs.betas, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(ours.alpha_bar.float(), theirs.alphas_cumprod, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("T", [10, 1000])
def test_sigmoid_alpha_bar_follows_its_formula(T: int) -> None:
    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    start, end, tau = -3.0, 3.0, 1.0  # Chen 2023, "On the importance of noise scheduling", algorithm 1
    low, high = sigmoid(start / tau), sigmoid(end / tau)
    gamma = [(high - sigmoid((t / T * (end - start) + start) / tau)) / (high - low) for t in range(1, T)]
    alpha_bar = Schedule(schedule.sigmoid(T)).alpha_bar
    torch.testing.assert_close(alpha_bar[:-1], torch.tensor(gamma, dtype=torch.float64), rtol=1e-9, atol=0)
    assert 0 < alpha_bar[-1] < alpha_bar[-2] / 999


def test_a_schedule_can_be_given() -> None:
    made = process(schedule={"kind": "given", "beta": [0.1, 0.2, 0.5]}, num_timesteps=3).schedule
    torch.testing.assert_close(made.alpha_bar, torch.tensor([0.9, 0.72, 0.36], dtype=torch.float64))


@pytest.mark.parametrize("made", MADE)
@pytest.mark.parametrize("T", [50, 1000])
def test_zero_terminal_snr_agrees_with_diffusers(made: Make, T: int) -> None:
    beta = schedule.zero_terminal(made(T))
    torch.testing.assert_close(beta, rescale_zero_terminal_snr(made(T)), rtol=1e-9, atol=1e-14)
    ours = Schedule(beta)
    assert beta[-1] == 1
    assert ours.alpha_bar[-1] == 0
    assert (ours.alpha_bar[:-1] > 0).all()
    assert beta[0].item() == pytest.approx(made(T)[0].item(), rel=1e-9)


@pytest.mark.parametrize("made", MADE)
@pytest.mark.parametrize("T", [2, 21, 64, 250, 4000])
def test_schedules_end_in_noise_at_any_length(made: Make, T: int) -> None:
    if T == 2 and made in (schedule.linear, schedule.scaled_linear):
        return  # ProcessOptions requires at least 21 of them
    found = Schedule(made(T))
    assert found.num_timesteps == T
    assert (found.beta > 0).all()
    assert (found.beta < 1).all()
    assert (found.alpha_bar.diff() < 0).all()
    # Stable Diffusion's leaves 0.47 % of the image's variance, on purpose or not (Lin et al. 2024).
    assert found.alpha_bar[-1] < (5e-3 if made is schedule.scaled_linear else 6e-4)


def test_alpha_bar_before_the_first_timestep_is_one() -> None:
    found = Schedule(schedule.linear(100))
    alpha_bar = found(torch.tensor([-1, 0, 99]))
    assert alpha_bar.shape == (3, 1, 1, 1)
    assert alpha_bar.flatten().tolist() == [1.0, found.alpha_bar[0].item(), found.alpha_bar[99].item()]
    snr = found.snr(torch.tensor([-1, 0])).flatten()
    assert snr[0] == torch.inf
    assert snr[1].item() == pytest.approx(999)  # beta_0 = 0.001


def test_diffuse_is_equation_4() -> None:
    found = Schedule(schedule.cosine(1000))
    x_0, eps, t = randn(5, 3, 4, 4).float(), randn(5, 3, 4, 4, seed=1).float(), torch.tensor([0, 1, 500, 998, 999])
    for image in range(5):
        a = found.alpha_bar[t[image]]
        expected = a.sqrt() * x_0[image] + (1 - a).sqrt() * eps[image]
        torch.testing.assert_close(found.diffuse(x_0, t, eps)[image], expected.float())


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_the_posterior_is_that_of_bayes_for_any_earlier_timestep(zero_terminal_snr: bool) -> None:
    """q(x_s | x_t, x_0) is proportional to q(x_t | x_s) q(x_s | x_0): precisions add up, means are weighted by them."""
    found = process(zero_terminal_snr=zero_terminal_snr, parameterization="v").schedule
    t, s = torch.tensor([1, 2, 500, 999, 999, 999]), torch.tensor([0, 0, 499, 998, 300, 0])
    x_0, x_t = randn(6, 1, 2, 2), randn(6, 1, 2, 2, seed=1)
    a, b = at(found, t), at(found, s)
    alpha = a / b
    precision = alpha / (1 - alpha) + 1 / (1 - b)
    mean = (alpha.sqrt() / (1 - alpha) * x_t + b.sqrt() / (1 - b) * x_0) / precision
    torch.testing.assert_close(found.posterior_mean(x_0, x_t, t, s), mean)
    torch.testing.assert_close(found.posterior_variance(t, s), 1 / precision)


def test_the_posterior_one_step_earlier_is_equation_7() -> None:
    found = Schedule(schedule.linear(1000))
    t = torch.arange(1000)
    x_0, x_t = randn(1000, 1, 2, 2), randn(1000, 1, 2, 2, seed=1)
    torch.testing.assert_close(found.posterior_mean(x_0, x_t, t, t - 1), mean_of_eq_7(found, x_0, x_t, t))
    beta_tilde = (1 - at(found, t - 1)) / (1 - at(found, t)) * found.beta.view(-1, 1, 1, 1)
    torch.testing.assert_close(found.posterior_variance(t, t - 1), beta_tilde)


def test_equation_7_with_alpha_for_alpha_bar_is_another_mean() -> None:
    """The correct mean leads from q(x_t | x_0) to q(x_{t-1} | x_0); the one that some texts print does not."""
    found = Schedule(schedule.linear(1000))
    t = torch.arange(1, 1000)
    a, before = at(found, t), at(found, t - 1)
    of_x_0, of_x_t = found.posterior_coefficients(t, t - 1)
    torch.testing.assert_close(of_x_0 + of_x_t * a.sqrt(), before.sqrt())
    torch.testing.assert_close(of_x_t**2 * (1 - a) + found.posterior_variance(t, t - 1), 1 - before)
    alpha = found.alpha.view(-1, 1, 1, 1)[1:]
    wrong_of_x_0 = alpha.sqrt() * (1 - alpha) / (1 - a)
    assert ((wrong_of_x_0 + of_x_t * a.sqrt()) / before.sqrt())[-1] > 3  # so many times too much of the image

"""Parameterizations: the exact output gives exact estimates, and diffusers agrees."""

import pytest
import torch
from diffusers import DDPMScheduler

from diffusion.process import build
from diffusion.process.parameterization import split
from tests.process.fakes import PARAMETERIZATIONS, mean_of_eq_7, output, process, randn

SHAPE = (6, 3, 4, 4)
T = torch.tensor([0, 1, 10, 300, 700, 999])
THEIRS = {"eps": "epsilon", "x_0": "sample", "v": "v_prediction"}


def of(name: str, zero_terminal_snr: bool = False) -> build.Process:
    return process(parameterization=name, zero_terminal_snr=zero_terminal_snr)


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
@pytest.mark.parametrize("name", PARAMETERIZATIONS)
def test_the_target_gives_back_image_noise_and_mean(name: str, zero_terminal_snr: bool) -> None:
    if zero_terminal_snr and name == "eps":
        return  # ProcessOptions forbids it
    made = of(name, zero_terminal_snr)
    x_0, eps = randn(*SHAPE), randn(*SHAPE, seed=1)
    x_t = made.schedule.diffuse(x_0, T, eps)
    target = made.parameterization.target(x_0, eps, T)
    close = {"rtol": 1e-6, "atol": 1e-8}
    torch.testing.assert_close(target, output(name, made.schedule, x_0, x_t, T), **close)
    torch.testing.assert_close(made.parameterization.to_x_0(target, x_t, T), x_0, **close)
    torch.testing.assert_close(made.parameterization.to_eps(target, x_t, T), eps, **close)
    mean = mean_of_eq_7(made.schedule, x_0, x_t, T)
    torch.testing.assert_close(made.parameterization.to_mu(target, x_t, T), mean, **close)


@pytest.mark.parametrize("name", PARAMETERIZATIONS)
def test_any_output_means_the_same_image_noise_and_mean(name: str) -> None:
    """For arbitrary outputs: x_0, eps and mu are consistent, and the output is recovered from them."""
    made = of(name)
    x_t, out = randn(*SHAPE), randn(*SHAPE, seed=1)
    x_0 = made.parameterization.to_x_0(out, x_t, T)
    torch.testing.assert_close(output(name, made.schedule, x_0, x_t, T), out)
    torch.testing.assert_close(made.parameterization.to_eps(out, x_t, T), output("eps", made.schedule, x_0, x_t, T))
    torch.testing.assert_close(made.parameterization.to_mu(out, x_t, T), output("mu", made.schedule, x_0, x_t, T))


@pytest.mark.parametrize(("name", "theirs"), THEIRS.items())
def test_estimates_agree_with_diffusers(name: str, theirs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda shape, **_: torch.zeros(shape))
    made = of(name)
    scheduler = DDPMScheduler(1000, prediction_type=theirs, clip_sample=False)
    scheduler.alphas_cumprod, scheduler.one = made.schedule.alpha_bar, torch.ones((), dtype=torch.float64)
    x_t, out = randn(*SHAPE), randn(*SHAPE, seed=1)
    for image, t in enumerate(T.tolist()):
        one = slice(image, image + 1)
        step = scheduler.step(out[one], t, x_t[one])
        x_0 = made.parameterization.to_x_0(out[one], x_t[one], T[one])
        mu = made.parameterization.to_mu(out[one], x_t[one], T[one])
        torch.testing.assert_close(x_0, step.pred_original_sample)
        torch.testing.assert_close(mu, step.prev_sample)


def test_the_targets_are_the_papers() -> None:
    x_0, eps = randn(*SHAPE), randn(*SHAPE, seed=1)
    a = of("v").schedule.alpha_bar[T].view(-1, 1, 1, 1)
    assert of("eps").parameterization.target(x_0, eps, T) is eps
    torch.testing.assert_close(of("x_0").parameterization.target(x_0, eps, T), x_0)
    torch.testing.assert_close(of("v").parameterization.target(x_0, eps, T), a.sqrt() * eps - (1 - a).sqrt() * x_0)


@pytest.mark.parametrize("name", PARAMETERIZATIONS)
def test_the_mean_is_that_of_eq_11(name: str) -> None:
    """mu = (x_t - beta_t / sqrt(1 - alpha_bar_t) eps) / sqrt(alpha_t), from the output as eps; Ho et al. 2020."""
    made = of(name)
    x_t, out = randn(*SHAPE), randn(*SHAPE, seed=1)
    beta, a = made.schedule.beta[T].view(-1, 1, 1, 1), made.schedule.alpha_bar[T].view(-1, 1, 1, 1)
    eps = made.parameterization.to_eps(out, x_t, T)
    mu = (x_t - beta / (1 - a).sqrt() * eps) / (1 - beta).sqrt()
    torch.testing.assert_close(made.parameterization.to_mu(out, x_t, T), mu)
    if name == "mu":  # the output is the mean itself, so that eps is eq. 11 solved for it
        torch.testing.assert_close(eps, (x_t - (1 - beta).sqrt() * out) * (1 - a).sqrt() / beta)


def test_output_is_split_into_the_parameterized_part_and_the_variance_fraction() -> None:
    out = randn(*SHAPE)
    same, nothing = split(out, 3)
    assert same.shape == SHAPE
    assert nothing is None
    mean, fraction = split(torch.cat([out, 2 * out], dim=1), 3)
    assert fraction is not None
    assert mean.equal(out)
    assert fraction.equal(2 * out)

"""Weightings: the same loss for any parameterization, and the weights of the papers."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from diffusion.process import build
from diffusion.process.loss import LOSSES
from diffusion.process.weighting import WEIGHTINGS
from tests.process.fakes import PARAMETERIZATIONS, Says, always, at, mean_of_eq_7, output, process, randn, some_x_0_hat

SHAPE = (7, 2, 4, 4)
T = torch.tensor([0, 1, 2, 100, 500, 900, 999])
X_0, EPS = randn(*SHAPE).clamp(-1, 1), randn(*SHAPE, seed=1)


def loss_of(made: build.Process, name: str) -> Tensor:
    return made.loss(Says(name, made.schedule, some_x_0_hat), X_0, T, EPS)


def errors(made: build.Process, name: str) -> Tensor:
    """Mean squared error of the output `name`, (B,), computed from outputs only."""
    x_t = made.schedule.diffuse(X_0, T, EPS)
    outputs = [output(name, made.schedule, x_0, x_t, T) for x_0 in (X_0, some_x_0_hat(x_t, T))]
    return (outputs[0] - outputs[1]).square().mean(dim=(1, 2, 3))


@pytest.mark.parametrize("kind", sorted(LOSSES))
@pytest.mark.parametrize("weighting", sorted(WEIGHTINGS))
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_weighting_is_the_same_loss_for_every_parameterization(schedule: str, weighting: str, kind: str) -> None:
    losses = [
        loss_of(process(schedule=schedule, parameterization=name, weighting=weighting, loss=kind), name)
        for name in PARAMETERIZATIONS
    ]
    for loss in losses:
        assert loss.isfinite().all()
        assert (loss > 0).all()
        torch.testing.assert_close(loss, losses[0], rtol=1e-6, atol=0)


@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)
@pytest.mark.parametrize(
    ("weighting", "plain"), [("simple", "eps"), ("snr", "eps"), ("snr-plus-one", "v"), ("posterior-mean", "mu")]
)
def test_three_weightings_are_the_plain_error_of_an_output(weighting: str, plain: str, parameterization: str) -> None:
    made = process(parameterization=parameterization, weighting=weighting)
    torch.testing.assert_close(loss_of(made, parameterization), errors(made, plain), rtol=1e-6, atol=0)


@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)
def test_vlb_is_the_divergence_of_the_bound(parameterization: str) -> None:
    """KL of two normal distributions with variance beta_tilde: (mu_tilde - mu)^2 / (2 beta_tilde), in nats."""
    made = process(parameterization=parameterization, weighting="vlb")
    x_t = made.schedule.diffuse(X_0, T, EPS)
    beta, a, before = made.schedule.beta[T].view(-1, 1, 1, 1), at(made.schedule, T), at(made.schedule, T - 1)
    means = [mean_of_eq_7(made.schedule, x_0, x_t, T) for x_0 in (X_0, some_x_0_hat(x_t, T))]
    divergence = (means[0] - means[1]) ** 2 / (2 * (1 - before) / (1 - a) * beta)
    loss = loss_of(made, parameterization)
    torch.testing.assert_close(loss[1:], divergence.mean(dim=(1, 2, 3))[1:], rtol=1e-6, atol=0)
    # Of the noise it is eq. 12 of Ho et al. 2020, with sigma^2 = beta_tilde.
    weight = (beta**2 / (2 * (1 - before) / (1 - a) * beta * (1 - beta) * (1 - a))).flatten()
    torch.testing.assert_close(loss[1:], (weight * errors(made, "eps"))[1:], rtol=1e-6, atol=0)


@pytest.mark.parametrize(("weighting", "variance"), [("vlb", "posterior"), ("vlb-large", "beta")])
@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)
def test_the_bounds_weightings_are_what_a_wrong_mean_adds_to_the_divergence(
    parameterization: str, weighting: str, variance: str
) -> None:
    """L_{t-1} without C of Ho et al. 2020, eq. 8: the divergence minus that of a model with the true mean."""
    made = process(parameterization=parameterization, weighting=weighting)
    x_t, beta, a = made.schedule.diffuse(X_0, T, EPS), made.schedule.beta[T].view(-1, 1, 1, 1), at(made.schedule, T)
    posterior = (1 - at(made.schedule, T - 1)) / (1 - a) * beta
    sigma_2 = posterior if variance == "posterior" else beta
    true, wrong = (mean_of_eq_7(made.schedule, x_0, x_t, T)[1:] for x_0 in (X_0, some_x_0_hat(x_t, T)))
    q = Normal(true, posterior[1:].sqrt())
    added = kl_divergence(q, Normal(wrong, sigma_2[1:].sqrt())) - kl_divergence(q, Normal(true, sigma_2[1:].sqrt()))
    loss = loss_of(made, parameterization)
    torch.testing.assert_close(loss[1:], added.mean(dim=(1, 2, 3)), rtol=1e-6, atol=0)
    if variance == "beta":  # eq. 12 of the noise; with beta_t it is finite at t = 0 as well
        weight = beta**2 / (2 * sigma_2 * (1 - beta) * (1 - a))
        torch.testing.assert_close(loss, weight.flatten() * errors(made, "eps"), rtol=1e-6, atol=0)


def test_before_the_first_timestep_vlb_takes_the_ratio_of_the_second() -> None:
    """SNR_{-1} is infinite and replaced by SNR_0^2 / SNR_1."""
    made = process(parameterization="x_0", weighting="vlb")
    first, second = (made.schedule.alpha_bar[:2] / (1 - made.schedule.alpha_bar[:2])).tolist()
    weight = made.loss.scale(torch.tensor([0])).item() ** 2
    assert weight == pytest.approx((first * first / second - first) / 2)


@pytest.mark.parametrize(
    ("weighting", "parameterization", "expected"),
    [
        # Hang et al. 2023, as diffusers' training scripts have it: a clamped SNR over SNR for eps, over SNR + 1 for v.
        ("min-snr", "eps", lambda snr: torch.minimum(snr, torch.full_like(snr, 5.0)) / snr),
        ("min-snr", "v", lambda snr: torch.minimum(snr, torch.full_like(snr, 5.0)) / (snr + 1)),
        ("min-snr", "x_0", lambda snr: torch.minimum(snr, torch.full_like(snr, 5.0))),
        ("truncated-snr", "x_0", lambda snr: torch.maximum(snr, torch.ones_like(snr))),
        ("truncated-snr", "eps", lambda snr: torch.maximum(1 / snr, torch.ones_like(snr))),
        ("p2", "eps", lambda snr: 1 / (1 + snr)),
        ("simple", "eps", lambda snr: snr**0),
    ],
)
def test_weights_are_the_papers(weighting: str, parameterization: str, expected: Callable[[Tensor], Tensor]) -> None:
    made = process(parameterization=parameterization, weighting=weighting)
    snr = made.schedule.alpha_bar[T] / (1 - made.schedule.alpha_bar[T])
    torch.testing.assert_close(loss_of(made, parameterization), expected(snr) * errors(made, parameterization))


@pytest.mark.parametrize("learned_variance", [False, True])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("weighting", ["snr-plus-one", "truncated-snr"])
@pytest.mark.parametrize("parameterization", ["x_0", "v", "mu"])
def test_losses_and_gradients_are_finite_with_zero_terminal_snr(
    parameterization: str, weighting: str, schedule: str, learned_variance: bool
) -> None:
    made = process(schedule=schedule, parameterization=parameterization, weighting=weighting, zero_terminal_snr=True)
    t = torch.arange(0, 1000, 27)  # 0, 27, ..., 999
    x_0, eps = randn(len(t), 1, 2, 2).float().clamp(-1, 1), randn(len(t), 1, 2, 2, seed=1).float()
    out = torch.zeros(len(t), 2 if learned_variance else 1, 2, 2, requires_grad=True)
    loss = made.loss(always(out), x_0, t, eps)
    loss.sum().backward()
    assert t[-1] == 999
    assert made.loss.scale(t)[-1] > 0  # where sampling begins
    assert loss.isfinite().all()
    assert out.grad is not None
    assert out.grad.isfinite().all()

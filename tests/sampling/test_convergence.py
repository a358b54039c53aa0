"""Samplers against the closed forms of Gaussian data: the exact reverse ODE, its orders, and the data's variance."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from diffusion.process import build
from diffusion.process.denoiser import unbounded
from diffusion.process.variance import Analytic, FixedLarge, FixedSmall
from diffusion.sampling import build as sampling
from diffusion.sampling.sampler import Ancestral, Sampler, sample, trajectory
from diffusion.sampling.spacing import SPACINGS
from tests.process.fakes import (
    SAMPLERS,
    Says,
    gaussian_x_0_hat,
    gaussian_x_0_mse,
    marginal_variance,
    noise,
    options,
    process,
    randn,
)

STD = 0.5
UNDISTILLED = [changes for changes in SAMPLERS if "gamma" not in str(changes)]
"""New noise around the mean of all images, as `consistency` adds it, loses their variance at every step."""


def optimal(made: build.Process, name: str = "eps", std: float = STD, **changes: object) -> Sampler:
    """A sampler over the exact denoiser of N(0, std^2)."""
    net, square = (
        Says(name, made.schedule, gaussian_x_0_hat(made.schedule, std)),
        gaussian_x_0_mse(made.schedule, std),
    )
    return sampling.sampler(options(**changes), made, net, lambda variance: build.variance(variance, made, square))


def error(made: build.Process, sampler: str, steps: int) -> float:
    """Relative error at t = 0 of the way from T - 1, evenly in log SNR.

    The reverse ODE carries each x_t along as sqrt(Var(x_t)) goes: x_s = x_t sqrt(Var(x_s) / Var(x_t)).
    """
    x_t, T = randn(1, 1, 1, 1), made.schedule.num_timesteps
    timesteps = SPACINGS["log-snr"](made.schedule, steps)
    points = list(trajectory(optimal(made, sampler=sampler), noise(1, 1, 1, 1), timesteps, x_t))
    variance = marginal_variance(made.schedule, torch.tensor([0, T - 1]), STD)
    exact = x_t * (variance[0] / variance[1]).sqrt()
    assert points[-2].t == 0
    return (points[-2].x_t / exact - 1).abs().item()


@pytest.mark.parametrize(("sampler", "order"), [("ddim", 1), ("dpm-solver++", 2), ("heun", 2)])
def test_orders_of_convergence(sampler: str, order: int) -> None:
    """Doubling the steps halves the error, or reduces it to a quarter."""
    made = process(num_timesteps=4000)  # long, so that steps are even in log SNR
    errors = [error(made, sampler, steps) for steps in (41, 81, 161)]
    for coarse, fine in pairwise(errors):
        assert coarse / fine == pytest.approx(2**order, rel=0.1)
    assert errors[-1] < (0.02 if order == 1 else 1e-3)


def test_second_order_is_nearer_to_the_exact_ode_than_first() -> None:
    made = process()
    for steps in (20, 40, 80):
        first = error(made, "ddim", steps)
        assert error(made, "dpm-solver++", steps) < first / 5
        assert error(made, "heun", steps) < first / 3


@pytest.mark.parametrize("schedule", ["linear", "cosine", "sigmoid"])
@pytest.mark.parametrize("changes", UNDISTILLED, ids=lambda changes: "-".join(str(value) for value in changes.values()))
def test_gaussian_data_are_sampled_with_their_own_variance(changes: dict[str, object], schedule: str) -> None:
    made, std = process(schedule=schedule, num_timesteps=250), 0.2
    timesteps = sampling.sampling_timesteps(options(steps=250), made.schedule)
    x = sample(optimal(made, std=std, **changes), noise(10_000, 1, 1, 1), timesteps)
    assert x.mean().item() == pytest.approx(0, abs=0.01)
    assert x.std().item() == pytest.approx(std, rel=0.07)  # fixed-small is 6 % short with so many steps


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
@pytest.mark.parametrize("steps", [1, 2, 4, 20])
def test_new_noise_around_the_end_of_the_trajectory_keeps_the_variance(steps: int, zero_terminal_snr: bool) -> None:
    """In any number of steps: the reverse ODE carries x_t to x_0 = x_t std / sqrt(Var(x_t)), of the data's variance.

    The sampler is linear then, and the variance is the sum of the squared coefficients of all draws, its unit vectors.
    """
    made = process(schedule="cosine", parameterization="v", zero_terminal_snr=zero_terminal_snr)

    def end(x_t: Tensor, t: Tensor) -> Tensor:
        return x_t * STD / marginal_variance(made.schedule, t, STD).sqrt()

    def unit(draw: int) -> Tensor:
        return torch.eye(steps + 1, dtype=torch.float64)[draw].view(1, 1, 1, -1)

    chosen = options(sampler={"kind": "consistency", "gamma": 1.0}, steps=steps, spacing="angle")
    net = Says("v", made.schedule, end)
    sampler = sampling.sampler(chosen, made, net, lambda name: build.variance(name, made, None))
    timesteps = sampling.sampling_timesteps(chosen, made.schedule)
    # x_T stands for noise of variance 1, which it has without a mean if nothing of the image is left.
    x_t = unit(0) * marginal_variance(made.schedule, torch.tensor(timesteps[:1]), STD).sqrt()
    for point in trajectory(sampler, unit, timesteps, x_t):
        variance = marginal_variance(made.schedule, torch.tensor([point.t]), STD)
        torch.testing.assert_close(point.x_t.square().sum(), variance.squeeze())


@pytest.mark.parametrize("steps", [2, 5, 20])
def test_few_steps_with_the_true_variance_are_as_good_as_many(steps: int) -> None:
    """The purpose of Analytic-DPM: for long steps the fixed variances are far too small or too large."""
    made = process()
    denoiser = made.denoiser(Says("eps", made.schedule, gaussian_x_0_hat(made.schedule, STD)), unbounded)
    x_0_mse, timesteps = gaussian_x_0_mse(made.schedule, STD), SPACINGS["linspace"](made.schedule, steps)
    small, true, large = (
        sample(Ancestral(denoiser, found), noise(20_000, 1, 1, 1), timesteps).std().item()
        for found in (FixedSmall(made.schedule), Analytic(made.schedule, x_0_mse), FixedLarge(made.schedule))
    )
    assert true == pytest.approx(STD, rel=0.015)
    assert small < 0.8 * STD
    assert large > 1.08 * STD

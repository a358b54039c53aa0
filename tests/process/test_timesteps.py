"""Timestep samplers: their distributions, their weights, and what they remember."""

import math

import pytest
import torch
from scipy import stats
from torch import Tensor

from diffusion.data import noise
from diffusion.process import build
from diffusion.process.timesteps import LogSnrNormal, LossSecondMoment, Stratified, Uniform
from tests.process.fakes import process

T = 100


def pairs(count: int, num_timesteps: int = T) -> tuple[Tensor, Tensor]:
    """The pairs' timesteps of `count` blocks, and independent uniform numbers."""
    blocks = [noise.timesteps(3, "train", block, 0, num_timesteps) for block in range(count)]
    t = torch.cat([torch.from_numpy(block) for block in blocks])
    return t, torch.rand(len(t), generator=torch.Generator().manual_seed(4))


def grid(num_timesteps: int, parts: int) -> tuple[Tensor, Tensor]:
    """Every t with `parts` numbers u evenly in [0, 1): what a draw's mean over it is, is its expectation."""
    t = torch.arange(num_timesteps).repeat_interleave(parts)
    return t, ((torch.arange(parts) + 0.5) / parts).repeat(num_timesteps)


def taught(num_timesteps: int, rounds: int = 10) -> tuple[LossSecondMoment, Tensor]:
    """One that has seen losses of 1 + t + 0.1 round at every t, and the root mean square of the last ten."""
    sampler, t = LossSecondMoment(num_timesteps), torch.arange(num_timesteps)
    seen = [1 + t.double() + 0.1 * index for index in range(rounds)]
    for loss in seen:
        sampler.observe(t, loss)
    return sampler, torch.stack(seen[-10:]).square().mean(dim=0).sqrt()


def test_stratified_are_the_pairs_own() -> None:
    t, u = pairs(1)
    drawn, weight = Stratified().draw(t, u)
    assert drawn.equal(t)
    assert weight.equal(torch.ones(64))


def test_uniform_are_independent_of_the_pairs() -> None:
    u = torch.tensor([0.0, 0.0099, 0.01, 0.5, 0.99, 1 - 2**-24])
    drawn, weight = Uniform(T).draw(torch.zeros(6, dtype=torch.int64), u)
    assert drawn.tolist() == [0, 0, 1, 50, 99, 99]
    assert drawn.dtype == torch.int64
    assert weight.equal(torch.ones(6))
    t, u = pairs(400)
    drawn, _ = Uniform(T).draw(t, u)
    assert stats.chisquare(drawn.bincount(minlength=T)).pvalue > 1e-3


@pytest.mark.parametrize("name", sorted(build.TIMESTEPS))
def test_every_sampler_gives_timesteps_in_range(name: str) -> None:
    made = process(parameterization="v", zero_terminal_snr=True)
    sampler = build.TIMESTEPS[name](made.schedule)
    t, u = pairs(4, 1000)
    u[0], u[1], t[0], t[1] = 0, 1 - 2**-24, 0, 999
    drawn, weight = sampler.draw(t, u)
    sampler.observe(drawn, torch.rand(len(drawn)))
    assert drawn.shape == weight.shape == t.shape
    assert drawn.dtype == torch.int64
    assert weight.dtype == u.dtype
    assert drawn.min() >= 0
    assert drawn.max() <= 999


def test_loss_second_moment_is_uniform_until_every_timestep_has_ten_losses() -> None:
    sampler, _ = taught(T, rounds=9)
    sampler.observe(torch.arange(T - 1), torch.full((T - 1,), 1e6))
    t, u = pairs(4)
    drawn, weight = sampler.draw(t, u)
    assert drawn.equal(t)
    torch.testing.assert_close(weight, torch.ones(len(t)))
    assert LossSecondMoment(64).draw(torch.arange(64), torch.zeros(64))[0].equal(torch.arange(64))
    sampler.observe(torch.tensor([T - 1]), torch.ones(1))
    assert not sampler.draw(t, u)[0].equal(t)


@pytest.mark.parametrize("rounds", [10, 25])
def test_loss_second_moment_draws_by_the_root_mean_square_of_the_last_ten_losses(rounds: int) -> None:
    sampler, root = taught(T, rounds)
    expected = 0.999 * root / root.sum() + 0.001 / T
    torch.testing.assert_close(sampler.probability(), expected)
    t, u = grid(T, 500)
    drawn, weight = sampler.draw(t, u)
    frequency = drawn.bincount(minlength=T).double() / len(drawn)
    torch.testing.assert_close(frequency, expected, atol=2 / len(drawn), rtol=0)
    torch.testing.assert_close(weight.double(), 1 / (T * expected[drawn]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["stratified", "uniform", "loss-second-moment"])
def test_the_weighted_loss_has_the_expectation_of_uniform_timesteps(name: str) -> None:
    """E[weight f(t)] is the mean of f, for any f: exactly so over all (t, u)."""
    made = process(schedule="cosine", num_timesteps=T).schedule
    sampler = taught(T)[0] if name == "loss-second-moment" else build.TIMESTEPS[name](made)
    t, u = grid(T, 400) if name == "loss-second-moment" else grid(T, T)
    drawn, weight = sampler.draw(t, u)
    for f in (torch.ones(T), torch.arange(T) / T, torch.sin(torch.arange(T) / 10), 1 / (1 + torch.arange(T))):
        assert (weight * f[drawn]).mean().item() == pytest.approx(f.mean().item(), abs=2e-4)


def test_several_losses_of_one_timestep_in_a_batch_are_all_remembered() -> None:
    sampler = LossSecondMoment(2)
    sampler.observe(torch.tensor([0] * 10 + [1] * 10), torch.tensor([1.0] * 10 + [3.0] * 5 + [4.0] * 5))
    root = torch.tensor([1, math.sqrt((9 + 16) / 2)], dtype=torch.float64)
    torch.testing.assert_close(sampler.probability(), 0.999 * root / root.sum() + 0.0005)


def test_loss_second_moment_goes_on_where_it_was() -> None:
    sampler, _ = taught(T, rounds=13)
    other = LossSecondMoment(T)
    other.load_state_dict(sampler.state_dict())
    for one in (sampler, other):
        one.observe(torch.arange(T), torch.linspace(5, 1, T))
    assert other.probability().equal(sampler.probability())
    assert not LogSnrNormal(process().schedule).state_dict()  # of the schedule alone: nothing to remember


def test_log_snr_normal_has_edms_distribution() -> None:
    made = process().schedule
    sampler = LogSnrNormal(made)
    assert sampler.probability.sum().item() == pytest.approx(1)
    t, u = pairs(800, 1000)
    drawn, weight = sampler.draw(t, u)
    assert weight.equal(torch.ones(len(t)))
    log_snr = (made.alpha_bar / (1 - made.alpha_bar)).log()[drawn]
    # The distribution function, at some timesteps half-way to the next.
    edges = (made.alpha_bar / (1 - made.alpha_bar)).log()
    for at in (1, 10, 50, 100, 300, 500, 900):
        edge = (edges[at] + edges[at + 1]).item() / 2
        expected = stats.norm.sf(edge, 2.4, 2.4)  # log sigma ~ N(-1.2, 1.2^2), log SNR = -2 log sigma
        assert (log_snr > edge).double().mean().item() == pytest.approx(expected, abs=2e-3)
    low, high = (edges[-1] - 2.4) / 2.4, (edges[0] - 2.4) / 2.4
    assert log_snr.mean().item() == pytest.approx(stats.truncnorm(low, high, 2.4, 2.4).mean(), abs=0.03)
    assert log_snr.std().item() == pytest.approx(stats.truncnorm(low, high, 2.4, 2.4).std(), abs=0.03)


def test_log_snr_normal_never_draws_pure_noise() -> None:
    sampler = LogSnrNormal(process(parameterization="v", zero_terminal_snr=True).schedule)
    assert sampler.probability.isfinite().all()
    assert (sampler.probability >= 0).all()
    assert sampler.probability[-1] == 0
    assert sampler.draw(*grid(1000, 10))[0].max() < 999


@pytest.mark.parametrize("name", ["loss-second-moment", "log-snr-normal"])
def test_what_is_drawn_by_probability_is_still_stratified(name: str) -> None:
    """The spread of a block's mean of a smooth function of t is far less than that of independent draws."""
    made = process(num_timesteps=1000).schedule
    sampler = taught(1000)[0] if name == "loss-second-moment" else LogSnrNormal(made)
    t, u = pairs(200, 1000)
    values = sampler.draw(t, u)[0].double().view(200, 64)
    assert values.mean(dim=1).std() < 0.25 * values.std() / 8

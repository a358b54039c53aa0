"""Timestep samplers: distributions, weights and loss history."""

import math
from collections import defaultdict

import pytest
import torch
from scipy import stats
from torch import Tensor

from diffusion.pairs import noise
from diffusion.process.timesteps import TIMESTEPS, Angle, LogSnrNormal, LossAware, Stored, Uniform
from tests.process.fakes import process

T = 100


def pairs(count: int, num_timesteps: int = T) -> tuple[Tensor, Tensor]:
    """The pairs' timesteps of `count` blocks, and independent uniform numbers."""
    blocks = [noise.timesteps(3, "train", block, 0, num_timesteps) for block in range(count)]
    t = torch.cat([torch.from_numpy(block) for block in blocks])
    return t, torch.rand(len(t), generator=torch.Generator().manual_seed(4))


def grid(num_timesteps: int, parts: int) -> tuple[Tensor, Tensor]:
    """Every t with `parts` evenly spaced u in [0, 1), so that the mean over the draws is the expectation."""
    t = torch.arange(num_timesteps).repeat_interleave(parts)
    return t, ((torch.arange(parts) + 0.5) / parts).repeat(num_timesteps)


def taught(num_timesteps: int, power: int = 2, rounds: int = 64) -> tuple[LossAware, Tensor]:
    """A sampler that has observed losses of 1 + t + 0.1 round at every t, and the expected probabilities."""
    sampler, t = LossAware(num_timesteps, power), torch.arange(num_timesteps)
    seen: dict[int, list[float]] = defaultdict(list)
    strata = min(64, num_timesteps)
    for index in range(rounds):
        loss = 1 + t.double() + 0.1 * index
        sampler.observe(t, loss)
        for at, value in zip(t.tolist(), loss.tolist(), strict=True):
            seen[math.floor(at * strata / num_timesteps)].append(value)
    means = [sum(value**power for value in seen[stratum][-64:]) / 64 for stratum in range(strata)]
    root = torch.tensor([math.sqrt(means[math.floor(at * strata / num_timesteps)]) for at in range(num_timesteps)])
    return sampler, 0.999 * root.double() / root.double().sum() + 0.001 / num_timesteps


def test_stored_uses_the_timesteps_of_the_pairs() -> None:
    t, u = pairs(1)
    drawn, weight = Stored().draw(t, u)
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


@pytest.mark.parametrize("name", sorted(TIMESTEPS))
def test_every_sampler_gives_timesteps_in_range(name: str) -> None:
    made = process(parameterization="v", zero_terminal_snr=True)
    sampler = TIMESTEPS[name](made.schedule)
    t, u = pairs(4, 1000)
    u[0], u[1], t[0], t[1] = 0, 1 - 2**-24, 0, 999
    drawn, weight = sampler.draw(t, u)
    sampler.observe(drawn, u[: len(drawn)])
    assert drawn.shape == weight.shape == t.shape
    assert drawn.dtype == torch.int64
    assert weight.dtype == u.dtype
    assert drawn.min() >= 0
    assert drawn.max() <= 999


@pytest.mark.parametrize("power", [1, 2])
def test_by_loss_is_uniform_until_every_stratum_has_been_seen_often_enough(power: int) -> None:
    sampler, _ = taught(64, power, rounds=63)
    sampler.observe(torch.arange(63), torch.full((63,), 1e6))
    t, u = pairs(4, 64)
    drawn, weight = sampler.draw(t, u)
    assert drawn.equal(t)
    torch.testing.assert_close(weight, torch.ones(len(t)))
    sampler.observe(torch.tensor([63]), torch.ones(1))
    assert not sampler.draw(t, u)[0].equal(t)


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("rounds", [64, 100])
def test_by_loss_draws_by_the_root_of_the_mean_of_the_last_losses(rounds: int, power: int) -> None:
    sampler, expected = taught(T, power, rounds)
    torch.testing.assert_close(sampler.probability(), expected, rtol=1e-6, atol=0)
    t, u = grid(T, 500)
    drawn, weight = sampler.draw(t, u)
    frequency = drawn.bincount(minlength=T).double() / len(drawn)
    torch.testing.assert_close(frequency, expected, atol=2 / len(drawn), rtol=0)
    torch.testing.assert_close(weight.double(), 1 / (T * expected[drawn]), rtol=1e-6, atol=0)


def test_the_root_mean_square_error_is_the_best_choice_for_errors_of_that_size() -> None:
    """The weighted gradient of a squared error, error x weight, varies less than with any other choice."""
    size = torch.linspace(0.02, 1, T, dtype=torch.float64)  # of the error at t
    spreads = []
    for sampler in (LossAware(T, 1), LossAware(T, 2), Uniform(T)):
        for _ in range(64):
            sampler.observe(torch.arange(T), size.square())
        drawn, weight = sampler.draw(*grid(T, 400))
        spreads.append((weight.double() * size[drawn]).std().item())
    assert spreads[0] < 0.1 * min(spreads[1:])


@pytest.mark.parametrize("name", ["stored", "uniform", "rms-error", "loss-second-moment"])
def test_the_weighted_loss_has_the_expectation_of_uniform_timesteps(name: str) -> None:
    """E[weight f(t)] is the mean of f for any f, exactly over all (t, u)."""
    made = process(schedule="cosine", num_timesteps=T).schedule
    powers = {"rms-error": 1, "loss-second-moment": 2}
    sampler = taught(T, powers[name])[0] if name in powers else TIMESTEPS[name](made)
    t, u = grid(T, 400) if name in powers else grid(T, T)
    drawn, weight = sampler.draw(t, u)
    for f in (torch.ones(T), torch.arange(T) / T, torch.sin(torch.arange(T) / 10), 1 / (1 + torch.arange(T))):
        assert (weight * f[drawn]).mean().item() == pytest.approx(f.mean().item(), abs=2e-4)


def test_several_losses_of_one_stratum_in_a_batch_are_all_remembered() -> None:
    sampler = LossAware(2, power=2)
    sampler.observe(torch.tensor([0] * 64 + [1] * 64), torch.tensor([1.0] * 64 + [3.0] * 32 + [4.0] * 32))
    root = torch.tensor([1, math.sqrt((9 + 16) / 2)], dtype=torch.float64)
    torch.testing.assert_close(sampler.probability(), 0.999 * root / root.sum() + 0.0005)


def test_equal_losses_draw_the_pairs_own_timesteps() -> None:
    """Then every probability is 1 / T, here exactly, and the quantile function returns t."""
    sampler, t = LossAware(64, power=1), torch.arange(64)
    for _ in range(2):
        for u in (0.0, 0.5):
            chosen, weight = sampler.draw(t, torch.full((64,), u))
            assert chosen.tolist() == t.tolist()
            torch.testing.assert_close(weight, torch.ones(64))
        almost_one = torch.full((64,), 1 - 2**-53, dtype=torch.float64)  # 63 and this are rounded to 64
        assert sampler.draw(t, almost_one)[0].max() == 63
        assert sampler.probability().dtype == torch.float64
        for _ in range(64):
            sampler.observe(t, torch.ones(64))


def test_loss_aware_sampling_continues_from_its_saved_state() -> None:
    sampler, _ = taught(T, rounds=70)
    other = LossAware(T, power=2)
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


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
@pytest.mark.parametrize(("schedule", "num_timesteps"), [("linear", 100), ("cosine", 3), ("sigmoid", 1000)])
def test_half_of_angle_are_at_the_start_and_half_uniform_in_arctan_sigma(
    schedule: str, num_timesteps: int, zero_terminal_snr: bool
) -> None:
    """The angle drawn, rounded up to that of a timestep, is uniform on [0, angle of T - 1]."""
    made = process(
        schedule=schedule, num_timesteps=num_timesteps, parameterization="v", zero_terminal_snr=zero_terminal_snr
    ).schedule
    angles = [math.atan(math.sqrt((1 - a) / a)) if a else math.pi / 2 for a in made.alpha_bar.tolist()]
    expected = [(b - a) / angles[-1] / 2 for a, b in zip([0.0, *angles], angles, strict=False)]
    expected[-1] += 0.5
    sampler = Angle(made)
    torch.testing.assert_close(sampler.probability, torch.tensor(expected, dtype=torch.float64))
    t, u = grid(num_timesteps, 400)
    drawn, weight = sampler.draw(t, u)
    assert weight.equal(torch.ones(len(t)))
    frequency = drawn.bincount(minlength=num_timesteps).double() / len(drawn)
    torch.testing.assert_close(frequency, sampler.probability, atol=2 / len(drawn), rtol=0)
    assert not sampler.learns
    assert not sampler.state_dict()


@pytest.mark.parametrize("name", ["loss-second-moment", "log-snr-normal", "angle"])
def test_what_is_drawn_by_probability_is_still_stratified(name: str) -> None:
    """The spread of a block's mean of a smooth function of t is far less than that of independent draws."""
    made = process(num_timesteps=1000).schedule
    sampler = taught(1000)[0] if name == "loss-second-moment" else TIMESTEPS[name](made)
    t, u = pairs(200, 1000)
    values = sampler.draw(t, u)[0].double().view(200, 64)
    assert values.mean(dim=1).std() < 0.25 * values.std() / 8

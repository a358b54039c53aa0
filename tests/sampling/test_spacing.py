"""The timesteps that samplers visit."""

import math

import pytest
import torch

from diffusion.sampling import build as sampling
from diffusion.sampling import spacing
from diffusion.sampling.spacing import SPACINGS
from tests.process.fakes import options, process


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
@pytest.mark.parametrize("schedule", ["linear", "scaled-linear", "cosine", "sigmoid"])
@pytest.mark.parametrize("name", sorted(SPACINGS))
@pytest.mark.parametrize("T", [21, 128])
def test_any_number_of_different_descending_timesteps(
    name: str, schedule: str, zero_terminal_snr: bool, T: int
) -> None:
    made = process(schedule=schedule, num_timesteps=T, zero_terminal_snr=zero_terminal_snr, parameterization="v")
    for steps in range(1, T + 1):
        timesteps = sampling.sampling_timesteps(options(spacing=name, steps=steps), made.schedule)
        assert len(timesteps) == steps
        assert timesteps == sorted(set(timesteps), reverse=True)
        assert timesteps[0] == T - 1
        assert all(isinstance(t, int) for t in timesteps)
        assert steps == 1 or timesteps[-1] == 0 or name == "angle"
    assert timesteps == list(range(T - 1, -1, -1))


def test_linspace_goes_evenly_from_the_last_timestep_to_the_first() -> None:
    made = process().schedule
    assert spacing.linspace(made, 4) == [999, 666, 333, 0]
    assert spacing.linspace(made, 1) == [999]
    assert spacing.linspace(made, 1000) == list(range(999, -1, -1))
    assert spacing.linspace(made, 28) == list(range(999, -1, -37))


def test_quadratic_goes_evenly_in_the_root() -> None:
    made = process(num_timesteps=901).schedule
    assert spacing.quadratic(made, 7) == [900, 625, 400, 225, 100, 25, 0]
    root = torch.tensor(spacing.quadratic(process().schedule, 20)).double().sqrt()
    torch.testing.assert_close(root, torch.linspace(999**0.5, 0, 20, dtype=torch.float64), atol=0.15, rtol=0)


@pytest.mark.parametrize("schedule", ["linear", "scaled-linear", "cosine", "sigmoid"])
@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_log_snr_goes_evenly_in_log_snr(schedule: str, zero_terminal_snr: bool) -> None:
    """As even as integers allow, and skipping the timesteps of pure noise at the end."""
    made = process(schedule=schedule, zero_terminal_snr=zero_terminal_snr, parameterization="v").schedule
    log_snr = (made.alpha_bar / (1 - made.alpha_bar)).log()
    first, *rest = spacing.log_snr(made, 10)
    assert first == 999
    if log_snr[999] > -10.2:
        rest = [999, *rest]
    assert -10.2 < log_snr[rest[0]] < -5
    wanted = torch.linspace(log_snr[rest[0]].item(), log_snr[0].item(), len(rest), dtype=torch.float64)
    torch.testing.assert_close(log_snr[rest], wanted, atol=0.5, rtol=0)
    for value, t in zip(wanted.tolist(), rest, strict=True):
        assert t == min(range(1000), key=lambda other: abs(log_snr[other].item() - value))


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 8])
def test_angle_of_the_cosine_schedule_goes_almost_evenly_in_t(steps: int) -> None:
    """The angle is ((t + 1) / T + 0.008) / 1.008 pi / 2, with T = 1000; linspace, but for the last step and 0.008."""
    found = spacing.angle(process(schedule="cosine").schedule, steps)
    assert found == pytest.approx([1008 * left / steps - 9 for left in range(steps, 0, -1)], abs=1)
    whole = spacing.linspace(process().schedule, steps + 1)[:-1]
    assert found == pytest.approx(whole, abs=9)


@pytest.mark.parametrize("schedule", ["linear", "scaled-linear", "cosine", "sigmoid"])
@pytest.mark.parametrize("zero_terminal_snr", [False, True])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7])
def test_angle_goes_evenly_from_noise_to_the_clean_image(schedule: str, zero_terminal_snr: bool, steps: int) -> None:
    made = process(schedule=schedule, zero_terminal_snr=zero_terminal_snr, parameterization="v").schedule
    phi = [math.acos(math.sqrt(alpha_bar)) for alpha_bar in made.alpha_bar.tolist()]
    assert not zero_terminal_snr or phi[-1] == math.pi / 2
    for index, t in enumerate(spacing.angle(made, steps)):
        wanted = phi[999] * (steps - index) / steps
        assert t == min(range(1000), key=lambda other: abs(phi[other] - wanted))
    if steps == 2:  # tan(phi / 2), which is SNR 1 from pure noise
        snr = made.snr(torch.tensor(spacing.angle(made, 2)))[1].item()
        assert snr == pytest.approx(1, rel=0.16 if schedule == "scaled-linear" else 0.02)

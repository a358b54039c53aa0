"""The timesteps that samplers visit."""

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
        assert steps == 1 or timesteps[-1] == 0
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

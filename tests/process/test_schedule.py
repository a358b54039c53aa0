"""Noise schedules against published values and diffusers."""

import pytest
import torch
from diffusers import DDPMScheduler

from diffusion.process import schedule
from diffusion.process.schedule import Schedule


def test_linear_alpha_bar_has_the_papers_values() -> None:
    alpha_bar = Schedule(schedule.linear(1000)).alpha_bar
    assert alpha_bar[-1].item() == pytest.approx(4.03582976538e-5, rel=1e-10)
    assert alpha_bar[499].item() == pytest.approx(0.0785872428818, rel=1e-10)


def test_cosine_alpha_bar_follows_its_formula() -> None:
    alpha_bar = Schedule(schedule.cosine(1000)).alpha_bar
    assert alpha_bar[499].item() == pytest.approx(0.493843590441, rel=1e-10)


@pytest.mark.parametrize(("made", "name"), [(schedule.linear, "linear"), (schedule.cosine, "squaredcos_cap_v2")])
def test_schedules_agree_with_diffusers(made: object, name: str) -> None:
    theirs = DDPMScheduler(1000, beta_schedule=name).alphas_cumprod
    ours = Schedule(made(1000)).alpha_bar  # type: ignore[operator]
    torch.testing.assert_close(ours.float(), theirs, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("made", [schedule.linear, schedule.cosine])
@pytest.mark.parametrize("T", [64, 250, 4000])
def test_schedules_end_in_noise_at_any_length(made: object, T: int) -> None:
    found = Schedule(made(T))  # type: ignore[operator]
    assert found.num_timesteps == T
    assert (found.beta > 0).all()
    assert (found.beta < 1).all()
    assert found.alpha_bar[-1] < 1e-4


def test_alpha_bar_before_the_first_timestep_is_one() -> None:
    found = Schedule(schedule.linear(100))
    alpha_bar = found(torch.tensor([-1, 0, 99]))
    assert alpha_bar.shape == (3, 1, 1, 1)
    assert alpha_bar.flatten().tolist() == [1.0, found.alpha_bar[0].item(), found.alpha_bar[99].item()]


def test_diffuse_is_equation_4() -> None:
    found = Schedule(schedule.cosine(1000))
    x_0, eps, t = torch.randn(5, 3, 4, 4), torch.randn(5, 3, 4, 4), torch.tensor([0, 1, 500, 998, 999])
    for image in range(5):
        a = found.alpha_bar[t[image]]
        expected = a.sqrt() * x_0[image] + (1 - a).sqrt() * eps[image]
        torch.testing.assert_close(found.diffuse(x_0, t, eps)[image], expected.float())

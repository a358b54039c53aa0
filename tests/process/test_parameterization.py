"""Noise prediction: the estimates that follow from the right output are the right ones."""

import torch

from diffusion.process import schedule
from diffusion.process.parameterization import Eps
from diffusion.process.schedule import Schedule


def test_the_target_gives_back_noise_and_image() -> None:
    made = Schedule(schedule.linear(1000))
    x_0, eps, t = torch.rand(4, 1, 8, 8) * 2 - 1, torch.randn(4, 1, 8, 8), torch.tensor([0, 10, 300, 600])
    x_t, eps_parameterization = made.diffuse(x_0, t, eps), Eps(made)
    out = eps_parameterization.target(x_0, eps, t)
    torch.testing.assert_close(eps_parameterization.to_eps(out, x_t, t), eps)
    torch.testing.assert_close(eps_parameterization.to_x_0(out, x_t, t), x_0, atol=1e-4, rtol=1e-4)

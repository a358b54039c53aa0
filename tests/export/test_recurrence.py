"""Samplers as recurrences, against the samplers themselves in float64."""

import numpy as np
import pytest
import torch

from diffusion.export.recurrence import INPUT, X_T, recurrence
from diffusion.process import build
from diffusion.process.denoiser import clip
from diffusion.process.variance import Variance
from diffusion.sampling import build as sampling
from diffusion.sampling.sampler import sample
from tests.process import fakes

SHAPE = (2, 3, 4, 5)


@pytest.mark.parametrize("changes", fakes.SAMPLERS, ids=lambda changes: "-".join(map(str, changes.values())))
@pytest.mark.parametrize("spacing", ["linspace", "log-snr"])
@pytest.mark.parametrize(("schedule", "steps"), [("linear", 1), ("linear", 7), ("cosine", 12)])
def test_the_recurrence_follows_the_sampler(
    changes: dict[str, object], spacing: str, schedule: str, steps: int
) -> None:
    process = fakes.process(schedule=schedule, parameterization="v")
    options = fakes.options(**changes, spacing=spacing, steps=steps, threshold="clip")
    x_0_mse = fakes.gaussian_x_0_mse(process.schedule, 0.5)

    def variance_of(name: str) -> Variance:
        return build.variance(name, process, x_0_mse)

    timesteps = sampling.sampling_timesteps(options, process.schedule)
    net = fakes.Says("v", process.schedule, fakes.some_x_0_hat)
    noise = fakes.noise(*SHAPE)
    expected = sample(sampling.sampler(options, process, net, variance_of), noise, timesteps)

    table = recurrence(options, process, variance_of, timesteps)
    looks_per_step = len(table.t) / steps
    assert looks_per_step == 1 or (changes["sampler"] == "heun" and looks_per_step < 2)
    adds_noise = changes["sampler"] in ("ddpm", "dpm-solver++-sde") or isinstance(changes["sampler"], dict)
    assert table.stochastic == (adds_noise and steps > 1)  # the last step adds none
    state = np.stack([noise(0).numpy()] * 3)
    for look, (t, mixture) in enumerate(zip(table.t, table.mixture, strict=True)):
        x = torch.from_numpy(state[INPUT])
        x_0_hat = clip(fakes.some_x_0_hat(x, torch.full((2,), t)))
        z = noise(look + 1) if table.stochastic else torch.zeros(SHAPE)
        state = np.einsum("sk,kbchw->sbchw", mixture, np.stack([*state[X_T:], x_0_hat, z]))
    np.testing.assert_allclose(state[INPUT], expected.numpy(), rtol=0, atol=1e-9)

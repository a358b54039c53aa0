"""Samplers against diffusers' schedulers, step for step, and against a closed form."""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch import Tensor, nn

from diffusion import params
from diffusion.process import build
from diffusion.process.sampler import evenly_spaced, sample, trajectory

T = 1000


def process(variance: str) -> build.Process:
    return build.process(
        params.Process.model_validate(
            {
                "schedule": "linear",
                "num_timesteps": T,
                "parameterization": "eps",
                "variance": variance,
                "weighting": "simple",
            }
        )
    )


def options(sampler: str, steps: int, eta: float = 0.0) -> params.Sample:
    return params.Sample.model_validate({"sampler": sampler, "steps": steps, "eta": eta, "count": 1})


class Scaled(nn.Module):
    """Some function of (x_t, t) in place of a network."""

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        return 0.9 * torch.tanh(x_t) + 0.1 * torch.sin(t.view(-1, 1, 1, 1) / 100)


def noises(count: int, shape: tuple[int, ...] = (2, 1, 6, 6)) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


@pytest.mark.parametrize(("variance", "theirs"), [("fixed-small", "fixed_small"), ("fixed-large", "fixed_large")])
def test_ancestral_steps_agree_with_diffusers(variance: str, theirs: str, monkeypatch: pytest.MonkeyPatch) -> None:
    net, z = Scaled(), noises(T + 1)
    scheduler = DDPMScheduler(T, variance_type=theirs, clip_sample=True)
    scheduler.set_timesteps(T)
    made = process(variance)
    sampler = build.sampler(options("ddpm", T), made, net)
    x_t = z[0]
    for index, point in enumerate(trajectory(sampler, lambda place: z[place], evenly_spaced(T, T)), start=1):
        t = T - index
        monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, i=index, **__: z[i])
        x_t = scheduler.step(net(x_t, torch.full((2,), t)), t, x_t).prev_sample
        if variance == "fixed-small" or t > 0:
            torch.testing.assert_close(point.x_t, x_t, atol=1e-5, rtol=1e-4)
        x_t = point.x_t
    assert point.t == -1


@pytest.mark.parametrize(("variance", "theirs"), [("fixed-small", "fixed_small"), ("fixed-large", "fixed_large")])
def test_ancestral_sampling_in_few_steps_agrees_with_diffusers(
    variance: str, theirs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, z, steps = Scaled(), noises(26), 25
    scheduler = DDPMScheduler(T, variance_type=theirs, clip_sample=True, timestep_spacing="leading")
    scheduler.set_timesteps(steps)
    timesteps = scheduler.timesteps.tolist()  # 960, 920, ..., 0
    sampler = build.sampler(options("ddpm", steps), process(variance), net)
    x_t = z[0]
    for index, point in enumerate(trajectory(sampler, lambda place: z[place], timesteps), start=1):
        t = timesteps[index - 1]
        monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, i=index, **__: z[i])
        x_t = scheduler.step(net(x_t, torch.full((2,), t)), t, x_t).prev_sample
        if t > 0:
            torch.testing.assert_close(point.x_t, x_t, atol=1e-5, rtol=1e-4)
        x_t = point.x_t


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_steps_agree_with_diffusers(eta: float) -> None:
    net, z, steps = Scaled(), noises(26), 25
    scheduler = DDIMScheduler(T, timestep_spacing="leading", clip_sample=True, set_alpha_to_one=True)
    scheduler.set_timesteps(steps)
    timesteps = scheduler.timesteps.tolist()  # 960, 920, ..., 0
    sampler = build.sampler(options("ddim", steps, eta), process("fixed-small"), net)
    x_t = z[0]
    for index, point in enumerate(trajectory(sampler, lambda place: z[place], timesteps), start=1):
        t = timesteps[index - 1]
        step = scheduler.step(
            net(x_t, torch.full((2,), t)), t, x_t, eta=eta, use_clipped_model_output=True, variance_noise=z[index]
        )
        torch.testing.assert_close(point.x_0_hat, step.pred_original_sample, atol=1e-5, rtol=1e-4)
        if index < steps:  # diffusers counts the last step to t = -40 as clean: the same image, other noise
            torch.testing.assert_close(point.x_t, step.prev_sample, atol=1e-5, rtol=1e-4)
        x_t = point.x_t
    torch.testing.assert_close(point.x_t, point.x_0_hat)


def test_evenly_spaced_goes_from_the_last_timestep_to_the_first() -> None:
    assert evenly_spaced(1000, 1000) == list(range(999, -1, -1))
    assert evenly_spaced(1000, 4) == [999, 666, 333, 0]
    assert evenly_spaced(1000, 1) == [999]


@pytest.mark.parametrize(
    ("name", "variance"), [("ddpm", "fixed-large"), ("ddpm", "fixed-small"), ("ddim", "fixed-small")]
)
def test_gaussian_data_are_sampled_with_their_own_variance(name: str, variance: str) -> None:
    """With the exact denoiser of N(0, s^2 I) (and s so small that clipping does nothing) samples have variance s^2."""
    made, s = process(variance), 0.2

    class Optimal(nn.Module):
        def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
            a = made.schedule(t).float()
            return (1 - a).sqrt() * x_t / (a * s**2 + 1 - a)

    generator = torch.Generator().manual_seed(5)
    sampler = build.sampler(options(name, T), made, Optimal())
    x = sample(sampler, lambda _: torch.randn(20_000, 1, 1, 1, generator=generator), evenly_spaced(T, T))
    assert x.mean().item() == pytest.approx(0, abs=0.01)
    assert x.std().item() == pytest.approx(s, rel=0.05)

"""Samplers against diffusers' schedulers, step for step."""

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, HeunDiscreteScheduler, LCMScheduler
from torch import Tensor

from diffusion.process import build
from diffusion.sampling import build as sampling
from diffusion.sampling.sampler import Point, Previous, Sampler, sample, trajectory
from diffusion.sampling.spacing import SPACINGS
from tests.process.fakes import (
    SAMPLERS,
    Says,
    always,
    at,
    gaussian_x_0_mse,
    noise,
    options,
    process,
    randn,
    some_x_0_hat,
)

SHAPE = (2, 1, 6, 6)
NUMPY = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers' use of it
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
PREDICTIONS = {"eps": "epsilon", "x_0": "sample", "v": "v_prediction"}


def made_sampler(made: build.Process, net: Says, **changes: object) -> Sampler:
    square = gaussian_x_0_mse(made.schedule, 0.5)
    return sampling.sampler(options(**changes), made, net, lambda name: build.variance(name, made, square))


def with_noise(monkeypatch: pytest.MonkeyPatch, module: str) -> Callable[[Tensor], None]:
    """Sets the noise of diffusers' next step."""

    def setting(z: Tensor) -> None:
        monkeypatch.setattr(f"diffusers.schedulers.{module}.randn_tensor", lambda *_, **__: z)

    return setting


def in_float64(scheduler: DDPMScheduler, made: build.Process) -> None:
    """diffusers keeps alpha_bar in float32, whose rounding would be visible."""
    scheduler.alphas_cumprod = made.schedule.alpha_bar
    for name in ("one", "final_alpha_cumprod"):
        if hasattr(scheduler, name):
            setattr(scheduler, name, torch.ones((), dtype=torch.float64))


@pytest.mark.parametrize(("prediction", "steps"), [("eps", 1000), ("eps", 25), ("x_0", 25), ("v", 25)])
@pytest.mark.parametrize(
    ("variance", "theirs"),
    [("fixed-small", "fixed_small"), ("fixed-large", "fixed_large"), ("learned", "learned_range")],
)
def test_ancestral_steps_agree_with_diffusers(
    variance: str, theirs: str, prediction: str, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = process(parameterization=prediction)
    net = Says(prediction, made.schedule, some_x_0_hat, 0.4 if variance == "learned" else None)
    scheduler = DDPMScheduler(1000, variance_type=theirs, clip_sample=True, prediction_type=PREDICTIONS[prediction])
    in_float64(scheduler, made)
    scheduler.set_timesteps(steps)  # leading: 960, 920, ..., 0 for 25 steps
    sampler, z = made_sampler(made, net, variance=variance, threshold="clip"), noise(*SHAPE)
    x_t, set_noise = z(0), with_noise(monkeypatch, "scheduling_ddpm")
    timesteps = scheduler.timesteps.tolist()
    for index, point in enumerate(trajectory(sampler, z, timesteps), start=1):
        t = timesteps[index - 1]
        set_noise(z(index))
        step = scheduler.step(net(x_t, torch.full((2,), t)), t, x_t)
        torch.testing.assert_close(point.x_0_hat, step.pred_original_sample, **CLOSE)
        torch.testing.assert_close(point.x_t, step.prev_sample, **CLOSE)
        x_t = step.prev_sample
    assert point.t == -1


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_steps_agree_with_diffusers(eta: float, prediction: str) -> None:
    made = process(parameterization=prediction)
    net, steps = Says(prediction, made.schedule, some_x_0_hat), 25
    scheduler = DDIMScheduler(
        1000, timestep_spacing="leading", clip_sample=True, prediction_type=PREDICTIONS[prediction]
    )
    in_float64(scheduler, made)
    scheduler.set_timesteps(steps)
    timesteps = scheduler.timesteps.tolist()
    sampler, z = made_sampler(made, net, sampler={"kind": "ddim", "eta": eta}, threshold="clip"), noise(*SHAPE)
    x_t = z(0)
    for index, point in enumerate(trajectory(sampler, z, timesteps), start=1):
        t = timesteps[index - 1]
        step = scheduler.step(
            net(x_t, torch.full((2,), t)), t, x_t, eta=eta, use_clipped_model_output=True, variance_noise=z(index)
        )
        torch.testing.assert_close(point.x_0_hat, step.pred_original_sample, **CLOSE)
        torch.testing.assert_close(point.x_t, step.prev_sample, **CLOSE)
        x_t = step.prev_sample
    torch.testing.assert_close(point.x_t, point.x_0_hat)


@NUMPY
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(("name", "theirs"), [("dpm-solver++", "dpmsolver++"), ("dpm-solver++-sde", "sde-dpmsolver++")])
def test_dpm_solver_steps_agree_with_diffusers(
    name: str, theirs: str, prediction: str, schedule: str, dynamic: bool
) -> None:
    made = process(parameterization=prediction, schedule=schedule)
    net = Says(prediction, made.schedule, lambda x_t, t: 3 * some_x_0_hat(x_t, t))
    scheduler = DPMSolverMultistepScheduler(
        1000,
        beta_schedule={"linear": "linear", "cosine": "squaredcos_cap_v2"}[schedule],
        beta_start=1e-4,
        beta_end=0.02,
        algorithm_type=theirs,
        prediction_type=PREDICTIONS[prediction],
        thresholding=dynamic,
        sample_max_value=math.inf,
    )
    timesteps = list(range(960, -1, -60))
    in_float64(scheduler, made)
    scheduler.set_timesteps(timesteps=timesteps)
    shape = (2, 1, 1, 401)  # so that diffusers' quantile is one of the values
    threshold = "dynamic" if dynamic else "none"
    sampler, z = made_sampler(made, net, sampler=name, threshold=threshold), noise(*shape, dtype=torch.float32)
    x_t, before = z(0), None
    for t, s in pairwise([*timesteps, -1]):  # both from the same x_t, since float32 errors grow from step to step
        when, to = torch.full((2,), t), torch.full((2,), s)
        x_s, x_0_hat = sampler.step(x_t, when, to, lambda: z(1), before)
        before = Previous(when, x_0_hat)
        x_t = scheduler.step(net(x_t, when), t, x_t, variance_noise=z(1)).prev_sample
        torch.testing.assert_close(x_s, x_t, **CLOSE)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_consistency_steps_with_new_noise_agree_with_diffusers(
    prediction: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """diffusers mixes some x_t into x_0_hat: 1 part in 10^7 at t = 150, all of it at t = 0."""
    made = process(parameterization=prediction)
    net, timesteps = Says(prediction, made.schedule, some_x_0_hat), [999, 600, 400, 150]
    scheduler = LCMScheduler(clip_sample=True, prediction_type=PREDICTIONS[prediction])
    in_float64(scheduler, made)
    scheduler.set_timesteps(timesteps=timesteps)
    gamma_1 = {"kind": "consistency", "gamma": 1.0}
    sampler, z = made_sampler(made, net, sampler=gamma_1, threshold="clip"), noise(*SHAPE)
    x_t, set_noise = z(0), with_noise(monkeypatch, "scheduling_lcm")
    for index, point in enumerate(trajectory(sampler, z, timesteps), start=1):
        t = timesteps[index - 1]
        set_noise(z(index))
        step = scheduler.step(net(x_t, torch.full((2,), t)), t, x_t)
        torch.testing.assert_close(point.x_0_hat, step.denoised, **CLOSE)
        torch.testing.assert_close(point.x_t, step.prev_sample, **CLOSE)
        x_t = step.prev_sample
    assert point.t == -1


@NUMPY
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_consistency_steps_that_keep_the_noise_agree_with_diffusers(prediction: str) -> None:
    """As DPM-Solver's first-order steps, which diffusers takes between any timesteps, unlike DDIM's."""
    made = process(parameterization=prediction)
    net, timesteps = Says(prediction, made.schedule, lambda x_t, t: 3 * some_x_0_hat(x_t, t)), [999, 257, 41]
    scheduler = DPMSolverMultistepScheduler(
        1000,
        beta_start=1e-4,
        beta_end=0.02,
        solver_order=1,
        prediction_type=PREDICTIONS[prediction],
        thresholding=True,  # with sample_max_value 1.0, the default, it clips
    )
    in_float64(scheduler, made)
    scheduler.set_timesteps(timesteps=timesteps)
    sampler, z = made_sampler(made, net, sampler="consistency", threshold="clip"), noise(*SHAPE)
    x_t = z(0)
    for t, point in zip(timesteps, trajectory(sampler, z, timesteps), strict=True):
        x_t = scheduler.step(net(x_t, torch.full((2,), t)), t, x_t).prev_sample
        torch.testing.assert_close(point.x_t, x_t, **CLOSE)


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
@pytest.mark.parametrize("threshold", ["none", "clip"])
def test_consistency_that_keeps_the_noise_is_ddim(threshold: str, zero_terminal_snr: bool) -> None:
    made = process(schedule="cosine", parameterization="v", zero_terminal_snr=zero_terminal_snr)
    net, z = Says("v", made.schedule, lambda x_t, t: 2 * some_x_0_hat(x_t, t)), noise(*SHAPE)
    for timesteps in ([999], [999, 495], [999, 747, 495, 243], [999, 3, 0]):
        ddim, ours = (
            list(trajectory(made_sampler(made, net, sampler=name, threshold=threshold), z, timesteps))
            for name in ("ddim", "consistency")
        )
        for expected, found in zip(ddim, ours, strict=True):
            assert found.x_t.equal(expected.x_t)
            assert found.x_0_hat.equal(expected.x_0_hat)


@pytest.mark.parametrize("gamma", [0.0, 0.6, 1.0])
def test_consistency_replaces_a_part_of_the_noise(gamma: float) -> None:
    """From x_t of a known image and noise: x_s of the same image, whose noise still has variance 1."""
    made, (x_0, eps, z) = process(schedule="cosine"), (randn(*SHAPE, seed=seed) for seed in (1, 2, 3))
    sampler = made_sampler(
        made, Says("eps", made.schedule, always(x_0)), sampler={"kind": "consistency", "gamma": gamma}
    )
    t, s = torch.tensor([900, 700]), torch.tensor([400, -1])
    x_s, x_0_hat = sampler.step(made.schedule.diffuse(x_0, t, eps), t, s, lambda: z, None)
    a = at(made.schedule, s)
    mixed = {0.0: eps, 0.6: 0.8 * eps + 0.6 * z, 1.0: z}[gamma]
    torch.testing.assert_close(x_0_hat, x_0)
    torch.testing.assert_close(x_s, a.sqrt() * x_0 + (1 - a).sqrt() * mixed)
    torch.testing.assert_close(x_s[1], x_0[1])  # the last step: the image, without noise


@NUMPY
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_heun_steps_agree_with_diffusers(prediction: str, clip: bool) -> None:
    """diffusers' sampler works on x_t / sqrt(alpha_bar) and splits each step in two."""
    made = process(parameterization=prediction)
    net = Says(prediction, made.schedule, lambda x_t, t: 2 * some_x_0_hat(x_t, t))
    scheduler = HeunDiscreteScheduler(
        1000, beta_start=1e-4, beta_end=0.02, prediction_type=PREDICTIONS[prediction], clip_sample=clip
    )
    timesteps = list(range(900, -1, -60))  # from sigma = 61
    in_float64(scheduler, made)
    scheduler.set_timesteps(timesteps=timesteps)
    z, threshold = noise(*SHAPE), "clip" if clip else "none"
    found = trajectory(made_sampler(made, net, sampler="heun", threshold=threshold), z, timesteps)
    x, theirs = z(0) / made.schedule.alpha_bar[900].sqrt(), list[Tensor]()
    for t in scheduler.timesteps:
        out = net(scheduler.scale_model_input(x, t), torch.full((2,), int(t)))
        x = scheduler.step(out, t, x).prev_sample
        theirs.append(x)
    for point, x in zip(found, [*theirs[1::2], theirs[-1]], strict=True):
        torch.testing.assert_close(point.x_t, at(made.schedule, torch.tensor(point.t)).sqrt() * x, **CLOSE)


def heun_of_edm(net: Callable[[Tensor, int], Tensor], alpha_bar: Tensor, x_t: Tensor, timesteps: list[int]) -> Tensor:
    """Karras et al. 2022, algorithm 1: D(x; sigma), in x = x_t / sqrt(alpha_bar) and sigma; Euler to sigma = 0."""
    sigma = ((1 - alpha_bar) / alpha_bar).sqrt()
    x = x_t / alpha_bar[timesteps[0]].sqrt()

    def slope(x: Tensor, t: int) -> Tensor:
        return (x - net(alpha_bar[t].sqrt() * x, t)) / sigma[t]

    for t, s in pairwise(timesteps):
        d = slope(x, t)
        euler = x + (sigma[s] - sigma[t]) * d
        x = x + (sigma[s] - sigma[t]) * (d + slope(euler, s)) / 2
    return x - sigma[timesteps[-1]] * slope(x, timesteps[-1])


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_heun_is_edms(schedule: str) -> None:
    made = process(schedule=schedule)
    timesteps, z = list(range(900, -1, -60)), noise(*SHAPE)
    found = sample(made_sampler(made, Says("eps", made.schedule, some_x_0_hat), sampler="heun"), z, timesteps)
    expected = heun_of_edm(
        lambda x_t, t: some_x_0_hat(x_t, torch.full((2,), t)), made.schedule.alpha_bar, z(0), timesteps
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_euler_steps_lead_to_edms_largest_sigma(schedule: str) -> None:
    """Above sigma = 80 and in the last step it is a DDIM step with one network evaluation."""
    made, asked = process(schedule=schedule), []

    def spying(x_t: Tensor, t: Tensor) -> Tensor:
        asked.append(int(t[0]))
        return some_x_0_hat(x_t, t)

    sigma = (1 / made.schedule.alpha_bar - 1).sqrt()
    timesteps = [999, 990, 500, 0]
    heun = made_sampler(made, Says("eps", made.schedule, spying), sampler="heun")
    list(trajectory(heun, noise(*SHAPE), timesteps))
    twice = sigma[990] <= 80
    assert sigma[999] > 80
    assert asked == [999, 990, *([500] if twice else []), 500, 0, 0]


@pytest.mark.parametrize("spacing", sorted(SPACINGS))
@pytest.mark.parametrize("zero_terminal_snr", [False, True])
@pytest.mark.parametrize("changes", SAMPLERS, ids=lambda changes: "-".join(str(value) for value in changes.values()))
def test_every_sampler_ends_at_the_clean_image(
    changes: dict[str, object], zero_terminal_snr: bool, spacing: str
) -> None:
    """With a network that always predicts the same image, any number of steps returns it, and all points are finite."""
    image = randn(*SHAPE).clamp(-1, 1)
    made = process(schedule="cosine", num_timesteps=50, parameterization="v", zero_terminal_snr=zero_terminal_snr)
    sampler = made_sampler(made, Says("v", made.schedule, always(image)), **changes)
    for steps in (1, 2, 3, 17, 50):
        timesteps = SPACINGS[spacing](made.schedule, steps)
        points: list[Point] = list(trajectory(sampler, noise(*SHAPE), timesteps))
        assert [point.t for point in points] == [*timesteps[1:], -1]
        for point in points:
            assert point.x_t.isfinite().all()
            torch.testing.assert_close(point.x_0_hat, image)
        torch.testing.assert_close(points[-1].x_t, image)


@pytest.mark.parametrize("changes", SAMPLERS, ids=lambda changes: "-".join(str(value) for value in changes.values()))
def test_an_image_is_the_same_in_any_batch(changes: dict[str, object]) -> None:
    made, z = process(num_timesteps=50), noise(5, 1, 4, 4, dtype=torch.float32)
    timesteps = SPACINGS["linspace"](made.schedule, 12)

    def images(part: slice) -> Tensor:
        sampler = made_sampler(made, Says("eps", made.schedule, some_x_0_hat), **changes)
        return sample(sampler, lambda place: z(place)[part], timesteps)

    together = images(slice(0, 5))
    for part in (slice(0, 1), slice(3, 4), slice(2, 5)):
        torch.testing.assert_close(images(part), together[part], rtol=1e-5, atol=1e-5)  # 12 steps in float32


def test_sampling_begins_at_the_given_timestep() -> None:
    made, z = process(), noise(*SHAPE)
    sampler = made_sampler(made, Says("eps", made.schedule, some_x_0_hat))
    timesteps = [999, 700, 400, 100]
    points = list(trajectory(sampler, z, timesteps))
    torch.testing.assert_close(sample(sampler, z, timesteps), points[-1].x_t)
    assert sample(sampler, z, timesteps, z(0)).equal(points[-1].x_t)
    rest = list(trajectory(sampler, lambda place: z(place + 1), timesteps[1:], points[0].x_t))
    torch.testing.assert_close(rest[-1].x_t, points[-1].x_t)


def test_deterministic_samplers_draw_no_noise_but_the_first() -> None:
    made, places = process(), []

    def z(place: int) -> Tensor:
        places.append(place)
        return noise(*SHAPE)(place)

    for name in ("ddim", "dpm-solver++", "heun", "consistency"):
        sample(made_sampler(made, Says("eps", made.schedule, some_x_0_hat), sampler=name), z, [999, 500, 0])
    assert places == [0, 0, 0, 0]

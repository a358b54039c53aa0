"""Image-to-image, interpolation and inpainting, with denoisers that are exact for Gaussian data."""

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from diffusion.process import build
from diffusion.sampling import build as sampling
from diffusion.sampling import editing
from diffusion.sampling.sampler import SAMPLERS, Previous, Sampler, sample
from tests.process.fakes import (
    Says,
    X0Hat,
    at,
    gaussian_x_0_hat,
    marginal_variance,
    noise,
    options,
    process,
    randn,
    some_x_0_hat,
)

SHAPE = (4, 1, 3, 5)


def made_sampler(made: build.Process, x_0_hat: X0Hat, name: str = "eps", **changes: object) -> Sampler:
    net = Says(name, made.schedule, x_0_hat)
    return sampling.sampler(options(**changes), made, net, lambda variance: build.variance(variance, made, None))


@pytest.mark.parametrize("first", [200, 999])
def test_image_to_image_carries_a_noised_image_along_the_exact_ode(first: int) -> None:
    """With the exact denoiser of N(0, s^2): x_0 noised to t, times sqrt(Var(x_0) / Var(x_t))."""
    made, std = process(), 0.5
    sampler = made_sampler(made, gaussian_x_0_hat(made.schedule, std), sampler="heun")
    x_0, z = std * randn(*SHAPE), noise(*SHAPE)
    found = editing.image_to_image(sampler, made.schedule, z, list(range(first, -1, -2)) + [0] * (first % 2), x_0)
    a = made.schedule.alpha_bar[first]
    x_t = a.sqrt() * x_0 + (1 - a).sqrt() * z(0)
    exact = x_t * std / marginal_variance(made.schedule, torch.tensor(first), std).sqrt()
    torch.testing.assert_close(found, exact, rtol=0.01, atol=0)


def test_more_noise_leaves_less_of_the_image() -> None:
    made = process()
    x_0, z = 0.5 * randn(1, 1, 40, 40), noise(1, 1, 40, 40)
    sampler = made_sampler(made, gaussian_x_0_hat(made.schedule, 0.5), variance="fixed-large")
    kept = [
        torch.corrcoef(torch.stack([x_0.flatten(), image.flatten()]))[0, 1].item()
        for first in (5, 100, 300, 600)
        for image in [editing.image_to_image(sampler, made.schedule, z, list(range(first, -1, -1)), x_0)]
    ]
    assert kept == sorted(kept, reverse=True)
    assert kept[0] > 0.99
    assert abs(kept[-1]) < 0.1


@pytest.mark.parametrize("changes", [{"sampler": "ddim"}, {"sampler": "ddpm"}])
def test_interpolation_begins_and_ends_at_the_two_images(changes: dict[str, object]) -> None:
    made, z = process(), noise(*SHAPE)
    sampler = made_sampler(made, some_x_0_hat, **changes)
    timesteps, x_0, other = [500, 300, 100, 0], randn(*SHAPE), randn(*SHAPE, seed=1)
    fraction = torch.tensor([0, 0.25, 0.75, 1])
    found = editing.image_to_image(sampler, made.schedule, z, timesteps, editing.mix(x_0, other, fraction))
    first, last = (editing.image_to_image(sampler, made.schedule, z, timesteps, image) for image in (x_0, other))
    torch.testing.assert_close(found[0], first[0])
    torch.testing.assert_close(found[3], last[3])
    between = 0.75 * x_0[1] + 0.25 * other[1]
    expected = editing.image_to_image(sampler, made.schedule, z, timesteps, between.expand(SHAPE))
    torch.testing.assert_close(found[1], expected[1])


def test_one_round_of_repaint_is_the_plain_path() -> None:
    for steps, jump in ((1, 1), (7, 3), (10, 10), (10, 25)):
        timesteps = list(range(steps - 1, -1, -1))
        assert editing.repaint_path(timesteps, jump, 1) == [*timesteps, -1]


def test_a_path_of_repaint() -> None:
    assert editing.repaint_path([9, 5, 2, 0], 2, 2) == [9, 5, 2, 5, 9, 5, 2, 0, -1, 0, 2, 0, -1]


@pytest.mark.parametrize(("steps", "jump", "rounds"), [(10, 3, 4), (12, 4, 2), (5, 1, 3), (6, 10, 2)])
def test_repaint_repeats_every_run_of_steps(steps: int, jump: int, rounds: int) -> None:
    timesteps = list(range(2 * steps, 0, -2))
    path = editing.repaint_path(timesteps, jump, rounds)
    ends = [*timesteps, -1]
    moves = list(pairwise(path))
    assert path[0] == timesteps[0]
    assert path[-1] == -1
    for t, s in pairwise(ends):
        assert moves.count((t, s)) == rounds  # down
        assert moves.count((s, t)) == rounds - 1  # and up
    assert len(moves) == steps * (2 * rounds - 1)


@pytest.mark.parametrize("changes", [{"sampler": name} for name in sorted(SAMPLERS)])
@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_inpainting_keeps_what_is_to_be_kept(zero_terminal_snr: bool, changes: dict[str, object]) -> None:
    made = process(parameterization="v", zero_terminal_snr=zero_terminal_snr)
    x_0, places = randn(*SHAPE).clamp(-1, 1).float(), []
    keep = (torch.rand(1, 1, *SHAPE[2:], generator=torch.Generator().manual_seed(1)) < 0.5).float()
    z = noise(*SHAPE, dtype=torch.float32)

    def spied(place: int) -> Tensor:
        places.append(place)
        return z(place)

    sampler = made_sampler(made, some_x_0_hat, "v", **changes)
    path = editing.repaint_path([999, 600, 300, 100, 0], 2, 3)
    images = list(editing.inpaint(sampler, made.schedule, spied, path, x_0, keep))
    assert len(images) == len(path) - 1
    assert all(image.isfinite().all() for image in images)
    assert images[-1][:, keep[0] == 1].equal(x_0[:, keep[0] == 1])
    assert not images[-1][:, keep[0] == 0].isclose(x_0[:, keep[0] == 0]).any()
    assert len(places) == len(set(places))  # no noise is used twice


def test_with_nothing_to_keep_inpainting_samples() -> None:
    made, timesteps, x_0 = process(), [999, 600, 300, 100, 0], randn(*SHAPE)
    for name in SAMPLERS:
        sampler, z = made_sampler(made, some_x_0_hat, sampler=name), noise(*SHAPE)
        *_, found = editing.inpaint(
            sampler, made.schedule, z, editing.repaint_path(timesteps, 3, 1), x_0, torch.zeros(1, 1, 1, 1)
        )
        expected = sample(sampler, lambda place, z=z: z(2 * place - 1 if place else 0), timesteps)
        torch.testing.assert_close(found, expected)


def test_going_up_again_is_the_forward_process() -> None:
    """From x_s to x_t with noise z: sqrt(alpha) x_s + sqrt(1 - alpha) z, alpha = alpha_bar_t / alpha_bar_s."""
    made, x_0, z = process(), randn(*SHAPE), noise(*SHAPE)
    path = [999, 400, 600, 800, 100]
    sampler = made_sampler(made, some_x_0_hat)
    images = list(editing.inpaint(sampler, made.schedule, z, path, x_0, torch.zeros(1, 1, 1, 1)))
    for index, (s, t) in ((1, (400, 600)), (2, (600, 800))):
        alpha = at(made.schedule, torch.tensor(t)) / at(made.schedule, torch.tensor(s))
        expected = alpha.sqrt() * images[index - 1] + (1 - alpha).sqrt() * z(2 * index + 1)
        torch.testing.assert_close(images[index], expected)


def test_a_multistep_sampler_forgets_what_was_before_it_went_up() -> None:
    made, x_0, z = process(), randn(*SHAPE), noise(*SHAPE)
    sampler = made_sampler(made, some_x_0_hat, sampler="dpm-solver++")
    path, keep = [999, 800, 400, 600, 300, 100], torch.zeros(1, 1, 1, 1)
    images = list(editing.inpaint(sampler, made.schedule, z, path, x_0, keep))
    t = {step: torch.full((len(x_0),), step) for step in path}

    def step(index: int, previous: Previous | None) -> Tensor:
        return sampler.step(images[index - 1], t[path[index]], t[path[index + 1]], lambda: z(0), previous)[0]

    def before(index: int) -> Previous:
        at = t[path[index]]
        return Previous(at, some_x_0_hat(images[index - 1], at))

    torch.testing.assert_close(images[1], step(1, Previous(t[999], some_x_0_hat(z(0), t[999]))))
    torch.testing.assert_close(images[3], step(3, None))  # from 600, where it went up to
    torch.testing.assert_close(images[4], step(4, before(3)))


RHO, STD = 0.9, 0.5


def correlated(made: build.Process) -> X0Hat:
    """E[x_0 | x_t] of two pixels with variance STD^2 and correlation RHO."""
    covariance = STD**2 * torch.tensor([[1, RHO], [RHO, 1]], dtype=torch.float64)

    def x_0_hat(x_t: Tensor, t: Tensor) -> Tensor:
        a = at(made.schedule, t[:1]).view(1, 1)
        gain = a.sqrt() * covariance @ torch.linalg.inv(a * covariance + (1 - a) * torch.eye(2, dtype=torch.float64))
        return x_t @ gain.T

    return x_0_hat


def test_inpainting_draws_from_what_the_rest_implies() -> None:
    """Of two correlated pixels one is kept: the other is N(RHO x_1, STD^2 (1 - RHO^2)), nearer with more rounds."""
    made = process(schedule="cosine", num_timesteps=100)
    sampler = made_sampler(made, correlated(made), variance="fixed-large")
    known, count = 0.6, 4000
    x_0, keep = torch.tensor([known, 0.0], dtype=torch.float64).expand(count, 1, 1, 2), torch.tensor([[[[1.0, 0.0]]]])
    divergences = []
    for rounds in (1, 2, 6):
        path = editing.repaint_path(list(range(99, -1, -1)), 10, rounds)
        *_, found = editing.inpaint(sampler, made.schedule, noise(count, 1, 1, 2), path, x_0, keep)
        mean, variance = found[..., 1].mean().item(), found[..., 1].var().item()
        true = STD**2 * (1 - RHO**2)
        ratio = variance / true
        divergences.append((ratio - 1 - math.log(ratio) + (mean - RHO * known) ** 2 / true) / 2)
    assert divergences[0] > 3 * divergences[1] > 9 * divergences[2]
    assert divergences[2] < 0.03

"""Filmstrips: how images turn to noise, and how they emerge from it."""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from diffusion.model import Model
from diffusion.pairs.pairs import Pairs
from diffusion.pairs.pixels import to_uint8, to_x_0, visible
from diffusion.process.schedule import Schedule
from diffusion.samples import classes_in_turn, noise_for
from diffusion.sampling import build as sampling
from diffusion.sampling.build import SampleOptions
from diffusion.sampling.sampler import trajectory


class Frame(NamedTuple):
    """A few images at one point of their sampling trajectories, uint8 (n, C, H, W) each."""

    t: int
    """The timestep of x_t; -1 at the end."""
    x_t: NDArray[np.uint8]
    x_0_hat: NDArray[np.uint8]
    """The network's estimate from this x_t; at the end, the image."""


class Noised(NamedTuple):
    """A few images at one point of the forward process, uint8 (n, C, H, W)."""

    t: int
    """The timestep of x_t; -1 for the clean images."""
    x_t: NDArray[np.uint8]


def noising(
    pairs: Pairs, schedule: Schedule, shown: tuple[int, ...] = (), images: int = 4, count: int = 9
) -> list[Noised]:
    """The first images of a held-out split at `count` points from clean to t = T - 1, with the noise of their draw 0.

    `shown`: the channels to show; see `visible`.
    """
    eps = torch.from_numpy(pairs.heldout(0, 0).eps[:images])
    x_0 = pairs.x_0(0)[:images]
    clean = torch.from_numpy(to_x_0(x_0, np.float32))
    points = np.unique(np.linspace(0, schedule.num_timesteps - 1, count - 1).round().astype(int)).tolist()
    noised = [schedule.diffuse(clean, torch.full((len(clean),), t), eps) for t in points]
    frames = [Noised(t, to_uint8(x_t.numpy())) for t, x_t in zip(points, noised, strict=True)]
    return [Noised(frame.t, visible(frame.x_t, shown)) for frame in (Noised(-1, x_0), *frames)]


def frames(
    model: Model,
    options: SampleOptions,
    seed: int,
    device: torch.device,
    shown: tuple[int, ...] = (),
    images: int = 4,
    count: int = 9,
    y: torch.Tensor | None = None,
) -> list[Frame]:
    """The seed's first images at `count` points of sampling, evenly spaced over the steps, from noise to image.

    Returns fewer frames if there are fewer steps. `shown`: the channels to show; see `visible`. `y`: the images'
    classes, int64 (images,); by default, the classes in turn.
    """
    timesteps = sampling.sampling_timesteps(options, model.process.schedule)
    chosen = set(np.linspace(0, len(timesteps), count).round().astype(int).tolist())
    noise = noise_for(seed, images, model.shape, device)
    sampler = model.sampler(options, classes_in_turn(model, images, device) if y is None else y)
    t, x_t = timesteps[0], noise(0)
    found = []
    # A point holds the x_t after a step, but x_0_hat was estimated from the x_t before it.
    for index, point in enumerate(trajectory(sampler, noise, timesteps, x_t)):
        if index in chosen:
            found.append(_frame(t, x_t, point.x_0_hat, shown))
        t, x_t = point.t, point.x_t
    return [*found, _frame(t, x_t, x_t, shown)]


def _frame(t: int, x_t: torch.Tensor, x_0_hat: torch.Tensor, shown: tuple[int, ...]) -> Frame:
    return Frame(t, *(visible(to_uint8(x.cpu().numpy()), shown) for x in (x_t, x_0_hat)))

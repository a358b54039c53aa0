"""Sampling trajectories: how images emerge from noise."""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from diffusion.model import Model
from diffusion.pairs.pixels import to_uint8, visible
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


def frames(
    model: Model,
    options: SampleOptions,
    seed: int,
    device: torch.device,
    shown: tuple[int, ...] = (),
    images: int = 4,
    count: int = 9,
) -> list[Frame]:
    """The seed's first images at `count` points of sampling, evenly spaced over the steps, from noise to image.

    Returns fewer frames if there are fewer steps. `shown`: the channels to show; see `visible`.
    """
    timesteps = sampling.sampling_timesteps(options, model.process.schedule)
    chosen = set(np.linspace(0, len(timesteps), count).round().astype(int).tolist())
    noise = noise_for(seed, images, model.shape, device)
    sampler = model.sampler(options, classes_in_turn(model, images, device))
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

"""Noise prediction on held-out pairs."""

from collections.abc import Callable, Iterator
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from diffusion.model import Model
from diffusion.pairs.noise import BLOCK, Purpose, stream
from diffusion.pairs.pairs import Pairs
from diffusion.pairs.pixels import to_x_0
from diffusion.process.parameterization import split
from diffusion.process.schedule import float64_device


class Prediction(NamedTuple):
    """The pairs of one block and draw, with the network's prediction."""

    images: NDArray[np.int64]  # (n,): index of each pair's image in its split
    t: NDArray[np.int64]  # (n,)
    y: NDArray[np.int64]  # (n,): classes, -1 for none
    x_t: NDArray[np.float32]  # (n, C, H, W)
    eps: NDArray[np.float32]  # (n, C, H, W)
    eps_hat: NDArray[np.float32]  # (n, C, H, W)


@torch.inference_mode()
def predictions(model: Model, pairs: Pairs, device: torch.device) -> Iterator[Prediction]:
    """Run the network on all stored draws of a held-out split, block by block."""
    for draw in range(pairs.manifest.heldout_draws):
        for block in range(pairs.blocks):
            t, x_t, eps = pairs.heldout(block, draw)
            y = pairs.labels(block)
            on_device = torch.from_numpy(x_t).to(device, memory_format=torch.channels_last)
            steps, classes = torch.from_numpy(t).to(float64_device(device)), torch.from_numpy(y).to(device)
            out, _ = split(model.net_for(classes)(on_device, steps.to(device)), len(x_t[0]))
            eps_hat = model.process.parameterization.to_eps(out, on_device, steps)
            yield Prediction(block * BLOCK + np.arange(len(t)), t, y, x_t, eps, eps_hat.cpu().numpy())


class Estimate(NamedTuple):
    """A mean error on a subset of the held-out pairs, such as the noise MSE."""

    mse: float
    se: float
    """Standard error over images; 0 for a single one."""


def quick_mse(
    model: Model, pairs: Pairs, device: torch.device, check_stop: Callable[[], None], blocks: int = 16
) -> Estimate:
    """Noise MSE on the first `blocks` blocks of a split (1,024 pairs by default), a fixed subset."""
    images, errors = list[NDArray[np.int64]](), list[NDArray[np.float64]]()
    for prediction in islice(predictions(model, pairs, device), blocks):
        check_stop()
        images.append(prediction.images)
        errors.append(np.square(prediction.eps_hat - prediction.eps, dtype=np.float64).mean(axis=(1, 2, 3)))
    return mean_over_images(np.concatenate(images), np.concatenate(errors))


def mean_over_images(image: NDArray[np.int64], error: NDArray[np.float64]) -> Estimate:
    """The mean of errors (n,), with its standard error over the images (n,) that they are of."""
    counts = np.bincount(image)
    of_images = np.bincount(image, error - error.mean())[counts > 0]  # sums, as images with more pairs weigh more
    n = len(of_images)
    return Estimate(float(error.mean()), float(np.sqrt(np.square(of_images).sum() * n / max(n - 1, 1)) / len(error)))


@torch.inference_mode()
def x_0_mse(
    model: Model, pairs: Pairs, device: torch.device, seed: int, check_stop: Callable[[], None]
) -> tuple[float, ...]:
    """Estimate E |x_0 - x_0_hat|^2 / d at each timestep, (T,), on held-out images, for the `Analytic` variance.

    Uses about 16 images per timestep, and four timesteps per block of images.
    """
    schedule = model.process.schedule
    total, count = np.zeros(schedule.num_timesteps), np.zeros(schedule.num_timesteps)
    for group, first in enumerate(range(0, schedule.num_timesteps, 4)):
        check_stop()
        block = group % pairs.blocks
        # Repeat the images of a short block to get BLOCK of them.
        chosen = np.arange(BLOCK) % pairs.size(block)
        t = np.minimum(first + np.arange(BLOCK) // 16, schedule.num_timesteps - 1)
        z = stream(seed, Purpose.X_0_MSE, high=group).standard_normal((BLOCK, *pairs.shape), dtype=np.float32)
        x_0 = torch.from_numpy(to_x_0(pairs.x_0(block)[chosen], np.float32)).to(device)
        steps, eps = torch.from_numpy(t).to(float64_device(device)), torch.from_numpy(z).to(device)
        denoiser = model.process.denoiser(model.net_for(torch.from_numpy(pairs.labels(block)[chosen]).to(device)))
        x_t = schedule.diffuse(x_0, steps, eps).to(memory_format=torch.channels_last)
        x_0_hat = denoiser(x_t, steps).x_0_hat
        np.add.at(total, t, (x_0 - x_0_hat).square().mean(dim=(1, 2, 3)).cpu().double().numpy())
        np.add.at(count, t, 1)
    return tuple((total / count).tolist())

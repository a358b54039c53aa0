"""The loss of distillation on held-out images."""

from collections.abc import Callable
from itertools import islice, product

import numpy as np
import torch
from numpy.typing import NDArray

from diffusion.distillation.options import Method
from diffusion.evaluation.heldout import Estimate, mean_over_images
from diffusion.model import Model
from diffusion.pairs.noise import BLOCK
from diffusion.pairs.pairs import Pairs
from diffusion.pairs.pixels import to_x_0
from diffusion.process.schedule import float64_device
from diffusion.process.timesteps import Timesteps


@torch.inference_mode()
def heldout_loss(
    loss: Method,
    timesteps: Timesteps,
    model: Model,
    pairs: Pairs,
    device: torch.device,
    check_stop: Callable[[], None],
    blocks: int = 16,
) -> Estimate:
    """The loss of a student on the first `blocks` blocks of a split (1,024 pairs by default), a fixed subset.

    The timesteps are distributed and weighted as in the training.
    """
    images, errors = list[NDArray[np.int64]](), list[NDArray[np.float64]]()
    for draw, block in islice(product(range(pairs.manifest.heldout_draws), range(pairs.blocks)), blocks):
        check_stop()
        stored, _, noise = pairs.heldout(block, draw)
        uniform = torch.from_numpy((stored + 0.5) / pairs.num_timesteps)
        t, weight = timesteps.draw(torch.from_numpy(stored), uniform)
        x_0 = torch.from_numpy(to_x_0(pairs.x_0(block), np.float32)).to(device, memory_format=torch.channels_last)
        eps, y = torch.from_numpy(noise).to(device), torch.from_numpy(pairs.labels(block)).to(device)
        error = loss(model.net, x_0, t.to(float64_device(device)), eps, y)
        images.append(block * BLOCK + np.arange(len(stored)))
        errors.append((weight * error.double().cpu()).numpy())
    return mean_over_images(np.concatenate(images), np.concatenate(errors))

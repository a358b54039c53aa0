"""The network's noise prediction on held-out pairs."""

from collections.abc import Callable, Iterator
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from diffusion.data.noise import BLOCK
from diffusion.data.pairs import Pairs
from diffusion.process.build import Process


class Prediction(NamedTuple):
    """The pairs of one block and draw, with what the network made of them."""

    images: NDArray[np.int64]  # (n,): index of each pair's image in its split
    t: NDArray[np.int64]  # (n,)
    x_t: NDArray[np.float32]  # (n, C, H, W)
    eps: NDArray[np.float32]  # (n, C, H, W)
    eps_hat: NDArray[np.float32]  # (n, C, H, W)


@torch.inference_mode()
def predictions(net: torch.nn.Module, process: Process, pairs: Pairs, device: torch.device) -> Iterator[Prediction]:
    """Run the network over all stored draws of a held-out split, block by block."""
    for draw in range(pairs.manifest.heldout_draws):
        for block in range(pairs.blocks):
            t, x_t, eps = pairs.heldout(block, draw)
            on_device = torch.from_numpy(x_t).to(device, memory_format=torch.channels_last)
            steps = torch.from_numpy(t).to(device)
            eps_hat = process.parameterization.to_eps(net(on_device, steps), on_device, steps)
            yield Prediction(block * BLOCK + np.arange(len(t)), t, x_t, eps, eps_hat.cpu().numpy())


def quick_mse(
    net: torch.nn.Module,
    process: Process,
    pairs: Pairs,
    device: torch.device,
    check_stop: Callable[[], None],
    blocks: int = 16,
) -> float:
    """Noise MSE over the first `blocks` blocks of a split's pairs (1,024 pairs): always the same ones."""
    total, count = 0.0, 0
    for prediction in islice(predictions(net, process, pairs, device), blocks):
        check_stop()
        total += float(np.square(prediction.eps_hat - prediction.eps, dtype=np.float64).sum())
        count += prediction.eps.size
    return total / count

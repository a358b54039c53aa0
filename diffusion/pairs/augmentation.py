"""Geometric augmentation that does not leak into samples, by conditioning on it; Karras et al. 2022, appendix F.2.

The network is given each image's parameters as a vector, which is zero for an untransformed image and in sampling.
Samples are therefore untransformed. The transformations are those of table 6, without the vertical flip, which is a
horizontal flip and a rotation.
"""

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F  # noqa: N812

from diffusion.pairs.noise import BLOCK, Purpose, stream

PARAMETERS = 8
"""Length of the vector: flip (0 or 1), scale, cos - 1 and sin of the rotation, stretch (2), translation (2)."""
STRENGTH = 0.2 * math.log(2)
"""Standard deviation of the logarithms of scale and stretch."""
TRANSLATION = 1 / 8
"""Standard deviation of the translation along each axis, as a fraction of the image's side."""


def draw(seed: int, epoch: int, block: int, probability: float) -> NDArray[np.float32]:
    """Parameters (BLOCK, 8) of a block's images, each transformed with this probability in each way; (BLOCK, 0) for 0.

    The stretch is a (cos 2 phi, sin 2 phi) for a factor exp(a STRENGTH) in the direction phi and its inverse across.
    Unlike the paper's a (cos phi, sin phi), equal transformations have equal parameters.
    """
    if not probability:
        return np.empty((BLOCK, 0), np.float32)
    generator = stream(seed, Purpose.AUGMENTATION, high=epoch, low=block)
    flip, scale, rotation, stretch, translation = (generator.random((5, BLOCK)) < probability)[..., None]
    angle, direction = generator.uniform(-math.pi, math.pi, (2, BLOCK, 1))
    normal = generator.standard_normal((BLOCK, 4))
    parts = [
        flip,
        scale * normal[:, :1],
        rotation * (np.cos(angle) - 1),
        rotation * np.sin(angle),
        stretch * normal[:, 1:2] * np.hstack([np.cos(direction), np.sin(direction)]),
        translation * normal[:, 2:],
    ]
    return np.hstack(parts).astype(np.float32)


def transform(images: NDArray[np.uint8], parameters: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Transform images (n, C, H, W) by parameters (n, 8), with bicubic interpolation, reflected at the borders.

    Images without parameters (n, 0), or with all of them zero, are returned unchanged.
    """
    chosen = parameters.any(axis=1)
    if not chosen.any():
        return images
    height, width = images.shape[2:]
    read_from = _affine(parameters[chosen].astype(np.float64))
    # Coordinates are -1 to 1 along each axis for torch, but a rotation has equal units on both.
    read_from[:, 0, 1] *= height / width
    read_from[:, 1, 0] *= width / height
    x = torch.from_numpy(images[chosen]).float()
    grid = F.affine_grid(torch.from_numpy(read_from).float(), list(x.shape), align_corners=False)
    moved = F.grid_sample(x, grid, mode="bicubic", padding_mode="reflection", align_corners=False)
    result = images.copy()
    result[chosen] = moved.clamp(0, 255).round().byte().numpy()
    return result


def _affine(parameters: NDArray[np.float64]) -> NDArray[np.float64]:
    """For parameters (n, 8), the affine maps (n, 2, 3) from a position to the one from which its value is read."""
    flip, scale, cos_less_1, sin, stretch_cos, stretch_sin, right, down = parameters.T
    cos, zero, one = cos_less_1 + 1, np.zeros_like(sin), np.ones_like(sin)
    mirror = _matrices(1 - 2 * flip, zero, zero, one)
    rotation = _matrices(cos, -sin, sin, cos)
    amount = np.hypot(stretch_cos, stretch_sin)
    even, odd = np.cosh(STRENGTH * amount), np.sinh(STRENGTH * amount) / np.where(amount, amount, 1)
    stretch = _matrices(even + odd * stretch_cos, odd * stretch_sin, odd * stretch_sin, even - odd * stretch_cos)
    linear = np.exp(STRENGTH * scale)[:, None, None] * (mirror @ rotation @ stretch)
    moved = 2 * TRANSLATION * np.stack([right, down], axis=1)  # an image is 2 wide and high
    return np.concatenate([linear, moved[..., None]], axis=2)


def _matrices(
    a: NDArray[np.float64], b: NDArray[np.float64], c: NDArray[np.float64], d: NDArray[np.float64]
) -> NDArray[np.float64]:
    """The matrices ((a, b), (c, d)), (n, 2, 2), of entries (n,)."""
    return np.stack([np.stack([a, b], axis=1), np.stack([c, d], axis=1)], axis=1)

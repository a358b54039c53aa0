"""Sampling images from a model."""

import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from diffusion.pairs.noise import Purpose, stream
from diffusion.pairs.pixels import to_uint8, visible
from diffusion.sampling import build as sampling
from diffusion.sampling.build import SampleOptions
from diffusion.sampling.sampler import Noise, trajectory
from diffusion.sources.bands import MODES
from diffusion.storage.files import write_atomic

if TYPE_CHECKING:
    from diffusion.model import Model

MIN_CELL = 64
"""Images with smaller sides are enlarged in grids, at least to about this many pixels."""


def noise_for(seed: int, count: int, shape: tuple[int, int, int], device: torch.device, first: int = 0) -> Noise:
    """Sampling noise for images first, first + 1, ...; that of image i depends only on the seed and i."""

    def draw(index: int) -> torch.Tensor:
        images = [
            stream(seed, Purpose.SAMPLE, high=first + image, low=index).standard_normal(shape, dtype=np.float32)
            for image in range(count)
        ]
        return torch.from_numpy(np.stack(images)).to(device, memory_format=torch.channels_last)

    return draw


def classes_in_turn(model: "Model", count: int, device: torch.device, first: int = 0) -> torch.Tensor | None:
    """Classes of images first, first + 1, ..., int64 (count,), cycling; None if the model has no classes."""
    return torch.arange(first, first + count, device=device) % model.num_classes if model.num_classes else None


def draw_samples(
    model: "Model",
    options: SampleOptions,
    seed: int,
    device: torch.device,
    check_stop: Callable[[], None] = lambda: None,
    first: int = 0,
    y: torch.Tensor | None = None,
) -> NDArray[np.uint8]:
    """Sample images as `options` describe, uint8 (count, C, H, W).

    Returns images first, first + 1, ... of the seed, of the classes `y` int64 (count,), -1 for none; by default, the
    classes in turn. `check_stop` is called after each step.
    """
    timesteps = sampling.sampling_timesteps(options, model.process.schedule)
    sampler = model.sampler(options, classes_in_turn(model, options.count, device, first) if y is None else y)
    noise = noise_for(seed, options.count, model.shape, device, first)
    for point in trajectory(sampler, noise, timesteps):
        check_stop()
        x_t = point.x_t
    return to_uint8(x_t.cpu().numpy())


def grid_png(images: NDArray[np.uint8], side: int = 512, columns: int | None = None) -> bytes:
    """Encode images (N, C, H, W) as a PNG with a grid, by default a nearly square one.

    Of images with other than 1, 3 or 4 channels, `visible` chooses some. Images smaller than MIN_CELL are enlarged by
    an integer factor with nearest-neighbour interpolation, at least to MIN_CELL and up to a grid of `side` pixels,
    since viewers would blur them.
    """
    images = visible(images)
    count, channels, height, width = images.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    longest, line = max(height, width), 1
    scale = max(math.ceil(MIN_CELL / longest), side // (columns * longest)) if longest < MIN_CELL else 1
    cell_width, cell_height = width * scale + line, height * scale + line
    canvas = Image.new(MODES[channels], (columns * cell_width + line, rows * cell_height + line), "gray")
    for index, image in enumerate(images):
        picture = Image.fromarray(image[0] if channels == 1 else np.ascontiguousarray(image.transpose(1, 2, 0)))
        picture = picture.resize((width * scale, height * scale), Image.Resampling.NEAREST)
        canvas.paste(picture, (index % columns * cell_width + line, index // columns * cell_height + line))
    buffer = io.BytesIO()
    canvas.save(buffer, format="PNG")
    return buffer.getvalue()


def save_grid(images: NDArray[np.uint8], path: str | Path, side: int = 512, columns: int | None = None) -> None:
    """Write images (N, C, H, W) to a PNG file as a grid; see `grid_png`."""
    write_atomic(Path(path), grid_png(images, side, columns))

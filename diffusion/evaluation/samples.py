"""Pictures from a model."""

import io
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from diffusion import params
from diffusion.data.noise import Purpose, stream
from diffusion.process.build import Process, sampler
from diffusion.process.sampler import Noise, evenly_spaced, trajectory


def noise_for(seed: int, count: int, shape: tuple[int, int, int], device: torch.device) -> Noise:
    """Sampling noise: image i of a seed gets the same, whatever the number of images."""

    def draw(place: int) -> torch.Tensor:
        images = [
            stream(seed, Purpose.SAMPLE, high=image, low=place).standard_normal(shape, dtype=np.float32)
            for image in range(count)
        ]
        return torch.from_numpy(np.stack(images)).to(device, memory_format=torch.channels_last)

    return draw


def draw_samples(
    net: torch.nn.Module,
    process: Process,
    shape: tuple[int, int, int],
    options: params.Sample,
    seed: int,
    device: torch.device,
    check_stop: Callable[[], None] = lambda: None,
) -> NDArray[np.uint8]:
    """Pictures as `options` say, uint8 (count, C, H, W); `check_stop` is called after each step."""
    steps = evenly_spaced(process.schedule.num_timesteps, options.steps)
    noise = noise_for(seed, options.count, shape, device)
    for point in trajectory(sampler(options, process, net), noise, steps):
        check_stop()
        x_t = point.x_t
    return to_uint8(x_t.cpu().numpy())


def to_uint8(x: NDArray[np.float32]) -> NDArray[np.uint8]:
    """[-1, 1] to 0..255, the inverse of x_0 = v / 127.5 - 1."""
    scaled: NDArray[np.float32] = np.rint((x.clip(-1, 1) + 1) * 127.5)
    return scaled.astype(np.uint8)


def grid_png(images: NDArray[np.uint8], side: int = 512) -> bytes:
    """Images (N, C, H, W) in a nearly square grid with thin lines between them, enlarged to about `side` pixels."""
    count, channels, height, width = images.shape
    columns = int(np.ceil(np.sqrt(count)))
    rows = -(-count // columns)
    scale = max(1, side // (columns * max(height, width)))
    line = max(1, scale // 4)
    large = images.repeat(scale, axis=2).repeat(scale, axis=3)
    cell_height, cell_width = height * scale + line, width * scale + line
    canvas = np.full((rows * cell_height + line, columns * cell_width + line, channels), 128, dtype=np.uint8)
    for index, image in enumerate(large):
        top, left = index // columns * cell_height + line, index % columns * cell_width + line
        canvas[top : top + height * scale, left : left + width * scale] = image.transpose(1, 2, 0)
    buffer = io.BytesIO()
    Image.fromarray(canvas.squeeze(-1) if channels == 1 else canvas).save(buffer, format="PNG")
    return buffer.getvalue()

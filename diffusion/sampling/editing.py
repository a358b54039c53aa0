"""Image editing: image-to-image, interpolation and inpainting. Images are (B, C, H, W) in [-1, 1]."""

from collections.abc import Iterator
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from diffusion.process.schedule import Schedule, float64_device, like, times
from diffusion.sampling.sampler import Noise, Previous, Sampler, sample


def image_to_image(sampler: Sampler, schedule: Schedule, noise: Noise, timesteps: list[int], x_0: Tensor) -> Tensor:
    """Variations of x_0: add noise up to timesteps[0], then denoise along the descending `timesteps`.

    Meng et al. 2022 (SDEdit), algorithm 1. The larger timesteps[0], the less of x_0 remains.
    """
    t = torch.full((len(x_0),), timesteps[0], device=float64_device(x_0.device))
    return sample(sampler, noise, timesteps, schedule.diffuse(x_0, t, noise(0)))


def mix(x_0: Tensor, x_0_other: Tensor, fraction: Tensor) -> Tensor:
    """Interpolate from x_0 (fraction 0) to x_0_other (fraction 1) in pixel space; pass the result to `image_to_image`.

    Ho et al. 2020, section 4.4, with the same noise for both images, which preserves the variance. fraction: (B,).
    """
    return torch.lerp(x_0, x_0_other, like(fraction, x_0).view(-1, 1, 1, 1))


def repaint_path(timesteps: list[int], jump: int, rounds: int) -> list[int]:
    """The timesteps that RePaint visits, -1 at the end: each run of `jump` steps is repeated `rounds` times.

    Between the rounds it goes back up step by step. With one round it is `timesteps` followed by -1.
    """
    path = [timesteps[0]]
    for start in range(0, len(timesteps), jump):
        stretch = [*timesteps, -1][start : start + jump + 1]
        path += (stretch[1:] + stretch[-2::-1]) * (rounds - 1) + stretch[1:]
    return path


@torch.inference_mode()
def inpaint(
    sampler: Sampler, schedule: Schedule, noise: Noise, path: list[int], x_0: Tensor, keep: Tensor
) -> Iterator[Tensor]:
    """Inpaint the region of x_0 outside `keep`; Lugmayr et al. 2022 (RePaint), algorithm 1.

    Yields x after each step; the last one is the result. path: from `repaint_path`. keep: (B or 1, 1, H, W), 1 where
    x_0 is kept and 0 where it is inpainted. At each timestep the kept region is x_0 with fresh noise; steps up add
    noise to the whole image.
    """
    x, previous = noise(0), None
    for index, (t, s) in enumerate(pairwise(path)):
        at, to = (torch.full((len(x),), step, device=float64_device(x.device)) for step in (t, s))
        places = (2 * index + 1, 2 * index + 2)
        if s < t:
            unknown, x_0_hat = sampler.step(x, at, to, partial(noise, places[0]), previous)
            x = keep * schedule.diffuse(x_0, to, noise(places[1])) + (1 - keep) * unknown
            previous = Previous(at, x_0_hat)
        else:
            alpha = schedule(to) / schedule(at)
            x, previous = times(alpha.sqrt(), x) + times((1 - alpha).sqrt(), noise(places[0])), None
        yield x

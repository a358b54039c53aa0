"""The sets of images that are compared: real ones, noise and samples."""

import hashlib
import heapq
import json
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from diffusion.model import Model
from diffusion.pairs.pairs import Manifest, Pairs
from diffusion.pairs.pixels import FIELDS
from diffusion.samples import draw_samples
from diffusion.sampling.build import SampleOptions

BATCH = 128
"""Number of images that are sampled at once."""


class Images(NamedTuple):
    """A set of images with their classes."""

    pixels: NDArray[np.uint8]
    """(N, C, H, W)"""
    labels: NDArray[np.int64]
    """(N,), -1 where there is none"""

    def part(self, indices: NDArray[np.int64] | slice) -> "Images":
        return Images(self.pixels[indices], self.labels[indices])


def data_key(manifest: Manifest) -> str:
    """Digest of what determines the images: their files, split, size and classes, but not their order or the noise."""
    facts = manifest.model_dump(mode="json", include={"shards_sha256", "classes", *FIELDS})
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def data_seed(manifest: Manifest) -> int:
    """Seed of random numbers that are the same for all models of these images."""
    return int(data_key(manifest)[:15], 16)


def chosen(splits: Sequence[Pairs], count: int) -> Images:
    """Choose `count` images from splits, or all if they have fewer: those whose pixels have the smallest SHA-256.

    This is a random choice that depends on nothing but the images, not on the order in which they are stored, and its
    first images are what a smaller choice would be. Memory is that of the chosen images.
    """

    def candidates() -> Iterator[tuple[bytes, int, int, int, int]]:
        for number, pairs in enumerate(splits):
            for block in range(pairs.blocks):
                labels = pairs.labels(block).tolist()
                for row, (image, label) in enumerate(zip(pairs.x_0(block), labels, strict=True)):
                    yield hashlib.sha256(image.tobytes()).digest(), label, number, block, row

    best = heapq.nsmallest(count, candidates())
    pixels = np.empty((len(best), *splits[0].shape), np.uint8)
    for index in sorted(range(len(best)), key=lambda index: best[index][2:]):  # block by block
        _, _, number, block, row = best[index]
        pixels[index] = splits[number].x_0(block)[row]
    return Images(pixels, np.array([label for _, label, *_ in best], np.int64))


def noise(images: Images, count: int, generator: np.random.Generator) -> Images:
    """Images of independent pixels, whose values are drawn from those of all pixels of `images`."""
    values = images.pixels.reshape(-1)
    pixels = values[generator.integers(len(values), size=(count, *images.pixels.shape[1:]))]
    return Images(pixels, np.full(count, -1))


def batches(count: int) -> int:
    """Number of batches in which `samples` samples."""
    return -(-count // BATCH)


def samples(
    model: Model,
    options: SampleOptions,
    seed: int,
    device: torch.device,
    labels: NDArray[np.int64],
    check_stop: Callable[[], None] = lambda: None,
) -> Images:
    """Sample an image of each class (N,), from the same noise as `draw_samples`; `check_stop` is called every step."""
    parts = []
    for first in range(0, len(labels), BATCH):
        y = torch.from_numpy(labels[first : first + BATCH]).to(device)
        few = options.model_copy(update={"count": len(y)})
        parts.append(draw_samples(model, few, seed, device, check_stop, first, y))
    return Images(np.concatenate(parts), labels if model.num_classes else np.full(len(labels), -1))

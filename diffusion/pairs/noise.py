"""Counter-based randomness: every random number is a function of (seed, purpose, position).

Philox (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") maps a key and a 256-bit counter to random
bits. The key consists of seed and purpose, the two high words of the counter are the position, and a stream increments
the two low words, so that streams of different positions never overlap. Draws are therefore independent of earlier
draws, the batch size and the number of processes.
"""

from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from diffusion.storage.tar import SPLITS, Split

BLOCK = 64
"""Number of images in a block, which share a noise stream; the last block of a split may be smaller."""


class Purpose(IntEnum):
    """Purposes of random numbers, part of the key. The noise of the pairs uses the split's index (see `eps_key`)."""

    TIMESTEPS = 16  # + index of the split
    SHUFFLE = 32
    BLOCK_ORDER = 33
    FLIP = 34
    INIT = 35
    DROPOUT = 36
    CLASS_DROPOUT = 37
    TIMESTEP_UNIFORMS = 38
    X_0_MSE = 39
    AUGMENTATION = 40
    SAMPLE = 48
    BOOTSTRAP = 49
    LIKELIHOOD = 50
    QUALITY = 51
    FEATURES = 52


def stream(seed: int, purpose: int, high: int = 0, low: int = 0) -> np.random.Generator:
    """Create the generator for a purpose at position (high, low)."""
    return np.random.Generator(np.random.Philox(key=(seed, purpose), counter=(0, 0, low, high)))


def eps_key(seed: int, split: Split, block: int, draw: int) -> NDArray[np.uint64]:
    """Noise key of draw `draw` of a block, (6,): Philox's key (2 words) and initial counter (4 words)."""
    return np.array([seed, SPLITS.index(split), 0, 0, block, draw], dtype=np.uint64)


def eps_from_key(key: NDArray[np.uint64], shape: tuple[int, int, int]) -> NDArray[np.float32]:
    """Generate the noise of `key`: standard normal float32 (BLOCK, C, H, W), for `shape` = (C, H, W)."""
    words = [int(word) for word in key]
    generator = np.random.Generator(np.random.Philox(key=words[:2], counter=words[2:]))
    return generator.standard_normal((BLOCK, *shape), dtype=np.float32)


def timesteps(seed: int, split: Split, block: int, draw: int, num_timesteps: int) -> NDArray[np.int64]:
    """Timesteps of draw `draw` of a block, int64 (BLOCK,) in [0, T).

    Stratified sampling (Kingma et al. 2021, appendix I.1): one timestep from each of BLOCK equal strata, in random
    order. Each is uniform on [0, T), but the mean over a block varies far less than for independent draws.
    """
    generator = stream(seed, Purpose.TIMESTEPS + SPLITS.index(split), high=draw, low=block)
    t = (np.arange(BLOCK) + generator.random(BLOCK)) * (num_timesteps / BLOCK)
    return generator.permutation(np.minimum(t.astype(np.int64), num_timesteps - 1))

"""Counter-based randomness."""

import numpy as np
import pytest

from diffusion.pairs.noise import BLOCK, eps_from_key, eps_key, stream, timesteps
from diffusion.storage.tar import SPLITS


def test_every_block_has_one_timestep_in_each_stratum() -> None:
    for block, draw in [(0, 0), (3, 1), (1000, 77)]:
        t = timesteps(0, "train", block, draw, 6400)
        assert t.dtype == np.int64
        assert sorted(t // 100) == list(range(BLOCK))
        assert list(t) != sorted(t)


def test_timesteps_are_uniform_also_where_strata_do_not_divide_them_evenly() -> None:
    t = np.concatenate([timesteps(1, "val", block, 0, 100) for block in range(2000)])
    counts = np.bincount(t, minlength=100)
    assert counts.shape == (100,)
    assert np.abs(counts / counts.mean() - 1).max() < 0.1


def test_noise_is_standard_normal() -> None:
    eps = eps_from_key(eps_key(0, "train", 5, 6), (3, 32, 32))
    assert eps.shape == (BLOCK, 3, 32, 32)
    assert eps.dtype == np.float32
    assert abs(eps.mean()) < 0.01
    assert abs(eps.std() - 1) < 0.01
    assert abs((eps**4).mean() - 3) < 0.1


def test_noise_differs_in_every_coordinate() -> None:
    keys = [eps_key(seed, split, b, d) for seed in (0, 1) for split in SPLITS for b in (0, 1) for d in (0, 1)]
    streams = [eps_from_key(key, (1, 8, 8)).ravel() for key in keys]
    correlations = np.corrcoef(streams) - np.eye(len(streams))
    assert np.abs(correlations).max() < 0.1  # 4096 values each: 0.1 is six standard deviations


def test_the_key_is_philox_state_as_documented() -> None:
    philox = np.random.Philox(key=[7, 2], counter=[0, 0, 11, 13])
    expected = np.random.Generator(philox).standard_normal((64, 1, 2, 2), dtype=np.float32)
    np.testing.assert_array_equal(eps_from_key(eps_key(7, "test", 11, 13), (1, 2, 2)), expected)


@pytest.mark.parametrize("seed", [0, 2**31, 2**63 - 1])
def test_streams_depend_on_every_bit_of_the_seed(seed: int) -> None:
    assert stream(seed, 33).random() == stream(seed, 33).random()
    assert stream(seed, 33).random() != stream(seed ^ 1, 33).random()

"""Bands of timesteps."""

import math
from itertools import pairwise

import pytest
import torch

from diffusion.process.bands import BANDS, band_edges, band_of


@pytest.mark.parametrize("num_timesteps", [7, 10, 25, 1000])
def test_each_timestep_is_in_the_band_whose_edges_enclose_it(num_timesteps: int) -> None:
    edges = band_edges(num_timesteps)
    assert (edges[0], edges[-1], len(edges)) == (0, num_timesteps, BANDS + 1)
    width = num_timesteps / BANDS
    assert {after - first for first, after in pairwise(edges)} <= {math.floor(width), math.ceil(width)}
    inside = [sum(edge <= t for edge in edges) - 1 for t in range(num_timesteps)]
    assert band_of(torch.arange(num_timesteps), num_timesteps).tolist() == inside

"""The average of the weights."""

import numpy as np
import pytest
import torch
from torch import nn

from diffusion.training import ema


@pytest.mark.parametrize("width", [0.05, 0.1, 0.25])
def test_gamma_gives_the_width(width: float) -> None:
    """The width is the standard deviation of a density in proportion to s^gamma on [0, 1]."""
    s = (np.arange(200_000) + 0.5) / 200_000
    weight = s ** ema.gamma(width)
    mean = np.average(s, weights=weight)
    assert np.sqrt(np.average((s - mean) ** 2, weights=weight)) == pytest.approx(width, rel=1e-4)


def test_the_average_weighs_each_step_by_its_power() -> None:
    net = nn.Linear(2, 1, dtype=torch.float64)
    average = ema.average_of(net)
    steps, gamma = np.arange(1, 401), ema.gamma(0.1)
    for step in steps:
        with torch.no_grad():
            net.weight.fill_(float(step) ** 2)
        ema.update(average, net, int(step), width=0.1)
    # Exactly: step s keeps its share of (1 - d_s) through all later ones.
    keep = (1 - 1 / steps) ** (gamma + 1)
    share = (1 - keep) * np.append(np.cumprod(keep[::-1])[::-1][1:], 1)
    assert share.sum() == pytest.approx(1)
    assert average.weight[0, 0].item() == pytest.approx((share * steps**2.0).sum())
    # And nearly in proportion to s^gamma.
    power = steps**gamma / (steps**gamma).sum()
    np.testing.assert_allclose(share[100:], power[100:], rtol=0.05)
    assert not average.training
    assert not average.weight.requires_grad


def test_the_first_step_leaves_nothing_of_the_random_weights() -> None:
    net = nn.Linear(2, 1)
    average = ema.average_of(net)
    with torch.no_grad():
        net.weight.fill_(3.0)
    ema.update(average, net, 1, width=0.1)
    assert torch.equal(average.weight, net.weight)

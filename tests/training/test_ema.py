"""The average of the weights."""

import numpy as np
import pytest
import torch
from torch import nn

from diffusion.training import ema
from diffusion.training.options import ConstantOptions, PowerOptions


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
        ema.update(average, net, int(step), PowerOptions(width=0.1))
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


@pytest.mark.parametrize("decay", [0.0, 0.9, 0.9999])
def test_a_constant_decay_weighs_each_step_geometrically(decay: float) -> None:
    """avg_1 = w_1, avg_s = d avg_{s-1} + (1 - d) w_s: w_s counts (1 - d) d^(n - s), and w_1 the rest, d^(n - 1)."""
    net = nn.Linear(2, 1, dtype=torch.float64)
    average = ema.average_of(net)
    weights = np.random.default_rng(0).standard_normal(50)
    for step, weight in enumerate(weights, start=1):
        with torch.no_grad():
            net.weight.fill_(weight)
        ema.update(average, net, step, ConstantOptions(decay=decay))
    share = (1 - decay) * decay ** np.arange(49, -1, -1.0)
    share[0] = decay**49
    assert share.sum() == pytest.approx(1)
    assert average.weight[0, 0].item() == pytest.approx((share * weights).sum(), rel=1e-12)


@pytest.mark.parametrize("options", [PowerOptions(width=0.1), ConstantOptions()])
def test_the_first_step_leaves_nothing_of_the_random_weights(options: PowerOptions | ConstantOptions) -> None:
    net = nn.Linear(2, 1)
    average = ema.average_of(net)
    with torch.no_grad():
        net.weight.fill_(3.0)
    ema.update(average, net, 1, options)
    assert torch.equal(average.weight, net.weight)

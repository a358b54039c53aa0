"""The average of the weights."""

import torch
from torch import nn

from diffusion.training import ema


def test_the_average_follows_its_recursion() -> None:
    net = nn.Linear(2, 1)
    average = ema.average_of(net)
    expected = net.weight.detach().clone()
    for step in range(1, 60):
        with torch.no_grad():
            net.weight.fill_(float(step))
        ema.update(average, net, step, decay=0.8)
        d = min(0.8, (1 + step) / (10 + step))
        expected = d * expected + (1 - d) * step
    torch.testing.assert_close(average.weight, expected)
    assert not average.training
    assert not average.weight.requires_grad

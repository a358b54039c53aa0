"""Learning rate and optimizer."""

import pytest
import torch
from torch import nn

from diffusion.params import Params, Train
from diffusion.training import optim


@pytest.fixture
def options(params: Params) -> Train:
    return params.train.model_copy(
        update={"steps": 100, "warmup_steps": 10, "learning_rate": 1.0, "decay": "constant", "weight_decay": 0.1}
    )


def test_the_rate_rises_linearly_and_reaches_its_peak(options: Train) -> None:
    rates = [optim.learning_rate(step, options) for step in range(12)]
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.0, 1.0])


@pytest.mark.parametrize(
    ("decay", "halfway", "late"), [("constant", 1, 1), ("linear", 0.5, 0.1), ("cosine", 0.5, 0.0245)]
)
def test_the_rate_falls_as_asked(options: Train, decay: str, halfway: float, late: float) -> None:
    options = options.model_copy(update={"decay": decay})
    assert optim.learning_rate(55, options) == pytest.approx(halfway)
    assert optim.learning_rate(91, options) == pytest.approx(late, rel=0.01)


def test_only_matrices_decay(options: Train) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4))
    decaying, others = optim.optimizer(net, options).param_groups
    assert (decaying["weight_decay"], len(decaying["params"])) == (0.1, 1)
    assert (others["weight_decay"], len(others["params"])) == (0.0, 3)
    assert isinstance(decaying["params"][0], torch.Tensor)

"""The gradient of a batch, against the weighted mean of errors (Ho et al. 2020, eq. 14) written out."""

import copy

import pytest
import torch
from torch import Tensor

from diffusion.process import build as processes
from diffusion.training import loop
from flows.params import Params
from tests.nn.networks import network, noise, randomize
from tests.process import fakes
from tests.training.test_loop import changed, fetch

SIZE = 8


def batch() -> tuple[Tensor, ...]:
    """x_0, t, eps, y, weights and no augmentation of a batch, in float64."""
    x_0, eps = noise(2 * SIZE, 1, 8, 8).double().chunk(2)
    weight = torch.linspace(0.2, 3, SIZE, dtype=torch.float64)
    return x_0, torch.arange(SIZE) * 3, eps, torch.full((SIZE,), -1), weight, torch.empty(SIZE, 0)


def gradients(params: Params, net: torch.nn.Module, accumulate: int, *given: Tensor) -> tuple[list[Tensor], Tensor]:
    options = changed(params, train={"accumulate": accumulate, "batch_size": SIZE}).train
    process = processes.process(params.process)
    net = copy.deepcopy(net)
    losses = loop.backward(loop.Trainer(options, 0, process.loss, fetch, net), *given)
    return [parameter.grad for parameter in net.parameters() if parameter.grad is not None], losses


@pytest.fixture
def params(params: Params) -> Params:
    return changed(params, process=fakes.PROCESS | {"num_timesteps": 30, "parameterization": "eps"})


@pytest.fixture
def net() -> torch.nn.Module:
    return randomize(network((1, 8, 8), "unet", "film", channel_multipliers=[1], attention_levels=[0])).double()


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("augmented", [False, True])
def test_it_is_that_of_the_mean_of_the_weighted_errors_of_the_noise(
    params: Params, net: torch.nn.Module, accumulate: int, augmented: bool
) -> None:
    x_0, t, eps, y, weight, augmentation = batch()
    if augmented:
        augmentation = noise(SIZE, 8).double()
        net.conditions.accept_augmentation(8)
        randomize(net.conditions.augmentation)
    found, losses = gradients(params, net, accumulate, x_0, t, eps, y, weight, augmentation)
    alpha_bar = processes.process(params.process).schedule.alpha_bar[t][:, None, None, None]
    x_t = alpha_bar.sqrt() * x_0 + (1 - alpha_bar).sqrt() * eps
    errors = (net(x_t, t, y, augmentation if augmented else None) - eps).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(losses, errors.detach(), rtol=1e-9, atol=0)
    expected = torch.autograd.grad((weight * errors).mean(), list(net.parameters()))
    assert len(found) == len(expected)
    for gradient, right in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, right, rtol=1e-9, atol=1e-12)


def test_where_one_loss_is_not_finite_no_gradient_is(params: Params, net: torch.nn.Module) -> None:
    given = batch()
    given[4][3] = torch.inf
    found, _ = gradients(params, net, 1, *given)
    assert not any(gradient.isfinite().any() for gradient in found)


def test_an_autocast_around_it_does_not_reach_a_loss_in_float32(params: Params, net: torch.nn.Module) -> None:
    x_0, t, eps, y, weight, augmentation = batch()
    given = (x_0.float(), t, eps.float(), y, weight, augmentation)
    _, expected = gradients(params, net.float(), 1, *given)
    with torch.autocast("cpu", torch.bfloat16):
        _, losses = gradients(params, net, 1, *given)
    assert losses.equal(expected)

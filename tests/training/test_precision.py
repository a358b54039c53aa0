"""Training in bfloat16: everything that is multiplied by a schedule's coefficients is in float32.

Expected values are computed in float64 from the features of the bfloat16 layers.
"""

import copy

import pytest
import torch
from torch import Tensor, nn

from diffusion.nn.layers import Network
from diffusion.process.build import Process
from tests.nn.networks import CONDITIONINGS, network, noise, randomize
from tests.process.fakes import PARAMETERIZATIONS, process
from tests.rounding import assert_rounds_alike

T = torch.tensor([0, 1, 500, 950, 990, 999])
X_0, EPS = noise(6, 1, 8, 8).clamp(-1, 1), noise(6, 1, 8, 8, seed=1)


def narrow_and_exact(net: Network, x_t: Tensor, t: Tensor) -> tuple[Tensor, nn.Module, nn.Module]:
    """The network's output (B, C, H, W) under autocast, and the network in float32 and float64 with the same features
    before its last layers."""
    features: list[Tensor] = []
    hook = net.head.register_forward_pre_hook(lambda _, given: features.append(given[0]))  # type: ignore[union-attr]
    with hook, torch.autocast("cpu", torch.bfloat16):
        out = net(x_t, t)
    float32, float64 = copy.deepcopy(net), copy.deepcopy(net).double()
    float32.head.register_forward_pre_hook(lambda _, __: (features[0].float(),))  # type: ignore[union-attr]
    float64.head.register_forward_pre_hook(lambda _, __: (features[0].double(),))  # type: ignore[union-attr]
    return out, float32, float64


def randomized(kind: str, conditioning: str, learned_variance: bool) -> tuple[Network, Process]:
    net = randomize(network((1, 8, 8), kind, conditioning, learned_variance))
    assert isinstance(net, Network)
    return net, process(learned_variance=learned_variance)


@pytest.mark.parametrize("learned_variance", [False, True])
@pytest.mark.parametrize(("kind", "conditioning"), CONDITIONINGS)
def test_the_last_layers_are_in_float32(kind: str, conditioning: str, learned_variance: bool) -> None:
    net, made = randomized(kind, conditioning, learned_variance)
    x_t = made.schedule.diffuse(X_0, T, EPS)
    out, float32, float64 = narrow_and_exact(net, x_t, T)
    assert out.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert net.conditions(T, None).dtype == torch.bfloat16  # the rest is narrow
    assert_rounds_alike(out, float32(x_t, T), float64(x_t.double(), T))


@pytest.mark.parametrize("learned_variance", [False, True])
@pytest.mark.parametrize("name", PARAMETERIZATIONS)
def test_the_loss_is_that_of_float64(name: str, learned_variance: bool) -> None:
    net, _ = randomized("unet", "film", learned_variance)
    made = process(parameterization=name, learned_variance=learned_variance)
    _, float32, float64 = narrow_and_exact(net, made.schedule.diffuse(X_0, T, EPS), T)
    with torch.autocast("cpu", torch.bfloat16):
        loss = made.loss(net, X_0, T, EPS)
    assert loss.isfinite().all()
    exact = made.loss(float64, X_0.double(), T, EPS.double())
    assert_rounds_alike(loss / exact, made.loss(float32, X_0, T, EPS) / exact, exact / exact)


@pytest.mark.parametrize("name", PARAMETERIZATIONS)
def test_x_0_hat_near_pure_noise_is_that_of_float64(name: str) -> None:
    """To within float32's rounding of a x_t and b out, which rounding to bfloat16 exceeds by 2^16."""
    net, _ = randomized("unet", "film", False)
    made = process(parameterization=name).parameterization
    x_t = made.schedule.diffuse(X_0, T, EPS)
    out, _, float64 = narrow_and_exact(net, x_t, T)
    out_exact = float64(x_t.double(), T)
    a, b = made.coefficients(T)
    scale = a.abs() * x_t.abs() + b.abs() * out_exact.abs().amax()
    error = (made.to_x_0(out, x_t, T) - made.to_x_0(out_exact, x_t.double(), T)).abs()
    assert (error <= 1e-6 * scale).all()

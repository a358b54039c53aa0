"""The U-Net."""

from pathlib import Path

import pytest
import torch
from torch import nn

from diffusion import params
from diffusion.nn import build

OPTIONS = {
    "kind": "unet",
    "base_channels": 16,
    "channel_multipliers": [1, 2],
    "blocks_per_level": 1,
    "time_conditioning": "film",
    "attention_levels": [1],
    "patch_size": 1,
    "dropout": 0.0,
}


def network(shape: tuple[int, int, int], **changes: object) -> nn.Module:
    return build.network(shape, params.Network.model_validate(OPTIONS | changes))


def randomize(net: nn.Module) -> nn.Module:
    """Give the layers that start at zero something to do."""
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return net


def test_the_ddpm_papers_cifar10_network_has_its_number_of_parameters() -> None:
    preset = params.load(Path("presets/cifar10.yaml"))
    net = build.network((3, 32, 32), preset.network)
    assert sum(parameter.numel() for parameter in net.parameters()) == 35_746_307  # "35.7 million", app. B


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 28, 28), (3, 15, 9), (1, 7, 32)])
@pytest.mark.parametrize("patch_size", [1, 2])
@pytest.mark.parametrize("time_conditioning", ["add", "film"])
def test_output_has_the_shape_of_the_input(
    shape: tuple[int, int, int], patch_size: int, time_conditioning: str
) -> None:
    net = randomize(network(shape, patch_size=patch_size, time_conditioning=time_conditioning))
    x_t = torch.randn(2, *shape)
    out = net(x_t, torch.tensor([3, 500]))
    assert out.shape == x_t.shape
    assert out.std() > 0


def test_a_new_network_predicts_zero() -> None:
    out = network((1, 8, 8))(torch.randn(2, 1, 8, 8), torch.tensor([0, 9]))
    torch.testing.assert_close(out, torch.zeros_like(out))


def test_each_image_is_treated_alone_and_by_its_own_timestep() -> None:
    net = randomize(network((1, 8, 8))).eval()
    x_t, t = torch.randn(1, 1, 8, 8).expand(3, -1, -1, -1), torch.tensor([5, 5, 900])
    out = net(x_t, t)
    torch.testing.assert_close(out[0], out[1])
    assert (out[0] - out[2]).abs().max() > 1e-3
    torch.testing.assert_close(net(x_t[2:], t[2:])[0], out[2], atol=1e-5, rtol=1e-4)


def test_every_parameter_takes_part() -> None:
    net = randomize(network((1, 8, 8), channel_multipliers=[1, 1, 2], attention_levels=[0, 2]))
    net(torch.randn(2, 1, 8, 8), torch.tensor([1, 2])).square().mean().backward()
    without = [name for name, parameter in net.named_parameters() if parameter.grad is None or not parameter.grad.any()]
    # A key's bias shifts all of a query's scores alike, which softmax does not see.
    assert [name for name in without if not name.endswith("qkv.bias")] == []

"""The U-Net."""

from pathlib import Path

import pytest
import torch
from torch import nn

from diffusion.nn import build
from diffusion.nn.unet import SelfAttention
from flows import presets
from tests.nn.networks import network, noise, randomize


def test_the_ddpm_papers_cifar10_network_has_its_number_of_parameters() -> None:
    preset = presets.load(Path("presets/cifar10.yaml"))
    net = build.network((3, 32, 32), 3, 10, preset.network)
    assert sum(parameter.numel() for parameter in net.parameters()) == 35_746_307  # "35.7 million", app. B


@pytest.mark.parametrize(("head_channels", "heads"), [(0, [1, 1, 1, 1]), (8, [4, 4, 4, 4])])
def test_heads_have_the_channels_asked_for(head_channels: int, heads: list[int]) -> None:
    net = network((1, 8, 8), "unet", "add", head_channels=head_channels)  # one on the way down, middle, two up
    assert [module.heads for module in net.modules() if isinstance(module, SelfAttention)] == heads


@pytest.mark.parametrize("convention", ["ddpm", "diffusers"])
def test_padding_inside_is_the_same_as_zeros_around_the_image(convention: str) -> None:
    odd, even = (randomize(network(shape, "unet", "film", convention=convention)) for shape in [(1, 7, 9), (1, 8, 10)])
    x_t, t = noise(2, 1, 7, 9), torch.tensor([3, 500])
    padded = nn.functional.pad(x_t, (0, 1, 0, 1))
    torch.testing.assert_close(odd(x_t, t), even(padded, t)[:, :, :7, :9])


def test_conventions_share_their_weights_but_not_their_output() -> None:
    ddpm, diffusers = (randomize(network((1, 8, 8), "unet", "film", convention=name)) for name in ("ddpm", "diffusers"))
    x_t, t = noise(1, 1, 8, 8), torch.tensor([3])
    assert (ddpm(x_t, t) - diffusers(x_t, t)).abs().max() > 1e-3
    ddpm.load_state_dict(diffusers.state_dict())


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 15, 9)])
@pytest.mark.parametrize("patch_size", [1, 2, 4])
def test_a_new_network_predicts_zero_and_then_learns_with_all_its_weights(
    shape: tuple[int, int, int], patch_size: int
) -> None:
    net = network(shape, "unet", "film", learned_variance=True, patch_size=patch_size)
    x_t, t = noise(2, *shape), torch.tensor([3, 500])
    out = net(x_t, t)
    assert out.shape == (2, 2 * shape[0], *shape[1:])
    assert not out.any()
    randomize(net)(x_t, t).square().mean().backward()
    assert [name for name, parameter in net.named_parameters() if not parameter.grad.any()] == []

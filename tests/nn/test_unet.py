"""The U-Net."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from functorch.compile import make_boxed_func
from pydantic import ValidationError
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.decomposition import select_decomp_table

from diffusion.nn import build
from diffusion.nn.unet import SelfAttention, UNetOptions
from flows import presets
from tests.nn.networks import network, noise, randomize


@pytest.mark.parametrize("name", ["cifar10", "ho-2020"])
def test_the_ddpm_papers_cifar10_network_has_its_number_of_parameters(name: str) -> None:
    preset = presets.load(Path("presets") / f"{name}.yaml")
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


def test_fourier_features_are_waves_of_the_noisy_image() -> None:
    plain, other = (network((2, 4, 6), "unet", "film", fourier_features=exponents) for exponents in ([], [0, 3]))
    assert (plain.stem[1].in_channels, other.stem[1].in_channels) == (2, 10)
    x = noise(3, 2, 4, 6)
    channels = [x, *(wave(k * torch.pi * x) for k in (1, 8) for wave in (torch.sin, torch.cos))]
    torch.testing.assert_close(other.fourier(x), torch.cat(channels, dim=1))
    assert plain.fourier(x).equal(x)
    seen = []
    other.stem.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    other(x, torch.tensor([0, 1, 2]))
    assert seen[0].equal(other.fourier(x))


@pytest.mark.parametrize("exponents", [(3, 3), (0, 1, 0)])
def test_fourier_features_are_different(exponents: tuple[int, ...]) -> None:
    with pytest.raises(ValidationError, match=f"fourier_features\n.* contains {exponents[0]} more than once"):
        UNetOptions(fourier_features=exponents)


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


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch warns of itself
def test_a_compiled_network_computes_the_same_without_indexed_sums() -> None:
    """Sums by index, by which torch.compile differentiates F.interpolate, are slow on a GPU if deterministic."""
    traced: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        traced.extend(str(node.target) for node in graph.graph.nodes)
        return make_boxed_func(graph.forward)

    def result(compiled: bool) -> list[torch.Tensor]:
        net = randomize(network((1, 8, 8), "unet", "film", channel_multipliers=(1, 2))).double()
        if compiled:
            net.compile(backend=aot_autograd(fw_compiler=backend, decompositions=select_decomp_table()))
        out = net(noise(2, 1, 8, 8).double(), torch.tensor([1, 500]), None)
        out.square().mean().backward()
        return [out.detach(), *(parameter.grad for parameter in net.parameters() if parameter.grad is not None)]

    for found, right in zip(result(compiled=True), result(compiled=False), strict=True):
        torch.testing.assert_close(found, right, rtol=1e-9, atol=1e-12)
    assert "aten.convolution_backward.default" in traced
    assert not [name for name in traced if "index_put" in name]

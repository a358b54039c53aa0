"""Parameter and FLOP counts against closed forms."""

import copy

import pytest
import torch
from torch import Tensor, nn

from diffusion.nn.counting import Counts, count
from tests.nn.networks import CONDITIONINGS, network


class OneConvolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3, padding=1)

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:  # noqa: ARG002
        return self.conv(x_t)


def test_a_convolution_takes_two_operations_for_each_weight_and_place() -> None:
    assert count(OneConvolution(), (3, 6, 7)) == Counts(parameters=5 * 3 * 9 + 5, flops=2 * 5 * 3 * 9 * 6 * 7)


@pytest.mark.parametrize("head_channels", [0, 4])
def test_a_transformer_takes_what_its_layers_and_its_attention_take(head_channels: int) -> None:
    depth, base, patch, tokens = 3, 16, 2, 1 + 4 * 6
    net = network((3, 8, 12), "uvit", "token", depth=depth, patch_size=patch, head_channels=head_channels)
    patches = (tokens - 1) * 2 * base * 3 * patch**2  # multiply-adds into tokens, and out of them
    block = tokens * 12 * base**2 + 2 * tokens**2 * base  # layers; q k^T and its product with v
    skips = depth // 2 * tokens * 2 * base**2
    rest = 2 * base**2 + 8 * 12 * 3 * 3 * 9  # the timestep's layers, and the last convolution
    assert count(net, (3, 8, 12)).flops == 2 * (patches + depth * block + skips + rest)


@pytest.mark.parametrize(("kind", "conditioning"), CONDITIONINGS)
def test_counting_leaves_all_as_it_was(kind: str, conditioning: str) -> None:
    net = network((3, 8, 8), kind, conditioning, classes=True, dropout=0.5).train()
    before, random = copy.deepcopy(net.state_dict()), torch.get_rng_state()
    counts = count(net, (3, 8, 8))
    assert counts.parameters == sum(parameter.numel() for parameter in net.parameters())
    assert torch.equal(torch.get_rng_state(), random)
    assert net.training
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, before[name])
        assert tensor.stride() == before[name].stride()
    assert all(parameter.grad is None and parameter.requires_grad for parameter in net.parameters())
    assert count(net.eval().requires_grad_(False).to("meta"), (3, 8, 8)) == counts

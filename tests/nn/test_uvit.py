"""The transformer with long skip connections."""

import pytest
import torch

from diffusion.nn.uvit import Block, UViT
from tests.nn.networks import CONDITIONINGS, network, noise, options, randomize

UVIT = [conditioning for kind, conditioning in CONDITIONINGS if kind == "uvit"]


def test_the_papers_cifar10_network_has_its_number_of_parameters() -> None:
    net = UViT((3, 32, 32), 3, None, options("uvit", "token", base_channels=512, depth=13, patch_size=2))
    parameters = sum(parameter.numel() for parameter in net.parameters())
    ours = 2 * 512 * (512 + 1)  # the paper's time token has no layers
    assert round((parameters - ours) / 1e6) == 44  # U-ViT-S/2, tab. 1


@pytest.mark.parametrize("conditioning", UVIT)
def test_without_positions_patches_could_be_moved_about(conditioning: str) -> None:
    net = randomize(network((1, 8, 8), "uvit", conditioning, patch_size=2))
    assert isinstance(net, UViT)
    centre = torch.zeros_like(net.final[1].weight)
    centre[:, :, 1, 1] = 1
    net.final[1].load_state_dict({"weight": centre, "bias": torch.zeros(1)})  # the last convolution sees neighbours
    net, x_t, t = net.double(), noise(1, 1, 8, 8).double(), torch.tensor([7])
    moved = x_t.roll((2, 4), (2, 3))
    assert (net(moved, t) - net(x_t, t).roll((2, 4), (2, 3))).abs().max() > 1e-3
    with torch.no_grad():
        net.positions.zero_()
    torch.testing.assert_close(net(moved, t), net(x_t, t).roll((2, 4), (2, 3)))


def test_positions_start_small() -> None:
    positions = UViT((1, 32, 32), 1, None, options("uvit", "token")).positions
    assert positions.shape == (1, 1 + 32 * 32, 16)
    torch.testing.assert_close(positions.std(), torch.tensor(0.02), rtol=0.05, atol=0)


@pytest.mark.parametrize(
    ("conditioning", "classes", "extras"), [("token", False, 1), ("token", True, 2), ("adaln", True, 0)]
)
def test_timestep_and_class_are_tokens_or_none(conditioning: str, classes: bool, extras: int) -> None:
    net = network((1, 7, 9), "uvit", conditioning, patch_size=2, classes=classes)
    assert net.get_parameter("positions").shape == (1, extras + 4 * 5, 16)


def test_an_adaptive_block_starts_as_the_identity_and_follows_its_embedding_later() -> None:
    block, x = Block(options("uvit", "adaln")), noise(3, 5, 16)
    emb = noise(3, 16)
    assert torch.equal(block(x, emb), x)
    randomize(block)
    other = emb.clone()
    other[1] += 1
    changed = (block(x, emb) - block(x, other)).abs().amax(dim=(1, 2))
    assert changed[1] > 1e-3
    assert not changed[[0, 2]].any()


def test_a_block_with_tokens_ignores_the_conditioning_vector() -> None:
    block, x = Block(options("uvit", "token")), noise(3, 5, 16)
    assert torch.equal(block(x, noise(3, 16)), block(x, noise(3, 16, seed=1)))
    assert not torch.equal(block(x, noise(3, 16)), x)


def test_every_long_skip_reaches_its_mirror_image() -> None:
    net = network((1, 8, 8), "uvit", "adaln", depth=5)
    assert isinstance(net, UViT)
    seen: list[torch.Tensor] = []
    for block in net.first:
        block.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    merged: list[torch.Tensor] = []
    for merge in net.merge:
        merge.register_forward_hook(lambda _module, inputs, _output: merged.append(inputs[0][:, :, 16:]))
    randomize(net)(noise(1, 1, 8, 8), torch.tensor([7]))
    assert torch.equal(merged[0], seen[1])
    assert torch.equal(merged[1], seen[0])

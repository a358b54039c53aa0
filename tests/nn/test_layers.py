"""Building blocks against diffusers' and closed forms."""

import pytest
import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.downsampling import Downsample2D
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from diffusion.nn.layers import TimeEmbedding, attend
from diffusion.nn.unet import Downsample, ResidualBlock, SelfAttention, group_norm
from tests.nn.networks import network, noise, options, randomize


@pytest.mark.parametrize("convention", ["ddpm", "ho-2020"])
@pytest.mark.parametrize(("base", "groups"), [(8, 2), (16, 4), (48, 4), (96, 8), (128, 32), (256, 32)])
def test_groups_are_as_many_at_every_level(base: int, groups: int, convention: str) -> None:
    chosen = options("unet", "add", base_channels=base, convention=convention)
    assert {group_norm(base * by, chosen).num_groups for by in (1, 2, 3)} == {groups}


@pytest.mark.parametrize(("base", "groups"), [(16, 4), (32, 32), (64, 32), (128, 32), (224, 32)])
def test_groups_are_as_many_as_in_diffusers(base: int, groups: int) -> None:
    network = options("unet", "add", base_channels=base, convention="diffusers")
    assert group_norm(2 * base, network).num_groups == groups


def test_time_embedding_has_diffusers_features_in_their_order() -> None:
    time, t = TimeEmbedding(16, 32), torch.tensor([0, 1, 500, 999])
    same = nn.Linear(16, 16, bias=False)
    nn.init.eye_(same.weight)
    time.layers = nn.Sequential(same)
    torch.testing.assert_close(time(t), get_timestep_embedding(t, 16, downscale_freq_shift=0), atol=1e-4, rtol=0)
    # The DDPM authors' frequencies end at 1/10000: weights trained with them bring them along.
    shifted = torch.exp(-torch.log(torch.tensor(10_000.0)) * torch.arange(8) / 7)
    time.frequencies.copy_(shifted)
    torch.testing.assert_close(time(t), get_timestep_embedding(t, 16, downscale_freq_shift=1), atol=1e-4, rtol=0)


@pytest.mark.parametrize(("convention", "last"), [("ddpm", 10_000 ** (-7 / 8)), ("ho-2020", 1e-4)])
def test_the_last_frequency_is_that_of_the_convention(convention: str, last: float) -> None:
    net = network((1, 8, 8), "unet", "add", base_channels=16, convention=convention)
    own = net.conditions.time.frequencies
    assert len(own) == 8
    assert own[0] == 1
    assert own[-1].item() == pytest.approx(last, rel=1e-5)
    ratios = own[1:] / own[:-1]
    torch.testing.assert_close(ratios, ratios[:1].expand(7))


@pytest.mark.parametrize(("convention", "padding"), [("ddpm", 0), ("ho-2020", 0), ("diffusers", 1)])
def test_downsampling_pads_as_the_convention_says(convention: str, padding: int) -> None:
    ours, theirs = Downsample(8, convention), Downsample2D(8, use_conv=True, padding=padding)
    theirs.conv.load_state_dict(ours.conv.state_dict())
    x = noise(2, 8, 6, 10)
    torch.testing.assert_close(ours(x, noise(2, 4)), theirs(x))
    assert ours(x, noise(2, 4)).shape == (2, 8, 3, 5)


@pytest.mark.parametrize("heads", [1, 4])
def test_attention_is_a_softmax_over_the_keys_of_each_head(heads: int) -> None:
    qkv = noise(2, 5, 24)
    q, k, v = (part.reshape(2, 5, heads, 8 // heads) for part in qkv.chunk(3, dim=2))
    shares = torch.softmax(torch.einsum("bnhd,bmhd->bhnm", q, k) / (8 // heads) ** 0.5, dim=3)
    torch.testing.assert_close(attend(qkv, heads), torch.einsum("bhnm,bmhd->bnhd", shares, v).reshape(2, 5, 8))


@pytest.mark.parametrize(("convention", "eps"), [("ddpm", 1e-6), ("ho-2020", 1e-6), ("diffusers", 1e-5)])
@pytest.mark.parametrize("head_channels", [0, 8])
def test_attention_agrees_with_diffusers(convention: str, eps: float, head_channels: int) -> None:
    ours = randomize(SelfAttention(16, options("unet", "add", convention=convention, head_channels=head_channels)))
    size = head_channels or 16
    theirs = Attention(
        16, heads=16 // size, dim_head=size, bias=True, norm_num_groups=4, eps=eps, residual_connection=True
    )
    weights = {f"group_norm.{name}": tensor for name, tensor in ours.norm.state_dict().items()}
    for name in ("weight", "bias"):
        for part, tensor in zip("qkv", getattr(ours.qkv, name).chunk(3), strict=True):
            weights[f"to_{part}.{name}"] = tensor.flatten(1) if name == "weight" else tensor
        weights[f"to_out.0.{name}"] = getattr(ours.out, name).flatten(1) if name == "weight" else ours.out.bias
    theirs.load_state_dict(weights)
    # Small values, so that the normalization's epsilon counts.
    x = 0.01 * noise(2, 16, 3, 5).double()
    torch.testing.assert_close(ours.double()(x), theirs.double()(x))


@pytest.mark.parametrize(("conditioning", "theirs_name"), [("add", "default"), ("film", "scale_shift")])
@pytest.mark.parametrize(("convention", "eps"), [("ddpm", 1e-6), ("ho-2020", 1e-6), ("diffusers", 1e-5)])
def test_residual_block_agrees_with_diffusers(conditioning: str, theirs_name: str, convention: str, eps: float) -> None:
    ours = randomize(ResidualBlock(16, 32, options("unet", conditioning, convention=convention)))
    theirs = ResnetBlock2D(
        in_channels=16,
        out_channels=32,
        temb_channels=64,
        groups=4,
        eps=eps,
        time_embedding_norm=theirs_name,
    )
    names = {"emb.": "time_emb_proj.", "shortcut.": "conv_shortcut."}
    weights = ours.state_dict()
    for mine, other in names.items():
        weights = {name.replace(mine, other): tensor for name, tensor in weights.items()}
    theirs.load_state_dict(weights)
    x, emb = 0.01 * noise(2, 16, 6, 5).double(), noise(2, 64).double()
    # Ours is given the embedding behind the nonlinearity that theirs applies in each block.
    torch.testing.assert_close(ours.double()(x, nn.functional.silu(emb)), theirs.double()(x, emb))

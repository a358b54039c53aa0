"""Building blocks of the networks. Images (B, C, H, W), tokens (B, N, C); `emb` (B, E) is what the network is told."""

import math
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from diffusion.nn.options import NetworkOptions

Layer = TypeVar("Layer", nn.Conv2d, nn.Linear)


def zero_(layer: Layer) -> Layer:
    """Start a layer at zero, so that the block around it starts as the identity."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def groups(options: NetworkOptions) -> int:
    """Groups of every group normalization: 32 as in DDPM, or as many as leave each four of the base channels.

    diffusers' default is 32 for any number of channels that it divides.
    """
    base = options.base_channels
    return 32 if options.convention == "diffusers" and base % 32 == 0 else math.gcd(32, base // 4)


class GroupNorm(nn.GroupNorm):
    """Group normalization (Wu & He 2018); then, if given, 1 + `scale` times it plus `shift`, each (B, C)."""

    def forward(self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        h = super().forward(x)
        return h if scale is None or shift is None else h * (1 + scale[:, :, None, None]) + shift[:, :, None, None]


def group_norm(channels: int, options: NetworkOptions) -> GroupNorm:
    """Group normalization of a network's features, at any of its levels."""
    return GroupNorm(groups(options), channels, eps=1e-6 if options.convention == "ddpm" else 1e-5)


def attend(qkv: Tensor, heads: int) -> Tensor:
    """Multi-head attention (Vaswani et al. 2017, sec. 3.2): queries, keys and values (B, N, 3 C) to (B, N, C)."""
    q, k, v = qkv.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)  # each (B, heads, N, C / heads)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def in_full_precision(layers: nn.Module, x: Tensor) -> Tensor:
    """`layers` of x in the precision of their weights, also where autocast is on.

    For a network's last layers: what follows multiplies their output by coefficients up to 1 / sqrt(alpha_bar), and
    with it the rounding of a narrower type.
    """
    if x.is_meta or not torch.is_autocast_enabled(x.device.type):  # autocast knows no meta tensors
        return layers(x)
    with torch.autocast(x.device.type, enabled=False):
        return layers(x.to(next(layers.parameters()).dtype))


class Network(nn.Module):
    """What every network is: see `network` in build.py for how it is called."""

    def hidden(self) -> list[nn.Module]:
        """The blocks between the first layer and the last, which hold nearly all the weights."""
        raise NotImplementedError


class TimeEmbedding(nn.Module):
    """Sinusoidal features of t (Vaswani et al. 2017, sec. 3.5), then two layers: int64 (B,) to (B, emb).

    The frequencies are stored with the weights: imported ones may bring their own.
    """

    def __init__(self, channels: int, emb: int) -> None:
        super().__init__()
        half = channels // 2
        self.frequencies: Tensor
        self.register_buffer("frequencies", torch.exp(-math.log(10_000) * torch.arange(half) / half))
        self.layers = nn.Sequential(nn.Linear(2 * half, emb), nn.SiLU(), nn.Linear(emb, emb))

    def forward(self, t: Tensor) -> Tensor:
        angles = t.to(self.frequencies.dtype)[:, None] * self.frequencies
        waves = torch.cat([angles.sin(), angles.cos()], dim=1)
        return self.layers(waves.to(next(self.layers.parameters()).dtype))


class ClassEmbedding(nn.Module):
    """A vector for each class and, in the last row, one for none: int64 (B,), negative for none, to (B, emb)."""

    def __init__(self, num_classes: int, emb: int) -> None:
        super().__init__()
        self.null = num_classes
        self.table = nn.Embedding(num_classes + 1, emb)

    def forward(self, y: Tensor) -> Tensor:
        return self.table(torch.where(y < 0, self.null, y))


class Conditions(nn.Module):
    """All that the network is told, each as one vector: (t int64 (B,), y int64 (B,) or None) to (B, 1 or 2, emb).

    The first is the timestep's; the second, if the network knows classes (`num_classes` is not None), the class's.
    """

    def __init__(self, channels: int, emb: int, num_classes: int | None) -> None:
        super().__init__()
        self.time = TimeEmbedding(channels, emb)
        self.label = None if num_classes is None else ClassEmbedding(num_classes, emb)

    def forward(self, t: Tensor, y: Tensor | None) -> Tensor:
        vectors = [self.time(t)]
        if self.label is not None:
            vectors.append(self.label(torch.full_like(t, -1) if y is None else y))
        return torch.stack(vectors, dim=1)


class ResidualBlock(nn.Module):
    """Two convolutions with the embedding between them, around a shortcut: (B, C_in, H, W) to (B, C_out, H, W).

    The embedding is added to the features (Ho et al. 2020, app. B) or, with `film`, scales and shifts the normalized
    ones (Nichol & Dhariwal 2021, app. A).
    """

    def __init__(self, channels_in: int, channels_out: int, options: NetworkOptions) -> None:
        super().__init__()
        self.film = options.conditioning == "film"
        self.norm1 = group_norm(channels_in, options)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.emb = nn.Linear(4 * options.base_channels, 2 * channels_out if self.film else channels_out)
        self.norm2 = group_norm(channels_out, options)
        self.dropout = nn.Dropout(options.dropout)
        self.conv2 = zero_(nn.Conv2d(channels_out, channels_out, 3, padding=1))
        self.shortcut = nn.Conv2d(channels_in, channels_out, 1) if channels_in != channels_out else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        condition = self.emb(emb)
        h = self.norm2(h, *condition.chunk(2, dim=1)) if self.film else self.norm2(h + condition[:, :, None, None])
        return self.shortcut(x) + self.conv2(self.dropout(F.silu(h)))


class SelfAttention(nn.Module):
    """Self-attention over all pixels, around a shortcut; Ho et al. 2020, app. B."""

    def __init__(self, channels: int, options: NetworkOptions) -> None:
        super().__init__()
        self.heads = channels // (options.head_channels or channels)
        self.norm = group_norm(channels, options)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = zero_(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        pixels = self.qkv(self.norm(x)).flatten(2).transpose(1, 2)  # (B, H W, 3 C)
        h = attend(pixels, self.heads).transpose(1, 2).unflatten(2, x.shape[2:])
        return x + self.out(h)


class Block(nn.Module):
    """A residual block, with self-attention behind it or not."""

    def __init__(self, channels_in: int, channels_out: int, attention: bool, options: NetworkOptions) -> None:
        super().__init__()
        self.residual = ResidualBlock(channels_in, channels_out, options)
        self.attention = SelfAttention(channels_out, options) if attention else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return self.attention(self.residual(x, emb))


class Downsample(nn.Module):
    """Half the height and width (both even), by a convolution with stride 2; `emb` is not used.

    One row and column of zeros are missing for that: the DDPM authors' code (TensorFlow's "SAME") adds them below and
    on the right, diffusers' default all around, where the last ones go unused.
    """

    def __init__(self, channels: int, convention: str) -> None:
        super().__init__()
        self.padding = (0, 1, 0, 1) if convention == "ddpm" else (1, 0, 1, 0)
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:  # noqa: ARG002
        return self.conv(F.pad(x, self.padding))


class Upsample(nn.Module):
    """Twice the height and width: nearest neighbours, then a convolution; `emb` is not used."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:  # noqa: ARG002
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))

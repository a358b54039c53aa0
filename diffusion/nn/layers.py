"""Building blocks of the networks. Images are (B, C, H, W); `emb` is the timestep's embedding, (B, E)."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812


def zero_(module: nn.Conv2d) -> nn.Conv2d:
    """Start a convolution at zero, so that the block around it starts as the identity."""
    nn.init.zeros_(module.weight)
    if module.bias is not None:
        nn.init.zeros_(module.bias)
    return module


def group_norm(channels: int) -> nn.GroupNorm:
    """Group normalization with 32 groups, as in DDPM, or as many as leave each at least four channels."""
    return nn.GroupNorm(math.gcd(32, channels // 4), channels, eps=1e-6)


class TimeEmbedding(nn.Module):
    """Sinusoidal features of t (Vaswani et al. 2017, sec. 3.5), then two layers: int64 (B,) to (B, 4 * channels)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.frequencies: Tensor
        self.register_buffer("frequencies", torch.exp(-math.log(10_000) * torch.arange(half) / half), persistent=False)
        self.layers = nn.Sequential(
            nn.Linear(2 * half, 4 * channels), nn.SiLU(), nn.Linear(4 * channels, 4 * channels), nn.SiLU()
        )

    def forward(self, t: Tensor) -> Tensor:
        angles = t.to(self.frequencies.dtype)[:, None] * self.frequencies
        return self.layers(torch.cat([angles.sin(), angles.cos()], dim=1))


class ResidualBlock(nn.Module):
    """Two convolutions with a timestep between them, around a shortcut: (B, C_in, H, W) to (B, C_out, H, W).

    The timestep is added to the features (Ho et al. 2020, app. B) or, with `film`, scales and shifts the normalized
    ones (Nichol & Dhariwal 2021, app. A).
    """

    def __init__(self, channels_in: int, channels_out: int, emb: int, film: bool, dropout: float) -> None:
        super().__init__()
        self.film = film
        self.norm1 = group_norm(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.emb = nn.Linear(emb, 2 * channels_out if film else channels_out)
        self.norm2 = group_norm(channels_out)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zero_(nn.Conv2d(channels_out, channels_out, 3, padding=1))
        self.shortcut = nn.Conv2d(channels_in, channels_out, 1) if channels_in != channels_out else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        condition = self.emb(emb)[:, :, None, None]
        if self.film:
            scale, shift = condition.chunk(2, dim=1)
            h = self.norm2(h) * (1 + scale) + shift
        else:
            h = self.norm2(h + condition)
        return self.shortcut(x) + self.conv2(self.dropout(F.silu(h)))


class SelfAttention(nn.Module):
    """Single-head self-attention over all pixels, around a shortcut; Ho et al. 2020, app. B."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = group_norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = zero_(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        _, channels, height, width = x.shape
        pixels = self.qkv(self.norm(x)).flatten(2).transpose(1, 2)  # (B, H W, 3 C)
        q, k, v = pixels[:, None].chunk(3, dim=3)  # one head
        h = F.scaled_dot_product_attention(q, k, v)[:, 0]
        return x + self.out(h.transpose(1, 2).reshape(-1, channels, height, width))


class Block(nn.Module):
    """A residual block, with self-attention behind it or not."""

    def __init__(
        self, channels_in: int, channels_out: int, emb: int, film: bool, dropout: float, attention: bool
    ) -> None:
        super().__init__()
        self.residual = ResidualBlock(channels_in, channels_out, emb, film, dropout)
        self.attention = SelfAttention(channels_out) if attention else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return self.attention(self.residual(x, emb))


class Downsample(nn.Module):
    """Half the height and width, by a convolution with stride 2; `emb` is not used."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:  # noqa: ARG002
        return self.conv(x)


class Upsample(nn.Module):
    """Twice the height and width: nearest neighbours, then a convolution; `emb` is not used."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:  # noqa: ARG002
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))

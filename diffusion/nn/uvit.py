"""A transformer with long skips: U-ViT (Bao et al. 2023, "All are Worth Words"), conditioned as there or as in DiT."""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from diffusion.nn.layers import Conditions, Network, NetworkOptions, attend, in_full_precision, zero_
from diffusion.sections import Channels, Fraction, NonNegative, Positive


def _has_a_middle(network: "UViTOptions") -> None:
    if network.depth % 2 == 0:
        raise ValueError(f"depth must be odd (got {network.depth})")


def _divides_channels_into_heads(network: "UViTOptions") -> None:
    if network.head_channels and network.base_channels % network.head_channels:
        raise ValueError(f"head_channels ({network.head_channels}) must divide {network.base_channels} channels")


class UViTOptions(NetworkOptions):
    """A transformer with long skips, U-ViT (Bao et al. 2023)."""

    rules = (_has_a_middle, _divides_channels_into_heads)

    kind: Literal["uvit"] = "uvit"
    """The kind of network."""
    base_channels: Channels = 32
    """Channels of the tokens; a multiple of 8."""
    depth: Positive = 13
    """Number of blocks, odd: as many before the middle one as after it."""
    conditioning: Literal["token", "adaln"] = "token"
    """How timestep and class enter: as tokens (token; U-ViT), or scaling, shifting and gating (adaln; DiT)."""
    head_channels: NonNegative = 0
    """Channels of each attention head; 0 for a single head."""
    patch_size: Positive = 1
    """Side of the square patches of which each is a token. Larger is faster."""
    dropout: Fraction = 0.0
    """Dropout rate inside the blocks."""


class Attention(nn.Module):
    """Multi-head self-attention over all tokens, with a linear layer behind it: (B, N, C) to the same shape."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(channels, 3 * channels, bias=False)
        self.out = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(attend(self.qkv(x), self.heads))


class Residual(nn.Module):
    """x + body(norm(x)), or adaptively (adaLN-Zero; Peebles & Xie 2023, sec. 3.2): `emb` shifts and scales what the
    body sees and gates what it adds, all starting at zero, so that the whole starts as the identity.
    """

    def __init__(self, body: nn.Module, channels: int, adaptive: bool, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels, elementwise_affine=not adaptive)
        self.modulation = zero_(nn.Linear(channels, 3 * channels)) if adaptive else None
        self.body = nn.Sequential(body, nn.Dropout(dropout))

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        if self.modulation is None:
            return x + self.body(self.norm(x))
        shift, scale, gate = self.modulation(emb)[:, None].chunk(3, dim=2)
        return x + gate * self.body(self.norm(x) * (1 + scale) + shift)


class Block(nn.Module):
    """Attention, then a two-layer perceptron on each token: (B, N, C) to the same shape."""

    def __init__(self, options: UViTOptions) -> None:
        super().__init__()
        channels, adaptive = options.base_channels, options.conditioning == "adaln"
        attention = Attention(channels, channels // (options.head_channels or channels))
        perceptron = nn.Sequential(nn.Linear(channels, 4 * channels), nn.GELU(), nn.Linear(4 * channels, channels))
        self.attention = Residual(attention, channels, adaptive, options.dropout)
        self.perceptron = Residual(perceptron, channels, adaptive, options.dropout)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return self.perceptron(self.attention(x, emb), emb)


class UViT(Network):
    """(x_t (B, C, H, W), t int64 (B,), y int64 (B,) or None) to the raw output (B, C_out, H, W).

    y is the class, negative or None for none; it counts if `num_classes` is not None. Timestep and class are tokens
    before those of the patches, or modulate every block (adaLN). Each block before the middle one has a long skip to
    its mirror image after it. Images whose sides the patches do not divide are padded inside and cropped back.
    """

    Options = UViTOptions

    def __init__(
        self, shape: tuple[int, int, int], channels_out: int, num_classes: int | None, options: UViTOptions
    ) -> None:
        super().__init__()
        channels, height, width = shape
        patch, base, half = options.patch_size, options.base_channels, options.depth // 2
        self.size = (height, width)
        self.padding = (0, -width % patch, 0, -height % patch)
        self.grid = (-(-height // patch), -(-width // patch))
        self.extras = 0 if options.conditioning == "adaln" else 1 if num_classes is None else 2

        self.conditions = Conditions(base, base, num_classes)
        self.patches = nn.Conv2d(channels, base, patch, stride=patch)
        self.positions = nn.Parameter(torch.empty(1, self.extras + self.grid[0] * self.grid[1], base))
        nn.init.trunc_normal_(self.positions, std=0.02)
        self.first = nn.ModuleList(Block(options) for _ in range(half))
        self.middle = Block(options)
        self.merge = nn.ModuleList(nn.Linear(2 * base, base) for _ in range(half))
        self.last = nn.ModuleList(Block(options) for _ in range(half))
        self.head = nn.Sequential(nn.LayerNorm(base), nn.Linear(base, channels_out * patch**2))
        self.final = nn.Sequential(nn.PixelShuffle(patch), zero_(nn.Conv2d(channels_out, channels_out, 3, padding=1)))

    def blocks(self) -> list[nn.Module]:
        return [*self.first, self.middle, *self.merge, *self.last]

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        conditions = self.conditions(t, y)
        emb = F.silu(conditions.sum(dim=1))
        patches = self.patches(F.pad(x_t, self.padding) if any(self.padding) else x_t).flatten(2).transpose(1, 2)
        x = torch.cat([conditions[:, : self.extras], patches], dim=1) + self.positions
        skips = []
        for block in self.first:
            x = block(x, emb)
            skips.append(x)
        x = self.middle(x, emb)
        for merge, block in zip(self.merge, self.last, strict=True):
            x = block(merge(torch.cat([x, skips.pop()], dim=2)), emb)
        patches = in_full_precision(self.head, x[:, self.extras :]).transpose(1, 2).unflatten(2, self.grid)
        return in_full_precision(self.final, patches)[:, :, : self.size[0], : self.size[1]]

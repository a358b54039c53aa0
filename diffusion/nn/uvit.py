"""U-ViT, a transformer with long skip connections (Bao et al. 2023, "All are Worth Words"), optionally with adaLN."""

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
        raise ValueError(f"head_channels ({network.head_channels}) must divide base_channels ({network.base_channels})")


class UViTOptions(NetworkOptions):
    """U-ViT, a transformer with long skip connections (Bao et al. 2023)."""

    rules = (_has_a_middle, _divides_channels_into_heads)

    kind: Literal["uvit"] = "uvit"
    """Network architecture."""
    base_channels: Channels = 32
    """Embedding dimension of the tokens."""
    depth: Positive = 13
    """Number of transformer blocks; odd, since skip connections pair the blocks before and after the middle one."""
    conditioning: Literal["token", "adaln"] = "token"
    """How timestep and class condition the network. token: as extra tokens (U-ViT); adaln: adaLN-Zero, i.e. scale,
    shift and gate of every block (DiT; Peebles & Xie 2023)."""
    head_channels: NonNegative = 0
    """Channels per attention head; 0 for a single head."""
    patch_size: Positive = 1
    """Side of the image patches, each of which becomes a token. Larger is faster and coarser."""
    dropout: Fraction = 0.0
    """Dropout probability in the transformer blocks."""


class Attention(nn.Module):
    """Multi-head self-attention over all tokens: (B, N, C) to the same shape."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(channels, 3 * channels, bias=False)
        self.out = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(attend(self.qkv(x), self.heads))


class Residual(nn.Module):
    """x + body(norm(x)), or with adaLN-Zero (Peebles & Xie 2023, sec. 3.2).

    There `emb` shifts and scales the body's input and gates its output; all start at zero, so that the block starts as
    the identity.
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
    """Transformer block, attention and a two-layer MLP: (B, N, C) to the same shape."""

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
    """U-ViT: (x_t (B, C, H, W), t int64 (B,), y int64 (B,) or None) to the raw output (B, C_out, H, W).

    y is the class, negative or None for none; it is ignored if `num_classes` is None. Timestep and class are tokens
    that precede the patches, or modulate every block (adaLN). A long skip connection links each block before the
    middle to its counterpart after it. Images whose sides are not divisible by the patch size are padded internally
    and the output is cropped.
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

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor | None = None, augmentation: Tensor | None = None) -> Tensor:
        conditions = self.conditions(t, y, augmentation)
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

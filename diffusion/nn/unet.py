"""The U-Net of DDPM (Ho et al. 2020, app. B), optionally on image patches."""

import math
from typing import Annotated, Literal

import torch
from pydantic import AfterValidator, Field
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from diffusion.nn.layers import (
    Conditions,
    FourierFeatures,
    GroupNorm,
    Network,
    NetworkOptions,
    attend,
    in_full_precision,
    zero_,
)
from diffusion.sections import LIST, Channels, Fraction, NonNegative, Positive


def _attends_at_its_levels(network: "UNetOptions") -> None:
    levels = len(network.channel_multipliers)
    if wrong := [level for level in network.attention_levels if level >= levels]:
        raise ValueError(f"attention_levels contains {wrong[0]}, but the levels are 0 to {levels - 1}")


def _different(exponents: tuple[int, ...]) -> tuple[int, ...]:
    if twice := [n for n in exponents if exponents.count(n) > 1]:
        raise ValueError(f"contains {twice[0]} more than once")
    return exponents


def _divides_channels_into_heads(network: "UNetOptions") -> None:
    if network.head_channels:
        widths = [network.base_channels * by for by in network.channel_multipliers]
        attending = {*network.attention_levels, len(widths) - 1}
        for width in (width for level, width in enumerate(widths) if level in attending):
            if width % network.head_channels:
                raise ValueError(f"head_channels ({network.head_channels}) must divide the {width} channels of a level")


class UNetOptions(NetworkOptions):
    """U-Net (Ho et al. 2020)."""

    rules = (_attends_at_its_levels, _divides_channels_into_heads)

    kind: Literal["unet"] = "unet"
    """Network architecture."""
    base_channels: Channels = 32
    """Channels at the first (full-resolution) level."""
    channel_multipliers: Annotated[tuple[Positive, ...], Field(min_length=1), LIST] = (1, 2)
    """Channels of each level as multiples of base_channels; each level halves the resolution of the one before."""
    blocks_per_level: Positive = 1
    """Residual blocks per level in the encoder; the decoder has one more."""
    attention_levels: Annotated[tuple[NonNegative, ...], LIST] = (1,)
    """Levels with self-attention, counted from 0 (full resolution). The middle block always has it."""
    conditioning: Literal["add", "film"] = "film"
    """How the timestep and class embedding conditions each residual block. add: added to the features (DDPM); film:
    scale and shift after normalization (Improved DDPM)."""
    head_channels: NonNegative = 0
    """Channels per attention head; 0 for a single head."""
    patch_size: Positive = 1
    """Side of the patches that the first layer rearranges into channels (space-to-depth); 1 for none. Larger is
    faster and coarser."""
    fourier_features: Annotated[tuple[Annotated[int, Field(ge=0, le=10)], ...], LIST, AfterValidator(_different)] = ()
    """Exponents n: the network also sees sin(2^n pi x) and cos(2^n pi x) of the noisy image (Kingma et al. 2021), for
    details finer than its first convolution resolves. 7 and 8 suit images of 256 values, 3 and 4 those of 16."""
    dropout: Fraction = 0.0
    """Dropout probability in the residual blocks."""
    convention: Literal["ddpm", "ho-2020", "diffusers"] = "ddpm"
    """Padding of downsampling layers, and epsilon and number of groups of GroupNorm, as in the DDPM authors' code or in
    diffusers' defaults; ho-2020: also the frequencies of the timestep's features as in the authors' code. Only matters
    for exchanging weights and for reproducing the paper."""


def groups(options: UNetOptions) -> int:
    """Number of groups of every GroupNorm: 32 as in DDPM, or fewer so that each has at least four of the base channels.

    diffusers' default is 32 whenever it divides the number of channels.
    """
    base = options.base_channels
    return 32 if options.convention == "diffusers" and base % 32 == 0 else math.gcd(32, base // 4)


def group_norm(channels: int, options: UNetOptions) -> GroupNorm:
    """GroupNorm for features with this many channels."""
    return GroupNorm(groups(options), channels, eps=1e-5 if options.convention == "diffusers" else 1e-6)


class ResidualBlock(nn.Module):
    """Residual block of two convolutions conditioned on the embedding: (B, C_in, H, W) to (B, C_out, H, W).

    The embedding is added to the features (Ho et al. 2020, app. B) or, with `film`, scales and shifts the normalized
    features (Nichol & Dhariwal 2021, app. A).
    """

    def __init__(self, channels_in: int, channels_out: int, options: UNetOptions) -> None:
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
    """Residual self-attention over all pixels; Ho et al. 2020, app. B."""

    def __init__(self, channels: int, options: UNetOptions) -> None:
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
    """A residual block, optionally followed by self-attention."""

    def __init__(self, channels_in: int, channels_out: int, attention: bool, options: UNetOptions) -> None:
        super().__init__()
        self.residual = ResidualBlock(channels_in, channels_out, options)
        self.attention = SelfAttention(channels_out, options) if attention else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        return self.attention(self.residual(x, emb))


class Downsample(nn.Module):
    """Halve the height and width (both even) by a stride-2 convolution; `emb` is unused.

    The convolution needs one row and column of padding: the DDPM authors' code (TensorFlow's "SAME") pads at the bottom
    and right. diffusers' default pads all around, of which only the top and left are used.
    """

    def __init__(self, channels: int, convention: str) -> None:
        super().__init__()
        self.padding = (1, 0, 1, 0) if convention == "diffusers" else (0, 1, 0, 1)
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:  # noqa: ARG002
        return self.conv(F.pad(x, self.padding))


class Upsample(nn.Module):
    """Double the height and width by nearest-neighbour upsampling and a convolution; `emb` is unused."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:  # noqa: ARG002
        return self.conv(_doubled(x))


def _doubled(x: Tensor) -> Tensor:
    """Nearest-neighbour upsampling: (B, C, H, W) to (B, C, 2 H, 2 W).

    By broadcasting when compiled: torch.compile differentiates F.interpolate as an indexed sum, which takes a sixth or
    more of a training step on a GPU if it has to be deterministic. Uncompiled, F.interpolate is faster on a CPU.
    """
    if not torch.compiler.is_dynamo_compiling():  # in torch 2.11, torch.compile also sets is_exporting()
        return F.interpolate(x, scale_factor=2.0, mode="nearest")
    batch, channels, height, width = x.shape
    pixels = x.permute(0, 2, 3, 1)[:, :, None, :, None].expand(batch, height, 2, width, 2, channels)
    return pixels.reshape(batch, 2 * height, 2 * width, channels).permute(0, 3, 1, 2)


class UNet(Network):
    """U-Net: (x_t (B, C, H, W), t int64 (B,), y int64 (B,) or None) to the raw output (B, C_out, H, W).

    y is the class, negative or None for none; it is ignored if `num_classes` is None. Images whose sides are not
    divisible by the total downsampling factor are padded internally and the output is cropped.
    """

    Options = UNetOptions

    def __init__(
        self, shape: tuple[int, int, int], channels_out: int, num_classes: int | None, options: UNetOptions
    ) -> None:
        super().__init__()
        channels, height, width = shape
        patch, base = options.patch_size, options.base_channels
        widths = [base * multiplier for multiplier in options.channel_multipliers]
        cell = patch * 2 ** (len(widths) - 1)
        self.size = (height, width)
        self.padding = (0, -width % cell, 0, -height % cell)

        self.conditions = Conditions(base, 4 * base, num_classes, freq_shift=int(options.convention == "ho-2020"))
        features = (1 + 2 * len(options.fourier_features)) * channels
        self.stem = nn.Sequential(nn.PixelUnshuffle(patch), nn.Conv2d(features * patch**2, base, 3, padding=1))
        self.fourier = FourierFeatures(options.fourier_features)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        current, skips = base, [base]
        for level, width_out in enumerate(widths):
            for _ in range(options.blocks_per_level):
                self.down.append(Block(current, width_out, level in options.attention_levels, options))
                current = width_out
                skips.append(current)
            if level < len(widths) - 1:
                self.down.append(Downsample(current, options.convention))
                skips.append(current)
        self.middle = nn.ModuleList(Block(current, current, attention, options) for attention in (True, False))
        for level, width_out in reversed(list(enumerate(widths))):
            for _ in range(options.blocks_per_level + 1):
                self.up.append(Block(current + skips.pop(), width_out, level in options.attention_levels, options))
                current = width_out
            if level > 0:
                self.up.append(Upsample(current))
        to_patch = zero_(nn.Conv2d(current, channels_out * patch**2, 3, padding=1))
        self.head = nn.Sequential(group_norm(current, options), nn.SiLU(), to_patch, nn.PixelShuffle(patch))

    def blocks(self) -> list[nn.Module]:
        return [*self.down, *self.middle, *self.up]

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor | None = None, augmentation: Tensor | None = None) -> Tensor:
        emb = F.silu(self.conditions(t, y, augmentation).sum(dim=1))
        x = self.stem(self.fourier(F.pad(x_t, self.padding) if any(self.padding) else x_t))
        skips = [x]
        for module in self.down:
            x = module(x, emb)
            skips.append(x)
        for module in self.middle:
            x = module(x, emb)
        for module in self.up:
            if isinstance(module, Block):
                x = torch.cat([x, skips.pop()], dim=1)
            x = module(x, emb)
        out = in_full_precision(self.head, x)
        return out[:, :, : self.size[0], : self.size[1]] if any(self.padding) else out

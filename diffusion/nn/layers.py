"""Building blocks of the networks. Images (B, C, H, W), tokens (B, N, C); `emb` (B, E) is the conditioning vector."""

import math
from typing import ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from diffusion.sections import Choice

Layer = TypeVar("Layer", nn.Conv2d, nn.Linear)


def zero_(layer: Layer) -> Layer:
    """Zero-initialize a layer, so that the residual block around it starts as the identity."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


class GroupNorm(nn.GroupNorm):
    """Group normalization (Wu & He 2018), optionally modulated: norm(x) (1 + scale) + shift, with both (B, C)."""

    def forward(self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        h = super().forward(x)
        return h if scale is None or shift is None else h * (1 + scale[:, :, None, None]) + shift[:, :, None, None]


def attend(qkv: Tensor, heads: int) -> Tensor:
    """Multi-head attention (Vaswani et al. 2017, sec. 3.2): queries, keys and values (B, N, 3 C) to (B, N, C)."""
    q, k, v = qkv.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind()  # each (B, heads, N, C / heads)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def in_full_precision(layers: nn.Module, x: Tensor) -> Tensor:
    """Apply `layers` to x in the precision of their weights, even under autocast.

    Used for the output layers: their output, and so its rounding error, is later multiplied by coefficients up to
    1 / sqrt(alpha_bar).
    """
    if x.is_meta or not torch.is_autocast_enabled(x.device.type):  # autocast does not support meta tensors
        return layers(x)
    with torch.autocast(x.device.type, enabled=False):
        return layers(x.to(next(layers.parameters()).dtype))


class FourierFeatures(nn.Module):
    """Append sin(2^n pi x) and cos(2^n pi x) for each of N exponents n: (B, C, H, W) to (B, C (1 + 2 N), H, W).

    They show small differences between values, which the likelihood depends on; Kingma et al. 2021.
    """

    def __init__(self, exponents: tuple[int, ...]) -> None:
        super().__init__()
        self.factors = [2**exponent * math.pi for exponent in exponents]

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, *(wave(factor * x) for factor in self.factors for wave in (torch.sin, torch.cos))], dim=1)


class NetworkOptions(Choice):
    """The denoising network."""

    classes: bool = False
    """Condition the network on the class of each image, which allows sampling by class and guidance."""


class Network(nn.Module):
    """Base class of all networks; `network` in build.py describes how they are built and called."""

    Options: ClassVar[type[NetworkOptions]]
    """The network's options; the default of `kind` is its name in the parameters."""

    conditions: "Conditions"
    """What embeds timestep, class and augmentation; `train.augment` needs it."""

    def blocks(self) -> list[nn.Module]:
        """The blocks between the first and last layers, which hold nearly all the weights."""
        raise NotImplementedError


def frequencies(half: int, freq_shift: int = 0) -> Tensor:
    """Frequencies of the sinusoidal features of t, (half,): 10000^(-i / (half - freq_shift)).

    The shift is 1 in the DDPM authors' code, where the last frequency is 1 / 10000, and 0 by default in diffusers, as
    in Vaswani et al. 2017.
    """
    return torch.exp(-math.log(10_000) * torch.arange(half) / (half - freq_shift))


class TimeEmbedding(nn.Module):
    """Sinusoidal features of t (Vaswani et al. 2017, sec. 3.5) followed by a two-layer MLP: int64 (B,) to (B, emb).

    The frequencies are stored with the weights, since imported weights may use different ones.
    """

    def __init__(self, channels: int, emb: int, freq_shift: int = 0) -> None:
        super().__init__()
        half = channels // 2
        self.frequencies: Tensor
        self.register_buffer("frequencies", frequencies(half, freq_shift))
        self.layers = nn.Sequential(nn.Linear(2 * half, emb), nn.SiLU(), nn.Linear(emb, emb))

    def forward(self, t: Tensor) -> Tensor:
        angles = t.to(self.frequencies.dtype)[:, None] * self.frequencies
        waves = torch.cat([angles.sin(), angles.cos()], dim=1)
        return self.layers(waves.to(next(self.layers.parameters()).dtype))


class ClassEmbedding(nn.Module):
    """A learned vector per class, plus one for no class in the last row: int64 (B,), negative for none, to (B, emb)."""

    def __init__(self, num_classes: int, emb: int) -> None:
        super().__init__()
        self.null = num_classes
        self.table = nn.Embedding(num_classes + 1, emb)

    def forward(self, y: Tensor) -> Tensor:
        return self.table(torch.where(y < 0, self.null, y))


class Conditions(nn.Module):
    """The conditioning vectors: (t int64 (B,), y int64 (B,) or None) to (B, 1 or 2, emb).

    The first embeds the timestep; the second, if `num_classes` is not None, the class. In training with augmentation,
    a linear map of each image's `augmentation` (B, parameters) is added to the first (Karras et al. 2022, app. F.2).
    It has no bias, so a network without it is the network of unaugmented images.
    """

    def __init__(self, channels: int, emb: int, num_classes: int | None, freq_shift: int = 0) -> None:
        super().__init__()
        self.time = TimeEmbedding(channels, emb, freq_shift)
        self.label = None if num_classes is None else ClassEmbedding(num_classes, emb)
        self.augmentation: nn.Linear | None = None

    def accept_augmentation(self, parameters: int) -> None:
        """Add the layer for augmentation; it starts at zero."""
        *_, like = self.time.parameters()  # (emb,)
        self.augmentation = zero_(nn.Linear(parameters, len(like), bias=False, device=like.device, dtype=like.dtype))

    def drop_augmentation(self) -> None:
        """Remove the layer for augmentation."""
        self.augmentation = None

    def forward(self, t: Tensor, y: Tensor | None, augmentation: Tensor | None = None) -> Tensor:
        time = self.time(t)
        if augmentation is not None:
            assert self.augmentation is not None
            time = time + self.augmentation(augmentation)
        vectors = [time]
        if self.label is not None:
            vectors.append(self.label(torch.full_like(t, -1) if y is None else y))
        return torch.stack(vectors, dim=1)

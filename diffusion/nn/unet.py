"""The U-Net of DDPM (Ho et al. 2020, app. B), optionally on patches."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from diffusion.nn.layers import Block, Conditions, Downsample, Network, Upsample, group_norm, in_full_precision, zero_
from diffusion.nn.options import NetworkOptions


class UNet(Network):
    """(x_t (B, C, H, W), t int64 (B,), y int64 (B,) or None) to the raw output (B, C_out, H, W).

    y is the class, negative or None for none; it counts if `num_classes` is not None. Images whose sides the levels do
    not divide are padded inside and cropped back.
    """

    def __init__(
        self, shape: tuple[int, int, int], channels_out: int, num_classes: int | None, options: NetworkOptions
    ) -> None:
        super().__init__()
        channels, height, width = shape
        patch, base = options.patch_size, options.base_channels
        widths = [base * multiplier for multiplier in options.channel_multipliers]
        cell = patch * 2 ** (len(widths) - 1)
        self.size = (height, width)
        self.padding = (0, -width % cell, 0, -height % cell)

        self.conditions = Conditions(base, 4 * base, num_classes)
        self.stem = nn.Sequential(nn.PixelUnshuffle(patch), nn.Conv2d(channels * patch**2, base, 3, padding=1))
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

    def hidden(self) -> list[nn.Module]:
        return [*self.down, *self.middle, *self.up]

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        emb = F.silu(self.conditions(t, y).sum(dim=1))
        x = self.stem(F.pad(x_t, self.padding) if any(self.padding) else x_t)
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

"""The U-Net of DDPM (Ho et al. 2020, app. B), with an optional patchified first layer."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from diffusion import params
from diffusion.nn.layers import Downsample, ResidualBlock, SelfAttention, TimeEmbedding, Upsample, group_norm, zero_


class UNet(nn.Module):
    """(x_t (B, C, H, W), t int64 (B,)) to the raw output (B, C, H, W).

    Images whose sides the levels do not divide are padded inside and cropped back.
    """

    def __init__(self, shape: tuple[int, int, int], options: params.Network) -> None:
        super().__init__()
        channels, height, width = shape
        patch, base = options.patch_size, options.base_channels
        widths = [base * multiplier for multiplier in options.channel_multipliers]
        cell = patch * 2 ** (len(widths) - 1)
        self.size = (height, width)
        self.padding = (0, -width % cell, 0, -height % cell)

        def block(channels_in: int, channels_out: int) -> ResidualBlock:
            film = options.time_conditioning == "film"
            return ResidualBlock(channels_in, channels_out, 4 * base, film, options.dropout)

        def attention(level: int, channels: int) -> nn.Module:
            return SelfAttention(channels) if level in options.attention_levels else nn.Identity()

        self.time = TimeEmbedding(base)
        self.stem = nn.Sequential(nn.PixelUnshuffle(patch), nn.Conv2d(channels * patch**2, base, 3, padding=1))
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        current, skips = base, [base]
        for level, channels_out in enumerate(widths):
            for _ in range(options.blocks_per_level):
                self.down.append(nn.ModuleList([block(current, channels_out), attention(level, channels_out)]))
                current = channels_out
                skips.append(current)
            if level < len(widths) - 1:
                self.down.append(Downsample(current))
                skips.append(current)
        self.middle = nn.ModuleList([block(current, current), SelfAttention(current), block(current, current)])
        for level, channels_out in reversed(list(enumerate(widths))):
            for _ in range(options.blocks_per_level + 1):
                self.up.append(
                    nn.ModuleList([block(current + skips.pop(), channels_out), attention(level, channels_out)])
                )
                current = channels_out
            if level > 0:
                self.up.append(Upsample(current))
        self.head = nn.Sequential(
            group_norm(current),
            nn.SiLU(),
            zero_(nn.Conv2d(current, channels * patch**2, 3, padding=1)),
            nn.PixelShuffle(patch),
        )

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        emb = self.time(t)
        x = self.stem(F.pad(x_t, self.padding) if any(self.padding) else x_t)
        skips = [x]
        for module in self.down:
            if isinstance(module, Downsample):
                x = module(x)
            else:
                x = module[1](module[0](x, emb))
            skips.append(x)
        x = self.middle[2](self.middle[1](self.middle[0](x, emb)), emb)
        for module in self.up:
            if isinstance(module, Upsample):
                x = module(x)
            else:
                x = module[1](module[0](torch.cat([x, skips.pop()], dim=1), emb))
        return self.head(x)[:, :, : self.size[0], : self.size[1]]

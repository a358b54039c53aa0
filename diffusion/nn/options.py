"""Options of the networks."""

from typing import Annotated, Literal

from pydantic import Field

from diffusion.sections import LIST, Fraction, NonNegative, Positive, Section


def _groups_channels(network: "NetworkOptions") -> None:
    if network.base_channels % 8:
        raise ValueError(f"base_channels must be a multiple of 8 (got {network.base_channels})")


def _attends_at_its_levels(network: "NetworkOptions") -> None:
    levels = len(network.channel_multipliers)
    if wrong := [level for level in network.attention_levels if level >= levels]:
        raise ValueError(f"attention_levels names level {wrong[0]}, but levels go from 0 to {levels - 1}")


def _conditions_in_its_way(network: "NetworkOptions") -> None:
    allowed = ("add", "film") if network.kind == "unet" else ("token", "adaln")
    if network.conditioning not in allowed:
        raise ValueError(
            f"conditioning of a {network.kind} must be {' or '.join(allowed)} (got {network.conditioning})"
        )


def _has_a_middle(network: "NetworkOptions") -> None:
    if network.kind == "uvit" and network.depth % 2 == 0:
        raise ValueError(f"depth must be odd (got {network.depth})")


def _divides_channels_into_heads(network: "NetworkOptions") -> None:
    if network.head_channels:
        levels = len(network.channel_multipliers)
        attending = {*network.attention_levels, levels - 1} if network.kind == "unet" else set[int]()
        widths = [network.base_channels * network.channel_multipliers[level] for level in attending if level < levels]
        for width in widths or [network.base_channels]:
            if width % network.head_channels:
                raise ValueError(f"head_channels ({network.head_channels}) must divide {width} channels")


class NetworkOptions(Section):
    """The denoising network."""

    rules = (
        _groups_channels,
        _attends_at_its_levels,
        _conditions_in_its_way,
        _has_a_middle,
        _divides_channels_into_heads,
    )

    kind: Literal["unet", "uvit"] = "unet"
    """Family of networks: a U-Net (Ho et al. 2020) or a transformer with long skips, U-ViT (Bao et al. 2023)."""
    base_channels: Positive = 32
    """Channels of the U-Net's first level, or of the transformer's tokens; a multiple of 8."""
    channel_multipliers: Annotated[tuple[Positive, ...], Field(min_length=1), LIST] = (1, 2)
    """U-Net: channels of each level, in multiples of base_channels; each level halves the resolution."""
    blocks_per_level: Positive = 1
    """U-Net: residual blocks at each level on the way down (one more on the way up)."""
    attention_levels: Annotated[tuple[NonNegative, ...], LIST] = (1,)
    """U-Net: levels with self-attention, counted from 0, the finest; the middle always has it."""
    depth: Positive = 13
    """Transformer: number of blocks, odd: as many before the middle one as after it."""
    conditioning: Literal["add", "film", "token", "adaln"] = "film"
    """How timestep and class enter. U-Net: added to the features (add; DDPM), or scaling and shifting them (film;
    Improved DDPM). Transformer: as tokens (token; U-ViT), or scaling, shifting and gating (adaln; DiT)."""
    head_channels: NonNegative = 0
    """Channels of each attention head; 0 for a single head."""
    patch_size: Positive = 1
    """Side of the square patches that the first layer folds into channels; 1 for none. Larger is faster."""
    dropout: Fraction = 0.0
    """Dropout rate inside the blocks."""
    classes: bool = False
    """Whether the network is told the class of each image, so that it can be asked for one."""
    convention: Literal["ddpm", "diffusers"] = "ddpm"
    """U-Net: details in which the DDPM authors' code and diffusers' defaults differ (padding when halving the
    resolution, epsilon and groups of the normalization): matters for exchanging weights alone."""

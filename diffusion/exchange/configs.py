"""Conversion between the configurations of diffusers' UNet2DModel and DDPMScheduler and this library's parameters.

The fields are those of diffusers' JSON files, with its defaults for missing ones. Their types only admit values that
are supported here, so that others are rejected by name. Unknown fields are ignored.
"""

from collections.abc import Callable
from typing import Annotated, Any, Literal, Self, TypeVar

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from torch import Tensor

from diffusion.model import Config
from diffusion.nn.unet import UNetOptions, groups
from diffusion.process import build as processes
from diffusion.process import schedule
from diffusion.process.build import ProcessOptions
from diffusion.sampling.build import SampleOptions
from diffusion.sections import Fraction, Positive

PREDICTIONS = {"eps": "epsilon", "x_0": "sample", "v": "v_prediction"}
VARIANCES = {"fixed-small": "fixed_small", "fixed-large": "fixed_large", "learned": "learned_range"}
CONDITIONINGS = {"add": "default", "film": "scale_shift"}
CONVENTIONS = {"ddpm": (0, 1e-6), "ho-2020": (0, 1e-6), "diffusers": (1, 1e-5)}
"""(downsample_padding, norm_eps) by convention; ddpm and ho-2020 differ in freq_shift, which comes with the weights."""
NAMED = {
    "linear": schedule.linear,
    "scaled-linear": schedule.scaled_linear,
    "cosine": schedule.cosine,
    "sigmoid": schedule.sigmoid,
}
SCHEDULES = {"linear": "linear", "scaled-linear": "scaled_linear", "cosine": "squaredcos_cap_v2"}
BETAS: dict[str, Callable[[float, float, int], Tensor]] = {
    "linear": lambda start, end, T: torch.linspace(start, end, T, dtype=torch.float64),
    "scaled_linear": lambda start, end, T: torch.linspace(start**0.5, end**0.5, T, dtype=torch.float64) ** 2,
    "squaredcos_cap_v2": lambda start, end, T: schedule.cosine(T),  # noqa: ARG005
    "sigmoid": lambda start, end, T: start + (end - start) * torch.linspace(-6, 6, T, dtype=torch.float64).sigmoid(),
}
"""Functions from beta_start, beta_end and T to beta (T,), by beta_schedule."""
NEUTRAL = {
    "timestep_spacing": "linspace",
    "steps_offset": 0,
    "clip_sample_range": 1.0,
    "dynamic_thresholding_ratio": 0.995,
    "sample_max_value": 1.0,
    "set_alpha_to_one": True,
}
"""Scheduler settings without a counterpart here, with the values for which sampling is the same."""
Down = Literal["DownBlock2D", "AttnDownBlock2D"]
Up = Literal["UpBlock2D", "AttnUpBlock2D"]
Key = TypeVar("Key")
Value = TypeVar("Value")


def key_of(table: dict[Key, Value], value: Value) -> Key:
    """The first key of `table` with this value."""
    return next(key for key, found in table.items() if found == value)


def _pair(size: Any) -> Any:
    if size is None:
        raise ValueError("must be the height and width of the images")
    return (size, size) if isinstance(size, int) else size


class _Json(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", populate_by_name=True)

    def document(self) -> dict[str, Any]:
        """Content of the JSON file."""
        return self.model_dump(mode="json", by_alias=True)


class UNetConfig(_Json):
    """`config.json` of a UNet2DModel."""

    class_name: Literal["UNet2DModel"] = Field(default="UNet2DModel", alias="_class_name")
    sample_size: Annotated[tuple[Positive, Positive], BeforeValidator(_pair)] = Field(
        default=None, validate_default=True
    )
    in_channels: Positive = 3
    out_channels: Positive = 3
    center_input_sample: Literal[False] = False
    time_embedding_type: Literal["positional"] = "positional"
    time_embedding_dim: Positive | None = None
    freq_shift: Literal[0, 1] = 0
    flip_sin_to_cos: bool = True
    down_block_types: tuple[Down, ...] = ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D")
    mid_block_type: Literal["UNetMidBlock2D"] = "UNetMidBlock2D"
    up_block_types: tuple[Up, ...] = ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D")
    block_out_channels: Annotated[tuple[Positive, ...], Field(min_length=1)] = (224, 448, 672, 896)
    layers_per_block: Positive = 2
    mid_block_scale_factor: Literal[1] = 1
    downsample_padding: int = 1
    downsample_type: Literal["conv"] = "conv"
    upsample_type: Literal["conv"] = "conv"
    dropout: Fraction = 0.0
    act_fn: Literal["silu", "swish"] = "silu"
    attention_head_dim: Positive | None = 8
    norm_num_groups: Positive = 32
    attn_norm_num_groups: Positive | None = None
    norm_eps: float = 1e-5
    resnet_time_scale_shift: Literal["default", "scale_shift"] = "default"
    add_attention: Literal[True] = True
    class_embed_type: None = None
    num_class_embeds: None = None

    @model_validator(mode="after")
    def _has_a_counterpart(self) -> Self:
        levels, base = len(self.block_out_channels), self.block_out_channels[0]
        cell, up = 2 ** (levels - 1), up_block_types(self.down_block_types)
        # With scale_shift, diffusers only normalizes before the middle attention if attn_norm_num_groups is given.
        groups = {self.norm_num_groups} | ({None} if self.resnet_time_scale_shift == "default" else set())
        convention = (self.downsample_padding, self.norm_eps)
        wanted = {
            f"sample_size must be multiples of {cell}": not any(side % cell for side in self.sample_size),
            "out_channels must be in_channels or twice that": self.out_channels / self.in_channels in (1, 2),
            f"time_embedding_dim must be null or {4 * base}": self.time_embedding_dim in (None, 4 * base),
            f"block_out_channels must be multiples of {base}": not any(at % base for at in self.block_out_channels),
            f"down_block_types must have {levels} entries, as block_out_channels": len(self.down_block_types) == levels,
            f"up_block_types must be {', '.join(up)}": self.up_block_types == up,
            f"attn_norm_num_groups must be {self.norm_num_groups}": self.attn_norm_num_groups in groups,
            "downsample_padding and norm_eps must be 0 and 1e-06, or 1 and 1e-05": convention in CONVENTIONS.values(),
        }
        if problems := [must for must, holds in wanted.items() if not holds]:
            raise ValueError("; ".join(problems))
        return self

    @classmethod
    def of(cls, config: Config, freq_shift: int) -> Self:
        """The configuration of a U-Net whose frequencies have this `freq_shift`."""
        network, (channels, *size) = config.network, config.shape
        assert isinstance(network, UNetOptions)
        levels = range(len(network.channel_multipliers))
        down = tuple("AttnDownBlock2D" if level in network.attention_levels else "DownBlock2D" for level in levels)
        padding, eps = CONVENTIONS[network.convention]
        return cls.model_validate(
            {
                "sample_size": size,
                "in_channels": channels,
                "out_channels": 2 * channels if config.process.learned_variance else channels,
                "freq_shift": freq_shift,
                "flip_sin_to_cos": False,
                "down_block_types": down,
                "up_block_types": up_block_types(down),
                "block_out_channels": [network.base_channels * by for by in network.channel_multipliers],
                "layers_per_block": network.blocks_per_level,
                "downsample_padding": padding,
                "dropout": network.dropout,
                "attention_head_dim": network.head_channels or None,
                "norm_num_groups": groups(network),
                "attn_norm_num_groups": groups(network),
                "norm_eps": eps,
                "resnet_time_scale_shift": CONDITIONINGS[network.conditioning],
            }
        )

    def network(self) -> UNetOptions:
        """Convert to network options; raises ValidationError if they are not supported."""
        base = self.block_out_channels[0]
        attention = [level for level, name in enumerate(self.down_block_types) if name == "AttnDownBlock2D"]
        return UNetOptions.model_validate(
            {
                "base_channels": base,
                "channel_multipliers": [channels // base for channels in self.block_out_channels],
                "blocks_per_level": self.layers_per_block,
                "attention_levels": attention,
                "conditioning": key_of(CONDITIONINGS, self.resnet_time_scale_shift),
                "head_channels": self.attention_head_dim or 0,
                "dropout": self.dropout,
                "convention": key_of(CONVENTIONS, (self.downsample_padding, self.norm_eps)),
            }
        )


def up_block_types(down: tuple[str, ...]) -> tuple[str, ...]:
    """The decoder's block types, with attention at the same levels as in the encoder."""
    return tuple(name.replace("Down", "Up") for name in reversed(down))


class SchedulerConfig(_Json):
    """`scheduler_config.json` of a DDPMScheduler or DDIMScheduler."""

    class_name: Literal["DDPMScheduler", "DDIMScheduler"] = Field(default="DDPMScheduler", alias="_class_name")
    num_train_timesteps: Positive = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"] = "linear"
    trained_betas: tuple[float, ...] | None = None
    variance_type: Literal["fixed_small", "fixed_small_log", "fixed_large", "learned_range"] = "fixed_small"
    clip_sample: bool = True
    prediction_type: Literal["epsilon", "sample", "v_prediction"] = "epsilon"
    thresholding: bool = False
    timestep_spacing: str = "leading"
    rescale_betas_zero_snr: bool = False

    @classmethod
    def of(cls, process: ProcessOptions, sample: SampleOptions) -> Self:
        """The configuration of a process, with the sampling options that it can express.

        The sampler `consistency` becomes a DDIMScheduler, whose steps are those with gamma 0; others a DDPMScheduler.
        """
        beta, distilled = processes.betas(process), sample.sampler.kind == "consistency"
        known = process.schedule.kind in SCHEDULES
        return cls.model_validate(
            {
                "class_name": "DDIMScheduler" if distilled else "DDPMScheduler",
                "num_train_timesteps": process.num_timesteps,
                "beta_start": float(beta[0]),
                "beta_end": float(beta[-1]),
                "beta_schedule": SCHEDULES.get(process.schedule.kind, "linear"),
                "trained_betas": None if known else beta.tolist(),
                "variance_type": VARIANCES.get(sample.variance, "fixed_small"),
                "clip_sample": sample.threshold == "clip",
                "prediction_type": PREDICTIONS[process.parameterization],
                # DDIMScheduler always goes T // steps timesteps back, which trailing ones are apart.
                "timestep_spacing": "trailing" if distilled else "linspace",
                "rescale_betas_zero_snr": process.zero_terminal_snr,
            }
        )

    def process(self) -> ProcessOptions:
        """Convert to process options, with DDPM's training objective; raises ValidationError if not supported."""
        T = self.num_train_timesteps
        beta = BETAS[self.beta_schedule](self.beta_start, self.beta_end, T)
        if self.trained_betas is not None:
            beta = torch.tensor(self.trained_betas, dtype=torch.float64)
        names = [name for name, make in NAMED.items() if len(beta) == T and torch.allclose(beta, make(T), 1e-6, 0)]
        return ProcessOptions.model_validate(
            {
                "schedule": names[0] if names else {"kind": "given", "beta": beta.tolist()},
                "num_timesteps": T,
                "zero_terminal_snr": self.rescale_betas_zero_snr,
                "parameterization": key_of(PREDICTIONS, self.prediction_type),
                "learned_variance": self.variance_type == "learned_range",
                "weighting": "snr-plus-one" if self.rescale_betas_zero_snr else "simple",
                "loss": "mse",
            }
        )

    def sampling(self) -> str:
        """The sampling settings as this library's parameters."""
        sampler = "ddim" if self.class_name == "DDIMScheduler" else "ddpm"
        variance = key_of(VARIANCES, self.variance_type.removesuffix("_log"))
        threshold = "dynamic" if self.thresholding else "clip" if self.clip_sample else "none"
        return f"sample.sampler: {sampler}, sample.variance: {variance}, sample.threshold: {threshold}"

    @classmethod
    def without_counterpart(cls, document: dict[str, Any]) -> list[str]:
        """Settings in a scheduler_config.json that affect sampling but are not covered by `sampling`."""
        ours = {field.alias or name for name, field in cls.model_fields.items()} - {"timestep_spacing"}
        settings = {"timestep_spacing": cls.model_fields["timestep_spacing"].default} | document
        return [
            f"{name}: {value}"
            for name, value in sorted(settings.items())
            if name not in ours and not name.startswith("_") and not (name in NEUTRAL and NEUTRAL[name] == value)
        ]

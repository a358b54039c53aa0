"""Which parameters fit together. A rule raises ValueError if those that it reads do not."""

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffusion.params import Network, Params, Process, Shard, Train


def leaves_something_to_train_on(shard: "Shard") -> None:
    if shard.val_fraction + shard.test_fraction >= 1:
        raise ValueError("val_fraction + test_fraction must be below 1, to leave images to train on")


def beta_is_given(process: "Process") -> None:
    if process.schedule == "given" and len(process.beta) != process.num_timesteps:
        raise ValueError(f"beta has {len(process.beta)} values, but num_timesteps is {process.num_timesteps}")
    if process.schedule != "given" and process.beta:
        raise ValueError(f"beta is for the schedule given; with {process.schedule} it must be []")


def has_timesteps_enough(process: "Process") -> None:
    if process.schedule in ("linear", "scaled-linear") and process.num_timesteps < 21:
        raise ValueError(f"the schedule {process.schedule} needs num_timesteps of at least 21")


def leaves_something_to_see(process: "Process") -> None:
    if math.prod(1 - beta for beta in process.beta[:-1]) < 1e-12:
        raise ValueError("beta leaves nothing of the image before the last timestep: give fewer or smaller values")


def predicts_from_noise_alone(process: "Process") -> None:
    if process.zero_terminal_snr and process.parameterization == "eps":
        raise ValueError(
            "zero_terminal_snr needs another parameterization than eps (v, say): at the last timestep x_t is noise "
            "alone, and eps says nothing of the image"
        )


def weighs_the_last_timestep(process: "Process") -> None:
    if process.zero_terminal_snr and process.weighting not in ("snr-plus-one", "truncated-snr"):
        raise ValueError(
            "zero_terminal_snr needs the weighting snr-plus-one or truncated-snr: "
            f"{process.weighting} gives the last timestep, where sampling begins, no weight"
        )


def groups_channels(network: "Network") -> None:
    if network.base_channels % 8:
        raise ValueError(f"base_channels must be a multiple of 8 (got {network.base_channels})")


def attends_at_its_levels(network: "Network") -> None:
    levels = len(network.channel_multipliers)
    if wrong := [level for level in network.attention_levels if level >= levels]:
        raise ValueError(f"attention_levels names level {wrong[0]}, but levels go from 0 to {levels - 1}")


def conditions_in_its_way(network: "Network") -> None:
    allowed = ("add", "film") if network.kind == "unet" else ("token", "adaln")
    if network.conditioning not in allowed:
        raise ValueError(
            f"conditioning of a {network.kind} must be {' or '.join(allowed)} (got {network.conditioning})"
        )


def has_a_middle(network: "Network") -> None:
    if network.kind == "uvit" and network.depth % 2 == 0:
        raise ValueError(f"depth must be odd (got {network.depth})")


def divides_channels_into_heads(network: "Network") -> None:
    if network.head_channels:
        levels = len(network.channel_multipliers)
        attending = {*network.attention_levels, levels - 1} if network.kind == "unet" else set[int]()
        widths = [network.base_channels * network.channel_multipliers[level] for level in attending if level < levels]
        for width in widths or [network.base_channels]:
            if width % network.head_channels:
                raise ValueError(f"head_channels ({network.head_channels}) must divide {width} channels")


def divides(train: "Train") -> None:
    parts = train.processes * train.accumulate
    if train.batch_size % parts:
        raise ValueError(f"batch_size ({train.batch_size}) must be a multiple of processes x accumulate ({parts})")


def samples_at_timesteps_that_exist(params: "Params") -> None:
    if params.sample.steps > params.process.num_timesteps:
        raise ValueError(
            f"sample.steps ({params.sample.steps}) exceeds process.num_timesteps ({params.process.num_timesteps})"
        )


def exports_timesteps_that_exist(params: "Params") -> None:
    if params.export.steps > params.process.num_timesteps:
        raise ValueError(
            f"export.steps ({params.export.steps}) exceeds process.num_timesteps ({params.process.num_timesteps})"
        )


def has_patches_that_fit(params: "Params") -> None:
    if params.network.patch_size > min(params.pairs.height, params.pairs.width):
        raise ValueError(f"network.patch_size ({params.network.patch_size}) exceeds the images' side")


def draws_the_last_timestep(params: "Params") -> None:
    if params.process.zero_terminal_snr and params.train.timesteps == "log-snr-normal":
        raise ValueError("train.timesteps: log-snr-normal never draws the last timestep of zero_terminal_snr")


def has_learned_its_variance(params: "Params") -> None:
    if params.sample.variance == "learned" and not params.process.learned_variance:
        raise ValueError("sample.variance is learned, which needs process.learned_variance: true")


def exports_its_variance(params: "Params") -> None:
    if params.sample.variance == "learned" and params.export.sampler == "ddpm":
        raise ValueError("export.sampler is ddpm, which in ONNX cannot have sample.variance learned: choose another")

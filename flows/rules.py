"""Which parameters fit together. A rule raises ValueError if those that it reads do not."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flows.params import Params, Shard


def leaves_something_to_train_on(shard: "Shard") -> None:
    if shard.val_fraction + shard.test_fraction >= 1:
        raise ValueError("val_fraction + test_fraction must be below 1, to leave images to train on")


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
    patch_size = getattr(params.network, "patch_size", 1)  # not every network has patches
    if patch_size > min(params.pairs.height, params.pairs.width):
        raise ValueError(f"network.patch_size ({patch_size}) exceeds the images' side")


def draws_the_last_timestep(params: "Params") -> None:
    if params.process.zero_terminal_snr and params.train.timesteps == "log-snr-normal":
        raise ValueError("train.timesteps: log-snr-normal never draws the last timestep of zero_terminal_snr")


def has_learned_its_variance(params: "Params") -> None:
    if params.sample.variance == "learned" and not params.process.learned_variance:
        raise ValueError("sample.variance is learned, which needs process.learned_variance: true")


def exports_its_variance(params: "Params") -> None:
    if params.sample.variance == "learned" and params.export.sampler.kind == "ddpm":
        raise ValueError("export.sampler is ddpm, which in ONNX cannot have sample.variance learned: choose another")

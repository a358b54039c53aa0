"""Rules across the sections of params.yaml, each of which raises ValueError if it is violated."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from diffusion.sampling.build import SampleOptions

if TYPE_CHECKING:
    from flows.params import Params


def laid_over(sample: SampleOptions, changes: dict[str, Any]) -> SampleOptions:
    """The section `sample` with the changes of an entry of `evaluate.samplers`."""
    fields = {name: getattr(sample, name) for name in SampleOptions.model_fields}
    return SampleOptions(**fields | changes)


def exported(params: Params) -> SampleOptions:
    """How sampler.onnx samples."""
    export = params.export
    settings = {"sampler": export.sampler, "steps": export.steps, "spacing": export.spacing}
    return params.sample.model_copy(update=settings)


def _samplings(params: Params) -> Iterator[tuple[str, SampleOptions]]:
    """All settings in which evaluate draws samples, by their place in params.yaml."""
    yield "sample", params.sample
    for index, changes in enumerate(params.evaluate.samplers):
        yield f"evaluate.samplers.{index}", laid_over(params.sample, changes)


def samples_at_timesteps_that_exist(params: Params) -> None:
    for place, sample in _samplings(params):
        if sample.steps > (T := params.process.num_timesteps):
            raise ValueError(f"{place}.steps ({sample.steps}) exceeds process.num_timesteps ({T})")


def exports_timesteps_that_exist(params: Params) -> None:
    if (steps := params.export.steps) > (T := params.process.num_timesteps):
        raise ValueError(f"export.steps ({steps}) exceeds process.num_timesteps ({T})")


def has_patches_that_fit(params: Params) -> None:
    patch_size = getattr(params.network, "patch_size", 1)  # not every network has patches
    if patch_size > min(params.pairs.height, params.pairs.width):
        raise ValueError(f"network.patch_size ({patch_size}) exceeds the images' side")


def draws_the_last_timestep(params: Params) -> None:
    for stage in ("train", "distill"):
        if params.process.zero_terminal_snr and getattr(params, stage).timesteps == "log-snr-normal":
            raise ValueError(f"{stage}.timesteps: log-snr-normal never draws the last timestep of zero_terminal_snr")


def has_learned_its_variance(params: Params) -> None:
    for place, sample in _samplings(params):
        if sample.variance == "learned" and not params.process.learned_variance:
            raise ValueError(f"{place}.variance is learned, which needs process.learned_variance: true")


def guides_by_classes(params: Params) -> None:
    for index, changes in enumerate(params.evaluate.samplers):
        if "guidance" in changes and not params.network.classes:
            raise ValueError(f"evaluate.samplers.{index}.guidance needs classes (network.classes: true); leave it out")


def guides_no_distilled_models(params: Params) -> None:
    for place, sample in (*_samplings(params), ("export", exported(params))):
        if sample.guidance != 1 and not sample.guidable:
            raise ValueError(
                f"{place}.sampler is {sample.sampler.kind}, for distilled models, which have guidance built in; choose "
                f"another, or set {'sample' if place == 'export' else place}.guidance to 1.0"
            )


def exports_its_variance(params: Params) -> None:
    if params.sample.variance == "learned" and params.export.sampler.kind == "ddpm":
        raise ValueError("export.sampler is ddpm, which in ONNX cannot have sample.variance learned: choose another")


def shows_channels_that_exist(params: Params) -> None:
    shown, channels = params.evaluate.shown_channels, params.pairs.channels
    if shown and (len(shown) not in (1, 3) or max(shown) >= channels):
        raise ValueError(f"evaluate.shown_channels must be one or three numbers below pairs.channels ({channels})")


def draws_samples_to_compare(params: Params) -> None:
    if params.evaluate.samplers and not params.evaluate.quality_samples:
        raise ValueError("evaluate.samplers needs evaluate.quality_samples above 0, such as 256; or set samplers to []")


def distils_a_guided_teacher_by_classes(params: Params) -> None:
    if params.distill.guidance != 1 and not params.network.classes:
        raise ValueError("distill.guidance needs classes (network.classes: true); set it to 1.0")


def distils_into_timesteps_that_exist(params: Params) -> None:
    steps, method, T = params.distill.sampling_steps, params.distill.method, params.process.num_timesteps
    if steps > T:
        raise ValueError(f"distill.sampling_steps ({steps}) exceeds process.num_timesteps ({T})")
    if (steps := getattr(method, "teacher_steps", 0)) > T:
        raise ValueError(f"distill.method.teacher_steps ({steps}) exceeds process.num_timesteps ({T})")


RULES = (
    samples_at_timesteps_that_exist,
    exports_timesteps_that_exist,
    has_patches_that_fit,
    draws_the_last_timestep,
    has_learned_its_variance,
    guides_by_classes,
    guides_no_distilled_models,
    exports_its_variance,
    shows_channels_that_exist,
    draws_samples_to_compare,
    distils_a_guided_teacher_by_classes,
    distils_into_timesteps_that_exist,
)

"""How pictures are made, from options: choices by name, each in the module of its class."""

from collections.abc import Callable
from typing import Annotated, Any

from pydantic import Field

from diffusion.errors import UserError
from diffusion.process.build import Process
from diffusion.process.denoiser import THRESHOLDS, Net
from diffusion.process.schedule import Schedule
from diffusion.process.variance import VARIANCES, CappedLastNoise, Variance
from diffusion.sampling.sampler import SAMPLER_OPTIONS, SAMPLERS, Sampler
from diffusion.sampling.spacing import SPACINGS
from diffusion.sections import Choice, OneOf, Positive, Section

SamplerChoice = Annotated[Any, OneOf(SAMPLERS, SAMPLER_OPTIONS)]
SpacingName = Annotated[str, OneOf(SPACINGS)]


class SampleOptions(Section):
    """Making pictures. The bound in bits/dim takes its variance from here, sampler.onnx what `export` has not."""

    sampler: SamplerChoice = Choice(kind="dpm-solver++-sde")
    """ddpm: ancestral sampling (Ho et al. 2020); ddim (Song et al. 2021); dpm-solver++: the second-order multistep
    solver, or its stochastic variant (Lu et al. 2022); heun: second order, two network evaluations per step (Karras et
    al. 2022)."""
    steps: Annotated[int, Field(ge=1)] = 50
    """Steps per picture, at most num_timesteps."""
    spacing: SpacingName = "log-snr"
    """Which timesteps the steps are at: evenly spaced, quadratic (more of them near the end), or evenly in log SNR."""
    variance: Annotated[str, OneOf(VARIANCES)] = "analytic"
    """Variance of the reverse step: fixed-small (the posterior's), fixed-large (beta_t), learned (needs
    process.learned_variance) or analytic (Bao et al. 2022; estimated after every training)."""
    threshold: Annotated[str, OneOf(THRESHOLDS)] = "clip"
    """What keeps the estimated clean image in range: clip, dynamic thresholding (Saharia et al. 2022), or none."""
    guidance: Annotated[float, Field(ge=0)] = 1.0
    """Classifier-free guidance, for networks with classes. 0: unconditional; 1: conditional; above 1: amplified."""
    count: Positive = 64
    """How many pictures."""


def sampler(options: SampleOptions, process: Process, net: Net, variance_of: Callable[[str], Variance]) -> Sampler:
    """The sampler that `options` describes, over a network (one with classes as `Guided`)."""

    def for_sampling() -> Variance:
        found = variance_of(options.variance)
        return CappedLastNoise(found) if options.variance == "analytic" else found

    denoiser = process.denoiser(net, THRESHOLDS[options.threshold])
    return SAMPLERS[options.sampler.kind](denoiser, for_sampling, options.sampler)


def sampling_timesteps(options: SampleOptions, schedule: Schedule) -> list[int]:
    """The timesteps that sampling visits, descending; raises UserError if there are fewer than `options.steps`."""
    if options.steps > schedule.num_timesteps:
        raise UserError(f"steps ({options.steps}) exceeds num_timesteps ({schedule.num_timesteps}); choose fewer steps")
    return SPACINGS[options.spacing](schedule, options.steps)

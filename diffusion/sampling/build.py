"""Builds samplers from options; each choice is registered in the module that defines it."""

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
from diffusion.sections import Choice, OneOf, Section

SamplerChoice = Annotated[Any, OneOf(SAMPLERS, SAMPLER_OPTIONS)]
SpacingName = Annotated[str, OneOf(SPACINGS)]


class SampleOptions(Section):
    """Sampling. `variance` also sets that of the bound in bits/dim; sampler.onnx uses the fields absent in `export`."""

    sampler: SamplerChoice = Choice(kind="dpm-solver++-sde")
    """Sampling algorithm. ddpm: ancestral sampling (Ho et al. 2020); ddim: Song et al. 2021; dpm-solver++: second-order
    multistep ODE solver, and its SDE variant (Lu et al. 2022); heun: second-order ODE solver with two network
    evaluations per step (Karras et al. 2022); consistency: for distilled models, in one to four steps (Kim et al. 2024;
    Song et al. 2023)."""
    steps: Annotated[int, Field(ge=1)] = 50
    """Number of sampling steps, at most process.num_timesteps."""
    spacing: SpacingName = "log-snr"
    """Spacing of the sampling timesteps. linspace: uniform in t; quadratic: denser near t = 0 (Song et al. 2021);
    log-snr: uniform in log SNR (Lu et al. 2022); angle: uniform in arctan(sqrt(1 / SNR)) down to the clean image, for
    few steps of distilled models (Salimans & Ho 2022)."""
    variance: Annotated[str, OneOf(VARIANCES)] = "analytic"
    """Variance of the reverse step, for the sampler ddpm and the bound in bits/dim. fixed-small: the posterior
    variance; fixed-large: beta_t (both Ho et al. 2020); learned: requires process.learned_variance; analytic: estimated
    after training (Bao et al. 2022)."""
    threshold: Annotated[str, OneOf(THRESHOLDS)] = "clip"
    """Limits the predicted clean image at each step. clip: to [-1, 1]; dynamic: dynamic thresholding (Saharia et al.
    2022), against saturation with strong guidance."""
    guidance: Annotated[float, Field(ge=0)] = 1.0
    """Scale of classifier-free guidance (Ho & Salimans 2022), for networks with classes. 0: unconditional; 1:
    conditional; above 1: follows the class more strongly."""
    count: Annotated[int, Field(ge=1, le=1_000_000)] = 64
    """Number of images to sample, which are kept in memory."""

    @property
    def guidable(self) -> bool:
        """Whether classifier-free guidance applies: to estimates of means, which those of distilled models are not."""
        return self.sampler.kind != "consistency"


def sampler(options: SampleOptions, process: Process, net: Net, variance_of: Callable[[str], Variance]) -> Sampler:
    """Build the sampler described by `options` around a network; wrap one with classes in `Guided` first."""

    def for_sampling() -> Variance:
        found = variance_of(options.variance)
        return CappedLastNoise(found) if options.variance == "analytic" else found

    denoiser = process.denoiser(net, THRESHOLDS[options.threshold])
    return SAMPLERS[options.sampler.kind](denoiser, for_sampling, options.sampler)


def sampling_timesteps(options: SampleOptions, schedule: Schedule) -> list[int]:
    """The timesteps that sampling visits, descending; raises UserError if `options.steps` exceeds num_timesteps."""
    if options.steps > schedule.num_timesteps:
        raise UserError(f"steps ({options.steps}) exceeds num_timesteps ({schedule.num_timesteps}); choose fewer steps")
    return SPACINGS[options.spacing](schedule, options.steps)

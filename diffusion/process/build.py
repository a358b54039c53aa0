"""The only place where a name in params.yaml becomes an object of the diffusion process."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from diffusion import params
from diffusion.process import schedule
from diffusion.process.loss import Loss
from diffusion.process.parameterization import Eps, Parameterization
from diffusion.process.sampler import Ancestral, Ddim, Denoiser, Sampler
from diffusion.process.schedule import Schedule
from diffusion.process.variance import FixedLarge, FixedSmall, Variance
from diffusion.process.weighting import Simple, Weighting

SCHEDULES: dict[str, Callable[[int], Tensor]] = {"linear": schedule.linear, "cosine": schedule.cosine}
PARAMETERIZATIONS: dict[str, Callable[[Schedule], Parameterization]] = {"eps": Eps}
VARIANCES: dict[str, Callable[[Schedule], Variance]] = {"fixed-small": FixedSmall, "fixed-large": FixedLarge}
WEIGHTINGS: dict[str, Callable[[], Weighting]] = {"simple": Simple}
SAMPLERS: dict[str, Callable[[Denoiser, Variance, params.Sample], Sampler]] = {
    "ddpm": lambda denoiser, variance, _: Ancestral(denoiser, variance),
    "ddim": lambda denoiser, _, options: Ddim(denoiser, options.eta),
}


@dataclass(frozen=True)
class Process:
    """A diffusion process, whole."""

    schedule: Schedule
    parameterization: Parameterization
    variance: Variance
    loss: Loss

    def denoiser(self, net: nn.Module) -> Denoiser:
        return Denoiser(net, self.schedule, self.parameterization)


def process(options: params.Process) -> Process:
    """The process that `options` describes."""
    made = Schedule(SCHEDULES[options.schedule](options.num_timesteps))
    parameterization = PARAMETERIZATIONS[options.parameterization](made)
    return Process(
        schedule=made,
        parameterization=parameterization,
        variance=VARIANCES[options.variance](made),
        loss=Loss(made, parameterization, WEIGHTINGS[options.weighting]()),
    )


def sampler(options: params.Sample, process: Process, net: nn.Module) -> Sampler:
    """The sampler that `options` describes, over a network."""
    return SAMPLERS[options.sampler](process.denoiser(net), process.variance, options)

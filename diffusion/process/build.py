"""The only place where a name in params.yaml becomes an object of the diffusion process."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion.errors import UserError
from diffusion.options import ProcessOptions, SampleOptions
from diffusion.process import loss, schedule, spacing, timesteps, weighting
from diffusion.process.denoiser import Denoiser, Net, Threshold, clip, dynamic_threshold, unbounded
from diffusion.process.loss import Kind, Loss
from diffusion.process.parameterization import X0, Eps, Mu, Parameterization, V
from diffusion.process.sampler import Ancestral, Ddim, DpmSolver, Heun, Sampler
from diffusion.process.schedule import Schedule
from diffusion.process.spacing import Spacing
from diffusion.process.timesteps import Timesteps
from diffusion.process.variance import Analytic, FixedLarge, FixedSmall, Learned, Unseen, Variance
from diffusion.process.weighting import Weighting

SCHEDULES: dict[str, Callable[[ProcessOptions], Tensor]] = {
    "linear": lambda options: schedule.linear(options.num_timesteps),
    "scaled-linear": lambda options: schedule.scaled_linear(options.num_timesteps),
    "cosine": lambda options: schedule.cosine(options.num_timesteps),
    "sigmoid": lambda options: schedule.sigmoid(options.num_timesteps),
    "given": lambda options: torch.tensor(options.beta, dtype=torch.float64),
}
PARAMETERIZATIONS: dict[str, Callable[[Schedule], Parameterization]] = {"eps": Eps, "x_0": X0, "v": V, "mu": Mu}
WEIGHTINGS: dict[str, Callable[[ProcessOptions], Weighting]] = {
    "simple": lambda _: weighting.Simple(),
    "vlb": lambda _: weighting.Vlb(),
    "snr-plus-one": lambda _: weighting.SnrPlusOne(),
    "truncated-snr": lambda _: weighting.TruncatedSnr(),
    "min-snr": lambda options: weighting.MinSnr(options.min_snr_gamma),
    "p2": lambda _: weighting.P2(),
}
LOSSES: dict[str, Kind] = {"mse": torch.square, "l1": torch.abs, "huber": loss.huber}
TIMESTEPS: dict[str, Callable[[Schedule], Timesteps]] = {
    "stored": lambda _: timesteps.Stored(),
    "uniform": lambda made: timesteps.Uniform(made.num_timesteps),
    "rms-error": lambda made: timesteps.ByLoss(made.num_timesteps, power=1),
    "loss-second-moment": lambda made: timesteps.ByLoss(made.num_timesteps, power=2),
    "log-snr-normal": timesteps.LogSnrNormal,
}
VARIANCES: dict[str, Callable[[Schedule, Tensor | None], Variance]] = {
    "fixed-small": lambda made, _: FixedSmall(made),
    "fixed-large": lambda made, _: FixedLarge(made),
    "learned": lambda made, _: Learned(made),
    "analytic": lambda made, x_0_mse: _analytic(made, x_0_mse),
}
SAMPLERS: dict[str, Callable[[Denoiser, Callable[[str], Variance], SampleOptions], Sampler]] = {
    "ddpm": lambda denoiser, variance_of, options: Ancestral(denoiser, _for_sampling(options.variance, variance_of)),
    "ddim": lambda denoiser, _, options: Ddim(denoiser, options.eta),
    "dpm-solver++": lambda denoiser, _, __: DpmSolver(denoiser, stochastic=False),
    "dpm-solver++-sde": lambda denoiser, _, __: DpmSolver(denoiser, stochastic=True),
    "heun": lambda denoiser, _, __: Heun(denoiser),
}
SPACINGS: dict[str, Spacing] = {
    "linspace": spacing.linspace,
    "quadratic": spacing.quadratic,
    "log-snr": spacing.log_snr,
}
THRESHOLDS: dict[str, Threshold] = {"clip": clip, "dynamic": dynamic_threshold, "none": unbounded}


@dataclass(frozen=True)
class Process:
    """A diffusion process, as it is trained."""

    schedule: Schedule
    parameterization: Parameterization
    loss: Loss

    def denoiser(self, net: Net, threshold: Threshold = clip) -> Denoiser:
        return Denoiser(net, self.schedule, self.parameterization, threshold)


def process(options: ProcessOptions) -> Process:
    """The process that `options` describes."""
    beta = SCHEDULES[options.schedule](options)
    made = Schedule(schedule.zero_terminal(beta) if options.zero_terminal_snr else beta)
    parameterization = PARAMETERIZATIONS[options.parameterization](made)
    weight = WEIGHTINGS[options.weighting](options)
    return Process(made, parameterization, Loss(made, parameterization, weight, LOSSES[options.loss]))


def variance(name: str, process: Process, x_0_mse: Tensor | None) -> Variance:
    """The reverse variance of a name; `x_0_mse` (T,) is what the model has for the analytic one."""
    return VARIANCES[name](process.schedule, x_0_mse)


def sampler(options: SampleOptions, process: Process, net: Net, variance_of: Callable[[str], Variance]) -> Sampler:
    """The sampler that `options` describes, over a network (one with classes as `Guided`)."""
    denoiser = process.denoiser(net, THRESHOLDS[options.threshold])
    return SAMPLERS[options.sampler](denoiser, variance_of, options)


def sampling_timesteps(options: SampleOptions, schedule: Schedule) -> list[int]:
    """The timesteps that sampling visits, descending."""
    return SPACINGS[options.spacing](schedule, options.steps)


def _for_sampling(name: str, variance_of: Callable[[str], Variance]) -> Variance:
    return Unseen(variance_of(name)) if name == "analytic" else variance_of(name)


def _analytic(schedule: Schedule, x_0_mse: Tensor | None) -> Analytic:
    if x_0_mse is None:
        raise UserError("sample.variance: the model holds no estimate for analytic; choose another, or train it here")
    return Analytic(schedule, x_0_mse)

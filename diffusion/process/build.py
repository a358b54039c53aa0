"""The process from its options: choices by name, each in the module of its class."""

import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor

from diffusion.process.denoiser import Denoiser, Net, Threshold, clip
from diffusion.process.loss import LOSSES, Loss
from diffusion.process.parameterization import PARAMETERIZATIONS, Parameterization
from diffusion.process.schedule import SCHEDULES, Schedule, zero_terminal
from diffusion.process.variance import VARIANCES, Variance
from diffusion.process.weighting import WEIGHTING_OPTIONS, WEIGHTINGS
from diffusion.sections import LIST, Choice, OneOf, Section

SNR_IS_SIMPLE = BeforeValidator(lambda given: "simple" if given in ("snr", {"kind": "snr"}) else given)


def _keeps_some_signal(given: "Given") -> None:
    if math.prod(1 - beta for beta in given.beta[:-1]) < 1e-12:
        raise ValueError("beta leaves nothing of the image before the last timestep: give fewer or smaller values")


class Given(Choice):
    """A noise schedule given by its values."""

    rules = (_keeps_some_signal,)

    kind: Literal["given"] = "given"
    """The kind of schedule."""
    beta: Annotated[tuple[Annotated[float, Field(ge=1e-8, lt=1)], ...], LIST] = ()
    """beta_t for each timestep."""


def _has_enough_timesteps(process: "ProcessOptions") -> None:
    schedule, T = process.schedule, process.num_timesteps
    if schedule.kind in SCHEDULES and SCHEDULES[schedule.kind](T).max() >= 1:
        raise ValueError(f"the schedule {schedule.kind} needs more timesteps than {T}: some beta would be 1 or more")
    if isinstance(schedule, Given) and len(schedule.beta) != T:
        raise ValueError(f"schedule.beta has {len(schedule.beta)} values, but num_timesteps is {T}")


def _can_predict_at_zero_snr(process: "ProcessOptions") -> None:
    if process.zero_terminal_snr and process.parameterization == "eps":
        raise ValueError(
            "zero_terminal_snr needs another parameterization than eps (v, say): at the last timestep x_t is noise "
            "alone, and eps says nothing of the image"
        )


def _weights_the_last_timestep(process: "ProcessOptions") -> None:
    zero, weighting = torch.zeros(1), process.weighting
    if process.zero_terminal_snr and not WEIGHTINGS[weighting.kind](weighting)(zero, zero):
        raise ValueError(
            "zero_terminal_snr needs another weighting (snr-plus-one or truncated-snr, say): "
            f"{weighting.kind} gives the last timestep, where sampling begins, no weight"
        )


class ProcessOptions(Section):
    """The diffusion process."""

    rules = (_has_enough_timesteps, _can_predict_at_zero_snr, _weights_the_last_timestep)

    schedule: Annotated[Any, OneOf([*SCHEDULES, "given"], {"given": Given})] = Choice(kind="cosine")
    """Noise schedule: linear (Ho et al. 2020), scaled-linear (Rombach et al. 2022), cosine (Nichol & Dhariwal 2021),
    sigmoid (Chen 2023), or given, by its values."""
    num_timesteps: Annotated[int, Field(ge=3, le=100_000)] = 1000
    """T, the number of timesteps."""
    zero_terminal_snr: bool = False
    """Whether the schedule is rescaled so that nothing of the image is left at the last timestep (Lin et al. 2024)."""
    parameterization: Annotated[str, OneOf(PARAMETERIZATIONS)] = "v"
    """What the network predicts: eps, the noise; x_0, the clean image; v, the velocity (Salimans & Ho 2022); or mu, the
    mean of the reverse step (unstable; for study)."""
    learned_variance: bool = False
    """Whether the network learns the variance of the reverse step as well, between the two fixed ones (Nichol &
    Dhariwal 2021); `sample.variance` is then free to be learned."""
    weighting: Annotated[Any, OneOf(WEIGHTINGS, WEIGHTING_OPTIONS), SNR_IS_SIMPLE] = Choice(kind="simple")
    """Loss weight by signal-to-noise ratio, the same whatever the network predicts: simple (all noise errors count the
    same; snr is read as another name for it), vlb (the variational bound), snr-plus-one (all errors of v count the
    same), truncated-snr (Salimans & Ho 2022), min-snr (Hang et al. 2023) or p2 (Choi et al. 2022)."""
    loss: Annotated[str, OneOf(LOSSES)] = "mse"
    """What is averaged of the weighted error: its square, its absolute value, or Huber's mixture of both."""


@dataclass(frozen=True)
class Process:
    """A diffusion process, as it is trained."""

    schedule: Schedule
    parameterization: Parameterization
    loss: Loss

    def denoiser(self, net: Net, threshold: Threshold = clip) -> Denoiser:
        return Denoiser(net, self.schedule, self.parameterization, threshold)


def betas(options: ProcessOptions) -> Tensor:
    """beta of the schedule that `options` names or gives, float64 (T,), before it is rescaled to end at zero SNR."""
    if isinstance(options.schedule, Given):
        return torch.tensor(options.schedule.beta, dtype=torch.float64)
    return SCHEDULES[options.schedule.kind](options.num_timesteps)


def process(options: ProcessOptions) -> Process:
    """The process that `options` describes."""
    beta = betas(options)
    schedule = Schedule(zero_terminal(beta) if options.zero_terminal_snr else beta)
    parameterization = PARAMETERIZATIONS[options.parameterization](schedule)
    weight = WEIGHTINGS[options.weighting.kind](options.weighting)
    return Process(schedule, parameterization, Loss(schedule, parameterization, weight, LOSSES[options.loss]))


def variance(name: str, process: Process, x_0_mse: Tensor | None) -> Variance:
    """The reverse variance of a name; `x_0_mse` (T,) is what the model has for the analytic one."""
    return VARIANCES[name](process.schedule, x_0_mse)

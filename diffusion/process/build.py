"""Builds the diffusion process from its options; each choice is registered in the module that defines it."""

import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor

from diffusion.errors import counted
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
        raise ValueError("beta destroys the image before the last timestep: use fewer or smaller values")


class Given(Choice):
    """A custom noise schedule, given by its values of beta."""

    rules = (_keeps_some_signal,)

    kind: Literal["given"] = "given"
    """Name of the schedule."""
    beta: Annotated[tuple[Annotated[float, Field(ge=1e-8, lt=1)], ...], LIST] = ()
    """beta_t for each timestep, a list of num_timesteps values."""


def _has_enough_timesteps(process: "ProcessOptions") -> None:
    schedule, T = process.schedule, process.num_timesteps
    if schedule.kind in SCHEDULES and SCHEDULES[schedule.kind](T).max() >= 1:
        raise ValueError(f"the schedule {schedule.kind} needs more than {T} timesteps: some beta would reach 1")
    if isinstance(schedule, Given) and len(schedule.beta) != T:
        raise ValueError(f"schedule.beta has {counted(len(schedule.beta), 'value')}, but num_timesteps is {T}")


def _can_predict_at_zero_snr(process: "ProcessOptions") -> None:
    if process.zero_terminal_snr and process.parameterization == "eps":
        raise ValueError(
            "zero_terminal_snr needs a parameterization other than eps, such as v: at the last timestep x_t is pure "
            "noise, and predicting it says nothing about the image"
        )


def _weights_the_last_timestep(process: "ProcessOptions") -> None:
    zero, weighting = torch.zeros(1), process.weighting
    if process.zero_terminal_snr and not WEIGHTINGS[weighting.kind](weighting)(zero, zero) > 0:
        raise ValueError(
            f"zero_terminal_snr needs a weighting other than {weighting.kind}, such as snr-plus-one or truncated-snr: "
            "the last timestep, where sampling starts, must not have zero weight"
        )


class ProcessOptions(Section):
    """The diffusion process and its training objective."""

    rules = (_has_enough_timesteps, _can_predict_at_zero_snr, _weights_the_last_timestep)

    schedule: Annotated[Any, OneOf([*SCHEDULES, "given"], {"given": Given})] = Choice(kind="cosine")
    """Noise schedule. linear: DDPM (Ho et al. 2020); scaled-linear: Stable Diffusion (Rombach et al. 2022); cosine:
    Nichol & Dhariwal 2021; sigmoid: Chen 2023; given: your own values of beta."""
    num_timesteps: Annotated[int, Field(ge=3, le=100_000)] = 1000
    """T, the number of diffusion timesteps."""
    zero_terminal_snr: bool = False
    """Rescale the schedule so that the last timestep is pure noise (Lin et al. 2024). Requires a parameterization other
    than eps."""
    parameterization: Annotated[str, OneOf(PARAMETERIZATIONS)] = "v"
    """Prediction target of the network. eps: the noise (Ho et al. 2020); x_0: the clean image; v: the velocity
    (Salimans & Ho 2022); mu: the posterior mean (unstable; for study)."""
    learned_variance: bool = False
    """Also learn the variance of the reverse step, with the hybrid loss L_simple + 0.001 L_vlb (Nichol & Dhariwal
    2021); allows sample.variance: learned."""
    weighting: Annotated[Any, OneOf(WEIGHTINGS, WEIGHTING_OPTIONS), SNR_IS_SIMPLE] = Choice(kind="simple")
    """Loss weighting as a function of the SNR, independent of the parameterization. simple: uniform in the noise error
    (Ho et al. 2020; alias: snr); vlb, vlb-large: the variational bound, with the posterior variance or with beta_t (Ho
    et al. 2020); posterior-mean: uniform in the error of the posterior mean mu (Ho et al. 2020, table 2); snr-plus-one:
    uniform in the v error; truncated-snr: max(SNR, 1) (both Salimans & Ho 2022); min-snr: Hang et al. 2023; p2: Choi et
    al. 2022."""
    loss: Annotated[str, OneOf(LOSSES)] = "mse"
    """Loss function of the weighted error; huber is quadratic up to 1 and linear beyond."""


@dataclass(frozen=True)
class Process:
    """A noise schedule with the prediction target and the loss for training."""

    schedule: Schedule
    parameterization: Parameterization
    loss: Loss

    def denoiser(self, net: Net, threshold: Threshold = clip) -> Denoiser:
        return Denoiser(net, self.schedule, self.parameterization, threshold)


def betas(options: ProcessOptions) -> Tensor:
    """beta of the schedule in `options`, float64 (T,), before any rescaling to zero terminal SNR."""
    if isinstance(options.schedule, Given):
        return torch.tensor(options.schedule.beta, dtype=torch.float64)
    return SCHEDULES[options.schedule.kind](options.num_timesteps)


def process(options: ProcessOptions) -> Process:
    """Build the process described by `options`."""
    beta = betas(options)
    schedule = Schedule(zero_terminal(beta) if options.zero_terminal_snr else beta)
    parameterization = PARAMETERIZATIONS[options.parameterization](schedule)
    weight = WEIGHTINGS[options.weighting.kind](options.weighting)
    return Process(schedule, parameterization, Loss(schedule, parameterization, weight, LOSSES[options.loss]))


def variance(name: str, process: Process, x_0_mse: Tensor | None) -> Variance:
    """Build the reverse variance called `name`; `x_0_mse` (T,) is the model's estimate for the analytic one, if any."""
    return VARIANCES[name](process.schedule, x_0_mse)

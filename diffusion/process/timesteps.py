"""Distributions of the training timesteps.

Pairs come with timesteps stratified over each block of images. A timestep sampler transforms these, or independent
uniform numbers, so that every draw remains a function of the position in the data.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn

from diffusion.process.schedule import Schedule, times


class Timesteps(nn.Module, ABC):
    """A timestep sampler; a module, so that its loss history is saved with the training state.

    It stays on the CPU, where floating-point sums are reproducible.
    """

    @abstractmethod
    def draw(self, t: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """Draw timesteps int64 (B,) with their loss weights (B,).

        t: the pairs' timesteps, int64 (B,), each uniform on [0, T). u: independent numbers uniform on [0, 1), (B,).
        """

    learns = False
    """Whether the sampler adapts to the loss, so that `observe` must be called."""

    def observe(self, t: Tensor, loss: Tensor) -> None:
        """Record the losses (B,) at `t` int64 (B,), both for the whole global batch in order.

        The training loop calls this one step late to avoid synchronizing with the device. Non-finite losses, from
        skipped steps, are ignored.
        """


class Stored(Timesteps):
    """The timesteps stored with the pairs: stratified over each block of images, each uniform on [0, T).

    Kingma et al. 2021, appendix I.1. All other samplers keep the pairs' noise but draw their own timesteps.
    """

    def draw(self, t: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        return t, torch.ones_like(u)


class Uniform(Timesteps):
    """Independent and uniform on [0, T); Ho et al. 2020, algorithm 1."""

    def __init__(self, num_timesteps: int) -> None:
        super().__init__()
        self.num_timesteps = num_timesteps

    def draw(self, t: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        return (u * self.num_timesteps).long(), torch.ones_like(u)


class _ByProbability(Timesteps):
    """Stratified draws from a given distribution, by applying its quantile function to (t + u) / T."""

    def draw_by(self, probability: Tensor, t: Tensor, u: Tensor) -> Tensor:
        """Draw timesteps int64 (B,) with `probability` float64 (T,), which sums to 1."""
        cumulative = probability.cumsum(dim=0)
        wanted = (t + u.double()) / len(probability) * cumulative[-1]
        return torch.searchsorted(cumulative, wanted, right=True).clamp(max=len(probability) - 1)


class LogSnrNormal(_ByProbability):
    """Normally distributed log SNR, with mean 2.4 and standard deviation 2.4; Karras et al. 2022 (EDM), section 5.

    Corresponds to EDM's mean -1.2 and standard deviation 1.2 of log sigma = -log(SNR) / 2. As in EDM, the loss is not
    reweighted, so that medium noise levels count more. Intended for the cosine schedule: the last fifth of the linear
    schedule is hardly ever drawn.
    """

    MEAN, STD = 2.4, 2.4

    def __init__(self, schedule: Schedule) -> None:
        super().__init__()
        # Each timestep gets the probability mass closer to its log SNR than to its neighbours'.
        log_snr = (schedule.alpha_bar / (1 - schedule.alpha_bar)).log()
        middle = (log_snr[1:] + log_snr[:-1]) / 2
        edges = torch.cat([torch.tensor([torch.inf]), middle, torch.tensor([-torch.inf])])
        mass = -torch.special.ndtr((edges - self.MEAN) / self.STD).diff()
        self.probability: Tensor
        self.register_buffer("probability", mass, persistent=False)

    def draw(self, t: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        return self.draw_by(self.probability, t, u), torch.ones_like(u)


class Angle(_ByProbability):
    """Uniform in the angle arctan(sigma), sigma^2 = 1 / SNR, with a share of START at T - 1, where sampling starts.

    For distillation, whose students see T - 1 in every sample.
    """

    START = 0.5

    def __init__(self, schedule: Schedule) -> None:
        super().__init__()
        angle = schedule.angle(torch.arange(schedule.num_timesteps)).flatten()
        probability = (1 - self.START) * angle.diff(prepend=torch.zeros_like(angle[:1])) / angle[-1]
        probability[-1] += self.START
        self.probability: Tensor
        self.register_buffer("probability", probability, persistent=False)

    def draw(self, t: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        return self.draw_by(self.probability, t, u), torch.ones_like(u)


class LossAware(_ByProbability):
    """Importance sampling: p(t) proportional to sqrt(mean(loss^power)) over the recent losses near t.

    The loss is weighted by 1 / (T p(t)), which leaves its expectation unchanged and reduces the variance of the
    gradient. power = 2: the second moment of the loss; Nichol & Dhariwal 2021, section 3.3. power = 1: the RMS error,
    which minimizes the gradient's variance if the gradient of a squared error is proportional to the error
    (Katharopoulos & Fleuret 2018, eq. 6).

    [0, T) is divided into equal strata, each with a history of its last losses; until all histories are full,
    timesteps are drawn uniformly.
    """

    learns = True
    STRATA = 64
    HISTORY = 64
    UNIFORM = 0.001
    """Fraction of uniform draws mixed in, regardless of the losses."""

    def __init__(self, num_timesteps: int, power: int) -> None:
        super().__init__()
        self.num_timesteps, self.power = num_timesteps, power
        self.strata = min(self.STRATA, num_timesteps)
        self.losses: Tensor
        self.seen: Tensor
        self.register_buffer("losses", torch.zeros(self.strata, self.HISTORY, dtype=torch.float64))
        self.register_buffer("seen", torch.zeros(self.strata, dtype=torch.int64))

    def probability(self) -> Tensor:
        """The probability of each timestep, float64 (T,)."""
        T = self.num_timesteps
        if (self.seen < self.HISTORY).any():
            return torch.full((T,), 1 / T, dtype=torch.float64)
        root = self.losses.pow(self.power).mean(dim=1).sqrt()[self._stratum(torch.arange(T))]
        return root / root.sum() * (1 - self.UNIFORM) + self.UNIFORM / T

    def draw(self, t: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        probability = self.probability()
        chosen = self.draw_by(probability, t, u)
        return chosen, times(1 / (self.num_timesteps * probability[chosen]), torch.ones_like(u))

    def observe(self, t: Tensor, loss: Tensor) -> None:
        losses, seen = self.losses.numpy(), self.seen.numpy()  # views: writing single elements is faster
        for stratum, value in zip(self._stratum(t).tolist(), loss.tolist(), strict=True):
            if math.isfinite(value):
                losses[stratum, seen[stratum] % self.HISTORY] = value
                seen[stratum] += 1

    def _stratum(self, t: Tensor) -> Tensor:
        return t * self.strata // self.num_timesteps


TIMESTEPS: dict[str, Callable[[Schedule], Timesteps]] = {
    "stored": lambda _: Stored(),
    "uniform": lambda schedule: Uniform(schedule.num_timesteps),
    "rms-error": lambda schedule: LossAware(schedule.num_timesteps, power=1),
    "loss-second-moment": lambda schedule: LossAware(schedule.num_timesteps, power=2),
    "log-snr-normal": LogSnrNormal,
    "angle": Angle,
}

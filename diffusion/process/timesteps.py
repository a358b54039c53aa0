"""At which timesteps the network is trained.

The pairs bring timesteps that are stratified over each block of images. A sampler turns them, or independent uniform
numbers, into those it wants; so what is drawn stays a function of the position in the data.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn

from diffusion.process.schedule import Schedule, times


class Timesteps(nn.Module, ABC):
    """A module, so that what it learns of the losses is kept with the rest of a training's state. It stays on the CPU:
    sums of floating numbers are always the same there.
    """

    @abstractmethod
    def draw(self, t: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        """Timesteps int64 (B,), and the weight of the loss at each, (B,).

        t: the pairs' timesteps, int64 (B,), each uniform on [0, T). u: independent numbers uniform on [0, 1), (B,).
        """

    learns = False
    """Whether `observe` has to be called."""

    def observe(self, t: Tensor, loss: Tensor) -> None:
        """Learn what the loss (B,) was at `t` int64 (B,), both of the whole batch, in its order.

        The training calls it one step late, so that it need not wait for the device. Losses that are not finite, of a
        step that was skipped, are left out.
        """


class Stored(Timesteps):
    """The timesteps stored with the pairs: stratified over each block of images, each uniform on [0, T).

    Kingma et al. 2021, appendix I.1. All other choices keep the pairs' noise, but draw timesteps of their own.
    """

    def draw(self, t: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        return t, torch.ones_like(u)


class Uniform(Timesteps):
    """Each independent, uniform on [0, T); Ho et al. 2020, algorithm 1."""

    def __init__(self, num_timesteps: int) -> None:
        super().__init__()
        self.num_timesteps = num_timesteps

    def draw(self, t: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        return (u * self.num_timesteps).long(), torch.ones_like(u)


class _ByProbability(Timesteps):
    """Timesteps drawn with given probabilities, still stratified: (t + u) / T goes through their quantile function."""

    def draw_by(self, probability: Tensor, t: Tensor, u: Tensor) -> Tensor:
        """Timesteps int64 (B,) with `probability` float64 (T,), which adds up to 1."""
        cumulative = probability.cumsum(dim=0)
        wanted = (t + u.double()) / len(probability) * cumulative[-1]
        return torch.searchsorted(cumulative, wanted, right=True).clamp(max=len(probability) - 1)


class LogSnrNormal(_ByProbability):
    """log SNR normally distributed, with mean 2.4 and standard deviation 2.4; Karras et al. 2022 (EDM), section 5.

    Those are EDM's -1.2 and 1.2 for log sigma = -log(SNR) / 2. As there, the loss is not weighted against it: the
    middle counts more. Of the linear schedule's last fifth hardly any timestep is drawn; it is for the cosine one.
    """

    MEAN, STD = 2.4, 2.4

    def __init__(self, schedule: Schedule) -> None:
        super().__init__()
        # Of the normal distribution each timestep has the part that is nearer to its log SNR than to the next one's.
        log_snr = (schedule.alpha_bar / (1 - schedule.alpha_bar)).log()
        middle = (log_snr[1:] + log_snr[:-1]) / 2
        edges = torch.cat([torch.tensor([torch.inf]), middle, torch.tensor([-torch.inf])])
        mass = -torch.special.ndtr((edges - self.MEAN) / self.STD).diff()
        self.probability: Tensor
        self.register_buffer("probability", mass, persistent=False)

    def draw(self, t: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        return self.draw_by(self.probability, t, u), torch.ones_like(u)


class LossAware(_ByProbability):
    """Timesteps in proportion to the root of the mean there of the loss to a power, by what it was of late.

    The loss is weighted by 1 / (T p(t)), so that its expectation is that of uniform timesteps; what differs is how much
    the gradient varies. With the power 2 as in Nichol & Dhariwal 2021, section 3.3; with 1 it is the error's root mean
    square: the gradient of a squared error is in proportion to the error, and so its variance is the least
    (Katharopoulos & Fleuret 2018, eq. 6).

    [0, T) is divided into equal strata, of each of which the last losses are kept; until every one is full, timesteps
    are drawn uniformly.
    """

    learns = True
    STRATA = 64
    HISTORY = 64
    UNIFORM = 0.001
    """Share of the draws that is uniform whatever the losses were."""

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
        losses, seen = self.losses.numpy(), self.seen.numpy()  # their own memory, quicker to write one by one
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
}

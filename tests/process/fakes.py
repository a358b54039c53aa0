"""Fake networks with known outputs, and processes by name."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from diffusion.process import build
from diffusion.process.build import ProcessOptions
from diffusion.process.schedule import Schedule
from diffusion.sampling.build import SampleOptions
from diffusion.sampling.sampler import Noise

PROCESS = {
    "schedule": "linear",
    "num_timesteps": 1000,
    "zero_terminal_snr": False,
    "parameterization": "eps",
    "learned_variance": False,
    "weighting": "simple",
    "loss": "mse",
}
SAMPLE = {
    "sampler": "ddpm",
    "steps": 10,
    "spacing": "linspace",
    "variance": "fixed-small",
    "threshold": "none",
    "guidance": 1.0,
    "count": 1,
}
SAMPLERS: list[dict[str, object]] = [
    {"sampler": "ddpm", "variance": "fixed-small"},
    {"sampler": "ddpm", "variance": "fixed-large"},
    {"sampler": "ddpm", "variance": "analytic"},
    {"sampler": "ddim"},
    {"sampler": {"kind": "ddim", "eta": 1.0}},
    {"sampler": "dpm-solver++"},
    {"sampler": "dpm-solver++-sde"},
    {"sampler": "heun"},
    {"sampler": "consistency"},
    {"sampler": {"kind": "consistency", "gamma": 0.6}},
    {"sampler": {"kind": "consistency", "gamma": 1.0}},
]
PARAMETERIZATIONS = ["eps", "x_0", "v", "mu"]
X0Hat = Callable[[Tensor, Tensor], Tensor]


def process(**changes: object) -> build.Process:
    if changes.get("zero_terminal_snr"):  # the default weighting gives its last timestep no weight, and is refused
        changes = {"weighting": "snr-plus-one"} | changes
    return build.process(ProcessOptions.model_validate(PROCESS | changes))


def options(**changes: object) -> SampleOptions:
    return SampleOptions.model_validate(SAMPLE | changes)


def guided(changes: dict[str, object]) -> dict[str, object]:
    """Changes of a sampler, with guidance where it applies."""
    return changes | ({"guidance": 2.5} if options(**changes).guidable else {})


def randn(*shape: int, seed: int = 0) -> Tensor:
    """float64, so that tests detect mistakes rather than rounding errors."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def noise(*shape: int, dtype: torch.dtype = torch.float64) -> Noise:
    """Noise for each draw."""
    return lambda place: randn(*shape, seed=1000 + place).to(dtype)


def at(schedule: Schedule, t: Tensor) -> Tensor:
    """alpha_bar_t, (B, 1, 1, 1), with alpha_bar_{-1} = 1, from alpha_bar only."""
    return torch.where(t < 0, 1, schedule.alpha_bar[t.clamp(min=0)]).view(-1, 1, 1, 1)


def mean_of_eq_7(schedule: Schedule, x_0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """mu_tilde as Ho et al. 2020 print it in eq. 7, with beta_t and alpha_t = 1 - beta_t."""
    beta, a, before = schedule.beta[t].view(-1, 1, 1, 1), at(schedule, t), at(schedule, t - 1)
    return before.sqrt() * beta / (1 - a) * x_0 + (1 - beta).sqrt() * (1 - before) / (1 - a) * x_t


def output(name: str, schedule: Schedule, x_0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """The output of a network with parameterization `name` that corresponds to `x_0`."""
    a = at(schedule, t)
    eps = (x_t - a.sqrt() * x_0) / (1 - a).sqrt()
    return {
        "eps": eps,
        "x_0": x_0,
        "v": a.sqrt() * eps - (1 - a).sqrt() * x_0,
        "mu": mean_of_eq_7(schedule, x_0, x_t, t),
    }[name]


class Says(nn.Module):
    """A network of any parameterization whose estimate is `x_0_hat(x_t, t)`, optionally with a variance fraction."""

    def __init__(self, name: str, schedule: Schedule, x_0_hat: X0Hat, fraction: float | None = None) -> None:
        super().__init__()
        self.name, self.schedule, self.x_0_hat, self.fraction = name, schedule, x_0_hat, fraction

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:  # noqa: ARG002
        out = output(self.name, self.schedule, self.x_0_hat(x_t, t).double(), x_t.double(), t).to(x_t.dtype)
        return out if self.fraction is None else torch.cat([out, torch.full_like(out, self.fraction)], dim=1)


def always(value: Tensor) -> Callable[..., Tensor]:
    """Returns the constant `value`, as a network's output or as x_0_hat."""
    return lambda *_: value


def some_x_0_hat(x_t: Tensor, t: Tensor) -> Tensor:
    """An arbitrary denoiser: bounded, wrong, and different at each timestep."""
    return 0.7 * torch.tanh(1.3 * x_t) + 0.2 * torch.sin(t.to(x_t.dtype).view(-1, 1, 1, 1) / 100)


def marginal_variance(schedule: Schedule, t: Tensor, s: float) -> Tensor:
    """Var(x_t) for x_0 ~ N(0, s^2)."""
    a = at(schedule, t)
    return a * s**2 + 1 - a


def gaussian_x_0_hat(schedule: Schedule, s: float) -> X0Hat:
    """E[x_0 | x_t] for x_0 ~ N(0, s^2 I)."""
    return lambda x_t, t: (at(schedule, t).sqrt() * s**2 / marginal_variance(schedule, t, s)).to(x_t.dtype) * x_t


def gaussian_x_0_mse(schedule: Schedule, s: float) -> Tensor:
    """E (x_0_hat - x_0)^2 at every t, (T,), for x_0 ~ N(0, s^2 I): (1 - alpha_bar) s^2 / Var(x_t)."""
    t = torch.arange(schedule.num_timesteps)
    return (1 - schedule.alpha_bar) * s**2 / marginal_variance(schedule, t, s).flatten()

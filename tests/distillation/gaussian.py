"""Data x_0 ~ N(MEAN, STD^2), whose denoiser and sampling trajectories have closed forms, and models of them."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from diffusion.distillation.teacher import Teacher
from diffusion.model import Config, Model
from diffusion.nn.unet import UNetOptions
from diffusion.process import build
from tests.process import fakes
from tests.process.fakes import PROCESS, Says, X0Hat, at, marginal_variance

MEAN, STD = 0.2, 0.15


def process(**changes: object) -> build.Process:
    return fakes.process(**({"schedule": "cosine", "parameterization": "v"} | changes))


def x_0_hat(made: build.Process) -> X0Hat:
    """E[x_0 | x_t]."""

    def estimate(x_t: Tensor, t: Tensor) -> Tensor:
        root = at(made.schedule, t).sqrt()
        return MEAN + root * STD**2 / marginal_variance(made.schedule, t, STD) * (x_t - root * MEAN)

    return estimate


def carried(made: build.Process, x_t: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """Where the reverse ODE takes x_t at s: (x_t - E[x_t]) / sqrt(Var(x_t)) stays the same."""
    spread = (marginal_variance(made.schedule, s, STD) / marginal_variance(made.schedule, t, STD)).sqrt()
    return at(made.schedule, s).sqrt() * MEAN + spread * (x_t - at(made.schedule, t).sqrt() * MEAN)


def end(made: build.Process) -> X0Hat:
    """The image at the end of the trajectory through x_t."""
    return lambda x_t, t: carried(made, x_t, t, torch.full_like(t, -1))


def model(
    made: build.Process, net: nn.Module, parameterization: str = "v", classes: tuple[str, ...] = (), **changes: object
) -> Model:
    options = build.ProcessOptions.model_validate(PROCESS | {"parameterization": parameterization} | changes)
    network = UNetOptions(classes=bool(classes))
    return Model(net, made, Config(shape=(1, 2, 2), classes=classes, network=network, process=options, x_0_mse=None))


def says(made: build.Process, estimate: X0Hat, name: str = "v", fraction: float | None = None) -> Says:
    return Says(name, made.schedule, estimate, fraction)


def teacher(made: build.Process, estimate: X0Hat | None = None, threshold: str = "none", name: str = "v") -> Teacher:
    """The exact denoiser, or that of `estimate`."""
    return Teacher(model(made, says(made, estimate or x_0_hat(made), name), name), threshold=threshold)


def shifted(estimate: X0Hat, by: Callable[[Tensor], Tensor]) -> X0Hat:
    """`estimate`, plus a number for each timestep."""
    return lambda x_t, t: estimate(x_t, t) + by(t).view(-1, 1, 1, 1)

"""Everything that can be chosen for training learns, alone and together."""

from typing import Any

import numpy as np
import pytest
import torch

from diffusion.model import new_network
from diffusion.pairs.noise import timesteps
from diffusion.pairs.pairs import Batch
from diffusion.process import build
from diffusion.process.loss import LOSSES
from diffusion.process.parameterization import PARAMETERIZATIONS
from diffusion.process.schedule import SCHEDULES
from diffusion.process.timesteps import TIMESTEPS
from diffusion.process.weighting import WEIGHTINGS
from diffusion.training import loop
from diffusion.training.state import begin
from flows.params import Params

UNET: dict[str, Any] = {"kind": "unet", "base_channels": 8, "channel_multipliers": (1,), "attention_levels": ()}


def train(params: Params, steps: int = 15, precision: torch.dtype = torch.float32) -> list[float]:
    """The loss at each step, on the same images, noise and timesteps."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    x_0 = rng.uniform(-1, 1, (64, 1, 1, 1)) * np.ones((1, 1, 8, 8))
    eps = rng.standard_normal((64, 1, 8, 8))
    t = timesteps(0, "train", 0, 0, params.process.num_timesteps)
    batch = Batch(x_0.astype(np.float32), t, eps.astype(np.float32), np.arange(64) % 3 - 1, rng.random(64))
    process = build.process(params.process)
    state = begin(new_network((1, 8, 8), 2, params.network, params.process), params.train, process.schedule)
    trainer = loop.Trainer(params.train, 0, process.loss, lambda _: batch, state.net, precision=precision)
    losses = []
    for _ in range(steps):
        state.sums.zero_()
        loop.step(state, trainer)
        losses.append(float(state.sums[1]))
    assert all(parameter.isfinite().all() for parameter in state.average.parameters())
    return losses


@pytest.fixture
def tiny(params: Params) -> dict[str, Any]:
    plain = params.model_dump()
    plain["network"] = UNET
    plain["train"] |= {"steps": 1000, "warmup_steps": 0, "batch_size": 64}
    return plain


@pytest.mark.parametrize("learned_variance", [False, True])
@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS)
def test_every_process_learns(
    tiny: dict[str, Any], parameterization: str, weighting: str, learned_variance: bool
) -> None:
    tiny["process"] |= {
        "parameterization": parameterization,
        "weighting": weighting,
        "learned_variance": learned_variance,
    }
    losses = train(Params.model_validate(tiny))
    assert np.mean(losses[-3:]) < losses[0]


@pytest.mark.parametrize("parameterization", [name for name in PARAMETERIZATIONS if name != "eps"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_that_ends_in_pure_noise_learns(
    tiny: dict[str, Any], parameterization: str, schedule: str
) -> None:
    tiny["process"] |= {"parameterization": parameterization, "schedule": schedule, "zero_terminal_snr": True}
    tiny["process"]["weighting"] = "snr-plus-one"
    losses = train(Params.model_validate(tiny))
    assert np.mean(losses[-3:]) < losses[0]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["unet", "uvit"])
def test_every_optimizer_learns_at_every_precision(
    tiny: dict[str, Any], kind: str, optimizer: str, precision: torch.dtype
) -> None:
    if kind == "uvit":
        tiny["network"] = {"kind": kind, "conditioning": "adaln", "base_channels": 8}
    tiny["train"] |= {"optimizer": optimizer}
    losses = train(Params.model_validate(tiny), precision=precision)
    assert np.mean(losses[-3:]) < losses[0]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("timesteps", TIMESTEPS)
def test_every_loss_learns_at_every_choice_of_timesteps(tiny: dict[str, Any], loss: str, timesteps: str) -> None:
    tiny["process"] |= {"loss": loss}
    tiny["train"] |= {"timesteps": timesteps}
    losses = train(Params.model_validate(tiny))
    assert np.mean(losses[-3:]) < losses[0]


@pytest.mark.parametrize("classes", [False, True])
@pytest.mark.parametrize(
    "changes",
    [
        {"kind": "unet", "conditioning": "add", "head_channels": 4, "convention": "diffusers"},
        {"kind": "unet", "conditioning": "film", "patch_size": 2},
        {"kind": "uvit", "conditioning": "token", "depth": 3, "patch_size": 2, "head_channels": 8},
        {"kind": "uvit", "conditioning": "adaln", "depth": 1, "patch_size": 4},
    ],
)
def test_every_network_learns(tiny: dict[str, Any], changes: dict[str, Any], classes: bool) -> None:
    tiny["network"] = (UNET if changes["kind"] == "unet" else {"base_channels": 8}) | changes | {"classes": classes}
    losses = train(Params.model_validate(tiny))
    assert np.mean(losses[-3:]) < losses[0]

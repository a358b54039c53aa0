"""Every pair of training choices trains every weight."""

from itertools import combinations
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
from diffusion.training.state import new_state
from flows.params import Params

UNET: dict[str, Any] = {"kind": "unet", "base_channels": 8, "channel_multipliers": (1,), "attention_levels": ()}
UVIT: dict[str, Any] = {"kind": "uvit", "base_channels": 8}
NETWORKS: dict[str, dict[str, Any]] = {
    "unet": UNET | {"channel_multipliers": (1, 2), "attention_levels": (1,)},
    "unet-add": UNET | {"conditioning": "add", "head_channels": 4, "convention": "diffusers"},
    "unet-film": UNET | {"conditioning": "film", "patch_size": 2, "fourier_features": (3, 7)},
    "uvit-token": UVIT | {"conditioning": "token", "depth": 3, "patch_size": 2, "head_channels": 8},
    "uvit-adaln": UVIT | {"conditioning": "adaln", "depth": 1, "patch_size": 4},
}
CHOICES: dict[str, list[Any]] = {
    "zero_terminal_snr": [False, True],
    "parameterization": list(PARAMETERIZATIONS),
    "weighting": list(WEIGHTINGS),
    "timesteps": list(TIMESTEPS),
    "network": list(NETWORKS),
    "schedule": list(SCHEDULES),
    "loss": list(LOSSES),
    "learned_variance": [False, True],
    "optimizer": ["adamw", "muon"],  # not sgd, whose steps are as small as the gradients of the first steps
    "precision": [torch.float32, torch.bfloat16],
    "classes": [False, True],
}


Row = dict[str, Any]
WEIGHTLESS_AT_PURE_NOISE = set(WEIGHTINGS) - {"snr-plus-one", "truncated-snr"}
"""Weightings that are zero at pure noise."""


def allowed(row: Row) -> bool:
    """Whether these choices are compatible according to the rules of the parameters, and learn in a few steps.

    The bound that trains a learned variance is dominated by errors that posterior-mean hardly weighs.
    """
    if row.get("learned_variance") and row.get("weighting") == "posterior-mean":
        return False
    return not row.get("zero_terminal_snr") or not (
        row.get("parameterization") == "eps"
        or row.get("weighting") in WEIGHTLESS_AT_PURE_NOISE
        or row.get("timesteps") == "log-snr-normal"
    )


def covering_array() -> list[Row]:
    """Rows that cover every allowed pair of choices; each starts with a missing pair and greedily adds others.

    Cohen et al. 1997, "The AETG system", without its random trials.
    """
    missing = {
        frozenset({(one, a), (other, b)}): None  # in order
        for one, other in combinations(CHOICES, 2)
        for a in CHOICES[one]
        for b in CHOICES[other]
        if allowed({one: a, other: b})
    }
    rows = list[Row]()
    while missing:
        row = dict(sorted(next(iter(missing)), key=str))
        for name in [name for name in CHOICES if name not in row]:
            fitting = [value for value in CHOICES[name] if allowed(row | {name: value})]
            row[name] = max(
                fitting, key=lambda new: sum(frozenset({(name, new), old}) in missing for old in row.items())
            )
        rows.append(row)
        for pair in combinations(row.items(), 2):
            missing.pop(frozenset(pair), None)
    return rows


@pytest.mark.parametrize("row", covering_array(), ids=lambda row: "-".join(str(row[name]) for name in CHOICES))
def test_every_pair_of_choices_learns(params: Params, row: Row) -> None:
    """On the same images, noise and timesteps again and again."""
    plain = params.model_dump()
    plain["network"] = NETWORKS[row["network"]] | {"classes": row["classes"]}
    for name in ("weighting", "parameterization", "schedule", "loss", "zero_terminal_snr", "learned_variance"):
        plain["process"][name] = row[name]
    plain["train"] |= {"steps": 1000, "warmup_steps": 0, "batch_size": 64}
    plain["train"] |= {"timesteps": row["timesteps"], "optimizer": row["optimizer"]}
    params = Params.model_validate(plain)
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    x_0 = rng.uniform(-1, 1, (64, 1, 1, 1)) * np.ones((1, 1, 8, 8))
    eps = rng.standard_normal((64, 1, 8, 8))
    t = timesteps(0, "train", 0, 0, params.process.num_timesteps)
    y, augmentation = np.arange(64) % 3 - 1, np.empty((64, 0), np.float32)
    batch = Batch(x_0.astype(np.float32), t, eps.astype(np.float32), y, rng.random(64), augmentation)
    process = build.process(params.process)
    state = new_state(new_network((1, 8, 8), 2, params.network, params.process), params.train, process.schedule)
    trainer = loop.Trainer(params.train, 0, process.loss, lambda _: batch, state.net, precision=row["precision"])
    start = {name: parameter.detach().clone() for name, parameter in state.net.named_parameters()}
    losses = []
    for _ in range(15):
        state.sums.zero_()
        loop.step(state, trainer)
        losses.append(float(state.sums[1]))
    assert all(parameter.isfinite().all() for parameter in state.average.parameters())
    assert [name for name, parameter in state.net.named_parameters() if parameter.equal(start[name])] == []
    assert np.mean(losses[-3:]) < losses[0]

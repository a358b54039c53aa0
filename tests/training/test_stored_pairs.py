"""The network's training inputs, compared with the files of data/pairs."""

import io
import json
import math
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffusion.model import new_network
from diffusion.pairs.pairs import Batches, Pairs
from diffusion.process import build
from diffusion.training import loop
from diffusion.training.checkpoints import Checkpoints
from diffusion.training.state import State, new_state
from flows.params import Params
from flows.paths import Paths
from flows.stages import pairs as pairs_stage
from flows.stages import shard as shard_stage

EPOCHS = 5
"""Enough steps for loss-aware samplers to observe 64 losses in each stratum."""


def changed(params: Params, timesteps: str) -> Params:
    changes: dict[str, dict[str, Any]] = {
        "pairs": {"draws": EPOCHS},
        "network": {"base_channels": 8, "channel_multipliers": (1,), "attention_levels": (), "classes": True},
        "train": {"timesteps": timesteps, "class_dropout": 0.0, "batch_size": 100, "preview_every": 10**6},
    }
    return params.model_copy(
        update={name: getattr(params, name).model_copy(update=update) for name, update in changes.items()}
    )


def said_by_the_files(directory: Path, draw: int) -> tuple[NDArray[Any], ...]:
    """x_0 (N, 64), t (N,), eps (N, 64) and y (N,) of the training pairs of a draw, read as data/README.md says."""
    arrays: dict[str, NDArray[Any]] = {}
    for path in sorted(directory.glob("train-*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                arrays[member.name] = np.load(io.BytesIO(tar.extractfile(member).read()))  # type: ignore[union-attr]
    found = []
    for block in sorted({name.split(".")[0] for name in arrays}):
        x_0 = arrays[f"{block}.x_0.npy"] / 127.5 - 1
        key = arrays[f"{block}.noise_key.npy"][draw]
        philox = np.random.Philox(key=key[:2], counter=key[2:])
        eps = np.random.Generator(philox).standard_normal((64, *x_0.shape[1:]), dtype=np.float32)[: len(x_0)]
        n = len(x_0)
        found.append((x_0.reshape(n, -1), arrays[f"{block}.t.npy"][draw], eps.reshape(n, -1), arrays[f"{block}.y.npy"]))
    return tuple(np.concatenate(parts) for parts in zip(*found, strict=True))


def given_to_the_network(params: Params, directory: Path, checkpoints: Path) -> tuple[NDArray[Any], ...]:
    """x_t (n, 64), t (n,) and y (n,) passed to the network by the training loop, in order."""
    pairs = Pairs(directory, "train")
    steps = math.ceil(EPOCHS * pairs.images / params.train.batch_size)
    options = params.train.model_copy(update={"steps": steps})
    process = build.process(params.process)
    net = new_network(pairs.shape, len(pairs.manifest.classes), params.network, params.process)
    state = new_state(net, options, process.schedule)
    seen: list[tuple[Tensor, ...]] = []
    state.net.register_forward_pre_hook(lambda _, given: seen.append(tuple(value.clone() for value in given)))
    fetch = Batches(pairs, params.seed, options.batch_size, options.flip, options.class_dropout)
    trainer = loop.Trainer(options, params.seed, process.loss, fetch, state.net)

    def measure(state: State) -> None:
        state.heldout_curve.append({"step": state.step, "mse": 1.0})

    loop.train(
        state,
        trainer,
        Checkpoints(checkpoints),
        report=lambda _: None,
        preview=measure,
        stop_signal=lambda: 0,
    )
    x_t, t, y = (torch.cat(parts).numpy() for parts in zip(*seen, strict=True))
    return x_t.reshape(len(t), -1), t, y


@pytest.mark.parametrize("timesteps", ["stored", "uniform", "rms-error"])
def test_what_the_network_is_given(digits_tree: Path, params: Params, timesteps: str, tmp_path: Path) -> None:
    params, paths = changed(params, timesteps), Paths(digits_tree)
    shard_stage.run(params, paths)
    pairs_stage.run(params, paths)
    given = given_to_the_network(params, paths.pairs, tmp_path / "checkpoints")
    images = Pairs(paths.pairs, "train").images
    alpha_bar = np.array(json.loads((paths.pairs / "manifest.json").read_text())["alpha_bar"])
    for epoch in range(EPOCHS):
        x_0, stored_t, eps, labels = said_by_the_files(paths.pairs, epoch)
        x_t, t, y = (values[epoch * images : (epoch + 1) * images] for values in given)
        a, b = np.sqrt(alpha_bar[t])[:, None], np.sqrt(1 - alpha_bar[t])[:, None]
        # Which of the stored pairs each is: the least |x_t - (a x_0 + b eps)|^2.
        distance = -2 * (a * (x_t @ x_0.T) + b * (x_t @ eps.T)) + a**2 * (x_0**2).sum(1) + b**2 * (eps**2).sum(1)
        pair = (distance + 2 * a * b * (x_0 * eps).sum(1)).argmin(axis=1)
        np.testing.assert_allclose(x_t, a * x_0[pair] + b * eps[pair], rtol=0, atol=1e-5)
        assert sorted(pair.tolist()) == list(range(images))  # each once
        np.testing.assert_array_equal(y, labels[pair])
        same = float((t == stored_t[pair]).mean())
        if timesteps == "stored":
            assert same == 1
        elif epoch == EPOCHS - 1:
            assert same < 0.02

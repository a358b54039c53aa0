"""A training step does not synchronize with the device, except for the losses of the previous step."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from diffusion.process import build as processes
from diffusion.process.timesteps import LossAware, Stored
from diffusion.training import loop
from flows.params import Params
from tests.training.test_loop import changed, fetch, fresh_state, spoiled


@pytest.fixture
def params(params: Params) -> Params:
    return changed(params, network={"base_channels": 8, "channel_multipliers": [1], "attention_levels": []})


@pytest.mark.parametrize(("timesteps", "accumulate"), [("uniform", 1), ("uniform", 2), ("rms-error", 1)])
def test_a_step_waits_for_no_result(
    params: Params, monkeypatch: pytest.MonkeyPatch, timesteps: str, accumulate: int
) -> None:
    """Operations that synchronize: reading numbers from a tensor, conditions on one, copies to the CPU."""
    params = changed(
        params,
        train={"timesteps": timesteps, "accumulate": accumulate, "batch_size": 64},
        process={"num_timesteps": 30},
    )
    state, waits = fresh_state(params), list[str]()
    trainer = loop.Trainer(params.train, 0, processes.process(params.process).loss, fetch, state.net)

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
                waits.append(str(func))
            return func(*args, **(kwargs or {}))

    # These read tensors of the CPU alone: the losses of the step before have been copied to it.
    monkeypatch.setattr(LossAware, "draw", Stored.draw)
    monkeypatch.setattr(LossAware, "observe", lambda *_: None)
    for name in ("tolist", "numpy", "cpu"):
        monkeypatch.setattr(torch.Tensor, name, lambda *_, name=name: waits.append(name))
    loop.step(state, trainer)
    with Watching():
        loop.step(state, trainer)
        assert waits == []
        assert state.skipped == 0
    assert waits == ["aten._local_scalar_dense.default"]  # by the line before


def test_losses_are_observed_one_step_late(params: Params) -> None:
    process = {"num_timesteps": 30, "parameterization": "eps"}
    params = changed(params, process=process, train={"batch_size": 64})
    state, seen = fresh_state(params), list[tuple[list[int], list[float]]]()
    trainer = loop.Trainer(params.train, 0, processes.process(params.process).loss, spoiled(1), state.net)

    class Recording(Stored):
        learns = True

        def observe(self, t: torch.Tensor, loss: torch.Tensor) -> None:
            seen.append((t.tolist(), loss.tolist()))

    state.timesteps = Recording()
    for step in range(4):
        loop.step(state, trainer)
        assert [t for t, _ in seen] == [fetch(earlier).t.tolist() for earlier in range(step)]
    # A new network gives zero: the error is the noise.
    assert seen[0][1] == pytest.approx(np.square(fetch(0).eps).mean(axis=(1, 2, 3)).tolist(), rel=1e-5)
    assert np.isnan(seen[1][1]).all()  # the step was skipped: an image was not finite
    assert np.isfinite(seen[2][1]).all()


def test_losses_that_are_not_finite_teach_nothing() -> None:
    one, other = LossAware(30, power=1), LossAware(30, power=1)
    one.observe(torch.tensor([3, 4, 5]), torch.tensor([1.0, math.nan, 2.0]))
    other.observe(torch.tensor([3, 5]), torch.tensor([1.0, 2.0]))
    assert one.losses.equal(other.losses)
    assert one.seen.equal(other.seen)

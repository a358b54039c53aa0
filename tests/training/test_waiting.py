"""A training step gives the device its work and waits for no result of it."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from diffusion.process import build as processes
from diffusion.training import loop
from flows.params import Params
from tests.training.test_loop import changed, fetch, new_state


@pytest.fixture
def params(params: Params) -> Params:
    return changed(params, network={"base_channels": 8, "channel_multipliers": [1], "attention_levels": []})


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_waits_for_no_result(params: Params, monkeypatch: pytest.MonkeyPatch, accumulate: int) -> None:
    """Each would keep a GPU idle: numbers read from a tensor, conditions on one, copies to the CPU."""
    params = changed(
        params,
        train={"timesteps": "uniform", "accumulate": accumulate, "batch_size": 64},
        process={"num_timesteps": 30},
    )
    state, waits = new_state(params), list[str]()
    trainer = loop.Trainer(params.train, 0, processes.process(params.process).loss, fetch, state.net)

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
                waits.append(str(func))
            return func(*args, **(kwargs or {}))

    for name in ("tolist", "numpy", "cpu"):
        monkeypatch.setattr(torch.Tensor, name, lambda *_, name=name: waits.append(name))
    loop.step(state, trainer)
    with Watching():
        loop.step(state, trainer)
        assert waits == []
        assert state.skipped == 0
    assert waits == ["aten._local_scalar_dense.default"]  # by the line before

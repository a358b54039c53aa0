"""The training loop: what it calls when, and that stopping and going on changes nothing."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from diffusion.data.noise import timesteps
from diffusion.data.pairs import Batch
from diffusion.errors import Stopped, UserError
from diffusion.model import new_network
from diffusion.params import Params
from diffusion.process import build as processes
from diffusion.training import loop
from diffusion.training.state import Checkpoints, State, begin


def fetch(step: int) -> Batch:
    rng = np.random.default_rng(step)
    x_0 = rng.uniform(-1, 1, (64, 1, 8, 8)).astype(np.float32)
    eps = rng.standard_normal((64, 1, 8, 8), dtype=np.float32)
    return Batch(x_0, timesteps(0, "train", step, 0, 30), eps, np.full(64, -1), rng.random(64))


@pytest.fixture
def params(params: Params) -> Params:
    network = params.network.model_copy(update={"base_channels": 8, "blocks_per_level": 1, "dropout": 0.2})
    train = params.train.model_copy(update={"steps": 12, "log_every": 5, "preview_every": 4, "warmup_steps": 2})
    return params.model_copy(update={"network": network, "train": train})


def new_state(params: Params) -> State:
    torch.manual_seed(1)
    net = new_network((1, 8, 8), 0, params.network, params.process)
    return begin(net, params.train, processes.process(params.process).schedule)


def run(
    params: Params,
    state: State,
    checkpoints: Checkpoints,
    stop_at: int | None = None,
    fetch: Callable[[int], Batch] = fetch,
) -> list[str]:
    """Train, and tell what was called."""
    called: list[str] = []

    def report(state: State) -> None:
        if state.step - state.last_point >= params.train.log_every:
            loop.add_point(state, params.train)

    def preview(state: State) -> None:
        called.append(f"preview {state.step}")
        state.heldout_curve.append({"step": state.step, "mse": float(state.step)})

    def checkpoint(state: State) -> None:
        called.append(f"checkpoint {state.step}")
        checkpoints.write(state)

    def check_stop() -> None:
        if state.step == stop_at:
            raise Stopped(15)

    loss = processes.process(params.process).loss
    loop.train(
        state,
        params.train,
        0,
        loss,
        fetch,
        report=report,
        preview=preview,
        checkpoint=checkpoint,
        check_stop=check_stop,
    )
    return called


def test_hooks_are_called_when_they_are_due(params: Params, tmp_path: Path) -> None:
    state = new_state(params)
    assert run(params, state, Checkpoints(tmp_path)) == ["preview 4", "preview 8", "preview 12", "checkpoint 12"]
    assert [row["step"] for row in state.loss_curve] == [5, 10]
    assert all(row["loss"] > 0 and row["grad_norm"] > 0 for row in state.loss_curve)


@pytest.mark.parametrize("timesteps", processes.TIMESTEPS)
@pytest.mark.parametrize("stop_at", [3, 4, 8, 11])
def test_a_stopped_training_goes_on_to_the_same_bits(
    params: Params, tmp_path: Path, stop_at: int, timesteps: str
) -> None:
    train = params.train.model_copy(update={"timesteps": timesteps})
    # So few timesteps that loss-second-moment has seen ten losses of each before the end.
    process = params.process.model_copy(update={"num_timesteps": 30})
    params = params.model_copy(update={"train": train, "process": process})
    whole = new_state(params)
    run(params, whole, Checkpoints(tmp_path / "whole"))

    first, checkpoints = new_state(params), Checkpoints(tmp_path / "parts")
    with pytest.raises(Stopped):
        run(params, first, checkpoints, stop_at=stop_at)
    second = new_state(params)
    assert checkpoints.restore(second) == []
    assert second.step == stop_at
    run(params, second, checkpoints)

    ours, theirs = second.tensors(), whole.tensors()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name
    assert second.loss_curve == whole.loss_curve
    assert second.heldout_curve == whole.heldout_curve


def test_a_killed_training_goes_on_from_its_last_checkpoint_to_the_same_bits(
    params: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = new_state(params)
    run(params, whole, Checkpoints(tmp_path / "whole"))
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)
    checkpoints = Checkpoints(tmp_path / "parts")

    class Killed(BaseException):
        """Ends the loop as SIGKILL would: nothing more is written."""

    def die(step: int) -> Batch:
        if step == 7:
            raise Killed
        return fetch(step)

    with pytest.raises(Killed):
        run(params, new_state(params), checkpoints, fetch=die)
    second = new_state(params)
    assert checkpoints.restore(second) == []
    assert second.step == 7
    run(params, second, checkpoints)
    assert all(torch.equal(tensor, whole.tensors()[name]) for name, tensor in second.tensors().items())
    assert second.loss_curve == whole.loss_curve


def test_a_damaged_checkpoint_falls_back_to_the_one_before(params: Params, tmp_path: Path) -> None:
    state, checkpoints = new_state(params), Checkpoints(tmp_path)
    for state.step in (1, 2, 3):
        checkpoints.write(state)
    (tmp_path / ".0000000002.safetensors.x1y2").touch()  # a killed process left this
    state.step = 3
    checkpoints.write(state)
    assert sorted(path.stem for path in tmp_path.iterdir()) == ["0000000002"] * 2 + ["0000000003"] * 2
    newest = tmp_path / "0000000003.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    found = new_state(params)
    (line,) = checkpoints.restore(found)
    assert "0000000003 is damaged" in line
    assert found.step == 2


def test_a_loss_that_is_not_finite_ends_the_training_and_is_not_kept(params: Params, tmp_path: Path) -> None:
    state = new_state(params)
    with torch.no_grad():
        next(state.net.parameters()).fill_(float("nan"))
    with pytest.raises(UserError, match=r"not finite between steps 0 and 5; lower train\.learning_rate"):
        run(params, state, Checkpoints(tmp_path))
    assert list(tmp_path.iterdir()) == []

"""The training loop: its calls, and that interrupting and resuming changes nothing."""

import math
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from diffusion.errors import Stopped, UserError
from diffusion.model import new_network
from diffusion.pairs.noise import timesteps
from diffusion.pairs.pairs import Batch
from diffusion.process import build as processes
from diffusion.process.timesteps import TIMESTEPS
from diffusion.training import ema, loop
from diffusion.training.checkpoints import Checkpoints
from diffusion.training.state import State, new_state
from flows.params import Params

Fetch = Callable[[int], Batch]


def fetch(step: int) -> Batch:
    rng = np.random.default_rng(step)
    x_0 = rng.uniform(-1, 1, (64, 1, 8, 8)).astype(np.float32)
    eps = rng.standard_normal((64, 1, 8, 8), dtype=np.float32)
    return Batch(x_0, timesteps(0, "train", step, 0, 30), eps, np.full(64, -1), rng.random(64), eps[:, 0, 0, :0])


def spoiled(*steps: int, value: float = math.nan) -> Fetch:
    """`fetch` with one non-finite image in the batches of these steps, whenever they are fetched."""

    def get(step: int) -> Batch:
        batch = fetch(step)
        if step in steps:
            batch.x_0[3] = value
        return batch

    return get


@pytest.fixture
def params(params: Params) -> Params:
    return changed(
        params,
        network={"base_channels": 8, "channel_multipliers": [1], "attention_levels": [], "dropout": 0.2},
        # So few timesteps that all are seen often enough for those that are drawn by the loss.
        process={"num_timesteps": 30},
        train={"steps": 12, "log_every": 5, "preview_every": 4, "warmup_steps": 2, "batch_size": 64},
    )


def changed(params: Params, **sections: dict[str, Any]) -> Params:
    made = {name: getattr(params, name) for name in sections}
    made = {name: type(part).model_validate(part.model_dump() | sections[name]) for name, part in made.items()}
    return params.model_copy(update=made)


def fresh_state(params: Params) -> State:
    torch.manual_seed(1)
    net = new_network((1, 8, 8), 0, params.network, params.process)
    return new_state(net, params.train, processes.process(params.process).schedule)


def run(
    params: Params,
    state: State,
    checkpoints: Checkpoints,
    stop_at: int | None = None,
    fetch: Fetch = fetch,
    measured: Callable[[int], float] = float,
) -> list[str]:
    """Train and record the calls; `measured` returns the held-out error at a step."""
    called: list[str] = []
    trainer = loop.Trainer(params.train, 0, processes.process(params.process).loss, fetch, state.net)

    def report(state: State) -> None:
        if state.step - state.last_point >= params.train.log_every:
            trainer.add_point(state)

    def preview(state: State) -> None:
        called.append(f"preview {state.step}")
        state.heldout_curve.append({"step": state.step, "mse": measured(state.step)})

    class Recorder(Checkpoints):
        def write(self, state: State, good: bool = False) -> None:
            called.append(f"{'good ' if good else ''}checkpoint {state.step}")
            super().write(state, good)

    recorder = Recorder(checkpoints.directory, seconds=checkpoints.seconds)
    loop.train(
        state, trainer, recorder, report=report, preview=preview, stop_signal=lambda: 15 * (state.step == stop_at)
    )
    return called


def assert_same(ours: State, theirs: State) -> None:
    one, other = ours.tensors(), theirs.tensors()
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name
    assert ours.facts() == theirs.facts()


def test_hooks_are_called_when_they_are_due(params: Params, tmp_path: Path) -> None:
    state = fresh_state(params)
    called = ["good checkpoint 0"] + [
        f"{what} {step}" for step in (4, 8, 12) for what in ("preview", "good checkpoint")
    ]
    assert run(params, state, Checkpoints(tmp_path)) == called
    assert [row["step"] for row in state.loss_curve] == [5, 10, 12]
    assert all(row["loss"] > 0 and row["grad_norm"] > 0 for row in state.loss_curve)


def test_the_curve_has_the_loss_of_each_band_of_timesteps(params: Params, tmp_path: Path) -> None:
    """With importance weights, the mean over all bands, which have equal width, is close to the loss."""
    params = changed(params, train={"timesteps": "rms-error", "steps": 40, "log_every": 20, "preview_every": 40})
    state = fresh_state(params)
    run(params, state, Checkpoints(tmp_path))
    for row in state.loss_curve:
        bands = [value for name, value in row.items() if name.startswith("loss_t")]
        assert len(bands) == 10
        assert np.mean(bands) == pytest.approx(row["loss"], rel=0.1)
    assert [name for name in row if name.startswith("loss_t")][:2] == ["loss_t00_02", "loss_t03_05"]


@pytest.mark.parametrize(("timesteps", "optimizer"), [*zip(TIMESTEPS, cycle(["muon", "adamw", "sgd"]), strict=False)])
def test_a_training_that_is_stopped_again_and_again_ends_with_the_same_bits(
    params: Params, tmp_path: Path, timesteps: str, optimizer: str
) -> None:
    levels = {"channel_multipliers": [1, 2], "attention_levels": [1]} if timesteps == "stored" else {}
    train = {"timesteps": timesteps, "optimizer": optimizer, "keep_best": True}
    params = changed(params, network=levels, train=train)
    whole = fresh_state(params)
    run(params, whole, Checkpoints(tmp_path / "whole"))

    checkpoints, reached = Checkpoints(tmp_path / "parts"), 0
    for stop_at in (3, 8, 11):
        state = fresh_state(params)
        assert checkpoints.restore(state) == bool(reached)
        assert state.step == reached
        with pytest.raises(Stopped):
            run(params, state, checkpoints, stop_at=stop_at)
        reached = stop_at
    state = fresh_state(params)
    assert checkpoints.restore(state)
    run(params, state, checkpoints)
    assert_same(state, whole)


class Killed(BaseException):
    """Ends the loop like SIGKILL, without further writes."""


def test_a_killed_training_resumes_from_its_last_checkpoint_and_ends_with_the_same_bits(
    params: Params, tmp_path: Path
) -> None:
    whole = fresh_state(params)
    run(params, whole, Checkpoints(tmp_path / "whole"))
    checkpoints = Checkpoints(tmp_path / "parts", seconds=0)

    def die(step: int) -> Batch:
        if step == 7:
            raise Killed
        return fetch(step)

    with pytest.raises(Killed):
        run(params, fresh_state(params), checkpoints, fetch=die)
    second = fresh_state(params)
    checkpoints.restore(second)
    assert second.step == 7
    run(params, second, checkpoints)
    assert_same(second, whole)


def test_a_few_bad_steps_are_skipped_and_counted(params: Params, tmp_path: Path) -> None:
    """A skipped step only advances the position: what follows is as if its batch did not exist."""
    state = fresh_state(params)
    run(params, state, Checkpoints(tmp_path), fetch=spoiled(2, 5, 6))
    assert (state.skipped, state.skipped_in_row, state.rollbacks) == (3, 0, 0)
    assert all(parameter.isfinite().all() for parameter in [*state.net.parameters(), *state.average.parameters()])
    assert all(math.isfinite(value) for row in state.loss_curve for value in row.values())


def test_a_skipped_step_leaves_weights_and_optimizer_alone(params: Params) -> None:
    state = fresh_state(params)
    trainer = loop.Trainer(params.train, 0, processes.process(params.process).loss, spoiled(1), state.net)
    loop.step(state, trainer)
    before = {name: tensor.clone() for name, tensor in state.tensors().items()}
    loop.step(state, trainer)
    assert (state.step, state.skipped, state.skipped_in_row) == (2, 1, 1)
    for name, tensor in state.tensors().items():  # of the first step the timesteps have observed the losses now
        assert torch.equal(tensor, before[name]) or name.startswith(("unobserved.", "timesteps.")), name


def test_a_loss_that_overflows_is_skipped_though_its_gradient_is_finite(params: Params) -> None:
    state = fresh_state(params)
    trainer = loop.Trainer(params.train, 0, processes.process(params.process).loss, spoiled(0, value=1e25), state.net)
    loop.step(state, trainer)
    assert state.skipped == 1


def test_many_bad_steps_in_a_row_roll_back_once_with_a_lower_rate(
    params: Params, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[int] = []

    def bad_once(step: int) -> Batch:
        asked.append(step)
        if step == 5 and asked.count(step) == 1:  # after the checkpoint to which it rolls back
            state.run_id = "followed"
        return spoiled(step)(step) if 5 <= step <= 9 and asked.count(step) == 1 else fetch(step)

    state, checkpoints = fresh_state(params), Checkpoints(tmp_path)
    run(params, state, checkpoints, fetch=bad_once)
    assert asked == [*range(10), *range(4, 12)]
    assert (state.step, state.rollbacks, state.skipped, state.run_id) == (12, 1, 5, "followed")
    # Steps are counted from 0: 2 of warmup, then linearly to zero at step 12.
    assert state.loss_curve[0]["learning_rate"] == pytest.approx(0.5 * 0.002 * (1 - 2 / 10))
    assert (
        "the loss or gradient was not finite for 5 steps in a row before step 10; rolling back to step 4 with the "
        "learning rate times 0.5" in capsys.readouterr().err
    )


def test_a_training_that_went_back_and_was_killed_ends_with_the_same_bits(params: Params, tmp_path: Path) -> None:
    """It rolls back to a step that the parameters determine, not to wherever a checkpoint happened to be written."""

    def run_to(directory: str, stops: list[int]) -> State:
        asked: list[int] = []

        def bad_until_back(step: int) -> Batch:
            went_back = bool(state.rollbacks)
            asked.append(step)
            return fetch(step) if went_back or step < 5 else spoiled(step)(step)

        for stop in [*stops, None]:
            state = fresh_state(params)
            Checkpoints(tmp_path / directory).restore(state)
            try:
                run(params, state, Checkpoints(tmp_path / directory), stop_at=stop, fetch=bad_until_back)
            except Stopped:
                continue
        return state

    assert_same(run_to("parts", [3, 7, 9, 11]), run_to("whole", []))


def test_a_training_that_diverges_again_ends_and_says_so(params: Params, tmp_path: Path) -> None:
    state = fresh_state(params)
    message = (
        "the loss or gradient was not finite for 6 steps in a row before step 12, even after a rollback .* "
        "lower learning_rate"
    )
    with pytest.raises(UserError, match=message):
        run(params, state, Checkpoints(tmp_path), fetch=spoiled(*range(6, 12)))
    kept = fresh_state(params)
    Checkpoints(tmp_path).restore(kept)
    assert (kept.step, kept.rollbacks) == (8, 1)
    assert all(parameter.isfinite().all() for parameter in kept.net.parameters())


def test_a_training_without_a_single_good_step_ends_and_says_so(params: Params, tmp_path: Path) -> None:
    params = changed(params, train={"steps": 3})
    with pytest.raises(UserError, match="the loss or gradient was non-finite at every step; lower learning_rate"):
        run(params, fresh_state(params), Checkpoints(tmp_path), fetch=spoiled(0, 1, 2))


def test_a_held_out_error_that_is_not_finite_leads_back_too(params: Params, tmp_path: Path) -> None:
    state, seen = fresh_state(params), list[int]()

    def measured(step: int) -> float:
        seen.append(step)
        return math.inf if seen == [4, 8] else 1.0

    run(params, state, Checkpoints(tmp_path), measured=measured)
    assert seen == [4, 8, 8, 12]
    assert [row["mse"] for row in state.heldout_curve] == [1.0, 1.0, 1.0]
    assert state.rollbacks == 1


def test_the_best_measurement_is_kept_and_patience_ends_the_training(params: Params, tmp_path: Path) -> None:
    params = changed(params, train={"steps": 100, "patience": 2, "keep_best": True})
    errors = {4: 3.0, 8: 1.0, 12: 2.0, 16: 1.0, 20: 0.5}
    state, at_8 = fresh_state(params), fresh_state(params)
    run(params, state, Checkpoints(tmp_path / "a"), measured=errors.__getitem__)
    assert state.step == 16
    assert [row["step"] for row in state.loss_curve] == [5, 10, 15, 16]  # the rest as well
    with pytest.raises(Stopped):
        run(params, at_8, Checkpoints(tmp_path / "b"), stop_at=8, measured=errors.__getitem__)
    kept, last = fresh_state(params), fresh_state(params)
    state.copy_average_into(last.net)
    assert all(torch.equal(tensor, last.net.state_dict()[name]) for name, tensor in state.average.state_dict().items())
    state.copy_final_into(kept.net)
    assert all(torch.equal(tensor, kept.net.state_dict()[name]) for name, tensor in at_8.average.state_dict().items())


@pytest.mark.parametrize("grad_clip", [0.01, 1e6])
def test_a_gradient_is_scaled_down_to_the_largest_norm(params: Params, grad_clip: float) -> None:
    params = changed(params, train={"grad_clip": grad_clip})
    state, seen = fresh_state(params), list[float]()

    def norm(*_: object) -> None:
        gradients = [parameter.grad.flatten() for parameter in state.net.parameters() if parameter.grad is not None]
        seen.append(torch.cat(gradients).norm().item())

    for optimizer in state.optimizers:
        optimizer.register_step_pre_hook(norm)
    loop.step(state, loop.Trainer(params.train, 0, processes.process(params.process).loss, fetch, state.net))
    _, _, before = state.sums[:3].tolist()
    assert 0.01 < before < 1e6
    # torch adds 1e-6 to the norm, which is above 0.01.
    assert seen == pytest.approx([min(before, grad_clip)] * len(state.optimizers), rel=1e-4)


def test_the_average_holds_the_weights_after_every_step(params: Params) -> None:
    """Karras et al. 2024, eq. 120: after step s it keeps (1 - 1 / s)^(gamma + 1) of what it was."""
    state, expected = fresh_state(params), torch.tensor(math.nan)
    trainer = loop.Trainer(params.train, 0, processes.process(params.process).loss, fetch, state.net)

    def flat(net: nn.Module) -> torch.Tensor:
        return torch.cat([parameter.detach().flatten() for parameter in net.parameters()]).double()

    for step in range(1, 5):
        loop.step(state, trainer)
        keep = (1 - 1 / step) ** (ema.gamma(params.train.ema.width) + 1)
        expected = flat(state.net) if step == 1 else keep * expected + (1 - keep) * flat(state.net)
        torch.testing.assert_close(flat(state.average), expected, rtol=1e-5, atol=1e-7)
    assert not torch.allclose(flat(state.average), flat(state.net), rtol=1e-4)


def test_a_batch_in_parts_is_the_batch_as_a_whole(params: Params) -> None:
    params = changed(params, network={"dropout": 0.0})
    gradients = []
    for parts in (1, 4):
        state = fresh_state(params)
        state.net.double()
        options = params.train.model_copy(update={"accumulate": parts})
        trainer = loop.Trainer(options, 0, processes.process(params.process).loss, fetch, state.net)
        x_0, t, eps, y, _, unaugmented = (torch.from_numpy(array) for array in fetch(0))
        weights = torch.linspace(0, 2, 64, dtype=torch.float64)
        loss = loop.backward(trainer, x_0.double(), t, eps.double(), y, weights, unaugmented)
        gradients.append([loss, *[parameter.grad for parameter in state.net.parameters()]])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)

"""Checkpoints on disk: which are kept, which are valid, and safety against being killed while writing."""

import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from diffusion.training import recovery
from diffusion.training.checkpoints import Checkpoints, newest_step
from diffusion.training.state import State
from flows import fingerprint
from flows.params import Params
from tests.training.test_loop import Killed, changed, fresh_state


@pytest.fixture
def params(params: Params) -> Params:
    return changed(params, network={"base_channels": 8, "channel_multipliers": [1], "attention_levels": []})


def at(state: State, step: int) -> State:
    """A state whose weights encode its step."""
    state.step = step
    with torch.no_grad():
        next(state.net.parameters()).fill_(float(step))
    return state


def steps(directory: Path) -> list[int]:
    assert {path.suffix for path in directory.iterdir()} <= {".json", ".safetensors"}
    return sorted(int(path.stem) for path in directory.glob("*.json"))


def test_the_last_two_are_kept_and_the_last_good_one(params: Params, tmp_path: Path) -> None:
    state, checkpoints = fresh_state(params), Checkpoints(tmp_path)
    for step in range(7):
        checkpoints.write(at(state, step), good=step in (0, 2))
    assert steps(tmp_path) == [2, 5, 6]
    assert newest_step(tmp_path) == 6
    assert newest_step(tmp_path / "none") is None
    (tmp_path / ".0000000002.safetensors.x1y2").touch()  # a killed process left this
    checkpoints.write(at(state, 7), good=True)
    assert steps(tmp_path) == [6, 7]


def test_a_good_one_is_found_again_behind_the_others(params: Params, tmp_path: Path) -> None:
    state, checkpoints = fresh_state(params), Checkpoints(tmp_path)
    for step in range(4):
        checkpoints.write(at(state, step), good=step == 1)
    found = fresh_state(params)
    assert checkpoints.restore(found, good=True)
    assert found.step == 1
    assert (next(found.net.parameters()) == 1).all()
    checkpoints.delete_after(1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0000000001.json", "0000000001.safetensors"]
    checkpoints.write(at(state, 1))  # the same step again: good it stays
    assert checkpoints.restore(fresh_state(params), good=True)


def test_one_is_good_only_if_it_is_said_to_be(params: Params, tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.write(fresh_state(params))
    assert not checkpoints.restore(fresh_state(params), good=True)
    assert checkpoints.restore(fresh_state(params))


def test_killed_between_other_weights_of_a_step_and_their_json_it_is_no_damaged_one(
    params: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    state, checkpoints = fresh_state(params), Checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.write(at(state, step))
    state.sums += 1
    monkeypatch.setattr("diffusion.training.checkpoints.write_json", raise_killed)
    with pytest.raises(Killed):
        checkpoints.write(state)
    found = fresh_state(params)
    assert checkpoints.restore(found)
    assert found.step == 1
    assert capsys.readouterr().err == ""


def raise_killed(*_: object) -> None:
    raise Killed


@pytest.mark.parametrize("damage", ["shorter", "other", "gone", "facts", "list"])
def test_a_damaged_one_falls_back_to_the_one_before(
    params: Params, tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    state, checkpoints = fresh_state(params), Checkpoints(tmp_path)
    for step in (1, 2, 3):
        checkpoints.write(at(state, step))
    newest = tmp_path / "0000000003.safetensors"
    content = newest.read_bytes()
    match damage:
        case "shorter":
            newest.write_bytes(content[:-1])
        case "facts":
            facts = newest.with_suffix(".json")
            facts.write_text(facts.read_text().replace('"step": 3', '"step": 7'))
        case "list":
            newest.with_suffix(".json").write_text("[]")
        case "other":
            newest.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        case _:
            newest.unlink()
    found = fresh_state(params)
    assert checkpoints.restore(found)
    assert found.step == 2
    assert "checkpoint 0000000003 is corrupt" in capsys.readouterr().err


def test_without_any_the_state_stays_as_it_is(params: Params, tmp_path: Path) -> None:
    (tmp_path / "0000000003.json").write_text(json.dumps({"sha256": "?"})[:-4])
    state = at(fresh_state(params), 9)
    assert not Checkpoints(tmp_path).restore(state)
    assert state.step == 9


class Countdown:
    """Lets a number of file system calls pass and raises Killed at the next; None: never."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.left: int | None = None
        for owner, name in [(os, "fdopen"), (os, "fsync"), (Path, "replace"), (Path, "unlink"), (Path, "mkdir")]:
            monkeypatch.setattr(owner, name, self._watched(getattr(owner, name)))

    def _watched(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*arguments: Any, **options: Any) -> Any:
            if self.left == 0:
                raise Killed
            if self.left is not None:
                self.left -= 1
            return call(*arguments, **options)

        return counting


def test_killed_at_any_moment_of_writing_the_last_whole_one_is_found(
    params: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kills the process at each file system call in turn while the third and fourth checkpoints are written."""
    countdown, state, moments, written = Countdown(monkeypatch), fresh_state(params), 0, 2
    while written < 4:
        directory = tmp_path / str(moments)
        checkpoints = Checkpoints(directory)
        for step in (1, 2):
            checkpoints.write(at(state, step))
        countdown.left, written = moments, 2
        with suppress(Killed):
            for step in (3, 4):
                checkpoints.write(at(state, step))
                written = step
        countdown.left = None
        found = fresh_state(params)
        assert Checkpoints(directory).restore(found)
        assert found.step in (written, written + 1)
        assert (next(found.net.parameters()) == found.step).all()
        # And the next one is written as ever; nothing unfinished stays.
        checkpoints.write(at(found, found.step + 1))
        assert len(steps(directory)) == 2
        moments += 1
    assert moments > 20


def test_killed_at_any_moment_of_a_rollback_it_rolls_back_to_the_same_checkpoint(
    params: Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    countdown, moments, done = Countdown(monkeypatch), 0, False
    while not done:
        directory = tmp_path / str(moments)
        state, checkpoints = fresh_state(params), Checkpoints(directory)
        for step in range(3):
            checkpoints.write(at(state, step), good=step == 1)
        state.skips[0] = 5
        countdown.left = moments
        try:
            recovery.roll_back(state, params.train, checkpoints, "seen")
            done = True
        except Killed:
            countdown.left = None
            again = fresh_state(params)
            assert checkpoints.restore(again)
            if not again.rollbacks:  # it trains on, and is where it was
                again.skips[0] = 5
                recovery.roll_back(again, params.train, checkpoints, "seen")
            state = again
        countdown.left = None
        assert (state.step, state.rollbacks, state.skipped) == (1, 1, 5)
        assert (next(state.net.parameters()) == 1).all()
        assert steps(directory) == [1]
        moments += 1
    assert moments > 5


def test_checkpoints_of_interrupted_trainings_are_kept_up_to_a_number(tmp_path: Path) -> None:
    for number in range(fingerprint.KEPT_TRAININGS + 2):
        (tmp_path / str(number)).mkdir()
        os.utime(tmp_path / str(number), (number, number))
    with fingerprint.lock_of(tmp_path / "0"):
        fingerprint.drop_old_trainings(tmp_path)
    left = sorted(path.name for path in tmp_path.iterdir() if path.is_dir())
    assert left == ["0", *map(str, range(2, fingerprint.KEPT_TRAININGS + 2))]  # the first is in use

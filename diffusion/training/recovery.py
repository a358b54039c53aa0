"""Recovery from divergence: roll back to a good checkpoint and lower the learning rate."""

import math

from diffusion.errors import UserError
from diffusion.progress import say
from diffusion.training import optim
from diffusion.training.checkpoints import Checkpoints
from diffusion.training.curves import best
from diffusion.training.options import MuonOptions, TrainOptions
from diffusion.training.state import State

MAX_CONSECUTIVE_SKIPS = 5
"""Consecutive steps with a non-finite loss or gradient after which training is rolled back."""
ROLLBACK_FACTOR = 0.5
"""Factor applied to the learning rate after a rollback."""


class Diverged(Exception):
    """Training diverged and must be rolled back to an earlier step."""


def check(state: State) -> None:
    """Raise Diverged after MAX_CONSECUTIVE_SKIPS non-finite steps in a row. Synchronizes with the device."""
    if state.longest_skip >= MAX_CONSECUTIVE_SKIPS:
        raise Diverged(
            f"the loss or gradient was not finite for {state.longest_skip} steps in a row before step {state.step}"
        )


def check_heldout(state: State, options: TrainOptions) -> None:
    """Raise Diverged if the last held-out error is not finite; with `keep_best`, remember the best weights."""
    row = state.heldout_curve[-1]
    if not math.isfinite(row["mse"]):
        raise Diverged(f"the held-out error at step {state.step} was not finite")
    if options.keep_best and row is best(state.heldout_curve):
        state.best = {name: tensor.clone() for name, tensor in state.average.state_dict().items()}


def roll_back(state: State, options: TrainOptions, checkpoints: Checkpoints, seen: str) -> None:
    """Restore the last good checkpoint into `state` and lower the learning rate.

    Raises UserError if that has happened before, or if there is no good checkpoint.
    """
    if state.rollbacks:
        raise UserError(f"{seen}, even after a rollback with a lower learning rate; {advice(options)}")
    skipped, kept = state.skipped, {"run_id": state.run_id, "rollbacks": 1}
    if not checkpoints.restore(state, good=True):
        raise UserError(f"{seen}, and there is no good checkpoint to roll back to; {advice(options)}")
    # If killed before the last of these lines, the run resumes from an earlier state and gets here again.
    checkpoints.delete_after(state.step)
    for name, value in kept.items():
        setattr(state, name, value)
    state.skips[0] = skipped
    checkpoints.write(state)
    if checkpoints.world.main:
        say(
            f"{checkpoints.stage}: {seen}; rolling back to step {state.step} with the learning rate times "
            f"{ROLLBACK_FACTOR}"
        )


def advice(options: TrainOptions) -> str:
    """What to change after a divergence, for error messages."""
    rates = f"learning_rate (now {options.learning_rate})"
    if isinstance(options.optimizer, MuonOptions):
        rates += f" and optimizer.learning_rate (now {options.optimizer.learning_rate})"
    return f"lower {rates}"


def lr_factor(state: State, step: int, options: TrainOptions) -> float:
    """Learning rate at `step` as a factor of its peak, including the reduction after a rollback."""
    return optim.lr_factor(step, options) * ROLLBACK_FACTOR**state.rollbacks

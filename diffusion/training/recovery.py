"""Where the loss, a gradient or the held-out error is not finite: back to a good checkpoint, with a lower rate."""

import math

from diffusion.errors import UserError
from diffusion.progress import say
from diffusion.training import optim
from diffusion.training.checkpoints import Checkpoints
from diffusion.training.curves import best
from diffusion.training.options import MuonOptions, TrainOptions
from diffusion.training.state import State

MAX_CONSECUTIVE_SKIPS = 5
"""Steps in a row whose loss or gradient is not finite, after which the training goes back."""
ROLLBACK_FACTOR = 0.5
"""What the learning rate is multiplied by after going back."""


class Diverged(Exception):
    """The training has to go back to an earlier step."""


def check(state: State) -> None:
    """Raise Diverged after MAX_CONSECUTIVE_SKIPS steps in a row with a non-finite loss or gradient; synchronizes."""
    if state.longest_skip >= MAX_CONSECUTIVE_SKIPS:
        raise Diverged(
            f"before step {state.step}, loss or gradient was not finite at {state.longest_skip} steps in a row"
        )


def judge(state: State, options: TrainOptions) -> None:
    """Raise Diverged if the last held-out error is not finite; with `keep_best`, keep the best weights."""
    row = state.heldout_curve[-1]
    if not math.isfinite(row["mse"]):
        raise Diverged(f"the held-out error at step {state.step} was not finite")
    if options.keep_best and row is best(state.heldout_curve):
        state.best = {name: tensor.clone() for name, tensor in state.average.state_dict().items()}


def roll_back(state: State, options: TrainOptions, checkpoints: Checkpoints, seen: str) -> None:
    """Put the last good checkpoint into `state`, with a lower learning rate.

    Raises UserError if that was done before, or there is none.
    """
    if state.rollbacks:
        raise UserError(f"{seen}, even after going back once with a lower learning rate; {advice(options)}")
    skipped, kept = state.skipped, {"run_id": state.run_id, "rollbacks": 1}
    if not checkpoints.restore(state, good=True):
        raise UserError(f"{seen}, and there is no good checkpoint to go back to; {advice(options)}")
    # Killed before the last of these, it goes on from an earlier state and comes here again.
    checkpoints.delete_after(state.step)
    for name, value in kept.items():
        setattr(state, name, value)
    state.skips[0] = skipped
    checkpoints.write(state)
    if checkpoints.world.main:
        say(f"train: {seen}; going back to step {state.step} with {ROLLBACK_FACTOR} times the learning rate")


def advice(options: TrainOptions) -> str:
    rates = f"learning_rate (now {options.learning_rate})"
    if isinstance(options.optimizer, MuonOptions):
        rates += f" and optimizer.learning_rate (now {options.optimizer.learning_rate})"
    return f"lower {rates}"


def lr_factor(state: State, step: int, options: TrainOptions) -> float:
    """The learning rate of a step, as a share of its peak."""
    return optim.lr_factor(step, options) * ROLLBACK_FACTOR**state.rollbacks

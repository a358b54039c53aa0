"""The training loop."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor, nn

from diffusion.errors import Stopped, UserError
from diffusion.pairs.noise import Purpose, stream
from diffusion.pairs.pairs import Batch
from diffusion.process.bands import BANDS, band_edges, band_of
from diffusion.process.loss import Loss
from diffusion.process.schedule import times
from diffusion.progress import say
from diffusion.training import ema, optim
from diffusion.training.checkpoints import Checkpoints
from diffusion.training.distributed import World, synchronizing, whole
from diffusion.training.options import MuonOptions, TrainOptions
from diffusion.training.state import Row, State

SKIPS = 5
"""Steps in a row whose loss or gradient is not finite before the training goes back."""
LOWER_RATE = 0.5
"""What the learning rate is multiplied by after going back."""

Hook = Callable[[State], None]


@dataclass(frozen=True)
class Trainer:
    """What one step needs besides the state."""

    options: TrainOptions
    seed: int
    loss: Loss
    fetch: Callable[[int], Batch]
    """The k-th batch; of several processes, this one's share of it."""
    net: nn.Module
    """The state's network, as it is run: compiled, in several processes."""
    world: World = field(default_factory=World)
    precision: torch.dtype = torch.float32


class Diverged(Exception):
    """The training has to go back to an earlier step."""


def train(
    state: State,
    trainer: Trainer,
    checkpoints: Checkpoints,
    *,
    report: Hook,
    preview: Hook,
    stop_signal: Callable[[], int],
) -> None:
    """Train `state` from its step to its end; Ho et al. 2020, algorithm 1.

    `report` is called after each step, `preview` every `preview_every` steps and at the end; it measures the held-out
    error and adds it to the curve. `stop_signal` gives the number of a signal that has come, or 0: then a checkpoint is
    written and Stopped is raised. Others are written at the start, after each measurement and every minute, so that an
    interrupted training goes on where it was, to the bit.

    Raises UserError when loss or gradients stay out of the finite numbers, with a lower learning rate as well.
    """
    saved = time.monotonic()
    if state.step == 0:
        checkpoints.write(state, good=True)
    while True:
        try:
            done = state.step == trainer.options.steps
            previewed = bool(state.heldout_curve) and state.heldout_curve[-1]["step"] == state.step
            if state.step and (done or state.step % trainer.options.preview_every == 0) and not previewed:
                preview(state)
                judge(state, trainer.options)
                checkpoints.write(state, good=not state.skipped_in_row)
                saved = time.monotonic()
            if done or out_of_patience(state.heldout_curve, trainer.options.patience):
                if state.last_point < state.step:
                    add_point(state, trainer)
                if not state.loss_curve:
                    raise UserError(f"loss or gradient was finite in no step; {advice(trainer.options)}")
                return
            signum, due = trainer.world.largest(stop_signal(), time.monotonic() - saved > checkpoints.seconds)
            if signum:
                raise Stopped(int(signum))
            if due:
                checkpoints.write(state)
                saved = time.monotonic()
            step(state, trainer)
            report(state)
        except Stopped:
            checkpoints.write(state)
            raise
        except Diverged as diverged:
            go_back(state, trainer.options, checkpoints, str(diverged))


def step(state: State, trainer: Trainer) -> None:
    """One step of the optimizers and of the average; skipped where the loss or its gradient is not finite."""
    options, world = trainer.options, trainer.world
    # Dropout draws from torch's own generator: its seed, too, is a function of the position alone.
    torch.manual_seed(int(stream(trainer.seed, Purpose.DROPOUT, high=state.step, low=world.rank).integers(2**63)))
    x_0, pairs_t, eps, y, u = (torch.from_numpy(array) for array in trainer.fetch(state.step))
    t, weight = state.timesteps.draw(pairs_t, u)
    batch = [x.to(state.device, non_blocking=True) for x in (x_0, t, eps, y, weight)]
    loss = backward(trainer, *batch)
    norm = whole(nn.utils.clip_grad_norm_(state.net.parameters(), options.grad_clip).detach())
    finite = bool(norm.isfinite())
    if finite:
        optim.set_rate(state.optimizers, rate(state, state.step, options))
        for optimizer in state.optimizers:
            optimizer.step()
    for optimizer in state.optimizers:
        optimizer.zero_grad(set_to_none=True)
    state.step += 1
    if finite:
        state.skipped_in_row = 0
        ema.update(state.average, state.net, state.step, options.ema_width)
        if state.timesteps.learns:
            state.timesteps.observe(world.gather(t), world.gather(loss.cpu()))
        add(state, loss, norm, batch[1], batch[4], trainer.loss.schedule.num_timesteps)
    else:
        state.skipped, state.skipped_in_row = state.skipped + 1, state.skipped_in_row + 1
        if state.skipped_in_row == SKIPS:
            raise Diverged(f"at {SKIPS} steps in a row, from {state.step - SKIPS}, loss or gradient was not finite")


def backward(trainer: Trainer, x_0: Tensor, t: Tensor, eps: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    """Add the gradient of the mean weighted loss to the network's; gives the loss of each image, (B,).

    x_0, eps: (B, C, H, W); t, y: int64 (B,); weight: (B,). The batch goes through in `accumulate` parts.
    """
    options, losses = trainer.options, []
    parts = zip(*(x.chunk(options.accumulate) for x in (x_0, t, eps, y, weight)), strict=True)
    for number, (x_0, t, eps, y, weight) in enumerate(parts, start=1):
        x_0, eps = (x.to(memory_format=torch.channels_last) for x in (x_0, eps))
        with synchronizing(trainer.net, number == options.accumulate):
            with torch.autocast(x_0.device.type, trainer.precision, enabled=trainer.precision != torch.float32):
                loss = trainer.loss(trainer.net, x_0, t, eps, y)
            value = times(weight, loss).mean() / options.accumulate
            # The factor is 1, or NaN where the loss is not finite: then so are the gradients, in every process.
            (value * (value.detach() - value.detach() + 1)).backward()
        losses.append(loss.detach())
    return torch.cat(losses)


def rate(state: State, step: int, options: TrainOptions) -> float:
    """The learning rate of a step, as a share of its peak."""
    return optim.rate(step, options) * LOWER_RATE**state.rollbacks


def add(state: State, loss: Tensor, norm: Tensor, t: Tensor, weight: Tensor, num_timesteps: int) -> None:
    """Add a step to the sums: loss and weight (B,) and t int64 (B,) of its images, and the gradient's norm."""
    band = nn.functional.one_hot(band_of(t, num_timesteps), BANDS).double()
    weight = weight.double()
    weighted = weight * loss.double()
    step = torch.stack([torch.ones_like(norm), weighted.mean(), norm])
    state.sums += torch.cat([step, weighted @ band, weight @ band])


def add_point(state: State, trainer: Trainer) -> Row | None:
    """Add to the loss curve the means since its last point; None if all steps since were skipped.

    All processes call this together. A band of t has a value if there was a timestep in it.
    """
    trainer.world.sum_(state.sums)
    steps, loss, norm, *bands = state.sums.tolist()
    state.sums.zero_()
    if not steps:
        return None
    row = {
        "step": state.step,
        "loss": loss / steps,
        "learning_rate": trainer.options.learning_rate * rate(state, state.step - 1, trainer.options),
        "grad_norm": norm / steps,
    }
    names = bands_of(trainer.loss.schedule.num_timesteps)
    for name, total, weight in zip(names, bands[:BANDS], bands[BANDS:], strict=True):
        if weight:
            row[name] = total / weight
    state.loss_curve.append(row)
    return row


def bands_of(num_timesteps: int) -> list[str]:
    """The columns of the bands' losses, such as loss_t000_099."""
    digits = len(str(num_timesteps - 1))
    return [f"loss_t{first:0{digits}d}_{after - 1:0{digits}d}" for first, after in pairwise(band_edges(num_timesteps))]


def best(heldout_curve: list[Row]) -> Row:
    """The held-out measurement with the least error."""
    return min(heldout_curve, key=lambda row: row["mse"])


def out_of_patience(heldout_curve: list[Row], patience: int) -> bool:
    """Whether the last `patience` measurements (0: any number) were none better than one before them."""
    if not patience or not heldout_curve:
        return False
    return len(heldout_curve) - 1 - heldout_curve.index(best(heldout_curve)) >= patience


def judge(state: State, options: TrainOptions) -> None:
    """Raise Diverged if the last held-out error is not finite; with `keep_best`, keep the best weights."""
    row = state.heldout_curve[-1]
    if not math.isfinite(row["mse"]):
        raise Diverged(f"the held-out error at step {state.step} was not finite")
    if options.keep_best and row is best(state.heldout_curve):
        state.best = {name: tensor.clone() for name, tensor in state.average.state_dict().items()}


def go_back(state: State, options: TrainOptions, checkpoints: Checkpoints, seen: str) -> None:
    """Put the last good checkpoint into `state`, with a lower learning rate.

    Raises UserError if that was done before, or there is none.
    """
    if state.rollbacks:
        raise UserError(f"{seen}, even after going back once with a lower learning rate; {advice(options)}")
    kept = {"skipped": state.skipped, "run_id": state.run_id, "rollbacks": 1}
    if not checkpoints.restore(state, good=True):
        raise UserError(f"{seen}, and there is no good checkpoint to go back to; {advice(options)}")
    # Killed before the last of these, it goes on from an earlier state and comes here again.
    checkpoints.drop_after(state.step)
    for name, value in kept.items():
        setattr(state, name, value)
    checkpoints.write(state, good=True)
    if checkpoints.world.main:
        say(f"train: {seen}; going back to step {state.step} with {LOWER_RATE} times the learning rate")


def advice(options: TrainOptions) -> str:
    rates = f"learning_rate (now {options.learning_rate})"
    if isinstance(options.optimizer, MuonOptions):
        rates += f" and optimizer.learning_rate (now {options.optimizer.learning_rate})"
    return f"lower {rates}"

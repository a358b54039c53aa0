"""The training loop."""

import math
import time
from collections.abc import Callable

import torch
from torch import nn

from diffusion import params
from diffusion.data.noise import Purpose, stream
from diffusion.data.pairs import Batch
from diffusion.errors import Stopped, UserError
from diffusion.process.loss import Loss
from diffusion.training import ema
from diffusion.training.optim import learning_rate
from diffusion.training.state import Row, State

CHECKPOINT_SECONDS = 60.0

Hook = Callable[[State], None]


def train(
    state: State,
    options: params.Train,
    seed: int,
    loss: Loss,
    fetch: Callable[[int], Batch],
    *,
    report: Hook,
    preview: Hook,
    checkpoint: Hook,
    check_stop: Callable[[], None],
) -> None:
    """Train `state` from its step to `options.steps`; Ho et al. 2020, algorithm 1.

    `fetch(k)` gives the k-th batch. `report` is called after each step, `preview` every `preview_every` steps and at
    the end, `checkpoint` every minute and whenever the training ends, so that an interrupted one goes on where it
    was, to the bit. `check_stop` raises Stopped to end it. Raises UserError when the loss is no longer finite.
    """
    saved = time.monotonic()
    try:
        while True:
            done = state.step == options.steps
            previewed = bool(state.heldout_curve) and state.heldout_curve[-1]["step"] == state.step
            if state.step and (done or state.step % options.preview_every == 0) and not previewed:
                preview(state)
            if done:
                break
            check_stop()
            if time.monotonic() - saved > CHECKPOINT_SECONDS:
                check_finite(state, options)
                checkpoint(state)
                saved = time.monotonic()
            step(state, options, seed, loss, fetch(state.step))
            report(state)
    except Stopped:
        check_finite(state, options)
        checkpoint(state)
        raise
    checkpoint(state)


def step(state: State, options: params.Train, seed: int, loss: Loss, batch: Batch) -> None:
    """One step of the optimizer and of the average."""
    # Dropout draws from torch's own generator: its seed, too, is a function of the position alone.
    torch.manual_seed(int(stream(seed, Purpose.DROPOUT, high=state.step).integers(2**63)))
    x_0, t, eps, y, u = (torch.from_numpy(array) for array in batch)
    drawn, weight = state.timesteps.draw(t, u)
    x_0, t, eps, y, weight = (x.to(state.device, non_blocking=True) for x in (x_0, drawn, eps, y, weight))
    x_0, eps = (tensor.to(memory_format=torch.channels_last) for tensor in (x_0, eps))
    losses = loss(state.net, x_0, t, eps, y)
    state.timesteps.observe(drawn, losses.detach())
    value = (weight.to(losses.dtype) * losses).mean()
    value.backward()
    norm = nn.utils.clip_grad_norm_(state.net.parameters(), options.grad_clip)
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate(state.step, options)
    state.optimizer.step()
    state.optimizer.zero_grad(set_to_none=True)
    state.step += 1
    ema.update(state.average, state.net, state.step, options.ema_decay)
    state.sums += torch.stack([value.detach(), norm.detach()])


def check_finite(state: State, options: params.Train, heldout_mse: float = 0.0) -> None:
    """Raise UserError if a loss or gradient since the last point of the curve, or `heldout_mse`, is not finite."""
    if not (state.sums.isfinite().all() and math.isfinite(heldout_mse)):
        raise UserError(
            f"the loss or its gradient was not finite between steps {state.last_point} and {state.step}; "
            f"lower train.learning_rate (now {options.learning_rate}) in params.yaml"
        )


def add_point(state: State, options: params.Train) -> Row:
    """Add to the loss curve the means since its last point."""
    check_finite(state, options)
    mean_loss, grad_norm = (state.sums / (state.step - state.last_point)).tolist()
    row = {
        "step": state.step,
        "loss": mean_loss,
        "learning_rate": learning_rate(state.step - 1, options),
        "grad_norm": grad_norm,
    }
    state.loss_curve.append(row)
    state.sums.zero_()
    return row

"""The training loop; comments refer to the lines of Ho et al. 2020, algorithm 1."""

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from diffusion.errors import Stopped, UserError
from diffusion.pairs.noise import Purpose, stream
from diffusion.pairs.pairs import Batch
from diffusion.process.schedule import Schedule, times
from diffusion.training import ema, optim
from diffusion.training.checkpoints import Checkpoints
from diffusion.training.curves import accumulate, add_point, out_of_patience
from diffusion.training.distributed import World, gather_full, gradient_sync
from diffusion.training.hardware import copy_to_host, seed_dropout, tf32
from diffusion.training.options import TrainOptions
from diffusion.training.recovery import Diverged, advice, check, check_heldout, lr_factor, roll_back
from diffusion.training.state import Row, State

Hook = Callable[[State], None]


class TrainingLoss(Protocol):
    """What is minimized; `diffusion.process.loss.Loss`, or one of diffusion.distillation."""

    @property
    def schedule(self) -> Schedule: ...

    def __call__(self, net: Callable[..., Tensor], x_0: Tensor, t: Tensor, eps: Tensor, y: Tensor, /) -> Tensor:
        """The loss of each image, (B,), for x_0 and eps (B, C, H, W), t and y int64 (B,)."""


@dataclass(frozen=True)
class Trainer:
    """Everything that a training step needs besides the state."""

    options: TrainOptions
    seed: int
    loss: TrainingLoss
    fetch: Callable[[int], Batch]
    """Returns batch k, or this process's share of it."""
    net: nn.Module
    """The state's network, wrapped for compilation and data parallelism."""
    world: World = field(default_factory=World)
    precision: torch.dtype = torch.float32
    before_step: Hook = lambda _: None
    """Called at the beginning of each step, for losses that change during the training."""

    def add_point(self, state: State) -> Row | None:
        """Append the means since the last point to the loss curve; returns None if all steps since were skipped."""
        learning_rate = self.options.learning_rate * lr_factor(state, state.step - 1, self.options)
        return add_point(state, self.world, learning_rate, self.loss.schedule.num_timesteps)


def train(
    state: State,
    trainer: Trainer,
    checkpoints: Checkpoints,
    *,
    report: Hook,
    preview: Hook,
    stop_signal: Callable[[], int],
) -> None:
    """Train `state` from its current step to the end; Ho et al. 2020, algorithm 1.

    `report` is called after each step. `preview` is called every `preview_every` steps and at the end; it measures the
    held-out error and appends it to the curve. `stop_signal` returns the number of a received signal, or 0; on a
    signal, a checkpoint is written and Stopped is raised. Checkpoints are also written at the start, after each
    held-out measurement and every minute, so that an interrupted run resumes bit for bit.

    Raises UserError if the loss or gradient stays non-finite even after a rollback with a lower learning rate.
    """
    saved = time.monotonic()
    if state.step == 0:
        checkpoints.write(state, good=True)
    while True:  # line 1: repeat
        try:
            done = state.step == trainer.options.steps
            previewed = bool(state.heldout_curve) and state.heldout_curve[-1]["step"] == state.step
            if done or state.step % trainer.options.log_every == 0 or state.step % trainer.options.preview_every == 0:
                check(state)  # only at these steps, so that an interrupted run rolls back at the same one
            if state.step and (done or state.step % trainer.options.preview_every == 0) and not previewed:
                preview(state)
                check_heldout(state, trainer.options)
                checkpoints.write(state, good=not state.skipped_in_row)
                saved = time.monotonic()
            if done or out_of_patience(state.heldout_curve, trainer.options.patience):
                if state.last_point < state.step:
                    trainer.add_point(state)
                if not state.loss_curve:
                    raise UserError(f"the loss or gradient was non-finite at every step; {advice(trainer.options)}")
                return
            signum, due = trainer.world.maximum(stop_signal(), time.monotonic() - saved > checkpoints.seconds)
            if signum:
                raise Stopped(int(signum))
            if due:
                checkpoints.write(state)
                saved = time.monotonic()
            step(state, trainer)  # lines 2 to 5
            report(state)
        except Stopped:
            checkpoints.write(state)
            raise
        except Diverged as diverged:
            roll_back(state, trainer.options, checkpoints, str(diverged))


def step(state: State, trainer: Trainer) -> None:
    """Take one step of the optimizers and the EMA.

    If the loss or gradient is not finite, the optimizers skip the step, and the EMA averages in the unchanged weights.

    With the weighting `simple` the loss is that of line 5, |eps - eps_hat(x_t, t)|^2, for any parameterization.
    """
    options, world = trainer.options, trainer.world
    trainer.before_step(state)
    # Dropout uses the device's generator; its seed too depends only on the position in the data.
    dropout = stream(trainer.seed, Purpose.DROPOUT, high=state.step, low=world.rank)
    seed_dropout(state.device, int(dropout.integers(2**63)))
    # Lines 2 to 4: images, timesteps and noise.
    x_0, pairs_t, eps, y, u, augmentation = (torch.from_numpy(array) for array in trainer.fetch(state.step))
    t, weight = state.timesteps.draw(pairs_t, u)
    placed = [(x_0, state.device), (t, state.sums.device), (eps, state.device), (y, state.device)]
    placed += [(weight, state.sums.device), (augmentation, state.device)]
    batch = [x.to(at, non_blocking=True) for x, at in placed]
    # Line 5: gradient step.
    loss = backward(trainer, *batch)
    norm = gather_full(nn.utils.clip_grad_norm_(state.net.parameters(), options.grad_clip).detach())
    optim.step(state.optimizers, lr_factor(state, state.step, options), norm)
    state.step += 1
    ema.update(state.average, state.net, state.step, options.ema)
    accumulate(state, loss, norm, batch[1], batch[4], trainer.loss.schedule.num_timesteps)
    if state.timesteps.learns:
        # Observe the losses of the previous step, while the GPU is busy with this one.
        state.observe()
        loss = torch.where(norm.isfinite(), world.gather(loss), torch.nan)
        state.unobserved = world.gather(t), copy_to_host(loss)


def backward(
    trainer: Trainer, x_0: Tensor, t: Tensor, eps: Tensor, y: Tensor, weight: Tensor, augmentation: Tensor
) -> Tensor:
    """Accumulate the gradient of the mean weighted loss; returns the loss of each image, (B,).

    x_0, eps: (B, C, H, W); t, y: int64 (B,); weight: (B,); augmentation: (B, 8), or (B, 0) without augmentation. The
    batch is processed in `accumulate` micro-batches.
    """
    options, losses = trainer.options, []
    parts = zip(*(x.chunk(options.accumulate) for x in (x_0, t, eps, y, weight, augmentation)), strict=True)
    for number, (x_0, t, eps, y, weight, augmentation) in enumerate(parts, start=1):
        x_0, eps = (x.to(memory_format=torch.channels_last) for x in (x_0, eps))
        full, on_gpu = trainer.precision == torch.float32, x_0.is_cuda
        with tf32() if full and on_gpu else nullcontext(), gradient_sync(trainer.net, number == options.accumulate):
            with torch.autocast(x_0.device.type, None if full else trainer.precision, enabled=not full):
                net = partial(trainer.net, augmentation=augmentation) if augmentation.shape[1] else trainer.net
                loss = trainer.loss(net, x_0, t, eps, y)
            value = times(weight, loss).mean() / options.accumulate
            # The factor is 1, or NaN if the loss is not finite, which makes the gradients NaN in every process.
            (value * (value.detach() - value.detach() + 1)).backward()
        losses.append(loss.detach())
    return torch.cat(losses)

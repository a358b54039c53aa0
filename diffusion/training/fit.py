"""Training on images in memory."""

from contextlib import ExitStack
from dataclasses import replace

import torch

from diffusion.errors import UserError, counted
from diffusion.model import Model
from diffusion.nn.counting import count
from diffusion.nn.layers import Network
from diffusion.pairs.memory import Blocks, Images
from diffusion.pairs.pairs import Batches
from diffusion.progress import Progress
from diffusion.training import loop, recovery
from diffusion.training.distributed import World
from diffusion.training.hardware import precision, prefetched, runnable, should_compile
from diffusion.training.options import TrainOptions
from diffusion.training.state import new_state


def fit(model: Model, images: Images, options: TrainOptions | None = None, seed: int = 0) -> Model:
    """Train a model and return one with the averaged (EMA) weights; Ho et al. 2020, algorithm 1.

    Trains `model.net` in place, on its current device. The pipeline's stage `train` takes the same steps on stored
    pairs, and adds checkpoints, held-out measurements, rollback on divergence, and distributed training; the options
    for these are ignored here.

    Raises:
        TypeError: the network is not one of diffusion.nn.
        ValueError: the images do not match the network.
        UserError: the loss or gradient was not finite for several steps in a row, or at the end.
    """
    options = (options or TrainOptions()).for_images(len(images))
    if not isinstance(model.net, Network):
        raise TypeError("fit only trains networks of diffusion.nn; for your own, write a training loop with Model.loss")
    if not len(images) or images.shape != model.shape or (model.num_classes and images.classes != model.config.classes):
        raise ValueError(
            f"fit: got {counted(len(images), 'image')} of shape {images.shape} with classes {images.classes}, but the "
            f"model expects shape {model.shape} and classes {model.config.classes}"
        )
    device = next(model.net.parameters()).device
    augment = options.augmentation(len(images))
    trained = model.net.train().requires_grad_(True)
    state = new_state(trained, options, model.process.schedule, augmented=augment > 0)
    blocks = Blocks(images, seed, model.process.schedule.num_timesteps)
    fetch = Batches(blocks, seed, options.batch_size, options.flip, options.class_dropout, augment)
    total = options.steps * options.batch_size
    with (
        prefetched(fetch, device) as batches,
        Progress("fit", total, "images") as progress,
        torch.enable_grad(),
        ExitStack() as at_the_end,
    ):
        if augment:
            at_the_end.callback(state.net.conditions.drop_augmentation)
        compiling = should_compile(options, device, lambda: count(state.net, images.shape).flops)
        net = runnable(state.net, options, World(), compiling)
        trainer = loop.Trainer(options, seed, model.process.loss, batches, net, precision=precision(options, device))
        while state.step < options.steps:
            try:
                loop.step(state, trainer)
                if state.step % options.log_every == 0 or state.step == options.steps:
                    recovery.check(state)
            except recovery.Diverged as diverged:
                raise UserError(f"{diverged}; {recovery.advice(options)}") from None
            progress.advance(options.batch_size)
        finite = all(parameter.isfinite().all() for parameter in state.average.parameters())
        if state.skipped == options.steps or not finite:
            raise UserError(f"the loss or gradient was not finite at the end; {recovery.advice(options)}")
    # Drop the estimate for the analytic variance, which belongs to other weights.
    return replace(model, net=state.average, config=model.config.model_copy(update={"x_0_mse": None}))

"""Stage train: train a model on the training pairs, with curves and previews."""

import math
from dataclasses import replace
from functools import partial

import torch

from diffusion.errors import UserError
from diffusion.evaluation.heldout import Estimate, quick_mse, x_0_mse
from diffusion.model import Config, Model, network_from, new_network
from diffusion.nn.layers import Network
from diffusion.pairs.noise import Purpose, stream
from diffusion.pairs.pairs import Pairs
from diffusion.process import build as processes
from diffusion.progress import Progress
from diffusion.training.hooks import CheckStop, preview_options
from diffusion.training.state import State
from flows import start
from flows.params import Params
from flows.paths import Paths
from flows.stages.training import Recipe, carry_out


def run(params: Params, paths: Paths) -> None:
    """Train a model; an interrupted training run with the same parameters, data and code is resumed."""
    carry_out(params, paths, partial(recipe, params, paths))


def recipe(params: Params, paths: Paths, device: torch.device) -> Recipe:
    """How the network is trained to predict the noise; raises UserError if the data do not fit the parameters."""
    pairs, heldout = Pairs(paths.pairs, "train"), Pairs(paths.pairs, "val")
    process, classes = processes.process(params.process), pairs.manifest.classes
    pairs.check_process(process.schedule.alpha_bar.numpy())
    if params.network.classes and not classes:
        raise UserError("network.classes: the images have no classes; set it to false in params.yaml")
    config = Config(shape=pairs.shape, classes=classes, network=params.network, process=params.process, x_0_mse=None)

    source, origin = start.load(paths, name, config) if (name := params.train.start_from) else (None, None)

    def initial() -> Network:
        if source:
            return network_from(source, config)
        torch.manual_seed(int(stream(params.seed, Purpose.INIT).integers(2**63)))
        return new_network(pairs.shape, len(classes), params.network, params.process)

    def measure(_: State, model: Model, check_stop: CheckStop) -> Estimate:
        return quick_mse(model, heldout, device, check_stop)

    def with_errors(model: Model, check_stop: CheckStop) -> Model:
        """E |x_0 - x_0_hat|^2 / d at each timestep, for the analytic variance."""
        with Progress("train", math.ceil(process.schedule.num_timesteps / 4), "batches") as progress:

            def on_batch() -> None:
                check_stop()
                progress.advance(1, "measuring the error at each timestep")

            errors = x_0_mse(model, heldout, device, params.seed, on_batch)
        return replace(model, config=config.model_copy(update={"x_0_mse": errors}))

    return Recipe(
        stage="train",
        options=params.train.for_images(pairs.images),
        config=config,
        process=process,
        net=initial,
        start=f"the weights of {origin} (data/models/{name})" if origin else "random weights",
        loss=process.loss,
        measure=measure,
        error="held-out MSE",
        drawing=preview_options(params.process),
        finish=with_errors,
    )

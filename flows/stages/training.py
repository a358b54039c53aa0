"""What the stages train and distill share: a training, resumed if it was interrupted, with curves and previews."""

import copy
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated

import torch
from pydantic import AfterValidator, Field

from diffusion.errors import LostConnection, UserError, counted
from diffusion.evaluation.heldout import Estimate
from diffusion.evaluation.live import LiveQuality
from diffusion.model import Config, Model, save_model
from diffusion.nn import build as networks
from diffusion.nn.counting import Counts, count
from diffusion.nn.layers import Network
from diffusion.pairs.pairs import Batches, Pairs
from diffusion.process.build import Process
from diffusion.progress import Progress, say, working
from diffusion.sampling.build import SampleOptions
from diffusion.signals import StopSignals
from diffusion.storage.files import new_directory, write_atomic, write_csv, write_json, write_sums
from diffusion.training import curves, distributed, loop
from diffusion.training.checkpoints import Checkpoints
from diffusion.training.distributed import World
from diffusion.training.hardware import precision, prefetched, runnable, should_compile
from diffusion.training.hooks import CheckStop, Hooks, preview_path
from diffusion.training.loop import TrainingLoss
from diffusion.training.options import TrainOptions
from diffusion.training.state import State, new_state
from flows import launching, made_with, nodes, tracking
from flows.environment import setting
from flows.fingerprint import exclusive, training_facts, training_fingerprint
from flows.params import Params, none_or_enough
from flows.parent import launched
from flows.paths import Paths

CHECKPOINT_SECONDS = "DDPM_CHECKPOINT_SECONDS"
"""Seconds between checkpoints. Not a parameter, since it does not affect the result."""
PREVIEW_QUALITY = "DDPM_PREVIEW_QUALITY"
"""Number of samples to compare with training images at every preview; 0, the default, is none. It is no parameter,
either."""


@dataclass(frozen=True)
class Recipe:
    """What a stage trains, and how: all that `train` and `distill` do not share."""

    stage: str
    options: TrainOptions
    """With the number of steps also if epochs are given."""
    config: Config
    """Of the model."""
    process: Process
    net: Callable[[], Network]
    """Builds the network with its initial weights."""
    start: str
    """What these are, for messages."""
    loss: TrainingLoss
    measure: Callable[[State, Model, CheckStop], Estimate]
    """The held-out error at a preview."""
    error: str
    """What that is, for messages."""
    drawing: SampleOptions
    """How previews are drawn."""
    finish: Callable[[Model, CheckStop], Model] = lambda model, _: model
    """Completes the trained model."""
    before_step: Callable[[State], None] = lambda _: None
    replaces_teacher: bool = False
    """Whether the training's state has a second network, the student that becomes a teacher."""


def carry_out(params: Params, paths: Paths, recipe_for: Callable[[torch.device], Recipe]) -> None:
    """Carry out a training; an interrupted one with the same parameters, inputs and code is resumed.

    With several processes, this one only launches them, and each of them calls this function again.
    """
    device = networks.device(params.device, torch.distributed.get_node_local_rank(0))
    recipe = recipe_for(device)
    stage, options = recipe.stage, recipe.options
    if device.type not in ("cpu", "cuda") and (options.processes > 1 or distributed.is_worker()):
        raise UserError(f"device: {device} supports only one process; set device to cpu, or start one process")
    if options.processes * nodes.number() > 1 and not distributed.is_worker():
        check_devices(params, recipe, device)
        launching.divide_threads(options.processes)
        several = World(size=options.processes * nodes.number())
        check_batch_size(stage, options, several)
        facts = training_facts(stage, params, paths, device, several)
        with exclusive(paths.checkpoints, facts):
            launching.launch(stage, options.processes, paths.checkpoints / training_fingerprint(facts))
        return
    store = os.environ.get(launching.STORE)
    lost = LostConnection if launched() else UserError  # only the launcher reports errors
    file = Path(store) if store else None
    with (
        explain_out_of_memory(stage, options),
        distributed.process_group(device, file, lost, stage) as world,
        ExitStack() as held,
    ):
        check_batch_size(stage, options, world)
        facts = training_facts(stage, params, paths, device, world)
        if world.main and not launched():
            held.enter_context(exclusive(paths.checkpoints, facts))
        training = Training(params, paths, recipe, device, world, training_fingerprint(facts))
        model, state = training.run()
        if world.main:
            with working(f"{stage}: writing the model and its curves, recording them in MLflow"):
                training.write(model, state)
                tracking.record(params, paths, state.run_id)
            loss, error = state.loss_curve[-1]["loss"], state.heldout_curve[-1]["mse"]
            say(f"{stage}: {counted(state.step, 'step')}, loss {loss:.4f}, {recipe.error} {error:.4f}")
            shutil.rmtree(training.checkpoints)


@dataclass(frozen=True)
class Training:
    """One process's part of a training run: set up, train, write the results."""

    params: Params
    paths: Paths
    recipe: Recipe
    device: torch.device
    world: World
    fingerprint: str

    @property
    def checkpoints(self) -> Path:
        return self.paths.checkpoints / self.fingerprint

    @property
    def previews(self) -> Path:
        return self.checkpoints / "previews"

    @cached_property
    def pairs(self) -> Pairs:
        return Pairs(self.paths.pairs, "train")

    @cached_property
    def net(self) -> Network:
        """The network with its initial weights."""
        return self.recipe.net().to(self.device)

    @cached_property
    def counts(self) -> Counts:
        return count(self.net, self.pairs.shape)

    @property
    def augment(self) -> float:
        """The probability of each augmentation, which depends on the number of images if it is `auto`."""
        return self.recipe.options.augmentation(self.pairs.images)

    def run(self) -> tuple[Model, State]:
        """Train to the end; returns the model and the final state."""
        params, recipe, world, seed = self.params, self.recipe, self.world, self.params.seed
        stage, options, counts, augment = recipe.stage, recipe.options, self.counts, self.augment
        undivided = copy.deepcopy(self.net).eval() if world.size > 1 and options.sharding == "weights" else None
        shard_weights = partial(distributed.shard_weights, options=options, world=world)
        state = new_state(
            self.net,
            options,
            recipe.process.schedule,
            shard_weights,
            augmented=augment > 0,
            earlier=copy.deepcopy(self.net) if recipe.replaces_teacher else None,
        )
        checkpoints = Checkpoints(self.checkpoints, world, checkpoint_seconds(), stage)
        checkpoints.restore(state)
        wanted, quality = preview_quality(), None
        if world.main and wanted:
            quality = LiveQuality.prepare(wanted, self.pairs, self.paths.features, stage)
        model = Model(undivided or state.average, recipe.process, recipe.config)
        fetch = Batches(
            self.pairs,
            seed,
            options.batch_size,
            options.flip,
            options.class_dropout,
            augment,
            world.rank,
            world.size,
        )
        with StopSignals() as stop, prefetched(fetch, self.device) as batches, ExitStack() as watched:
            live = progress = None
            if world.main:
                say(
                    f"{stage}: {counts.parameters:,} parameters, {counts.flops / 1e9:.3g} GFLOP per image, on "
                    + (f"{world.size} x {self.device.type}" if world.size > 1 else f"{self.device}")
                    + f", {counted(self.pairs.images, 'image')}"
                    + (f", {counted(options.epochs, 'epoch')} ({options.steps} steps)" if options.epochs else "")
                    + (f", augmented with probability {augment:g}" if augment else ", not augmented")
                    + (f", resuming from step {state.step}" if state.step else f", starting from {recipe.start}")
                )
                live = watched.enter_context(tracking.live(params, self.paths, state.run_id, self.fingerprint))
                total, done = options.steps * options.batch_size, state.step * options.batch_size
                progress = Progress(stage, total, "images", done=done)
                state.run_id = live.run_id
            compiled = should_compile(options, self.device, lambda: counts.flops)
            if compiled and world.main:
                say(f"{stage}: compiling the network during the first steps")
            forward = runnable(state.net, options, world, compiled)
            dtype = precision(options, self.device)
            trainer = loop.Trainer(options, seed, recipe.loss, batches, forward, world, dtype, recipe.before_step)
            hooks = Hooks(
                trainer,
                model,
                partial(recipe.measure, state),
                self.device,
                recipe.drawing,
                self.previews,
                stop,
                progress,
                live,
                counts.flops,
                stage,
                recipe.error,
                quality,
            )
            with progress or nullcontext():
                loop.train(
                    state, trainer, checkpoints, report=hooks.report, preview=hooks.preview, stop_signal=stop.received
                )
            state.copy_final_into(model.net)
            if world.main:
                model = recipe.finish(model, stop.check)
        return model, state

    def write(self, model: Model, state: State) -> None:
        """Write the model, its curves and previews, and the report."""
        paths = self.paths
        with new_directory(paths.previews) as temporary:
            for row in state.heldout_curve:
                drawn = preview_path(self.previews, int(row["step"]))
                write_atomic(temporary / drawn.name, drawn.read_bytes())
            write_sums(temporary)
        with new_directory(paths.train_curves) as temporary:
            names = dict.fromkeys(name for row in state.loss_curve for name in row)
            columns = sorted(names, key=lambda name: name if name.startswith("loss_t") else "")  # bands of t last
            write_csv(temporary / "loss.csv", state.loss_curve, columns)
            write_csv(temporary / "heldout.csv", state.heldout_curve)
            write_sums(temporary)
        kept = curves.best(state.heldout_curve) if state.best else state.heldout_curve[-1]
        facts = {
            "steps": state.step,
            "images": state.step * self.recipe.options.batch_size,
            "augment": self.augment,
            "parameters": self.counts.parameters,
            "flops_per_image": self.counts.flops,
            "loss": state.loss_curve[-1]["loss"],
            "heldout_mse": kept["mse"],
            "kept_step": int(kept["step"]),
            "skipped_steps": state.skipped,
            "rollbacks": state.rollbacks,
        }
        write_json(paths.train_report, facts)
        save_model(paths.model, model.net, model.config)
        made_with.write(paths, "train", self.params)


def check_batch_size(stage: str, options: TrainOptions, world: World) -> None:
    """Raise UserError unless a batch can be divided evenly."""
    parts = world.size * options.accumulate
    if options.batch_size % parts:
        raise UserError(
            f"{stage}.batch_size: {options.batch_size} is not a multiple of {parts}, the number of processes times "
            f"{stage}.accumulate; change it in params.yaml"
        )


@contextmanager
def explain_out_of_memory(stage: str, options: TrainOptions) -> Iterator[None]:
    """Turn out-of-memory errors into a UserError with advice. Applies to each process separately."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        said = str(error).partition("\n")[0]
        known = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if not known and not re.search("can't allocate memory|ALLOC_FAILED", said):
            raise
        advice = ["" if options.recompute else f"set {stage}.recompute to true"]
        advice.append(f"set {stage}.precision to bf16" if options.precision == "fp32" else "")
        raise UserError(
            f"out of memory ({said}); lower {stage}.batch_size (now {options.batch_size}) or raise "
            f"{stage}.accumulate (now "
            f"{options.accumulate}), which splits each batch into smaller parts"
            + "".join(f", or {each}" for each in advice if each)
        ) from None


def checkpoint_seconds() -> float:
    """Seconds between checkpoints; raises UserError if DDPM_CHECKPOINT_SECONDS is invalid."""
    seconds: float = setting(CHECKPOINT_SECONDS, 60.0, Annotated[float, Field(ge=0)])
    return seconds


def preview_quality() -> int:
    """Number of samples to compare at every preview; raises UserError if DDPM_PREVIEW_QUALITY is invalid."""
    count: int = setting(PREVIEW_QUALITY, 0, Annotated[int, Field(ge=0, le=100_000), AfterValidator(none_or_enough)])
    return count


def check_devices(params: Params, recipe: Recipe, device: torch.device) -> None:
    """Raise UserError unless all processes run on the CPU or each has its own GPU."""
    processes, gpus = recipe.options.processes, torch.cuda.device_count()
    if device.type == "cuda" and processes > 1 and params.device not in ("auto", "cuda"):
        raise UserError(
            f"device: {params.device} is one GPU, but {recipe.stage}.processes is {processes}; set device to cuda"
        )
    if device.type == "cuda" and processes > gpus:
        raise UserError(
            f"{recipe.stage}.processes: {processes} processes need a GPU each (available: {gpus}); set it to {gpus}"
        )

"""train: training pairs to a model, with its curves and previews."""

import copy
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field

from diffusion.errors import AlreadyReported, UserError
from diffusion.evaluation.heldout import x_0_mse
from diffusion.model import Config, Model, new_network, save_model
from diffusion.nn import build as networks
from diffusion.nn.counting import Counts, count
from diffusion.nn.layers import Network
from diffusion.pairs.noise import Purpose, stream
from diffusion.pairs.pairs import Batches, Pairs
from diffusion.process import build as processes
from diffusion.process.build import Process
from diffusion.progress import Progress, say
from diffusion.storage.files import new_directory, write_atomic, write_csv, write_json, write_sums
from diffusion.training import curves, distributed, loop
from diffusion.training.checkpoints import Checkpoints
from diffusion.training.distributed import World
from diffusion.training.hardware import precision, prefetched, runnable, should_compile
from diffusion.training.hooks import Hooks, preview_options, preview_path
from diffusion.training.options import TrainOptions
from diffusion.training.state import State, new_state
from diffusion.training.stop import StopSignals
from flows import launching, made_with, tracking
from flows.environment import setting
from flows.fingerprint import taken, training_facts, training_fingerprint
from flows.params import Params
from flows.parent import launched
from flows.paths import Paths

SECONDS = "DDPM_CHECKPOINT_SECONDS"
"""It shapes no result, and so is no parameter."""


def run(params: Params, paths: Paths) -> None:
    """Train as `params` say; an interrupted training with the same parameters, data and code goes on where it was.

    With several processes this one only starts them, and each runs this again.
    """
    device = networks.device(params.device, torch.distributed.get_node_local_rank(0))
    pairs = Pairs(paths.pairs, "train")
    process = processes.process(params.process)
    pairs.check_process(process.schedule.alpha_bar.numpy())
    if params.network.classes and not pairs.manifest.classes:
        raise UserError("network.classes: the images have no classes; set it to false in params.yaml")
    if device.type not in ("cpu", "cuda") and (params.train.processes > 1 or distributed.is_worker()):
        raise UserError(f"device: several processes cannot train on {device}; set device to cpu, or start one process")
    if params.train.processes > 1 and not distributed.is_worker():
        check_devices(params, device)
        launching.divide_threads(params.train.processes)
        several = World(size=params.train.processes)
        facts = training_facts(params, paths, device, several)
        with taken(paths.checkpoints, facts):
            launching.launch(several.size, paths.checkpoints / training_fingerprint(facts))
        return
    store = os.environ.get(launching.STORE)
    lost = AlreadyReported if launched() else UserError  # of several that were launched, one speaks for all
    file = Path(store) if store else None
    with enough_memory(params.train), distributed.process_group(device, file, lost) as world, ExitStack() as held:
        check_shares(params.train, world)
        facts = training_facts(params, paths, device, world)
        if world.main and not launched():
            held.enter_context(taken(paths.checkpoints, facts))
        training = Training(params, paths, device, world, pairs, process, training_fingerprint(facts))
        model, state = training.run()
        if world.main:
            training.write(model, state)
            tracking.record(params, paths, state.run_id)
            shutil.rmtree(training.checkpoints)


@dataclass(frozen=True)
class Training:
    """A training that is assembled, run and written, in one of the processes that share it."""

    params: Params
    paths: Paths
    device: torch.device
    world: World
    pairs: Pairs
    process: Process
    fingerprint: str

    @property
    def checkpoints(self) -> Path:
        return self.paths.checkpoints / self.fingerprint

    @property
    def previews(self) -> Path:
        return self.checkpoints / "previews"

    @cached_property
    def net(self) -> Network:
        """The network at its beginning."""
        torch.manual_seed(int(stream(self.params.seed, Purpose.INIT).integers(2**63)))
        classes = len(self.pairs.manifest.classes)
        return new_network(self.pairs.shape, classes, self.params.network, self.params.process).to(self.device)

    @cached_property
    def config(self) -> Config:
        params, classes = self.params, self.pairs.manifest.classes
        return Config(
            shape=self.pairs.shape, classes=classes, network=params.network, process=params.process, x_0_mse=None
        )

    @cached_property
    def counts(self) -> Counts:
        return count(self.net, self.pairs.shape)

    def run(self) -> tuple[Model, State]:
        """Train to the end; gives the model, and the state in which the training ended."""
        params, options, world, seed = self.params, self.params.train, self.world, self.params.seed
        counts = self.counts
        undivided = copy.deepcopy(self.net).eval() if world.size > 1 and options.sharding == "weights" else None
        shard_weights = partial(distributed.shard_weights, options=options, world=world)
        state = new_state(self.net, options, self.process.schedule, shard_weights)
        checkpoints = Checkpoints(self.checkpoints, world, checkpoint_seconds())
        checkpoints.restore(state)
        model, heldout = Model(undivided or state.average, self.process, self.config), Pairs(self.paths.pairs, "val")
        fetch = Batches(
            self.pairs, seed, options.batch_size, options.flip, options.class_dropout, world.rank, world.size
        )
        with StopSignals() as stop, prefetched(fetch, self.device) as batches, ExitStack() as watched:
            live = progress = None
            if world.main:
                say(
                    f"train: {counts.parameters:,} parameters, {counts.flops / 1e9:.3g} GFLOP per image, on "
                    + (f"{world.size} x {self.device.type}" if world.size > 1 else f"{self.device}")
                    + f", {self.pairs.images} images"
                    + (f", going on from step {state.step}" if state.step else "")
                )
                live = watched.enter_context(tracking.live(params, self.paths, state.run_id, self.fingerprint))
                total, done = options.steps * options.batch_size, state.step * options.batch_size
                progress = watched.enter_context(Progress("train", total, "images", done=done))
                state.run_id = live.run_id
            forward = runnable(state.net, options, world, should_compile(options, self.device, lambda: counts.flops))
            dtype = precision(options, self.device)
            trainer = loop.Trainer(options, seed, self.process.loss, batches, forward, world, dtype)
            drawing = preview_options(params.process)
            watch = Hooks(trainer, model, heldout, self.device, drawing, self.previews, stop, progress, live)
            loop.train(
                state, trainer, checkpoints, report=watch.report, preview=watch.preview, stop_signal=stop.received
            )
            state.copy_final_into(model.net)
            if world.main:
                errors = x_0_mse(model, heldout, self.device, seed, stop.check)
                model = replace(model, config=self.config.model_copy(update={"x_0_mse": errors}))
        return model, state

    def write(self, model: Model, state: State) -> None:
        """Write the model, its curves and previews, and all that is told of the training."""
        paths = self.paths
        with new_directory(paths.previews) as temporary:
            for row in state.heldout_curve:
                drawn = preview_path(self.previews, int(row["step"]))
                write_atomic(temporary / drawn.name, drawn.read_bytes())
            write_sums(temporary)
        with new_directory(paths.train_curves) as temporary:
            names = dict.fromkeys(name for row in state.loss_curve for name in row)
            columns = sorted(names, key=lambda name: name if name.startswith("loss_t") else "")  # bands last
            write_csv(temporary / "loss.csv", state.loss_curve, columns)
            write_csv(temporary / "heldout.csv", state.heldout_curve)
            write_sums(temporary)
        kept = curves.best(state.heldout_curve) if state.best else state.heldout_curve[-1]
        facts = {
            "steps": state.step,
            "images": state.step * self.params.train.batch_size,
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


def check_shares(options: TrainOptions, world: World) -> None:
    """Raise UserError unless a batch can be shared out."""
    parts = world.size * options.accumulate
    if options.batch_size % parts:
        raise UserError(
            f"train.batch_size: {options.batch_size} is not a multiple of {parts}, the processes times "
            "train.accumulate; change it in params.yaml"
        )


@contextmanager
def enough_memory(options: TrainOptions) -> Iterator[None]:
    """A block that raises UserError, with what to change, where memory is too small. Each process does so by itself."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        said = str(error).partition("\n")[0]
        known = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if not known and not re.search("can't allocate memory|ALLOC_FAILED", said):
            raise
        advice = ["" if options.recompute else "set train.recompute to true"]
        advice.append("set train.precision to bf16" if options.precision == "fp32" else "")
        raise UserError(
            f"out of memory ({said}); lower train.batch_size (now {options.batch_size}) or raise train.accumulate (now "
            f"{options.accumulate}), the parts of a batch that go through in turn"
            + "".join(f", or {each}" for each in advice if each)
        ) from None


def checkpoint_seconds() -> float:
    """How often a checkpoint is written; raises UserError if the environment says it wrongly."""
    seconds: float = setting(SECONDS, 60.0, Annotated[float, Field(ge=0)])
    return seconds


def check_devices(params: Params, device: torch.device) -> None:
    """Raise UserError unless every process can have a GPU of its own, or none."""
    processes, gpus = params.train.processes, torch.cuda.device_count()
    if device.type == "cuda" and params.device not in ("auto", "cuda"):
        raise UserError(f"device: {params.device} is one GPU, but train.processes is {processes}; set device to cuda")
    if device.type == "cuda" and processes > gpus:
        raise UserError(
            f"train.processes: {processes} processes need a GPU each, but there are {gpus}; set it to {gpus}"
        )

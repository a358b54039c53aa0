"""train: training pairs to a model, with its curves and previews."""

import copy
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import filelock
import numpy as np
import torch
from pydantic import Field

from diffusion.data.noise import Purpose, stream
from diffusion.data.pairs import Pairs, train_batch
from diffusion.errors import Echo, UserError
from diffusion.evaluation.heldout import x_0_mse
from diffusion.files import new_directory, sha256, write_atomic, write_csv, write_json, write_sums, writing
from diffusion.model import Config, Model, new_network, save_model
from diffusion.nn import build as networks
from diffusion.nn.counting import Counts, count
from diffusion.process import build as processes
from diffusion.process.build import Process
from diffusion.progress import Progress, say
from diffusion.training import distributed, loop
from diffusion.training.checkpoints import Checkpoints, newest_step
from diffusion.training.distributed import World
from diffusion.training.hardware import Ahead, precision, runnable
from diffusion.training.state import State, begin
from diffusion.training.stop import StopSignals
from diffusion.training.watching import Watch, picture, preview_options
from flows import dvc_yaml, launching, made_with, tracking
from flows.environment import setting
from flows.params import Params
from flows.paths import Paths
from flows.watch import launched

SECONDS = "DDPM_CHECKPOINT_SECONDS"
"""It shapes no result, and so is no parameter."""
KEPT_TRAININGS = 5
"""Interrupted trainings whose checkpoints are kept."""
FACTS = "fingerprint.json"
"""What a fingerprint was made of, beside the checkpoints."""
SETUP = {
    "device": "device: {}",
    "processes": "train.processes: {}",
    "threads": "OMP_NUM_THREADS={}",
    "instructions": "the instructions {}",
    "torch": "torch=={}",
    "numpy": "numpy=={}",
}
"""The facts of a fingerprint that change only the rounding of a result, and how each is chosen."""


def run(params: Params, paths: Paths) -> None:
    """Train as `params` say; an interrupted training with the same parameters, data and code goes on where it was.

    With several processes this one only starts them, and each runs this again.
    """
    device = networks.device(params.device, distributed.local_rank())
    pairs = Pairs(paths.pairs, "train")
    process = processes.process(params.process)
    pairs.check_process(process.schedule.alpha_bar.numpy())
    if params.network.classes and not pairs.manifest.classes:
        raise UserError("network.classes: the images have no classes; set it to false in params.yaml")
    if params.train.processes > 1 and not distributed.is_worker():
        check_devices(params, device)
        launching.divide_threads(params.train.processes)
        several = World(size=params.train.processes)
        with taken(paths.checkpoints, training_facts(params, paths, device, several)):
            launching.launch(several.size)
        return
    store = os.environ.get(launching.STORE)
    lost = Echo if launched() else UserError  # of several that were launched, one speaks for all
    with distributed.joined(device, Path(store) if store else None, lost) as world, ExitStack() as held:
        parts = world.size * params.train.accumulate
        if params.train.batch_size % parts:
            raise UserError(
                f"train.batch_size: {params.train.batch_size} is not a multiple of {parts}, the processes times "
                "train.accumulate; change it in params.yaml"
            )
        facts = training_facts(params, paths, device, world)
        fingerprint = training_fingerprint(facts)
        directory = paths.checkpoints / fingerprint
        if world.main and not launched():
            held.enter_context(taken(paths.checkpoints, facts))
        state = _train(params, paths, process, device, pairs, directory, fingerprint, world)
        if world.main:
            tracking.record(params, paths, state.run_id)
            shutil.rmtree(directory)


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


def _train(
    params: Params,
    paths: Paths,
    process: Process,
    device: torch.device,
    pairs: Pairs,
    directory: Path,
    fingerprint: str,
    world: World,
) -> State:
    options, classes = params.train, pairs.manifest.classes
    torch.manual_seed(int(stream(params.seed, Purpose.INIT).integers(2**63)))
    net = new_network(pairs.shape, len(classes), params.network, params.process).to(device)
    counts = count(net, pairs.shape)
    undivided = copy.deepcopy(net).eval() if world.size > 1 and options.sharding == "weights" else None
    state = begin(net, options, process.schedule, partial(distributed.share_out, options=options, world=world))
    checkpoints = Checkpoints(directory, world, checkpoint_seconds())
    checkpoints.restore(state)
    config = Config(shape=pairs.shape, classes=classes, network=params.network, process=params.process, x_0_mse=None)
    model, heldout = Model(undivided or state.average, process, config), Pairs(paths.pairs, "val")
    fetch = partial(
        train_batch,
        pairs,
        params.seed,
        batch_size=options.batch_size,
        flip=options.flip,
        class_dropout=options.class_dropout,
        rank=world.rank,
        world=world.size,
    )
    previews = directory / "previews"
    with StopSignals() as stop, Ahead(fetch) as batches, ExitStack() as watched:
        live = progress = None
        if world.main:
            say(
                f"train: {counts.parameters:,} parameters, {counts.flops / 1e9:.3g} GFLOP per image, on "
                + (f"{world.size} x {device.type}" if world.size > 1 else f"{device}")
                + f", {pairs.images} images"
                + (f", going on from step {state.step}" if state.step else "")
            )
            live = watched.enter_context(tracking.live(params, paths, state.run_id, fingerprint))
            total, done = options.steps * options.batch_size, state.step * options.batch_size
            progress = watched.enter_context(Progress("train", total, "images", done=done))
            state.run_id = live.run_id
        forward = runnable(state.net, options, world)
        trainer = loop.Trainer(options, params.seed, process.loss, batches, forward, world, precision(options, device))
        drawing = preview_options(params.process)
        watch = Watch(trainer, model, heldout, device, drawing, previews, stop, progress, live)
        loop.train(state, trainer, checkpoints, report=watch.report, preview=watch.preview, stop_signal=stop.received)
        state.kept_into(model.net)
        if world.main:
            errors = x_0_mse(model, heldout, device, params.seed, stop.check)
    if world.main:
        _write(paths, state, options.batch_size, counts, previews)
        save_model(paths.model, model.net, config.model_copy(update={"x_0_mse": errors}))
        made_with.write(paths, "train", params)
    return state


def _write(paths: Paths, state: State, batch_size: int, counts: Counts, previews: Path) -> None:
    """Write all that is told of a training."""
    names = dict.fromkeys(name for row in state.loss_curve for name in row)
    columns = sorted(names, key=lambda name: name if name.startswith("loss_t") else "")  # bands last, by timestep
    with new_directory(paths.previews) as temporary:
        for row in state.heldout_curve:
            drawn = picture(previews, int(row["step"]))
            write_atomic(temporary / drawn.name, drawn.read_bytes())
        write_sums(temporary)
    with new_directory(paths.train_curves) as temporary:
        write_csv(temporary / "loss.csv", state.loss_curve, columns)
        write_csv(temporary / "heldout.csv", state.heldout_curve)
        write_sums(temporary)
    kept = loop.best(state.heldout_curve) if state.best else state.heldout_curve[-1]
    write_json(
        paths.train_report,
        {
            "steps": state.step,
            "images": state.step * batch_size,
            "parameters": counts.parameters,
            "flops_per_image": counts.flops,
            "loss": state.loss_curve[-1]["loss"],
            "heldout_mse": kept["mse"],
            "kept_step": int(kept["step"]),
            "skipped_steps": state.skipped,
            "rollbacks": state.rollbacks,
        },
    )


def training_facts(params: Params, paths: Paths, device: torch.device, world: World) -> dict[str, Any]:
    """Everything that shapes the result: parameters, data, code, and what computes it.

    The number of threads and the processor's vector instructions are part of it: sums are split among threads and
    lanes, so the weights differ in their last bits after a few steps.
    """
    shaping = params.model_dump(mode="json", include={"seed", "process", "network", "train"})
    del shaping["train"]["processes"]  # world.size, which torchrun may set instead
    return {
        "params": shaping,
        "pairs": sha256(paths.pairs / "manifest.json"),
        "code": {str(file.relative_to(dvc_yaml.ROOT)): sha256(file) for file in dvc_yaml.code("train")},
        "device": device.type,
        "processes": world.size,
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "instructions": instructions() if device.type == "cpu" else None,
        "torch": torch.__version__,
        "numpy": np.__version__,
    }


def instructions() -> str:
    """The vector instructions that torch uses, with the limits that the environment sets to those of its libraries."""
    limits = [f"{name}={os.environ[name]}" for name in ("ONEDNN_MAX_CPU_ISA", "MKL_CBWR") if name in os.environ]
    return " ".join([torch.backends.cpu.get_cpu_capability(), *limits])


def training_fingerprint(facts: dict[str, Any]) -> str:
    """The name of a training: the digest of its facts."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


@contextmanager
def taken(checkpoints: Path, facts: dict[str, Any]) -> Iterator[None]:
    """A block in which this process alone writes the checkpoints of the training with these facts."""
    directory = checkpoints / training_fingerprint(facts)
    with writing(directory):
        checkpoints.mkdir(parents=True, exist_ok=True)
        lock = lock_of(directory)
        try:
            held = lock.acquire(timeout=0)
        except filelock.Timeout:
            say("train: the same training is under way in another process; waiting for it to end")
            held = lock.acquire()
    with held:
        if not newest_step(directory):
            for line in unusable(checkpoints, facts):
                say(f"train: {line}")
        write_json(directory / FACTS, facts)
        drop_old_trainings(checkpoints)
        yield


def unusable(checkpoints: Path, facts: dict[str, Any]) -> list[str]:
    """A line for each interrupted training that differs from this one in its setup alone."""
    lines = []
    for path in sorted(checkpoints.glob(f"*/{FACTS}")):
        try:
            other = json.loads(path.read_bytes())
        except (OSError, ValueError):  # deleted or written at this moment
            continue
        step = newest_step(path.parent)
        if step and {**facts, **dict.fromkeys(SETUP)} == {**other, **dict.fromkeys(SETUP)}:
            # On a GPU the number of threads and the instructions are null: they do not matter there.
            differ = [name for name in SETUP if None not in (facts[name], other[name]) and facts[name] != other[name]]
            made = ", ".join(SETUP[name].format(other[name]) for name in differ)
            now = ", ".join(str(facts[name]) for name in differ)
            lines.append(
                f"the checkpoint of step {step} of this training is not used: it was made with {made} (now {now}), and "
                f"the result would not be the same to the bit; train with {made} to continue from it"
            )
    return lines


def lock_of(directory: Path) -> filelock.FileLock:
    """Held by the training that has its checkpoints in `directory`."""
    return filelock.FileLock(directory.with_suffix(".lock"))


def drop_old_trainings(checkpoints: Path) -> None:
    """Delete the checkpoints of all but the last few interrupted trainings, never those of one that runs now."""
    with suppress(FileNotFoundError):  # another training does the same at this moment
        trainings = sorted((path for path in checkpoints.iterdir() if path.is_dir()), key=os.path.getmtime)
        for directory in trainings[:-KEPT_TRAININGS]:
            with suppress(filelock.Timeout), lock_of(directory).acquire(timeout=0):
                shutil.rmtree(directory)

"""train: training pairs to a model, with its curves and previews."""

import hashlib
import json
import os
import shutil
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import filelock
import numpy as np
import torch

import diffusion
from diffusion import tracking
from diffusion.data.noise import Purpose, stream
from diffusion.data.pairs import Pairs, train_batch
from diffusion.errors import UserError
from diffusion.evaluation.heldout import quick_mse, x_0_mse
from diffusion.evaluation.samples import draw_samples, grid_png
from diffusion.files import new_directory, sha256, write_atomic, write_csv, write_json
from diffusion.model import Config, Model, new_network, save_model
from diffusion.nn import build as networks
from diffusion.nn.counting import count
from diffusion.params import Params, Sample
from diffusion.params import Process as ProcessOptions
from diffusion.paths import Paths
from diffusion.process import build as processes
from diffusion.process.build import Process
from diffusion.progress import Progress, say
from diffusion.training import loop
from diffusion.training.state import Checkpoints, Row, State, begin
from diffusion.training.stop import StopSignals

CODE = [
    "files.py",
    "data/noise.py",
    "data/pairs.py",
    "data/tar.py",
    "evaluation/heldout.py",
    "evaluation/samples.py",
    "model.py",
    "nn",
    "process",
    "training",
    "stages/train.py",
]
"""What can shape the outputs, as in dvc.yaml."""
KEPT_TRAININGS = 5
"""Interrupted trainings whose checkpoints are kept."""


def run(params: Params, paths: Paths) -> None:
    """Train as `params` say; an interrupted training with the same parameters, data and code goes on where it was."""
    device = networks.device(params.device)
    pairs, heldout = Pairs(paths.pairs, "train"), Pairs(paths.pairs, "val")
    process = processes.process(params.process)
    pairs.check_process(process.schedule.alpha_bar.numpy())
    fingerprint = training_fingerprint(params, paths, device)
    directory = paths.checkpoints / fingerprint
    paths.checkpoints.mkdir(parents=True, exist_ok=True)
    lock = lock_of(directory)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        say("train: the same training is under way in another process; waiting for it to end")
        lock.acquire()
    try:
        directory.mkdir(exist_ok=True)
        drop_old_trainings(paths.checkpoints)
        state = _train(params, paths, process, device, pairs, heldout, directory, fingerprint)
        tracking.record(params, paths, state.run_id)
        shutil.rmtree(directory)
    finally:
        lock.release()


def preview_options(process: ProcessOptions) -> Sample:
    """How previews are drawn: not by the section `sample`, so that asking for other samples trains nothing anew."""
    return Sample(
        sampler="ddpm",
        steps=min(250, process.num_timesteps),
        spacing="linspace",
        variance="learned" if process.learned_variance else "fixed-small",
        eta=0.0,
        threshold="clip",
        guidance=1.0,
        count=36,
    )


def _train(
    params: Params,
    paths: Paths,
    process: Process,
    device: torch.device,
    pairs: Pairs,
    heldout: Pairs,
    directory: Path,
    fingerprint: str,
) -> State:
    torch.manual_seed(int(stream(params.seed, Purpose.INIT).integers(2**63)))
    classes = pairs.manifest.classes
    if params.network.classes and not classes:
        raise UserError("network.classes: the images have no classes; set it to false in params.yaml")
    net = new_network(pairs.shape, len(classes), params.network, params.process).to(device)
    config = Config(shape=pairs.shape, classes=classes, network=params.network, process=params.process, x_0_mse=None)
    state = begin(net, params.train, process.schedule)
    checkpoints = Checkpoints(directory)
    for line in checkpoints.restore(state):
        say(f"train: {line}")
    model, counts = Model(state.average, process, config), count(net, pairs.shape)
    say(
        f"train: {counts.parameters:,} parameters, {counts.flops / 1e9:.3g} GFLOP per image, on {device}, "
        f"{pairs.images} images" + (f", going on from step {state.step}" if state.step else "")
    )
    drawing = preview_options(params.process)
    options, batch_size = params.train, params.train.batch_size
    previews = directory / "previews"
    clock = Clock(state.step)

    with (
        StopSignals() as stop,
        tracking.live(params, paths, state.run_id, fingerprint) as live,
        Progress("train", options.steps * batch_size, "images", done=state.step * batch_size) as progress,
    ):
        state.run_id = live.run_id

        def report(state: State) -> None:
            note = f"loss {state.loss_curve[-1]['loss']:.4f}" if state.loss_curve else ""
            progress.advance(batch_size, note)
            if state.step - state.last_point >= options.log_every or state.step == options.steps:
                row = loop.add_point(state, options)
                rate = clock.rate(state.step) * batch_size
                live.metrics({**without_step(row), "images_per_second": rate}, state.step)

        def preview(state: State) -> None:
            mse = quick_mse(model, heldout, device, stop.check)
            loop.check_finite(state, options, mse)
            images = draw_samples(model, drawing, params.seed, device, stop.check)
            picture = previews / f"step-{state.step:08d}.png"
            write_atomic(picture, grid_png(images))
            state.heldout_curve.append({"step": state.step, "mse": mse})
            progress.write(f"train: step {state.step}: held-out MSE {mse:.4f}")
            live.metrics({"heldout_mse": mse}, state.step)
            live.image(picture, state.step)
            clock.restart(state.step)

        loop.train(
            state,
            options,
            params.seed,
            process.loss,
            partial(
                train_batch,
                pairs,
                params.seed,
                batch_size=batch_size,
                flip=options.flip,
                class_dropout=options.class_dropout,
            ),
            report=report,
            preview=preview,
            checkpoint=checkpoints.write,
            check_stop=stop.check,
        )
        errors = x_0_mse(model, heldout, device, params.seed, stop.check)

    with new_directory(paths.previews) as temporary:
        for row in state.heldout_curve:
            name = f"step-{int(row['step']):08d}.png"
            shutil.copyfile(previews / name, temporary / name)
    with new_directory(paths.train_curves) as temporary:
        write_csv(temporary / "loss.csv", state.loss_curve)
        write_csv(temporary / "heldout.csv", state.heldout_curve)
    write_json(
        paths.train_report,
        {
            "steps": state.step,
            "images": state.step * batch_size,
            "parameters": counts.parameters,
            "flops_per_image": counts.flops,
            "loss": state.loss_curve[-1]["loss"],
            "heldout_mse": state.heldout_curve[-1]["mse"],
        },
    )
    save_model(paths.model, state.average, config.model_copy(update={"x_0_mse": errors}))
    return state


class Clock:
    """Steps per second since the last look, previews left out."""

    def __init__(self, step: int) -> None:
        self.restart(step)

    def restart(self, step: int) -> None:
        self._step, self._time = step, time.monotonic()

    def rate(self, step: int) -> float:
        rate = (step - self._step) / max(time.monotonic() - self._time, 1e-9)
        self.restart(step)
        return rate


def training_fingerprint(params: Params, paths: Paths, device: torch.device) -> str:
    """A name for all that shapes the result: parameters, data, code, and the libraries that compute it."""
    shaping = params.model_dump(mode="json", include={"seed", "process", "network", "train"})
    root = Path(diffusion.__file__).parent
    sources = sorted(file for part in CODE for file in [root / part, *(root / part).rglob("*.py")] if file.is_file())
    facts = {
        "params": shaping,
        "pairs": sha256(paths.pairs / "manifest.json"),
        "code": {str(file.relative_to(root)): sha256(file) for file in sources},
        "device": device.type,
        "torch": torch.__version__,
        "numpy": np.__version__,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


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


def without_step(row: Row) -> Row:
    return {name: value for name, value in row.items() if name != "step"}

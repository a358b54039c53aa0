"""Hooks of the training loop: loss curve, held-out error, previews and throughput."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch

from diffusion.errors import Stopped
from diffusion.evaluation.heldout import Estimate
from diffusion.evaluation.live import LiveQuality, Measured
from diffusion.model import Model
from diffusion.process.build import ProcessOptions
from diffusion.progress import Progress, say
from diffusion.samples import draw_samples, grid_png
from diffusion.sampling.build import SampleOptions
from diffusion.signals import StopSignals
from diffusion.storage.files import write_atomic
from diffusion.training.loop import Trainer
from diffusion.training.state import State

CheckStop = Callable[[], None]
"""Called often, to raise Stopped if a signal has come."""


class TrainingLogger(Protocol):
    """Receives metrics and previews during training, such as an experiment tracker."""

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        """Log a value of each metric."""

    def image(self, path: Path, step: int) -> None:
        """Log the sample grid of a step."""


def preview_path(directory: Path, step: int) -> Path:
    """Path of the sample grid of a step."""
    return directory / f"step-{step:08d}.png"


def preview_options(process: ProcessOptions) -> SampleOptions:
    """Sampling options of previews; independent of the section `sample`, so that changing it does not retrain.

    Deterministic, so that the same noise shows the progress of the training, and with few steps: previews should take
    a small part of its time.
    """
    return SampleOptions(
        sampler="dpm-solver++",
        steps=min(20, process.num_timesteps),
        spacing="quadratic",
        variance="learned" if process.learned_variance else "fixed-small",
        threshold="clip",
        guidance=1.0,
        count=36,
    )


@dataclass
class Hooks:
    """Hooks of the training loop: collective calls, in which the main process evaluates, samples and reports."""

    trainer: Trainer
    model: Model
    """Receives the unsharded EMA weights."""
    measure: Callable[[Model, CheckStop], Estimate]
    """Measures the held-out error of the EMA weights."""
    device: torch.device
    sample_options: SampleOptions
    previews: Path
    stop: StopSignals
    progress: Progress | None
    """None in all but the main process, like `logger`."""
    logger: TrainingLogger | None
    flops: int
    """Of a forward pass, per image; a training step takes three times as many."""
    stage: str = "train"
    error: str = "held-out MSE"
    """What `measure` measures."""
    quality: LiveQuality | None = None
    """Compares samples with training images at every preview; it changes no output. None if that is turned off."""
    timed_steps: int = field(default=0, init=False)
    """Steps since `timed_from`, for a throughput that excludes previews."""
    timed_from: float = field(default_factory=time.monotonic, init=False)

    def report(self, state: State) -> None:
        """Update the progress after a step, and add a point to the loss curve every `log_every` steps."""
        options = self.trainer.options
        self.timed_steps += 1
        if self.progress:
            epoch = math.ceil(state.step * options.epochs / options.steps)
            notes = [f"epoch {epoch} of {options.epochs}"] if options.epochs else []
            notes += [f"loss {state.loss_curve[-1]['loss']:.4f}"] if state.loss_curve else []
            # The count is negative after a rollback.
            self.progress.advance(state.step * options.batch_size - self.progress.done, ", ".join(notes))
        if state.step - state.last_point >= options.log_every or state.step == options.steps:
            row = self.trainer.add_point(state)
            if self.logger and row:
                point = {name: value for name, value in row.items() if name != "step"}
                rate = self.timed_steps * options.batch_size / max(time.monotonic() - self.timed_from, 1e-9)
                rates = {"images_per_second": rate, "tflop_per_second": 3e-12 * self.flops * rate}
                self.logger.metrics(point | rates, state.step)
                self._restart_clock()

    def preview(self, state: State) -> None:
        """Measure the held-out error and draw samples."""
        state.copy_average_into(self.model.net)
        mse, se, signum, quality = math.nan, math.nan, 0.0, None
        if self.trainer.world.main:
            try:
                (mse, se), quality = self._measure(state)
            except Stopped as stopped:
                signum = stopped.signum
        mse, signum = self.trainer.world.broadcast([mse, signum])
        if signum:
            raise Stopped(int(signum))
        state.heldout_curve.append({"step": state.step, "mse": mse})
        if self.logger:
            line = f"{self.stage}: step {state.step}: {self.error} {mse:.4f} ± {se:.4f}"
            metrics = {"heldout_mse": mse, "heldout_mse_se": se, "skipped_steps": state.skipped}
            if quality:
                line += f", KID {quality.kid:.4f} ± {quality.kid_se:.4f}"
                line += f", Fréchet distance {quality.frechet_distance:.3f} ± {quality.frechet_distance_se:.3f}"
                metrics |= {f"quality_{name}": value for name, value in quality._asdict().items()}
            say(line)
            self.logger.metrics(metrics, state.step)
            if math.isfinite(mse):
                self.logger.image(preview_path(self.previews, state.step), state.step)
        self._restart_clock()

    def _restart_clock(self) -> None:
        self.timed_steps, self.timed_from = 0, time.monotonic()

    def _measure(self, state: State) -> tuple[Estimate, Measured | None]:
        def check_stop() -> None:
            self.stop.check()
            if self.progress:
                self.progress.advance(0, "measuring the held-out error and drawing a preview")

        found = self.measure(self.model, check_stop)
        if not math.isfinite(found.mse):
            return found, None  # samples of a diverged network are meaningless
        images = draw_samples(self.model, self.sample_options, self.trainer.seed, self.device, check_stop)
        write_atomic(preview_path(self.previews, state.step), grid_png(images))
        if self.quality is None:
            return found, None
        return found, self.quality(self.model, self.sample_options, self.trainer.seed, self.device, check_stop)

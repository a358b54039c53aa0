"""`ddpm export-diffusers` and `ddpm import-diffusers`."""

import shutil
from pathlib import Path

from diffusion.distillation.sampling import student_sampling
from diffusion.exchange import diffusers
from flows.cards import card
from flows.params import load
from flows.paths import Paths

USAGE = """
from diffusers import {pipeline}

pipeline = {pipeline}.from_pretrained(".")  # the folder of this file
images = pipeline(16).images
"""
"""For the model card."""


def export_model(directory: Path, /, *, model: Path | None = None, student: bool = False, force: bool = False) -> None:
    """Write the trained model as a diffusers pipeline, with a model card.

    Args:
        directory: Folder for DDPMPipeline.from_pretrained to load.
        model: A trained model; by default models/ddpm, or models/student with --student.
        student: Write the distilled model, with its sampler.
        force: Replace an existing pipeline.
    """
    paths = Paths(student=student)
    params = load(paths.params)
    sample = student_sampling(params.sample, params.distill.sampling_steps) if student else params.sample
    source = model or paths.model

    def written(pipeline: str, files: dict[str, str]) -> str:
        return card.render(paths, source, card.Form("diffusers", files, USAGE.format(pipeline=pipeline)))

    how = diffusers.export_model(source, directory, sample, force, written)
    print(f"wrote {directory}; load it with diffusers.{how}")


def import_model(directory: Path, /, *, out: Path | None = None, force: bool = False) -> None:
    """Make a diffusers model the trained model.

    Args:
        directory: A DDPMPipeline or a UNet2DModel.
        out: Folder to write; by default models/ddpm, as if the model had been trained here.
        force: Replace an existing model.
    """
    paths = Paths()
    target = out or paths.model
    how = diffusers.import_model(directory, target, force)
    if out is None:  # what the training of the previous model reported
        paths.train_report.unlink(missing_ok=True)
        for former in (paths.train_curves, paths.previews):
            shutil.rmtree(former, ignore_errors=True)
    print(f"{target} now holds the model of {directory}; {how}")

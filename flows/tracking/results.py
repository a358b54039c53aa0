"""The set of results in a working tree, or in a run's workspace."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from diffusion.errors import UserError
from diffusion.storage.files import check_sums, parse_csv, read_checked, sha256
from diffusion.training.options import TrainOptions
from flows import dvc_yaml, made_with
from flows.gate import Rule, for_students
from flows.pages import contents
from flows.params import Params
from flows.paths import Paths

BY_IMAGE = {"val_mse": ("val_errors.csv", "mse"), "bits_per_dim": ("bits_per_dim.csv", "bits_per_dim")}
"""File in reports/evaluation, and its column, of each figure that has a value for each held-out image."""


class Evaluation(NamedTuple):
    """The results of evaluate."""

    report: dict[str, Any]
    """reports/evaluate.json, with the digests of the pairs that were scored."""
    bands: list[dict[str, float]]
    """The rows of bands.csv; students have none."""
    by_image: dict[str, NDArray[np.float64]]
    """The figures in BY_IMAGE: a value for each image, (n,)."""


class Results(NamedTuple):
    """Parameters and the results made with exactly these; evaluation and export are None until they have run."""

    params: Params
    paths: Paths
    weights: str
    """SHA-256 of the trained weights."""
    pairs: str
    """SHA-256 of the manifest of data/pairs."""
    training: dict[str, Any]
    """reports/train.json."""
    curves: dict[str, list[dict[str, float]]]
    """The rows of reports/train_curves: loss, heldout."""
    evaluation: Evaluation | None
    export: dict[str, Any] | None
    """reports/export.json."""
    stale: tuple[str, ...]
    """Which existing files were left out, and why."""

    @property
    def parameters(self) -> dict[str, Any]:
        """The parameters by dotted name; those of the distillation only describe students."""
        found = made_with.flat(self.params)
        return {name: value for name, value in found.items() if self.paths.student or not name.startswith("distill.")}

    @property
    def model_name(self) -> str:
        """Name of the registered model."""
        return registered_name(self.params, self.paths)

    @property
    def gate(self) -> tuple[Rule, ...]:
        """The rules that a version must meet to become champion."""
        rules: tuple[Rule, ...] = self.params.tracking.gate
        return for_students(rules) if self.paths.student else rules

    @property
    def options(self) -> TrainOptions:
        """How the weights were trained."""
        return self.params.distill if self.paths.student else self.params.train

    @property
    def identity(self) -> str:
        """Digest of parameters, data and weights."""
        facts = {"params": self.parameters, "pairs": self.pairs, "weights": self.weights}
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def digests(self) -> dict[str, str]:
        """Digest of the files of each part that exists: evaluate, export."""
        found = {}
        if self.evaluation is not None:
            found["evaluate"] = _digest([self.paths.evaluate_report, self.paths.report])
        if self.export is not None:
            # Some changes to the sampler do not show in the report, nor those to its variants in the sampler. The model
            # card may change its words later.
            graphs = sorted(file for file in self.paths.onnx.iterdir() if file != self.paths.card)
            found["export"] = _digest([self.paths.export_report, *graphs])
        return found


def registered_name(params: Params, paths: Paths) -> str:
    """Name of the registered model: students have one of their own."""
    return f"{params.tracking.model_name}-student" if paths.student else params.tracking.model_name


def read(params: Params, paths: Paths) -> Results:
    """The results in `paths` that were made with `params`, every file checked against its digest.

    Raises:
        UserError: The weights are missing, were trained with other parameters or data, or a file is damaged.
    """
    weights, manifest = paths.model / "model.safetensors", paths.pairs / "manifest.json"
    again = dvc_yaml.repro(paths.student)
    for needed in (weights, paths.train_report, paths.train_curves, manifest):
        if not needed.exists():
            raise UserError(f"{needed}: missing; run `{again}` or `dvc pull` before recording a training")
    read_checked(manifest)
    stages = [stage for stage in ("shard", "pairs") if paths.made_with(stage).exists()]  # absent where data was pulled
    for stage in [*stages, "train"]:
        if reason := made_with.difference(paths, stage, params):
            raise UserError(f"{reason}; `{again}` brings the results up to date")
    if paths.student and (reason := _difference_of_teacher(params, Paths(paths.root))):
        raise UserError(f"{reason}; `{again}` brings the results up to date")
    read_checked(paths.model / "config.json")
    check_sums(paths.previews)
    names = ("loss", "heldout")
    curves = {name: parse_csv(read_checked(paths.train_curves / f"{name}.csv")) for name in names}
    stale = []
    evaluation, export = None, None
    if paths.evaluate_report.exists():
        if reason := made_with.difference(paths, "evaluate", params):
            stale.append(f"the evaluation ({reason})")
        else:
            evaluation = _evaluation(paths)
    if paths.export_report.exists():
        if reason := made_with.difference(paths, "export", params):
            stale.append(f"the export ({reason})")
        else:
            export = json.loads(paths.export_report.read_bytes())
    training = json.loads(paths.train_report.read_bytes())
    return Results(params, paths, sha256(weights), sha256(manifest), training, curves, evaluation, export, tuple(stale))


def _difference_of_teacher(params: Params, paths: Paths) -> str | None:
    """Describe why `params` are not those of the teacher's training; None if they are, or if it was imported."""
    ran_with = contents.read_record(paths, "train")["params"]
    fixed = {
        name: value for name, value in ran_with.items() if name != "device"
    }  # the student may be trained elsewhere
    return made_with.difference_of_parameters("train", fixed, params)


def _evaluation(paths: Paths) -> Evaluation:
    check_sums(paths.evaluation)
    scored, bands = read_checked(paths.evaluation / "scored.json"), paths.evaluation / "bands.csv"
    report = json.loads(paths.evaluate_report.read_bytes()) | json.loads(scored)
    rows = [] if paths.student else parse_csv(read_checked(bands))
    return Evaluation(report, rows, values_by_image(paths.evaluation))


def values_by_image(evaluation: Path) -> dict[str, NDArray[np.float64]]:
    """The figures in BY_IMAGE that are in a directory, (n,) each; earlier versions wrote fewer. Raises FileFault."""
    return {
        figure: np.array([row[column] for row in parse_csv(read_checked(evaluation / name))])
        for figure, (name, column) in BY_IMAGE.items()
        if (evaluation / name).exists()
    }


def _digest(files: list[Path]) -> str:
    digests = {file.name: sha256(file) for file in files}
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()

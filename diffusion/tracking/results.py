"""The set of results in a working tree, or in a run's workspace."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

from diffusion import made_with
from diffusion.errors import UserError
from diffusion.files import sha256
from diffusion.params import Params
from diffusion.paths import Paths


class Results(NamedTuple):
    """Parameters and what was made with them, nothing older: evaluation and export are None until they have run."""

    params: Params
    paths: Paths
    weights: str
    """SHA-256 of the trained weights."""
    pairs: str
    """SHA-256 of the manifest of data/pairs."""
    evaluation: dict[str, Any] | None
    """reports/evaluate.json, with the digests of the pairs that were scored."""
    exported: bool
    stale: tuple[str, ...]
    """Why files that are there were left out."""

    @property
    def identity(self) -> str:
        """Digest of parameters, data and weights."""
        facts = {"params": made_with.flat(self.params), "pairs": self.pairs, "weights": self.weights}
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def digests(self) -> dict[str, str]:
        """Digests of the files of each part that there is: evaluate, export."""
        found = {}
        if self.evaluation is not None:
            found["evaluate"] = _digest([self.paths.evaluate_report, self.paths.report])
        if self.exported:
            # The report does not show every change to the sampler, nor the sampler those to its variants.
            found["export"] = _digest([self.paths.export_report, *sorted(self.paths.onnx.iterdir())])
        return found


def read(params: Params, paths: Paths) -> Results:
    """The results in `paths` that were made with `params`.

    Raises:
        UserError: The weights are missing, or were trained with other parameters or data.
    """
    weights = paths.model / "model.safetensors"
    for needed in (weights, paths.train_report, paths.train_curves, paths.pairs / "manifest.json"):
        if not needed.exists():
            raise UserError(f"{needed}: missing, and needed to track a training; run `dvc repro` or `dvc pull`")
    stages = [stage for stage in ("shard", "pairs") if paths.made_with(stage).exists()]  # not where data was pulled
    for stage in [*stages, "train"]:
        if reason := made_with.difference(paths, stage, params):
            raise UserError(f"{reason}; `dvc repro` brings the results up to date")
    stale = []
    evaluation, exported = None, False
    if paths.evaluate_report.exists():
        if reason := made_with.difference(paths, "evaluate", params):
            stale.append(f"the evaluation ({reason})")
        else:
            scored = json.loads((paths.evaluation / "scored.json").read_text())
            evaluation = json.loads(paths.evaluate_report.read_text()) | scored
    if paths.export_report.exists():
        reason = made_with.difference(paths, "export", params)
        if reason:
            stale.append(f"the export ({reason})")
        exported = reason is None
    return Results(
        params, paths, sha256(weights), sha256(paths.pairs / "manifest.json"), evaluation, exported, tuple(stale)
    )


def _digest(files: list[Path]) -> str:
    digests = {file.name: sha256(file) for file in files}
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()

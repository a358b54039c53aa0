"""What the files of a working tree or of a run's workspace say about its results; files that are missing are left out.

Those of earlier versions lack some: they had no pictures of held-out images, for example.
"""

import csv
import hashlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusion.errors import Damaged, FileFault
from diffusion.pairs import pairs
from diffusion.storage.files import check_sums, read_checked
from flows import made_with
from flows.paths import Paths

Row = dict[str, Any]
"""Of a table: numbers where they are numbers, otherwise text."""


@dataclass(frozen=True)
class Contents:
    """The results in a folder."""

    figures: dict[str, Any]
    """reports/evaluate.json, and the digests of what was scored."""
    tables: dict[str, list[Row]]
    """By name: those of reports/evaluation and of reports/train_curves."""
    pictures: dict[str, bytes]
    """PNG files in reports/evaluation, by name."""
    model: dict[str, Any]
    """Parameters of network and process, by dotted name, from models/ddpm/config.json."""
    conditional: bool
    """Whether the model is conditioned on classes."""
    training: dict[str, Any]
    """reports/train.json; empty if the model was imported."""
    trained_with: dict[str, Any]
    """Parameters of the training, by dotted name; empty if the model was imported."""
    pairs: pairs.Manifest
    shards: dict[str, Any]
    """The manifest of data/shards; empty if they are not there."""


def read(paths: Paths) -> Contents:
    """Read the results in a folder.

    Raises:
        FileFault: there is no evaluation, or a file is damaged.
    """
    scored = json.loads(read_checked(paths.evaluation / "scored.json"))
    check_sums(paths.evaluation)  # files that are listed there, but missing
    tables, inputs = _tables(paths.evaluation), read_inputs(paths)
    return Contents(
        figures=read_json(paths.evaluate_report, scored.get("report_sha256")) | scored,
        tables=tables | inputs.pop("tables"),
        pictures={file.stem: read_checked(file) for file in sorted(paths.evaluation.glob("*.png"))},
        **inputs,
    )


def read_inputs(paths: Paths) -> dict[str, Any]:
    """The fields of Contents that evaluate does not write; of the tables, those of the training."""
    config = json.loads(read_checked(paths.model / "config.json"))
    chosen = {name: config[name] for name in ("network", "process") if name in config}
    manifest = paths.shards / pairs.MANIFEST
    record = read_record(paths, "train")
    training = read_json(paths.train_report, record["wrote"].get("reports/train.json")) if record["params"] else {}
    return {
        "tables": _tables(paths.train_curves),
        "model": dict(made_with.leaves(chosen)),
        "conditional": bool(config.get("network", {}).get("classes")),
        "training": training,
        "trained_with": {key: value for key, value in record["params"].items() if key.startswith("train.")},
        "pairs": pairs.Manifest.read(paths.pairs / pairs.MANIFEST),
        "shards": json.loads(read_checked(manifest)) if manifest.exists() else {},
    }


def read_record(paths: Paths, stage: str) -> dict[str, dict[str, Any]]:
    """What a stage ran with: `params`, and digests of what it `read` and `wrote`; all empty without a record.

    The record of a training does not count if its model was replaced by an imported one, which has no report.

    Raises:
        FileFault: the record is damaged.
    """
    path = paths.made_with(stage)
    replaced = stage == "train" and not paths.train_report.exists()
    record = read_json(path) if path.exists() and not replaced else {}
    found = {part: record.get(part, {}) for part in ("params", "read", "wrote")}
    if not all(isinstance(each, dict) for each in found.values()):
        raise Damaged(path, "it is not what a stage writes")
    return found


def read_scores(paths: Paths, weights: str) -> dict[str, dict[str, Any]]:
    """The `figures` of an evaluation, and the digests of what was `scored`; both empty if other weights were.

    Raises:
        FileFault: a file is damaged.
    """
    file = paths.evaluation / "scored.json"
    if not file.exists() or not paths.evaluate_report.exists():
        return {"figures": {}, "scored": {}}
    scored = json.loads(read_checked(file))
    if scored["weights_sha256"] != weights:
        return {"figures": {}, "scored": {}}
    return {"figures": read_json(paths.evaluate_report, scored["report_sha256"]), "scored": scored}


def read_json(path: Path, digest: str | None = None) -> dict[str, Any]:
    """An object of JSON; raises FileFault if the file is missing, damaged, or has another SHA-256 than `digest`."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise FileFault(path, error.strerror or str(error)) from None
    if digest is not None and hashlib.sha256(content).hexdigest() != digest:
        raise Damaged(path, "it does not match its digest")
    try:
        found = json.loads(content)
    except ValueError:
        raise Damaged(path, "it is not valid JSON") from None
    if not isinstance(found, dict):
        raise Damaged(path, "it is not an object of JSON")
    return found


def _tables(directory: Path) -> dict[str, list[Row]]:
    return {file.stem: table(file) for file in sorted(directory.glob("*.csv"))}


def table(path: Path) -> list[Row]:
    """Read a table in a directory with SHA256SUMS; raises FileFault."""
    rows = csv.DictReader(io.StringIO(read_checked(path).decode(), newline=""))
    return [{name: _number(value) for name, value in row.items() if value} for row in rows]


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text

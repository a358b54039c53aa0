"""Provenance of a stage's outputs: its parameters and file digests, in reports/made_with/STAGE.json.

params.yaml can be edited, and a file replaced, after a stage has run. This record shows whether results still match the
current parameters, no matter how the stage was run.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from diffusion.errors import Damaged, UserError
from diffusion.storage.files import sha256, write_json
from flows import dvc_yaml
from flows.params import Params
from flows.paths import Paths


def flat(params: Params, *names: str) -> dict[str, Any]:
    """Parameters by dotted name, such as `train.steps`, as plain data.

    The kind of a choice is listed under the name of the choice, next to its fields: `train.optimizer` and
    `train.optimizer.learning_rate`.

    `names` are the sections (`train`) or fields (`seed`, `sample.guidance`) to include; the default is all.
    """
    found = dict(leaves(params.model_dump(mode="json")))
    return {key: v for key, v in found.items() if not names or any(f"{key}.".startswith(f"{name}.") for name in names)}


def leaves(document: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Plain parameters by dotted name, as in `flat`."""
    for name, value in document.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix.removesuffix(".") if name == "kind" and prefix.count(".") > 1 else prefix + name, value


def write(paths: Paths, stage: str, params: Params) -> None:
    """Write the record of a stage; call this after all other outputs are written."""
    read, wrote = ({name: sha256(file) for name, file in files.items()} for files in _files(paths, stage, params))
    write_json(
        paths.made_with(stage),
        {"params": flat(params, *dvc_yaml.parameters(paths.stage(stage))), "read": read, "wrote": wrote},
    )


def difference(paths: Paths, stage: str, params: Params) -> str | None:
    """Describe why a stage's outputs do not match `params` and its inputs; None if they match.

    Raises:
        UserError: an output is missing or differs from what the stage wrote.
    """
    file, ran = paths.made_with(stage), paths.stage(stage)
    try:
        record = json.loads(file.read_bytes())
        ran_with, read, wrote = (record[part] for part in ("params", "read", "wrote"))
    except (OSError, ValueError, KeyError):
        return f"{file}: missing, unreadable, or written by an earlier version"
    if reason := difference_of_parameters(ran, ran_with, params):
        return reason
    inputs, _ = _files(paths, stage, params)
    for name, path in inputs.items():
        if sha256(path) != read.get(name):
            return f"{name} is not the file that {ran} read"
    for name, digest in wrote.items():
        path = paths.root / name
        if not path.exists():
            raise UserError(f"{path}: missing; `dvc repro {dvc_yaml.target(ran)}` writes it")
        if sha256(path) != digest:
            raise Damaged(path, f"it does not match its digest in {file}")
    return None


def difference_of_parameters(ran: str, ran_with: Mapping[str, Any], params: Params) -> str | None:
    """Describe which parameter of a stage, called `ran`, is another in `params`; None if all are the same."""
    now = flat(params)
    for name, value in ran_with.items():
        if name not in now:
            return f"{ran} was run by an earlier version, which had the parameter {name}"
        if now[name] != value:
            return f"{ran} ran with {name}: {json.dumps(value)}, params.yaml says {json.dumps(now[name])}"
    return None


def _files(paths: Paths, stage: str, params: Params) -> tuple[dict[str, Path], dict[str, Path]]:
    """The files that identify a stage's inputs, and its outputs not listed in a SHA256SUMS, by path below the root.

    Missing files are omitted: data may have been pulled without the files they were made from.
    """
    shards, pairs = paths.shards / "manifest.json", paths.pairs / "manifest.json"
    weights, of_teacher = paths.model / "model.safetensors", paths.teacher / "model.safetensors"
    teacher = (of_teacher,) if paths.student else ()
    start = (paths.imported / name / "model.safetensors",) if (name := params.train.start_from) else ()
    read, wrote = {
        "shard": ((), (shards, paths.data_report)),
        "pairs": ((shards,), (pairs,)),
        "train": ((pairs, *(teacher or start)), (weights, paths.train_report)),
        "evaluate": ((pairs, weights, *teacher), (paths.evaluate_report, paths.report)),
        "export": (
            (pairs, weights, paths.evaluate_report),
            (paths.export_report, *sorted(paths.onnx.glob("*.onnx")), paths.card),
        ),
    }[stage]
    existing, written = (
        {file.relative_to(paths.root).as_posix(): file for file in files if file.exists()} for files in (read, wrote)
    )
    return existing, written

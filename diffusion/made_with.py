"""What a stage's outputs were made with: its parameters and the digests of its files, in reports/made_with/STAGE.json.

params.yaml can be edited, and a file replaced, after a stage has run. This record tells whether results still belong to
the parameters beside them, whoever ran the stage.
"""

import json
from pathlib import Path
from typing import Any

from diffusion.files import sha256, write_json
from diffusion.params import Params
from diffusion.paths import Paths

PARAMETERS = {
    "shard": ("shard",),
    "pairs": (
        "seed",
        "pairs",
        "process.schedule",
        "process.beta",
        "process.num_timesteps",
        "process.zero_terminal_snr",
    ),
    "train": ("seed", "device", "process", "network", "train"),
    "evaluate": ("seed", "device", "sample", "evaluate"),
    "export": ("device", "export", "sample.eta", "sample.guidance", "sample.threshold", "sample.variance"),
}
"""The parameters of each stage: sections or single fields, as in dvc.yaml."""


def flat(params: Params, *names: str) -> dict[str, Any]:
    """Parameters by dotted name, such as `train.steps`, as plain data.

    `names` are the sections (`train`) or fields (`seed`, `sample.eta`) to include; without any, all of them.
    """
    found: dict[str, Any] = {}
    for name, value in params.model_dump(mode="json").items():
        found |= {f"{name}.{key}": v for key, v in value.items()} if isinstance(value, dict) else {name: value}
    return {key: v for key, v in found.items() if not names or key in names or key.split(".")[0] in names}


def write(paths: Paths, stage: str, params: Params) -> None:
    """Write the record of a stage; to be called once all its other outputs are written."""
    files = {name: sha256(file) for name, file in _files(paths, stage).items() if file.exists()}
    write_json(paths.made_with(stage), {"params": flat(params, *PARAMETERS[stage]), "files": files})


def difference(paths: Paths, stage: str, params: Params) -> str | None:
    """Why a stage's outputs do not belong to `params` and to the files beside them, in words; None if they do."""
    file = paths.made_with(stage)
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return f"{file}: missing or unreadable"
    now = flat(params)
    for name, value in record["params"].items():
        if now.get(name) != value:
            return f"{stage} ran with {name}: {json.dumps(value)}, params.yaml says {json.dumps(now.get(name))}"
    for name, path in _files(paths, stage).items():
        if path.exists() and sha256(path) != record["files"].get(name):
            return f"{name} is not the file that {stage} read or wrote"
    return None


def _files(paths: Paths, stage: str) -> dict[str, Path]:
    """One file for each input of a stage and one for its outputs, by path below the root."""
    shards, pairs = paths.shards / "manifest.json", paths.pairs / "manifest.json"
    weights = paths.model / "model.safetensors"
    files = {
        "shard": (shards,),
        "pairs": (shards, pairs),
        "train": (pairs, weights),
        "evaluate": (pairs, weights, paths.evaluate_report, paths.report),
        "export": (pairs, weights, paths.evaluate_report, paths.export_report, paths.denoiser, paths.sampler),
    }[stage]
    return {file.relative_to(paths.root).as_posix(): file for file in files}

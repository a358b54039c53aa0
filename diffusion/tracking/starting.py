"""Starting an MLflow run: its parameters, its data, and the code that it comes from."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

from diffusion.files import sha256
from diffusion.params import Params
from diffusion.paths import Paths
from diffusion.tracking.store import Store, TrackedRun


def start(store: Store, params: Params, paths: Paths, digest: str, tags: dict[str, str]) -> TrackedRun:
    """A new run, with all that is known before training."""
    data = Path(params.shard.source).stem
    origin = _origin(paths)
    name = origin.pop("name", f"{data}-{digest[:8]}")
    run = TrackedRun(store.client, store.client.create_run(store.experiment, run_name=name, tags=origin | tags))
    run.parameters(flat(params, *(set(Params.model_fields) - {"sample", "evaluate", "export", "tracking"})))
    run.dataset(data, sha256(paths.pairs / "manifest.json"), paths.pairs, "training")
    return run


def flat(params: Params, *fields: str) -> dict[str, Any]:
    """The parameters in these fields by dotted name, such as train.steps."""
    flat: dict[str, Any] = {}
    for name, value in params.model_dump(mode="json", include=set(fields)).items():
        flat |= {f"{name}.{key}": v for key, v in value.items()} if isinstance(value, dict) else {name: value}
    return flat


def _origin(paths: Paths) -> dict[str, str]:
    """Where the code came from, as tags; and the name of the flow run whose workspace this is."""
    description = paths.root / "run.json"
    if description.exists():
        run = json.loads(description.read_text())
        revision, dirty = run["git_revision"], run["git_dirty"]
        origin = {"name": run["name"], "ddpm.flow_run_id": run["flow_run_id"]}
    else:
        revision = _git(paths.root, "rev-parse", "HEAD")
        dirty = bool(_git(paths.root, "status", "--porcelain", "--untracked-files=no", "--", ".", ":!dvc.lock"))
        origin = {}
    if revision:
        origin |= {"mlflow.source.name": "ddpm train", "mlflow.source.type": "LOCAL"}  # without them it is not shown
        origin |= {"mlflow.source.git.commit": revision, "ddpm.git_dirty": str(dirty).lower()}
    return {key: value for key, value in origin.items() if value}


def _git(root: Path, *arguments: str) -> str:
    """What git prints; nothing where there is no git or no repository."""
    try:
        return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False).stdout.strip()
    except FileNotFoundError:
        return ""

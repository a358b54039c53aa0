"""Starting an MLflow run, and the code that it comes from."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from diffusion.params import Params
from diffusion.paths import Paths
from diffusion.tracking.store import Store, TrackedRun


def start(store: Store, params: Params, paths: Paths, digest: str, tags: dict[str, str]) -> TrackedRun:
    """A new run, named like the flow run whose workspace this is, or else after the data and a digest."""
    origin = _origin(paths)
    name = origin.pop("name", f"{Path(params.shard.source).stem}-{digest[:8]}")
    return TrackedRun(store.client, store.client.create_run(store.experiment, run_name=name, tags=origin | tags))


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
        origin |= {"mlflow.source.name": "ddpm", "mlflow.source.type": "LOCAL"}  # without them it is not shown
        origin |= {"mlflow.source.git.commit": revision, "ddpm.git_dirty": str(dirty).lower()}
    return {key: value for key, value in origin.items() if value}


def _git(root: Path, *arguments: str) -> str:
    """What git prints; nothing where there is no git or no repository."""
    try:
        return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False).stdout.strip()
    except FileNotFoundError:
        return ""

"""Starting or resuming an MLflow run, and tagging it with the code that made it."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

from flows.params import Params
from flows.paths import Paths
from flows.tracking.names import GIT_DIRTY, HIDDEN
from flows.tracking.store import Store, TrackedRun

FLOW_RUN, COMMIT, DIRTY = f"{HIDDEN}flow_run_id", "mlflow.source.git.commit", GIT_DIRTY
TEACHER = f"{HIDDEN}teacher"
"""Tag of a distillation, with the name of the run whose model it distilled."""
SWEEP, PARENT = f"{HIDDEN}sweep", "mlflow.parentRunId"
"""Tag of the run of a sweep, with its name, and the tag of its trials' runs with the id of that run."""


def start(store: Store, params: Params, paths: Paths, digest: str, tags: dict[str, str]) -> TrackedRun:
    """A new run, named after the flow run whose workspace this is, or else after the data and a digest."""
    name, origin = _origin(store, params, paths, digest)
    return TrackedRun(store.client, store.client.create_run(store.experiment, run_name=name, tags=origin | tags))


def resume(run: TrackedRun, params: Params, paths: Paths, digest: str) -> None:
    """Mark a run as running again, with the name and the origin that a new run would have here."""
    name, origin = _origin(Store(run.client, run.experiment_id), params, paths, digest)
    run.client.update_run(run.id, status="RUNNING", name=name)
    run.untag({FLOW_RUN, COMMIT, DIRTY, PARENT, TEACHER} - origin.keys())
    run.tag(origin)


def flow_run(paths: Paths) -> str:
    """The id of the flow run whose workspace this is; empty if it is none."""
    description = paths.root / "run.json"
    return str(json.loads(description.read_text())["flow_run_id"]) if description.exists() else ""


def of_sweep(store: Store, name: str) -> TrackedRun:
    """The run of a sweep, whose trials' runs are its children; created by the first of them."""
    found = store.runs_by_tag(SWEEP, name)
    run = found[0] if found else store.client.create_run(store.experiment, run_name=name, tags={SWEEP: name})
    return TrackedRun(store.client, run)


def _origin(store: Store, params: Params, paths: Paths, digest: str) -> tuple[str, dict[str, str]]:
    """The name of a run, and tags for the flow run, the sweep and the code that it comes from."""
    name = f"{Path(params.shard.source).stem}-{'student-' if paths.student else ''}{digest[:8]}"
    description = paths.root / "run.json"
    if description.exists():
        run = json.loads(description.read_text())
        revision, dirty = run["git_revision"], run["git_dirty"]
        name, origin = run["name"], {FLOW_RUN: run["flow_run_id"]}
        if teacher := run.get("teacher"):
            origin[TEACHER] = teacher
        if sweep := run.get("sweep"):
            origin[PARENT] = of_sweep(store, sweep).id
    else:
        revision = _git(paths.root, "rev-parse", "HEAD")
        dirty = bool(_git(paths.root, "status", "--porcelain", "--untracked-files=no", "--", ".", ":!dvc.lock"))
        origin = {}
    if revision:
        origin |= {"mlflow.source.name": "ddpm", "mlflow.source.type": "LOCAL"}  # without them it is not shown
        origin |= {COMMIT: revision, DIRTY: str(dirty).lower()}
    return name, {key: value for key, value in origin.items() if value}


def _git(root: Path, *arguments: str) -> str:
    """The output of git; empty without git or a repository."""
    try:
        return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False).stdout.strip()
    except FileNotFoundError:
        return ""

"""Bringing the stages' files into MLflow."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from diffusion.errors import UserError
from diffusion.files import read_csv, sha256
from diffusion.params import Params
from diffusion.paths import Paths
from diffusion.tracking import registry, store
from diffusion.tracking.starting import flat, start
from diffusion.tracking.store import WEIGHTS, Store, TrackedRun

if TYPE_CHECKING:
    from mlflow.entities import Metric


class Recorded(NamedTuple):
    """Where weights stand in MLflow: their run, its page, and the registered version with its aliases, if exported."""

    run_id: str
    url: str
    model_version: str | None
    aliases: list[str]


def record(
    params: Params, paths: Paths, run_id: str | None = None, speed: dict[str, dict[str, float]] | None = None
) -> Recorded | None:
    """Bring into MLflow what the files hold of the present weights and is not there yet; None if it cannot be reached.

    `run_id` is the run that followed the training, if there was one; `speed` what an export measured.
    """
    if not paths.train_report.exists():
        return None  # an imported model, of no training here
    uri = store.tracking_uri(paths)
    try:
        return _record(uri, params, paths, run_id, speed or {})
    except Exception as error:
        store.say_unusable(uri, error)
        return None


def track(params: Params, paths: Paths, as_json: bool) -> None:
    """`record`, and print where it is; raises UserError if there is nothing to record or MLflow cannot be reached."""
    for needed in (_weights(paths), paths.train_report, paths.train_curves, paths.pairs):
        if not needed.exists():
            raise UserError(
                f"{needed}: missing, and needed to track a training; make it with `dvc repro` or `dvc pull`"
            )
    uri = store.tracking_uri(paths)
    try:
        recorded = _record(uri, params, paths, None, {})
    except Exception as error:  # of a database, of a server, of a driver that is not installed
        raise UserError(f"MLflow at {uri}: {store.brief(error)}") from None
    if as_json:
        print(json.dumps(recorded._asdict()))
        return
    print(f"run      {recorded.run_id}\naddress  {recorded.url}")
    if recorded.model_version is not None:
        aliases = ", ".join(recorded.aliases) or "no alias"
        print(f"model    {params.tracking.model_name} version {recorded.model_version} ({aliases})")


def _record(uri: str, params: Params, paths: Paths, run_id: str | None, speed: dict[str, dict[str, float]]) -> Recorded:
    weights = sha256(_weights(paths))
    with store.lock(paths):
        mlflow_store = store.connect(uri, params, paths)
        run = _run_of(mlflow_store, params, paths, weights, run_id)
        run.once("train", weights, lambda: _log_training(run, paths, weights))
        evaluation = _evaluation(paths, weights)
        if evaluation:
            digest = sha256(paths.report)  # has the figures and the pictures in it
            run.once("evaluate", digest, lambda: _log_evaluation(run, params, paths, evaluation))
        version = registry.register(run, params, paths, weights, speed)
        for file in (paths.params, paths.root / "dvc.lock"):
            if file.exists():
                run.once(file.name, sha256(file), partial(run.client.log_artifact, run.id, str(file)))
        if run.status != "FINISHED":
            run.end("FINISHED")
        aliases = registry.promote(run.client, params, version, weights, evaluation) if version else []
    return Recorded(run.id, _page(uri, run), str(version.version) if version else None, aliases)


def _page(uri: str, run: TrackedRun) -> str:
    """The address of a run's page; of a store without a server, the page where `make up` shows it."""
    server = uri.rstrip("/") if uri.startswith("http") else f"http://127.0.0.1:{os.environ.get('MLFLOW_PORT', '5000')}"
    # Told so, MLflow opens its pages for training rather than those for language models.
    return f"{server}/#/experiments/{run.experiment_id}/runs/{run.id}?workflowType=machine_learning"


def _run_of(mlflow_store: Store, params: Params, paths: Paths, weights: str, run_id: str | None) -> TrackedRun:
    """The run of these weights: the one tagged so, or else the one that followed their training, or a new one."""
    client = mlflow_store.client
    tagged, followed = mlflow_store.run_by_tag(WEIGHTS, weights), mlflow_store.run_by_id(run_id)
    if followed and WEIGHTS not in followed.data.tags:
        if tagged is None:
            return TrackedRun(client, followed)
        client.delete_run(followed.info.run_id)  # other code or parameters had given the same weights before
    elif followed:
        client.set_terminated(followed.info.run_id)  # a second training in it: of the same weights, or others
    return TrackedRun(client, tagged) if tagged else start(mlflow_store, params, paths, weights, {})


def _log_training(run: TrackedRun, paths: Paths, weights: str) -> None:
    for file, names in (("loss.csv", {}), ("heldout.csv", {"mse": "heldout_mse"})):
        points: list[Metric] = []
        for row in read_csv(paths.train_curves / file):
            step = int(row.pop("step"))
            points += store.points({f"train/{names.get(key, key)}": value for key, value in row.items()}, step)
        run.metrics(points)
    run.scalars("train", json.loads(paths.train_report.read_text()))
    for path in sorted(paths.previews.glob("step-*.png")):
        run.image(store.read_image(path), int(path.stem.removeprefix("step-")))
    run.client.log_artifact(run.id, str(paths.model / "config.json"))
    run.client.set_tag(run.id, WEIGHTS, weights)


def _log_evaluation(run: TrackedRun, params: Params, paths: Paths, report: dict[str, Any]) -> None:
    run.parameters(flat(params, "evaluate", "sample"))
    run.scalars("evaluate", report)
    run.dataset(f"{Path(params.shard.source).stem}-heldout", report["pairs_sha256"], paths.pairs, "heldout")
    run.client.log_artifacts(run.id, str(paths.evaluation), "evaluation")
    run.client.log_artifact(run.id, str(paths.report), "evaluation")
    run.table(read_csv(paths.evaluation / "bands.csv"), "evaluation/bands.json")


def _weights(paths: Paths) -> Path:
    return paths.model / "model.safetensors"


def _evaluation(paths: Paths, weights: str) -> dict[str, Any] | None:
    """Scores and digests of the evaluation, if it is of these weights: an older one stays until the next."""
    scored = paths.evaluation / "scored.json"
    if not scored.exists() or not paths.evaluate_report.exists():
        return None
    digests: dict[str, Any] = json.loads(scored.read_text())
    return json.loads(paths.evaluate_report.read_text()) | digests if digests["weights_sha256"] == weights else None

"""The models that trainings start from: found in MLflow by version or digest, and linked to the runs they start."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from diffusion.errors import Damaged, UserError
from diffusion.model import WEIGHTS as FILE
from diffusion.progress import say
from diffusion.storage.files import sha256
from flows.origin import Origin
from flows.params import Params
from flows.paths import Paths
from flows.tracking import description, names, store
from flows.tracking.results import registered_name
from flows.tracking.store import WEIGHTS, Store, TrackedRun

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel
    from mlflow.entities.model_registry import ModelVersion

STARTED_FROM = f"{names.HIDDEN}started_from_run"
"""Tag of a run that started from a model: the id of the run that trained it."""


def with_run(origin: Origin, paths: Paths) -> Origin:
    """The origin of weights with the MLflow run that trained them, if MLflow can be reached and knows them."""
    uri = store.tracking_uri(paths)
    if _is_empty(uri):
        return origin
    try:
        client = store.client_at(uri)
        for experiment in client.search_experiments():
            models = Store(client, experiment.experiment_id).models_by_tag(WEIGHTS, origin.weights_sha256)
            if models:
                return _of_run(client, origin, str(models[0].source_run_id))
    except Exception as error:
        say(f"MLflow: {uri} cannot be used ({store.brief(error)}), so the run that trained the model is not known")
    return origin


def download(params: Params, paths: Paths, given: str, directory: Path) -> tuple[Path, str, Origin]:
    """Download the weights of a version of the registered model, given by its number or an alias.

    Returns the model's folder inside `directory`, `NAME-VERSION`, and where it comes from.
    Raises UserError if there is no such version, its weights are not in MLflow or not those it was registered with, or
    MLflow cannot be reached.
    """
    from mlflow.artifacts import download_artifacts

    uri, name = store.tracking_uri(paths), registered_name(params, paths)
    with store.user_errors(uri):
        version = None if _is_empty(uri) else _version(store.client_at(uri), name, given)
        if version is None:
            raise UserError(
                f"{given}: no run (see `ddpm runs`), no folder, and no version or alias of the registered model {name} "
                f"in MLflow at {uri}"
            )
        client, known = store.client_at(uri), f"{name} version {version.version}"
        weights = names.current(version.tags).get(WEIGHTS, "")
        model = _weights(client, version, weights)
        if model is None:
            raise UserError(f"{known}: its weights are not in MLflow; import the model of its run, or a folder")
        folder = Path(download_artifacts(artifact_uri=f"models:/{model.model_id}", dst_path=str(directory)))
        if sha256(folder / FILE) != weights:
            raise Damaged(Path(f"models:/{model.model_id}", FILE), f"these are not the weights of {known}")
        origin = _of_run(client, Origin(version=known, weights_sha256=weights), str(model.source_run_id))
    return folder, f"{name}-{version.version}", origin


def _is_empty(uri: str) -> bool:
    """Whether MLflow's database is a file that is not there yet; connecting would create it."""
    return uri.startswith("sqlite:///") and not Path(uri.removeprefix("sqlite:///")).exists()


def log_start(mlflow_store: Store, run: TrackedRun, params: Params, paths: Paths) -> None:
    """Link the run of a training to the model that it started from, if any: as an input, and by a tag."""
    if origin := _origin(params, paths):
        run.once("start", lambda: _log_start(mlflow_store, run, origin))


def started_from(mlflow_store: Store, params: Params, paths: Paths) -> str:
    """What a training started from, for its run's description; empty for random weights."""
    if (origin := _origin(params, paths)) is None:
        return ""
    source = mlflow_store.run_by_id(origin.run_id)
    link = description.run_link(source.info.experiment_id, origin.run_id, str(origin)) if source else str(origin)
    return f"The training started from the weights of {link}."


def _origin(params: Params, paths: Paths) -> Origin | None:
    """Where the model comes from that a training started from; None for random weights, or if it is not here."""
    model = paths.imported / params.train.start_from
    return Origin.read(model) if not paths.student and (model / FILE).exists() else None


def _log_start(mlflow_store: Store, run: TrackedRun, origin: Origin) -> None:
    for model in mlflow_store.models_by_tag(WEIGHTS, origin.weights_sha256)[:1]:
        run.uses(model.model_id)
    run.tag({STARTED_FROM: origin.run_id} if origin.run_id else {})


def _of_run(client: MlflowClient, origin: Origin, run_id: str) -> Origin:
    return replace(origin, run_id=run_id, run=origin.run or client.get_run(run_id).info.run_name or "")


def _version(client: MlflowClient, name: str, given: str) -> ModelVersion | None:
    from mlflow.exceptions import MlflowException

    try:
        find = client.get_model_version if given.isdecimal() else client.get_model_version_by_alias
        return find(name, given)
    except MlflowException as error:
        if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
        return None


def _weights(client: MlflowClient, version: ModelVersion, weights: str) -> LoggedModel | None:
    """The logged model with the weights of a version; None without it."""
    if not version.run_id or not weights:
        return None
    experiment = client.get_run(version.run_id).info.experiment_id
    return next(iter(Store(client, experiment).models_by_tag(WEIGHTS, weights)), None)

"""What MLflow's registry needs, and deleting for good what a user has deleted in MLflow."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import unquote, urlsplit

from diffusion.errors import UserError
from flows import addresses
from flows.paths import Paths
from flows.tracking import names, store
from flows.tracking.recording import TRAINED_IN
from flows.tracking.registry import ONNX
from flows.tracking.starting import FLOW_RUN

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

LOCK = "dvc.lock"
"""Artifact of a run: the lock file of its results."""


class Named(NamedTuple):
    """A model version that has an alias, such as champion, and the runs that made it."""

    name: str
    """Such as `champion of ddpm`."""
    flow_runs: frozenset[str]
    """Ids of the flow runs that exported it and that trained its weights, as far as they are known."""
    onnx: str
    """SHA-256 of its sampler.onnx; empty if unknown."""
    locks: list[bytes]
    """The lock files that MLflow has of these runs."""


class Deleted(NamedTuple):
    """A run that was deleted on MLflow's pages, with all of its files."""

    name: str
    run_id: str
    models: list[str]
    """Ids of its logged models."""
    folders: list[Path]
    """Those of its artifacts, and of its models."""


def named(paths: Paths) -> list[Named]:
    """All versions that have an alias, in every store that this repository's runs may have been recorded in.

    Raises:
        UserError: a store cannot be reached, or lacks a file.
    """
    found = []
    for uri in _stores(paths):
        try:
            with store.user_errors(uri):
                found += list(_named(_client(uri)))
        except UserError as error:
            raise UserError(f"{error}; it is needed to know the champion and its ancestors") from None
    return found


def deleted(paths: Paths, older_than: timedelta | None) -> tuple[list[Deleted], int]:
    """The runs in `.ddpm/mlflow.db` that were deleted and that nothing needs, and the number of all deleted ones.

    A run is needed while a model version that it registered exists, or another run uses its weights.

    Args:
        paths: of the repository.
        older_than: only those that were deleted earlier than this.
    Raises:
        UserError: the database cannot be read.
    """
    if not paths.mlflow_database.exists():
        return [], 0
    uri = _own(paths)
    with store.user_errors(uri):
        client = _client(uri)
        milliseconds = int((older_than or timedelta()).total_seconds() * 1000)
        candidates = _backend(client)._get_deleted_runs(older_than=milliseconds)
        found = [_with_files(client, client.get_run(run_id)) for run_id in candidates]
        if found:
            versions = list(_pages(lambda token: client.search_model_versions(page_token=token)))
            registered = {each for v in versions for each in (v.run_id, v.source.removeprefix("models:/"))}
            found = [run for run in found if registered.isdisjoint((run.run_id, *run.models))]
            going = {run.run_id for run in found}
            reused = {trained for user, trained in _reusing(client) if user not in going}
            found = [run for run in found if run.run_id not in reused]
        return found, len(candidates)


def delete(paths: Paths, runs: Sequence[Deleted]) -> None:
    """Delete runs for good, as `mlflow gc` does, and their logged models, which that leaves."""
    uri = _own(paths)
    with store.user_errors(uri), store.lock(paths):
        client = _client(uri)
        backend = _backend(client)
        for run in runs:
            for model_id in run.models:
                _delete_files(client.get_logged_model(model_id).artifact_location)
                client.delete_logged_model(model_id)
                backend._hard_delete_logged_model(model_id)
            _delete_files(client.get_run(run.run_id).info.artifact_uri)
            backend._hard_delete_run(run.run_id)


def _delete_files(location: str) -> None:
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    repository: Any = get_artifact_repository(location)
    repository.delete_artifacts()


def _own(paths: Paths) -> str:
    return f"sqlite:///{paths.mlflow_database.resolve()}"


def _stores(paths: Paths) -> list[str]:
    """The store of this process, the one with which the services were started, and the repository's own, if it exists.

    The latter is read without the server of `make up`, which serves it.
    """
    recorded, own = addresses.recorded(paths), _own(paths)
    uris = [store.tracking_uri(paths), recorded.get("MLFLOW_TRACKING_URI", own), own]
    if not paths.mlflow_database.exists():
        return [uri for uri in dict.fromkeys(uris) if uri != own]
    served = addresses.mlflow(paths) if "MLFLOW_PORT" in recorded else own
    return list(dict.fromkeys(own if uri.rstrip("/") == served else uri for uri in uris))


def _client(uri: str) -> MlflowClient:
    import mlflow

    return mlflow.MlflowClient(uri, uri)


def _backend(client: MlflowClient) -> Any:
    """The database, whose methods `mlflow gc` uses."""
    return client._tracking_client.store


def _named(client: MlflowClient) -> Iterator[Named]:
    from mlflow.exceptions import MlflowException

    for model in _pages(lambda token: client.search_registered_models(page_token=token)):
        for alias, number in sorted(client.get_registered_model(model.name).aliases.items()):
            version = client.get_model_version(model.name, str(number))
            flow_runs, locks, run_id = set[str](), [], version.run_id
            while run_id:
                try:
                    run = client.get_run(run_id)
                except MlflowException as error:
                    if error.error_code != "RESOURCE_DOES_NOT_EXIST":  # deleted for good
                        raise
                    break
                tags = names.current(run.data.tags)
                flow_runs |= {tags[FLOW_RUN]} if FLOW_RUN in tags else set()
                locks += _lock_of(client, run_id)
                run_id = tags.get(TRAINED_IN)
            onnx = names.current(version.tags).get(ONNX, "")
            yield Named(f"{alias} of {model.name}", frozenset(flow_runs), onnx, locks)


def _lock_of(client: MlflowClient, run_id: str) -> list[bytes]:
    """The lock file of a run, none or one; one in a folder on this machine is read there, without a copy."""
    if LOCK not in [each.path for each in client.list_artifacts(run_id)]:
        return []
    folder = _folder(client.get_run(run_id).info.artifact_uri)
    if folder is not None:
        return [(folder / LOCK).read_bytes()]
    with tempfile.TemporaryDirectory() as directory:
        return [Path(client.download_artifacts(run_id, LOCK, directory)).read_bytes()]


def _reusing(client: MlflowClient) -> Iterator[tuple[str, str]]:
    """The ids of runs that use the weights of another one, deleted or not, and of that run."""
    from mlflow.entities import ViewType

    everywhere = _pages(lambda token: client.search_experiments(ViewType.ALL, page_token=token))
    experiments = [experiment.experiment_id for experiment in everywhere]
    for tag in (TRAINED_IN, names.former(TRAINED_IN)):
        condition = f"tags.`{tag}` != ''"
        for run in _pages(partial(_runs, client, experiments, condition)):
            yield run.info.run_id, run.data.tags[tag]


def _runs(client: MlflowClient, experiments: list[str], condition: str, token: str | None) -> Any:
    from mlflow.entities import ViewType

    return client.search_runs(experiments, condition, ViewType.ALL, page_token=token)


def _models(client: MlflowClient, run: Run) -> list[str]:
    condition = f"source_run_id = '{run.info.run_id}'"
    experiments = [run.info.experiment_id]
    found = _pages(lambda token: client.search_logged_models(experiments, condition, page_token=token))
    return [model.model_id for model in found]


def _with_files(client: MlflowClient, run: Run) -> Deleted:
    models = _models(client, run)
    locations = [run.info.artifact_uri, *(client.get_logged_model(each).artifact_location for each in models)]
    folders = [folder for location in locations if (folder := _folder(location)) is not None]
    return Deleted(run.info.run_name or run.info.run_id, run.info.run_id, models, folders)


def _folder(location: str) -> Path | None:
    """A location on this machine as a path."""
    parts = urlsplit(location)
    return Path(unquote(parts.path)) if parts.scheme in ("", "file") else None


def _pages(search: Callable[[str | None], Any]) -> Iterator[Any]:
    """All results of a search."""
    token: str | None = None
    while True:
        page = search(token)
        yield from page
        token = page.token
        if not token:
            return

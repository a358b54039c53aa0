"""What MLflow's registry keeps from `ddpm gc`, and deleting runs for good."""

import hashlib
import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from datetime import timedelta
from pathlib import Path

import mlflow
import pytest

from diffusion.errors import UserError
from diffusion.storage.files import sha256
from flows import tracking
from flows.params import Params
from flows.paths import Paths
from flows.tracking import garbage
from tests.flows.tracking import kept
from tests.flows.tracking.trees import (
    PARAMS,
    changed,
    client_of,
    runs_of,
    write_all,
)


def record(paths: Paths, flow_run: str, weights: bytes, params: Params = PARAMS, mse: float = 0.3) -> str:
    """Record the results of a flow run; returns the id of its run in MLflow."""
    (paths.root / "run.json").write_text(
        json.dumps({"name": flow_run, "flow_run_id": f"id-{flow_run}", "git_revision": "", "git_dirty": False})
    )
    write_all(paths, weights, mse, params=params)
    reports = (paths.train_report, paths.evaluate_report, paths.export_report)
    entries = [f"    - path: {file.relative_to(paths.root)}\n      md5: {md5(file)}\n" for file in reports]
    (paths.root / "dvc.lock").write_text(f"# {flow_run}\nstages:\n  all:\n    outs:\n{''.join(entries)}")
    recorded = tracking.record(params, paths)
    assert recorded is not None
    return recorded.run_id


def md5(file: Path) -> str:
    return hashlib.md5(file.read_bytes()).hexdigest()


def delete_version(paths: Paths, run_id: str) -> None:
    client = client_of(paths)
    for version in client.search_model_versions(f"run_id = '{run_id}'"):
        client.delete_model_version(version.name, version.version)


def files(paths: Paths) -> set[Path]:
    return {path for path in paths.mlflow_artifacts.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, mlflow_database: Path) -> Iterator[tuple[Paths, dict[str, str]]]:
    """A store with three runs and their versions: trained, the champion; other; sampled, the challenger, which uses
    the weights of trained. Also the ids of the runs by name."""
    paths = kept.new_tree(tmp_path_factory.mktemp("recorded") / "tree", mlflow_database)
    runs = {"trained": record(paths, "trained", b"one")}
    runs["other"] = record(paths, "other", b"two", mse=0.5)
    runs["sampled"] = record(paths, "sampled", b"one", changed(sample={"steps": 7}), mse=0.6)
    kept.keep(paths)
    yield paths, runs
    mlflow.set_tracking_uri(None)


@pytest.fixture
def recorded(saved: tuple[Paths, dict[str, str]]) -> tuple[Paths, dict[str, str]]:
    """The same, as it was at first."""
    kept.restore(saved[0])
    return saved


def test_versions_with_an_alias_name_the_runs_that_made_them(recorded: tuple[Paths, dict[str, str]]) -> None:
    paths, _ = recorded
    found = {version.name: version for version in garbage.named(paths)}
    assert {name: version.flow_runs for name, version in found.items()} == {
        "champion of ddpm": {"id-trained"},
        "challenger of ddpm": {"id-sampled", "id-trained"},
    }
    assert found["challenger of ddpm"].onnx == sha256(paths.sampler) != found["champion of ddpm"].onnx
    locks = {name: [lock.splitlines()[0] for lock in version.locks] for name, version in found.items()}
    assert locks == {"champion of ddpm": [b"# trained"], "challenger of ddpm": [b"# sampled", b"# trained"]}


def test_a_version_whose_run_is_gone_is_known_by_its_file(recorded: tuple[Paths, dict[str, str]]) -> None:
    paths, runs = recorded
    client = client_of(paths)
    client.delete_registered_model_alias("ddpm", "champion")
    client.delete_run(runs["sampled"])
    assert [version.flow_runs for version in garbage.named(paths)] == [{"id-sampled", "id-trained"}]
    garbage._backend(garbage._client(garbage._own(paths)))._hard_delete_run(runs["sampled"])
    assert garbage.named(paths) == [("challenger of ddpm", frozenset(), sha256(paths.sampler), [])]


def test_without_a_store_there_is_nothing_and_none_is_created(paths: Paths) -> None:
    paths.mlflow_database.unlink()
    assert garbage.named(paths) == []
    assert garbage.deleted(paths, None) == ([], 0)
    assert not paths.mlflow_database.exists()


def test_a_store_that_cannot_be_reached_is_named(paths: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(UserError, match=r"^MLflow at http://127.0.0.1:9: .* needed to know the champion") as error:
        garbage.named(paths)
    assert "\n" not in str(error.value)


def test_every_store_that_runs_may_have_been_recorded_in_is_asked(
    paths: Paths, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = f"sqlite:///{paths.mlflow_database.resolve()}"
    assert garbage._stores(paths) == [own]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5111")
    assert garbage._stores(paths) == ["http://127.0.0.1:5111", own]
    addresses = paths.state / "services/addresses.json"
    addresses.parent.mkdir()
    addresses.write_text(json.dumps({"MLFLOW_PORT": "5111", "MLFLOW_TRACKING_URI": "http://host/mlflow"}))
    assert garbage._stores(paths) == [own, "http://host/mlflow"]  # served from the database, which is read instead
    paths.mlflow_database.unlink()
    assert garbage._stores(paths) == ["http://127.0.0.1:5111", "http://host/mlflow"]


def test_a_deleted_run_goes_with_its_files_and_models(recorded: tuple[Paths, dict[str, str]]) -> None:
    paths, runs = recorded
    gone, before = runs["other"], files(paths)
    assert garbage.deleted(paths, None) == ([], 0)
    client_of(paths).delete_run(gone)
    assert garbage.deleted(paths, None) == ([], 1)  # it has a version
    delete_version(paths, gone)
    ((run,), number) = garbage.deleted(paths, None)
    assert (run.name, run.run_id, len(run.models), len(run.folders), number) == ("other", gone, 2, 3, 1)
    garbage.delete(paths, [run])
    assert {"model.onnx", "model.safetensors", "dvc.lock"} <= {path.name for path in before - files(paths)}
    assert before - files(paths) == {path for path in before if any(each in path.parents for each in run.folders)}
    assert garbage.deleted(paths, None) == ([], 0)
    assert {run.info.run_id for run in runs_of(client_of(paths))} == {runs["trained"], runs["sampled"]}
    with closing(sqlite3.connect(paths.mlflow_database)) as database:
        for query in ("logged_models WHERE source_run_id = ?", "metrics WHERE run_uuid = ?"):
            assert database.execute(f"SELECT count(*) FROM {query}", (gone,)).fetchone() == (0,)


def test_a_deleted_run_stays_while_a_version_or_another_run_needs_it(recorded: tuple[Paths, dict[str, str]]) -> None:
    paths, runs = recorded
    client = client_of(paths)
    client.delete_run(runs["trained"])
    delete_version(paths, runs["trained"])
    assert garbage.deleted(paths, None) == ([], 1)  # another run uses its weights
    client.delete_run(runs["sampled"])
    assert garbage.deleted(paths, None) == ([], 2)  # which has a version
    delete_version(paths, runs["sampled"])
    found, number = garbage.deleted(paths, None)
    assert ({run.run_id for run in found}, number) == ({runs["trained"], runs["sampled"]}, 2)


def test_only_runs_that_were_deleted_long_enough_ago_go(recorded: tuple[Paths, dict[str, str]]) -> None:
    paths, runs = recorded
    client_of(paths).delete_run(runs["other"])
    delete_version(paths, runs["other"])
    with closing(sqlite3.connect(paths.mlflow_database)) as database, database:
        database.execute("UPDATE runs SET deleted_time = deleted_time - ?", (3 * 24 * 3600 * 1000,))
    assert garbage.deleted(paths, timedelta(days=4)) == ([], 0)
    found, _ = garbage.deleted(paths, timedelta(days=2))
    assert [run.run_id for run in found] == [runs["other"]]

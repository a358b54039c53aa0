"""Tracking against real MLflow stores: sqlite files, a server, and none at all."""

import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import onnx
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from onnx import TensorProto, helper
from PIL import Image

from diffusion import params as parameters
from diffusion import tracking
from diffusion.errors import Stopped, UserError
from diffusion.files import sha256, write_csv, write_json
from diffusion.params import Params
from diffusion.paths import Paths
from diffusion.tracking import store

pytestmark = [
    pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy is deprecated:DeprecationWarning:mlflow"),
]
REPOSITORY = Path(__file__).parents[1]
LOSS = [{"step": step, "loss": 1 / step, "learning_rate": 1e-3, "grad_norm": 0.5} for step in range(20, 101, 20)]
HELDOUT = [{"step": 50, "mse": 0.4}, {"step": 100, "mse": 0.3}]


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty MLflow database: its migrations take a second, so that tests copy it."""
    database = tmp_path_factory.mktemp("template") / "mlflow.db"
    MlflowClient(f"sqlite:///{database}").search_experiments()
    return database


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(store, "_said", set())
    yield
    mlflow.set_tracking_uri(None)


@pytest.fixture
def paths(tmp_path: Path, template: Path) -> Paths:
    """A working tree with an MLflow database and no results."""
    paths = Paths(tmp_path / "tree")
    paths.state.mkdir(parents=True)
    shutil.copyfile(template, paths.mlflow_database)
    write_tree(paths)
    return paths


def changed(**sections: dict[str, Any]) -> Params:
    """The repository's parameters with some of them changed."""
    return parameters.validate(parameters.overlay(parameters.read_yaml(REPOSITORY / "params.yaml"), sections), "test")


PARAMS = changed()


def write_tree(paths: Paths) -> None:
    """What is there before a training."""
    paths.pairs.mkdir(parents=True, exist_ok=True)
    write_json(paths.pairs / "manifest.json", {"images": 10})
    shutil.copyfile(REPOSITORY / "params.yaml", paths.params)
    (paths.root / "dvc.lock").write_text("schema: '2.0'\n")


def write_training(paths: Paths, weights: bytes = b"weights") -> str:
    """What train writes; returns the digest of the weights."""
    for directory in (paths.model, paths.train_curves, paths.previews):
        directory.mkdir(parents=True, exist_ok=True)
    (paths.model / "model.safetensors").write_bytes(weights)
    write_json(paths.model / "config.json", {"shape": [1, 8, 8]})
    write_json(paths.train_report, {"steps": 100, "images": 12800, "loss": LOSS[-1]["loss"], "heldout_mse": 0.3})
    write_csv(paths.train_curves / "loss.csv", LOSS)
    write_csv(paths.train_curves / "heldout.csv", HELDOUT)
    for row in HELDOUT:
        write_picture(paths.previews / f"step-{row['step']:08d}.png")
    return hashlib.sha256(weights).hexdigest()


def write_picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)).save(path)


def write_evaluation(paths: Paths, weights: str, mse: float = 0.3, pairs: str = "a" * 64) -> None:
    paths.evaluation.mkdir(parents=True, exist_ok=True)
    scores = {"mse": mse, "mse_low": mse - 0.01, "mse_high": mse + 0.01, "r2": 1 - mse, "zero_mse": 1.0}
    write_json(paths.evaluate_report, scores)
    write_json(paths.evaluation / "scored.json", {"weights_sha256": weights, "pairs_sha256": pairs})
    bands = [{"t_from": 100 * band, "t_to": 100 * band + 99, "mse": mse, "r2": 1 - mse} for band in range(10)]
    write_csv(paths.evaluation / "bands.csv", bands)
    write_csv(paths.evaluation / "mse_by_t.csv", [{"t": 5.5, "model": mse, "wiener": 0.6}])
    write_picture(paths.evaluation / "samples.png")
    write_picture(paths.evaluation / "mse_by_t.png")
    paths.report.write_text("<h1>Report</h1>")


def write_export(paths: Paths, weights: str, factor: float = 0.5) -> None:
    """An ONNX file with the denoiser's inputs and output: eps_hat = factor x_t."""
    image = ["B", 1, 8, 8]
    graph = helper.make_graph(
        [helper.make_node("Mul", ["x_t", "factor"], ["eps_hat"])],
        "denoiser",
        [
            helper.make_tensor_value_info("x_t", TensorProto.FLOAT, image),
            helper.make_tensor_value_info("t", TensorProto.INT64, ["B"]),
        ],
        [helper.make_tensor_value_info("eps_hat", TensorProto.FLOAT, image)],
        [helper.make_tensor("factor", TensorProto.FLOAT, [], [factor])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    helper.set_model_props(model, {"ddpm.weights_sha256": weights})
    paths.onnx.mkdir(parents=True, exist_ok=True)
    onnx.save_model(model, paths.denoiser)
    write_json(paths.export_report, {"max_difference": 1e-6, "mean_difference": 1e-7, "opset": 20})


def write_all(paths: Paths, weights: bytes = b"weights", mse: float = 0.3, pairs: str = "a" * 64) -> str:
    digest = write_training(paths, weights)
    write_evaluation(paths, digest, mse, pairs)
    write_export(paths, digest, factor=len(weights))
    return digest


def client_of(paths: Paths) -> MlflowClient:
    return MlflowClient(f"sqlite:///{paths.mlflow_database.resolve()}")


def runs_of(client: MlflowClient) -> list[Run]:
    experiment = client.get_experiment_by_name("ddpm")
    assert experiment is not None
    return list(client.search_runs([experiment.experiment_id]))


def content(client: MlflowClient, run_id: str) -> dict[str, Any]:
    """All that a store holds of a run, to be compared with what it holds later."""
    run = client.get_run(run_id)

    def files(path: str | None) -> Iterator[str]:
        for file in client.list_artifacts(run_id, path):
            if file.is_dir:
                yield from files(file.path)
            else:
                yield file.path

    return {
        "params": run.data.params,
        "tags": run.data.tags,
        "curves": {
            key: [(point.step, point.value) for point in client.get_metric_history(run_id, key)]
            for key in run.data.metrics
        },
        "files": sorted(files(None)),
        "datasets": sorted((d.dataset.name, d.dataset.digest, d.tags[0].value) for d in run.inputs.dataset_inputs),
        "versions": [
            (v.name, str(v.version), sorted(client.get_model_version(v.name, v.version).aliases), v.tags)
            for v in client.search_model_versions(f"run_id = '{run_id}'")
        ],
        "status": run.info.status,
    }


def image_steps(files: list[str]) -> list[int]:
    return sorted(
        int(name.split("+step+")[1].split("+")[0]) for name in files if name.endswith(".png") and "+step+" in name
    )


def test_all_that_the_stages_wrote_is_in_one_run(paths: Paths) -> None:
    weights = write_all(paths)
    recorded = tracking.record(PARAMS, paths)
    assert recorded is not None
    client = client_of(paths)
    (run,) = runs_of(client)
    assert run.info.run_id == recorded.run_id
    found = content(client, recorded.run_id)
    assert found["params"]["train.steps"] == "1000"
    assert found["params"]["network.channel_multipliers"] == "[1, 2]"
    assert set(found["params"]) == {
        f"{section}.{key}" for section, model in parameters.SECTIONS.items() for key in model.model_fields
    } | {"seed", "device"}
    assert found["tags"]["ddpm.weights_sha256"] == weights
    assert found["curves"]["train/loss"] == [(row["step"], row["loss"]) for row in LOSS]
    assert found["curves"]["train/heldout_mse"] == [(50, 0.4), (100, 0.3)]
    assert found["curves"]["train/steps"] == [(0, 100.0)]
    assert found["curves"]["evaluate/mse"] == [(0, 0.3)]
    assert found["curves"]["export/max_difference"] == [(0, 1e-6)]
    assert image_steps(found["files"]) == [50, 100]
    expected = {"params.yaml", "dvc.lock", "config.json"} | {
        f"evaluation/{name}" for name in ("bands.csv", "bands.json", "samples.png", "mse_by_t.png", "report.html")
    }
    assert expected <= set(found["files"])
    manifest = sha256(paths.pairs / "manifest.json")[:36]
    assert found["datasets"] == [("digits", manifest, "training"), ("digits-heldout", "a" * 36, "heldout")]
    assert found["status"] == "FINISHED"
    ((name, version, aliases, tags),) = found["versions"]
    assert (name, version, aliases) == ("ddpm", "1", ["challenger", "champion"])
    assert (tags["mse"], tags["r2"], tags["ddpm.weights_sha256"]) == ("0.3", "0.7", weights)
    assert recorded.model_version == "1"
    assert recorded.aliases == ["challenger", "champion"]
    table = client.search_runs([run.info.experiment_id])[0].data.tags["mlflow.loggedArtifacts"]
    assert json.loads(table) == [{"path": "evaluation/bands.json", "type": "table"}]


def test_the_registered_model_runs_from_the_registry(paths: Paths) -> None:
    write_all(paths, b"123")
    tracking.record(PARAMS, paths)
    model = mlflow.pyfunc.load_model("models:/ddpm@champion")
    x_t = np.ones((5, 1, 8, 8), np.float32)
    assert np.array_equal(model.predict({"x_t": x_t, "t": np.arange(5)})["eps_hat"], 3 * x_t)
    inputs = {spec.name: (spec.type, spec.shape) for spec in model.metadata.get_input_schema().inputs}
    assert inputs == {"x_t": (np.dtype("float32"), (-1, 1, 8, 8)), "t": (np.dtype("int64"), (-1,))}
    directory = Path(mlflow.artifacts.download_artifacts("models:/ddpm@champion"))
    assert not [file for file in directory.rglob("*") if "pickle" in file.name or file.suffix == ".pkl"]


def test_recording_again_adds_nothing(paths: Paths) -> None:
    write_all(paths)
    first = tracking.record(PARAMS, paths)
    assert first is not None
    before = content(client_of(paths), first.run_id)
    assert tracking.record(PARAMS, paths) == first
    assert content(client_of(paths), first.run_id) == before
    assert len(runs_of(client_of(paths))) == 1


def test_stages_log_to_the_run_of_their_weights_from_their_own_processes(paths: Paths) -> None:
    digest = write_training(paths)
    after_train = tracking.record(PARAMS, paths)
    write_evaluation(paths, digest)
    after_evaluate = tracking.record(PARAMS, paths)
    write_export(paths, digest)
    after_export = tracking.record(PARAMS, paths)
    assert after_train
    assert after_evaluate
    assert after_export
    assert after_train.run_id == after_evaluate.run_id == after_export.run_id
    assert (after_train.model_version, after_export.model_version) == (None, "1")


def test_other_weights_get_another_run_and_no_part_of_older_results(paths: Paths) -> None:
    write_all(paths)
    first = tracking.record(PARAMS, paths)
    write_training(paths, b"other")  # evaluation and export of the first weights still lie there
    second = tracking.record(PARAMS, paths)
    assert first
    assert second
    assert first.run_id != second.run_id
    found = content(client_of(paths), second.run_id)
    assert second.model_version is None
    assert "evaluate/mse" not in found["curves"]
    assert found["versions"] == []


def test_evaluating_again_replaces_the_scores(paths: Paths) -> None:
    digest = write_all(paths)
    first = tracking.record(PARAMS, paths)
    assert first is not None
    write_evaluation(paths, digest, mse=0.25)
    again = tracking.record(changed(evaluate={"resamples": 200}), paths)
    assert again is not None
    assert (again.run_id, again.model_version) == (first.run_id, "1")
    client = client_of(paths)
    run = client.get_run(first.run_id)
    assert run.data.metrics["evaluate/mse"] == 0.25
    assert run.data.params["evaluate.resamples"] == "1000"
    assert run.data.tags["evaluate.resamples"] == "200"
    assert client.get_model_version("ddpm", "1").tags["mse"] == "0.25"
    table = client.load_table(run.info.experiment_id, "evaluation/bands.json", run_ids=[first.run_id])
    assert table["mse"].tolist() == [0.25] * 10


@pytest.mark.parametrize(
    ("mse", "pairs", "champion"),
    [
        (0.2, "a", "2"),  # better on the same pairs
        (0.3, "a", "1"),  # not better
        (0.2, "b", "1"),  # better, but on other pairs
    ],
)
def test_champion(paths: Paths, mse: float, pairs: str, champion: str, capfd: pytest.CaptureFixture[str]) -> None:
    write_all(paths, b"first", mse=0.3)
    tracking.record(PARAMS, paths)
    write_all(paths, b"second", mse=mse, pairs=pairs * 64)
    recorded = tracking.record(PARAMS, paths)
    assert recorded is not None
    aliases = client_of(paths).get_registered_model("ddpm").aliases
    assert {alias: str(version) for alias, version in aliases.items()} == {"challenger": "2", "champion": champion}
    assert recorded.aliases == (["challenger", "champion"] if champion == "2" else ["challenger"])
    said = capfd.readouterr().err.splitlines()
    other = "MLflow: champion stays ddpm version 1: it was scored on other held-out pairs"
    assert said == ([other] if pairs == "b" else [])


def test_the_gate_keeps_a_poor_model_from_becoming_champion(paths: Paths) -> None:
    write_all(paths, mse=0.6)
    recorded = tracking.record(PARAMS, paths)
    assert recorded is not None
    assert recorded.aliases == ["challenger"]
    recorded = tracking.record(changed(tracking={"max_mse": 0.7}), paths)
    assert recorded is not None
    assert recorded.aliases == ["challenger", "champion"]


def test_an_older_run_tracked_again_does_not_become_challenger(paths: Paths) -> None:
    write_all(paths, b"old", mse=0.2)
    tracking.record(PARAMS, paths)
    write_all(paths, b"new", mse=0.3)
    tracking.record(PARAMS, paths)
    write_all(paths, b"old", mse=0.2)
    recorded = tracking.record(PARAMS, paths)
    assert recorded is not None
    assert (recorded.model_version, recorded.aliases) == ("1", ["champion"])


def follow(live: tracking.LiveRun, paths: Paths, steps: range) -> None:
    """What a training says while it goes through `steps`."""
    for row in LOSS:
        if row["step"] in steps:
            values = {key: value for key, value in row.items() if key != "step"}
            live.metrics({**values, "images_per_second": 1000.0}, int(row["step"]))
    for row in HELDOUT:
        if row["step"] in steps:
            picture = paths.state / "picture.png"
            write_picture(picture)
            live.metrics({"heldout_mse": row["mse"]}, int(row["step"]))
            live.image(picture, int(row["step"]))
            picture.unlink()


@pytest.mark.parametrize("known", [True, False])
def test_a_training_that_was_interrupted_goes_on_in_its_run(paths: Paths, known: bool) -> None:
    live = tracking.live(PARAMS, paths, None, "f1")
    follow(live, paths, range(81))  # the checkpoint is of step 50: what came later is trained again
    with pytest.raises(Stopped), live:
        raise Stopped(signal.SIGTERM)
    assert live.run_id is not None
    client = client_of(paths)
    assert client.get_run(live.run_id).info.status == "KILLED"
    with tracking.live(PARAMS, paths, live.run_id if known else None, "f1") as again:
        assert again.run_id == live.run_id
        assert client.get_run(live.run_id).info.status == "RUNNING"
        follow(again, paths, range(51, 101))
    write_all(paths)
    recorded = tracking.record(PARAMS, paths, live.run_id)
    assert recorded is not None
    assert recorded.run_id == live.run_id
    assert len(runs_of(client)) == 1
    found = content(client, live.run_id)
    assert found["curves"]["train/loss"] == [(row["step"], row["loss"]) for row in LOSS]
    assert found["curves"]["train/images_per_second"] == [(row["step"], 1000.0) for row in LOSS]
    assert found["curves"]["train/heldout_mse"] == [(50, 0.4), (100, 0.3)]
    assert image_steps(found["files"]) == [50, 100]
    assert found["status"] == "FINISHED"


def test_a_failed_training_is_marked_so(paths: Paths) -> None:
    live = tracking.live(PARAMS, paths, None, "f1")
    with pytest.raises(ZeroDivisionError), live:
        raise ZeroDivisionError
    assert live.run_id is not None
    assert client_of(paths).get_run(live.run_id).info.status == "FAILED"


def train_again(paths: Paths, fingerprint: str, weights: bytes) -> tuple[str, str]:
    """A whole training; returns the runs that it was followed and recorded in."""
    with tracking.live(PARAMS, paths, None, fingerprint) as live:
        follow(live, paths, range(101))
    write_training(paths, weights)
    recorded = tracking.record(PARAMS, paths, live.run_id)
    assert live.run_id is not None
    assert recorded is not None
    return live.run_id, recorded.run_id


def test_trainings_that_give_the_same_weights_share_a_run(paths: Paths) -> None:
    _, first = train_again(paths, "f1", b"weights")
    assert train_again(paths, "f1", b"weights") == (first, first)  # forced
    followed, recorded = train_again(paths, "f2", b"weights")  # by code that changed without effect
    assert recorded == first
    assert followed != first
    (run,) = runs_of(client_of(paths))
    assert (run.info.run_id, run.info.status) == (first, "FINISHED")
    followed, recorded = train_again(paths, "f1", b"others")  # an equal training on another machine
    assert (followed, recorded != first) == (first, True)
    assert [run.info.status for run in runs_of(client_of(paths))] == ["FINISHED", "FINISHED"]


def test_the_code_is_named_by_the_workspace_or_by_git(paths: Paths) -> None:
    write_training(paths, b"in a workspace")
    run = {"name": "brave-otter", "flow_run_id": "17", "created": 0, "git_revision": "abc", "git_dirty": True}
    write_json(paths.root / "run.json", run)
    recorded = tracking.record(PARAMS, paths)
    assert recorded is not None
    tags = client_of(paths).get_run(recorded.run_id).data.tags
    names = ("mlflow.runName", "ddpm.flow_run_id", "mlflow.source.git.commit", "ddpm.git_dirty")
    assert [tags[name] for name in names] == ["brave-otter", "17", "abc", "true"]

    (paths.root / "run.json").unlink()
    write_training(paths, b"in a repository")
    (paths.root / ".gitignore").write_text("/models\n/reports\n/data\n/.ddpm\n")
    git = ["git", "-C", str(paths.root), "-c", "user.name=t", "-c", "user.email=t@localhost"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "all"]):
        subprocess.run([*git, *command], check=True)
    (paths.root / "dvc.lock").write_text("changed by dvc repro\n")
    recorded = tracking.record(PARAMS, paths)
    assert recorded is not None
    tags = client_of(paths).get_run(recorded.run_id).data.tags
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    assert (tags["mlflow.source.git.commit"], tags["ddpm.git_dirty"]) == (head, "false")


def test_each_tree_has_its_own_store_in_the_same_process(tmp_path: Path, template: Path) -> None:
    trees = [Paths(tmp_path / name) for name in ("first", "second")]
    for paths in trees:
        paths.state.mkdir(parents=True)
        shutil.copyfile(template, paths.mlflow_database)
        write_tree(paths)
        write_training(paths)
        assert tracking.record(PARAMS, paths) is not None
    assert [len(runs_of(client_of(paths))) for paths in trees] == [1, 1]


def in_another_process(paths: Paths, code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    program = f"""
from pathlib import Path
from diffusion import params, tracking
from diffusion.paths import Paths
paths = Paths(Path({str(paths.root)!r}))
params = params.load(paths.params)
{code}
"""
    return subprocess.run(
        [sys.executable, "-c", program],
        cwd=REPOSITORY,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )


def test_processes_that_record_at_once_in_a_new_store_make_one_run_and_say_nothing(paths: Paths) -> None:
    write_all(paths)
    paths.mlflow_database.unlink()
    with ThreadPoolExecutor(2) as pool:
        done = list(
            pool.map(lambda _: in_another_process(paths, "print(tracking.record(params, paths).run_id)"), range(2))
        )
    (run,) = runs_of(client_of(paths))
    assert [(process.stdout, process.stderr) for process in done] == [(f"{run.info.run_id}\n", "")] * 2
    assert len(client_of(paths).search_model_versions()) == 1
    assert len(client_of(paths).search_logged_models([run.info.experiment_id])) == 1
    assert not (REPOSITORY / "mlruns").exists()


def test_importing_tracking_does_not_import_mlflow() -> None:
    code = "import sys, diffusion.tracking; assert 'mlflow' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def test_without_mlflow_a_training_goes_on_and_says_so_once(
    paths: Paths, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    uri = f"http://127.0.0.1:{free_port()}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    start = time.monotonic()
    with tracking.live(PARAMS, paths, "kept", "f1") as live:
        follow(live, paths, range(101))
    write_all(paths)
    assert tracking.record(PARAMS, paths, live.run_id) is None
    assert time.monotonic() - start < 10
    assert live.run_id == "kept"
    (line,) = capfd.readouterr().err.splitlines()
    assert line == (
        f"MLflow: {uri} cannot be used ([Errno 111] Connection refused); going on without it, "
        "`ddpm track` brings the results there later"
    )
    with pytest.raises(UserError, match=rf"^MLflow at {uri}: \[Errno 111\] Connection refused$"):
        tracking.track(PARAMS, paths, as_json=False)


def test_a_server_that_does_not_answer_is_given_up_soon(
    paths: Paths, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{listener.getsockname()[1]}")
        start = time.monotonic()
        assert tracking.live(PARAMS, paths, None, "f1").run_id is None
        assert time.monotonic() - start < 5
    assert len(capfd.readouterr().err.splitlines()) == 1


def test_a_store_that_fails_while_training_does_not_end_it(paths: Paths, capfd: pytest.CaptureFixture[str]) -> None:
    with tracking.live(PARAMS, paths, None, "f1") as live:
        follow(live, paths, range(51))
        assert live.run_id is not None
        client_of(paths).delete_run(live.run_id)  # now MLflow refuses what is logged to it
        follow(live, paths, range(51, 101))
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("MLflow: sqlite:///")
    write_all(paths)
    recorded = tracking.record(PARAMS, paths, live.run_id)
    assert recorded is not None
    assert content(client_of(paths), recorded.run_id)["curves"]["train/loss"] == [(r["step"], r["loss"]) for r in LOSS]


def test_track_prints_where_things_are(paths: Paths, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=r"model\.safetensors: missing"):
        tracking.track(PARAMS, paths, as_json=False)
    write_all(paths)
    tracking.track(PARAMS, paths, as_json=True)
    (line,) = capsys.readouterr().out.splitlines()
    found: Mapping[str, Any] = json.loads(line)
    assert found["model_version"] == "1"
    assert found["aliases"] == ["challenger", "champion"]
    tracking.track(PARAMS, paths, as_json=False)
    assert capsys.readouterr().out.splitlines() == [
        f"run      {found['run_id']}",
        f"address  {found['url']}",
        "model    ddpm version 1 (challenger, champion)",
    ]


@pytest.fixture
def server(paths: Paths) -> Iterator[str]:
    """An MLflow server on the default store, started as the documentation of `tracking` says."""
    address = f"http://127.0.0.1:{(port := free_port())}"
    places = [f"sqlite:///{paths.mlflow_database.resolve()}", str(paths.mlflow_artifacts.resolve())]
    command = ["-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    with (paths.state / "server.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, *command, "--backend-store-uri", places[0], "--default-artifact-root", places[1]],
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            deadline = time.monotonic() + 60
            while not answers(port):
                assert process.poll() is None, (paths.state / "server.log").read_text()
                assert time.monotonic() < deadline
                time.sleep(0.2)
            yield address
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(20)


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.parametrize("first", ["server", "file"])
def test_a_server_and_the_file_are_one_store(
    paths: Paths, server: str, first: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An experiment made through either is gone on with through the other, and the server shows its artifacts."""
    uris = {"server": server, "file": ""}  # empty: the default
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uris.pop(first))
    with tracking.live(PARAMS, paths, None, "f1") as live:
        follow(live, paths, range(101))
    digest = write_training(paths)
    after_train = tracking.record(PARAMS, paths, live.run_id)
    (other,) = uris.values()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", other)
    write_evaluation(paths, digest)
    write_export(paths, digest)
    recorded = tracking.record(PARAMS, paths)
    assert after_train is not None
    assert recorded is not None
    assert recorded.run_id == after_train.run_id == live.run_id
    assert recorded.aliases == ["challenger", "champion"]
    through_server, direct = MlflowClient(server), client_of(paths)
    found = content(through_server, recorded.run_id)
    assert found["files"] == content(direct, recorded.run_id)["files"]
    assert image_steps(found["files"]) == [50, 100]
    picture = next(name for name in found["files"] if name.endswith("+compressed.webp"))
    response = mlflow.utils.rest_utils.http_request(
        mlflow.utils.rest_utils.MlflowHostCreds(server),
        "/get-artifact",
        "GET",
        params={"run_uuid": recorded.run_id, "path": picture},
    )
    assert response.content[:4] == b"RIFF"

"""Stores: files, a server, several processes, and none at all."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import mlflow
import pytest
from mlflow import MlflowClient

from diffusion.errors import UserError
from flows import tracking
from flows.paths import Paths
from tests.flows.tracking.trees import (
    LOSS,
    PARAMS,
    REPOSITORY,
    changed,
    client_of,
    content,
    follow,
    image_steps,
    runs_of,
    write_all,
    write_evaluation,
    write_export,
    write_training,
)
from tests.machine import free_port

pytestmark = pytest.mark.slow


def in_another_process(paths: Paths, code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    program = f"""
from pathlib import Path
from flows import params, tracking
from flows.paths import Paths
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
    models = client_of(paths).search_logged_models([run.info.experiment_id])
    assert sorted(model.name for model in models) == ["sampler", "weights"]
    assert not (REPOSITORY / "mlruns").exists()


def test_importing_tracking_does_not_import_mlflow() -> None:
    code = "import sys, flows.tracking; assert 'mlflow' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True)


def test_without_mlflow_training_continues_and_says_so_once(
    paths: Paths, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    uri = f"http://127.0.0.1:{free_port()}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with tracking.live(PARAMS, paths, "kept", "f1") as live:
        follow(live, paths, range(101))
    write_all(paths)
    assert tracking.record(PARAMS, paths, live.run_id) is None
    assert live.run_id == "kept"
    (line,) = capfd.readouterr().err.splitlines()
    assert line == (
        f"MLflow: {uri} cannot be used ([Errno 111] Connection refused); continuing without it; "
        "`ddpm track` records the results later"
    )
    with pytest.raises(UserError, match=rf"^MLflow at {uri}: \[Errno 111\] Connection refused$"):
        tracking.track(PARAMS, paths, as_json=False)


def test_a_server_that_does_not_answer_is_tried_twice(
    paths: Paths, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{listener.getsockname()[1]}")
        assert tracking.live(PARAMS, paths, None, "f1").run_id is None
        listener.setblocking(False)
        for _ in range(3):  # the first one asks only whether anything listens
            listener.accept()[0].close()
        with pytest.raises(BlockingIOError):
            listener.accept()
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
    assert content(client_of(paths), recorded.run_id)["curves"]["curves/loss"] == [(r["step"], r["loss"]) for r in LOSS]


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
            env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},  # seven processes for unused jobs
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


def test_a_server_and_the_file_are_one_store(paths: Paths, server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An experiment made through either is gone on with through the other, and the server shows its artifacts."""
    for name, first, then in (("by-server", server, ""), ("by-file", "", server)):  # empty: the default
        params = changed(tracking={"experiment": name, "model_name": name})
        monkeypatch.setenv("MLFLOW_TRACKING_URI", first)
        with tracking.live(params, paths, None, "f1") as live:
            follow(live, paths, range(101))
        digest = write_training(paths, params=params)
        after_train = tracking.record(params, paths, live.run_id)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", then)
        write_evaluation(paths, digest, params=params)
        write_export(paths, digest, params=params)
        recorded = tracking.record(params, paths)
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
        for report in (paths.evaluate_report, paths.export_report):
            report.unlink()

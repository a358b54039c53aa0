"""The registered model in MLflow's own model server."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import numpy as np
import onnx
import onnxruntime as ort
import pytest

from diffusion.export import metadata
from flows import made_with, tracking
from flows.paths import Paths
from tests.deploy.models import write_model
from tests.export.test_sampler_graph import SHAPE
from tests.flows.tracking.trees import PARAMS, write_evaluation, write_export, write_training
from tests.machine import free_port

pytestmark = pytest.mark.slow


def registered(paths: Paths) -> Path:
    """A champion, of a sampler with random weights."""
    digest = write_training(paths)
    write_evaluation(paths, digest)
    write_export(paths, digest)
    graph = onnx.load(write_model(paths.sampler, "dpm-solver++", False))
    facts = {prop.key: prop.value for prop in graph.metadata_props}
    metadata.describe(graph, facts | {"ddpm.weights_sha256": digest})
    onnx.save(graph, paths.sampler)
    made_with.write(paths, "export", PARAMS)
    recorded = tracking.record(PARAMS, paths)
    assert recorded
    assert "champion" in recorded.aliases
    return paths.sampler


def test_mlflow_answers_with_pictures(paths: Paths, tmp_path: Path) -> None:
    path = registered(paths)
    host, port = "127.0.0.1", str(free_port())
    command = ["-m", "mlflow", "models", "serve", "-m", "models:/ddpm@champion", "--env-manager", "local"]
    environment = {
        **os.environ,
        "MLFLOW_TRACKING_URI": f"sqlite:///{paths.mlflow_database.resolve()}",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    with (tmp_path / "log").open("wb") as log:
        server = subprocess.Popen(
            [sys.executable, *command, "--host", host, "--port", port],
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        while True:
            assert server.poll() is None, (tmp_path / "log").read_text()
            try:
                httpx.get(f"http://{host}:{port}/ping").raise_for_status()
                break
            except httpx.HTTPError:
                time.sleep(0.1)
        noise = np.random.default_rng(0).standard_normal((3, *SHAPE), np.float32)
        body = {"inputs": {"noise": noise.tolist(), "steps": [2]}}
        answer = httpx.post(f"http://{host}:{port}/invocations", json=body, timeout=60)
        assert answer.status_code == 200, answer.text
        images = np.array(answer.json()["predictions"]["images"], np.uint8)
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait()
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert np.array_equal(images, session.run(["images"], {"noise": noise, "steps": np.array([2])})[0])

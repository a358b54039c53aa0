"""The registered model in MLflow's own model server."""

import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import httpx
import mlflow
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from fastapi.testclient import TestClient

from diffusion.export import metadata
from flows import made_with, tracking
from flows.paths import Paths
from tests.deploy.models import write_model
from tests.export.test_sampler_graph import SHAPE
from tests.flows.tracking.trees import PARAMS, write_evaluation, write_export, write_training
from tests.machine import free_port

pytestmark = pytest.mark.slow


NOISE = np.random.default_rng(0).standard_normal((3, *SHAPE), np.float32)
STEPS_NOISE = np.random.default_rng(1).standard_normal((2, 3, *SHAPE), np.float32)
Y, GUIDANCE = [2, -1, 0], [2]  # an integer, as a user may well write it


def registered(paths: Paths, sampler: str) -> Path:
    """A champion: a sampler with random weights, of a model with classes."""
    digest = write_training(paths)
    write_evaluation(paths, digest)
    write_export(paths, digest)
    graph = onnx.load(write_model(paths.sampler, sampler, True))
    facts = {prop.key: prop.value for prop in graph.metadata_props}
    metadata.describe(graph, facts | {"ddpm.weights_sha256": digest})
    onnx.save(graph, paths.sampler)
    made_with.write(paths, "export", PARAMS)
    recorded = tracking.record(PARAMS, paths)
    assert recorded
    assert "champion" in recorded.aliases
    return paths.sampler


def test_mlflow_answers_with_pictures(paths: Paths, tmp_path: Path) -> None:
    path = registered(paths, "dpm-solver++")
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
        body = {"inputs": {"noise": NOISE.tolist(), "steps": [2], "y": Y, "guidance": GUIDANCE}}
        answer = httpx.post(f"http://{host}:{port}/invocations", json=body, timeout=60)
        assert answer.status_code == 200, answer.text
        images = np.array(answer.json()["predictions"]["images"], np.uint8)
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait()
    feeds = {"noise": NOISE, "steps": np.array([2]), "y": np.array(Y), "guidance": np.float32(GUIDANCE)}
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert np.array_equal(images, session.run(["images"], feeds)[0])


@pytest.mark.parametrize(
    ("sampler", "further"),
    [
        ("consistency", {"steps": [2], "y": Y}),
        ("ddpm", {"steps_noise": STEPS_NOISE.tolist(), "y": Y, "guidance": GUIDANCE}),
    ],
)
def test_the_inputs_of_other_kinds_of_models(paths: Paths, sampler: str, further: dict[str, Any]) -> None:
    path = registered(paths, sampler)
    mlflow.set_tracking_uri(f"sqlite:///{paths.mlflow_database.resolve()}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # mlflow.pyfunc warns about its own type hints
        from mlflow.pyfunc import load_model, scoring_server
    client = TestClient(scoring_server.init(load_model("models:/ddpm@champion")))
    answer = client.post("/invocations", json={"inputs": {"noise": NOISE.tolist(), **further}})
    assert answer.status_code == 200, answer.text
    feeds = {"noise": NOISE} | {name: np.array(value) for name, value in further.items()}
    feeds |= {name: feeds[name].astype(np.float32) for name in {"steps_noise", "guidance"} & set(feeds)}
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert np.array_equal(answer.json()["predictions"]["images"], session.run(["images"], feeds)[0])
    (example,) = paths.state.rglob("serving_input_example.json")
    answer = client.post("/invocations", content=example.read_bytes(), headers={"Content-Type": "application/json"})
    assert np.array(answer.json()["predictions"]["images"]).shape == (1, *SHAPE[1:], SHAPE[0])

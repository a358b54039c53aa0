"""The servers that service_compare.py compares, with the same sampler.onnx, and how each is asked for an image."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
from numpy.typing import NDArray

REPOSITORY = Path(__file__).parents[2]
START_SECONDS = 120
STEPS = 10


@dataclass(frozen=True)
class Request:
    """A request, as the clients are told of it."""

    path: str
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)

    def told(self) -> dict[str, Any]:
        method = "POST" if self.body else "GET"
        return {
            "method": method,
            "path": self.path,
            "headers": self.headers,
            "body": base64.b64encode(self.body).decode(),
        }

    def send(self, url: str) -> httpx.Response:
        with httpx.Client(base_url=url, timeout=60) as client:
            return client.request("POST" if self.body else "GET", self.path, content=self.body, headers=self.headers)


JSON = {"Content-Type": "application/json"}


def noise(shape: tuple[int, ...]) -> NDArray[np.float32]:
    """The noise of one image, (1, C, H, W)."""
    return np.random.default_rng(7).standard_normal((1, *shape), np.float32)


def tensors(shape: tuple[int, ...], binary: bool = False) -> tuple[list[dict[str, Any]], bytes]:
    """The inputs of an inference for one image, and the bytes that follow the JSON."""
    value = noise(shape)
    first: dict[str, Any] = {"name": "noise", "shape": value.shape, "datatype": "FP32"}
    first |= {"parameters": {"binary_data_size": value.nbytes}} if binary else {"data": value.ravel().tolist()}
    return [first, {"name": "steps", "shape": [1], "datatype": "INT64", "data": [STEPS]}], value.tobytes()


def inference(shape: tuple[int, ...]) -> Request:
    """Of the Open Inference Protocol, in JSON; the answer has all outputs."""
    return Request("/v2/models/ddpm/infer", json.dumps({"inputs": tensors(shape)[0]}).encode(), JSON)


def binary(shape: tuple[int, ...]) -> Request:
    """The same in the binary tensor extension."""
    inputs, follows = tensors(shape, binary=True)
    head = json.dumps({"inputs": inputs, "parameters": {"binary_data_output": True}}).encode()
    headers = {"Content-Type": "application/octet-stream", "Inference-Header-Content-Length": str(len(head))}
    return Request("/v2/models/ddpm/infer", head + follows, headers)


def invocation(shape: tuple[int, ...]) -> Request:
    """The same for MLflow."""
    body = {"inputs": {"noise": noise(shape).tolist(), "steps": [STEPS]}}
    return Request("/invocations", json.dumps(body).encode(), JSON)


def picture(images: int = 1) -> Request:
    """A PNG; without a seed, so that each is another."""
    return Request(f"/images?n={images}&steps={STEPS}")


def images_in(content: bytes) -> list[int]:
    """The values of the output `images` in an answer of any of the servers."""
    answer = json.loads(content)
    if "outputs" in answer:
        return next(each["data"] for each in answer["outputs"] if each["name"] == "images")
    return np.ravel(answer["predictions"]["images"]).tolist()


@dataclass
class Running:
    """A server and the processes it started."""

    process: subprocess.Popen[bytes]
    url: str

    def all(self) -> list[psutil.Process]:
        main = psutil.Process(self.process.pid)
        return [main, *main.children(recursive=True)]

    def memory(self) -> float:
        """In MiB, of all processes, with what they share counted once."""
        total = 0
        for each in self.all():
            with contextlib.suppress(psutil.NoSuchProcess):
                total += each.memory_full_info().pss
        return total / 2**20

    def cpu(self) -> float:
        """Processor time of all processes in seconds."""
        total = 0.0
        for each in self.all():
            with contextlib.suppress(psutil.NoSuchProcess):
                total += sum(each.cpu_times()[:2])
        return total

    def rss(self) -> float:
        """Of the main process, in MiB."""
        return psutil.Process(self.process.pid).memory_info().rss / 2**20

    def peak_rss(self) -> float:
        """Of the main process, in MiB."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 2**10


Start = Callable[[Path, Path, int], tuple[list[str], dict[str, str]]]
"""Prepares a folder for a sampler.onnx and a port; returns a command and environment variables."""


@dataclass(frozen=True)
class Server:
    """A server with settings."""

    name: str
    start: Start
    ready: str
    ask: Callable[[tuple[int, ...]], Request]

    @contextmanager
    def running(self, model: Path) -> Iterator[Running]:
        """Start it with a model, wait until it is ready, and end it."""
        with tempfile.TemporaryDirectory() as directory:
            port = free_port()
            command, environment = self.start(model.resolve(), Path(directory), port)
            log = Path(directory) / "log"
            with log.open("wb") as output:
                process = subprocess.Popen(
                    command, cwd=directory, stdout=output, stderr=output, start_new_session=True,
                    env={**os.environ, "PYTHONPATH": str(REPOSITORY), **environment},
                )  # fmt: skip
            try:
                url, ends = f"http://127.0.0.1:{port}", time.monotonic() + START_SECONDS
                while not is_ready(url + self.ready):
                    if process.poll() is not None or time.monotonic() > ends:
                        sys.exit(f"{self.name} did not start: {' '.join(command)}\n{log.read_text()[-2000:]}")
                    time.sleep(0.2)
                yield Running(process, url)
            finally:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


def is_ready(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


def service(model: Path, _: Path, port: int) -> tuple[list[str], dict[str, str]]:
    return [sys.executable, "-m", "deploy.service", "--model", str(model), "--port", str(port)], {}


def mlflow(workers: int, threads: int) -> Start:
    """`mlflow models serve` with a number of processes, and of ONNX Runtime's threads in each."""

    def start(model: Path, folder: Path, port: int) -> tuple[list[str], dict[str, str]]:
        import mlflow.onnx
        import onnx

        options = {"intra_op_num_threads": threads}
        mlflow.onnx.save_model(onnx.load(model), folder / "model", onnx_session_options=options, pip_requirements=[])
        command = [sys.executable, "-m", "mlflow", "models", "serve", "--model-uri", str(folder / "model")]
        command += ["--env-manager", "local", "--workers", str(workers), "--port", str(port), "--timeout", "300"]
        return command, {"UVICORN_ACCESS_LOG": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}

    return start


def mlserver(program: Path, workers: int, threads: int) -> Start:
    """MLServer with adaptive batching; `workers` is `parallel_workers`, 0 for the process of the server itself."""

    def start(model: Path, folder: Path, port: int) -> tuple[list[str], dict[str, str]]:
        settings = {
            "debug": False, "host": "127.0.0.1", "http_port": port, "grpc_port": free_port(), "metrics_endpoint": None,
            "parallel_workers": workers, "gzip_enabled": False,
        }  # fmt: skip
        (folder / "settings.json").write_text(json.dumps(settings))
        settings = {
            "name": "ddpm", "implementation": "mlserver_runtime.Sampler", "max_batch_size": 64, "max_batch_time": 0.005,
            "parameters": {"uri": str(model), "extra": {"threads": threads}},
        }  # fmt: skip
        (folder / "model-settings.json").write_text(json.dumps(settings))
        return [str(program), "start", str(folder)], {"PYTHONPATH": str(Path(__file__).parent)}

    return start

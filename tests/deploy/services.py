"""deploy/service for tests: in this process or in a separate one."""

import asyncio
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import httpx
import numpy as np
import onnxruntime as ort
from fastapi import FastAPI
from numpy.typing import NDArray

from deploy.service.app import create
from deploy.service.batching import Batcher
from deploy.service.metrics import Metrics
from deploy.service.models import Model
from deploy.service.served import Models
from deploy.service.state import Service
from deploy.service.work import Feeds
from diffusion.export import runtime
from tests.deploy.models import write_model

REPOSITORY = Path(__file__).parents[2]
INFER = "/v2/models/ddpm/infer"
WHOLE: dict[str, ort.InferenceSession] = {}
"""Sessions of the files that are served, by digest."""


def load(content: bytes, version: str | None, name: str) -> Model:
    model = Model(content, version, name)
    WHOLE[model.digest] = runtime.session(content, None, 1)
    return model


def service(*given: Path | str, max_batch: int = 8, max_waiting: int = 128, **limits: int) -> Service:
    """A service with these models, each as in `--model`."""
    models = Models(load)
    for each in given:
        models.add(str(each))
    metrics = Metrics(models)
    batcher = Batcher(max_batch, max_waiting, observe=metrics.batch)
    return Service(models, batcher, metrics, **{"max_images": 16, **limits})


@cache
def shared(sampler: str, classes: bool) -> Service:
    """A service shared by several tests."""
    with TemporaryDirectory() as directory:
        return service(write_model(Path(directory) / "sampler.onnx", sampler, classes))


def ask(service: Service, *requests: httpx.Request) -> list[httpx.Response]:
    """Send requests concurrently; returns the responses."""
    return answers(create(service), *requests)


def answers(app: FastAPI, *requests: httpx.Request) -> list[httpx.Response]:
    """The responses of an application to concurrent requests."""

    async def gather() -> list[httpx.Response]:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport) as client:
            return await asyncio.gather(*(client.send(request) for request in requests))

    return asyncio.run(gather())


def get(path: str, **headers: str) -> httpx.Request:
    return httpx.Request("GET", f"http://test{path}", headers=headers)


def post(body: Any, path: str = INFER) -> httpx.Request:
    return httpx.Request("POST", f"http://test{path}", json=body)


def tensor(name: str, value: NDArray[Any], datatype: str = "") -> dict[str, Any]:
    datatype = datatype or {"f": "FP32", "i": "INT64"}[value.dtype.kind]
    return {"name": name, "datatype": datatype, "shape": list(value.shape), "data": value.reshape(-1).tolist()}


def received(answer: httpx.Response) -> dict[str, NDArray[Any]]:
    """The outputs in an inference response."""
    assert answer.status_code == 200, answer.text
    dtypes = {"FP32": np.float32, "UINT8": np.uint8}
    return {
        output["name"]: np.array(output["data"], dtypes[output["datatype"]]).reshape(output["shape"])
        for output in answer.json()["outputs"]
    }


def direct(service: Service, **feeds: Any) -> Feeds:
    """The outputs of the whole file in ONNX Runtime."""
    session = WHOLE[service.models.first.digest]
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {name: np.asarray(value) for name, value in feeds.items()}), strict=True))


def same(found: NDArray[Any], expected: NDArray[Any]) -> None:
    """Assert that images agree up to rounding, which depends on the batch size."""
    off = np.abs(found.astype(int) - expected.astype(int))
    assert off.max() <= 1
    assert (off > 0).mean() <= 0.001


class Running(NamedTuple):
    """A service in a separate process."""

    process: subprocess.Popen[bytes]
    url: str
    log: Path

    def lines(self, text: str) -> list[str]:
        return [line for line in self.log.read_text().splitlines() if text in line]

    def wait_for(self, text: str) -> None:
        """Wait until the log has a line with `text`; the timeout of the test is the limit."""
        while not self.lines(text):
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.02)


@contextmanager
def running(directory: Path, model: str, *options: str, **environment: str) -> Iterator[Running]:
    log = directory / "service.log"
    command = [sys.executable, "-m", "deploy.service", "--model", model, "--port", "0", "--threads", "1", *options]
    with log.open("wb") as file:
        process = subprocess.Popen(command, cwd=REPOSITORY, env={**os.environ, **environment}, stderr=file)
    started = Running(process, "", log)
    try:
        started.wait_for(" on http://")
        yield started._replace(url=re.findall(r"http://[\w.:\[\]]+", started.lines(" on http://")[0])[0])
    finally:
        process.kill()
        process.wait()

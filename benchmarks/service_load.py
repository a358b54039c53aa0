"""Throughput and latency of deploy/service, and requests lost while the champion changes and at shutdown.

Run it in a working tree with an exported model:

    python benchmarks/service_load.py

The service and the clients run in separate processes; the clients send `GET /images?n=...` requests over persistent
connections. Two services take turns, with and without dynamic batching (`--max-batch` of a single request). Then the
champion in a new MLflow store changes under the same load, and finally the service is shut down.
"""

import argparse
import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
from mlflow import MlflowClient

REPOSITORY = Path(__file__).parents[1]
CHANGE_SECONDS = 2.0
"""Seconds between changes of the champion."""


class Running(NamedTuple):
    """A running service."""

    process: subprocess.Popen[str]
    url: str


@contextmanager
def service(model: str, *options: str, **environment: str) -> Iterator[Running]:
    command = [sys.executable, "-m", "deploy.service", "--model", model, "--port", "0", *options]
    process = subprocess.Popen(
        command, cwd=REPOSITORY, env={**os.environ, **environment}, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stderr
        for line in process.stderr:
            if " on http://" in line:
                yield Running(process, line.split()[-1])
                return
        sys.exit(f"the service did not start; to see why, run {' '.join(command)}")
    finally:
        process.kill()
        process.wait()


async def ask(url: str, clients: int, images: int, seconds: float) -> dict[str, Any]:
    """Send requests with `clients` clients, each until its connection is refused; returns their outcomes."""
    taken, outcomes, versions = list[float](), Counter[str](), Counter[str]()
    ends = time.perf_counter() + seconds

    async def one() -> None:
        async with httpx.AsyncClient(base_url=url, timeout=60) as client:
            while (began := time.perf_counter()) < ends:
                try:
                    answer = await client.get("/images", params={"n": images})  # no seed: the cache has none
                except httpx.ConnectError:
                    outcomes["refused"] += 1
                    return
                except httpx.HTTPError:
                    outcomes["lost"] += 1
                    return
                taken.append(time.perf_counter() - began)
                outcomes[str(answer.status_code)] += 1
                versions[answer.headers.get("X-Model-Version", "")] += 1

    began = time.perf_counter()
    await asyncio.gather(*(one() for _ in range(clients)))
    elapsed = time.perf_counter() - began
    p50, p99 = np.quantile(taken, [0.5, 0.99]).tolist()
    rate = len(taken) / elapsed
    return {
        "requests_per_second": rate, "images_per_second": images * rate, "p50_ms": 1000 * p50, "p99_ms": 1000 * p99,
        "outcomes": dict(outcomes), "versions": dict(versions),
    }  # fmt: skip


@contextmanager
def clients(url: str, arguments: argparse.Namespace, seconds: float) -> Iterator[subprocess.Popen[str]]:
    """Run this program as the clients; it prints the result of `ask`."""
    command = [sys.executable, __file__, "--clients", str(arguments.clients), "--images", str(arguments.images)]
    command += ["--seconds", str(seconds), "--ask", url]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        yield process


def result(process: subprocess.Popen[str]) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(process.communicate()[0])
    return answer


def side_by_side(path: Path, arguments: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {"joined": [], "not joined": []}
    for _ in range(arguments.turns):
        for name, options in (("joined", []), ("not joined", ["--max-batch", str(arguments.images)])):
            with service(str(path), *options) as running, clients(running.url, arguments, arguments.seconds) as asking:
                found[name].append(result(asking))
    return found


def changing(path: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Change the champion every CHANGE_SECONDS seconds under load, then send SIGTERM."""
    with tempfile.TemporaryDirectory() as directory:
        uri = f"sqlite:///{directory}/mlflow.db"
        store = MlflowClient(uri)
        store.create_registered_model("ddpm")
        for number in ("1", "2"):
            folder = Path(directory) / number
            folder.mkdir()
            (folder / "model.onnx").write_bytes(path.read_bytes())
            store.create_model_version("ddpm", folder.as_uri())
        store.set_registered_model_alias("ddpm", "champion", "1")
        with (
            service("models:/ddpm@champion", "--poll", "0.2", MLFLOW_TRACKING_URI=uri) as running,
            clients(running.url, arguments, arguments.seconds + 30) as asking,
        ):
            changes = int(arguments.seconds / CHANGE_SECONDS)
            for change in range(changes):
                time.sleep(CHANGE_SECONDS)
                store.set_registered_model_alias("ddpm", "champion", "21"[change % 2])
            running.process.send_signal(signal.SIGTERM)
            found = result(asking)
            return found | {"changes": changes, "exit_status": running.process.wait()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--tree", type=Path, default=Path(), help="working tree with models/onnx")
    parser.add_argument("--clients", type=int, default=16, help="number of concurrent clients")
    parser.add_argument("--images", type=int, default=4, help="images per request")
    parser.add_argument("--seconds", type=float, default=10, help="seconds per turn")
    parser.add_argument("--turns", type=int, default=3, help="turns per service; the median is reported")
    parser.add_argument("--ask", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.ask:
        print(json.dumps(asyncio.run(ask(arguments.ask, arguments.clients, arguments.images, arguments.seconds))))
        return
    path = (arguments.tree / "models/onnx/sampler.onnx").resolve()
    found = side_by_side(path, arguments)
    print("| | requests/s | images/s | p50, ms | p99, ms |\n|---|---|---|---|---|")
    keys = ("requests_per_second", "images_per_second", "p50_ms", "p99_ms")
    for name, turns in found.items():
        print(f"| {name} | " + " | ".join(f"{np.median([turn[key] for turn in turns]):.0f}" for key in keys) + " |")
    print(json.dumps({"benchmark": "service_load", "turns": found, "changing": changing(path, arguments)}))


if __name__ == "__main__":
    main()

"""Pictures by HTTP from a sampler.onnx: `python -m deploy.service --model models:/ddpm@champion`."""

from __future__ import annotations

import argparse
import functools
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from deploy.service.app import Service, create
from deploy.service.batching import Batcher
from deploy.service.metrics import Metrics
from deploy.service.models import File, Model, ModelError, Registered, Served
from deploy.service.server import Server

log = logging.getLogger("ddpm.service")
ENVIRONMENT = {
    "DO_NOT_TRACK": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "CRITICAL",  # what goes wrong is raised, and said here in one line
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # it is asked again anyway
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "4",  # seconds; a question that is under way holds up the end
}


def positive_int(text: str) -> int:
    """Parse a positive integer."""
    if not text.isdecimal() or (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive integer (got {text})")
    return value


def non_negative(text: str) -> float:
    """Parse a non-negative number."""
    try:
        value = float(text)
    except ValueError:
        value = -1
    if not 0 <= value < threading.TIMEOUT_MAX:
        raise argparse.ArgumentTypeError(f"must be a non-negative number (got {text})")
    return value


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m deploy.service",
        description="Serve a sampler.onnx by HTTP: Open Inference Protocol v2, and pictures at /images.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )

    def option(name: str, **keywords: object) -> None:
        made.add_argument(f"--{name}", **keywords)  # type: ignore[arg-type]

    option(
        "model",
        required=True,
        default=argparse.SUPPRESS,
        help="a file, or models:/NAME@ALIAS or models:/NAME/VERSION in the MLflow of MLFLOW_TRACKING_URI",
    )
    option("name", default="ddpm", help="the model's name in paths")
    option("host", default="127.0.0.1", help="address to listen on")
    option("port", type=int, default=8000, help="port to listen on; 0 for a free one")
    option("device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: a GPU where ONNX Runtime can use it")
    option("threads", type=int, default=0, help="threads of ONNX Runtime; 0 for as many as there are cores")
    option("max-images", type=positive_int, default=64, help="images of a request")
    option("max-body", type=positive_int, default=64 * 2**20, help="bytes of a request")
    option("max-batch", type=positive_int, default=64, help="images of requests that are run together")
    option(
        "max-delay", type=non_negative, default=0, help="milliseconds that a request waits for others, if nothing runs"
    )
    option(
        "max-waiting", type=positive_int, default=512, help="images that may wait; beyond, requests are refused (503)"
    )
    option(
        "poll", type=non_negative, default=10, help="seconds between questions to MLflow which version the alias names"
    )
    option("drain", type=non_negative, default=1, help="seconds from SIGTERM until no new connections are accepted")
    return made


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; raises OSError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.create_server((host, port), family=family, backlog=2048)
    listener.setblocking(False)
    return listener


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    if arguments.max_waiting < arguments.max_images:
        parser().error("--max-waiting: must be at least --max-images, or the largest requests would never be answered")
    if not 0 <= arguments.port < 2**16:
        parser().error(f"--port: must be from 0 to 65535 (got {arguments.port})")
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # while the model loads there is nothing to end in order
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    logging.getLogger("urllib3").setLevel(logging.ERROR)  # what is retried
    try:
        source = Registered(arguments.model) if arguments.model.startswith("models:") else File(Path(arguments.model))
        served = Served(source, functools.partial(Model, device=arguments.device, threads=arguments.threads))
    except ModelError as error:
        print(f"error: --model {arguments.model}: {error}", file=sys.stderr)
        return 1
    try:
        listener = listen(arguments.host, arguments.port)
    except OSError as error:
        line = f"--host {arguments.host} --port {arguments.port}: cannot be listened on ({error.strerror})"
        print(f"error: {line}", file=sys.stderr)
        return 1

    metrics = Metrics(served)
    batcher = Batcher(arguments.max_batch, arguments.max_waiting, arguments.max_delay / 1000, metrics.batch)
    service = Service(arguments.name, served, batcher, metrics, arguments.max_images, arguments.max_body)
    stop = threading.Event()
    if isinstance(source, Registered) and source.alias:
        threading.Thread(target=served.follow, args=(max(arguments.poll, 0.1), stop)).start()
    try:
        Server(create(service), service, arguments.drain).run([listener])
    finally:
        stop.set()
    log.info("ended")
    return 0


if __name__ == "__main__":
    sys.exit(main())

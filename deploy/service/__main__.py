"""Serve images from a sampler.onnx over HTTP: `python -m deploy.service --model models:/ddpm@champion`."""

from __future__ import annotations

import errno
import logging
import os
import resource
import signal
import socket
import sys
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

from deploy.service import logs
from deploy.service.app import create
from deploy.service.batching import Batcher
from deploy.service.keys import KeysError, required
from deploy.service.metrics import Metrics
from deploy.service.models import ModelError
from deploy.service.options import parser
from deploy.service.served import Models
from deploy.service.server import BACKLOG, Server
from deploy.service.state import Pictures, Service
from deploy.service.threads import Loader

if TYPE_CHECKING:  # imported only if asked for
    from deploy.service.telemetry import Telemetry

log = logging.getLogger("ddpm.service")
SLICE_SECONDS = 0.2
"""How long a batch may run, so that a short request waits no longer for a long one, nor the end of the service."""
FOLLOWER_SECONDS = 5.0
"""How long the end of the service waits for an update of a model, which then stays undone."""
MAX_FILES = 4096
"""Connections are open files."""
PROTOCOL = "http/protobuf"
ENVIRONMENT = {
    "DO_NOT_TRACK": "1",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "CRITICAL",  # errors are raised, and logged here in one line
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # polling retries anyway
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "4",  # seconds; a pending request delays shutdown
}


def listen(host: str, port: int) -> socket.socket:
    """Open a listening socket; raises OSError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        host.encode("idna")
    except UnicodeError:
        raise OSError(errno.EINVAL, "not the name of a host") from None
    listener = socket.create_server((host, port), family=family, backlog=BACKLOG)
    listener.setblocking(False)
    # asyncio sets this only for sockets made with IPPROTO_TCP; otherwise a body waits 40 ms for the ACK of its headers.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def traced() -> Telemetry | None:
    """Telemetry, if the environment asks for it; raises ImportError or ValueError, with one line."""
    names = [f"OTEL_EXPORTER_OTLP_{kind}ENDPOINT" for kind in ("", "TRACES_", "METRICS_")]
    given = [name for name in names if os.environ.get(name)]
    if not given or os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return None
    for name in given:
        if not os.environ[name].startswith(("http://", "https://")):
            raise ValueError(f"{name}: must begin with http:// or https:// (got {os.environ[name]})")
    if (protocol := os.environ.get("OTEL_EXPORTER_OTLP_PROTOCOL", PROTOCOL)) != PROTOCOL:
        raise ValueError(f"OTEL_EXPORTER_OTLP_PROTOCOL: must be {PROTOCOL} (got {protocol})")
    try:
        from deploy.service.telemetry import Telemetry
    except ImportError as error:
        line = f"{given[0]} is set, but OpenTelemetry is not installed ({error})"
        raise ImportError(f"{line}; install deploy/service/requirements.txt") from None
    return Telemetry()


def refuse(line: str) -> int:
    """Print why the service does not start; returns the exit status."""
    print("error:", " ".join(line.split()), file=sys.stderr)
    return 1


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    if arguments.max_waiting < arguments.max_images:
        parser().error("--max-waiting: must be at least --max-images, or the largest requests would always be rejected")
    if not 0 <= arguments.port < 2**16:
        parser().error(f"--port: must be from 0 to 65535 (got {arguments.port})")
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # nothing to shut down gracefully while the model loads
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    try:
        keys = required(arguments.keys, arguments.host)
    except KeysError as error:
        return refuse(f"--keys: {error}")
    try:
        telemetry = traced()
    except (ImportError, ValueError) as error:
        return refuse(str(error))
    logs.configure(arguments.log_format, telemetry.trace_id if telemetry else str)
    models = Models(Loader(arguments.device, arguments.threads))
    for text in arguments.model:
        try:
            models.add(text)
        except ModelError as error:
            return refuse(f"--model {text}: {error}")
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, MAX_FILES), hard))
    try:
        listener = listen(arguments.host, arguments.port)
    except OSError as error:
        address = f"--host {arguments.host} --port {arguments.port}"
        return refuse(f"{address}: cannot listen ({error.strerror}); choose another host or port")

    metrics = Metrics(models)
    batcher = Batcher(
        arguments.max_batch,
        arguments.max_waiting,
        arguments.max_wait,
        SLICE_SECONDS,
        arguments.max_delay / 1000,
        metrics.batch,
    )
    service = Service(
        models,
        batcher,
        metrics,
        arguments.max_images,
        arguments.max_body,
        max_seconds=arguments.max_seconds,
        max_buffered=8 * arguments.max_body,
        cache=Pictures(arguments.cache),
        keys=keys,
        cors=arguments.cors,
        log_requests=arguments.log_format == "json" if arguments.access_log is None else arguments.access_log,
        observe=telemetry.observe if telemetry else None,
    )
    app = create(service)
    if telemetry:
        telemetry.instrument(app)
    stop = threading.Event()
    follower = threading.Thread(target=models.follow, args=(max(arguments.poll, 0.1), stop))
    follower.start()
    try:
        Server(app, service, arguments.drain).run([listener])
    finally:
        stop.set()
        if telemetry:
            telemetry.close()
    follower.join(FOLLOWER_SECONDS)
    log.info("stopped")
    if follower.is_alive():  # downloading or testing a model, which cannot be interrupted
        logging.shutdown()
        os._exit(0)
    return 0


if __name__ == "__main__":
    sys.exit(main())

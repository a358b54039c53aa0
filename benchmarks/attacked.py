"""A service that is attacked: started, asked, and observed."""

import json
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

REPOSITORY = Path(__file__).parents[1]
TIMEOUT_SECONDS = 60.0
LIGHT = "/images?n=1&steps=1"
"""What others ask for, who have another address than the attackers."""


class Target(NamedTuple):
    """A running service."""

    process: subprocess.Popen[bytes]
    host: str
    port: int
    log: Path
    steps: int
    """The most sampling steps that a request can ask for."""

    def ask(
        self,
        path: str,
        body: bytes | None = None,
        timeout: float = TIMEOUT_SECONDS,
        headers: Mapping[str, str] | None = None,
    ) -> str:
        """The status of a response, and the beginning of an error's text; or how there was none."""
        others = {"X-Forwarded-For": "192.0.2.1"} if path == LIGHT else {}
        request = urllib.request.Request(f"http://{self.host}:{self.port}{path}", body, {**others, **(headers or {})})
        try:
            urllib.request.urlopen(request, timeout=timeout).read()
        except urllib.error.HTTPError as error:
            return f"{error.code} {_shown(error.read())}"
        except OSError as error:
            return "no response" if "timed out" in str(error) else type(error).__name__
        return "200"

    def post(self, body: bytes, headers: Mapping[str, str] | None = None) -> str:
        """The status of an inference request, likewise."""
        return self.ask("/v2/models/ddpm/infer", body, headers=headers)

    def read(self, path: str) -> bytes:
        """The body of a response."""
        with urllib.request.urlopen(f"http://{self.host}:{self.port}{path}", timeout=TIMEOUT_SECONDS) as answer:
            body: bytes = answer.read()
        return body

    def connect(self) -> socket.socket:
        return socket.create_connection((self.host, self.port), TIMEOUT_SECONDS)

    def send(self, request: bytes) -> str:
        """The status of the response to these bytes, and whether its error is JSON."""
        with self.connect() as connection:
            connection.settimeout(20)
            try:
                connection.sendall(request)
                received = connection.recv(65536)
                while received.endswith(b"\r\n\r\n") and (more := connection.recv(65536)):  # the body follows
                    received += more
            except OSError as error:
                return "no response" if isinstance(error, TimeoutError) else type(error).__name__
        head, _, body = received.partition(b"\r\n\r\n")
        if not head:
            return "closed"
        status = head.split()[1].decode()
        return status if status == "200" else f"{status} {_shown(body)}"


def _shown(body: bytes) -> str:
    try:
        return "JSON" if "error" in json.loads(body) else "other JSON"
    except (ValueError, TypeError):
        return "no JSON"


def probe(host: str, port: int, pipe: "Connection[float, str]") -> None:
    """Ask for the health every 20 ms until told to stop; sends the slowest response's seconds."""
    slowest = 0.0
    while not pipe.poll(0.02):
        began = time.perf_counter()
        with suppress(OSError):
            urllib.request.urlopen(f"http://{host}:{port}/v2/health/live", timeout=TIMEOUT_SECONDS).read()
        slowest = max(slowest, time.perf_counter() - began)
    pipe.send(slowest)


@contextmanager
def service(model: str, options: Sequence[str]) -> Iterator[Target]:
    with tempfile.TemporaryDirectory() as directory:
        log = Path(directory) / "log"
        command = [sys.executable, "-m", "deploy.service", "--model", model, "--port", "0", *options]
        with log.open("wb") as file:
            process = subprocess.Popen(command, cwd=REPOSITORY, stderr=file)
        try:
            while " on http://" not in log.read_text():
                if process.poll() is not None:
                    sys.exit(f"the service did not start: {log.read_text()}")
                time.sleep(0.05)
            (line,) = [line for line in log.read_text().splitlines() if " on http://" in line]
            url = urllib.parse.urlsplit(line.split()[-1])
            assert url.hostname
            assert url.port
            target = Target(process, url.hostname, url.port, log, 1)
            yield target._replace(steps=_most_steps(target))
        finally:
            process.kill()
            process.wait()


def _most_steps(target: Target) -> int:
    """The largest number of steps that is not refused."""
    return next(steps for steps in (1000, 999, 500, 200, 100, 50, 10, 1) if _allowed(target, steps))


def _allowed(target: Target, steps: int) -> bool:
    return target.ask(f"/images?n=1&steps={steps}").startswith("200")

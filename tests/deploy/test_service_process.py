"""The service as a process: startup, a champion that changes under load, and shutdown."""

import http.client
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import pytest

from deploy.service.__main__ import listen, main
from deploy.service.server import ignore_new
from tests.deploy.models import write_model
from tests.deploy.registry import CHAMPION, Store, broken, changed
from tests.deploy.services import INFER, REPOSITORY, running

pytestmark = pytest.mark.slow

CLIENTS = 3


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "sampler.onnx", "dpm-solver++", False)


def test_a_response_is_sent_without_delay() -> None:
    with listen("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()):
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


@pytest.mark.skipif(sys.platform != "linux", reason="a socket filter of Linux")
def test_connections_that_nobody_will_accept_are_not_made() -> None:
    with listen("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()) as early:
        ignore_new(listener)
        early.sendall(b"request")
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.recv(7) == b"request"
        with pytest.raises(TimeoutError):
            socket.create_connection(listener.getsockname(), timeout=0.2)


class Clients:
    """Clients that send requests over persistent connections until refused or stopped."""

    def __init__(self, url: str) -> None:
        self.answers: list[httpx.Response] = []
        self.lost: list[Exception] = []
        self.stop = threading.Event()
        self._url = url
        self.threads = [threading.Thread(target=self._ask) for _ in range(CLIENTS)]

    def _ask(self) -> None:
        with httpx.Client(base_url=self._url, timeout=60) as client:
            while not self.stop.is_set():
                try:
                    self.answers.append(
                        client.get("/images", params={"n": 2})
                    )  # without a seed, none is from the cache
                except httpx.ConnectError:
                    return
                except httpx.HTTPError as error:
                    self.lost.append(error)
                    return

    def versions(self) -> list[str]:
        return [answer.headers["X-Model-Version"] for answer in list(self.answers)]

    def wait_for(self, count: int) -> None:
        """Wait for `count` more responses."""
        enough = len(self.answers) + count
        while len(self.answers) < enough and not self.lost:
            time.sleep(0.01)


@contextmanager
def load(url: str) -> Iterator[Clients]:
    clients = Clients(url)
    for thread in clients.threads:
        thread.start()
    try:
        yield clients
    finally:
        clients.stop.set()
        for thread in clients.threads:
            thread.join()


def test_no_request_is_lost_at_shutdown(model: Path, tmp_path: Path) -> None:
    with running(tmp_path, str(model), "--drain", "0.5") as service, load(service.url) as clients:
        clients.wait_for(3 * CLIENTS)
        service.process.send_signal(signal.SIGTERM)
        assert service.process.wait(60) == 0
        for thread in clients.threads:
            thread.join(60)  # each stops when its connection is refused
        assert clients.lost == []
        assert {answer.status_code for answer in clients.answers} == {200}
        assert clients.answers[-1].headers["Connection"] == "close"
        assert len(service.log.read_text().splitlines()) == 4, service.log.read_text()


def test_connections_opened_before_shutdown_are_answered(model: Path, tmp_path: Path) -> None:
    with running(tmp_path, str(model), "--drain", "0") as service:
        address = httpx.URL(service.url)
        early = http.client.HTTPConnection(address.host, address.port or 0, timeout=60)
        early.connect()
        service.process.send_signal(signal.SIGINT)
        with suppress(ConnectionRefusedError):
            while True:
                with socket.create_connection((address.host, address.port or 0), timeout=60):
                    time.sleep(0.01)
        early.request("GET", "/images?n=1")
        answer = early.getresponse()
        assert (answer.status, answer.headers["Connection"]) == (200, "close")
        early.close()
        assert service.process.wait(60) == 0


def test_a_second_signal_stops_immediately(model: Path, tmp_path: Path) -> None:
    with running(tmp_path, str(model), "--drain", "600") as service:
        service.process.send_signal(signal.SIGTERM)
        service.wait_for("a second signal stops immediately")
        assert httpx.get(f"{service.url}/v2/health/ready").status_code == 503
        service.process.send_signal(signal.SIGTERM)
        assert service.process.wait(60) == 128 + signal.SIGTERM


def test_oversized_bodies_get_a_response(model: Path, tmp_path: Path) -> None:
    with running(tmp_path, str(model), "--max-body", "1000") as service, httpx.Client(base_url=service.url) as client:
        for content in (b" " * 3_000_000, (b" " * 1000 for _ in range(3000))):
            assert client.post(INFER, content=content).status_code == 413
        assert client.get("/images").status_code == 200


def test_a_champion_that_changes_under_load(model: Path, tmp_path: Path) -> None:
    store, good = Store(tmp_path), model.read_bytes()
    store.add(good)
    with (
        running(tmp_path, CHAMPION, "--poll", "0.1", MLFLOW_TRACKING_URI=store.uri) as service,
        load(service.url) as clients,
    ):
        clients.wait_for(CLIENTS)
        assert set(clients.versions()) == {"1"}
        store.add(changed(good, weights_sha256="b" * 64))
        service.wait_for("now serving version 2")
        before = len(clients.answers)
        clients.wait_for(2 * CLIENTS)
        after = clients.versions()[before:]
        assert after.count("1") <= CLIENTS  # each client had at most one request in flight
        assert "2" in after
        store.add(broken(good))
        service.wait_for("still serving version 2: version 3: golden test failed")
        clients.wait_for(CLIENTS)
        assert httpx.get(f"{service.url}/v2/models/ddpm").json()["versions"] == ["2"]
        metrics = httpx.get(f"{service.url}/metrics").text
        (info,) = [line for line in metrics.splitlines() if line.startswith("ddpm_model_info")]
        assert 'alias="champion"' in info
        assert 'version="2"' in info
        assert 'ddpm_model_update_failures_total{alias="champion",model="ddpm"} 0.0' not in metrics
        store.point("1")
        service.wait_for("now serving version 1")
        clients.wait_for(CLIENTS)
        service.process.send_signal(signal.SIGTERM)
        assert service.process.wait(60) == 0
        assert clients.lost == []
        assert {answer.status_code for answer in clients.answers} == {200}
        assert len(service.lines("ERROR")) == 1


def test_without_a_model_it_does_not_start(tmp_path: Path) -> None:
    name = str(tmp_path / "missing")
    command = [sys.executable, "-m", "deploy.service", "--model", name, "--port", "0"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: --model {name}: ")


@pytest.mark.parametrize("kind", ["bad", "store"])
def test_with_a_model_that_it_cannot_read_it_does_not_start(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad").write_text("no model")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    name = CHAMPION if kind == "store" else str(tmp_path / kind)
    assert main(["--model", name, "--port", "0", "--keys", "none"]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    (line,) = shown.err.splitlines()
    assert line.startswith(f"error: --model {name}: ")


def test_a_host_that_cannot_be_encoded(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", str(model), "--threads", "1", "--keys", "none", "--host", "é" * 70]) == 1
    assert capsys.readouterr().err.endswith("cannot listen (not the name of a host); choose another host or port\n")


def test_a_port_in_use(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as occupied:
        port = str(occupied.getsockname()[1])
        assert main(["--model", str(model), "--threads", "1", "--keys", "none", "--port", port]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "cannot listen (" in line


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--host", "0.0.0.0"], "error: --keys: required for --host 0.0.0.0: "),
        (["--keys", "/no\nkeys"], "error: --keys: /no keys: cannot find it (No such file or directory)"),
    ],
)
def test_without_its_keys_it_does_not_start(
    options: list[str], line: str, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--model", str(model), "--port", "0", *options]) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith(line)
    assert len(shown.err.splitlines()) == 1


@pytest.mark.parametrize(
    "origin",
    [
        "page.example",
        "https://page.example/",
        "https://page.example?a",
        "null",
        "ftp://page.example",
        "https://a:65536",
        "https://a:b",
        "https://a:0",
        "https://[a",
    ],
)
def test_wrong_origins(origin: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--model", "x", "--cors", origin])
    assert capsys.readouterr().err.endswith(f"must be https://HOST[:PORT], without a path, or * (got {origin})\n")


def test_a_log_in_json_and_a_collector_that_never_answers(model: Path, tmp_path: Path) -> None:
    """Every line is an object, the collector is named once, and the service ends in time."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{silent.getsockname()[1]}"}
        environment |= {"OTEL_BSP_SCHEDULE_DELAY": "100", "OTEL_EXPORTER_OTLP_TIMEOUT": "1"}
        with running(tmp_path, str(model), "--log-format", "json", "--drain", "0", **environment) as service:
            assert httpx.get(f"{service.url}/images", params={"n": 1, "seed": 1}).status_code == 200
            host, _, port = service.url.removeprefix("http://").partition(":")
            with socket.create_connection((host, int(port))) as client:
                client.sendall(b"nonsense\r\n\r\n")  # uvicorn warns
                assert b"400" in client.recv(1000)
            service.wait_for("does not accept traces")
            service.process.send_signal(signal.SIGTERM)
            assert service.process.wait(20) == 0
            lines = [json.loads(line) for line in service.log.read_text().splitlines()]
    (request,) = [line for line in lines if line.get("path") == "/images"]
    assert len(request["trace_id"]) == len(request["request_id"]) == 32
    (warning,) = [line for line in lines if line["logger"].startswith("uvicorn")]
    assert (warning["level"], warning["message"]) == ("WARNING", "Invalid HTTP request received.")
    assert len([line for line in lines if "does not accept traces" in line["message"]]) == 1


def test_an_update_that_takes_long_does_not_delay_the_end(model: Path) -> None:
    program = f"""
import time
from deploy.service import __main__ as service

service.Server.run = lambda *_: None
service.Models.follow = lambda *_: time.sleep(600)
service.FOLLOWER_SECONDS = 0.1
service.main(["--model", {str(model)!r}, "--port", "0", "--threads", "1"])
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1].endswith("stopped")


def test_opentelemetry_is_imported_only_if_asked_for(model: Path) -> None:
    program = f"""
import sys
from deploy.service.__main__ import main
from deploy.service.server import Server

Server.run = lambda *_: None
assert main(["--model", {str(model)!r}, "--port", "0"]) == 0
names = [f"opentelemetry.{{kind}}" for kind in ("sdk", "exporter", "instrumentation")]  # FastAPI imports the others
assert not set(names) & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_torch_is_not_imported(model: Path, tmp_path: Path) -> None:
    """Neither by the service nor by the parts of MLflow it uses."""
    store = Store(tmp_path)
    store.add(model.read_bytes())
    program = """
import sys
from deploy.service.__main__ import main
from deploy.service.server import Server

Server.run = lambda *_: None
assert main(["--model", "models:/ddpm@champion", "--port", "0"]) == 0
assert not {"torch", "mlflow.pyfunc"} & set(sys.modules)
"""
    environment = {"MLFLOW_TRACKING_URI": store.uri, "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr

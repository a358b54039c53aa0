"""Slow, idle, confused and leaving clients, on a server in this process; benchmarks/service_attacks.py has more."""

import http.client
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest

from deploy.service import pictures, server
from deploy.service.__main__ import listen
from deploy.service.app import create
from deploy.service.work import Feeds, Span
from tests.deploy.models import write_model
from tests.deploy.services import INFER, service

POST = f"POST {INFER} HTTP/1.1\r\nHost: x\r\n".encode()


class Served:
    """A service, its address, and a model that waits for `go`."""

    server: server.Server

    def __init__(self, path: Path) -> None:
        self.service = service(path, max_batch=1)
        self.go, self.running, self.ended = threading.Event(), threading.Event(), threading.Event()
        self.model = self.service.models.first
        self.run = self.model.run
        self.go.set()
        self.model.run = self.slow  # type: ignore[method-assign]
        self.listener = listen("127.0.0.1", 0)
        self.port = self.listener.getsockname()[1]

    def slow(self, feeds: Feeds, span: Span, options: Any = None) -> Feeds:
        self.running.set()
        while not self.go.wait(0.01):
            if options.terminate:
                self.ended.set()
                raise RuntimeError("terminated")
        return self.run(feeds, span, options)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), 20)

    def send(self, request: bytes) -> tuple[int, str]:
        """The status and the error of the response to these bytes."""
        with self.connect() as connection:
            connection.sendall(request)
            return response(connection)

    def get(self, path: str) -> int:
        with closing(self.client()) as connection:
            connection.request("GET", path)
            with connection.getresponse() as answer:
                return answer.status

    def client(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)


def response(connection: socket.socket) -> tuple[int, str]:
    with http.client.HTTPResponse(connection) as answer:
        answer.begin()
        return answer.status, json.loads(answer.read())["error"]


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    monkeypatch.setattr(server, "HEAD_SECONDS", 0.5)
    monkeypatch.setattr(server, "MAX_CONNECTIONS", 5)
    monkeypatch.setattr(server, "LINGER_SECONDS", 0.0)
    monkeypatch.setattr(server, "FINISH_SECONDS", 0.2)
    made = Served(write_model(tmp_path / "sampler.onnx", "dpm-solver++", False))
    made.service.body_seconds = 0.3
    running = made.server = server.Server(create(made.service), made.service, 0.0)
    thread = threading.Thread(target=running.run, args=([made.listener],))
    thread.start()
    until(lambda: running.started)
    yield made
    running.should_exit = True
    thread.join(20)
    assert not thread.is_alive()


def until(holds: Callable[[], bool]) -> None:
    while not holds():
        time.sleep(0.01)


def test_a_request_that_never_ends(served: Served) -> None:
    assert served.send(b"GET /images HTTP/1.1\r\n") == (408, "no request arrived within 0.5 s")
    line = "the request body did not arrive within 0.3 s"
    assert served.send(POST + b"Content-Length: 9\r\n\r\n{}") == (408, line)


def test_a_second_request_that_never_ends(served: Served) -> None:
    with closing(served.client()) as connection:
        served.go.clear()
        connection.request("GET", "/images?n=1")
        time.sleep(0.7)  # the limit of the first request passes while it is computed
        served.go.set()
        connection.getresponse().read()
        connection.sock.sendall(b"GET /images HTTP/1.1\r\n")
        assert response(connection.sock) == (408, "no request arrived within 0.5 s")


def test_the_client_with_most_connections_loses_one(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "HEAD_SECONDS", 60)
    with ExitStack() as stack:
        oldest = stack.enter_context(socket.create_connection(("127.0.0.1", served.port), 20, ("127.0.0.2", 0)))
        oldest.sendall(b"GET /v2?x HTTP/1.1\r\n")
        connections = [stack.enter_context(served.connect()) for _ in range(12)]
        assert response(connections[0])[0] == 503
        oldest.sendall(b"Host: x\r\n\r\n")
        assert oldest.recv(100).startswith(b"HTTP/1.1 200")


def test_half_sent_bodies_do_not_keep_others_out(served: Served) -> None:
    served.service.body_seconds = 60
    connections = [served.connect() for _ in range(12)]
    for connection in connections:
        connection.sendall(POST + b"Content-Length: 9\r\n\r\n{}")
    assert served.get("/images?n=1") == 200
    assert response(connections[0])[0] == 503
    for connection in connections:
        connection.close()


@pytest.mark.parametrize("limit", ["READ_SECONDS", "MAX_UNREAD"])
def test_responses_that_are_not_read(served: Served, monkeypatch: pytest.MonkeyPatch, limit: str) -> None:
    monkeypatch.setattr(server, limit, 0.2 if limit == "READ_SECONDS" else 2**20)
    monkeypatch.setattr(pictures, "png", lambda *_: bytes(2**25))
    with served.connect() as connection:
        connection.sendall(b"GET /images?n=1 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        until(lambda: served.server.server_state.total_requests > 0)
        until(lambda: not served.server.server_state.connections)
        with pytest.raises((ConnectionError, AssertionError)):  # what was in the buffers of the kernel arrives
            assert read_all(connection) > 2**25
    monkeypatch.setattr(server, limit, 2**30)
    with served.connect() as connection:
        connection.sendall(b"GET /images?n=1 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert read_all(connection) > 2**25


def test_a_stream_that_is_not_read(
    served: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its response would never be complete."""
    monkeypatch.setattr(server, "READ_SECONDS", 0.2)
    monkeypatch.setattr(pictures, "png", lambda *_: bytes(2**24))
    with served.connect() as connection:
        connection.sendall(b"GET /images/stream?n=1&every=1 HTTP/1.1\r\nHost: x\r\n\r\n")
        until(lambda: bool(served.server.server_state.connections))
        until(lambda: not served.server.server_state.connections)
    monkeypatch.setattr(server, "READ_SECONDS", 60)
    with served.connect() as connection:
        connection.sendall(b"GET /images/stream?n=1 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert read_all(connection) > 4 * 2**24
    assert "Traceback" not in caplog.text


def read_all(connection: socket.socket) -> int:
    return sum(map(len, iter(lambda: connection.recv(2**20), b"")))


def test_bodies_leave_room_for_those_of_others(served: Served) -> None:
    """A client may have 60 of 120 bytes; what it sent is forgotten when its requests end."""
    served.service.body_seconds, served.service.max_buffered = 60, 120
    post = POST + b"Content-Length: 40\r\nConnection: close\r\n"
    with served.connect() as first:
        first.sendall(post + b"\r\n" + b" " * 39)
        until(lambda: served.service.buffered["127.0.0.1"] == 39)
        line = "too many bytes of requests are being processed; try again in 1 s"
        assert served.send(post + b"\r\n" + b" " * 40) == (503, line)
        assert served.send(post + b"X-Forwarded-For: 1.2.3.4\r\n\r\n" + b" " * 40)[0] == 400
        first.sendall(b" ")
        assert response(first)[0] == 400
    until(lambda: not served.service.buffered)


def test_half_sent_requests_do_not_keep_others_out(served: Served) -> None:
    connections = [served.connect() for _ in range(12)]
    for connection in connections:
        connection.sendall(b"GET /images HTTP/1.1\r\n")
    assert served.get("/images?n=1") == 200
    status, line = response(connections[0])  # the oldest one
    assert (status, line) == (503, "more than 5 connections; try again later")
    for connection in connections:
        connection.close()


@pytest.mark.parametrize(
    ("request_", "line"),
    [
        (b"\x16\x03\x01\r\n\r\n", "Invalid HTTP request received."),
        (POST + b"Content-Length: 2\r\nContent-Length: 3\r\n\r\n{}", "Invalid HTTP request received."),
        (POST + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n{}", "both Content-Length and Transfer-"),
        (POST + b"Connection: Upgrade\r\nUpgrade: websocket\r\nContent-Length: 2\r\n\r\n{}", "inputs: field required"),
    ],
    ids=["no HTTP", "two lengths", "length and chunks", "websocket"],
)
def test_confused_requests(served: Served, request_: bytes, line: str) -> None:
    status, error = served.send(request_)
    assert status == 400
    assert error.startswith(line)


def test_the_work_of_a_client_that_leaves_ends(served: Served) -> None:
    served.go.clear()
    with served.connect() as connection:
        connection.sendall(b"GET /images?n=8 HTTP/1.1\r\nHost: x\r\n\r\n")
        assert served.running.wait(20)
    assert served.ended.wait(20)
    served.go.set()
    until(lambda: served.service.batcher.waiting == 0)
    assert served.get("/images?n=1") == 200


def test_a_request_that_takes_too_long(served: Served) -> None:
    served.service.max_seconds = 0.2
    served.go.clear()
    line = "not done within 0.2 s; ask for fewer images or steps"
    assert served.send(b"GET /images?n=8 HTTP/1.1\r\nHost: x\r\n\r\n") == (504, line)
    assert served.ended.wait(20)


def test_what_runs_at_the_end_of_the_service_gets_a_response(served: Served) -> None:
    served.go.clear()
    with served.connect() as connection:
        connection.sendall(b"GET /images?n=8 HTTP/1.1\r\nHost: x\r\n\r\n")
        assert served.running.wait(20)
        served.service.batcher.close()
        assert response(connection) == (503, "the service is shutting down; try again")
    assert served.ended.wait(20)


def test_more_delimiters_than_values(served: Served) -> None:
    lists = b'{"inputs": [{"data": [' + b"[]," * 20_000 + b"[]]}]}"
    status, line = served.send(POST + f"Content-Length: {len(lists)}\r\n\r\n".encode() + lists)
    assert (status, line) == (400, "the body has more `,` than any valid request; check its data")


def test_head_and_repeated_parameters(served: Served) -> None:
    paths = {"/v2/": 200, "/v2/health/live": 200, "/images?n=1&n=2": 400, "/v2/models/ddpm/": 404}
    with closing(served.client()) as connection:
        for path, status in paths.items():
            connection.request("HEAD", path)
            with connection.getresponse() as answer:
                assert (answer.status, answer.read()) == (status, b"")
    assert served.send(b"GET /images?n=1&n=2 HTTP/1.1\r\nHost: x\r\n\r\n") == (400, "n: given twice; remove one")

"""Requests to servers that respond correctly, incorrectly, or not with HTTP."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Thread

import pytest

from flows import http


@contextmanager
def replying(*contents: bytes) -> Iterator[str]:
    """The URL of a server that sends each of `contents` to one connection."""

    def serve() -> None:
        for content in contents:
            connection, _address = listener.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(content)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = Thread(target=serve)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        thread.join()


def http_reply(status: str, body: bytes) -> bytes:
    return f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body


@pytest.mark.parametrize(
    ("content", "good", "value"),
    [
        (http_reply("200 OK", b'{"id": 3}'), True, {"id": 3}),
        (http_reply("200 OK", b"OK"), True, None),
        (http_reply("200 OK", b"\xff\xfe\xfd"), True, None),
        (http_reply("404 Not Found", b"{}"), False, None),
        (b"SSH-2.0-OpenSSH_9.6\r\n", False, None),
        (b"", False, None),
    ],
    ids=["json", "text", "bytes", "refusal", "other-protocol", "nothing"],
)
def test_only_a_valid_response_counts(content: bytes, good: bool, value: object) -> None:
    with replying(content, content) as url:
        assert http.answers(url) is good
        assert http.json(url, {}) == value


def test_requests_to_a_busy_server_are_retried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "PAUSE", 0.0)
    busy, done = http_reply("503 Service Unavailable", b""), http_reply("200 OK", b'{"id": 3}')
    with replying(busy, busy, done) as url:
        assert http.json(url, {}) == {"id": 3}
    with replying(busy) as url:
        assert not http.answers(url)  # `up` itself polls a starting server
    monkeypatch.setattr(http, "TRIES", 2)
    with replying(busy, busy) as url:
        assert http.json(url) is None


def test_without_a_server_nothing_answers() -> None:
    with socket.socket() as bound:  # bound, but not listening
        bound.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{bound.getsockname()[1]}"
        assert not http.answers(url)
        assert http.json(url) is None

"""The log: a line per request, with its id, and without secrets."""

import io
import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from deploy.service import logs
from deploy.service.batching import RunFailed
from deploy.service.keys import Keys
from deploy.service.state import Service
from tests.deploy.services import ask, get
from tests.deploy.test_keys import KEY, bearer, line

pytestmark = pytest.mark.slow  # the services export a model


class Log(list[dict[str, Any]]):
    """The lines of a log in JSON, read as they are asked for."""

    def __init__(self, stream: io.StringIO) -> None:
        self._stream = stream

    def take(self) -> list[dict[str, Any]]:
        lines = self._stream.getvalue().splitlines()
        self._stream.seek(0)
        self._stream.truncate()
        return [json.loads(each) for each in lines]


@pytest.fixture
def log() -> Iterator[Log]:
    handler, stream = logs.handler("json"), io.StringIO()
    assert isinstance(handler, logging.StreamHandler)
    handler.setStream(stream)
    logger = logging.getLogger("ddpm.service")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield Log(stream)
    logger.setLevel(level)
    logger.removeHandler(handler)


@pytest.fixture
def logged(classes: Service) -> Service:
    return replace(classes, log_requests=True)


def test_a_request_is_a_line(logged: Service, log: Log, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(line("alice", KEY))
    guarded = replace(logged, keys=Keys(tmp_path / "keys"))
    (answer,) = ask(guarded, get("/images?n=1&seed=7", **bearer(KEY), **{"X-Request-ID": "id-7.a_B"}))
    assert answer.headers["X-Request-ID"] == "id-7.a_B"
    (found,) = log.take()
    assert 0 < found.pop("seconds") < 600
    assert found.pop("time").endswith("+00:00")
    assert found.pop("message").startswith("alice GET /images 200 ")
    expected = {"level": "INFO", "logger": "ddpm.service", "method": "GET", "path": "/images", "status": 200}
    assert found == {**expected, "client": "alice", "request_id": "id-7.a_B"}
    (refused,) = ask(guarded, get(f"/images?key={KEY}x", **bearer(KEY + "x")))
    (found,) = lines = log.take()
    assert (found["status"], found["client"]) == (401, "127.0.0.1")
    assert refused.headers["X-Request-ID"] == found["request_id"]
    assert KEY not in json.dumps(lines)
    (missing,) = ask(logged, get(f"/nothing%0D%0AINFO/{'x' * 500}?key={KEY}"))
    (found,) = log.take()
    assert missing.status_code == found["status"] == 404
    assert found["path"] == f"/nothing%0D%0AINFO/{'x' * 500}"[:200]
    ask(replace(logged, log_requests=False), get("/images?n=1"))
    assert log.take() == []


@pytest.mark.parametrize("chosen", ["a\nb", "a b", "x" * 65, '"', "ü"])
def test_ids_that_could_forge_a_line_are_replaced(chosen: str, logged: Service, log: Log) -> None:
    request = get("/v2")
    request.headers = type(request.headers)({b"X-Request-ID": chosen.encode()})
    (answer,) = ask(logged, request)
    (found,) = log.take()
    assert answer.headers["X-Request-ID"] == found["request_id"]
    assert found["request_id"] != chosen
    assert len(found["request_id"]) == 32


def test_addresses_that_could_forge_a_line(log: Log) -> None:
    """A proxy's X-Forwarded-For may be a text of the client."""
    logs.request({"type": "http", "method": "GET", "path": "/"}, "\x1b[31m\n\x85INFO" + "x" * 999, 200, 1.0)
    logs.request({"type": "http", "method": "GET", "path": "/"}, "fe80::1%eth0", 200, 1.0)
    forged, true = log.take()
    assert (len(forged["client"]), true["client"]) == (64, "fe80::1%eth0")
    assert forged["message"].isprintable()
    assert forged["message"].startswith(f"{forged['client']} GET / 200")


def test_probes_are_logged_if_they_fail(logged: Service, log: Log) -> None:
    ask(logged, get("/v2/health/ready"), get("/v2/health/live"), get("/metrics"))
    assert log.take() == []
    ask(replace(logged, draining=True), get("/v2/health/ready"))
    assert [each["status"] for each in log.take()] == [503]


def test_errors_have_the_id_of_their_request(logged: Service, log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    problem: Exception

    async def fail(*_: Any) -> Any:
        raise problem

    monkeypatch.setattr(logged.batcher, "submit", fail)
    for problem, message, shown in (
        (RunFailed("out of memory"), "request failed: out of memory", "the model failed: out of memory"),
        (KeyError("surprise"), "internal error", "internal error; see the log of the service"),
    ):
        cors = replace(logged, cors=["*"])
        (answer,) = ask(cors, get("/images", **{"X-Request-ID": "id-8", "Origin": "https://page.example"}))
        assert (answer.status_code, answer.json()) == (500, {"error": shown})
        assert answer.headers["X-Request-ID"] == "id-8"
        assert answer.headers["Access-Control-Allow-Origin"] == "*"
        error, request = log.take()
        assert (error["level"], error["message"]) == ("ERROR", message)
        assert ("exc_info" in error) == isinstance(problem, KeyError)
        assert request["status"] == 500
        assert error["request_id"] == request["request_id"] == "id-8"


def test_text_ends_with_the_id() -> None:
    handler = logs.handler("text")
    record = logging.makeLogRecord({"msg": "serving", "levelname": "INFO", "request_id": "id-9"})
    assert handler.format(record).endswith(" INFO serving [id-9]")
    record = logging.makeLogRecord({"msg": "serving", "levelname": "INFO"})
    assert handler.format(record).endswith(" INFO serving")

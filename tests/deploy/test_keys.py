"""Keys: the file, what needs one, and pages of other origins."""

import hashlib
import hmac
import logging
import os
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from deploy.service import keys
from deploy.service.app import create
from deploy.service.keys import Keys, KeysError, required
from deploy.service.metrics import Metrics
from deploy.service.state import Service
from tests.deploy.services import INFER, ask, get

pytestmark = pytest.mark.slow  # the services export a model

KEY, OTHER = "ddpm_alice", "ddpm_bob"
PAGE = "https://page.example"


def line(name: str, key: str) -> str:
    return f"{name} sha256:{hashlib.sha256(key.encode()).hexdigest()}\n"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_text(f"# A comment\n\n{line('alice', KEY)}{line('bob', OTHER)}")
    return path


@pytest.fixture
def guarded(classes: Service, file: Path) -> Service:
    return replace(classes, keys=Keys(file), metrics=Metrics(classes.models))


def bearer(key: str, scheme: str = "Bearer") -> dict[str, str]:
    return {"Authorization": f"{scheme} {key}"}


def test_a_key_is_shown_once_and_stored_as_its_hash(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    made = []
    for _ in range(2):
        assert keys.main(["alice"]) == 0
        stored, shown = capsys.readouterr()
        key = shown.strip()
        assert len(key) == len("ddpm_") + 43  # 256 bits
        assert stored == line("alice", key)
        (tmp_path / "keys").write_text(stored)
        assert Keys(tmp_path / "keys").client(key.encode()) == "alice"
        made.append(key)
    assert made[0] != made[1]


@pytest.mark.parametrize("name", ["", "a b", "a\nb", "-a", "a" * 65, "é"])
def test_names_of_keys(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        keys.main(["--", name])
    stored, shown = capsys.readouterr()
    assert stored == ""
    assert "NAME: must have up to 64 letters" in shown


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "10.0.0.1", "service.example", "127.0.0.1.example"])
def test_keys_are_required_where_others_reach_the_service(host: str, file: Path) -> None:
    with pytest.raises(KeysError, match=r"^required for --host"):
        required(None, host)
    assert required("none", host) is None
    assert isinstance(required(str(file), host), Keys)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_keys_are_off_on_loopback(host: str, file: Path) -> None:
    assert required(None, host) is None
    assert isinstance(required(str(file), host), Keys)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot find it"),
        (b"", "has no keys; add one with"),
        (b"# none\n", "has no keys"),
        (line("alice", KEY).encode() + KEY.encode(), "line 2 must be NAME sha256:HASH"),
        (f"alice {hashlib.sha256(KEY.encode()).hexdigest()}".encode(), "line 1 must be"),
        (line("alice", KEY).upper().encode(), "line 1 must be"),
        ((line("alice", KEY) + line("bob", KEY)).encode(), "line 2 repeats the key of alice"),
        (b"\xff\xfe", "not a text file"),
    ],
)
def test_a_wrong_file_is_refused(content: bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "keys"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(KeysError, match=message) as error:
        Keys(path)
    assert str(error.value).startswith(f"{path}: ")
    assert KEY not in str(error.value)
    assert "\n" not in str(error.value)


def test_the_file_is_followed(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    found, good = Keys(file), file.read_text()

    def known() -> list[str | None]:
        return [found.client(key.encode()) for key in (KEY, OTHER)]

    def logged() -> list[str]:
        lines = [record.getMessage() for record in caplog.records]
        caplog.clear()
        return lines

    def write(text: str) -> None:
        (file.parent / "new").write_text(text)
        (file.parent / "new").replace(file)

    assert known() == ["alice", "bob"]
    assert logged() == []
    write(line("bob", OTHER))
    assert known() == [None, "bob"]  # revoked
    assert logged() == [f"{file} read again: 1 keys"]
    write(good + "nonsense\n")
    assert known() == [None, "bob"]  # as before
    assert known() == [None, "bob"]
    (problem,) = logged()
    assert problem.endswith("prints it; the keys that were read last stay valid")
    file.rename(file.parent / "old")
    assert known() == [None, "bob"]
    assert known() == [None, "bob"]
    (problem,) = logged()
    assert "cannot find it (No such file or directory)" in problem
    write(good)
    assert known() == ["alice", "bob"]
    write("")
    assert known() == [None, None]  # an empty file lets nobody in
    assert logged()[-1] == f"{file} read again: 0 keys"


def test_a_folder_that_comes_and_goes(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The file itself does not change; each time that it is gone is logged."""
    found, moved = Keys(file), file.parent.with_name("moved")
    for times in (1, 2):
        file.parent.rename(moved)
        assert [found.client(key.encode()) for key in (KEY, "other")] == ["alice", None]
        assert len(caplog.records) == times
        moved.rename(file.parent)
        assert found.client(OTHER.encode()) == "bob"


def test_a_pipe_is_refused(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Reading it would wait for its writer, and every request with it."""
    found = Keys(file)
    file.unlink()
    os.mkfifo(file)
    assert found.client(KEY.encode()) == "alice"
    assert f"{file}: must be a regular file" in caplog.text
    with pytest.raises(KeysError, match="must be a regular file"):
        Keys(file)


def test_a_file_of_another_system(file: Path) -> None:
    file.write_bytes(b"\xef\xbb\xbf" + line("alice", KEY).replace("\n", "\r\n").encode())
    assert Keys(file).client(KEY.encode()) == "alice"


def test_a_file_that_everyone_can_write_is_named(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    file.chmod(0o644)  # there are only hashes in it
    Keys(file)
    assert caplog.records == []
    file.chmod(0o666)
    Keys(file)
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_all_keys_take_the_same_time(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, compared, real = Keys(file), list[bool](), hmac.compare_digest

    def compare(a: bytes, b: bytes) -> bool:
        compared.append(real(a, b))
        return compared[-1]

    monkeypatch.setattr(keys.hmac, "compare_digest", compare)
    for key, name in ((KEY, "alice"), (OTHER, "bob"), ("other", None)):
        compared.clear()
        assert found.client(key.encode()) == name
        assert len(compared) == 2
        assert any(compared) == (name is not None)


def test_what_needs_a_key(guarded: Service) -> None:
    app = create(guarded)
    paths = [*app.openapi()["paths"], "/nothing", "/images/", "/v2/health/", "/page.js/x"]
    assert app.openapi()["components"]["securitySchemes"] == {"HTTPBearer": {"type": "http", "scheme": "bearer"}}
    public = ["/v2/health/live", "/v2/health/ready", "/", "/openapi.json", "/main.js", "/docs"]
    answers = ask(guarded, *map(get, [*paths, *public]))
    refused = [str(answer.url.path) for answer in answers if answer.status_code == 401]
    assert sorted(refused) == sorted(set(paths) - set(public))
    assert {"/images", "/metrics", "/v2", "/v2/models/%7Bname%7D/infer"} <= {
        answer.url.raw_path.decode() for answer in answers if answer.status_code == 401
    }


def test_requests_without_a_valid_key(guarded: Service) -> None:
    twice = httpx.Request("GET", "http://test/images", headers=[("Authorization", f"Bearer {KEY}")] * 2)
    none, basic, empty, unknown, hashed, latin, query, both, known, lower = ask(
        guarded,
        get("/images"),
        get("/images", **bearer(KEY, "Basic")),
        get("/images", **bearer("")),
        get("/images", **bearer(KEY + "x")),
        get("/images", **bearer(hashlib.sha256(KEY.encode()).hexdigest())),
        httpx.Request("GET", "http://test/images", headers={b"Authorization": b"Bearer \xff"}),
        get(f"/images?key={KEY}"),
        twice,
        get("/images?n=1", **bearer(KEY)),
        get("/images?n=1", **bearer(OTHER, "bearer")),
    )
    for answer in (none, basic, empty, query, both):
        assert (answer.status_code, answer.headers["WWW-Authenticate"]) == (401, "Bearer")
        assert answer.json()["error"].startswith("this needs a key")
    for answer in (unknown, hashed, latin):
        assert (answer.status_code, answer.headers["WWW-Authenticate"]) == (401, 'Bearer error="invalid_token"')
        assert answer.json()["error"].startswith("the key is unknown")
    assert [known.status_code, lower.status_code] == [200, 200]
    text = guarded.metrics.text().decode()
    for reason, count in (("missing", 5), ("unknown", 3)):
        assert f'ddpm_key_failures_total{{reason="{reason}"}} {count:.1f}' in text


def test_a_request_without_a_key_is_refused_before_its_body_is_read(guarded: Service) -> None:
    sent = 0

    async def chunks() -> AsyncIterator[bytes]:
        nonlocal sent
        while True:
            sent += 1
            yield b" "

    (answer,) = ask(guarded, httpx.Request("POST", f"http://test{INFER}", content=chunks()))
    assert (answer.status_code, sent) == (401, 0)


def test_the_name_of_a_key_is_the_client(guarded: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    submit, clients = guarded.batcher.submit, list[str]()

    def spy(run: Any, work: Any, client: str) -> Any:
        clients.append(client)
        return submit(run, work, client)

    monkeypatch.setattr(guarded.batcher, "submit", spy)
    ask(guarded, get("/images?n=1", **bearer(OTHER), **{"X-Forwarded-For": "10.0.0.1"}))
    ask(replace(guarded, keys=None), get("/images?n=1", **bearer(OTHER)))
    assert clients == ["bob", "127.0.0.1"]


def preflight(origin: str) -> httpx.Request:
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
    return httpx.Request("OPTIONS", f"http://test{INFER}", headers={"Origin": origin, **asked})


def test_pages_of_listed_origins(guarded: Service) -> None:
    listed = replace(guarded, cors=[PAGE])
    allowed, refused, drawn, other, without = ask(
        listed,
        preflight(PAGE),
        preflight("https://page.example.org"),
        get("/images?n=1&seed=1", Origin=PAGE, **bearer(KEY)),
        get("/images?n=1", Origin="https://other.example", **bearer(KEY)),
        get("/images", Origin=PAGE),
    )
    assert allowed.status_code == 200  # without a key
    assert allowed.headers["Access-Control-Allow-Origin"] == PAGE
    assert {"authorization", "inference-header-content-length"} <= set(
        allowed.headers["Access-Control-Allow-Headers"].lower().split(", ")
    )
    assert refused.status_code == 400
    assert refused.json() == {"error": "Disallowed CORS origin; --cors lists the origins"}
    assert drawn.headers["Access-Control-Allow-Origin"] == PAGE
    shown = drawn.headers["Access-Control-Expose-Headers"].split(", ")
    assert {"X-Seed", "X-Model-Version", "ETag", "Retry-After", "X-Request-ID"} <= set(shown)
    assert without.status_code == 401
    assert without.headers["Access-Control-Allow-Origin"] == PAGE  # so that the page can say so
    for answer in (refused, other, *ask(guarded, get("/images?n=1", Origin=PAGE, **bearer(KEY)), preflight(PAGE))):
        assert "Access-Control-Allow-Origin" not in answer.headers
    for answer in (allowed, drawn):
        assert "Access-Control-Allow-Credentials" not in answer.headers


def test_pages_of_all_origins(guarded: Service) -> None:
    anyone = replace(guarded, cors=["*"])
    for answer in ask(anyone, preflight(PAGE), get("/images?n=1", Origin=PAGE, Cookie="a=b", **bearer(KEY))):
        assert answer.status_code == 200
        assert answer.headers["Access-Control-Allow-Origin"] == "*"
        assert "Access-Control-Allow-Credentials" not in answer.headers

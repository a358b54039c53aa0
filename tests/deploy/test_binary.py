"""The extension for binary tensors, and compressed bodies, tested in this process."""

import gzip
import json
import threading
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from deploy.service import compression, inputs
from deploy.service.compression import pieces
from deploy.service.protocol import Invalid
from deploy.service.state import Service
from deploy.service.work import Feeds
from tests.deploy.binary import JSON_LENGTH, message, packed, received, request
from tests.deploy.models import write_model
from tests.deploy.services import INFER, ask, direct, get, post, same, service
from tests.export.test_sampler_graph import SHAPE

pytestmark = pytest.mark.slow
ENCODERS = {"gzip": gzip.compress, "deflate": zlib.compress}
NOISE = np.random.default_rng(0).standard_normal((2, *SHAPE), np.float32)
SIZE = NOISE.nbytes


def encoded(asked: httpx.Request, encoding: str, change: Callable[[bytes], bytes] = lambda body: body) -> httpx.Request:
    """A request with its body compressed, and then changed."""
    headers = {name: value for name, value in asked.headers.items() if name != "content-length"}
    content = change(ENCODERS.get(encoding, gzip.compress)(asked.content))
    return httpx.Request("POST", asked.url, content=content, headers={**headers, "Content-Encoding": encoding})


@pytest.mark.parametrize("kind", ["classes", "stochastic"])
def test_random_requests_give_what_onnx_runtime_does(kind: str, request_of: Callable[..., Any]) -> None:
    """Any inputs, each as JSON or binary, any outputs, likewise, and any encodings."""
    served, random = request_of(kind), np.random.default_rng(0)
    feeds, asked, wanted = [], [], []
    for number in range(16):  # no more images than a client may have waiting
        count, steps = int(random.integers(1, 6)), int(random.integers(1, 6))
        each: Feeds = {"noise": random.standard_normal((count, *SHAPE), np.float32)}
        if kind == "stochastic":
            each["steps_noise"] = random.standard_normal((steps, count, *SHAPE), np.float32)
        else:
            each |= {"steps": np.array([steps]), "y": random.integers(-1, 3, count)}
            each["guidance"] = random.normal(1, 1, 1).astype(np.float32)
        names = [str(name) for name in random.permutation(list(each))]
        outputs = [str(name) for name in random.permutation(["images", "x_0"])][: random.integers(1, 3)]
        fields, blobs = message(
            {name: each[name] for name in names},
            {name for name in names if random.integers(2)},
            outputs=[{"name": name, "parameters": {"binary_data": bool(random.integers(2))}} for name in outputs],
            parameters={"binary_data_output": bool(random.integers(2)), "unknown": number},
        )
        accepted = str(random.choice(["", "identity", "gzip", "deflate", "br, gzip;q=0.5"]))
        whole, encoding = request(fields, blobs, **{"Accept-Encoding": accepted}), random.choice(["", *ENCODERS])
        feeds.append(each)
        wanted.append(outputs)
        asked.append(encoded(whole, str(encoding)) if encoding else whole)
    for each, names, answer in zip(feeds, wanted, ask(served, *asked), strict=True):
        found, expected = received(answer), direct(served, **each)
        assert list(found) == names
        if "images" in found:
            same(found["images"], expected["images"])
        if "x_0" in found:
            np.testing.assert_allclose(found["x_0"], expected["x_0"], rtol=0, atol=2 / 255)


@pytest.fixture
def request_of(request: pytest.FixtureRequest) -> Callable[[str], Any]:
    return request.getfixturevalue


def test_what_is_binary_unless_an_output_says_otherwise(classes: Service) -> None:
    names = [{"name": "x_0"}, {"name": "images", "parameters": {"binary_data": False}}]
    for parameters, outputs, binary in (
        ({}, [], []),
        ({"binary_data_output": True}, [], ["images", "x_0"]),
        ({"binary_data_output": True}, names, ["x_0"]),
        ({}, names, []),
    ):
        fields, blobs = message({"noise": NOISE}, {"noise"}, parameters=parameters, outputs=outputs)
        (answer,) = ask(classes, request(fields, blobs))
        head = json.loads(answer.content[: int(answer.headers.get(JSON_LENGTH, len(answer.content)))])
        assert [each["name"] for each in head["outputs"] if "data" not in each] == binary
        kind = "application/octet-stream" if binary else "application/json"
        assert answer.headers["Content-Type"] == kind
        assert (JSON_LENGTH in answer.headers) == bool(binary)
        assert set(received(answer)) == {"images", "x_0"}


def test_the_length_of_the_json_may_be_that_of_the_body(classes: Service) -> None:
    (answer,) = ask(classes, request(message({"noise": NOISE}, set())[0]))
    same(
        received(answer)["images"],
        direct(classes, noise=NOISE, steps=[0], y=[-1, -1], guidance=np.float32([2.5]))["images"],
    )


def declared(value: Any) -> dict[str, Any]:
    fields, _ = message({"noise": NOISE}, {"noise"})
    fields["inputs"][0]["parameters"]["binary_data_size"] = value
    return fields


def shaped(*shape: int, size: int = SIZE) -> dict[str, Any]:
    fields = declared(size)
    fields["inputs"][0]["shape"] = list(shape)
    return fields


FIELDS, BLOB = message({"noise": NOISE}, {"noise"})
NEEDED = f"input noise: shape [2, 3, 7, 10] of FP32 needs {SIZE} bytes, which parameters.binary_data_size must be"
LENGTH = f"{JSON_LENGTH}: must be the number of bytes of JSON that the body begins with, 1 to "
ERRORS: list[tuple[httpx.Request, str]] = [
    (request(FIELDS, BLOB[:-1]), f"input noise: needs {SIZE} bytes of binary data, but the body has only {SIZE - 1}"),
    (request(FIELDS), f"input noise: needs {SIZE} bytes of binary data, but the body has only 0 more"),
    (request(FIELDS, BLOB + b"\0"), "the body has 1 byte more than its JSON and the inputs' binary data"),
    (request(declared(SIZE - 4), BLOB[:-4]), f"{NEEDED} (got {SIZE - 4})"),
    (request(declared(-1), BLOB), f"{NEEDED} (got -1)"),
    (request(declared(2**80), BLOB), f"{NEEDED} (got {2**80})"),
    (request(declared(10**400), BLOB), f"{NEEDED} (got 1000"),
    (request(declared(float(SIZE)), BLOB), f"{NEEDED} (got {SIZE}.0)"),
    (request(declared(True), BLOB), f"{NEEDED} (got True)"),
    (request(declared(None), BLOB), f"{NEEDED} (got None)"),
    (request(declared([1] * 100), BLOB), f"{NEEDED} (got [1, 1, 1"),
    (request(shaped(0, *SHAPE, size=0)), "input noise: shape must be [-1, 3, 7, 10], where -1 is any size from 1"),
    (request(shaped(-2, *SHAPE), BLOB), "input noise: shape must be [-1, 3, 7, 10], where -1 is any size from 1"),
    (request(shaped(2**62, *SHAPE), BLOB), "input noise: at most 16 images per request"),
    (request({**FIELDS, "inputs": [*FIELDS["inputs"], *FIELDS["inputs"]]}, 2 * BLOB), "input noise: given twice"),
    (request(message({"noise": NOISE}, set())[0], BLOB), f"the body has {SIZE} bytes more than its JSON"),
    (request({"inputs": [{"name": "noise", "datatype": "FP32", "shape": [2, *SHAPE]}]}), "input noise: has no data"),
    (request({"inputs": [{**FIELDS["inputs"][0], "data": []}]}, BLOB), "input noise: has both data and parameters"),
    (post(FIELDS), f"input noise: parameters.binary_data_size needs the header {JSON_LENGTH}"),
    (request(FIELDS, BLOB, length="0"), LENGTH),
    (request(FIELDS, BLOB, length="-1"), LENGTH),
    (request(FIELDS, BLOB, length="1e2"), LENGTH),
    (request(FIELDS, BLOB, length="9" * 5000), LENGTH),
    (request(FIELDS, BLOB, length="10"), "the body is not valid JSON"),
    (request(FIELDS, BLOB, length="1000000"), f"{LENGTH}{len(json.dumps(FIELDS)) + SIZE} (got 1000000)"),
    (request(FIELDS, packed(NOISE * np.float32("nan"))), "input noise: must be from -1000 to 1000 (got nan)"),
    (
        request({**FIELDS, "parameters": {"binary_data_output": 1}}, BLOB),
        "parameters.binary_data_output must be true or false (got 1)",
    ),
    (
        request({**FIELDS, "outputs": [{"name": "x_0", "parameters": {"binary_data": "yes"}}]}, BLOB),
        "output x_0: parameters.binary_data must be true or false (got yes)",
    ),
    (request({"inputs": [{**FIELDS["inputs"][0], "name": "a\nb"}]}, BLOB), "input a b: no such input; the model has"),
    (
        request({"inputs": [{**FIELDS["inputs"][0], "name": "x" * 101}]}, BLOB),
        "inputs.0.name: string should have at most 100 characters (got xxx",
    ),
    (
        request({**FIELDS, "outputs": [{"name": "x" * 101}]}, BLOB),
        "outputs.0.name: string should have at most 100 characters (got xxx",
    ),
    (request({**FIELDS, "x\ny": 1}, BLOB), "x y: unknown field; remove it"),
    (request({**FIELDS, "parameters": 1}, BLOB), "parameters: input should be an object (got 1)"),
]


@pytest.mark.parametrize(("asked", "line"), ERRORS, ids=[f"{i} {line[:40]}" for i, (_, line) in enumerate(ERRORS)])
def test_an_invalid_request_gets_a_one_line_error(classes: Service, asked: httpx.Request, line: str) -> None:
    (answer,) = ask(classes, asked)
    error = answer.json()["error"]
    assert answer.status_code == 400
    assert error.startswith(line)
    assert "\n" not in error
    assert len(error) < 250


def test_binary_data_of_several_inputs_is_in_their_order(classes: Service) -> None:
    labels = np.array([2, 0])
    answers = ask(
        classes,
        *(
            request(*message(feeds, {"y", "noise"}))
            for feeds in ({"y": labels, "noise": NOISE}, {"noise": NOISE, "y": labels})
        ),
    )
    expected = direct(classes, noise=NOISE, steps=[0], y=labels, guidance=np.float32([2.5]))
    for answer in answers:
        same(received(answer)["images"], expected["images"])


def test_a_compressed_body_counts_only_until_it_is_decompressed(
    classes: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, buffered = request(FIELDS, BLOB), 0

    def parse(body: bytearray, *_: Any) -> None:
        nonlocal buffered
        buffered = classes.buffered.total()
        assert body == whole.content
        raise Invalid("enough")

    monkeypatch.setattr(inputs, "parse", parse)
    (answer,) = ask(classes, encoded(whole, "gzip"))
    assert answer.json() == {"error": "enough"}
    assert buffered == len(whole.content)


@pytest.mark.parametrize("kind", ["classes", "stochastic"])
def test_damaged_requests_are_invalid_or_valid(kind: str, request_of: Callable[..., Any]) -> None:
    """Any damage is told in a line, or does not matter."""
    model, random = request_of(kind).models.first, np.random.default_rng(0)
    feeds: Feeds = (
        {"noise": NOISE, "steps_noise": NOISE[None]}
        if kind == "stochastic"
        else {"noise": NOISE, "y": np.array([1, 2]), "steps": np.array([3])}
    )
    valid, lines = 0, list[str]()
    for _ in range(1500):
        fields, blobs = message(feeds, {name for name in feeds if random.integers(2)})
        text = json.dumps(fields).encode()
        body, length = bytearray(text + blobs), len(text) + int(random.integers(-1, 2)) * int(random.integers(3))
        for _ in range(random.integers(3)):
            start, most = int(random.integers(len(body))), int(random.integers(1, 9))
            match random.integers(4):
                case 0:
                    body[start : start + most] = random.bytes(most)
                case 1:
                    del body[start : start + most]
                case 2:
                    body[start:start] = body[start : start + most]
                case 3:
                    body[start : start + most] = bytes(random.choice(list(b'[]{}",:0123456789.-e'), most).tolist())
        try:
            inputs.parse(body, str(length) if random.integers(9) else None, model, 16)
            valid += 1
        except Invalid as error:
            lines.append(str(error))
    assert 100 < valid < 1400
    assert max(map(len, lines)) < 250


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda _: b"{}", "incorrect header check"),
        (lambda _: b"", "it is incomplete"),
        (lambda body: body[:-1], "it is incomplete"),
        (lambda body: body[:20], "it is incomplete"),
        (lambda body: body + b"\0", "it goes on after its end"),
        (lambda body: body[:-4] + bytes(4), "incorrect "),
    ],
)
def test_damaged_bodies(classes: Service, encoding: str, change: Callable[[bytes], bytes], line: str) -> None:
    (answer,) = ask(classes, encoded(request(FIELDS, BLOB), encoding, change))
    assert answer.status_code == 400
    assert answer.json()["error"].startswith(f"the body is not valid {encoding}: {line}")
    assert not classes.buffered


@pytest.mark.parametrize("encoding", ["br", "gzip, gzip", "x" * 1000])
def test_other_encodings(classes: Service, encoding: str) -> None:
    (answer,) = ask(classes, encoded(request(FIELDS, BLOB), encoding))
    line = f"Content-Encoding: must be one of gzip, deflate (got {encoding[:50]})"
    assert (answer.status_code, answer.json()) == (415, {"error": line})
    assert answer.headers["Accept-Encoding"] == "gzip, deflate"


def test_a_body_that_expands_beyond_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = 3_000_000
    small = service(write_model(tmp_path / "sampler.onnx", "ddpm", False), max_body=limit, max_buffered=3 * limit)
    bomb, made, original = httpx.Request("POST", f"http://test{INFER}", content=bytes(20 * limit)), 0, pieces
    most = 0

    def counted(body: bytearray, encoding: str) -> Iterator[bytes]:
        nonlocal made, most
        for piece in original(body, encoding):
            assert threading.current_thread().name.startswith("conversion")  # not that of the event loop
            most = max(most, small.buffered.total() - made)
            made += len(piece)
            yield piece

    monkeypatch.setattr(compression, "pieces", counted)
    line = f"the request body exceeds {limit} bytes when decompressed; send fewer images per request"
    for encoding in ENCODERS:
        made = most = 0
        (answer,) = ask(small, whole := encoded(bomb, encoding))
        assert most == len(whole.content)  # it counts as well, until all is decompressed
        assert (answer.status_code, answer.json()) == (413, {"error": line})
        assert limit < made <= limit + 2**20
        assert not small.buffered
    small.max_buffered = limit
    (answer,) = ask(small, encoded(bomb, "gzip"))
    assert answer.status_code == 503
    assert answer.json()["error"].startswith("too many bytes of requests are being processed")
    assert not small.buffered


def test_pieces_are_small_and_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = np.random.default_rng(0).bytes(2_500_000) + bytes(40_000_000) + b"end"
    for encoding, encode in ENCODERS.items():
        found = list(pieces(bytearray(encode(whole)), encoding))
        assert max(map(len, found)) <= 2**20
        assert b"".join(found) == whole
        monkeypatch.setattr(compression, "PIECE", len(encode(b"all")))  # the body ends where a piece does
        for more in (b"\0", encode(b"all")):
            with pytest.raises(Invalid, match="goes on after its end"):
                list(pieces(bytearray(encode(b"all") + more), encoding))
        monkeypatch.undo()


@pytest.mark.parametrize(
    ("accepts", "encoding"),
    [
        ("", None),
        ("identity", None),
        ("br", None),
        ("gzip", "gzip"),
        ("deflate", "deflate"),
        ("gzip, deflate, br, zstd", "gzip"),
        ("deflate;q=1.0, gzip;q=0", "deflate"),
        ("gzip;q=0.000, deflate; q=0", None),
        ("GZip; q=0.5", "gzip"),
        ("*", "gzip"),
        ("gzip;q=0, *", "deflate"),
        ("x-gzip-like", None),
    ],
)
def test_accepted_encodings(classes: Service, accepts: str, encoding: str | None) -> None:
    (answer,) = ask(classes, request(FIELDS, BLOB, **{"Accept-Encoding": accepts}))
    assert answer.headers.get("Content-Encoding") == encoding
    assert answer.headers["Vary"] == "Accept-Encoding"
    assert set(received(answer)) == {"images", "x_0"}


def test_what_is_not_compressed(classes: Service) -> None:
    one = message({"noise": NOISE[:1]}, set(), outputs=[{"name": "images", "parameters": {"binary_data": True}}])
    accepts = {"Accept-Encoding": "gzip"}
    short, picture = ask(classes, request(*one, **accepts), get("/images?n=4", **accepts))
    for answer in (short, picture):
        assert answer.status_code == 200
        assert "Content-Encoding" not in answer.headers
    assert len(short.content) < 1024

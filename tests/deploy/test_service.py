"""The protocol and its errors, tested in this process."""

import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray
from pydantic import ValidationError

from deploy.service import page
from deploy.service.protocol import InferenceRequest
from deploy.service.state import Service
from deploy.service.work import Feeds
from tests.deploy.models import write_model
from tests.deploy.services import INFER, ask, direct, get, post, received, same, service, tensor
from tests.export.test_sampler_graph import SHAPE

pytestmark = pytest.mark.slow

Body = dict[str, Any]


def noise(count: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((count, *SHAPE), np.float32)


def body(*others: Body, count: int = 2, seed: int = 0, **more: Any) -> Body:
    return {"inputs": [tensor("noise", noise(count, seed)), *others], **more}


def test_health_and_metadata(classes: Service) -> None:
    paths = ["/v2", "/v2/health/live", "/v2/health/ready", "/v2/models/ddpm/ready", "/v2/models/ddpm"]
    numbered = f"/v2/models/ddpm/versions/{'a' * 12}"
    answers = ask(classes, *map(get, [*paths, f"{numbered}/ready", numbered]))
    assert {answer.status_code for answer in answers} == {200}
    server, live, ready, model_ready, metadata, *again = [answer.json() for answer in answers]
    assert server == {"name": "ddpm", "version": "1", "extensions": ["binary_tensor_data"]}
    assert (live, ready, model_ready) == (
        {"live": True},
        {"live": True, "ready": True},
        {"name": "ddpm", "ready": True},
    )
    assert again == [model_ready, metadata]
    assert metadata["versions"] == ["a" * 12]
    assert metadata["platform"] == "onnxruntime_onnx"
    runs = {"provider": "CPUExecutionProvider", "device": "cpu", "threads": 1}
    limits = {"steps": 4, "max_steps": 50, "guidance": 2.5, "max_images": 16}
    assert metadata["parameters"] == {"classes": ["0", "1", "2"], **limits, **runs}
    assert {each["name"]: (each["datatype"], each["shape"]) for each in metadata["inputs"]} == {
        "noise": ("FP32", [-1, *SHAPE]),
        "steps": ("INT64", [1]),
        "y": ("INT64", [-1]),
        "guidance": ("FP32", [1]),
    }
    assert {each["name"]: (each["datatype"], each["shape"]) for each in metadata["outputs"]} == {
        "images": ("UINT8", [-1, *SHAPE[1:], SHAPE[0]]),
        "x_0": ("FP32", [-1, *SHAPE]),
    }


def test_inference(classes: Service) -> None:
    others = [
        tensor("steps", np.array([3])),
        tensor("y", np.array([2, -1])),
        tensor("guidance", np.array([1.5], np.float32)),
    ]
    (answer,) = ask(classes, post(body(*others, id="42")))
    assert {key: answer.json()[key] for key in ("id", "model_name", "model_version")} == {
        "id": "42",
        "model_name": "ddpm",
        "model_version": "a" * 12,
    }
    found, expected = (
        received(answer),
        direct(classes, noise=noise(2), steps=[3], y=[2, -1], guidance=np.float32([1.5])),
    )
    same(found["images"], expected["images"])
    np.testing.assert_allclose(found["x_0"], expected["x_0"], rtol=0, atol=2 / 255)  # a grey level


def test_optional_inputs(classes: Service) -> None:
    numbered = INFER.replace("/infer", f"/versions/{'a' * 12}/infer")
    (answer,) = ask(classes, post(body(outputs=[{"name": "images"}]), numbered))
    found = received(answer)
    assert set(found) == {"images"}
    assert "id" not in answer.json()
    expected = direct(classes, noise=noise(2), steps=[0], y=[-1, -1], guidance=np.float32([2.5]))
    same(found["images"], expected["images"])


def test_data_may_be_nested(classes: Service) -> None:
    nested = {"name": "noise", "datatype": "FP32", "shape": [2, *SHAPE], "data": noise(2).tolist()}
    found, flat = ask(classes, post({"inputs": [nested]}), post(body()))
    same(received(found)["images"], received(flat)["images"])


@pytest.mark.parametrize("kind", ["classes", "stochastic"])
def test_a_response_does_not_depend_on_other_requests_in_the_batch(kind: str, request: pytest.FixtureRequest) -> None:
    served: Service = request.getfixturevalue(kind)
    random = np.random.default_rng(0)
    bodies, before = [], served.metrics.text()
    for seed in range(8):
        count = int(random.integers(1, 4))
        steps = random.standard_normal((3 + seed % 2, count, *SHAPE), np.float32)
        labels = tensor("y", random.integers(-1, 3, count))
        other = labels if kind == "classes" else tensor("steps_noise", steps)
        bodies.append(body(other, count=count, seed=seed))
    joined = ask(served, *map(post, bodies))
    assert served.metrics.text() != before
    for each, answer in zip(bodies, joined, strict=True):
        (alone,) = ask(served, post(each))
        same(received(answer)["images"], received(alone)["images"])


def without(name: str) -> Callable[[Body], None]:
    def change(body: Body) -> None:
        body["inputs"] = [each for each in body["inputs"] if each["name"] != name]

    return change


def change(index: int, **values: Any) -> Callable[[Body], None]:
    return lambda body: body["inputs"][index].update(values)


def add(*inputs: Body) -> Callable[[Body], None]:
    return lambda body: body["inputs"].extend(inputs)


size = int(np.prod(SHAPE))
ERRORS: list[tuple[Callable[[Body], None], str]] = [
    (without("noise"), "input noise: missing; send standard normal noise, FP32 of shape [-1, 3, 7, 10]"),
    (add(tensor("eps", np.array([1]))), "input eps: no such input; the model has noise, steps"),
    (add(tensor("noise", noise(1))), "input noise: given twice"),
    (change(0, datatype="FP64"), "input noise: datatype must be FP32 (got FP64)"),
    (change(0, shape=[2, 3, 10, 7]), "input noise: shape must be [-1, 3, 7, 10]"),
    (change(0, shape=[0, *SHAPE], data=[]), "input noise: shape must be [-1, 3, 7, 10]"),
    (change(0, shape=[2 * size]), "input noise: shape must be"),
    (change(0, shape=[3, *SHAPE]), f"input noise: shape [3, 3, 7, 10] needs {3 * size} values (got {2 * size})"),
    (change(0, shape=[17, *SHAPE]), "input noise: at most 16 images per request (got 17)"),
    (change(0, data=[[1.0, 2.0]]), "input noise: data is not nested according to shape"),
    (change(0, data=["1"] * 2 * size), "input noise: data must contain only numbers"),
    (change(0, data=[True] * 2 * size), "input noise: data must contain only numbers"),
    (change(0, data=[None] * 2 * size), "input noise: data must contain only numbers"),
    (change(0, data=[1e39] * 2 * size), "input noise: must be from -1000 to 1000 (got inf)"),
    (change(0, data=[0.5, 1000.5] * size), "input noise: must be from -1000 to 1000 (got 1000.5)"),
    (
        change(0, data=[10**400] * 2 * size),
        "input noise: must be from -1000 to 1000 (got more than FP32 can hold)",
    ),
    (change(0, data="noise"), "inputs.0.data: input should be a valid array"),
    (change(0, shape=[2.5]), "inputs.0.shape.0: input should be a valid integer (got 2.5)"),
    (change(0, value=[1]), "inputs.0.value: unknown field; remove it"),
    (add(tensor("y", np.array([0, 3]))), "input y: must be from -1 to 2, -1 for no class (got 3)"),
    (add(tensor("y", np.array([10, -2]))), "input y: must be from -1 to 2, -1 for no class (got 10)"),
    (add(tensor("y", np.array([0, -2]))), "input y: must be from -1 to 2, -1 for no class (got -2)"),
    (
        add(tensor("guidance", np.array([1e4], np.float32))),
        "input guidance: must be from -1000 to 1000 (got 10000)",
    ),
    (add(tensor("y", np.array([0]))), "input y: must have as many images as noise, 2 (got 1)"),
    (add(tensor("y", np.array([0.5, 1], np.float32), "INT64")), "input y: data must contain only integers"),
    (
        add({"name": "y", "shape": [2], "datatype": "INT64", "data": [2**63, 0]}),
        "input y: must be from -1 to 2, -1 for no class (got more than INT64 can hold)",
    ),
    (add(tensor("steps", np.array([51]))), "input steps: must be 1 to 50, or 0 for 4 (got 51)"),
    (add(tensor("steps", np.array([-1]))), "input steps: must be 1 to 50, or 0 for 4 (got -1)"),
    (add(tensor("steps", np.array([1, 2]))), "input steps: shape must be [1]"),
    (lambda body: body.update(outputs=[{"name": "eps"}]), "output eps: no such output; the model has images"),
    (lambda body: body.update(outputs=[{"name": "x_0"}] * 2), "outputs: an output is listed twice"),
    (lambda body: body.pop("inputs"), "inputs: field required"),
    (lambda body: body.update(id=7), "id: input should be a valid string (got 7)"),
]


@pytest.mark.parametrize(("spoil", "line"), ERRORS, ids=[line[:40] for _, line in ERRORS])
def test_an_invalid_request_gets_a_one_line_error(classes: Service, spoil: Callable[[Body], None], line: str) -> None:
    asked = body()
    spoil(asked)
    (answer,) = ask(classes, post(asked))
    error = answer.json()["error"]
    assert answer.status_code == 400
    assert line in error
    assert "\n" not in error


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"inputs": [', "\xff", "[" * 100_000])
def test_invalid_json(classes: Service, text: str) -> None:
    (answer,) = ask(classes, httpx.Request("POST", f"http://test{INFER}", content=text.encode("latin-1")))
    assert answer.status_code == 400
    assert answer.json()["error"]


def test_validation_stops_at_the_first_of_many_errors() -> None:
    for fields in ({"inputs": [1] * 100_000}, {"inputs": [], "outputs": [1] * 100_000}):
        with pytest.raises(ValidationError) as error:
            InferenceRequest.model_validate_json(json.dumps(fields))
        assert error.value.error_count() == 1


def test_values_that_json_does_not_define(classes: Service) -> None:
    for name in ("noise", "guidance"):
        for value, shown in (("NaN", "nan"), ("-Infinity", "-inf")):
            ones = np.ones((1, *SHAPE) if name == "noise" else 1, np.float32)
            text = json.dumps({"inputs": [tensor(name, ones)]}).replace("1.0", value)
            (answer,) = ask(classes, httpx.Request("POST", f"http://test{INFER}", content=text))
            line = f"input {name}: must be from -1000 to 1000 (got {shown})"
            assert (answer.status_code, answer.json()) == (400, {"error": line})


def test_noise_of_the_steps(stochastic: Service) -> None:
    steps = np.random.default_rng(1).standard_normal((5, 2, *SHAPE), np.float32)
    good, missing, other, none, many = ask(
        stochastic,
        post(body(tensor("steps_noise", steps))),
        post(body()),
        post(body(tensor("steps_noise", steps[:, :1]))),
        post(body(tensor("y", np.array([1, 1])), tensor("steps_noise", steps))),
        post(body(tensor("steps_noise", np.zeros((51, 2, *SHAPE), np.float32)))),
    )
    same(received(good)["images"], direct(stochastic, noise=noise(2), steps_noise=steps)["images"])
    assert "input steps_noise: missing" in missing.json()["error"]
    assert "input steps_noise: must have as many images as noise, 2 (got 1)" in other.json()["error"]
    assert "input y: no such input" in none.json()["error"]
    assert "input steps_noise: must have 1 to 50 steps (got 51)" in many.json()["error"]


@pytest.mark.parametrize("path", ["/v2/models/other", "/v2/models/ddpm/versions/7", "/v2/models/ddpm/versions/7/ready"])
def test_unknown_models(classes: Service, path: str) -> None:
    read, inferred = ask(classes, get(path), post(body(), f"{path.removesuffix('/ready')}/infer"))
    assert (read.status_code, inferred.status_code) == (404, 404)
    assert "unknown; this service has ddpm" in read.json()["error"] or "version 7: not served" in read.json()["error"]


def test_errors_are_one_line(classes: Service) -> None:
    (answer,) = ask(classes, get("/v2/models/a%0Ab"))
    assert answer.json() == {"error": "model a b: unknown; this service has ddpm"}


def test_oversized_bodies(tmp_path: Path) -> None:
    small = service(write_model(tmp_path / "sampler.onnx", "dpm-solver++", False), max_body=10_000)
    sent = 0

    async def chunks() -> AsyncIterator[bytes]:
        nonlocal sent
        while True:
            sent += 1000
            yield b" " * 1000

    with_length, chunked = ask(
        small, post(body(count=16)), httpx.Request("POST", f"http://test{INFER}", content=chunks())
    )
    assert [answer.status_code for answer in (with_length, chunked)] == [413, 413]
    assert "exceeds 10000 bytes" in chunked.json()["error"]
    assert sent <= 12_000


def test_a_full_queue_and_a_failing_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_model(tmp_path / "sampler.onnx", "dpm-solver++", False)
    full = service(path, max_batch=1, max_waiting=16)
    answers = ask(full, *(get("/images?n=8&seed=1") for _ in range(6)))
    statuses = [answer.status_code for answer in answers]
    assert set(statuses) == {200, 503}
    refused = answers[statuses.index(503)]
    assert refused.headers["Retry-After"] == "1"
    assert "images are waiting" in refused.json()["error"]

    def fail(*_: Any) -> Feeds:
        raise RuntimeError("out of memory\nat once")

    with monkeypatch.context() as patch:
        patch.setattr(full.models.first, "run", fail)
        (failed,) = ask(full, get("/images"))
    assert (failed.status_code, failed.json()) == (500, {"error": "the model failed: out of memory"})
    assert ask(full, get("/images"))[0].status_code == 200
    text = full.metrics.text().decode()
    assert 'ddpm_requests_total{path="/images",status="500"} 1.0' in text
    assert f'ddpm_requests_total{{path="/images",status="503"}} {statuses.count(503):.1f}' in text
    assert f'ddpm_images_total{{model="ddpm"}} {8 * statuses.count(200) + 16:.1f}' in text
    place = 'alias="",device="cpu",model="ddpm",provider="CPUExecutionProvider",threads="1"'
    described = f'{place},version="{"a" * 12}",weights="{"a" * 64}"'
    assert f"ddpm_model_info{{{described}}} 1.0" in text


def test_draining(classes: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(classes, "draining", True)
    live, ready, model, images = ask(
        classes, get("/v2/health/live"), get("/v2/health/ready"), get("/v2/models/ddpm/ready"), get("/images")
    )
    assert [answer.status_code for answer in (live, ready, model, images)] == [200, 503, 503, 200]
    assert images.headers["Connection"] == "close"
    assert model.json() == {"name": "ddpm", "ready": False}


def test_the_page_and_nothing_else_of_its_folder(classes: Service, tmp_path: Path) -> None:
    paths = ["/", "/main.js", "/sampler.js", "/README.md", "/%2e%2e/service/page.py"]
    index, script, *others = ask(classes, *map(get, paths))
    assert [answer.status_code for answer in (index, script, *others)] == [200, 200, 404, 404, 404]
    assert '<meta name="service" content="." />' in index.text
    assert script.headers["Content-Type"].startswith("text/javascript")
    for answer in (index, script):
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["Content-Security-Policy"].startswith("default-src 'none'; script-src 'self';")
        (again,) = ask(classes, get(answer.request.url.path, **{"If-None-Match": answer.headers["ETag"]}))
        assert (again.status_code, again.content) == (304, b"")
    assert page.routes(tmp_path / "web").routes == []


def test_an_unknown_model_is_named_in_one_line(classes: Service) -> None:
    (answer,) = ask(classes, get("/v2/models/a%0A%0Db"))
    assert (answer.status_code, answer.json()["error"]) == (404, "model a b: unknown; this service has ddpm")

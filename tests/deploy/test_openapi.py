"""The OpenAPI document and its page: valid, complete, and with examples that work."""

import hashlib
import html
import json
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import numpy as np
import pytest
from fastapi.openapi.models import OpenAPI

from deploy.service.keys import Keys
from deploy.service.metrics import Metrics
from deploy.service.state import Service
from tests.deploy.binary import message, request
from tests.deploy.services import INFER, ask, direct, get, post, received, same
from tests.export.test_sampler_graph import SHAPE

pytestmark = pytest.mark.slow
NOISE = np.zeros((1, *SHAPE), np.float32)


@pytest.fixture(params=["classes", "stochastic"])
def served(request: pytest.FixtureRequest) -> Service:
    service: Service = request.getfixturevalue(request.param)
    return service


def document(service: Service) -> dict[str, Any]:
    (answer,) = ask(service, get("/openapi.json"))
    found: dict[str, Any] = answer.json()
    return found


def check(found: Any, schema: dict[str, Any], whole: dict[str, Any]) -> None:
    jsonschema.Draft202012Validator({**schema, "components": whole["components"]}).validate(found)


def commands(service: Service) -> list[list[str]]:
    """The commands on the page, as words."""
    (answer,) = ask(service, get("/docs"))
    assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
    found = [shlex.split(html.unescape(text)) for text in re.findall(r"<pre>(curl .*?)</pre>", answer.text)]
    assert len(found) == sum(len(methods) for methods in document(service)["paths"].values())
    return found


def requested(words: list[str]) -> httpx.Request:
    """The request that curl sends."""
    if "--json" in words:
        return httpx.Request("POST", words[1], content=words[words.index("--json") + 1])
    return httpx.Request("GET", words[1])


def test_the_document_is_valid_and_has_all_routes(served: Service) -> None:
    found = document(served)
    OpenAPI.model_validate(found)
    for schema in found["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)
    references = set(re.findall(r'"#/components/schemas/(\w+)"', json.dumps(found)))
    assert references == set(found["components"]["schemas"])
    operations = {(path, method) for path, methods in found["paths"].items() for method in methods}
    model = "/v2/models/{name}", "/v2/models/{name}/versions/{version}"
    read = {
        "/v2",
        "/v2/health/live",
        "/v2/health/ready",
        "/images",
        "/metrics",
        *model,
        *(f"{of}/ready" for of in model),
    }
    assert operations >= {(path, "get") for path in read} | {(f"{of}/infer", "post") for of in model}
    assert ("/images/stream", "get") in operations
    for path, methods in found["paths"].items():
        for operation in methods.values():
            named = {each["name"] for each in operation["parameters"] if each["in"] == "path"}
            assert named == set(re.findall(r"{(\w+)}", path))
            assert "422" not in operation["responses"]
            assert operation["description"]
            for status, response in operation["responses"].items():
                assert status in ("200", "304") or set(response["content"]) == {"application/json"}
    for path in ("/images", "/images/stream"):
        names = {each["name"] for each in found["paths"][path]["get"]["parameters"]}
        assert names >= {"n", "seed", "class", "steps", "guidance", "scale"}
        assert ("every" in names) == (path == "/images/stream")


def test_every_example_works(served: Service) -> None:
    found, asked = document(served), commands(served)
    for words, answer in zip(asked, ask(served, *map(requested, asked)), strict=True):
        assert answer.status_code == 200, words[1]
        path = next(path for path in found["paths"] if re.fullmatch(re.sub(r"{\w+}", "[^/]+", path), answer.url.path))
        kinds = found["paths"][path]["post" if "--json" in words else "get"]["responses"]["200"]["content"]
        kind = answer.headers["Content-Type"].partition(";")[0]
        assert kind in kinds
        if kind == "application/json":
            check(answer.json(), kinds[kind]["schema"], found)


def test_the_example_of_inference(served: Service) -> None:
    found = document(served)
    body = found["paths"]["/v2/models/{name}/infer"]["post"]["requestBody"]["content"]["application/json"]
    check(body["example"], body["schema"], found)
    (answer,) = ask(served, post(body["example"]))
    given = {
        each["name"]: np.array(each["data"], np.float32).reshape(each["shape"]) for each in body["example"]["inputs"]
    }
    if "steps_noise" not in given:
        given |= {"steps": np.array([0]), "y": np.array([-1]), "guidance": np.float32([2.5])}
    same(received(answer)["images"], direct(served, **given)["images"])


def test_errors_and_binary_responses_are_as_described(classes: Service) -> None:
    found = document(classes)
    infer = found["paths"]["/v2/models/{name}/infer"]["post"]["responses"]
    for asked, status in (
        (post({}), 400),
        (post({}, "/v2/models/other/infer"), 404),
        (httpx.Request("POST", f"http://test{INFER}", content=bytes(2**21)), 413),
        (httpx.Request("POST", f"http://test{INFER}", content=b"{}", headers={"Content-Encoding": "br"}), 415),
    ):
        (answer,) = ask(classes, asked)
        assert answer.status_code == status
        check(answer.json(), infer[str(status)]["content"]["application/json"]["schema"], found)
    fields, blobs = message({"noise": NOISE}, {"noise"}, parameters={"binary_data_output": True})
    body = found["paths"]["/v2/models/{name}/infer"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    check(fields, body, found)
    (answer,) = ask(classes, request(fields, blobs))
    assert answer.headers["Content-Type"] in infer["200"]["content"]
    (length,) = infer["200"]["headers"]
    check(
        json.loads(answer.content[: int(answer.headers[length])]),
        infer["200"]["content"]["application/json"]["schema"],
        found,
    )


def test_a_service_with_keys(classes: Service, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(f"alice sha256:{hashlib.sha256(b'KEY').hexdigest()}\n")
    guarded = replace(classes, keys=Keys(tmp_path / "keys"), metrics=Metrics(classes.models))
    for words in commands(guarded):
        asked, header = requested(words), "Authorization: Bearer KEY"
        asked.headers.update(dict([header.split(": ")]) if header in words else {})
        (answer,) = ask(guarded, asked)
        assert answer.status_code == 200
        assert (header in words) != ("/v2/health/" in words[1])
    for path, methods in document(guarded)["paths"].items():
        for operation in methods.values():
            assert ("401" in operation["responses"]) != path.startswith("/v2/health/")


def test_the_page_needs_no_other_files(classes: Service) -> None:
    (answer,) = ask(classes, get("/docs", Host='a"<script>'))
    assert answer.headers["Content-Security-Policy"].startswith("default-src 'none'")
    assert not re.findall(r"<script|<link|<img|@import|src=", answer.text)
    assert re.findall(r'href="([^"]*)"', answer.text) == ["openapi.json"]


def test_other_paths_and_methods(classes: Service) -> None:
    unknown, method = ask(classes, get("/v2/models/ddpm/config"), get(INFER))
    assert (unknown.status_code, unknown.json()) == (404, {"error": "no such path; /docs lists those of this service"})
    assert (method.status_code, method.json()) == (405, {"error": "this path does not have the method; use POST"})
    assert method.headers["Allow"] == "POST"


@pytest.mark.parametrize("path", ["/v2", "/v2/", "/v2/health/ready", "/v2/models/ddpm", "/images?n=1", "/docs"])
def test_head(classes: Service, path: str) -> None:
    head, whole = ask(classes, httpx.Request("HEAD", f"http://test{path}"), get(path))
    assert (head.status_code, head.headers["Content-Type"]) == (200, whole.headers["Content-Type"])

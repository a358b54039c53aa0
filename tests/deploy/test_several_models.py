"""Several models in one service."""

import io
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from deploy.service.__main__ import main
from deploy.service.state import Service
from tests.deploy.models import write_model
from tests.deploy.registry import changed
from tests.deploy.services import ask, get, post, same, service, tensor

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Service:
    """`ddpm` in two versions, of which the second has other classes, and the stochastic model `student`."""
    folder = tmp_path_factory.mktemp("models")
    first, student = write_model(folder / "a.onnx", "dpm-solver++", True), write_model(folder / "b.onnx", "ddpm", False)
    second = folder / "c.onnx"
    second.write_bytes(changed(first.read_bytes(), weights_sha256="b" * 64, classes='["ant", "bee", "cat"]'))
    return service(first, second, f"student={student}")


def test_models_are_listed(several: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [("ddpm", "a"), ("ddpm", "b"), ("student", "a")]
    expected = [{"name": name, "version": digit * 12, "alias": None, "state": "READY"} for name, digit in names]
    (listed,) = ask(several, get("/v2/models"))
    assert listed.json() == expected
    text = several.metrics.text().decode()
    for name, digit in names:
        assert f'model="{name}",provider="CPUExecutionProvider",threads="1",version="{digit * 12}"' in text
    monkeypatch.setattr(several, "draining", True)
    (listed,) = ask(several, get("/v2/models"))
    assert {each["state"] for each in listed.json()} == {"UNAVAILABLE"}


def test_a_path_names_a_model_and_its_version(several: Service) -> None:
    first, second, student, ready, unknown = ask(
        several,
        get("/v2/models/ddpm"),
        get(f"/v2/models/ddpm/versions/{'b' * 12}"),
        get("/v2/models/student"),
        get("/v2/models/student/ready"),
        get("/v2/models/other"),
    )
    assert first.json()["versions"] == second.json()["versions"] == ["a" * 12, "b" * 12]
    assert (student.json()["name"], student.json()["versions"]) == ("student", ["a" * 12])
    assert {each["name"] for each in student.json()["inputs"]} == {"noise", "steps_noise"}
    assert ready.json() == {"name": "student", "ready": True}
    assert (unknown.status_code, unknown.json()) == (
        404,
        {"error": "model other: unknown; this service has ddpm, student"},
    )


def test_inference_says_which_model_answered(several: Service) -> None:
    shape = (1, *several.models.first.shape)
    noise = tensor("noise", np.zeros(shape, np.float32))
    student = [noise, tensor("steps_noise", np.zeros((2, *shape), np.float32))]
    answers = ask(
        several,
        post({"inputs": [noise]}, f"/v2/models/ddpm/versions/{'b' * 12}/infer"),
        post({"inputs": student}, "/v2/models/student/infer"),
        post({"inputs": student}, "/v2/models/ddpm/infer"),
    )
    found = [answer.json() for answer in answers]
    assert [(each.get("model_name"), each.get("model_version")) for each in found[:2]] == [
        ("ddpm", "b" * 12),
        ("student", "a" * 12),
    ]
    assert found[2]["error"].startswith("input steps_noise: no such input")


def pixels(answer: httpx.Response) -> NDArray[Any]:
    return np.asarray(Image.open(io.BytesIO(answer.content)))


def test_images_of_a_model(several: Service) -> None:
    query = "/images?n=2&seed=3&scale=1"
    default, named, version, student, again = ask(
        several,
        get(query),
        get(f"{query}&model=ddpm"),
        get(f"{query}&class=bee&model=ddpm/{'b' * 12}"),
        get(f"{query}&model=student"),
        get(f"{query}&model=student@{'a' * 12}"),
    )
    assert [answer.status_code for answer in (default, named, version, student, again)] == [200] * 5
    assert [answer.headers["X-Model-Version"][0] for answer in (default, version, student)] == ["a", "b", "a"]
    same(pixels(default), pixels(named))
    same(pixels(student), pixels(again))
    for one, other in ((default, version), (default, student)):
        assert np.abs(pixels(one).astype(int) - pixels(other)).mean() > 1
    assert len({answer.headers["ETag"] for answer in (default, version, student)}) == 3
    missing, wrong, unknown = ask(
        several, get("/images?model=other"), get("/images?model=ddpm@champion"), get("/images?class=bee")
    )
    assert [answer.status_code for answer in (missing, wrong, unknown)] == [404, 404, 400]
    assert wrong.json()["error"] == f"version champion: not served; ddpm has {'a' * 12}, {'b' * 12}"
    text = several.metrics.text().decode()
    assert 'ddpm_images_total{model="student"}' in text


def test_limits_are_those_of_each_model(several: Service) -> None:
    """A stochastic model needs noise for each step, so its requests are larger."""
    body = {"inputs": [], "parameters": {"comment": "x" * 600_000}}
    small, large = ask(several, post(body), post(body, "/v2/models/student/infer"))
    assert (small.status_code, large.status_code) == (413, 400)


def test_a_model_that_cannot_be_loaded_is_named(
    tmp_path: Path, good: bytes, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("signal.signal", lambda *_: None)
    (tmp_path / "good.onnx").write_bytes(good)
    given = ["--model", f"a={tmp_path}/good.onnx", "--model", f"b={tmp_path}/missing.onnx", "--threads", "1"]
    assert main(given) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: --model b={tmp_path}/missing.onnx: cannot read it (No such file or directory)")

"""Which models are accepted, and how an alias in MLflow is followed."""

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import mlflow
import onnx
import pytest
from mlflow import MlflowClient

from deploy.service.models import Model, ModelError, RejectedModel
from deploy.service.served import Load, Models, Served
from deploy.service.sources import Registered
from diffusion.export import digest, metadata
from tests.deploy.models import write_model

pytestmark = pytest.mark.slow

CHAMPION = "models:/ddpm@champion"
GOLDEN = {"seed": 0, "batch": 2, "output": "images", "sha256": "", "every": 10**9, "tolerance": 1, "share": 1}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write_model(tmp_path_factory.mktemp("model") / "sampler.onnx", "dpm-solver++", False).read_bytes()


def changed(content: bytes, **values: str) -> bytes:
    """The file with changed metadata."""
    graph = onnx.load_from_string(digest.check(content))
    facts = {prop.key: prop.value for prop in graph.metadata_props}
    metadata.describe(graph, facts | {f"ddpm.{key}": value for key, value in values.items()})
    return digest.seal(graph.SerializeToString())


def broken(content: bytes) -> bytes:
    """A file whose golden test fails."""
    graph = onnx.load_from_string(content)
    test = json.loads(next(prop.value for prop in graph.metadata_props if prop.key == "ddpm.golden"))
    return changed(content, golden=json.dumps(test | {"values": [255 - value for value in test["values"]]}))


def malformed(content: bytes) -> bytes:
    """A file whose golden test has words instead of numbers."""
    return changed(content, golden=json.dumps({**GOLDEN, "values": ["many"]}))


class Store:
    """An MLflow database with versions of the registered model `ddpm`."""

    def __init__(self, directory: Path) -> None:
        self.uri, self._directory = f"sqlite:///{directory}/mlflow.db", directory
        self._client = MlflowClient(self.uri)
        self._client.create_registered_model("ddpm")

    def add(self, content: bytes) -> str:
        """Register a new version and make it the champion."""
        number = len(self._client.search_model_versions("name = 'ddpm'")) + 1
        folder = self._directory / str(number)
        folder.mkdir()
        (folder / "model.onnx").write_bytes(content)
        self._client.create_model_version("ddpm", folder.as_uri())
        self.point(str(number))
        return str(number)

    def point(self, version: str) -> None:
        self._client.set_registered_model_alias("ddpm", "champion", version)

    def remove(self, version: str) -> None:
        shutil.rmtree(self._directory / version)


class Loads:
    """Loads models, and lists the versions."""

    def __init__(self) -> None:
        self.versions: list[str | None] = []

    def __call__(self, content: bytes, version: str | None, name: str) -> Model:
        self.versions.append(version)
        return Model(content, version, name)


def serve(text: str, load: Load = Model) -> Served:
    return Models(load).add(text)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    made = Store(tmp_path)
    mlflow.set_tracking_uri(made.uri)
    yield made
    mlflow.set_tracking_uri(None)


@pytest.mark.parametrize(
    ("spoil", "line"),
    [
        (lambda _: b"", "does not end with ddpm.sha256"),
        (lambda content: content[:5000], "does not end with ddpm.sha256"),
        (lambda content: digest.seal(digest.check(content)[:5000]), "not an ONNX model that ONNX Runtime can run"),
        (lambda content: content[:5000] + b"x" + content[5001:], "does not match the SHA-256 in ddpm.sha256"),
        (lambda content: content[:-1] + bytes([content[-1] ^ 1]), "does not match the SHA-256 in ddpm.sha256"),
        (lambda content: changed(content, version="1"), "ddpm.version is 1, but this service supports 2"),
        (lambda content: changed(content, golden="{}"), "has no golden test that can be run"),
        (lambda content: changed(content, alpha_bar="[0.5]"), "the file was modified"),
        (lambda content: changed(content, steps="many"), "has no golden test that can be run"),
        (lambda content: changed(content, classes="none"), "Expecting value"),
        (broken, "golden test failed"),
        (malformed, "ufunc"),
    ],
)
def test_unusable_models_are_rejected(good: bytes, spoil: Callable[[bytes], bytes], line: str) -> None:
    with pytest.raises(RejectedModel) as error:
        Model(spoil(good), None)
    assert line in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_gpu(good: bytes) -> None:
    model = Model(good, None, device="auto")
    if "CUDAExecutionProvider" in model.session.get_providers():
        pytest.skip("this machine has a GPU")
    with pytest.raises(RejectedModel, match="ONNX Runtime finds no CUDA"):
        Model(good, None, device="cuda")


@pytest.mark.parametrize("uri", ["models:/ddpm", "models:/ddpm/latest", "models:/ddpm@a/1", "models:ddpm/1"])
def test_invalid_model_uris(uri: str) -> None:
    with pytest.raises(ModelError, match="must have the form"):
        Registered(uri)


@pytest.mark.usefixtures("store")
def test_a_missing_model(tmp_path: Path) -> None:
    for source in (CHAMPION, "models:/ddpm/7", str(tmp_path / "no.onnx")):
        with pytest.raises(ModelError) as error:
            serve(source)
        assert "\n" not in str(error.value)


def test_an_alias_is_followed(store: Store, good: bytes, caplog: pytest.LogCaptureFixture) -> None:
    first = store.add(good)
    served, fixed = serve(CHAMPION), serve("models:/ddpm/1")
    before = served.current
    served.update()
    assert (served.current, before.version) == (before, first)
    with caplog.at_level(logging.INFO):
        second = store.add(changed(good, weights_sha256="b" * 64))
        served.update()
    assert (served.current.version, served.current.weights) == (second, "b" * 64)
    assert (before.version, before.weights) == (first, "a" * 64)
    assert caplog.messages == [
        "ddpm@champion: now serving version 2 (weights bbbbbbbbbbbb) with CPUExecutionProvider (cpu), 1 thread"
    ]
    store.point(first)
    served.update()
    assert (served.current.version, fixed.current.version, served.failures) == (first, first, 0)


def test_a_bad_new_version_is_logged_once(store: Store, good: bytes, caplog: pytest.LogCaptureFixture) -> None:
    store.add(good)
    loads = Loads()
    served = serve(CHAMPION, loads)
    with caplog.at_level(logging.INFO):
        store.add(broken(good))
        for _ in range(3):
            served.update()
    assert (served.current.version, served.failures) == ("1", 3)
    assert loads.versions == ["1", "2"]
    (line,) = caplog.messages
    assert line.startswith("ddpm@champion: still serving version 1: version 2: golden test failed")
    store.add(good)
    served.update()
    assert (served.current.version, served.failures) == ("3", 3)


def test_while_mlflow_is_unreachable(store: Store, good: bytes, caplog: pytest.LogCaptureFixture) -> None:
    store.add(good)
    served = serve(CHAMPION)
    second = store.add(good)
    store.remove(second)
    for _ in range(2):
        served.update()
    mlflow.set_tracking_uri("http://127.0.0.1:9")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        for _ in range(2):
            served.update()
    assert (served.current.version, served.failures) == ("1", 4)
    missing, refused = caplog.messages
    assert "version 2: not available from MLflow" in missing
    assert "not available from MLflow" in refused


def test_a_failed_download_is_retried(
    store: Store, good: bytes, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    store.add(good)
    served = serve(CHAMPION)
    second = store.add(good)
    with monkeypatch.context() as patch:
        patch.setattr("tempfile.tempdir", str(tmp_path / "full"))
        served.update()
    assert (served.current.version, served.failures) == ("1", 1)
    assert "version 2: not available from MLflow ([Errno 2]" in caplog.messages[0]
    served.update()
    assert served.current.version == second

"""MLflow's registry, and damaged models, for tests of deploy/service."""

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import onnx
from mlflow import MlflowClient

from deploy.service.models import Model
from deploy.service.served import Load, Models, Served
from diffusion.export import digest, metadata
from tests import sharing

CHAMPION = "models:/ddpm@champion"
GOLDEN = {"seed": 0, "batch": 2, "output": "images", "sha256": "", "every": 10**9, "tolerance": 1, "share": 1}


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


@cache
def database() -> bytes:
    """An MLflow database with the registered model `ddpm`; to create its tables takes seconds."""
    made = sharing.once("registry.db", lambda path: MlflowClient(f"sqlite:///{path}").create_registered_model("ddpm"))
    return made.read_bytes()


class Store:
    """An MLflow database with versions of the registered model `ddpm`."""

    def __init__(self, directory: Path) -> None:
        self.uri, self._directory = f"sqlite:///{directory}/mlflow.db", directory
        (directory / "mlflow.db").write_bytes(database())
        self._client = MlflowClient(self.uri)

    def add(self, content: bytes) -> str:
        """Register a new version and make it the champion."""
        number = len(self._client.search_model_versions("name = 'ddpm'")) + 1
        folder = self._directory / str(number)
        folder.mkdir()
        (folder / "model.onnx").write_bytes(content)
        self._client.create_model_version("ddpm", folder.as_uri())
        self.point(str(number))
        return str(number)

    def point(self, version: str, alias: str = "champion") -> None:
        self._client.set_registered_model_alias("ddpm", alias, version)

    def replace(self, version: str, content: bytes) -> None:
        (self._directory / version / "model.onnx").write_bytes(content)

    def remove(self, version: str) -> None:
        shutil.rmtree(self._directory / version)

    def begin_anew(self) -> None:
        """Delete the registered model, and register it again: its versions are counted from 1."""
        self._client.delete_registered_model("ddpm")
        self._client.create_registered_model("ddpm")
        for version in self._directory.glob("[0-9]*"):
            shutil.rmtree(version)


class Loads:
    """Loads models, and lists the versions."""

    def __init__(self) -> None:
        self.versions: list[str | None] = []
        self.before: Callable[[], None] = lambda: None

    def __call__(self, content: bytes, version: str | None, name: str) -> Model:
        self.before()
        self.versions.append(version)
        return Model(content, version, name)


def serve(text: str, load: Load = Model) -> Served:
    return Models(load).add(text)

"""Where models are read from: a file, or a version in MLflow that an alias or a number names."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

from deploy.service.models import ModelError
from diffusion.export import golden

T = TypeVar("T")
NAMED = re.compile(r"([A-Za-z0-9][A-Za-z0-9_.-]*)=(.+)")
"""A source with the name that its model is served by."""
DEFAULT_NAME = "ddpm"


class Release(NamedTuple):
    """One version of a model; equal ones have the same file."""

    uri: str
    """Its path, or models:/NAME/VERSION."""
    version: str | None = None
    """MLflow's number; None for a file."""
    created: int = 0
    """When MLflow registered it (milliseconds): numbers begin anew if a model is deleted and registered again."""


class Source(Protocol):
    """Where the versions of a model come from."""

    name: str
    """Name of the model, unless another is given."""
    alias: str | None
    """The alias in MLflow that names the version; None if it never changes."""

    def find(self) -> Release:
        """Return the version to serve now; raises ModelError if it cannot be determined."""
        ...

    def read(self, release: Release) -> bytes:
        """Return the bytes of its sampler.onnx; raises ModelError."""
        ...


class File:
    """A sampler.onnx, read once."""

    name = DEFAULT_NAME
    alias: str | None = None

    def __init__(self, path: Path) -> None:
        self._path = path

    def find(self) -> Release:
        return Release(str(self._path))

    def read(self, release: Release) -> bytes:
        try:
            return Path(release.uri).read_bytes()
        except OSError as error:
            raise ModelError(
                f"cannot read it ({error.strerror}); `ddpm export` writes models/onnx/sampler.onnx"
            ) from None


class Registered:
    """A model in the MLflow registry: models:/NAME/VERSION, or models:/NAME@ALIAS, whose version may change."""

    def __init__(self, uri: str) -> None:
        found = re.fullmatch(r"models:/([^/@]+)(?:/([0-9]+)|@([^/@]+))", uri)
        if not found:
            raise ModelError("must have the form models:/NAME@ALIAS or models:/NAME/VERSION")
        self.name, self._number, self.alias = found[1], found[2], found[3]

    def find(self) -> Release:
        def find(client: Any, _: Any) -> Release:
            if self.alias:
                found = client.get_model_version_by_alias(self.name, self.alias)
            else:
                found = client.get_model_version(self.name, self._number)
            return Release(f"models:/{self.name}/{found.version}", str(found.version), found.creation_timestamp or 0)

        return _mlflow(find)

    def read(self, release: Release) -> bytes:
        def fetch(_: Any, download: Any) -> bytes:
            with tempfile.TemporaryDirectory(prefix="ddpm-service-") as directory:
                return Path(download(artifact_uri=f"{release.uri}/model.onnx", dst_path=directory)).read_bytes()

        return _mlflow(fetch)


def parse(text: str) -> tuple[str, Source]:
    """Name and source of a model from [NAME=]SOURCE; raises ModelError."""
    named = NAMED.fullmatch(text)
    place = named[2] if named else text
    source: Source = Registered(place) if place.startswith("models:") else File(Path(place))
    return named[1] if named else source.name, source


def _mlflow(call: Callable[[Any, Any], T]) -> T:
    """Call a function with an MLflow client and the download function; raises ModelError if MLflow fails."""
    try:  # imported here, since serving a file does not need MLflow
        from mlflow import MlflowClient
        from mlflow.artifacts import download_artifacts

        return call(MlflowClient(), download_artifacts)
    except Exception as error:  # from MLflow, its database, HTTP or storage
        # Addresses differ between calls, and the same cause must give the same line.
        line = re.sub(r"<[^<>]* at 0x[0-9a-f]+>:? ?", "", golden.brief(error))
        raise ModelError(f"not available from MLflow ({line})") from None

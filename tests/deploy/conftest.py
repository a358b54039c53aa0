"""Services with small models, and npm packages."""

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import mlflow
import pytest

from deploy.service.state import Service
from tests.deploy.models import write_model
from tests.deploy.registry import Store
from tests.deploy.services import shared
from tests.machine import program


@pytest.fixture(scope="session")
def installed(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Path]]:
    """Copies a folder of deploy/ and installs the packages in its package-lock.json, without their scripts."""
    copies = list[Path]()

    def install(name: str) -> Path:
        npm = program("npm", "npm")
        copy = tmp_path_factory.mktemp("deploy") / name
        shutil.copytree(root / "deploy" / name, copy, ignore=shutil.ignore_patterns("node_modules", "*.onnx"))
        copies.append(copy)
        command = [npm, "ci", "--ignore-scripts", "--prefer-offline", "--no-audit", "--no-fund"]
        done = subprocess.run(command, cwd=copy, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert done.returncode == 0, done.stdout
        return copy

    yield install
    for copy in copies:
        shutil.rmtree(copy)  # pytest would keep hundreds of megabytes


@pytest.fixture(scope="session")
def classes() -> Service:
    """A service with a deterministic sampler and a network with three classes."""
    return shared("dpm-solver++", True)


@pytest.fixture(scope="session")
def stochastic() -> Service:
    return shared("ddpm", False)


@pytest.fixture(scope="session")
def good(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write_model(tmp_path_factory.mktemp("model") / "sampler.onnx", "dpm-solver++", False).read_bytes()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    made = Store(tmp_path)
    mlflow.set_tracking_uri(made.uri)
    yield made
    mlflow.set_tracking_uri(None)

"""Services of small models, and what npm and Debian bring."""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from deploy.service.app import Service
from tests.deploy.services import shared


def program(package: str, *names: str) -> str:
    """The first of these programs that is there. Without any a test is skipped; in CI, where all are, it fails."""
    for name in names:
        if found := shutil.which(name):
            return found
    reason = f"needs {names[0]}: install the package {package}"
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def installed(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Path]]:
    """Copies a folder of deploy/ with the packages of its package-lock.json; they run no scripts."""
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
        shutil.rmtree(copy)  # hundreds of megabytes, which pytest would keep


@pytest.fixture(scope="session")
def classes() -> Service:
    """Of a deterministic sampler, of a network with three classes."""
    return shared("dpm-solver++", True)


@pytest.fixture(scope="session")
def stochastic() -> Service:
    return shared("ddpm", False)

"""What tests need of the machine they run on."""

import os
import shutil
import socket

import pytest


def program(package: str, *names: str) -> str:
    """The first of these programs that is there. Without any a test is skipped; in CI, where all are, it fails."""
    for name in names:
        if found := shutil.which(name):
            return found
    reason = f"needs {names[0]}: install the package {package}"
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


def free_port() -> int:
    """A port of the loopback interface that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port

"""Requirements of tests on the machine."""

import os
import shutil
import socket

import pytest


def program(package: str, *names: str) -> str:
    """The first of these programs that is installed. If none is, the test is skipped, or fails in CI."""
    for name in names:
        if found := shutil.which(name):
            return found
    reason = f"needs {names[0]}: install the package {package}"
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


def free_port() -> int:
    """A free port of the loopback interface."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port

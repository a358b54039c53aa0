"""Addresses of this repository's services, as recorded by `make up`."""

import json
import os
import socket
from pathlib import Path
from urllib.parse import urlsplit

from flows.paths import Paths

PORTS = {"PREFECT_PORT": 4200, "MLFLOW_PORT": 5000}


def recorded(paths: Paths) -> dict[str, str]:
    """The ports and the tracking URI with which the services were last started; empty before the first time."""
    try:
        found = json.loads((paths.state / "services" / "addresses.json").read_text())
    except (OSError, ValueError):
        return {}
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        return {}
    return found if all(_is_port(found[name]) for name in PORTS if name in found) else {}


def _is_port(text: str) -> bool:
    return text.isascii() and text.isdecimal() and 1 <= int(text) <= 65535


def port(variable: str, paths: Paths) -> str:
    """The port of the last start, else PREFECT_PORT or MLFLOW_PORT, else the default."""
    return recorded(paths).get(variable) or os.environ.get(variable) or str(PORTS[variable])


def mlflow(paths: Paths) -> str:
    """Address of the MLflow server that `make up` starts."""
    return f"http://127.0.0.1:{port('MLFLOW_PORT', paths)}"


def listens(url: str) -> bool:
    """Whether anything listens at an address."""
    try:
        parts = urlsplit(url)
        with socket.create_connection(
            (parts.hostname or "", parts.port or (80 if parts.scheme == "http" else 443)), timeout=3
        ):
            return True
    except (OSError, ValueError):
        return False


def no_server_message(url: str) -> str:
    """Advice if no Prefect server answers at an address."""
    own = f"http://127.0.0.1:{port('PREFECT_PORT', Paths(Path.cwd()))}/api"
    if own != url and listens(own):
        other = f"but this repository's does at {own}: run `export PREFECT_API_URL={own}`"
        return f"No Prefect server answers at {url}, {other}"
    return f"No Prefect server answers at {url}: `make up` starts one."

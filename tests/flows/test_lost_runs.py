"""Runs without a worker are closed on the server of these services, and on no other."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

import pytest

from diffusion.errors import UserError
from flows import services
from flows.services import Services

SERVER = """
import http.server, json, sys

class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        with open(sys.argv[1], "a") as log:
            log.write(json.dumps([self.path, json.loads(body)]) + "\\n")
        within = "two" if "parent_flow_run_id" in body else "one"
        self.reply([{"id": within, "state_type": "RUNNING"}] if "flow_runs/filter" in self.path else [])

    def do_GET(self):
        self.reply({})

    def reply(self, value):
        content = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
print(server.server_port, flush=True)
server.serve_forever()
"""
"""A server with a running flow run, in which another one runs, that logs the requests it receives."""


@contextmanager
def prefect(directory: Path, log: Path) -> Iterator[int]:
    """The port of a server that belongs to the services in `directory`."""
    environment = os.environ | {"DDPM_SERVICES": str(directory)}
    command = [sys.executable, "-c", SERVER, str(log)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=environment, stdout=pipe, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout
        try:
            yield int(process.stdout.readline())
        finally:
            process.kill()


def states_set(log: Path) -> list[tuple[str, str]]:
    requests = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    return [(path, body["state"]["type"]) for path, body in requests if path.endswith("/set_state")]


def become(*_: Any) -> NoReturn:
    raise SystemExit


@pytest.mark.parametrize("command", [services.down, services.up, services.worker])
@pytest.mark.parametrize("ours", [True, False], ids=["own", "of-another-clone"])
def test_runs_are_closed_only_on_their_own_server(
    command: Callable[[Services], None], ours: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "execvp", become)
    monkeypatch.setattr(os, "environ", dict(os.environ))  # `worker` adds to it
    here, log = Services(tmp_path, prefect_port=1, mlflow_port=1), tmp_path / "log"
    with prefect(here.directory if ours else tmp_path / "other", log) as port, suppress(UserError, SystemExit):
        command(Services(tmp_path, prefect_port=port, mlflow_port=1))
    assert states_set(log) == (
        [("/api/flow_runs/one/set_state", "CRASHED"), ("/api/flow_runs/two/set_state", "CRASHED")] if ours else []
    )


def test_remains_of_these_services_do_not_claim_a_foreign_server(tmp_path: Path) -> None:
    """The server of another clone may use the port by now, while only another process remains here."""
    here = Services(tmp_path, prefect_port=1, mlflow_port=1)
    log, unused = tmp_path / "log", tmp_path / "unused"
    with prefect(here.directory, unused), prefect(tmp_path / "other", log) as port:
        services.down(Services(tmp_path, prefect_port=port, mlflow_port=1))
    assert states_set(log) == []

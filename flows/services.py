"""The services in the background: `python -m flows.services up | down | status`.

supervisord (deploy/supervisord.conf) keeps a Prefect server, an MLflow server and a Prefect worker running, all on
loopback, with their files in `.ddpm/`. Each is a single process, so that killing it frees its port.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import time
import xmlrpc.client
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from supervisor.xmlrpc import SupervisorTransport

from diffusion.errors import SystemFault, UserError, without_secrets
from diffusion.storage.files import write_atomic, write_json
from flows import addresses, deployment, http, mlflow_pages, processes, yaml_files
from flows.environment import setting
from flows.paths import Paths

POOL = "ddpm"
Port = Annotated[int, Field(ge=1, le=65535)]
START_TIMEOUT_SECONDS = 180.0
"""How long a service may take to become healthy; a cold start on a slow disk takes a minute."""
WORKER = "DDPM_WORKER"
"""Set to the services' directory for the worker and everything it runs, as DDPM_SERVICES is for all services."""
MAX_SOCKET_BYTES = 103
"""Longest path of a Unix socket: 107 bytes on Linux, 103 on macOS."""
WRITTEN = "# Written by `make up`: where Prefect's commands find this repository's server.\n"
"""First line of prefect.toml, which git ignores; Prefect reads it before pyproject.toml."""


@dataclass(frozen=True)
class Services:
    """The services of one repository."""

    root: Path = field(default_factory=Path.cwd)
    prefect_port: int = field(default_factory=lambda: setting("PREFECT_PORT", addresses.PORTS["PREFECT_PORT"], Port))
    mlflow_port: int = field(default_factory=lambda: setting("MLFLOW_PORT", addresses.PORTS["MLFLOW_PORT"], Port))

    @property
    def directory(self) -> Path:
        return Paths(self.root).state / "services"

    @property
    def prefect(self) -> str:
        return f"http://127.0.0.1:{self.prefect_port}"

    @property
    def mlflow(self) -> str:
        return f"http://127.0.0.1:{self.mlflow_port}"

    def environment(self) -> dict[str, str]:
        """The environment of the services and of the commands that talk to them."""
        ours = {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
            "DDPM_ROOT": str(self.root),
            "DDPM_SERVICES": str(self.directory),
            "PREFECT_PORT": str(self.prefect_port),
            "MLFLOW_PORT": str(self.mlflow_port),
            "PREFECT_HOME": str(Paths(self.root).state / "prefect"),
            "PREFECT_API_URL": f"{self.prefect}/api",
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            # Stored in PREFECT_HOME, so that a run whose concurrency lease is lost in a server restart is ended.
            "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
            "PREFECT_PLUGINS_ENABLED": "false",  # the plugin is only for the command line
            "PREFECT_SERVER_LOGS_STREAM_OUT_ENABLED": "true",  # so that `--watch` shows the log
            "PREFECT_SERVER_LOGS_STREAM_PUBLISHING_ENABLED": "true",
            "PREFECT_WORKER_QUERY_SECONDS": "2",
            "MLFLOW_TRACKING_URI": os.environ.get("MLFLOW_TRACKING_URI", self.mlflow),
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # seven processes for unused jobs
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "DO_NOT_TRACK": "1",
        }
        return {**os.environ, **ours}

    @property
    def socket(self) -> Path:
        return self.directory / "supervisor.sock"

    def addresses(self) -> dict[str, str]:
        """The addresses that a user may configure, without passwords; recorded by `up`."""
        environment = self.environment()
        return {
            name: without_secrets(environment[name]) for name in ("PREFECT_PORT", "MLFLOW_PORT", "MLFLOW_TRACKING_URI")
        }

    def recorded(self) -> dict[str, str]:
        """The addresses with which the services were last started."""
        return self.addresses() | addresses.recorded(Paths(self.root))

    def as_started(self) -> "Services":
        """The services on the ports with which they were last started."""
        recorded = self.recorded()
        return replace(self, prefect_port=int(recorded["PREFECT_PORT"]), mlflow_port=int(recorded["MLFLOW_PORT"]))

    def as_named(self) -> "Services":
        """The services on the ports set in the environment, or else those of the last start."""
        named = {name.lower(): getattr(self, name.lower()) for name in addresses.PORTS if name in os.environ}
        return replace(self.as_started(), **named)

    def supervisor(self) -> Any:
        """supervisord's interface (http://supervisord.org/api.html); its calls raise OSError when it is not running."""
        if not self.socket.exists():
            raise FileNotFoundError(self.socket)
        transport = SupervisorTransport(None, None, f"unix://{self.socket}")
        return xmlrpc.client.ServerProxy("http://127.0.0.1", transport=transport).supervisor

    def states(self) -> dict[str, str]:
        """State of each service as supervisord has it (RUNNING, STOPPED, ...); empty when it is not running."""
        try:
            return {each["name"]: each["statename"] for each in self.supervisor().getAllProcessInfo()}
        except OSError:
            return {}

    def healthy(self) -> dict[str, bool]:
        """Which of the services answer."""
        return {
            "prefect": http.answers(f"{self.prefect}/api/health"),
            "mlflow": http.answers(f"{self.mlflow}/health"),
            "worker": self._worker_online(),
        }

    def _worker_online(self) -> bool:
        """Whether the server has heard from the worker that runs now."""
        workers = http.json(f"{self.prefect}/api/work_pools/{POOL}/workers/filter", {}) or []
        try:
            started = self.supervisor().getProcessInfo("worker")["start"]
        except OSError:
            return False
        return any(datetime.fromisoformat(each["last_heartbeat_time"]).timestamp() >= started for each in workers)


def up(services: Services) -> None:
    """Start what is not running, wait until all answer, and deploy the flows.

    Raises: UserError: the services run with other addresses, a port is taken, a service fails.
    """
    states = services.states()
    if states and (recorded := services.recorded()) != services.addresses():
        raise UserError(
            f"running with {', '.join(f'{name}={value}' for name, value in recorded.items())}; `make down` first"
        )
    if states and set(states.values()) == {"RUNNING"} and all(services.healthy().values()):
        print("already running")
        _finish(services)
        return
    if not states and _stop(services):
        print("stopped services that had lost their supervisord", flush=True)
    for name, port in (("prefect", services.prefect_port), ("mlflow", services.mlflow_port)):
        if states.get(name) not in ("RUNNING", "STARTING") and _taken(port):
            raise UserError(
                f"port {port} is taken by another program: end it, or choose another port with {name.upper()}_PORT=..."
            )
    if not states:
        _start_supervisord(services)
    print("starting Prefect and MLflow ...", flush=True)
    for name in ("prefect", "mlflow"):
        _start(services, name)
    _wait(services, "prefect", lambda: http.answers(f"{services.prefect}/api/health"))
    _start(services, "worker")
    _wait(services, "mlflow", lambda: http.answers(f"{services.mlflow}/health"))
    _wait(services, "worker", services._worker_online)
    _finish(services)


def _finish(services: Services) -> None:
    """Deploy the flows, and say what to open and what to type next."""
    deployment.deploy(services)
    _configure_prefect(services)
    page = mlflow_pages.experiments(services.mlflow)
    with suppress(UserError, LookupError, TypeError):  # a training will report what is wrong with the parameters
        # Not by flows/params.py: it imports torch, which takes seconds.
        experiment = yaml_files.read_yaml(Paths(services.root).params)["tracking"]["experiment"]
        page = mlflow_pages.runs_of(services.mlflow, str(experiment))
    activated = os.environ.get("VIRTUAL_ENV") == sys.prefix
    activate = "" if activated else f". {os.path.relpath(sys.prefix)}/bin/activate; "
    print(f"Prefect  {services.prefect}\nMLflow   {page}\ntrain    {activate}prefect deployment run train-ddpm --watch")


def _configure_prefect(services: Services) -> None:
    """Write prefect.toml, so that `prefect` finds the server on whatever port, unless it is the user's own file."""
    file, table = services.root / "prefect.toml", f'[api]\nurl = "{services.prefect}/api"\n'
    if not file.exists() or file.read_text(errors="replace").startswith(WRITTEN):
        write_atomic(file, (WRITTEN + table).encode())
    elif table not in file.read_text(errors="replace"):
        use = f"to use this repository's server, run `export PREFECT_API_URL={services.prefect}/api`"
        print(f"{file} was not written by `make up` and is left unchanged; {use}")


def _start_supervisord(services: Services) -> None:
    # supervisord binds the path with its process id at the end, of up to seven digits, before it renames it.
    if (length := len(os.fsencode(services.socket)) + 8) > MAX_SOCKET_BYTES:
        raise UserError(
            f"{services.socket}: {length - MAX_SOCKET_BYTES} characters too long for a socket; "
            "move the repository to a shorter path"
        )
    services.directory.mkdir(parents=True, exist_ok=True)
    write_json(services.directory / "addresses.json", services.addresses())
    configuration = services.root / "deploy" / "supervisord.conf"
    command = [sys.executable, "-m", "supervisor.supervisord", "-c", str(configuration)]
    done = subprocess.run(command, env=services.environment(), capture_output=True, text=True)
    if done.returncode or not _until(lambda: services.states() != {}, 10):
        reason = (done.stderr.strip() or f"see {services.directory}/supervisord.log").splitlines()[0]
        raise UserError(f"supervisord failed to start: {reason}")


def worker(services: Services) -> None:
    """Become the worker. supervisord runs only one, so whatever an earlier one left running is stopped."""
    processes.end(processes.having(WORKER, str(services.directory)))
    _close_lost_runs(services)
    os.environ.update({**services.environment(), WORKER: str(services.directory)})
    os.execvp("prefect", ["prefect", "worker", "start", "--pool", POOL, "--type", "process", "--name", "worker"])


def down(services: Services) -> None:
    """Stop all services, the worker first; a training it runs writes a checkpoint."""
    services = services.as_started()
    print("stopped" if _stop(services) else "not running")
    for name, answers in services.healthy().items():
        if answers:
            print(f"{name}: a program that `make up` did not start answers at {getattr(services, name)}")


def _stop(services: Services) -> bool:
    """Stop supervisord and everything that it, or a killed one, has started; whether there was anything."""
    states = services.states()
    if states.get("worker") in ("RUNNING", "STARTING"):
        services.supervisor().stopProcess("worker")
    runs = processes.end(processes.having(WORKER, str(services.directory)))
    _close_lost_runs(services)
    if states:
        services.supervisor().shutdown()
        if not _until(lambda: not services.socket.exists(), 60):
            raise UserError(f"supervisord does not stop; see {services.directory}/supervisord.log")
    return processes.end(processes.having("DDPM_SERVICES", str(services.directory))) or runs or bool(states)


def _close_lost_runs(services: Services) -> None:
    """Mark runs whose worker has ended, the runs within them and their tasks as ended on the server; nothing else does.

    A server of another clone of the repository, which may listen on our port, is left alone.
    """
    if not processes.listening(processes.having("DDPM_SERVICES", str(services.directory)), services.prefect_port):
        return
    api = f"{services.prefect}/api"

    def set_state(run: str, kind: str) -> None:
        state = {"type": kind, "message": "The worker was stopped; run again to continue from the last checkpoint."}
        http.json(f"{api}/{run}/set_state", {"state": state, "force": True})

    unfinished = {"state": {"type": {"any_": ["PENDING", "RUNNING", "CANCELLING"]}}}
    of_pool = {"work_pools": {"name": {"any_": [POOL]}}}
    lost = http.json(f"{api}/flow_runs/filter", of_pool | {"flow_runs": unfinished}) or []
    within = unfinished | {"parent_flow_run_id": {"any_": [run["id"] for run in lost]}}
    lost += (http.json(f"{api}/flow_runs/filter", {"flow_runs": within}) or []) if lost else []  # a sweep's trials
    for run in lost:
        set_state(f"flow_runs/{run['id']}", "CANCELLED" if run["state_type"] == "CANCELLING" else "CRASHED")
    ours = {"flows": {"name": {"any_": list(deployment.FLOWS)}}}
    for task in http.json(f"{api}/task_runs/filter", ours | {"task_runs": unfinished}) or []:
        run = http.json(f"{api}/flow_runs/{task['flow_run_id']}")
        if run and run["state_type"] in ("CANCELLED", "CRASHED"):
            set_state(f"task_runs/{task['id']}", run["state_type"])


def status(services: Services) -> None:
    """Print each service's state and address; health is checked directly, not taken from supervisord."""
    services = services.as_started()
    states, healthy = services.states(), services.healthy()
    addresses = {"prefect": services.prefect, "mlflow": services.mlflow, "worker": f"work pool {POOL}"}
    for name, address in addresses.items():
        state = states.get(name, "STOPPED").lower()
        if healthy[name]:
            text = "running" if state in ("running", "starting") else f"{state}, but another process answers"
        else:
            text = "not answering" if state == "running" else state
        print(f"{name:<9}{text:<15} {address}")
    print(f"logs: {services.directory}/")


def _start(services: Services, name: str) -> None:
    if services.states()[name] not in ("RUNNING", "STARTING"):
        services.supervisor().startProcess(name, False)


def _wait(services: Services, name: str, healthy: Callable[[], bool]) -> None:
    """Wait for a service; raises UserError with the end of its log if it fails to start."""

    def settled() -> bool:
        return healthy() or services.states().get(name) in ("FATAL", "EXITED", None)

    if not _until(settled, START_TIMEOUT_SECONDS) or not healthy():
        log = services.directory / f"{name}.log"
        last = log.read_text(errors="replace").strip().splitlines()[-3:] if log.exists() else []
        raise UserError(f"{name} failed to start; see {log}: {' / '.join(last)}")


def _until(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


def _taken(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return True
    return False


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m flows.services", description=__doc__)
    commands = {command.__name__: command for command in (up, down, status, worker)}
    parser.add_argument("command", choices=commands)
    try:
        commands[parser.parse_args(argv).command](Services().as_named())
    except (UserError, OSError) as error:
        print(f"error: {SystemFault.of(error) if isinstance(error, OSError) else error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    return 0


if __name__ == "__main__":
    sys.exit(main())

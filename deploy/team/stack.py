"""The services of compose.yaml as processes on this machine."""

import contextlib
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

HERE = Path(__file__).parent
PORTS = {"postgres": 5432, "s3": 8333, "prefect": 4200, "mlflow": 5000, "service": 8000, "dask-scheduler": 8786}
"""The port of each service in compose.yaml."""
HEALTH = dict.fromkeys(("worker", "worker-gpu", "dask-scheduler", "dask-worker"), 8080) | {"proxy": 2019}
"""The port at which a service answers its health check, where it is another one."""
SECONDS = 180.0
"""How long a server may take to start."""


class Failed(Exception):
    """A step went wrong."""


def said(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


class Team:
    """The services of compose.yaml as processes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ports = {name: free_port() for name in PORTS}
        self.health = {name: free_port() for name in HEALTH}
        self.given = {name: secrets.token_hex(16) for name in _asked()} | {"SERVICE_KEYS": str(folder / "keys")}
        text = _interpolated((HERE / "compose.yaml").read_text(), self.given)
        self.compose: dict[str, Any] = YAML(typ="safe").load(text)
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self._started: dict[str, tuple[Sequence[str], Mapping[str, str]]] = {}

    def here(self, text: str, service: str = "") -> str:
        """Text of compose.yaml, of a service if any, with the addresses and paths that it means on this machine."""
        ports = {str(PORTS[name]): str(port) for name, port in self.ports.items()}
        if service in HEALTH:
            ports[str(HEALTH[service])] = str(self.health[service])
        names = "|".join(PORTS)
        text = re.sub(rf"\b({names}):({'|'.join(map(str, PORTS.values()))})\b", lambda m: self._address(m[1]), text)
        for source, target in self._mounted():
            text = text.replace(target, str(HERE / source))
        text = re.sub(r"\b127\.0\.0\.1:(\d+)", lambda m: f"127.0.0.1:{ports.get(m[1], m[1])}", text)
        return ports.get(text, text).replace("0.0.0.0", "127.0.0.1")

    def _address(self, name: str) -> str:
        return f"127.0.0.1:{self.ports[name]}"

    def _mounted(self) -> list[tuple[str, str]]:
        """Files of this folder and of others, and where containers have them."""
        services = self.compose["services"].values()
        volumes = [volume.split(":") for service in services for volume in service.get("volumes", [])]
        return [(source, target) for source, target, *_ in volumes if source.startswith(("./", "/"))]

    def environment(self, service: str, home: Path) -> dict[str, str]:
        """The environment of a service, in a home of its own."""
        ours = {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "HOME": str(home),
            "OMP_NUM_THREADS": "1",
        }
        given = self.compose["services"][service].get("environment", {})
        given = {name: re.sub(r"^/(work|tmp)\b", str(home), str(value)) for name, value in given.items()}
        return ours | {name: self.here(str(value), service) for name, value in given.items()} | {"HOME": str(home)}

    def start(self, name: str, command: Sequence[str] | None = None, settings: Mapping[str, str] | None = None) -> None:
        """Start a service with the command of compose.yaml, or another, in a folder and a home of its own.

        A service that is started again gets the same command and settings.
        """
        home = self.folder / name
        home.mkdir(exist_ok=True)
        if name not in self._started:
            words = command or [self.here(word, name) for word in self.compose["services"][name]["command"]]
            self._started[name] = words, settings or {}
        words, settings = self._started[name]
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                words,
                cwd=home,
                env={**self.environment(name, home), **settings},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait(self, name: str, url: str) -> None:
        """Wait until a server answers, with whatever status it has for a request without a password."""
        deadline = time.monotonic() + SECONDS
        while True:
            if self.processes[name].poll() is not None or time.monotonic() > deadline:
                raise Failed(f"{name} did not start: {self.last_line(name)}")
            try:
                urllib.request.urlopen(url, timeout=2)
            except urllib.error.HTTPError:
                pass
            except OSError:
                time.sleep(0.3)
                continue
            return said(f"{name} answers at {url}")

    def healthy(self, name: str) -> bool:
        """Whether the health check of a service succeeds."""
        kind, *test = self.compose["services"][name]["healthcheck"]["test"]
        assert kind == "CMD"
        environment = self.environment(name, self.folder / name) | {"PGPORT": str(self.ports["postgres"])}
        command = [self.here(word, name) for word in test]
        return subprocess.run(command, env=environment, capture_output=True, check=False).returncode == 0

    def until(self, what: str, holds: Callable[[], bool], name: str) -> None:
        """Wait until something holds; raises Failed with the last line of a service otherwise."""
        deadline = time.monotonic() + 2 * SECONDS
        while not holds():
            if time.monotonic() > deadline:
                raise Failed(f"not in time: {what}; {name}: {self.last_line(name)}")
            time.sleep(1)
        said(f"ok: {what}")

    def last_line(self, name: str) -> str:
        lines = (self.folder / f"{name}.log").read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else "no output"

    def stop(self) -> None:
        """Stop all processes, workers first."""
        for name, process in reversed(self.processes.items()):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGINT if name == "postgres" else signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


@contextlib.contextmanager
def team(folder: Path) -> Iterator[Team]:
    """Servers and workers, running."""
    found = Team(folder)
    try:
        _start_postgres(found)
        found.start("s3", ["moto_server", "-H", "127.0.0.1", "-p", str(found.ports["s3"])])
        found.wait("s3", f"http://127.0.0.1:{found.ports['s3']}/")
        found.start("bucket")
        if found.processes.pop("bucket").wait():
            raise Failed(f"the bucket was not created: {found.last_line('bucket')}")
        found.start("prefect")
        found.start("mlflow", settings={"LISTEN": "127.0.0.1", "PORT": str(found.ports["mlflow"])})
        found.wait("prefect", f"http://127.0.0.1:{found.ports['prefect']}/api/health")
        found.wait("mlflow", f"http://127.0.0.1:{found.ports['mlflow']}/health")
        yield found
    finally:
        found.stop()


def _start_postgres(found: Team) -> None:
    """PostgreSQL, which does not run as root, with the databases of databases.sql."""
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin")) or [Path(shutil.which("initdb") or "").parent]
    if not (programs[-1] / "initdb").exists():
        raise Failed("PostgreSQL is not installed: `apt-get install postgresql`")
    data, port = found.folder / "postgres" / "data", found.ports["postgres"]
    data.parent.mkdir()
    user = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
    if user:
        found.folder.chmod(0o755)
        shutil.chown(data.parent, "postgres", "postgres")
    password = data.parent / "password"
    password.write_text(found.given["POSTGRES_PASSWORD"])
    password.chmod(0o644)
    options = ["-D", str(data), "-U", "ddpm", "-A", "scram-sha-256", f"--pwfile={password}"]
    run([*user, str(programs[-1] / "initdb"), *options])
    options = ["-D", str(data), "-h", "127.0.0.1", "-p", str(port), "-k", str(data.parent)]
    found.start("postgres", [*user, str(programs[-1] / "postgres"), *options])
    sql = (HERE / "databases.sql").read_text()
    login = os.environ | {"PGPASSWORD": found.given["POSTGRES_PASSWORD"]}
    client = [str(programs[-1] / "psql"), "-h", "127.0.0.1", "-p", str(port), "-U", "ddpm", "-v", "ON_ERROR_STOP=1"]
    deadline = time.monotonic() + SECONDS
    while subprocess.run([*client, "postgres", "-c", "select 1"], env=login, capture_output=True).returncode:
        if found.processes["postgres"].poll() is not None or time.monotonic() > deadline:
            raise Failed(f"postgres did not start: {found.last_line('postgres')}")
        time.sleep(0.2)
    run([*client, "postgres"], env=login, input=sql)
    said(f"postgres answers at 127.0.0.1:{port}")


def run(
    command: Sequence[str], cwd: Path | None = None, env: Mapping[str, str] | None = None, input: str | None = None
) -> str:
    """Run a command to its end; raises Failed with the last lines of its output."""
    done = subprocess.run(command, cwd=cwd, env=env, input=input, capture_output=True, text=True)
    if done.returncode:
        raise Failed(
            f"{' '.join(command)}: status {done.returncode}: {' / '.join(output_of(done).strip().splitlines()[-5:])}"
        )
    return output_of(done)


def output_of(done: subprocess.CompletedProcess[str]) -> str:
    return done.stdout + done.stderr


def _asked() -> list[str]:
    """The variables that compose.yaml requires."""
    return sorted(set(re.findall(r"\$\{(\w+):\?", (HERE / "compose.yaml").read_text())))


def _interpolated(text: str, given: Mapping[str, str]) -> str:
    """Compose's `${NAME:?message}` and `${NAME:-default}`."""
    text = re.sub(r"\$\{(\w+):\?[^}]*\}", lambda found: given[found[1]], text)
    return re.sub(r"\$\{(\w+):-([^}]*)\}", lambda found: given.get(found[1], found[2]), text)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def expect(what: str, holds: bool) -> None:
    """Report a check; raises Failed if it does not hold."""
    if not holds:
        raise Failed(f"not so: {what}")
    said(f"ok: {what}")

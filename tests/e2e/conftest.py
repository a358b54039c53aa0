"""A copy of the repository with tiny parameters, and its services on free ports, for all end-to-end tests."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec
import httpx
import psutil
import pytest

from flows import http, yaml_files
from flows.changes import lay_over
from flows.services import Services
from flows.stages import STAGES
from tests import sharing
from tests.conftest import run_stages
from tests.machine import free_port

TINY = {
    "pairs": {"draws": 1, "heldout_draws": 1},
    "process": {"num_timesteps": 20},
    "network": {"kind": "uvit", "base_channels": 8, "depth": 1, "patch_size": 4},
    "train": {"steps": 20, "batch_size": 64, "warmup_steps": 2, "log_every": 5, "preview_every": 10},
    "distill": {"steps": 10, "batch_size": 64, "warmup_steps": 2, "log_every": 5, "preview_every": 5},
    "sample": {"steps": 5, "count": 4},
    "evaluate": {"resamples": 100, "likelihood_images": 8, "exact_likelihood_images": 2, "quality_samples": 40},
}

Command = Callable[..., subprocess.CompletedProcess[str]]
CANARY = "-".join(["canary", "5e1f"])
"""Part of every secret in the environment of the commands. test_train_ddpm.py searches for it in all files, of which no
source may contain it."""
FEATURES = Path(".ddpm/features")


@pytest.fixture(scope="session")
def clone(tmp_path_factory: pytest.TempPathFactory, root: Path, whole_tree: Path) -> Path:
    """The repository's files as they are, in a new commit; with the features of the digits, which take seconds to train
    and depend on none of the parameters below."""
    target = tmp_path_factory.mktemp("e2e") / "ä clone"  # as a user's path may be
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listing, cwd=root, capture_output=True, text=True, check=True).stdout.split("\0")
    for name in names:
        if (root / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, target / name)
    yaml_files.write_yaml(target / "params.yaml", lay_over(yaml_files.read_yaml(target / "params.yaml"), TINY))
    (target / "dvc.lock").unlink(missing_ok=True)
    identity = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
    for command in (["init", "--quiet"], ["add", "--all"], ["commit", "--quiet", "--message", "clone"]):
        subprocess.run(["git", *identity, *command], cwd=target, check=True)
    local = f"['remote \"secret\"']\n    url = https://me:{CANARY}-url@127.0.0.1:9/\n    password = {CANARY}-dvc\n"
    (target / ".dvc/config.local").write_text(local)
    (target / ".dvc/config.local").chmod(0o600)
    shutil.copytree(whole_tree / FEATURES, target / FEATURES)
    return target


@pytest.fixture(scope="session")
def stages_tree(clone: Path) -> Path:
    """A tree with the clone's parameters after all stages, each run by itself; tests only read it."""

    def make(tree: Path) -> None:
        for name in ("params.yaml", "model-card.md", "data/licenses.yaml", "data/raw/digits.npz"):
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(clone / name, tree / name)
        # That they are trained alike is shown in tests/evaluation/test_features.py.
        shutil.copytree(clone / FEATURES, tree / FEATURES)
        run_stages(tree, *STAGES)

    return sharing.once("stages_tree", make)


@pytest.fixture(scope="session")
def run(clone: Path) -> Command:
    """Runs a command in the clone as a user with the environment activated would; gives its status and output."""
    ports = {"PREFECT_PORT": str(free_port()), "MLFLOW_PORT": str(free_port())}
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    environment |= ports | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PREFECT_HOME": str(clone / ".ddpm" / "prefect"),
        "MLFLOW_TRACKING_URI": f"http://me:{CANARY}-uri@127.0.0.1:{ports['MLFLOW_PORT']}",
        "MLFLOW_TRACKING_PASSWORD": f"{CANARY}-mlflow",
        "MLFLOW_TRACKING_USERNAME": "me",
        "AWS_SECRET_ACCESS_KEY": f"{CANARY}-aws",
        "COLUMNS": "300",
        "OMP_NUM_THREADS": "1",  # two trainings at once on two cores
    }

    def call(*command: str, **more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command,
            cwd=clone,
            env=environment | more,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return call


@pytest.fixture(scope="package")  # down again before the other tests
def services(run: Command) -> Iterator[Command]:
    """`run`, with the services up and the flow deployed."""
    try:
        done = run("python", "-m", "flows.services", "up")
        assert done.returncode == 0, done.stdout
        yield run
    finally:
        run("python", "-m", "flows.services", "down")


@pytest.fixture(scope="package")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """An S3 server with the bucket `images`; gives the environment that finds it."""
    url = f"http://127.0.0.1:{free_port()}"
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", url.rpartition(":")[2]]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: _answers(url), 60)
        httpx.put(f"{url}/images").raise_for_status()
        yield {
            "AWS_ENDPOINT_URL": url,
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_CONFIG_FILE": str(tmp_path_factory.mktemp("aws") / "none"),
        }
    finally:
        process.terminate()
        process.wait()


def _answers(url: str) -> bool:
    try:
        return httpx.get(url).is_success
    except httpx.TransportError:
        return False


def upload(server: Mapping[str, str], path: Path, key: str) -> None:
    """Upload a file, or a folder with what is in it."""
    endpoint = {"endpoint_url": server["AWS_ENDPOINT_URL"], "region_name": server["AWS_DEFAULT_REGION"]}
    s3 = fsspec.filesystem(
        "s3", key=server["AWS_ACCESS_KEY_ID"], secret=server["AWS_SECRET_ACCESS_KEY"], client_kwargs=endpoint
    )
    s3.put(str(path), f"images/{key}", recursive=True)


def api(clone: Path, path: str) -> Any:
    """What Prefect's server says."""
    return http.json(f"{Services(clone).as_started().prefect}/api/{path}")


def state(clone: Path, flow_run_id: str) -> str | None:
    """A flow run's; None while the server does not answer."""
    return (api(clone, f"flow_runs/{flow_run_id}") or {}).get("state_type")


def task_states(clone: Path, flow_run_id: str) -> dict[str, str]:
    """State of each task of a flow run; none while the server does not answer."""
    url = f"{Services(clone).as_started().prefect}/api/task_runs/filter"
    found = http.json(url, {"flow_runs": {"id": {"any_": [flow_run_id]}}}) or []
    return {task["name"].rpartition("-")[0]: task["state_type"] for task in found}


def trainings(clone: Path) -> list[psutil.Process]:
    return processes(clone, "flows", "train")


def processes(clone: Path, *words: str) -> list[psutil.Process]:
    """The processes in the clone, or in its workspaces, with these words in their command."""
    found = []
    for process in psutil.process_iter():
        try:
            if {*words} <= {*process.cmdline()} and Path(process.cwd()).is_relative_to(clone):
                found.append(process)
        except psutil.Error:
            continue
    return found


def wait_for(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.2)


def flow_run_id(clone: Path, name: str) -> str:
    found: str = json.loads((clone / ".ddpm" / "runs" / name / "run.json").read_text())["flow_run_id"]
    return found


def checkpoints(clone: Path) -> list[int]:
    """The steps of those there are."""
    return [int(path.stem) for path in (clone / ".ddpm" / "checkpoints").glob("*/*.safetensors")]


@contextmanager
def suspended(found: list[psutil.Process]) -> Iterator[None]:
    """Have processes compute nothing in the meantime."""
    try:
        for process in found:
            process.suspend()
        yield
    finally:
        for process in found:
            process.resume()


def artifact(clone: Path, key: str) -> str:
    """The text of the latest with this key."""
    return str(api(clone, f"artifacts/{key}/latest")["data"])


def content(path: Path) -> bytes:
    """The bytes of a file; none of a folder, or if a service has just deleted it."""
    try:
        return path.read_bytes() if path.is_file() else b""
    except FileNotFoundError:
        return b""

"""The services as a user has them: killed, restarted, deployed to again, stopped in the middle of a training."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from flows.services import Services
from tests.e2e.conftest import Command, api, processes, task_states, trainings, wait_for

NAME = "deployments/name/train-ddpm/train-ddpm"
TRAIN = {"steps": 1000000, "decay": "constant", "log_every": 50, "preview_every": 20}


@pytest.fixture
def up(services: Command) -> Iterator[Command]:
    """The services, which a test may stop: they are up again after it."""
    yield services
    done = services("python", "-m", "flows.services", "up")
    assert done.returncode == 0, done.stdout


def status(run: Command) -> dict[str, str]:
    lines = run("python", "-m", "flows.services", "status").stdout.splitlines()[:3]
    return {line.split()[0]: line.split(maxsplit=1)[1] for line in lines}


def server(clone: Path, name: str) -> psutil.Process:
    """The process that holds a service's port."""
    port = int(json.loads((clone / ".ddpm" / "services" / "addresses.json").read_text())[f"{name.upper()}_PORT"])
    holders = []
    for process in psutil.process_iter():
        try:
            listening = [each for each in process.net_connections("tcp") if each.status == psutil.CONN_LISTEN]
        except psutil.Error:
            continue
        holders += [process for each in listening if each.laddr.port == port]
    (holder,) = holders
    return holder


def started(clone: Path, run: Command, seed: int) -> str:
    """The id of a flow run that is training."""
    previews = set((clone / ".ddpm" / "checkpoints").glob("*/previews/*"))
    # Shards of its own: those of other tests in this clone are to be made by these.
    parameters = {"train": TRAIN, "seed": seed, "shard": {"samples_per_shard": 900 + seed}}
    given = (f"{name}={json.dumps(value)}" for name, value in parameters.items())
    arguments = (*(part for each in given for part in ("-p", each)), "--flow-run-name", f"seed{seed}")
    done = run("prefect", "deployment", "run", "train-ddpm", *arguments)
    assert done.returncode == 0, done.stdout
    wait_for(lambda: set((clone / ".ddpm" / "checkpoints").glob("*/previews/*")) > previews, 180)
    assert trainings(clone)
    flow_run_id: str = json.loads((clone / ".ddpm" / "runs" / f"seed{seed}" / "run.json").read_text())["flow_run_id"]
    assert task_states(clone, flow_run_id)["train"] == "RUNNING"
    return flow_run_id


@pytest.mark.usefixtures("up")
def test_servers_that_are_killed_are_served_again_by_other_processes(clone: Path) -> None:
    killed = {name: server(clone, name) for name in ("mlflow", "prefect")}
    for process in killed.values():
        assert process.children() == []
        process.kill()
        process.wait(60)
    healthy = Services(clone).as_started().healthy
    assert not any(healthy()[name] for name in killed)
    wait_for(lambda: all(healthy().values()), 120)
    assert all(server(clone, name).pid != process.pid for name, process in killed.items())


def test_without_supervisord_status_and_down_tell_and_end_what_answers(up: Command, clone: Path) -> None:
    servers = [server(clone, name) for name in ("prefect", "mlflow")]
    os.kill(int((clone / ".ddpm" / "services" / "supervisord.pid").read_text()), signal.SIGKILL)
    wait_for(lambda: "another process answers" in status(up)["mlflow"], 60)
    assert "stopped, but another process answers" in status(up)["prefect"]
    assert up("python", "-m", "flows.services", "down").stdout == "stopped\n"
    assert not any(process.is_running() for process in servers)
    assert {line.split()[0] for line in status(up).values()} == {"stopped"}
    assert up("python", "-m", "flows.services", "down").stdout == "not running\n"


def test_a_users_schedules_survive_every_deployment(up: Command, clone: Path) -> None:
    def deployment() -> dict[str, Any]:
        found = api(clone, NAME)
        schedules = sorted((each["id"], each["active"], json.dumps(each["schedule"])) for each in found["schedules"])
        return {"schedules": schedules, "paused": found["paused"], "schema": found["parameter_openapi_schema"]}

    create = ("prefect", "deployment", "schedule", "create", "train-ddpm/train-ddpm")
    assert up(*create, "--cron", "0 3 * * 0", "--timezone", "UTC").returncode == 0
    assert up(*create, "--interval", "86400").returncode == 0
    first = deployment()
    pause = ("prefect", "deployment", "schedule", "pause", "train-ddpm/train-ddpm", first["schedules"][0][0])
    assert up(*pause).returncode == 0
    api(clone, f"deployments/{api(clone, NAME)['id']}/pause_deployment", {})
    before = deployment()
    assert sorted(active for _, active, _ in before["schedules"]) == [False, True]
    assert before["paused"]
    (clone / "presets" / "mine.yaml").write_text("train:\n  steps: 7\n")
    try:
        assert "deployed train-ddpm" in up("python", "-m", "flows.services", "up").stdout
        after = deployment()
    finally:
        (clone / "presets" / "mine.yaml").unlink()
        api(clone, f"deployments/{api(clone, NAME)['id']}/resume_deployment", {})
    assert "mine" in json.dumps(after["schema"])
    assert after | {"schema": None} == before | {"schema": None}


def test_a_worker_that_is_killed_takes_its_runs_with_it(up: Command, clone: Path) -> None:
    run_id = started(clone, up, 11)
    (worker,) = processes(clone, "worker", "start")
    worker.kill()
    wait_for(lambda: not trainings(clone), 90)
    wait_for(lambda: api(clone, f"flow_runs/{run_id}")["state_type"] == "CRASHED", 60)
    wait_for(lambda: task_states(clone, run_id)["train"] == "CRASHED", 60)


def test_down_ends_a_training_and_its_records(up: Command, clone: Path) -> None:
    run_id = started(clone, up, 12)
    assert up("python", "-m", "flows.services", "down").stdout == "stopped\n"
    assert not trainings(clone)
    assert up("python", "-m", "flows.services", "up").returncode == 0
    assert api(clone, f"flow_runs/{run_id}")["state_type"] == "CRASHED"
    assert task_states(clone, run_id) == {"shard": "COMPLETED", "pairs": "COMPLETED", "train": "CRASHED"}
    assert list((clone / ".ddpm" / "checkpoints").glob("*/*.safetensors"))

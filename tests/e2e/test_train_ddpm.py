"""The flow and its services as a user runs them: real servers, a real worker, the literal commands.

One file, so that one process runs it: the services start once.
"""

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from flows import http, workspace
from flows.services import Services
from tests.e2e.conftest import Command, api, processes, task_states, trainings, wait_for, wait_for_line

pytestmark = pytest.mark.slow

RUN = ("prefect", "deployment", "run", "train-ddpm", "--watch")


def summary(clone: Path, name: str) -> dict[str, str]:
    """What became of each stage of a run."""
    content = json.loads((clone / ".ddpm" / "runs" / name / "summary.json").read_text())
    return {stage["stage"]: stage["outcome"] for stage in content["stages"]}


def artifact(run: Command, key: str) -> str:
    code = f"from prefect.artifacts import Artifact; print(Artifact.get({key!r}).data)"
    return run("python", "-c", code, PREFECT_PLUGINS_ENABLED="false").stdout


@pytest.fixture(scope="module")
def first(services: Command) -> subprocess.CompletedProcess[str]:
    """`prefect deployment run train-ddpm --watch`, done, while another run did the same with another seed."""
    with ThreadPoolExecutor() as pool:
        other = pool.submit(services, *RUN, "--flow-run-name", "other", "-p", "seed=1")
        first = services(*RUN, "--flow-run-name", "first")
    assert other.result().returncode == 0, other.result().stdout
    return first


def test_the_literal_command_trains_and_exports(
    first: subprocess.CompletedProcess[str], services: Command, clone: Path
) -> None:
    assert first.returncode == 0, first.stdout
    assert list(summary(clone, "first")) == ["shard", "pairs", "train", "evaluate", "export"]
    assert {summary(clone, "first")[stage] for stage in ("pairs", "train", "evaluate", "export")} == {"run"}
    for line in ("Running stage 'train':", "Running stage 'export':", "Flow run finished successfully"):
        assert line in first.stdout
    report = artifact(services, "train-ddpm-report")  # of the run that ended last
    for part in ("# ", "| mse |", "| 0 to ", "data:image/png;base64,", "sampler.onnx", "[MLflow run](http://"):
        assert part in report
    table = services("ddpm", "summary").stdout
    assert "held-out MSE" in table
    assert (clone / ".ddpm/runs/first/models/onnx/denoiser.onnx").is_file()


@pytest.mark.usefixtures("first")
def test_a_second_time_all_is_cached(services: Command, clone: Path) -> None:
    done = services(*RUN, "--flow-run-name", "second")
    assert done.returncode == 0, done.stdout
    assert set(summary(clone, "second").values()) == {"cached"}
    report = artifact(services, "train-ddpm-report")
    assert "# second" in report
    assert "last run (" in report


@pytest.mark.usefixtures("first")
def test_afterwards_dvc_repro_runs_no_stage(services: Command) -> None:
    from_cache = services("dvc", "repro").stdout
    assert "Running stage" not in from_cache
    assert from_cache.count("is cached - skipping run, checking out outputs") == 5
    applied = services("ddpm", "apply", "first", "--force")
    assert applied.returncode == 0, applied.stdout
    assert "Data and pipelines are up to date" in services("dvc", "repro").stdout


def test_wrong_parameters_are_all_reported_before_anything_is_computed(services: Command, clone: Path) -> None:
    wrong = ['train={"stepz": 5, "steps": "10"}', 'sample={"steps": 5000}']
    done = services(*RUN, "--flow-run-name", "wrong", "-p", wrong[0], "-p", wrong[1])
    assert done.returncode == 1
    said = " ".join(done.stdout.split())
    assert "train.stepz: no such parameter" in said
    assert "train.steps: input should be a valid integer (got '10')" in said
    assert "sample.steps (5000) exceeds process.num_timesteps" in said
    assert "Traceback" not in done.stdout
    assert not (clone / ".ddpm/runs/wrong").exists()


@pytest.mark.usefixtures("first")
def test_two_runs_at_once_are_both_right(clone: Path) -> None:
    one, other = (summary(clone, name) for name in ("first", "other"))
    assert one["train"] == other["train"] == "run"
    assert "run" in {one["shard"], other["shard"]} <= {"run", "cached"}
    weights = [(clone / f".ddpm/runs/{name}/models/ddpm/model.safetensors").read_bytes() for name in ("first", "other")]
    assert weights[0] != weights[1]


@pytest.mark.usefixtures("first")
def test_a_training_goes_on_after_a_cancellation_and_keeps_a_checkpoint_when_its_worker_ends(
    services: Command, clone: Path
) -> None:
    train = '{"steps": 1000000, "decay": "constant", "log_every": 50, "preview_every": 20}'
    others = {*(clone / ".ddpm" / "checkpoints").glob("*/")}

    def newest_step() -> int:
        (mine,) = {*(clone / ".ddpm" / "checkpoints").glob("*/")} - others
        return max(int(path.stem) for path in mine.glob("*.safetensors"))

    def start(pool: ThreadPoolExecutor, name: str, sign: str) -> Future[subprocess.CompletedProcess[str]]:
        watched = pool.submit(services, *RUN, "--flow-run-name", name, "-p", f"train={train}")
        wait_for_line(clone / ".ddpm" / "services" / "worker.log", sign)
        wait_for(lambda: trainings(clone) != [], 60)
        return watched

    with ThreadPoolExecutor() as pool:
        watched = start(pool, "long", "train: step 20: held-out")
        run_id = json.loads((clone / ".ddpm" / "runs" / "long" / "run.json").read_text())["flow_run_id"]
        cancelled = services("prefect", "flow-run", "cancel", run_id)
        assert cancelled.returncode == 0, cancelled.stdout
        wait_for(lambda: not trainings(clone), 60)
        done = watched.result()
        assert done.returncode == 1
        assert "Flow run finished in state 'Cancelled'" in done.stdout
        assert workspace.Run.read(clone / ".ddpm" / "runs" / "long").state == "cancelled"
        wait_for(lambda: task_states(clone, run_id).get("train") == "CANCELLED", 60)

        before = newest_step()
        watched = start(pool, "again", "going on from step")
        wait_for_line(clone / ".ddpm" / "services" / "worker.log", ": held-out MSE")
        (worker,) = processes(clone, "worker", "start")
        worker.terminate()
        wait_for(lambda: not trainings(clone), 60)
        done = watched.result()
    assert done.returncode == 1
    assert "Flow run finished in state 'Crashed'" in done.stdout
    assert "run 'again': crashed, so there is no summary" in services("ddpm", "summary", "again").stdout
    assert newest_step() > before


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


def test_servers_that_are_killed_are_served_again_by_other_processes(up: Command, clone: Path) -> None:
    killed = {name: server(clone, name) for name in ("mlflow", "prefect")}
    for process in killed.values():
        assert process.children() == []
        process.kill()
        process.wait(60)
    started = Services(clone).as_started()
    pages = [f"{started.prefect}/api/health", f"{started.mlflow}/health"]
    wait_for(lambda: all(map(http.answers, pages)), 120)
    assert all(status(up)[name].startswith("running") for name in killed)
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

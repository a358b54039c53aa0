"""The flow and its services as a user runs them: real servers, a real worker, the literal commands.

One file, so that one process runs it: the services start once.
"""

import json
import os
import signal
import subprocess
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest

from flows import http, workspace
from flows.services import Services
from tests.e2e.conftest import (
    CANARY,
    TINY,
    Command,
    api,
    artifact,
    checkpoints,
    content,
    flow_run_id,
    processes,
    state,
    suspended,
    task_states,
    trainings,
    wait_for,
)
from tests.training import trees

pytestmark = pytest.mark.slow

RUN = ("prefect", "deployment", "run", "train-ddpm", "--watch")
NAME = "deployments/name/train-ddpm/train-ddpm"
LONG = ("-p", 'train={"steps": 1000000, "decay": "constant", "log_every": 50, "preview_every": 20}')


def summary(clone: Path, name: str) -> dict[str, str]:
    """What became of each stage of a run."""
    content = json.loads((clone / ".ddpm" / "runs" / name / "summary.json").read_text())
    return {stage["stage"]: stage["outcome"] for stage in content["stages"]}


def resumed(clone: Path, pool: ThreadPoolExecutor, run: Command, name: str) -> Future[subprocess.CompletedProcess[str]]:
    """Start the long training again under another name; returns once it has resumed and made progress."""
    log = clone / ".ddpm" / "services" / "worker.log"
    seen = len(log.read_text())
    watched = pool.submit(run, *RUN, "--flow-run-name", name, *LONG)
    wait_for(lambda: ": held-out MSE" in log.read_text()[seen:].partition("resuming from step")[2], 180)
    return watched


def servers_answer(clone: Path) -> bool:
    started = Services(clone).as_started()
    return http.answers(f"{started.prefect}/api/health") and http.answers(f"{started.mlflow}/health")


def ensure_up(run: Command, clone: Path) -> None:
    """A test before may have ended the services."""
    if not servers_answer(clone):
        done = run("python", "-m", "flows.services", "up")
        assert done.returncode == 0, done.stdout


@pytest.fixture
def up(services: Command, clone: Path) -> Command:
    ensure_up(services, clone)
    return services


class TwoRuns(NamedTuple):
    """What became of two runs that were started at once."""

    first: subprocess.CompletedProcess[str]
    """With the repository's parameters, to completion."""
    long: subprocess.CompletedProcess[str]
    """A training that would have gone on for hours: cancelled."""


@pytest.fixture(scope="module")
def two_runs(services: Command, clone: Path) -> TwoRuns:
    ensure_up(services, clone)
    with ThreadPoolExecutor() as pool:
        watched = pool.submit(services, *RUN, "--flow-run-name", "long", *LONG)
        try:
            running = pool.submit(services, *RUN, "--flow-run-name", "first")
            wait_for(lambda: max(checkpoints(clone), default=0) > TINY["train"]["steps"], 180)
            training = trainings(clone / ".ddpm/runs/long")
            assert training != []
            with suspended(training):  # it remains another run's training, and leaves the cores to this one
                first = running.result()
                assert all(process.is_running() for process in training)
        finally:
            cancelled = services("prefect", "flow-run", "cancel", flow_run_id(clone, "long"))
        assert cancelled.returncode == 0, cancelled.stdout
        wait_for(lambda: not trainings(clone), 60)
        return TwoRuns(first, watched.result())


def test_the_literal_command_trains_and_exports(two_runs: TwoRuns, up: Command, clone: Path) -> None:
    assert two_runs.first.returncode == 0, two_runs.first.stdout
    assert list(summary(clone, "first")) == ["shard", "pairs", "train", "evaluate", "export"]
    assert {summary(clone, "first")[stage] for stage in ("train", "evaluate", "export")} == {"run"}
    lines = [line.partition(" after ")[0] for line in two_runs.first.stdout.splitlines()]
    for line in ("train: running", "train: done", "export: done", "first: done"):
        assert lines.count(line) == 1
    assert "Flow run finished successfully" in two_runs.first.stdout
    assert "prefect." not in two_runs.first.stdout  # names of events
    report = artifact(clone, "train-ddpm-report")  # of the run that ended last
    for part in (
        "# ",
        "| held-out MSE |",
        "| 0 to ",
        "data:image/png;base64,",
        "sampler.onnx",
        "[Open in MLflow](http://",
    ):
        assert part in report
    table = up("ddpm", "summary").stdout
    assert "held-out MSE" in table
    assert (clone / ".ddpm/runs/first/models/onnx/denoiser.onnx").is_file()


def test_secrets_are_in_no_output_and_no_file(two_runs: TwoRuns, up: Command, clone: Path) -> None:
    """Neither those of the environment, nor those of DVC's remotes, which only DVC's own files for them hold."""
    assert [done.stdout for done in (*two_runs, up("ddpm", "track", "first")) if CANARY in done.stdout] == []
    held = {path for path in clone.rglob("*") if CANARY.encode() in content(path)}
    own = {clone / ".dvc/config.local", *clone.glob(".ddpm/runs/*/.dvc/config.local")}
    assert len(own) > 2
    assert held == own
    assert {path.stat().st_mode & 0o777 for path in held} == {0o600}
    for database in (".ddpm/prefect/prefect.db", ".ddpm/mlflow.db", ".ddpm/services/addresses.json"):
        assert (clone / database).stat().st_size > 0  # they were searched


@pytest.mark.usefixtures("two_runs")
def test_the_flow_trains_the_model_of_the_stages_run_directly(clone: Path, stages_tree: Path) -> None:
    assert trees.digests(clone / ".ddpm/runs/first", "models/ddpm") == trees.digests(stages_tree, "models/ddpm")


class Again(NamedTuple):
    """What became of a run like the first one, and of a sweep that was started at once."""

    second: subprocess.CompletedProcess[str]
    sweep: subprocess.CompletedProcess[str]
    """Of which one trial is like the first run, and the other evaluates and exports."""


@pytest.fixture(scope="module")
def again(two_runs: TwoRuns, services: Command, clone: Path) -> Again:
    assert two_runs.first.returncode == 0
    ensure_up(services, clone)
    sweep = ("prefect", "deployment", "run", "sweep-ddpm", "--watch", "-p", "name=steps", "-p", "at_once=2")
    with ThreadPoolExecutor() as pool:
        swept = pool.submit(services, *sweep, "-p", 'over={"sample.steps": [5, 4]}')  # the first is that of params.yaml
        return Again(services(*RUN, "--flow-run-name", "second"), swept.result())


def test_a_second_time_all_is_cached_while_another_run_evaluates_and_exports(again: Again, clone: Path) -> None:
    assert again.second.returncode == 0, again.second.stdout
    assert set(summary(clone, "second").values()) == {"cached"}
    assert [stage for stage, outcome in summary(clone, "steps-1").items() if outcome == "run"] == ["evaluate", "export"]
    report = artifact(clone, "train-ddpm-report")  # of the run that ended last
    assert "# steps-1" in report
    assert "previous run (" in report
    first, second, other = (
        trees.digests(clone / f".ddpm/runs/{name}", "models", "reports/evaluation")
        for name in ("first", "second", "steps-1")
    )
    assert first == second
    differ = {Path(name).name for name in first if first[name] != other[name]}
    sampled = {"samples.png", "filmstrip.png", "nearest.png", "quality.csv", "scored.json"}
    assert differ == {"SHA256SUMS", *sampled, "denoiser.onnx", "sampler.onnx", "README.md"}  # which state the figures


def test_the_literal_command_sweeps(again: Again, clone: Path) -> None:
    assert again.sweep.returncode == 0, again.sweep.stdout
    assert set(summary(clone, "steps-0").values()) == {"cached"}
    page = artifact(clone, "sweep-ddpm-report")
    assert "2 of 2 trials completed; best: steps-0 (sample.steps: 5), val MSE 0." in page
    assert "steps-1](http://" in page
    assert "+0.0000 ± 0.0000, not told apart" in page
    children = {name: api(clone, f"flow_runs/{flow_run_id(clone, name)}") for name in ("steps-0", "steps-1")}
    assert [(each["name"], each["state_type"]) for each in children.values()] == [
        ("steps-0", "COMPLETED"),
        ("steps-1", "COMPLETED"),
    ]
    assert all(each["parent_task_run_id"] for each in children.values())


@pytest.mark.usefixtures("two_runs")
def test_afterwards_dvc_repro_runs_no_stage(up: Command) -> None:
    from_cache = up("dvc", "repro").stdout
    assert "Running stage" not in from_cache
    assert from_cache.count("is cached - skipping run, checking out outputs") == 5
    applied = up("ddpm", "apply", "first", "--force")
    assert applied.returncode == 0, applied.stdout
    assert "Data and pipelines are up to date" in up("dvc", "repro").stdout


@pytest.mark.usefixtures("two_runs")
def test_the_literal_command_distils_a_finished_run(up: Command, clone: Path) -> None:
    distil = ("prefect", "deployment", "run", "distill-ddpm", "--watch")
    done = up(*distil, "--flow-run-name", "student", "-p", "run=first")
    assert done.returncode == 0, done.stdout
    stages = ["distill", "evaluate-student", "export-student"]
    assert summary(clone, "student") == dict.fromkeys(stages, "run")
    lines = [line.partition(" after ")[0] for line in done.stdout.splitlines()]
    for line in (*(f"{stage}: done" for stage in stages), "student: done"):
        assert lines.count(line) == 1
    first, student = (clone / ".ddpm/runs" / name for name in ("first", "student"))
    assert trees.digests(student, "models/ddpm", "data/pairs") == trees.digests(first, "models/ddpm", "data/pairs")
    assert (student / "models/student-onnx/sampler.onnx").is_file()
    report = artifact(clone, "distill-ddpm-report")
    for part in ("# student", "`first`, its teacher", "| student | 2 |", "[Open in MLflow](http://"):
        assert part in report


def test_wrong_parameters_are_all_reported_before_anything_is_computed(up: Command, clone: Path) -> None:
    wrong = ['train={"stepz": 5, "steps": "10"}', 'sample={"steps": 5000}']
    done = up(*RUN, "--flow-run-name", "wrong", "-p", wrong[0], "-p", wrong[1])
    assert done.returncode == 1
    said = " ".join(done.stdout.split())
    assert "train.stepz: no such parameter" in said
    assert "train.steps: input should be a valid integer (got '10')" in said
    assert "sample.steps (5000) exceeds process.num_timesteps" in said
    assert "Traceback" not in done.stdout
    assert not (clone / ".ddpm/runs/wrong").exists()


@pytest.mark.usefixtures("up")
def test_a_cancelled_training_is_reported_as_cancelled(two_runs: TwoRuns, clone: Path) -> None:
    assert two_runs.long.returncode == 1
    assert "Flow run finished in state 'Cancelled'" in two_runs.long.stdout
    assert workspace.Run.read(clone / ".ddpm" / "runs" / "long").state == "cancelled"
    wait_for(lambda: task_states(clone, flow_run_id(clone, "long")).get("train") == "CANCELLED", 60)


@pytest.mark.usefixtures("two_runs")
def test_a_cancelled_training_resumes_and_a_killed_worker_ends_it(up: Command, clone: Path) -> None:
    with ThreadPoolExecutor() as pool:
        watched = resumed(clone, pool, up, "again")
        (worker,) = processes(clone, "worker", "start")
        worker.kill()
        wait_for(lambda: not trainings(clone), 90)
        done = watched.result()
    assert done.returncode == 1
    assert "Flow run finished in state 'Crashed'" in done.stdout
    assert "has no summary: its state is " in up("ddpm", "summary", "again").stdout
    run_id = flow_run_id(clone, "again")
    wait_for(lambda: state(clone, run_id) == "CRASHED", 60)
    wait_for(lambda: task_states(clone, run_id).get("train") == "CRASHED", 60)


@pytest.mark.usefixtures("two_runs")
def test_down_stops_a_training_with_a_checkpoint_and_records_it_as_crashed(up: Command, clone: Path) -> None:
    with ThreadPoolExecutor() as pool:
        watched = resumed(clone, pool, up, "later")
        before = max(checkpoints(clone))
        assert up("python", "-m", "flows.services", "down").stdout == "stopped\n"
        assert not trainings(clone)
        assert watched.result().returncode == 1
    assert max(checkpoints(clone)) > before
    assert up("python", "-m", "flows.services", "up").returncode == 0
    run_id = flow_run_id(clone, "later")
    assert state(clone, run_id) == "CRASHED"
    assert task_states(clone, run_id) == {"shard": "COMPLETED", "pairs": "COMPLETED", "train": "CRASHED"}


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


def test_killed_servers_are_restarted(up: Command, clone: Path) -> None:
    killed = {name: server(clone, name) for name in ("mlflow", "prefect")}
    for process in killed.values():
        assert process.children() == []
        process.kill()
        process.wait(60)
    wait_for(lambda: servers_answer(clone), 120)
    assert all(status(up)[name].startswith("running") for name in killed)
    assert all(server(clone, name).pid != process.pid for name, process in killed.items())


def set_paused(clone: Path, paused: bool) -> None:
    url = f"{Services(clone).as_started().prefect}/api/deployments/{api(clone, NAME)['id']}"
    http.json(f"{url}/{'pause' if paused else 'resume'}_deployment", {})


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
    set_paused(clone, True)
    before = deployment()
    assert sorted(active for _, active, _ in before["schedules"]) == [False, True]
    assert before["paused"]
    (clone / "presets" / "mine.yaml").write_text("train:\n  steps: 7\n")
    try:
        assert "deployed train-ddpm" in up("python", "-m", "flows.services", "up").stdout
        after = deployment()
    finally:
        (clone / "presets" / "mine.yaml").unlink()
        set_paused(clone, False)
    assert "mine" in json.dumps(after["schema"])
    assert after | {"schema": None} == before | {"schema": None}


def test_without_supervisord_status_and_down_tell_and_end_what_answers(up: Command, clone: Path) -> None:
    servers = [server(clone, name) for name in ("prefect", "mlflow")]
    os.kill(int((clone / ".ddpm" / "services" / "supervisord.pid").read_text()), signal.SIGKILL)
    # Prefect's server may end on its own: the pipe to which it logs is gone.
    wait_for(lambda: "stopped, but another process answers" in status(up)["mlflow"], 60)
    assert up("python", "-m", "flows.services", "down").stdout == "stopped\n"
    assert not any(process.is_running() for process in servers)
    assert {line.split()[0] for line in status(up).values()} == {"stopped"}
    assert up("python", "-m", "flows.services", "down").stdout == "not running\n"

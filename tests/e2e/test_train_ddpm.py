"""The flow as a user runs it: a real server, a real worker, the literal commands."""

import json
import subprocess
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from flows import workspace
from tests.e2e.conftest import Command, processes, task_states, trainings, wait_for, wait_for_line

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
        runs = [
            pool.submit(services, *RUN, "--flow-run-name", *name) for name in (["first"], ["other", "-p", "seed=1"])
        ]
        first, other = (run.result() for run in runs)
    assert other.returncode == 0, other.stdout
    return first


def test_the_literal_command_trains_and_exports(
    first: subprocess.CompletedProcess[str], services: Command, clone: Path
) -> None:
    assert first.returncode == 0, first.stdout
    assert list(summary(clone, "first")) == ["shard", "pairs", "train", "evaluate", "export"]
    assert {summary(clone, "first")[stage] for stage in ("train", "evaluate", "export")} == {"run"}
    for line in ("Running stage 'train':", "Running stage 'export':", "Flow run finished successfully"):
        assert line in first.stdout
    report = artifact(services, "train-ddpm-report")
    for part in ("# first", "| mse |", "| 0 to ", "data:image/png;base64,", "sampler.onnx", "[MLflow run](http://"):
        assert part in report
    table = services("ddpm", "summary").stdout
    assert "held-out MSE" in table
    assert (clone / ".ddpm/runs/first/models/onnx/denoiser.onnx").is_file()


@pytest.mark.usefixtures("first")
def test_a_second_time_all_is_cached(services: Command, clone: Path) -> None:
    done = services(*RUN, "--flow-run-name", "second")
    assert done.returncode == 0, done.stdout
    assert set(summary(clone, "second").values()) == {"cached"}
    assert "last run (first)" in artifact(services, "train-ddpm-report")


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
    assert summary(clone, "first")["train"] == summary(clone, "other")["train"] == "run"
    weights = [(clone / f".ddpm/runs/{name}/models/ddpm/model.safetensors").read_bytes() for name in ("first", "other")]
    assert weights[0] != weights[1]


@pytest.mark.usefixtures("first")
def test_a_training_goes_on_after_a_cancellation_and_keeps_a_checkpoint_when_its_worker_ends(
    services: Command, clone: Path
) -> None:
    train = '{"steps": 1000000, "decay": "constant", "log_every": 50, "preview_every": 20}'

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

        before = max(checkpoints(clone))
        watched = start(pool, "again", "going on from step")
        (worker,) = processes(clone, "worker", "start")
        worker.terminate()
        wait_for(lambda: not trainings(clone), 60)
        done = watched.result()
    assert done.returncode == 1
    assert "Flow run finished in state 'Crashed'" in done.stdout
    assert "run 'again': crashed, so there is no summary" in services("ddpm", "summary", "again").stdout
    assert max(checkpoints(clone)) > before


def checkpoints(clone: Path) -> set[str]:
    """Their names, of which the later is the greater."""
    return {path.name for path in (clone / ".ddpm" / "checkpoints").glob("*/*.safetensors")}

"""The flow as a user runs it: a real server, a real worker, the literal commands."""

import json
import subprocess
from concurrent.futures import ThreadPoolExecutor
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
    """`prefect deployment run train-ddpm --watch`, done."""
    return services(*RUN, "--flow-run-name", "first")


def test_the_literal_command_trains_and_exports(
    first: subprocess.CompletedProcess[str], services: Command, clone: Path
) -> None:
    assert first.returncode == 0, first.stdout
    assert summary(clone, "first") == dict.fromkeys(("shard", "pairs", "train", "evaluate", "export"), "run")
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
def test_two_runs_at_once_are_both_right(services: Command, clone: Path) -> None:
    def start(seed: int) -> subprocess.CompletedProcess[str]:
        return services(*RUN, "--flow-run-name", f"seed{seed}", "-p", f"seed={seed}")

    with ThreadPoolExecutor() as pool:
        for done in pool.map(start, (1, 2)):
            assert done.returncode == 0, done.stdout
    assert summary(clone, "seed1")["train"] == summary(clone, "seed2")["train"] == "run"
    assert summary(clone, "seed1")["shard"] == summary(clone, "seed2")["shard"] == "cached"
    weights = [(clone / f".ddpm/runs/seed{seed}/models/ddpm/model.safetensors").read_bytes() for seed in (1, 2)]
    assert weights[0] != weights[1]


@pytest.mark.usefixtures("first")
def test_a_cancelled_training_leaves_a_checkpoint_and_goes_on_from_it(services: Command, clone: Path) -> None:
    train = '{"steps": 1000000, "decay": "constant", "log_every": 50, "preview_every": 20}'
    for name, sign in (("long", "train: step 20: held-out"), ("again", "going on from step")):
        with ThreadPoolExecutor() as pool:
            watched = pool.submit(services, *RUN, "--flow-run-name", name, "-p", f"train={train}")
            wait_for_line(clone / ".ddpm" / "services" / "worker.log", sign)
            wait_for(lambda: trainings(clone) != [], 60)
            run_id = json.loads((clone / ".ddpm" / "runs" / name / "run.json").read_text())["flow_run_id"]
            cancelled = services("prefect", "flow-run", "cancel", run_id)
            assert cancelled.returncode == 0, cancelled.stdout
            wait_for(lambda: not trainings(clone), 60)
            done = watched.result()
        assert done.returncode == 1
        assert "Flow run finished in state 'Cancelled'" in done.stdout
        assert workspace.Run.read(clone / ".ddpm" / "runs" / name).state == "cancelled"
        wait_for(lambda run_id=run_id: task_states(clone, run_id).get("train") == "CANCELLED", 60)


def test_the_end_of_the_worker_ends_a_training_with_a_checkpoint(services: Command, clone: Path) -> None:
    train = '{"steps": 1000000, "decay": "constant", "log_every": 50, "preview_every": 20, "batch_size": 32}'
    before = checkpoints(clone)
    with ThreadPoolExecutor() as pool:
        watched = pool.submit(services, *RUN, "--flow-run-name", "orphan", "-p", f"train={train}")
        wait_for_line(clone / ".ddpm" / "services" / "worker.log", "train: step 20: held-out")
        (worker,) = processes(clone, "worker", "start")
        worker.terminate()
        wait_for(lambda: not trainings(clone), 60)
        done = watched.result()
    assert done.returncode == 1
    assert "Flow run finished in state 'Crashed'" in done.stdout
    assert "run 'orphan': crashed, so there is no summary" in services("ddpm", "summary", "orphan").stdout
    assert checkpoints(clone) > before


def checkpoints(clone: Path) -> set[Path]:
    return set((clone / ".ddpm" / "checkpoints").glob("*/*.safetensors"))

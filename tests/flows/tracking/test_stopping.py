"""A stop while results are being logged ends the stage, and marks the run."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from mlflow import MlflowClient

from diffusion.errors import Stopped
from flows import tracking
from flows.paths import Paths
from tests.flows.tracking.trees import PARAMS, REPOSITORY, changed, client_of, content, runs_of, write_all

pytestmark = pytest.mark.slow

CALLS = [
    "create_run",
    "log_batch",
    "log_artifact",
    "log_artifacts",
    "log_text",
    "create_logged_model",
    "create_model_version",
]


def interrupted(name: str, error: BaseException) -> Callable[..., Any]:
    """A call of MLflow's client in whose middle an error is raised: what it does is done, but it does not return."""
    real = getattr(MlflowClient, name)

    def call(*arguments: Any, **options: Any) -> None:
        real(*arguments, **options)
        raise error

    return call


@pytest.mark.parametrize(
    ("name", "error", "status"),
    [
        *((name, Stopped(signal.SIGTERM), "KILLED") for name in CALLS),
        *((name, OSError(), "FAILED") for name in CALLS),
        ("log_artifact", KeyboardInterrupt(), "KILLED"),  # treated like Stopped
    ],
)
def test_recording_that_is_interrupted_marks_its_run_and_is_completed_later(
    paths: Paths, monkeypatch: pytest.MonkeyPatch, name: str, error: BaseException, status: str
) -> None:
    write_all(paths)
    with monkeypatch.context() as patched:
        patched.setattr(MlflowClient, name, interrupted(name, error))
        if status == "KILLED":
            with pytest.raises(type(error)):
                tracking.record(PARAMS, paths)
        else:
            assert tracking.record(PARAMS, paths) is None
    client = client_of(paths)
    (run,) = runs_of(client)
    assert run.info.status == status
    recorded = tracking.record(PARAMS, paths)
    assert recorded is not None
    assert recorded.run_id == run.info.run_id
    assert recorded.aliases == ["challenger", "champion"]
    found = content(client, run.info.run_id)
    assert (found["status"], len(found["versions"])) == ("FINISHED", 1)
    assert found["curves"]["evaluate/mse"] == [(0, 0.3)]
    models = client.search_logged_models([run.info.experiment_id])
    assert sorted(model.name for model in models) == ["sampler", "weights"]


def test_weights_that_were_not_all_logged_are_not_reused(paths: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    write_all(paths)
    with monkeypatch.context() as patched:
        patched.setattr(MlflowClient, "create_logged_model", interrupted("create_logged_model", KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            tracking.record(PARAMS, paths)
    other = changed(sample={"steps": 10})
    write_all(paths, params=other)
    recorded = tracking.record(other, paths)
    assert recorded is not None
    assert recorded.trained_in == recorded.run_id
    client = client_of(paths)
    run = client.get_run(recorded.run_id)
    assert run.inputs.model_inputs == []
    (weights,) = (
        model
        for model in client.search_logged_models([run.info.experiment_id])
        if (model.name, model.source_run_id) == ("weights", recorded.run_id)
    )
    assert weights.status == "READY"
    (unfinished,) = (each.info.run_id for each in runs_of(client) if each.info.run_id != recorded.run_id)
    write_all(paths)
    completed = tracking.record(PARAMS, paths)
    assert completed is not None
    assert completed.run_id == completed.trained_in == unfinished
    models = client.search_logged_models([run.info.experiment_id])
    assert sorted((model.name, str(model.status)) for model in models) == [
        ("sampler", "READY"),
        ("weights", "READY"),
        ("weights", "READY"),
    ]


STAGE = """
import os, signal, sys
from mlflow import MlflowClient
from flows import __main__, tracking
from flows.stages import evaluate
real = MlflowClient.log_artifacts
def log_artifacts(*arguments, **options):
    os.kill(os.getpid(), signal.SIGTERM)
    return real(*arguments, **options)
MlflowClient.log_artifacts = log_artifacts
def run(params, paths):
    tracking.record(params, paths)
    print("the stage goes on")
evaluate.run = run
sys.exit(__main__.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("command", ["evaluate", "track"])
def test_sigterm_while_results_are_logged_ends_the_command(paths: Paths, command: str) -> None:
    write_all(paths)
    done = subprocess.run(
        [sys.executable, "-c", STAGE, command],
        cwd=paths.root,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert (done.returncode, done.stdout) == (128 + signal.SIGTERM, "")
    assert done.stderr == f"ddpm {command}: stopped by SIGTERM\n"
    (run,) = runs_of(client_of(paths))
    assert run.info.status == "KILLED"

"""A stop while results are being logged ends the stage, and marks the run."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from mlflow import MlflowClient

from diffusion import tracking
from diffusion.errors import Stopped
from diffusion.paths import Paths
from tests.tracking.trees import PARAMS, REPOSITORY, client_of, content, runs_of, write_all

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


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize(
    ("error", "status"), [(Stopped(signal.SIGTERM), "KILLED"), (KeyboardInterrupt(), "KILLED"), (OSError(), "FAILED")]
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


STAGE = """
import os, signal, sys
from mlflow import MlflowClient
from diffusion import __main__, tracking
from diffusion.stages import evaluate
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

"""The flow run without a server."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from prefect.states import Failed

from flows import dvc_stage, pipeline, train_ddpm, workspace


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ('train={"stepz": 5}', "train.stepz: no such parameter"),
        ("seed=-1", "seed: "),
        ("device=tpu", "device: "),
        ("shrad={}", "shrad: no such parameter"),
    ],
)
@pytest.mark.usefixtures("repository")
def test_a_wrong_parameter_is_refused_in_one_line(
    argument: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_ddpm.main(["-p", argument]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"train-ddpm: error: parameters of the run: {message}")
    assert error.count("\n") == 1
    assert not Path(".ddpm/runs").exists()


def test_help_names_the_parameters(root: Path) -> None:
    command = [sys.executable, "-m", "flows.train_ddpm", "--help"]
    environment = os.environ | {"PREFECT_API_URL": "http://127.0.0.1:9/api"}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=True)
    assert "--preset" in done.stdout


def test_only_a_passing_failure_is_retried() -> None:
    def retried(error: Exception) -> bool:
        state = Failed(data=error)
        return train_ddpm.worth_retrying(train_ddpm.TASKS["train"], None, state)  # type: ignore[arg-type]

    assert retried(dvc_stage.PassingStageError("Unable to acquire lock"))
    assert not retried(dvc_stage.StageError("ValueError"))


@pytest.mark.usefixtures("repository")
def test_without_mlflow_the_run_is_none_the_worse() -> None:
    with workspace.use("one", "id", workspace.document(None, {})) as directory:
        warnings: list[str] = []
        assert pipeline._track(directory, print, warnings.append) is None
    assert len(warnings) == 1
    assert warnings[0].endswith("`ddpm track one` brings it there later")

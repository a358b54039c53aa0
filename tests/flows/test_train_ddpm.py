"""The flow run without a server."""

import logging
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest
from prefect.exceptions import TerminationSignal
from prefect.states import Failed

from flows import dvc_stage, params, pipeline, train_ddpm, workspace
from flows.paths import Paths
from tests.flows.tracking import trees

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ('train={"stepz": 5}', "train.stepz: no such parameter"),
        ("seed=-1", "seed: "),
        ("device=tpu", "device: "),
        ("shrad={}", "shrad: no such parameter"),
        ('network={"attention_levels": [9]}', "network: attention_levels contains 9, but the levels are 0 to 1"),
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
    assert retried(httpx.ConnectError("refused"))
    assert not retried(dvc_stage.StageError("ValueError"))


@pytest.mark.usefixtures("repository")
def test_without_mlflow_the_run_is_none_the_worse(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{unused.getsockname()[1]}"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        with workspace.use("one", "id", workspace.document(None, {})) as directory:
            paths = Paths(directory)
            trees.write_tree(paths)
            trees.write_training(paths, params=params.load(paths.params))
            warnings: list[str] = []
            assert pipeline._track(directory, print, warnings.append) is None
    assert len(warnings) == 1
    assert f"MLflow at {uri}: " in warnings[0]
    assert warnings[0].endswith("`ddpm track one` records it later")


@pytest.mark.parametrize("cancelling", [True, False])
def test_a_stage_that_is_interrupted_is_cancelled_only_if_its_run_is(
    monkeypatch: pytest.MonkeyPatch, cancelling: bool
) -> None:
    def interrupted(*_: object) -> None:
        raise TerminationSignal(signal.SIGTERM)

    monkeypatch.setattr(dvc_stage, "run", interrupted)
    monkeypatch.setattr(train_ddpm, "get_run_logger", lambda: logging.getLogger("test"))
    monkeypatch.setattr(train_ddpm, "cancelling", lambda: cancelling)
    if cancelling:
        assert train_ddpm.run_stage("shard", Path()).is_cancelled()
    else:
        with pytest.raises(TerminationSignal):
            train_ddpm.run_stage("shard", Path())


@pytest.mark.parametrize(("scheduler", "settings"), [("tcp://x:1", {"DDPM_DASK_SCHEDULER": "tcp://x:1"}), (None, None)])
def test_a_scheduler_is_passed_on_to_the_stage(
    monkeypatch: pytest.MonkeyPatch, scheduler: str | None, settings: dict[str, str] | None
) -> None:
    given = list[object]()
    monkeypatch.setattr(dvc_stage, "run", lambda *arguments: given.extend(arguments) or "run")
    monkeypatch.setattr(train_ddpm, "get_run_logger", lambda: logging.getLogger("test"))
    assert train_ddpm.run_stage("shard", Path(), scheduler).is_completed()
    assert given[0] == "shard"
    assert given[3] == settings


def test_a_run_whose_server_is_unreachable_is_not_being_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise httpx.ConnectError("refused")

    monkeypatch.setattr(train_ddpm, "get_client", refuse)
    assert not train_ddpm.cancelling()


@pytest.fixture
def short(repository: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The repository, its pipeline without the stages that would need results to work on."""
    monkeypatch.setattr(pipeline, "STAGES", {"shard": "", "train": ""})
    monkeypatch.setattr(pipeline, "_track", lambda *_: None)
    with (repository / "stage.py").open("a") as stage:
        stage.write("""pathlib.Path('reports').mkdir(exist_ok=True)
pathlib.Path('reports/evaluate.json').write_text('{"mse": 0.25}')
""")
    return repository


def test_a_name_in_use_gets_a_separate_workspace(short: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in (1, 2):
        assert train_ddpm.main(["--name", "one", "-p", f"seed={seed}", "-p", "preset=short"]) == 0
    runs = sorted((short / ".ddpm" / "runs").glob("[!.]*"))
    assert [run.name[:4] for run in runs] == ["one", "one-"]
    assert [params.load(run / "params.yaml").seed for run in runs] == [1, 2]
    assert params.load(runs[0] / "params.yaml").train.steps == 7
    output = capsys.readouterr().out
    assert f"\nrun {runs[1].name}\n" in output
    assert "Prefect" not in output


def test_what_prefect_cannot_show_does_not_end_a_stage(
    repository: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise httpx.ConnectError("refused")

    monkeypatch.setattr(train_ddpm, "create_progress_artifact", fail)
    monkeypatch.setattr(train_ddpm, "limit_exists", lambda _: False)
    monkeypatch.setattr(train_ddpm, "get_run_logger", lambda: logging.getLogger("test"))
    dvc_stage.run("shard", repository, print)
    stage = repository / "stage.py"
    stage.write_text(stage.read_text() + "print('train: 1/2 images')\nprint('train: 2/2 images')\n")
    dvc_stage.run("shard", repository, print)
    assert train_ddpm.run_stage("train", repository).is_completed()
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
        "Prefect cannot show the progress (refused); the stage continues"
    ]
    stage.write_text("raise ValueError('wrong shape')")
    failed = train_ddpm.run_stage("shard", repository)
    assert failed.is_failed()
    assert failed.message == "ValueError: wrong shape"

"""The flow run without a server."""

import socket
from pathlib import Path

import pytest

from flows import params, pipeline, train_ddpm, workspace
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


def test_help_names_the_parameters(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"^0$"):
        train_ddpm.main(["--help"])
    assert "--preset" in capsys.readouterr().out


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
            assert pipeline._track(directory, False, print, warnings.append) is None
    assert len(warnings) == 1
    assert f"MLflow at {uri}: " in warnings[0]
    assert warnings[0].endswith("`ddpm track one` records it later")


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

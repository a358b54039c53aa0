"""Sweeps without a server, their stages imitated; tests/e2e has real ones."""

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
import pytest
from filelock import FileLock

from diffusion.errors import UserError
from flows import dvc_stage, params, pipeline, sweep_ddpm, tracking, workspace
from flows.dvc_stage import Outcome, StageError
from flows.params import Params
from flows.sweep import study

pytestmark = pytest.mark.slow

RUNS = Path(".ddpm/runs")
RATES = "train.learning_rate"


def over(**fields: Any) -> list[str]:
    return ["-p", "over=" + json.dumps({name.replace("__", "."): values for name, values in fields.items()})]


class Stages:
    """In place of dvc_stage.run. The validation error of a trial is a hundred times its learning rate."""

    def __init__(self) -> None:
        self.trained: list[tuple[str, float]] = []
        """Workspace and learning rate of each training that was begun."""
        self.during: Callable[[str, Path, Params, Callable[[str], None]], object] = lambda *_: None
        """Called in each stage."""

    def __call__(
        self,
        stage: str,
        directory: Path,
        on_line: Callable[[str], None],
        _: object = None,
        check: Callable[[], None] = lambda: None,
    ) -> Outcome:
        check()
        parameters = params.load(directory / "params.yaml")
        rate = parameters.train.learning_rate
        if stage == "train":
            self.trained.append((directory.name, rate))
        self.during(stage, directory, parameters, on_line)
        if stage == "train":
            (directory / "reports").mkdir(exist_ok=True)
            value = 100 * rate
            report = {"val_mse": value, "val_mse_low": value - 0.05, "val_mse_high": value + 0.05, "precision": rate}
            (directory / "reports/evaluate.json").write_text(json.dumps(report))
        return "run"


@pytest.fixture
def stages(repository: Path, monkeypatch: pytest.MonkeyPatch) -> Stages:  # noqa: ARG001
    stages = Stages()
    monkeypatch.setattr(pipeline, "STAGES", {"shard": "", "train": ""})
    monkeypatch.setattr(pipeline, "_track", lambda *_: None)
    monkeypatch.setattr(tracking, "record_sweep", lambda *_: None)
    monkeypatch.setattr(dvc_stage, "run", stages)
    return stages


def table(text: str) -> list[list[str]]:
    """The rows of the table in the output, without its head."""
    rows = [re.split(r" ?\| ?", line)[1:-1] for line in text.splitlines() if line.startswith("| ")]
    return rows[2:]


def state(name: str) -> str:
    return workspace.Run.read(RUNS / name).state


def test_a_grid_is_tried_and_compared_the_best_first(stages: Stages, capsys: pytest.CaptureFixture[str]) -> None:
    grid = over(train__learning_rate=[0.004, 0.001], train__batch_size=[8, 16])
    assert sweep_ddpm.main([*grid, "-p", "name=lr", "-p", 'fixed={"train": {"steps": 5}}']) == 0
    tried = [params.load(RUNS / f"lr-{index}/params.yaml").train for index in range(4)]
    assert [(each.learning_rate, each.batch_size) for each in tried] == [
        (0.004, 8),
        (0.004, 16),
        (0.001, 8),
        (0.001, 16),
    ]
    assert {each.steps for each in tried} == {5}
    assert {workspace.Run.read(RUNS / f"lr-{index}").sweep for index in range(4)} == {"lr"}
    printed = capsys.readouterr().out
    assert (
        "4 of 4 trials completed; best: lr-2 (train.learning_rate: 0.001, train.batch_size: 8), val MSE 0.1000"
        in printed
    )
    assert [row[:5] for row in table(printed)] == [
        ["lr-2", "0.001", "8", "0.1000", "0.0500 to 0.1500"],
        ["lr-3", "0.001", "16", "0.1000", "0.0500 to 0.1500"],
        ["lr-0", "0.004", "8", "0.4000", "0.3500 to 0.4500"],
        ["lr-1", "0.004", "16", "0.4000", "0.3500 to 0.4500"],
    ]
    stages.trained.clear()
    assert sweep_ddpm.main([*grid, "-p", "name=lr", "-p", 'fixed={"train.steps": 5}', "-p", "at_once=2"]) == 0
    assert stages.trained == []
    assert "4 of 4 trials completed; best: lr-2" in capsys.readouterr().out


def test_higher_is_better_for_some_objectives(stages: Stages, capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep_ddpm.main([*over(train__learning_rate=[0.1, 0.3, 0.2]), "-p", "objective=precision"]) == 0
    assert [row[1:3] for row in table(capsys.readouterr().out)] == [
        ["0.3", "0.3000"],
        ["0.2", "0.2000"],
        ["0.1", "0.1000"],
    ]
    assert len(stages.trained) == 3


def test_a_failed_trial_does_not_stop_the_others_and_is_tried_again(
    stages: Stages, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(stage: str, _: Path, parameters: Params, __: object) -> None:
        if stage == "train" and parameters.train.learning_rate == 0.002:
            raise StageError("ddpm train: error: the loss is nan | at step 7")

    stages.during = fail
    arguments = [*over(train__learning_rate=[0.001, 0.002, 0.003]), "-p", "name=lr"]
    assert sweep_ddpm.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "2 of 3 trials completed; best: lr-0" in printed
    assert "failed: lr-1 (ddpm train: error: the loss is nan | at step 7)" in printed
    assert table(printed)[-1][-2] == "failed: ddpm train: error: the loss is nan / at step 7"
    assert [state(f"lr-{index}") for index in range(3)] == ["completed", "failed", "completed"]
    stages.during = lambda *_: None
    stages.trained.clear()
    assert sweep_ddpm.main(arguments) == 0
    assert stages.trained == [("lr-1", 0.002)]
    assert "3 of 3 trials completed" in capsys.readouterr().out
    assert sorted(path.name for path in RUNS.glob("[!.]*")) == ["lr-0", "lr-1", "lr-2"]


def test_nothing_completed_is_a_failure(stages: Stages, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no space left\nand more")

    stages.during = fail
    assert sweep_ddpm.main([*over(train__learning_rate=[0.001]), "-p", "name=lr"]) == 1
    assert "\n0 of 1 trial completed; failed: lr-0 (no space left)\n" in capsys.readouterr().out


def test_a_figure_that_is_no_number_is_a_failure(stages: Stages, capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep_ddpm.main([*over(train__learning_rate=[0.001]), "-p", "objective=kid"]) == 1
    assert "(kid is None)" in capsys.readouterr().out
    assert len(stages.trained) == 1


@pytest.mark.parametrize("at_once", [1, 2])
def test_a_killed_sweep_goes_on(stages: Stages, capsys: pytest.CaptureFixture[str], at_once: int) -> None:
    def interrupt(stage: str, _: Path, parameters: Params, on_line: Callable[[str], None]) -> None:
        if stage == "train" and parameters.train.learning_rate == 0.002:
            on_line("train: step 5: held-out MSE 0.5000 ± 0.0100")
            raise KeyboardInterrupt

    stages.during = interrupt
    arguments = [*over(train__learning_rate=[0.001, 0.002, 0.003]), "-p", f"at_once={at_once}"]
    assert sweep_ddpm.main(arguments) == 130
    (name,) = {name.rpartition("-")[0] for name, _ in stages.trained}
    assert re.fullmatch("sweep-[0-9a-f]{8}", name)
    assert state(f"{name}-1") == "cancelled"
    done = {rate for trained, rate in stages.trained if state(trained) == "completed"}
    stages.during = lambda *_: None
    stages.trained.clear()
    capsys.readouterr()
    assert sweep_ddpm.main(arguments) == 0
    assert {rate for _, rate in stages.trained} == {0.001, 0.002, 0.003} - done
    assert (f"{name}-1", 0.002) in stages.trained
    assert "3 of 3 trials completed" in capsys.readouterr().out
    with opened(name) as kept:
        assert [trial.intermediate_values for trial in kept.trials if trial.params[RATES] == "0.002"] == [{5: 0.5}] * 2


@contextmanager
def opened(name: str) -> Iterator[optuna.Study]:
    """A study as Optuna itself reads it."""
    storage = optuna.storages.RDBStorage(f"sqlite:///{Path('.ddpm/sweeps/sweeps.db').absolute()}")
    yield optuna.load_study(study_name=name, storage=storage)
    storage.remove_session()
    storage.engine.dispose()


def test_trials_that_share_a_stage_take_turns_and_others_run_at_once(stages: Stages) -> None:
    together, inside = threading.Barrier(2, timeout=60), set[str]()

    def during(stage: str, _: Path, parameters: Params, __: object) -> None:
        if stage == "train":
            together.wait()  # breaks unless two trials are here at once
            return
        key = str(parameters.shard.val_fraction)
        assert key not in inside
        inside.add(key)
        time.sleep(0.2)
        inside.remove(key)

    stages.during = during
    assert sweep_ddpm.main([*over(train__learning_rate=[0.001, 0.002]), "-p", "at_once=2"]) == 0
    assert len(stages.trained) == 2


def test_trials_above_the_median_are_pruned(stages: Stages, capsys: pytest.CaptureFixture[str]) -> None:
    after = list[float]()

    def during(stage: str, _: Path, parameters: Params, on_line: Callable[[str], None]) -> None:
        if stage == "train":
            error = 100 * parameters.train.learning_rate
            on_line(f"train: step 10: held-out MSE {error:.4f} ± 0.0100")
            after.append(error)

    stages.during = during
    rates = [0.001, 0.002, 0.003, 0.004, 0.005, 0.009, 0.0015]
    arguments = [*over(train__learning_rate=rates), "-p", "prune=true", "-p", "name=lr"]
    assert sweep_ddpm.main(arguments) == 0
    assert [round(error, 4) for error in after] == [0.1, 0.2, 0.3, 0.4, 0.5, 0.15]
    printed = capsys.readouterr().out
    assert "6 of 7 trials completed, 1 pruned; best: lr-0" in printed
    assert table(printed)[-1] == [
        *("lr-5", "0.009", "", "", ""),
        "pruned: held-out MSE 0.9000 at step 10 is above the median of the completed trials",
        "",
    ]
    assert state("lr-5") == "cancelled"
    stages.trained.clear()
    assert sweep_ddpm.main(arguments) == 0
    assert stages.trained == []


def test_optuna_chooses_within_the_ranges(stages: Stages, capsys: pytest.CaptureFixture[str]) -> None:
    ranges = over(
        train__learning_rate={"low": 1e-4, "high": 1e-2, "log": True},
        train__steps={"low": 10, "high": 30, "step": 10},
        network__channel_multipliers=[[1, 2], [2, 2]],
    )
    arguments = [*ranges, "-p", "name=lr"]
    assert sweep_ddpm.main([*arguments, "-p", "trials=3"]) == 0
    tried = [params.load(RUNS / f"lr-{index}/params.yaml") for index in range(3)]
    assert all(1e-4 <= each.train.learning_rate <= 1e-2 for each in tried)
    assert len({each.train.learning_rate for each in tried}) == 3
    assert {each.train.steps for each in tried} <= {10, 20, 30}
    stages.trained.clear()
    capsys.readouterr()
    assert sweep_ddpm.main([*arguments, "-p", "trials=5"]) == 0
    assert [name for name, _ in stages.trained] == ["lr-3", "lr-4"]
    assert {rate for _, rate in stages.trained}.isdisjoint(each.train.learning_rate for each in tried)
    assert len(table(capsys.readouterr().out)) == 5


def test_a_name_belongs_to_one_sweep(stages: Stages, capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep_ddpm.main([*over(train__learning_rate=[0.001]), "-p", "name=lr"]) == 0
    for other in (
        over(train__learning_rate=[0.002]),
        [*over(train__learning_rate=[0.001]), "-p", 'fixed={"train.steps": 5}'],
        [*over(train__learning_rate=[0.001]), "-p", "objective=precision"],
        [*over(train__learning_rate=[0.001]), "-p", "trials=1"],
    ):
        capsys.readouterr()
        assert sweep_ddpm.main([*other, "-p", "name=lr"]) == 1
        error = capsys.readouterr().err
        assert error.startswith("sweep-ddpm: error: name: another sweep is called 'lr' (its ")
        assert error.count("\n") == 1
    assert len(stages.trained) == 1


def test_a_sweep_runs_in_one_process_at_a_time(stages: Stages, capsys: pytest.CaptureFixture[str]) -> None:
    Path(".ddpm/sweeps").mkdir(parents=True)
    with FileLock(".ddpm/sweeps/lr.lock"):
        assert sweep_ddpm.main([*over(train__learning_rate=[0.001]), "-p", "name=lr"]) == 1
    assert "sweep 'lr' is running in another process" in capsys.readouterr().err
    assert stages.trained == []


@pytest.mark.parametrize(
    "address", ["postgresql://me:secret@127.0.0.1:9/sweeps", "sqlite:////nowhere/a.db", "nonsense"]
)
def test_a_database_that_cannot_be_used_is_refused_without_its_password(
    address: str, stages: Stages, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(study.DATABASE, address)
    assert sweep_ddpm.main(over(train__learning_rate=[0.001])) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"sweep-ddpm: error: DDPM_SWEEPS: {address.replace('me:secret@', '')} cannot be used (")
    assert error.count("\n") == 1
    assert stages.trained == []


def test_without_mlflow_the_sweep_is_none_the_worse(
    stages: Stages, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise UserError("MLflow at http://127.0.0.1:9: connection refused")

    monkeypatch.setattr(tracking, "record_sweep", refuse)
    assert sweep_ddpm.main(over(train__learning_rate=[0.001])) == 0
    assert len(stages.trained) == 1
    printed = capsys.readouterr().out
    assert "the sweep is not in MLflow (MLflow at http://127.0.0.1:9: connection refused); starting it" in printed
    assert "1 of 1 trial completed" in printed

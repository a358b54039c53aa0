"""What the flows share: retries, cancelling, progress."""

import logging
import signal
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from prefect.exceptions import TerminationSignal
from prefect.states import Failed

from flows import dvc_stage, flow_run, pipeline
from flows.workspace import StoppedEarly
from flows.yaml_files import read_yaml

pytestmark = pytest.mark.slow


def test_only_a_passing_failure_is_retried() -> None:
    def retried(error: Exception) -> bool:
        state = Failed(data=error)
        return flow_run.worth_retrying(flow_run.TASKS["train"], None, state)  # type: ignore[arg-type]

    assert retried(dvc_stage.PassingStageError("Unable to acquire lock"))
    assert retried(httpx.ConnectError("refused"))
    assert not retried(dvc_stage.StageError("ValueError"))


@pytest.mark.parametrize("cancelling", [True, False])
def test_a_stage_that_is_interrupted_is_cancelled_only_if_its_run_is(
    monkeypatch: pytest.MonkeyPatch, cancelling: bool
) -> None:
    def interrupted(*_: object) -> None:
        raise TerminationSignal(signal.SIGTERM)

    monkeypatch.setattr(dvc_stage, "run", interrupted)
    monkeypatch.setattr(flow_run, "get_run_logger", lambda: logging.getLogger("test"))
    monkeypatch.setattr(flow_run, "cancelling", lambda: cancelling)
    if cancelling:
        assert flow_run.run_stage("shard", Path()).is_cancelled()
    else:
        with pytest.raises(TerminationSignal):
            flow_run.run_stage("shard", Path())


def test_a_watch_sees_every_line_and_stops_the_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    def stage(_: str, __: Path, on_line: Callable[[str], None], *___: object) -> None:
        for line in ("step 1", "step 2", "step 3"):
            on_line(line)

    seen = list[str]()

    class Stop(pipeline.Watch):
        def line(self, line: str) -> None:
            seen.append(line)
            if line == "step 2":
                raise StoppedEarly("not worth it")

    monkeypatch.setattr(dvc_stage, "run", stage)
    monkeypatch.setattr(flow_run, "get_run_logger", lambda: logging.getLogger("test"))
    state = flow_run.run_stage("shard", Path(), None, Stop())
    assert (state.name, state.is_cancelled(), state.message) == ("Pruned", True, "not worth it")
    assert seen == ["step 1", "step 2"]


@pytest.mark.parametrize(("scheduler", "settings"), [("tcp://x:1", {"DDPM_DASK_SCHEDULER": "tcp://x:1"}), (None, None)])
def test_a_scheduler_is_passed_on_to_the_stage(
    monkeypatch: pytest.MonkeyPatch, scheduler: str | None, settings: dict[str, str] | None
) -> None:
    given = list[object]()
    monkeypatch.setattr(dvc_stage, "run", lambda *arguments: given.extend(arguments) or "run")
    monkeypatch.setattr(flow_run, "get_run_logger", lambda: logging.getLogger("test"))
    assert flow_run.run_stage("shard", Path(), scheduler).is_completed()
    assert given[0] == "shard"
    assert given[3] == settings


def test_a_run_whose_server_is_unreachable_is_not_being_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise httpx.ConnectError("refused")

    monkeypatch.setattr(flow_run, "get_client", refuse)
    assert not flow_run.cancelling()


def test_what_prefect_cannot_show_does_not_end_a_stage(
    repository: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise httpx.ConnectError("refused")

    monkeypatch.setattr(flow_run, "create_progress_artifact", fail)
    monkeypatch.setattr(flow_run, "limit_exists", lambda _: False)
    monkeypatch.setattr(flow_run, "get_run_logger", lambda: logging.getLogger("test"))
    dvc_stage.run("shard", repository, print)
    stage = repository / "stage.py"
    stage.write_text(stage.read_text() + "print('train: 1/2 images')\nprint('train: 2/2 images')\n")
    dvc_stage.run("shard", repository, print)
    assert flow_run.run_stage("train", repository).is_completed()
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
        "Prefect cannot show the progress (refused); the stage continues"
    ]
    stage.write_text("raise ValueError('wrong shape')")
    failed = flow_run.run_stage("shard", repository)
    assert failed.is_failed()
    assert failed.message == "ValueError: wrong shape"


def test_a_pruned_trial_ends_for_the_automation_that_marks_lost_runs() -> None:
    file = Path(__file__).parents[2] / "deploy" / "team" / "automations.yaml"
    assert f"prefect.flow-run.{flow_run.PRUNED}" in read_yaml(file)["trigger"]["expect"]

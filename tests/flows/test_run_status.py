"""The rows and messages that a run's events and log lines lead to."""

from datetime import UTC, datetime, timedelta

import pytest

from flows.run_status import Row, RunStatus, clock

START = datetime(2026, 1, 1, tzinfo=UTC)


def at(seconds: float) -> datetime:
    return START + timedelta(seconds=seconds)


@pytest.fixture
def status() -> RunStatus:
    return RunStatus.of("iron-bonobo", ["shard", "train", "export"])


def test_before_anything_happens_all_stages_wait(status: RunStatus) -> None:
    assert status.rows(at(0)) == [
        Row("iron-bonobo", "scheduled", None, ""),
        Row("shard", "waiting", None, ""),
        Row("train", "waiting", None, ""),
        Row("export", "waiting", None, ""),
    ]


def test_a_run_from_its_events_and_lines(status: RunStatus) -> None:
    assert status.flow(("PENDING", "AwaitingConcurrencySlot"), at(0))
    assert status.rows(at(1))[0] == Row("iron-bonobo", "awaiting concurrency slot", None, "")
    assert status.flow(("RUNNING", "Running"), at(2))
    assert status.log(None, 20, "workspace /somewhere", at(3)) is None
    assert status.rows(at(5))[0] == Row("iron-bonobo", "running", 3, "workspace /somewhere")
    for state, seconds in ((("PENDING", "Pending"), 5), (("RUNNING", "Running"), 6), (("COMPLETED", "Cached"), 8)):
        status.task("a", "shard-0c1", state, at(seconds))
    status.task("b", "train-7f3", ("RUNNING", "Running"), at(9))
    status.log("b", 20, "train: 755,009 parameters, on cpu", at(10))
    assert status.rows(at(12))[2] == Row("train", "running", 3, "755,009 parameters, on cpu")
    status.log("b", 20, "train: 640/1280 images, 812/s, 97 s left, loss 0.0712", at(3))
    rows = status.rows(at(20))
    assert rows[0] == Row("iron-bonobo", "running", 18, "")
    assert rows[1] == Row("shard", "cached", 2, "")
    assert rows[2] == Row("train", "running", 11, " 50 %  812 images/s  1:37 left  loss 0.0712", 0.5)
    status.log("b", 20, "train: 20 steps, held-out MSE 0.2196", at(3))
    status.task("b", "train-7f3", ("COMPLETED", "Completed"), at(30), "run")
    status.log("b", 20, "Finished in state Completed('run')", at(3))
    assert status.rows(at(99))[2] == Row("train", "done", 21, "20 steps, held-out MSE 0.2196")


def test_an_event_that_comes_late_changes_nothing(status: RunStatus) -> None:
    assert status.task("a", "shard-0c1", ("COMPLETED", "Completed"), at(8))
    assert status.task("a", "shard-0c1", ("RUNNING", "Running"), at(6)) is None
    assert status.stages["shard"].state == "done"


def test_a_line_of_a_stage_whose_event_was_missed_shows_it_as_running(status: RunStatus) -> None:
    status.log("unknown", 20, "train: 1/4 images, 2/s, 2 s left", at(3))
    assert status.rows(at(5))[2] == Row("train", "running", 2, " 25 %  2 images/s  0:02 left", 0.25)


def test_an_error_is_shown_once_and_in_its_row(status: RunStatus) -> None:
    status.task("a", "shard-0c1", ("RUNNING", "Running"), at(0))
    error = "ddpm shard: error: params.yaml: no"
    assert status.log("a", 20, error, at(3)) == error
    assert status.log("a", 40, f"Finished in state Failed('{error}')", at(3)) is None
    status.task("a", "shard-0c1", ("FAILED", "Failed"), at(4), error)
    assert status.log("a", 40, f"Finished in state Failed('{error}')", at(3)) is None
    assert status.rows(at(9))[1] == Row("shard", "failed", 4, error)


def test_a_states_message_is_shown_without_the_state(status: RunStatus) -> None:
    assert status.log(None, 40, """Finished in state Failed("parameters of the run: seed (got '10')")""", at(3)) == (
        "parameters of the run: seed (got '10')"
    )


def test_warnings_are_shown_and_other_lines_are_not(status: RunStatus) -> None:
    assert status.log(None, 30, "not in MLflow (refused)", at(3)) == "not in MLflow (refused)"
    assert status.log("a", 20, "shard: 3 images", at(3)) is None


def test_a_warning_that_an_earlier_one_contains_is_shown(status: RunStatus) -> None:
    assert status.log("a", 30, "disk full: retrying in 10 s", at(3)) == "disk full: retrying in 10 s"
    assert status.log("a", 30, "disk full", at(4)) == "disk full"
    assert status.log("a", 30, "disk full", at(5)) is None


def test_an_error_with_a_prefix_is_not_repeated_without_it(status: RunStatus) -> None:
    assert status.log("a", 20, "ddpm train: error: no GPU", at(3)) == "ddpm train: error: no GPU"
    assert status.log("a", 40, "Finished in state Failed('no GPU')", at(4)) is None


def test_what_ran_when_the_run_ended_has_ended_with_it(status: RunStatus) -> None:
    status.flow(("RUNNING", "Running"), at(0))
    status.task("a", "shard-0c1", ("RUNNING", "Running"), at(1))
    status.flow(("CRASHED", "Crashed"), at(5))
    assert [row.state for row in status.rows(at(9))] == ["crashed", "crashed", "waiting", "waiting"]
    assert status.rows(at(9))[1].seconds == 4


def test_a_failed_run_says_why(status: RunStatus) -> None:
    status.flow(("RUNNING", "Running"), at(0))
    status.flow(("FAILED", "Failed"), at(5), "train.stepz: no such parameter")
    assert status.rows(at(9))[0] == Row("iron-bonobo", "failed", 5, "train.stepz: no such parameter")


def test_a_retry_is_waited_for(status: RunStatus) -> None:
    status.task("a", "shard-0c1", ("SCHEDULED", "AwaitingRetry"), at(1))
    assert status.rows(at(2))[1].state == "retrying"


@pytest.mark.parametrize(("seconds", "text"), [(-61.5, "0:00"), (0.9, "0:00"), (97, "1:37"), (3600 + 62, "1:01:02")])
def test_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text

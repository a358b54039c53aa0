"""What a watched run looks like, on terminals of several widths and elsewhere; tests/e2e watches a real one."""

import asyncio
import io
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any
from unittest.mock import AsyncMock
from uuid import UUID, uuid4

import pytest
from prefect.cli import flow_runs_watching
from prefect.client.schemas.objects import Log
from prefect.events import Event
from prefect.exceptions import FlowRunWaitTimeout
from rich.console import Console, Group

from flows import watch
from flows.run_status import Row, RunStatus

START = datetime(2026, 1, 1, tzinfo=UTC)
ROWS = [
    Row("iron-bonobo", "running", 75, ""),
    Row("shard", "cached", 3, ""),
    Row("train", "running", 65, " 42 %  812 images/s  1:31 left  loss 0.0712", 0.42),
    Row("evaluate", "waiting", None, ""),
]


def event(
    task: UUID, name: str, kind: str, state: str, seconds: float, of: str = "task-run", message: str = ""
) -> Event:
    resource = {
        "prefect.resource.id": f"prefect.{of}.{task}",
        "prefect.resource.name": name,
        "prefect.state-type": kind,
        "prefect.state-name": state,
        "prefect.state-message": message,
    }
    occurred = START + timedelta(seconds=seconds)
    return Event(occurred=occurred, event=f"prefect.{of}.{state}", resource=resource, id=uuid4())


def log(task: UUID | None, message: str, level: int = 20) -> Log:
    return Log(name="prefect", level=level, message=message, timestamp=START, flow_run_id=uuid4(), task_run_id=task)


def console(**options: Any) -> Console:
    return Console(file=io.StringIO(), highlight=False, **options)


def written(to: Console) -> str:
    assert isinstance(to.file, io.StringIO)
    return to.file.getvalue()


def shown(width: int, **options: Any) -> list[str]:
    to = console(width=width, force_terminal=True, **options)
    to.print(Group(*watch.lines(ROWS, width)))
    return written(to).splitlines()


def test_a_terminal_of_80_columns() -> None:
    assert shown(80, color_system=None) == [
        "iron-bonobo  running  1:15  ",
        "shard     cached       0:03  ",
        "train     running      1:05   42 %  812 images/s  1:31 left  loss 0.0712",
        "evaluate  waiting            ",
    ]


def test_a_narrow_terminal_cuts_and_never_wraps() -> None:
    lines = shown(50, color_system=None)
    assert len(lines) == len(ROWS)
    assert lines[2] == "train     running      1:05   42 %  812 images/s …"


def test_a_wide_terminal_has_a_bar() -> None:
    assert f"1:05  {'━' * 20}   42 %" in shown(120, color_system=None)[2]


def test_no_color_disables_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b[34m" in shown(80, color_system="standard")[2]
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[34m" not in shown(80, color_system="standard")[2]


def items(run: UUID, shard: UUID, train: UUID) -> list[Any]:
    return [
        event(run, "iron-bonobo", "RUNNING", "Running", 0, "flow-run"),
        event(shard, "shard-0c1", "RUNNING", "Running", 1),
        event(shard, "shard-0c1", "COMPLETED", "Cached", 3),
        event(train, "train-7f3", "RUNNING", "Running", 4),
        log(train, "train: 640/1280 images, 812/s, 97 s left, loss 0.0712"),
        log(None, "not in MLflow (refused)", 30),
        log(train, "train: 20 steps, held-out MSE 0.2196"),
        event(train, "train-7f3", "COMPLETED", "Completed", 69),
        event(run, "iron-bonobo", "COMPLETED", "Completed", 70, "flow-run"),
    ]


def test_without_a_terminal_there_is_a_line_for_each_change() -> None:
    to = console(width=40)
    with watch.Display(to, RunStatus.of("iron-bonobo", ["shard", "train"])) as display:
        for item in items(uuid4(), uuid4(), uuid4()):
            display.print(item)
    assert written(to).splitlines() == [
        "iron-bonobo: running",
        "shard: running",
        "shard: cached after 0:02",
        "train: running",
        "not in MLflow (refused)",
        "train: done after 1:05: 20 steps, held-out MSE 0.2196",
        "iron-bonobo: done",
    ]


def test_without_a_terminal_progress_is_reported_periodically(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "REPORT_SECONDS", 0.0)
    monkeypatch.setattr(watch, "POLL_SECONDS", 0.05)
    to = console(width=200)

    async def reported() -> None:
        with watch.Display(to, RunStatus.of("iron-bonobo", ["shard", "train"])) as display:
            for item in items(uuid4(), uuid4(), uuid4())[:5]:
                display.print(item)
            reporter = asyncio.create_task(display.report_progress())
            await asyncio.sleep(0.3)
            reporter.cancel()

    asyncio.run(reported())
    lines = written(to).splitlines()[4:]
    assert lines[0] == "train: 640/1280 images, 812/s, 97 s left, loss 0.0712"
    assert lines[1].startswith(f"{lines[0]} (")  # nothing new: how long it has been running


@pytest.mark.parametrize("terminal", [True, False])
def test_a_failure_is_shown_once_even_if_the_log_is_late_or_missing(terminal: bool) -> None:
    to = console(width=80, force_terminal=terminal, color_system=None)
    status, why = RunStatus.of("iron-bonobo", ["shard"]), "parameters of the run: train.stepz: no such parameter"
    with watch.Display(to, status) as display:
        display.print(event(uuid4(), "iron-bonobo", "FAILED", "Failed", 5, "flow-run", why))
        display.print(log(None, f"Finished in state Failed('{why}')", 40))
    above = [line for line in written(to).splitlines() if line.endswith(why) and "iron-bonobo" not in line]
    assert len(above) == 1


def test_a_result_that_was_just_printed_is_not_repeated() -> None:
    to, train = console(width=40), uuid4()
    with watch.Display(to, RunStatus.of("iron-bonobo", ["train"])) as display:
        display.print(event(train, "train-7f3", "RUNNING", "Running", 0))
        display.print(log(train, "train: 20 steps"))
        display._say("train: 20 steps", "train: 20 steps")
        display.print(event(train, "train-7f3", "COMPLETED", "Completed", 5))
    assert written(to).splitlines() == ["train: running", "train: 20 steps", "train: done after 0:05"]


def test_on_a_terminal_the_last_frame_stays() -> None:
    to = console(width=80, force_terminal=True, color_system=None)
    with watch.Display(to, RunStatus.of("iron-bonobo", ["shard", "train"])) as display:
        for item in items(uuid4(), uuid4(), uuid4()):
            display.print(item)
    _, _, last = written(to).rpartition("iron-bonobo")
    lines = [line.rstrip() for line in last.splitlines()]
    assert lines[:3] == [
        "  done  1:10",
        "shard  cached       0:02",
        "train  done         1:05  20 steps, held-out MSE 0.2196",
    ]
    assert "not in MLflow (refused)" in written(to)


def server(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A Prefect server with a deployment of this name, and a run of it that has come to its training."""

    def ran(kind: str, state: str, start: float, at: float, **more: Any) -> SimpleNamespace:
        moment = START + timedelta(seconds=at)
        found = SimpleNamespace(type=SimpleNamespace(value=kind), name=state, timestamp=moment)
        return SimpleNamespace(state=found, start_time=START + timedelta(seconds=start), **more)

    train = uuid4()
    client = AsyncMock()
    client.__aenter__.return_value = client
    client.read_flow_run.return_value = ran("RUNNING", "Running", 0, 0, name="iron-bonobo", deployment_id=uuid4())
    client.read_deployment.return_value = SimpleNamespace(name=name)
    client.read_task_runs.return_value = [
        ran("COMPLETED", "Cached", 1, 3, id=uuid4(), name="shard-0c1"),
        ran("RUNNING", "Running", 4, 4, id=train, name="train-7f3"),
    ]
    client.read_logs.return_value = [  # the newest first
        log(train, "train: 640/1280 images, 812/s, 97 s left"),
        log(train, "train: 20/1280 images, 9/s, 999 s left"),
    ]
    monkeypatch.setattr(watch, "get_client", lambda: client)


def test_watching_a_run_in_progress_starts_with_what_the_server_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    server(monkeypatch, "train-ddpm")
    status = asyncio.run(watch.status_of(uuid4()))
    assert status is not None
    assert status.rows(START + timedelta(seconds=10))[:4] == [
        Row("iron-bonobo", "running", 10, ""),
        Row("shard", "cached", 2, ""),
        Row("pairs", "waiting", None, ""),
        Row("train", "running", 6, " 50 %  812 images/s  1:37 left", 0.5),
    ]


def test_the_stages_are_those_of_the_flow(monkeypatch: pytest.MonkeyPatch) -> None:
    server(monkeypatch, "distill-ddpm")
    client: Any = watch.get_client()
    _, running = client.read_task_runs.return_value
    running.name, running.start_time = "evaluate-student-0c1", START
    client.read_task_runs.return_value = [running]
    client.read_logs.return_value = [log(None, "evaluate-student: 31/62 steps, 31/s, 1 s left")]
    status = asyncio.run(watch.status_of(uuid4()))
    assert status is not None
    assert status.rows(START + timedelta(seconds=10))[1:] == [
        Row("distill", "waiting", None, ""),
        Row("evaluate-student", "running", 10, " 50 %  31 steps/s  0:01 left", 0.5),
        Row("export-student", "waiting", None, ""),
    ]
    server(monkeypatch, "of someone else")
    assert asyncio.run(watch.status_of(uuid4())) is None


def test_why_a_run_failed_is_shown_when_prefect_replays_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The server's log was read before; without a terminal, only the replayed line shows the reason."""
    server(monkeypatch, "train-ddpm")
    error = log(None, "ddpm train: error: no GPU", 40)
    watch.get_client().read_logs.return_value = [error]  # type: ignore[attr-defined]
    status, to = asyncio.run(watch.status_of(uuid4())), console(width=80)
    assert status is not None
    with watch.Display(to, status) as display:
        for _ in range(2):
            display.print(error)
    assert written(to).splitlines() == ["ddpm train: error: no GPU"]


def test_a_run_of_another_deployment_is_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    server(monkeypatch, "other")
    assert asyncio.run(watch.status_of(uuid4())) is None


@pytest.fixture
def ours(monkeypatch: pytest.MonkeyPatch) -> None:
    async def status(_: UUID) -> RunStatus:
        return RunStatus.of("iron-bonobo", ["shard"])

    monkeypatch.setattr(watch, "status_of", status)


@pytest.mark.usefixtures("ours")
def test_prefect_s_own_watching_stays_in_charge() -> None:
    """Its timeout and its return value are kept; its formatter is back afterwards."""
    to, before = console(width=80), flow_runs_watching.FlowRunFormatter

    async def prefects(flow_run_id: UUID, console: Any, timeout: int | None = None) -> Any:
        assert timeout == 7
        console.print(flow_runs_watching.FlowRunFormatter().format(event(flow_run_id, "x", "RUNNING", "Running", 0)))
        raise FlowRunWaitTimeout("exceeded")

    with pytest.raises(FlowRunWaitTimeout):
        asyncio.run(watch.wrap_watch(prefects)(uuid4(), to, 7))  # type: ignore[arg-type]
    assert flow_runs_watching.FlowRunFormatter is before


@pytest.mark.usefixtures("ours")
def test_an_interruption_says_that_the_run_continues() -> None:
    to, run = console(width=40), uuid4()

    async def prefects(*_: Any) -> Any:
        await asyncio.sleep(60)

    async def interrupted() -> None:
        watching = asyncio.create_task(watch.wrap_watch(prefects)(run, to, None))  # type: ignore[arg-type]
        await asyncio.sleep(0.05)
        watching.cancel()
        await watching

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(interrupted())
    assert written(to) == f"The run continues; to watch it again: prefect flow-run watch {run}\n"


def test_other_runs_keep_prefect_s_display(monkeypatch: pytest.MonkeyPatch) -> None:
    async def none(_: UUID) -> None:
        return None

    monkeypatch.setattr(watch, "status_of", none)
    to, given = console(width=80), []

    async def prefects(*arguments: Any) -> Any:
        given.append(arguments)
        return "finished"

    run = uuid4()
    assert asyncio.run(watch.wrap_watch(prefects)(run, to, None)) == "finished"  # type: ignore[arg-type, comparison-overlap]
    assert given == [(run, to, None)]


def test_another_prefect_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flow_runs_watching, "watch_flow_run", own := flow_runs_watching.watch_flow_run)
    monkeypatch.delattr(flow_runs_watching, "FlowRunFormatter")
    watch.install()
    assert flow_runs_watching.watch_flow_run is own

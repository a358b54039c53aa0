"""`prefect deployment run NAME --watch` and `prefect flow-run watch`: one live line for each stage.

Prefect's own watcher still follows the events and the log, and returns the final state. This module only replaces what
it prints for each of them.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from logging import ERROR
from typing import Any
from uuid import UUID

from prefect.cli import flow_runs_watching
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId, LogFilter, LogFilterFlowRunId
from prefect.client.schemas.objects import FlowRun, Log, TaskRun
from prefect.client.schemas.sorting import LogSort
from prefect.events import Event
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.text import Text

from flows import deployment
from flows.run_status import Row, RunStatus, Step, clock

REPORT_SECONDS = 10.0
"""Where the output is no terminal."""
POLL_SECONDS = 1.0
COLORS = {
    "running": "blue",
    "done": "green",
    "cached": "green",
    "failed": "red",
    "crashed": "red",
    "cancelled": "yellow",
    "retrying": "yellow",
}
BAR = 20
"""Columns of the progress bar; it is left out where the terminal is narrower than WIDE."""
WIDE = 110

WatchFlowRun = Callable[[UUID, Console, int | None], Awaitable[FlowRun]]


class Display:
    """Shows a run: rows that update in place on a terminal, lines elsewhere.

    Passed to Prefect's `watch_flow_run` in place of the console; receives unformatted events and log entries.
    """

    def __init__(self, console: Console, status: RunStatus) -> None:
        self.console, self.status = console, status
        self._live = Live(self, console=console, refresh_per_second=4) if console.is_terminal else None
        self._printed = datetime.now(UTC)
        self._last = ""

    def __enter__(self) -> "Display":
        if self._live:
            self.console.print()
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def print(self, item: Any, **options: Any) -> None:
        """Take an event or a line of the log; anything else is printed."""
        if isinstance(item, Log):
            message = self.status.log(str(item.task_run_id or ""), item.level, item.message, item.timestamp)
            self._warn(message, "red" if item.level >= ERROR or ": error:" in item.message else "yellow")
        elif isinstance(item, Event):
            self._event(item)
        else:
            self.console.print(item, **options)

    def _warn(self, message: str | None, style: str) -> None:
        if message:
            self.console.print(Text(message, style), soft_wrap=True)

    def _event(self, event: Event) -> None:
        kind, _, run = event.resource.id.removeprefix("prefect.").partition(".")
        state = (event.resource.get("prefect.state-type") or "", event.resource.get("prefect.state-name") or "")
        if not all(state):
            return
        message = event.resource.get("prefect.state-message") or ""
        if state[0] in ("FAILED", "CRASHED") and message:
            self._warn(self.status.once(message), "red")  # its line in the log may come too late, or never
        if kind == "task-run":
            name = event.resource.get("prefect.resource.name") or ""
            if (stage := self.status.task(run, name, state, event.occurred, message)) and not self._live:
                self._changed(stage)
        elif kind == "flow-run" and self.status.flow(state, event.occurred, message) and not self._live:
            self._say(f"{self.status.run.name}: {self.status.run.state}")

    async def report_progress(self) -> None:
        """Where the output is no terminal: print how far the running stage is, every REPORT_SECONDS."""
        while not self._live:
            await asyncio.sleep(POLL_SECONDS)
            now, active = datetime.now(UTC), self.status.active()
            if (now - self._printed).total_seconds() >= REPORT_SECONDS:
                shown = active or self.status.run
                text, seconds = f"{shown.name}: {shown.last_line or shown.state}", shown.row(now).seconds
                self._say(
                    f"{text} ({clock(seconds or 0)})" if text == self._last or not shown.last_line else text, text
                )

    def _changed(self, stage: Step) -> None:
        """Print a stage's new state, with its result unless that was printed just now."""
        _, state, seconds, detail, _ = stage.row(datetime.now(UTC))
        if state == "running":
            return self._say(f"{stage.name}: running")
        text = f"{stage.name}: {state}" + (f" after {clock(seconds)}" if seconds is not None else "")
        shown = not detail or self._last == f"{stage.name}: {detail}"
        return self._say(text if shown else f"{text}: {detail}")

    def _say(self, line: str, last: str = "") -> None:
        self._printed, self._last = datetime.now(UTC), last
        self.console.print(Text(line), soft_wrap=True)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from lines(self.status.rows(datetime.now(UTC)), options.max_width)


def lines(rows: Sequence[Row], width: int) -> Iterator[Text]:
    """The rows, the run's first, as a terminal of this width shows them; what does not fit is cut, never wrapped."""
    run, *stages = rows
    names = max((len(stage.name) for stage in stages), default=0)
    for row, columns in ((run, 0), *((stage, names) for stage in stages)):
        line = Text(no_wrap=True, overflow="ellipsis")
        line.append(f"{row.name:{columns}}  ", "" if columns else "bold")
        line.append(f"{row.state:9}" if columns else row.state, COLORS.get(row.state, "dim"))
        elapsed = clock(row.seconds) if row.seconds is not None else ""
        line.append(f"  {elapsed:>{6 if columns else 0}}  ")
        if row.share is not None and width >= WIDE:
            full = round(BAR * row.share)
            line.append("━" * full, "blue").append("━" * (BAR - full) + "  ", "dim")
        yield line.append(row.detail, "" if row.state == "running" else "dim")


class Unformatted:
    """Replaces Prefect's formatter: returns items unchanged."""

    def format(self, item: Any) -> Any:
        return item


def wrap_watch(watch: WatchFlowRun) -> WatchFlowRun:
    """Wrap Prefect's `watch_flow_run` to show runs of our deployments by stage; other runs are shown as before."""

    async def watch_flow_run(flow_run_id: UUID, console: Console, timeout: int | None = None) -> FlowRun:
        status = await status_of(flow_run_id)
        if status is None:
            return await watch(flow_run_id, console, timeout)
        formatter = flow_runs_watching.FlowRunFormatter
        try:
            with Display(console, status) as display:
                reporter = asyncio.create_task(display.report_progress())
                try:
                    vars(flow_runs_watching)["FlowRunFormatter"] = Unformatted
                    return await watch(flow_run_id, display, timeout)  # type: ignore[arg-type]
                finally:
                    vars(flow_runs_watching)["FlowRunFormatter"] = formatter
                    reporter.cancel()
        except asyncio.CancelledError:  # Ctrl-C
            again = f"The run continues; to watch it again: prefect flow-run watch {flow_run_id}"
            console.print(again, soft_wrap=True)
            raise

    return watch_flow_run


async def status_of(flow_run_id: UUID) -> RunStatus | None:
    """The state of a flow run of our deployments so far, since events only report changes; None for other runs."""
    with suppress(Exception):  # Prefect's own display will say what is wrong
        async with get_client() as client:
            run = await client.read_flow_run(flow_run_id)
            if not run.deployment_id:
                return None
            stages = deployment.FLOWS.get((await client.read_deployment(run.deployment_id)).name)
            if stages is None:
                return None
            status = RunStatus.of(run.name, stages)
            this = FlowRunFilter(id=FlowRunFilterId(any_=[flow_run_id]))
            for task in await client.read_task_runs(flow_run_filter=this):
                for state, at in _states(task):
                    status.task(str(task.id), task.name, state, at)
            for state, at in _states(run):
                status.flow(state, at)
            newest = LogFilter(flow_run_id=LogFilterFlowRunId(any_=[flow_run_id]))
            for line in reversed(await client.read_logs(newest, limit=200, sort=LogSort.TIMESTAMP_DESC)):
                status.log(str(line.task_run_id or ""), line.level, line.message, line.timestamp)
            status.forget_messages()  # those that Prefect replays are to be shown
            return status
    return None


def _states(run: FlowRun | TaskRun) -> Iterator[tuple[tuple[str, str], datetime]]:
    """When a run began, and the state in which it is, as (type, name)."""
    if run.start_time:
        yield ("RUNNING", "Running"), run.start_time
    if run.state:
        yield (run.state.type.value, run.state.name or ""), run.state.timestamp


def install() -> None:
    """Make Prefect's command line show our runs by stages; must come before its commands are imported."""
    known = vars(flow_runs_watching)
    if {"FlowRunFormatter", "watch_flow_run"} <= known.keys():  # else this is a later Prefect, with its own display
        known["watch_flow_run"] = wrap_watch(known["watch_flow_run"])

"""`prefect deployment run train-ddpm --watch` and `prefect flow-run watch`: one live line for each stage.

Prefect's own watching stays in charge: it follows the events and the log, waits, and ends with the run's state. Only
what it would print of each event and line, is shown here instead.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from prefect.cli import flow_runs_watching
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun, Log
from prefect.events import Event
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.text import Text

from flows import deployment
from flows.run_status import Row, RunStatus, Step, clock
from flows.stages import STAGES

SECONDS_BETWEEN_LINES = 10.0
"""Where the output is no terminal."""
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

Watch = Callable[[UUID, Console, int | None], Awaitable[FlowRun]]


class Display:
    """Shows a run: rows that update in place on a terminal, lines elsewhere.

    It takes the console's place in Prefect's `watch_flow_run`, whose formatter hands it the events and lines as they
    are.
    """

    def __init__(self, console: Console, status: RunStatus) -> None:
        self.console, self.status = console, status
        self._live = Live(self, console=console, refresh_per_second=4) if console.is_terminal else None
        self._printed = datetime.now(UTC)
        self._last = ""

    def __enter__(self) -> "Display":
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def print(self, item: Any, **options: Any) -> None:
        """Take an event or a line of the log; anything else is printed."""
        if isinstance(item, Log):
            if told := self.status.log(str(item.task_run_id or ""), item.level, item.message):
                style = "red" if item.level >= 40 or ": error:" in told else "yellow"
                self.console.print(Text(told, style))
        elif isinstance(item, Event):
            self._event(item)
        else:
            self.console.print(item, **options)

    def _event(self, event: Event) -> None:
        kind, _, run = event.resource.id.removeprefix("prefect.").partition(".")
        state = (event.resource.get("prefect.state-type") or "", event.resource.get("prefect.state-name") or "")
        if not all(state):
            return
        if kind == "task-run":
            message = event.resource.get("prefect.state-message") or ""
            name = event.resource.get("prefect.resource.name") or ""
            if (stage := self.status.task(run, name, state, event.occurred, message)) and not self._live:
                self._say(_changed(stage))
        elif kind == "flow-run" and self.status.flow(state, event.occurred) and not self._live:
            self._say(f"{self.status.run.name}: {self.status.run.state}")

    async def remind(self) -> None:
        """Where the output is no terminal: print how far the running stage is, every SECONDS_BETWEEN_LINES."""
        while not self._live:
            await asyncio.sleep(1)
            now, active = datetime.now(UTC), self.status.active()
            if (now - self._printed).total_seconds() >= SECONDS_BETWEEN_LINES:
                shown = active or self.status.run
                text, seconds = f"{shown.name}: {shown.said or shown.state}", shown.row(now).seconds
                self._say(f"{text} ({clock(seconds or 0)})" if text == self._last else text, text)

    def _say(self, line: str, last: str = "") -> None:
        self._printed, self._last = datetime.now(UTC), last
        self.console.print(Text(line), soft_wrap=True)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from lines(self.status.rows(datetime.now(UTC)), options.max_width)


def _changed(stage: Step) -> str:
    """A stage's new state as a line."""
    _, state, seconds, detail, _ = stage.row(datetime.now(UTC))
    if state == "running":
        return f"{stage.name}: running"
    took = f" after {clock(seconds)}" if seconds is not None else ""
    return f"{stage.name}: {state}{took}" + (f": {detail}" if detail else "")


def lines(rows: list[Row], width: int) -> Iterator[Text]:
    """The rows as they are shown on a terminal of this width; what does not fit is cut, never wrapped."""
    names = max(len(row.name) for row in rows)
    for name, state, seconds, detail, share in rows:
        line = Text(no_wrap=True, overflow="ellipsis")
        line.append(f"{name:{names}}  ").append(f"{state:9}", COLORS.get(state, "dim"))
        line.append(f" {clock(seconds) if seconds is not None else '':>7}  ")
        if share is not None and width >= WIDE:
            full = round(BAR * share)
            line.append("━" * full, "blue").append("━" * (BAR - full) + "  ", "dim")
        yield line.append(detail, "" if state == "running" else "dim")


class Unformatted:
    """In place of Prefect's formatter: passes on what it is given."""

    def format(self, item: Any) -> Any:
        return item


def replacing(watch: Watch) -> Watch:
    """Prefect's `watch_flow_run`, which shows the runs of our deployment by stages, and any other as ever."""

    async def watch_flow_run(flow_run_id: UUID, console: Console, timeout: int | None = None) -> FlowRun:
        name = await name_of_ours(flow_run_id)
        if name is None:
            return await watch(flow_run_id, console, timeout)
        formatter = flow_runs_watching.FlowRunFormatter
        try:
            with Display(console, RunStatus.of(name, list(STAGES))) as display:
                reminding = asyncio.create_task(display.remind())
                try:
                    vars(flow_runs_watching)["FlowRunFormatter"] = Unformatted
                    return await watch(flow_run_id, display, timeout)  # type: ignore[arg-type]
                finally:
                    vars(flow_runs_watching)["FlowRunFormatter"] = formatter
                    reminding.cancel()
        except asyncio.CancelledError:  # Ctrl-C
            console.print(f"The run goes on: `prefect flow-run watch {flow_run_id}` shows it again.", soft_wrap=True)
            raise

    return watch_flow_run


async def name_of_ours(flow_run_id: UUID) -> str | None:
    """The name of a flow run of our deployment; None of any other."""
    with suppress(Exception):  # Prefect's own display will say what is wrong
        async with get_client() as client:
            run = await client.read_flow_run(flow_run_id)
            if run.deployment_id and (await client.read_deployment(run.deployment_id)).name == deployment.NAME:
                return run.name
    return None


def install() -> None:
    """Make Prefect's command line show our runs by stages; must come before its commands are imported."""
    known = vars(flow_runs_watching)
    if {"FlowRunFormatter", "watch_flow_run"} <= known.keys():  # else this is a later Prefect, with its own display
        known["watch_flow_run"] = replacing(known["watch_flow_run"])

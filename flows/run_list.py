"""`ddpm runs`: the table of all flow runs."""

import json
from pathlib import Path

from diffusion.errors import counted
from flows import workspace
from flows.paths import Paths


def show() -> None:
    """Print name, time, state, held-out MSE and origin of each run, sorted by end, and when runs are deleted."""
    runs, days = workspace.retention()
    rows = [("RUN", "CREATED (UTC)", "STATE", "MSE", "DISTILS", "STARTS FROM")]
    for directory, run in workspace.all_runs():
        created = run.created[:16].replace("T", " ")
        # A student has no such figure; the file in its workspace is its teacher's.
        mse = "" if run.teacher else _mse(Paths(directory).evaluate_report)
        rows.append((run.name, created, workspace.state_of(directory, run), mse, run.teacher, run.start))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print(
        f"\nEach new run deletes all but the last {counted(runs, 'run')} (DDPM_KEEP_RUNS) and those that ended more "
        f"than {counted(days, 'day', spec='g')} ago (DDPM_KEEP_DAYS)."
    )


def _mse(report: Path) -> str:
    try:
        return f"{json.loads(report.read_text())['mse']:.4f}" if report.exists() else ""
    except (ValueError, TypeError, KeyError):
        return "damaged"

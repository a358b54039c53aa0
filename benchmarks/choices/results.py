"""Results as JSON lines, one for each run, appended when it is finished, so that an interrupted series goes on."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import torch
from portable import processor
from tqdm import tqdm

from diffusion.errors import FileFault
from diffusion.evaluation.quality import Quality

ROOT = Path(__file__).parents[2]
Row = dict[str, Any]
Interval = list[float]
"""Value, and lower and upper limit."""
Task = TypeVar("Task")


def read(path: Path) -> list[Row]:
    """The rows of a results file, none if it is missing; raises UserError if a line is not a JSON object."""
    rows = []
    for number, line in enumerate(path.read_text().splitlines() if path.exists() else [], start=1):
        try:
            rows.append(dict(json.loads(line)))
        except (ValueError, TypeError):
            raise FileFault(path, f"line {number} is not a JSON object; delete it") from None
    return rows


def facts() -> Row:
    """Where and by which revision of the code a run is made."""
    command = ["git", "rev-parse", "--short=8", "HEAD"]
    commit = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    return {"commit": commit, "processor": processor()}


def of_quality(measured: Quality, which: str = "samples") -> dict[str, Interval]:
    """The figures of a set of images, with their intervals, by name."""
    found = [figure for figure in measured.figures if figure.set == which]
    return {figure.metric: [figure.value, figure.low, figure.high] for figure in found}


def run_all(tasks: Sequence[Task], measure: Callable[[Task], Row], jobs: int, out: Path) -> None:
    """Measure each task in one of `jobs` processes with one thread each, and append its row to `out`."""
    out.parent.mkdir(parents=True, exist_ok=True)
    common = facts()
    with (
        ProcessPoolExecutor(jobs, get_context("spawn"), _start) as pool,
        tqdm(total=len(tasks), desc=out.name, unit="run", disable=None) as bar,
    ):
        pending = [pool.submit(measure, task) for task in tasks]
        try:
            for done in as_completed(pending):
                line = json.dumps(done.result() | common, ensure_ascii=False)
                with out.open("a") as file:
                    file.write(f"{line}\n")
                bar.update()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _start() -> None:
    """Start a process: one thread, and no progress lines of its own."""
    torch.set_num_threads(1)
    sys.stderr = open(os.devnull, "w")  # noqa: PTH123, SIM115

"""Measurements in processes of their own."""

import multiprocessing
import re
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

Result = TypeVar("Result")
ROUNDS = 3


class Cost(NamedTuple):
    """What a call needed."""

    cpu_s: float
    """Of this process, with its threads."""
    wall_s: float
    mib: float
    """By how much the peak of the process's memory rose; shared pages of mapped files count."""


def cost(call: Callable[[], Result]) -> tuple[Result, Cost]:
    """The result of a call, and what it needs."""
    memory, wall, cpu = peak_mib(), time.perf_counter(), time.process_time()
    result = call()
    return result, Cost(time.process_time() - cpu, time.perf_counter() - wall, peak_mib() - memory)


def peak_mib() -> float:
    """Peak memory of this process since it was started, in MiB."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    if found is None:
        sys.exit("growth.py: measures memory by /proc, which only Linux has")
    return int(found[1]) / 1024


def isolated(function: Callable[..., Result], *arguments: object) -> Result:
    """The result of a function that is called in a new process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def median(function: Callable[..., dict[str, Any]], *arguments: object, rounds: int = ROUNDS) -> dict[str, Any]:
    """The median of each number that a function returns, called in new processes."""
    found = [isolated(function, *arguments) for _ in range(rounds)]
    return {name: float(f"{statistics.median(row[name] for row in found):.4g}") for name in found[0]}

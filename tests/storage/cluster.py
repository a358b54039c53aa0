"""A Dask scheduler and its workers: processes that share neither a folder nor settings with the tests."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
DASK = str(Path(sys.executable).with_name("dask"))


class Cluster(NamedTuple):
    address: str
    """Of the scheduler."""
    scheduler: subprocess.Popen[bytes]
    workers: tuple[subprocess.Popen[bytes], ...]
    """Their names are their numbers."""


def start(directory: Path, *arguments: str) -> subprocess.Popen[bytes]:
    """Start a command of Dask in a new directory."""
    directory.mkdir()
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment |= {"DASK_DISTRIBUTED__ADMIN__LOW_LEVEL_LOG_LENGTH": "10"}  # see deploy/dask/README.md
    command = [DASK, *arguments, "--no-dashboard"]
    return subprocess.Popen(command, cwd=directory, env=environment, stderr=subprocess.DEVNULL)


@contextmanager
def cluster(directory: Path, workers: int, options: Sequence[str] = ()) -> Iterator[Cluster]:
    """Start a scheduler, and workers with these options, in an empty directory; they are killed at the end."""
    facts = directory / "scheduler.json"
    scheduler = ("scheduler", "--host=127.0.0.1", "--port=0", f"--scheduler-file={facts}")
    processes = [start(directory / "scheduler", *scheduler)]
    try:
        while not facts.exists():
            assert processes[0].poll() is None
            time.sleep(0.05)
        address: str = json.loads(facts.read_text())["address"]
        for number in range(workers):
            worker = ("worker", address, "--host=127.0.0.1", "--nthreads=1", "--no-nanny", f"--name={number}")
            local = f"--local-directory={directory}/local{number}"
            processes.append(start(directory / f"worker{number}", *worker, local, *options))
        yield Cluster(address, processes[0], tuple(processes[1:]))
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.wait(timeout=30)
